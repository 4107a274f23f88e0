"""Inputs of the top-k encoder's tests and its pre-activations by a dense product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(n: int, d: int, f: int, seed: int = 0) -> dict[str, Any]:
    return {
        "x": normal(seed, n, d),
        "weight": normal(seed + 1, d, f),
        "bias": normal(seed + 2, f),
        "centre": normal(seed + 3, d),
        "excluded": normal(seed + 4, f) > 0.8,
    }


def cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in given.items()}


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, centre: Tensor | None, excluded: Tensor | None) -> Tensor:
    """Pre-activations in the working type, ``x - centre`` rounded to x's own."""
    x = x if centre is None else x - centre
    dtype = torch.promote_types(x.dtype, torch.float32)
    pre = x.to(dtype) @ weight.to(dtype)
    pre = pre if bias is None else pre + bias.to(dtype)
    return pre if excluded is None else pre.masked_fill(excluded, float("-inf"))
