"""Circuits of trained models as their papers give them: node circuits with a column for each role."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from workbench.circuits import Circuit, circuit_graph
from workbench.errors import UnknownName

_FILE = Path(__file__).resolve().parent / "circuits.json"


@cache
def _records() -> dict[str, dict[str, Any]]:
    return json.loads(_FILE.read_text(encoding="utf-8"))


def published_circuits() -> dict[str, str]:
    """Every published circuit's name, and its model and source in one line."""
    return {name: f"{record['model']}: {record['source']}" for name, record in _records().items()}


def published_circuit(name: str) -> Circuit:
    """A published circuit over the heads of its model, and over its MLPs where the paper chooses among them.

    Scores are 1 for kept nodes and 0 for the others. Each role is a column (bool). The provenance has ``task``, ``model``,
    ``source``, ``note`` and ``roles``. Raises ``UnknownName`` with the names that exist.
    """
    if name not in _records():
        raise UnknownName("published circuit", name, _records())
    record = _records()[name]
    graph = circuit_graph(record["layers"], record["heads"], mlp=record["mlp"])
    names = graph.writers[1:]
    roles: dict[str, list[str]] = record["roles"]
    told = {key: record[key] for key in ("task", "model", "source", "note", "roles")}
    kept = [node for found in roles.values() for node in found]
    circuit = Circuit.of("node", names, kept, method="published", **told)
    columns = {role: torch.tensor([node in found for node in names]) for role, found in roles.items()}
    return Circuit("node", names, circuit.scores, circuit.kept, circuit.provenance, columns)
