"""Sigmoid attention in one pass, with its block map and its row and column sums.

    p_ij = 1 / (1 + exp(-(s_ij + shift))),   o_i = sum_j p_ij v_j,   shift = -ln K unless given

with s of ``kernels/scores.py``; p is 0 where the mask hides j from i. Nothing is normalised: a row sums to what it sums to, and
deleting a key leaves the other weights alone. Hence no running maximum and no denominator, and every statistic is final as
soon as its tile is.

    blocks["sum"]_IJ   sum of p over the cells of a block     blocks["max"]_IJ   largest p in it
    blocks["mean"]_IJ  that sum over the number of its cells  blocks["abs"]_IJ   sum of |p|, equal to "sum" here
    received_j = sum_i p_ij                                   row_sums_i = sum_j p_ij

Source: Ramapuram et al., Theory, Analysis, and Best Practices for Sigmoid Self-Attention, arXiv:2409.04431, section 2 (the shift
-ln K keeps the row sums near 1 at initialisation).

Operators ``workbench::sigmoid_attention`` and ``workbench::sigmoid_attention_backward`` carry the forms ``cpu`` and ``triton``
through autograd, ``torch.compile`` and ``torch.export``. The reference is plain torch and needs none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from workbench.kernels.forms import choose
from workbench.kernels.mask import SCHEMA, Mask
from workbench.kernels.scores import Relative, Scores, working_dtype

REDUCTIONS = ("sum", "mean", "max", "abs")
STATS = ("received", "row_sums")


@dataclass(frozen=True, eq=False)
class SigmoidAttention:
    """``output`` ``[B, H, Q, V]`` in q's dtype; ``blocks`` reduction -> ``[B, H, Q/block, K/block]`` (rounded up); ``received``
    ``[B, H, K]``; ``row_sums`` ``[B, H, Q]``. What was not asked for is None. ``impl`` names the form that ran."""

    output: Tensor
    blocks: dict[str, Tensor] = field(default_factory=dict)
    received: Tensor | None = None
    row_sums: Tensor | None = None
    impl: str = ""


@dataclass(frozen=True)
class Wanted:
    """What a pass computes beside the output. The forms return the output and then these, in this order, where asked for."""

    block: int | None
    mass: bool
    peak: bool
    received: bool
    row_sums: bool


def sigmoid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask = Mask(causal=True),
    scale: float | None = None,
    shift: float | None = None,
    bias: Tensor | Relative | None = None,
    block: int | None = None,
    reduce: Iterable[str] = ("sum", "max"),
    stats: Iterable[str] = (),
    impl: str | None = None,
) -> SigmoidAttention:
    """Sigmoid attention of q ``[B, H, Q, E]`` over k ``[B, G, K, E]`` and v ``[B, G, K, V]``; G divides H.

    ``scale`` defaults to ``E ** -0.5``, ``shift`` (added to every score) to ``-ln K``. ``bias`` broadcasts to ``[B, H, Q, K]`` or
    is a ``Relative`` table. ``block`` is the side of the square blocks (None: no block map), ``reduce`` which of ``sum mean max
    abs``, ``stats`` which of ``received row_sums``. Blocks at the edges hold the cells that exist. float64 stays float64,
    everything else is accumulated in float32; maps and sums are returned in the type of accumulation.

    Gradients reach q, k and v through the output, the block ``sum``, ``mean`` and ``abs``, ``received`` and ``row_sums``; the
    block ``max`` carries none. A bias that wants a gradient is refused except by the reference.

    ``impl``: ``reference`` (plain torch, dense), ``cpu`` (tiles in plain torch, on any device), ``triton`` (fused); None takes
    ``triton`` on CUDA tensors and ``cpu`` elsewhere. A form that cannot run raises ``RuntimeError``. Raises ``ValueError`` naming
    the argument at fault.
    """
    scores = Scores(q, k, mask, scale, bias=bias)
    reductions, wished = _names("reduce", reduce, REDUCTIONS), _names("stats", stats, STATS)
    if not isinstance(v, Tensor) or v.ndim != 4 or v.shape[:3] != k.shape[:3] or not v.shape[3]:
        got = list(v.shape) if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(f"v is a tensor [B, G, K, V] with B, G, K = {list(k.shape[:3])}; got {got}")
    if v.dtype != q.dtype or v.device != q.device:
        raise ValueError(f"v must have q's dtype and device ({q.dtype}, {q.device}); got {v.dtype}, {v.device}")
    if block is not None and (isinstance(block, bool) or not isinstance(block, int) or block < 1):
        raise ValueError(f"block is a positive number of tokens; got {block!r}")
    if bias is not None and not isinstance(bias, Tensor | Relative):
        raise ValueError(f"bias is a tensor or a Relative table; got {type(bias).__name__}")
    if shift is None:
        shift = -math.log(k.shape[2])
    elif not math.isfinite(shift):
        raise ValueError(f"shift is a finite number; got {shift}")
    table = bias.table if isinstance(bias, Relative) else bias
    first = bias.first if isinstance(bias, Relative) else None
    if table is not None and table.device != q.device:
        raise ValueError(f"bias must be on q's device {q.device}; got {table.device}")
    form = choose(impl, q, k, v)
    wanted = Wanted(
        block,
        mass=block is not None and bool({"sum", "mean", "abs"} & set(reductions)),
        peak=block is not None and "max" in reductions,
        received="received" in wished,
        row_sums="row_sums" in wished,
    )
    if form == "reference":
        from workbench.kernels.sigmoid.reference import dense_forward

        found = iter(dense_forward(scores, v, shift, wanted))
    else:
        if table is not None and table.requires_grad and torch.is_grad_enabled():
            raise ValueError("bias must not require a gradient: only impl='reference' computes it; detach it")
        numbers = (scores.scale, float(shift), block, wanted.mass, wanted.peak, wanted.received, wanted.row_sums, form)
        found = iter(torch.ops.workbench.sigmoid_attention(q, k, v, table, first, *mask.parts(), *numbers))
    output = next(found)
    mass = next(found) if wanted.mass else None
    peak = next(found).detach() if wanted.peak else None
    received = next(found) if wanted.received else None
    row_sums = next(found) if wanted.row_sums else None
    blocks: dict[str, Tensor] = {}
    for name in reductions if block is not None else ():
        if name == "max":
            assert peak is not None
            blocks[name] = peak
        else:
            assert block is not None
            assert mass is not None
            blocks[name] = mass / cells_of_blocks(q.shape[2], k.shape[2], block, mass) if name == "mean" else mass
    return SigmoidAttention(output, blocks, received, row_sums, form)


def cells_of_blocks(queries: int, keys: int, block: int, like: Tensor) -> Tensor:
    """Number of cells of each block, ``[Q/block, K/block]``."""

    def lengths(total: int) -> Tensor:
        edges = torch.arange(0, total, block, device=like.device, dtype=like.dtype)
        return (total - edges).clamp(max=block)

    return lengths(queries)[:, None] * lengths(keys)


def _names(argument: str, given: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if name not in known:
            raise ValueError(f"{argument}: no {name!r}; known: {', '.join(known)}")
    return names


_PARTS = len(fields(Mask))
_ARGUMENTS = (
    f"Tensor q, Tensor k, Tensor v, Tensor? bias, int? first, {SCHEMA}, float scale, float shift, "
    "int? block, bool mass, bool peak, bool received, bool row_sums, str impl"
)


def _read(
    q: Tensor, k: Tensor, bias: Tensor | None, first: int | None, rest: tuple[Any, ...]
) -> tuple[Scores, float, Wanted]:
    parts, (scale, shift, *wanted, _) = rest[:_PARTS], rest[_PARTS:]
    held = bias if bias is None or first is None else Relative(bias, first)
    return Scores(q, k, Mask(*parts), scale, bias=held), shift, Wanted(*wanted)


@torch.library.custom_op("workbench::sigmoid_attention", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor[]")
def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, first: int | None, *rest: Any) -> list[Tensor]:
    scores, shift, wanted = _read(q, k, bias, first, rest)
    if rest[-1] == "triton":
        from workbench.kernels.sigmoid.triton import fused_forward

        return fused_forward(scores, v, shift, wanted)
    from workbench.kernels.sigmoid.cpu import tiled_forward

    return tiled_forward(scores, v, shift, wanted)


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, first: int | None, *rest: Any) -> list[Tensor]:
    block, mass, peak, received, row_sums, _ = rest[_PARTS + 2 :]
    b, h, n, _ = q.shape
    m = k.shape[2]
    found = [q.new_empty(b, h, n, v.shape[3])]
    kind = working_dtype(q.dtype)
    found += [q.new_empty(b, h, -(-n // block), -(-m // block), dtype=kind) for asked in (mass, peak) if asked]
    found += [q.new_empty(b, h, length, dtype=kind) for asked, length in ((received, m), (row_sums, n)) if asked]
    return found


@torch.library.custom_op(
    "workbench::sigmoid_attention_backward",
    mutates_args=(),
    schema=f"(Tensor? d_output, Tensor? d_mass, Tensor? d_received, Tensor? d_row_sums, {_ARGUMENTS}) -> Tensor[]",
)
def _backward(
    d_output: Tensor | None,
    d_mass: Tensor | None,
    d_received: Tensor | None,
    d_row_sums: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    first: int | None,
    *rest: Any,
) -> list[Tensor]:
    """Gradients of q, k and v."""
    scores, shift, wanted = _read(q, k, bias, first, rest)
    if d_output is None:
        d_output = q.new_zeros(()).expand(*q.shape[:3], v.shape[3])
    given = (d_output, d_mass, d_received, d_row_sums)
    if rest[-1] == "triton":
        from workbench.kernels.sigmoid.triton import fused_backward

        return fused_backward(scores, v, shift, wanted.block, *given)
    from workbench.kernels.sigmoid.cpu import tiled_backward

    return tiled_backward(scores, v, shift, wanted.block, *given)


@_backward.register_fake
def _(*given: Any) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in given[4:7]]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*[value for value in inputs if isinstance(value, Tensor)])
    ctx.slots = [None if isinstance(value, Tensor) else (value,) for value in inputs]


def _gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    saved = iter(ctx.saved_tensors)
    inputs = [next(saved) if slot is None else slot[0] for slot in ctx.slots]
    mass, peak, received, row_sums = inputs[-5:-1]
    rest = iter(grads)
    d_output = next(rest)
    d_mass = next(rest) if mass else None
    if peak:
        next(rest)  # a maximum carries no gradient, see the front door
    d_received = next(rest) if received else None
    d_row_sums = next(rest) if row_sums else None
    found = torch.ops.workbench.sigmoid_attention_backward(d_output, d_mass, d_received, d_row_sums, *inputs)
    return (*found, *[None] * (len(inputs) - 3))


_forward.register_autograd(_gradients, setup_context=_keep)
