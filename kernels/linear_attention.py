"""Causal linear attention with a scalar decay: Lightning attention, retention, Mamba-2, gated linear attention with scalar gates.

    M_ij = scale (q_i . k_j) exp(a_{j+1} + ... + a_i)   for j <= i, else 0           a_t = log_decay_t <= 0
    S_t  = exp(a_t) S_{t-1} + k_t v_t^T,   o_i = scale S_i^T q_i = sum_j M_ij v_j + scale exp(a_1 + ... + a_i) S_0^T q_i

S_0 is the initial state. It adds to the output but has no column in the map. Feature maps, norms and gates are the caller's.

    blocks["sum"]_IJ   sum of M over the cells of a block     blocks["max"]_IJ   largest value in it (not magnitude)
    blocks["mean"]_IJ  that sum over the number of its cells  blocks["abs"]_IJ   sum of |M|

M is signed, so that ``sum`` and ``abs`` differ where values cancel. Blocks hold the cells that exist, the zeros above the
diagonal included.

Output and state go chunk by chunk in time linear in N. A block sum has low rank, q and k summed under their decay, and needs no
pass over pairs; ``abs`` and ``max`` need one, which leaves out what the decay makes exactly zero. Decay is only ever formed from
the tokens in between: nothing overflows, and strong decay loses no digits.

Sources: Qin et al., Lightning Attention-2, arXiv:2401.04658, section 3 (chunks); Sun et al., Retentive Network, arXiv:2307.08621,
equations 5 and 7; Dao and Gu, Transformers are SSMs, arXiv:2405.21060, section 6.

Operators ``workbench::linear_attention`` and ``workbench::linear_attention_backward`` carry the forms ``cpu`` and ``triton``
through autograd, ``torch.compile`` and ``torch.export``; block sums and the reference are plain torch and need none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.kernels.forms import choose
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Scores, working_dtype

REDUCTIONS = ("sum", "mean", "max", "abs")


@dataclass(frozen=True, eq=False)
class LinearAttention:
    """``output`` ``[B, H, N, V]`` in q's dtype; ``blocks`` reduction -> ``[B, H, N/block, N/block]`` (rounded up); ``state``
    ``[B, H, E, V]`` after the last token, in the type of accumulation. ``impl`` names the form that ran."""

    output: Tensor
    blocks: dict[str, Tensor] = field(default_factory=dict)
    state: Tensor | None = None
    impl: str = ""


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float = 1.0,
    block: int | None = None,
    reduce: Iterable[str] = ("sum", "abs"),
    state: Tensor | None = None,
    impl: str | None = None,
) -> LinearAttention:
    """Decayed linear attention of q ``[B, H, N, E]`` over k ``[B, G, N, E]`` and v ``[B, G, N, V]``; G divides H.

    ``log_decay``: None (no decay), ``[H]`` (one per head) or ``[B, H, N]`` (one per token: a_t decays what came before token t),
    natural log, not positive; -inf forgets everything. ``state`` ``[B, H, E, V]`` is the state before the first token, zero if
    None; the state after the last one continues the sequence. ``block`` is the side of the square blocks (None: no block map),
    ``reduce`` which of ``sum mean max abs``. float64 stays float64, everything else is accumulated in float32.

    Gradients reach q, k, v, log_decay and state through the output, the final state and the block ``sum`` and ``mean``; ``abs``
    and ``max`` carry none.

    ``impl``: ``reference`` (plain torch, dense), ``cpu`` (chunks in plain torch, on any device), ``triton`` (fused; in bfloat16
    and float16 decayed keys are rounded to that type before they enter the state); None takes ``triton`` on CUDA tensors and
    ``cpu`` elsewhere. A form that cannot run raises ``RuntimeError``. Raises ``ValueError`` naming the argument at fault.
    """
    Scores(q, k, Mask(causal=True))
    reductions = _names("reduce", reduce, REDUCTIONS)
    b, h, n, e = q.shape
    if k.shape[2] != n:
        raise ValueError(f"k must have the {n} tokens of q; got {k.shape[2]}")
    if not isinstance(v, Tensor) or v.ndim != 4 or v.shape[:3] != k.shape[:3] or not v.shape[3]:
        got = list(v.shape) if isinstance(v, Tensor) else type(v).__name__
        raise ValueError(f"v is a tensor [B, G, N, V] with B, G, N = {list(k.shape[:3])}; got {got}")
    if v.dtype != q.dtype or v.device != q.device:
        raise ValueError(f"v must have q's dtype and device ({q.dtype}, {q.device}); got {v.dtype}, {v.device}")
    if block is not None and (isinstance(block, bool) or not isinstance(block, int) or block < 1):
        raise ValueError(f"block is a positive number of tokens; got {block!r}")
    if not math.isfinite(scale):
        raise ValueError(f"scale is a finite number; got {scale}")
    if state is not None:
        if tuple(state.shape) != (b, h, e, v.shape[3]) or not state.is_floating_point() or state.device != q.device:
            wanted, held = [b, h, e, v.shape[3]], f"{state.dtype} {list(state.shape)} on {state.device}"
            raise ValueError(f"state is floating point [B, H, E, V] = {wanted} on {q.device}; got {held}")
        state = state.to(working_dtype(q.dtype))
    decay = None if log_decay is None else _per_token(log_decay, q)
    form = choose(impl, q, k, v)
    sums = block is not None and bool({"sum", "mean"} & set(reductions))
    asked: list[str] = [name for name in ("abs", "max") if block is not None and name in reductions]
    if form == "reference":
        from workbench.kernels.linear.reference import dense_forward

        output, last, *maps = dense_forward(q, k, v, decay, state, scale, block, (["sum"] if sums else []) + asked)
        mass = maps.pop(0) if sums else None
    else:
        found = torch.ops.workbench.linear_attention(
            q, k, v, decay, state, float(scale), block, "abs" in asked, "max" in asked, form
        )
        output, last, *maps = found
        mass = None
        if sums:
            from workbench.kernels.linear.sums import block_sums

            assert block is not None
            mass = block_sums(q, k, decay, scale, block)
    made = {name: value.detach() for name, value in zip(asked, maps, strict=True)}
    if mass is not None:
        assert block is not None
        edges = torch.arange(0, n, block, device=q.device, dtype=mass.dtype)
        lengths = (n - edges).clamp(max=block)
        made |= {"sum": mass, "mean": mass / (lengths[:, None] * lengths)}
    return LinearAttention(output, {name: made[name] for name in reductions if name in made}, last, form)


def _per_token(log_decay: Tensor, q: Tensor) -> Tensor:
    """Checked log decay ``[B, H, N]`` in the working type."""
    b, h, n, _ = q.shape
    if not isinstance(log_decay, Tensor) or not log_decay.is_floating_point() or log_decay.device != q.device:
        got = f"{log_decay.dtype} on {log_decay.device}" if isinstance(log_decay, Tensor) else type(log_decay).__name__
        raise ValueError(f"log_decay is a floating point tensor on {q.device}; got {got}")
    if tuple(log_decay.shape) not in ((h,), (b, h, n)):
        raise ValueError(f"log_decay is [H] = {[h]} or [B, H, N] = {[b, h, n]}; got {list(log_decay.shape)}")
    if not torch.compiler.is_compiling() and not bool((log_decay <= 0).all()):
        raise ValueError("log_decay is the log of a factor of at most 1: not positive, not NaN")
    log_decay = log_decay.to(working_dtype(q.dtype))
    return log_decay[None, :, None].expand(b, h, n) if log_decay.ndim == 1 else log_decay


def _names(argument: str, given: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if name not in known:
            raise ValueError(f"{argument}: no {name!r}; known: {', '.join(known)}")
    return names


@torch.library.custom_op(
    "workbench::linear_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? state, float scale, int? block, bool abs, bool max, "
    "str impl) -> Tensor[]",
)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
    block: int | None,
    abs: bool,
    max: bool,
    impl: str,
) -> list[Tensor]:
    """Output, final state, and the maps asked for."""
    if impl == "triton":
        from workbench.kernels.linear.triton import fused_forward

        return fused_forward(q, k, v, log_decay, state, scale, block, abs, max)
    from workbench.kernels.linear.cpu import chunked_forward

    return chunked_forward(q, k, v, log_decay, state, scale, block, abs, max)


@_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
    block: int | None,
    abs: bool,
    max: bool,
    impl: str,
) -> list[Tensor]:
    b, h, n, e = q.shape
    kind = working_dtype(q.dtype)
    found = [q.new_empty(b, h, n, v.shape[3]), q.new_empty(b, h, e, v.shape[3], dtype=kind)]
    if block is not None:
        side = -(-n // block)
        found += [q.new_empty(b, h, side, side, dtype=kind) for asked in (abs, max) if asked]
    return found


@torch.library.custom_op(
    "workbench::linear_attention_backward",
    mutates_args=(),
    schema="(Tensor? d_output, Tensor? d_state, Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? state, float scale, "
    "str impl) -> Tensor[]",
)
def _backward(
    d_output: Tensor | None,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    scale: float,
    impl: str,
) -> list[Tensor]:
    """Gradients of q, k, v, and of log_decay and the initial state where they are given."""
    if d_output is None:
        d_output = q.new_zeros(()).expand(*q.shape[:3], v.shape[3])
    if impl == "triton":
        from workbench.kernels.linear.triton import fused_backward

        return fused_backward(d_output, d_state, q, k, v, log_decay, state, scale)
    from workbench.kernels.linear.cpu import chunked_backward

    return chunked_backward(d_output, d_state, q, k, v, log_decay, state, scale)


@_backward.register_fake
def _(
    d_output: Any, d_state: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Any, state: Any, *rest: Any
) -> list[Tensor]:
    return [given.new_empty(given.shape) for given in (q, k, v, log_decay, state) if given is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.scale, ctx.impl = inputs[5], inputs[9]


def _gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors  # the maps, grads[2:], carry no gradient, see the front door
    found = iter(torch.ops.workbench.linear_attention_backward(grads[0], grads[1], *inputs, ctx.scale, ctx.impl))
    return (*[next(found) if given is not None else None for given in inputs], *[None] * 5)


_forward.register_autograd(_gradients, setup_context=_keep)
