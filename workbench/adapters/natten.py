"""NATTEN: neighborhood attention of its own kernels, with the map of which neighbours took part and how much.

The rule of who is whose neighbour is that of ``mixers/neighborhood.py``; the output is NATTEN's, and it is compared with what the
rule gives. Checked with natten 0.21.7 on a CPU, where it goes through its FlexAttention back end (a build without CUDA); its
fused CUDA kernels have not been run here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.adapters import library
from workbench.adapters.flex import TOLERANCE
from workbench.errors import Refused, WorkbenchError
from workbench.mixers.neighborhood import neighborhood_attention
from workbench.patterns.sparse import SparseMap

INSTALL = "see docs/install.md"


def from_natten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    **options: Any,
) -> tuple[Tensor, SparseMap]:
    """NATTEN's output and its map over the tokens of the grid, row-major: ``[B, H, N, N]`` with prod(kernel) weights per row.

    q, k and v are in NATTEN's layout, heads last: ``[B, N, H, E]``, ``[B, rows, columns, H, E]`` or ``[B, times, rows, columns,
    H, E]``; k and v may have fewer heads. ``options`` go to ``natten.na1d``, ``na2d`` or ``na3d`` as they are (``backend``, tile
    shapes). An output that is not the rule's is refused.
    """
    axes = q.ndim - 3
    if axes not in (1, 2, 3) or k.ndim != q.ndim or v.ndim != q.ndim:
        raise WorkbenchError(
            f"q, k and v are [B, one to three axes of tokens, H, E]; got {[list(x.shape) for x in (q, k, v)]}"
        )
    for name in ("additional_keys", "additional_values", "return_lse"):
        if options.get(name) is not None:
            raise Refused(
                f"from_natten does not take {name}: its map has the tokens of the grid as keys, and nothing else"
            )
    natten = library("natten", INSTALL)
    plan: dict[str, Any] = {"stride": stride, "dilation": dilation, "is_causal": is_causal, "scale": scale}
    out = getattr(natten, f"na{axes}d")(q, k, v, kernel_size, **plan, **options)
    grid = tuple(q.shape[1:-2])
    flat = [x.flatten(1, axes).transpose(1, 2).detach() for x in (q, k, v)]
    sizes: dict[str, Any] = {
        name: _each(value, axes)
        for name, value in (("kernel", kernel_size), ("dilation", dilation), ("stride", stride))
    }
    with torch.no_grad():
        ours, found = neighborhood_attention(*flat, grid=grid, causal=_each(is_causal, axes), scale=scale, **sizes)
        away = float((out.flatten(1, axes).transpose(1, 2) - ours).abs().max())
    if not away <= TOLERANCE[q.dtype] * (1 + float(v.abs().max())):
        raise Refused(
            f"NATTEN's output is {away:.2g} away from neighborhood attention as it is defined: no map would be exact"
        )
    return out, found


def _each(value: Any, axes: int) -> tuple[Any, ...]:
    """One entry per axis."""
    return tuple(value) if isinstance(value, Sequence) else (value,) * axes
