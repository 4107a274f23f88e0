"""Selective scans: every channel of every head is a state space model with its own diagonal transitions (Mamba-1, S6).

    h_t = exp(Delta_t A) h_{t-1} + Delta_t B_t x_t,   y_t = C_t . h_t + D x_t              state h ``[S]`` of one channel
    M_ij = sum_s C_is exp(A_s (Delta_{j+1} + .. + Delta_i)) B_js Delta_j + [i = j] D

A causal scan reads tokens in their order. Images are read several times, along several paths, and the outputs are added up:
Vision Mamba forwards and backwards, LaMamba along two snakes (by rows, by columns) and their reverses. x is what enters the
scan: after the short convolution and SiLU. The gate after the scan belongs to the layer.

Gu and Dao, Mamba (arXiv 2312.00752), equations 2 and algorithm 2, for the scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from workbench.attention_map import AttentionMap
from workbench.catalogue import Learned, Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.kernels.scores import working_dtype
from workbench.mixers.image import Grid, check_grid, grid_of, spread
from workbench.mixers.scored import check_tensor
from workbench.patterns.algebra import SumMap
from workbench.patterns.arranged import PermutedMap
from workbench.patterns.per_channel import PerChannelMap
from workbench.patterns.recurrence import Recurrence
from workbench.patterns.selective import SelectiveScanMap

VALUES = "post-conv V"


def selective_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None
) -> tuple[Tensor, AttentionMap]:
    """The causal selective scan (Mamba-1) of x ``[B, H, N, E]``, output of the same shape.

    ``dt`` ``[B, H, N, E]`` (after softplus), ``a`` ``[H, E, S]`` (negative), ``b`` and ``c`` ``[B, N, S]`` (all channels share
    them), ``d`` ``[H, E]`` (the skip) or None. With E = 1 every channel is a head with a map of its own; with E > 1 the map is
    a ``PerChannelMap``. Linear time; gradients flow to all arguments.
    """
    check_tensor("x", x, ("B", "H", "N", "E"))
    batch, h, n, e = x.shape
    check_tensor("dt", dt, (batch, h, n, e))
    check_tensor("a", a, (h, e, "S"))
    check_tensor("b", b, (batch, n, a.shape[2]))
    check_tensor("c", c, (batch, n, a.shape[2]))
    if d is not None:
        check_tensor("d", d, (h, e))
    out, found = _scan(x, dt, a, b, c, d, None)
    return out, _by_heads(found, x)


def vision_mamba(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None
) -> tuple[Tensor, AttentionMap]:
    """Vision Mamba's bidirectional scan: a scan forwards plus one over the reversed tokens, with arguments of their own.

    Arguments as in ``selective_scan`` with an axis for the two directions: dt ``[B, 2, H, N, E]``, a ``[2, H, E, S]``, b and c
    ``[B, 2, N, S]``, d ``[2, H, E]``, all in the order of the tokens (algorithm 1 of arXiv 2401.09417).
    """
    check_scan(x, dt, a, b, c, d, 2)
    return _paths(x, dt, a, b, c, d, [None, torch.arange(x.shape[2] - 1, -1, -1, device=x.device)])


def continuous_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None, *, grid: Grid
) -> tuple[Tensor, AttentionMap]:
    """LaMamba's global branch: four scans along paths whose neighbours are neighbours in the image, added up.

    Arguments as in ``vision_mamba`` with four directions, in the order of ``snakes(grid)``; tokens are numbered row by row.
    """
    check_scan(x, dt, a, b, c, d, 4)
    grid = check_grid(grid, x.shape[2])
    return _paths(x, dt, a, b, c, d, snakes(grid, x.device))


def snakes(grid: Grid, device: torch.device | None = None) -> list[Tensor]:
    """Four orders of the tokens: by rows from the top left corner, turning at each end; that reversed; by columns from the
    bottom left corner, going up first; that reversed."""
    table = torch.arange(grid[0] * grid[1], device=device).view(grid)
    rows, columns = table.clone(), table.flip(0).T.contiguous()
    rows[1::2] = rows[1::2].flip(1)
    columns[1::2] = columns[1::2].flip(1)
    return [rows.flatten(), rows.flatten().flip(0), columns.flatten(), columns.flatten().flip(0)]


def check_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, directions: int) -> None:
    """Raise ``WorkbenchError`` naming the argument of a scan in several directions that does not fit."""
    check_tensor("x", x, ("B", "H", "N", "E"))
    batch, h, n, e = x.shape
    check_tensor("dt", dt, (batch, directions, h, n, e))
    check_tensor("a", a, (directions, h, e, "S"))
    check_tensor("b", b, (batch, directions, n, a.shape[3]))
    check_tensor("c", c, (batch, directions, n, a.shape[3]))
    if d is not None:
        check_tensor("d", d, (directions, h, e))


def _paths(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, orders: Sequence[Tensor | None]
) -> tuple[Tensor, AttentionMap]:
    """Scans along several paths, added up."""
    found = [
        _scan(x, dt[:, i], a[i], b[:, i], c[:, i], None if d is None else d[i], order) for i, order in enumerate(orders)
    ]
    out = torch.stack([one for one, _ in found]).sum(0)
    return out, _by_heads(SumMap(*(amap for _, amap in found)), x)


def _scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, order: Tensor | None
) -> tuple[Tensor, AttentionMap]:
    """One scan along a path (None: token by token), and its map of channels ``[B, H E, N, N]``."""
    work = torch.promote_types(working_dtype(dt.dtype), x.dtype)
    batch, h, n, e = x.shape
    values = x.transpose(2, 3).flatten(1, 2)[..., None].to(work)
    step, rate = dt.transpose(2, 3).flatten(1, 2).to(work), a.flatten(0, 1).to(work)
    skip = None if d is None else d.flatten().to(work)
    write, read = b.to(work), c.to(work)
    if order is not None:
        values, step, write, read = values[:, :, order], step[..., order], write[:, order], read[:, order]
    recurrence = Recurrence(
        read[:, None].expand(batch, h * e, n, -1),
        step[..., None] * write[:, None],
        diagonal=(step[..., None] * rate[:, None]).exp(),
    )
    out = recurrence.output(values)
    out = out if skip is None else out + skip[:, None, None] * values
    found: AttentionMap = SelectiveScanMap(step, rate, write, read, skip, value_space=VALUES)
    if order is not None:
        back = order.argsort()
        out, found = out[:, :, back], PermutedMap(found, back, back)
    return out[..., 0].unflatten(1, (h, e)).transpose(2, 3).to(x.dtype), found


def _by_heads(found: AttentionMap, x: Tensor) -> AttentionMap:
    return found if x.shape[3] == 1 else PerChannelMap(found, x.shape[3])


# ------------------------------------------------------------------------ records


def _tensors(seed: int, tokens: int, dtype: torch.dtype, directions: int) -> dict[str, Any]:
    batch, channels, width = 2, 4, 3
    given = example_tensors(
        seed,
        dtype,
        x=(batch, channels, tokens, 1),
        dt=(batch, directions, channels, tokens, 1),
        a=(directions, channels, 1, width),
        b=(batch, directions, tokens, width),
        c=(batch, directions, tokens, width),
        d=(directions, channels, 1),
    )
    return {**given, "dt": softplus(given["dt"]), "a": -given["a"].exp()}


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    given = _tensors(seed, tokens, dtype, 1)
    return {name: t if name == "x" else t[0] if name in "ad" else t[:, 0] for name, t in given.items()}


def _vim_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return _tensors(seed, tokens, dtype, 2)


def _lamamba_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(tokens)
    return {**_tensors(seed, grid[0] * grid[1], dtype, 4), "grid": grid}


def _harmonic(shape: tuple[int, ...]) -> Tensor:
    """log 1, log 2, .. along the state, Mamba's initial value of log(-A)."""
    return torch.arange(1, shape[-1] + 1).float().log().expand(shape).clone()


