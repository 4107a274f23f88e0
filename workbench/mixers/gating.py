"""What records of gates share: examples, and how a native model makes their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import Learned, Variant, example_tensors, nearest_grid

Example = Callable[[int, int, torch.dtype], dict[str, Any]]
Operator = Callable[..., tuple[Tensor, AttentionMap]]

SOURCE = {"source": Learned("HE")}
"""What a gate is made of in native models, beside the values that it scales."""
UNUSED = ("q", "k")
"""What operators without similarities have no use for."""


def small(shape: tuple[int, ...]) -> Tensor:
    """Random weights for a gate that is neither open nor shut."""
    return torch.randn(shape) / 3


def head_values(parts: dict[str, Any]) -> Tensor:
    """The values of a native model's layer with a value head per head, ``[B, H, N, E]``."""
    v = parts["v"]
    return v.repeat_interleave(parts["q"].shape[1] // v.shape[1], 1)


def channels_last(out: Tensor) -> Tensor:
    """``[B, H, E, N]`` to ``[B, H, N, E]``."""
    return out.transpose(2, 3)


def plain_example(heads: int, width: int, **shapes: tuple[int, ...]) -> Example:
    """An example with x and v and parameters of these shapes."""

    def example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
        return example_tensors(seed, dtype, x=(2, heads, count, width), v=(2, heads, count, width), **shapes)

    return example


def gated_example(heads: int, width: int, **shapes: tuple[int, ...]) -> Example:
    """The same over a grid."""

    def example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
        grid = nearest_grid(count)
        return {**plain_example(heads, width, **shapes)(seed, grid[0] * grid[1], dtype), "grid": grid}

    return example


def gate_record(name: str, paper: str, operator: Operator, example: Example, **more: Any) -> Variant:
    """A record of the family of channel maps and gates."""
    return Variant(
        name=name, paper=paper, family="channel", priority="C", operator=operator, example=example, **more
    )  # fmt: skip


def gate_parts(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Gates of the values themselves; parameters ``HE`` become ``[C]`` and ``HEm`` ``[m, C]``, other than ``mix`` ``[C, m]``."""

    def prepare(parts: dict[str, Any]) -> dict[str, Any]:
        made = {name: parts[name].flatten(0, 1) for name in names}
        made = {name: p.T if p.ndim == 2 and name != "mix" else p for name, p in made.items()}
        return {"x": parts["source"], "v": head_values(parts), **made}

    return prepare
