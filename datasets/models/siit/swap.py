"""Running a network with one component's output taken from another prompt.

A component is a head (its ``hook_z`` at all positions) or an MLP (``hook_mlp_out``), named as in circuits: ``a1.h3``, ``m2``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from workbench.datasets.models.siit.program import VARIABLES
from workbench.graph import circuit_graph
from workbench.models.hookpoints import attached
from workbench.models.native_config import NativeConfig
from workbench.models.native_net import NativeNet

COMPONENTS = {"duplicate": "a0.h1", "inhibition": "a1.h3", "mover": "a2.h2"}
"""The component of each variable of the program."""


def components(config: NativeConfig) -> tuple[str, ...]:
    """Names of all heads and MLPs, layer by layer, heads first."""
    return circuit_graph(config.layers, config.heads, mlp=bool(config.mlp_width)).writers[1:]


def mapped(names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Indices into ``names`` of the variables' components, and of all others."""
    own = [names.index(COMPONENTS[variable]) for variable in VARIABLES]
    return torch.tensor(own), torch.tensor([i for i in range(len(names)) if i not in own])


@dataclass(frozen=True)
class Outputs:
    """What the components of each layer wrote: heads ``[N, T, H, E]`` and MLP ``[N, T, D]``."""

    heads: tuple[Tensor, ...]
    mlps: tuple[Tensor, ...]

    def __getitem__(self, rows: slice) -> Outputs:
        return Outputs(tuple(z[rows] for z in self.heads), tuple(m[rows] for m in self.mlps))

    def twice(self) -> Outputs:
        """The same rows once more below."""
        return Outputs(tuple(torch.cat([z, z]) for z in self.heads), tuple(torch.cat([m, m]) for m in self.mlps))


def plain(net: NativeNet, ids: Tensor, end: Tensor) -> tuple[Tensor, Outputs]:
    """Logits ``[N, V]`` at the positions ``end`` ``[N]``, and what every component wrote."""
    found: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: HookPoint) -> None:
        found[str(hook.name)] = value

    heads, mlps = _points(net)
    with attached([(point, keep) for point in (*heads, *mlps)]):
        logits = _at(net, ids, end)
    return logits, Outputs(*(tuple(found[str(point.name)] for point in points) for points in (heads, mlps)))


def swapped(net: NativeNet, ids: Tensor, end: Tensor, source: Outputs, which: Tensor) -> Tensor:
    """Logits ``[N, V]`` where in row n component ``which[n]`` (index into ``components``) wrote what it wrote in row n of
    ``source``; everything after it is computed anew."""
    config = net.config
    chosen = which[:, None] == torch.arange(len(components(config)))
    chosen = chosen.unflatten(1, (config.layers, -1))
    heads, mlps = _points(net)
    hooks: list[tuple[HookPoint, Callable[..., Tensor]]] = []
    for layer, (point, value) in enumerate(zip(heads, source.heads, strict=True)):
        hooks.append((point, _instead(value, chosen[:, layer, : config.heads][:, None, :, None])))
    for layer, (point, value) in enumerate(zip(mlps, source.mlps, strict=True)):
        hooks.append((point, _instead(value, chosen[:, layer, config.heads][:, None, None])))
    with attached(hooks):
        return _at(net, ids, end)


def _instead(other: Tensor, chosen: Tensor) -> Callable[..., Tensor]:
    return lambda value, hook: torch.where(chosen, other, value)


def _points(net: NativeNet) -> tuple[list[HookPoint], list[HookPoint]]:
    layers = range(net.config.layers)
    mlps = [net.hook_dict[f"blocks.{layer}.hook_mlp_out"] for layer in layers] if net.config.mlp_width else []
    return [net.hook_dict[f"blocks.{layer}.attn.hook_z"] for layer in layers], mlps


def _at(net: NativeNet, ids: Tensor, end: Tensor) -> Tensor:
    hidden, _ = net(ids, hidden=True)
    return net.logits(hidden[torch.arange(len(ids)), end])
