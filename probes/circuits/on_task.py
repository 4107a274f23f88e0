"""The circuit of a task: pairs of the kind that the method compares, scored by the task's own metric."""

from __future__ import annotations

from typing import Any

from workbench.circuits import Circuit
from workbench.models.protocol import Model
from workbench.pairs import Task
from workbench.probes.circuits.find import find_circuit, methods


def find_on_task(
    model: Model, task: Task, method: str = "eap-ig", *, examples: int = 64, seed: int = 0, **options: Any
) -> Circuit:
    """``find_circuit`` on ``examples`` pairs of ``task``; methods that compare activations (``methods()[method].contrast``) get
    the task's negatives as corrupted prompts. ``options`` and errors are those of ``find_circuit``."""
    known = methods()
    chosen = task.contrast() if method in known and known[method].contrast else task
    pairs = chosen.build(seed=seed, tokenizer=model.tokenizer, n=examples)
    return find_circuit(model, pairs, method, metric=task.metric, **options)