def _prepare(given: dict[str, Any]) -> dict[str, Any]:
    """B and C are those projections of the layer's input that keys and queries are, averaged over heads."""
    return {
        "x": spread(given["v"], given["q"].shape[1]),
        "dt": given["dt"],
        "a": -given["log_a"].exp(),
        "b": given["k"].mean(1),
        "c": given["q"].mean(1),
        "d": given["d"],
    }


def _prepare_paths(given: dict[str, Any]) -> dict[str, Any]:
    return {
        "x": spread(given["v"], given["q"].shape[1]),
        "dt": given["dt"].movedim(-1, 1),
        "a": -given["log_a"].exp(),
        "b": given["b"].mean(1).movedim(-1, 1),
        "c": given["c"].mean(1).movedim(-1, 1),
        "d": given["d"],
    }


def _prepare_snakes(given: dict[str, Any]) -> dict[str, Any]:
    return {**_prepare_paths(given), "grid": grid_of(given)}


def _recipe(directions: int, prepare: Any) -> Recipe:
    axes = f"HE{directions}"
    return Recipe(
        learned={"dt": Learned(axes, softplus, bias=-2.0), "b": Learned(axes), "c": Learned(axes)},
        parameters={"log_a": Parameter(f"{directions}HEE", _harmonic), "d": Parameter(f"{directions}HE", torch.ones)},
        prepare=prepare,
        ignores=("q", "k"),
    )


VARIANTS = (
    Variant(
        name="mamba",
        paper="Mamba: Linear-Time Sequence Modeling with Selective State Spaces (2023)",
        family="linear",
        priority="A",
        operator=selective_scan,
        example=_example,
        value_input="x",
        causal=True,
        reference="HF mamba_selective_scan",
        recipe=Recipe(
            learned={"dt": Learned("HE", softplus, bias=-2.0)},
            parameters={"log_a": Parameter("HEE", _harmonic), "d": Parameter("HE", torch.ones)},
            prepare=_prepare,
        ),
    ),
    Variant(
        name="vision-mamba",
        paper="#137 Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model (2024)",
        family="linear",
        priority="B",
        operator=vision_mamba,
        example=_vim_example,
        value_input="x",
        reference="algorithm 1 of the paper",
        note="one x for both directions; the released blocks convolve it anew for each, and the models named div2 halve the sum",
        recipe=_recipe(2, _prepare_paths),
    ),
    Variant(
        name="lamamba-continuous-scan",
        paper="#108 LaMamba-Diff: Linear-Time High-Fidelity Diffusion Models Based on Local Attention and Mamba (2024)",
        family="linear",
        priority="B",
        operator=continuous_scan,
        example=_lamamba_example,
        value_input="x",
        reference="yunxiangfu2001/LaMamba-Diff, model/continuous_scan.py",
        note="the global branch alone, the local one is window attention; paths on odd sides follow those released for even ones",
        recipe=_recipe(4, _prepare_snakes),
    ),
)
