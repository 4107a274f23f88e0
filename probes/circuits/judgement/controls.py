"""What a circuit is compared with: random circuits of its size, and the same network with permuted weights."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import torch
from torch import nn

from workbench.circuits import Circuit
from workbench.errors import Refused, WorkbenchError
from workbench.graph import edge_parts, name_place
from workbench.models.protocol import Model

_LAYER = re.compile(r"^([am]\d+)(?:\.[hg]\d+)?$")


def random_circuits(circuit: Circuit, n: int = 10, *, seed: int = 0, matched: bool = True) -> tuple[Circuit, ...]:
    """``n`` random circuits with as many parts as ``circuit`` keeps, drawn from the parts that it scores.

    ``matched`` draws as many as the circuit keeps among the nodes of one kind and layer (``a3``, ``m2``), or among the
    edges from one such group to another through one channel, and at each place: what is left of a circuit's advantage
    is then not that it lies in the right layers. Scores are 1 for what is kept and 0 otherwise.
    ``provenance["choices"]`` is how many circuits there were to draw from, the given one among them: with 1 the control
    is the circuit itself.
    """
    if n < 0:
        raise WorkbenchError(f"n counts random circuits, at least 0; got {n}")
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, name in enumerate(circuit.names):
        groups.setdefault(_group(circuit.level, name) if matched else (), []).append(index)
    sizes = {key: int(circuit.kept[members].sum()) for key, members in groups.items()}
    choices = math.prod(math.comb(len(members), sizes[key]) for key, members in groups.items())
    provenance = {"method": "random", "level": circuit.level, "matched": matched, "seed": seed, "choices": choices}
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        kept = torch.zeros(len(circuit.names), dtype=torch.bool)
        for key, members in groups.items():
            chosen = torch.randperm(len(members), generator=generator)[: sizes[key]]
            kept[torch.tensor(members)[chosen]] = True
        found.append(Circuit(circuit.level, circuit.names, kept.double(), kept, provenance))
    return tuple(found)


def _group(level: str, name: str) -> tuple[str, ...]:
    part, place = name_place(name)
    if level == "node":
        return _kind(part), place
    source, target, channel = edge_parts(name)
    return _kind(source), _kind(target), channel, place


def _kind(node: str) -> str:
    match = _LAYER.match(node)
    return match[1] if match else node


def reset_network(model: Model, *, seed: int = 0) -> Model:
    """A copy of a native or Hugging Face model in which the entries of every weight tensor are permuted.

    Each tensor keeps its distribution and loses what it has learned, so a method that reads the mechanism finds a
    circuit at chance level there; what stays above chance comes from the form of the graph. Weights that are tied stay
    tied, buffers stay. The control is that of ACDC (arXiv 2304.14997); permuting whole tensors is our reading. The
    model itself is not touched.
    """
    modules = [name for name, value in vars(model).items() if isinstance(value, nn.Module)]
    kind: Any = type(model)
    if len(modules) != 1 or kind.__name__ not in ("NativeModel", "HFModel"):
        raise Refused(f"{model.name} is a {kind.__name__}; a native or Hugging Face model can be reset")
    net = _permuted(getattr(model, modules[0]), seed)
    return kind(net, model.tokenizer, name=f"{model.name}, reset {seed}", revision=f"reset {seed}")


@torch.no_grad()
def _permuted(net: nn.Module, seed: int) -> nn.Module:
    made = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return made
