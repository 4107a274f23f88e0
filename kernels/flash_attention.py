"""Softmax attention that emits block maps in its one pass over the keys.

    p_ij = exp(s_ij - lse_i),  o_i = sum_j p_ij v_j         (``kernels/scores.py`` defines s and lse, the mask, sink and softcap)

    blocks["sum"]_IJ   sum of p over the cells of a block     blocks["max"]_IJ   largest p in it
    blocks["mean"]_IJ  that sum over the number of its cells  blocks["abs"]_IJ   sum of |p|, equal to "sum" here

The denominator of a row is known only after its last key. Sources: the pass itself is FlashAttention-2 (Dao 2023); deferring the
rescaling of block values to the end of the row is SeerAttention's (Gao et al. 2024), whose kernel keeps base-2 row maxima of
the blocks in a bfloat16 scratch. Here the scratch is float32, holds sums as well, and is private to a program, which reuses it.

With ``Mask(blocks=..., side=...)`` the same pass is block-sparse attention: hidden blocks cost nothing, and the map is the one
that was executed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.kernels.forms import choose
from workbench.kernels.mask import Mask
from workbench.kernels.scores import N_SCORES, SCORES_SCHEMA, Bias, Relative, Scores, score_parts, scores_of
from workbench.kernels.softmax_backward import softmax_backward

REDUCTIONS = ("sum", "mean", "max", "abs")


@dataclass(frozen=True, eq=False)
class FlashAttention:
    """``output`` ``[B, H, Q, V]`` in v's dtype; ``lse`` ``[B, H, Q]``, natural log, -inf for a row that sees nothing (its sink
    logit if it has one); ``blocks`` reduction -> ``[B, H, Q/block, K/block]`` (rounded up), float32 or float64; ``impl``, the
    form that ran."""

    output: Tensor
    lse: Tensor
    blocks: dict[str, Tensor] = field(default_factory=dict)
    impl: str = ""


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask = Mask(causal=True),
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    bias: Bias | None = None,
    block: int | None = None,
    reduce: Iterable[str] = ("sum", "max"),
    impl: str | None = None,
) -> FlashAttention:
    """Attention of q ``[B, H, Q, E]`` over k ``[B, G, K, E]`` and v ``[B, G, K, V]``, and its maps in blocks of side ``block``.

    ``block`` is free of any tile size; None makes no map. ``reduce`` says which of ``sum mean max abs``. Maps are as accurate as
    those of a second pass. A row that sees nothing is zero, in the output and in the maps.

    Gradients flow to q, k, v and sink, from output, lse and the maps ``sum``, ``mean``, ``abs``; ``max`` is detached. A bias must
    not ask for a gradient, except of the ``reference`` form, and with a bias function nothing may, except of that form.

    ``impl``: ``reference`` (plain torch, dense), ``cpu`` (row chunks in plain torch, on any device), ``triton`` (no bias
    function). None takes ``triton`` on CUDA tensors, else ``cpu``; a named form that cannot run raises ``RuntimeError``. float64
    stays float64, everything else is accumulated in float32. Raises ``ValueError`` naming the argument at fault.
    """
    names = (reduce,) if isinstance(reduce, str) else tuple(reduce)
    for name in names:
        if name not in REDUCTIONS:
            raise ValueError(f"reduce: no {name!r}; known: {', '.join(REDUCTIONS)}")
    if block is not None and (isinstance(block, bool) or not isinstance(block, int) or block < 1):
        raise ValueError(f"block is a positive number of tokens; got {block!r}")
    scores = Scores(q, k, mask, scale, softcap, sink, bias)
    if not isinstance(v, Tensor) or v.ndim != 4 or v.shape[:3] != k.shape[:3] or not v.shape[3]:
        got = list(v.shape) if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(f"v is [B, G, K, V] with B, G and K of k {list(k.shape)}; got {got}")
    if v.dtype != q.dtype or v.device != q.device:
        raise ValueError(f"v must have q's dtype and device ({q.dtype}, {q.device}); got {v.dtype}, {v.device}")
    function = bias is not None and not isinstance(bias, Tensor | Relative)
    form = choose(impl, q, k, v, unsupported="the bias is a function" if function else "")
    if form == "reference":
        from workbench.kernels.flash.reference import reference_flash

        output, lse, blocks = reference_flash(scores, v, block, names)
        return FlashAttention(output, lse, {n: m.detach() if n == "max" else m for n, m in blocks.items()}, form)
    if torch.is_grad_enabled():
        table = bias.table if isinstance(bias, Relative) else bias
        if isinstance(table, Tensor) and table.requires_grad:
            raise ValueError("bias asks for a gradient, which only impl='reference' gives; detach it")
        if function and any(t is not None and t.requires_grad for t in (q, k, v, sink)):
            raise ValueError(
                "bias is a function, through which no gradient flows to q, k, v or sink; give a tensor or a Relative table, or "
                "call this under torch.no_grad()"
            )
    wanted = (block, bool({"sum", "mean", "abs"} & set(names)), "max" in names)
    if function:
        output, lse, mass, peak = _run(scores, v, *wanted, form)
    else:
        output, lse, mass, peak = torch.ops.workbench.flash_attention(*score_parts(scores), v, *wanted, form)
    return FlashAttention(output, lse, _maps(names, block, mass, peak, scores), form)


def _maps(names: tuple[str, ...], block: int | None, mass: Tensor, peak: Tensor, scores: Scores) -> dict[str, Tensor]:
    if block is None:
        return {}
    maps = {"sum": mass, "abs": mass, "max": peak.detach()}
    if "mean" in names:
        rows, columns = (_lengths(n, block, mass) for n in scores.shape[2:])
        maps["mean"] = mass / (rows[:, None] * columns)
    return {name: maps[name] for name in names}


def _lengths(length: int, size: int, like: Tensor) -> Tensor:
    """Tokens in each block."""
    return (length - torch.arange(0, length, size, device=like.device, dtype=like.dtype)).clamp(max=size)


def _run(scores: Scores, v: Tensor, block: int | None, sums: bool, peaks: bool, form: str) -> list[Tensor]:
    """Output, lse, block sums and maxima; empty where not asked for."""
    if form == "triton":
        from workbench.kernels.flash.triton import fused_flash as run
    else:
        from workbench.kernels.flash.cpu import blocked_flash as run
    with torch.no_grad():
        found = run(scores, v, block, sums, peaks)
    return [scores.q.new_empty(0, dtype=scores.dtype) if part is None else part for part in found]


def _body(*arguments: Any) -> list[Tensor]:
    v, block, sums, peaks, form = arguments[N_SCORES:]
    return _run(scores_of(arguments[:N_SCORES]), v, block, sums, peaks, form)


_operator = torch.library.custom_op(
    "workbench::flash_attention",
    _body,
    mutates_args=(),
    schema=f"({SCORES_SCHEMA}, Tensor v, int? block, bool sums, bool peaks, str impl) -> Tensor[]",
)


@_operator.register_fake
def _(*arguments: Any) -> list[Tensor]:
    (q, k), (v, block, sums, peaks, _) = arguments[:2], arguments[N_SCORES:]
    working = torch.float64 if q.dtype == torch.float64 else torch.float32
    row = tuple(q.shape[:3])
    grid = () if block is None else (*row[:2], -(-q.shape[2] // block), -(-k.shape[2] // block))
    maps = [q.new_empty(grid if grid and asked else 0, dtype=working) for asked in (sums, peaks)]
    return [v.new_empty(*row, v.shape[3]), q.new_empty(row, dtype=working), *maps]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*(part if isinstance(part, Tensor) else None for part in inputs), output[0], output[1])
    ctx.plain = [None if isinstance(part, Tensor) else part for part in inputs]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    *held, output, lse = ctx.saved_tensors
    inputs = [plain if tensor is None else tensor for plain, tensor in zip(ctx.plain, held, strict=True)]
    scores, (v, block, sums, _, form) = scores_of(tuple(inputs[:N_SCORES])), inputs[N_SCORES:]
    d_output, d_lse, d_mass, _ = grads
    blocks = d_mass if block is not None and sums else None
    dq, dk, dv, d_row = softmax_backward(
        scores, lse, out=output, d_out=torch.zeros_like(output) if d_output is None else d_output, v=v, d_lse=d_lse,
        d_blocks=blocks, block=None if blocks is None else block, impl=form,
    )  # fmt: skip
    found: list[Tensor | None] = [None] * len(inputs)
    found[0], found[1], found[N_SCORES] = dq, dk, dv
    sink = scores.sink
    if sink is not None:
        found[N_SCORES - 3] = -((sink.to(lse)[None, :, None] - lse).exp() * d_row).sum((0, 2)).to(sink.dtype)
    return tuple(found)


_operator.register_autograd(_backward, setup_context=_setup)
