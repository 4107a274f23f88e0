"""The gated delta rule (Gated DeltaNet, DeltaNet), its exact token-to-token map in blocks, and exact rows of the map on demand.

With a_t = exp(log_decay_t) and a state S ``[E, V]`` per head,

    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = scale q_t^T S_t

so that o_i = sum_j M_ij v_j (+ what the initial state gives), with a signed lower triangular map that does not depend on v:

    M = scale tril(Gamma * Q K^T) (I + diag(beta) stril(Gamma * K K^T))^{-1} diag(beta)      Gamma_ij = prod_{j < t <= i} a_t

The decay is applied before the erasure, which for a scalar decay is the same as after it. Blocks are pooled from M as it is:
``sum`` cancels positive against negative cells, ``abs`` does not, ``mean`` is ``sum`` over the number of cells, ``max`` the
largest cell with its sign. Cells above the diagonal exist and are 0; blocks at the edges hold the cells that exist.

Yang et al., Gated Delta Networks (arXiv:2412.06464), for the rule, and Parallelizing Linear Transformers with the Delta Rule
(arXiv:2406.06484), for the chunked form of the output. ``kernels/delta/reference.py`` derives that and the chunked map.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.kernels.forms import choose
from workbench.kernels.scores import working_dtype

REDUCTIONS = ("sum", "mean", "abs", "max")
MAX_WIDTH = 256
"""Widest heads of the Triton form."""


@dataclass(frozen=True, eq=False)
class GatedDelta:
    """``output`` ``[B, H, N, V]`` in v's dtype. ``blocks`` reduction -> ``[B, H, N/block, N/block]`` (rounded up) and the last
    ``state`` ``[B, H, E, V]``, both in the working type. ``impl`` names the form that ran."""

    output: Tensor
    blocks: dict[str, Tensor] = field(default_factory=dict)
    state: Tensor | None = None
    impl: str = ""


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    block: int | None = None,
    reduce: Iterable[str] = ("sum", "abs"),
    impl: str | None = None,
) -> GatedDelta:
    """The gated delta rule over q, k ``[B, heads, N, E]`` and v ``[B, heads, N, V]``, and block reductions of its map.

    ``beta`` ``[B, H, N]`` is the writing strength and sets the number of heads H; ``log_decay`` ``[B, H, N]`` (natural log, at
    most 0 in models; -inf forgets everything; None: no decay) belongs to the same heads. q, k and v may each have fewer heads,
    which must divide H: head h reads head ``h // (H / heads)``, as in grouped attention (fewer k and v) and grouped-value
    models (fewer q and k). q and k enter as given: normalise them first where the model does. ``scale`` defaults to
    ``E ** -0.5``. ``state`` ``[B, H, E, V]`` is the state before the first token (None: zero); the map never includes it.

    ``block`` is the side of the square blocks (None: no map), ``reduce`` which of ``sum mean abs max``. ``sum`` and ``mean``
    alone cost one transported row per row block, O(N^2 E / block); ``abs`` and ``max`` two products of the size of q k^T.

    ``output`` and the returned state are differentiable in q, k, v, beta, log_decay and state; the backward pass recomputes
    the chunk states. Blocks carry no gradient: asking for one raises ``RuntimeError`` (in compiled code and in the reference
    form they are detached). ``impl``: ``reference``, ``cpu`` or ``triton`` (``kernels/forms.py``). float64 stays float64,
    everything else is accumulated in float32. Raises ``ValueError`` naming the argument at fault.
    """
    names = _names(reduce) if block is not None else ()
    if block is not None and (isinstance(block, bool) or not isinstance(block, int) or block < 1):
        raise ValueError(f"block is a positive number of tokens; got {block!r}")
    _check(q, k, v, beta, log_decay, state)
    scale = _scale(scale, q.shape[3])
    form = choose(impl, q, k, v, beta, log_decay, state, unsupported=_too_wide(q.shape[3], v.shape[3]))
    if form == "reference":
        from workbench.kernels.delta import reference

        output, last = reference.forward(q, k, v, beta, log_decay, scale, state)
        with torch.no_grad():
            maps = _blocks(form, q, k, beta, log_decay, scale, block, names)
    else:
        output, last, *maps = torch.ops.workbench.gated_delta_rule(
            q, k, v, beta, log_decay, scale, state, block, " ".join(names), form
        )
        if torch.compiler.is_compiling():
            maps = [one.detach() for one in maps]
    return GatedDelta(output, dict(zip(names, maps, strict=True)), last, form)


def delta_rows(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    lo: int,
    hi: int,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Rows ``lo .. hi - 1`` of the map M, exact: ``[B, H, hi - lo, N]`` in the working type, in O((hi - lo) N E).

    Arguments as in ``gated_delta_rule``. Columns from ``hi`` on are 0. No gradient flows. Raises ``ValueError``.
    """
    _check(q, k, None, beta, log_decay, None)
    n = q.shape[2]
    if any(isinstance(x, bool) or not isinstance(x, int) for x in (lo, hi)) or not 0 <= lo < hi <= n:
        raise ValueError(f"lo, hi: rows of the map, 0 <= lo < hi <= N = {n}; got lo={lo!r}, hi={hi!r}")
    form = choose(impl, q, k, beta, log_decay, unsupported=_too_wide(q.shape[3], 1))
    with torch.no_grad():
        return torch.ops.workbench.delta_rows(q, k, beta, log_decay, _scale(scale, q.shape[3]), lo, hi, form)


def _names(given: Iterable[str]) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if name not in REDUCTIONS:
            raise ValueError(f"reduce: no {name!r}; known: {', '.join(REDUCTIONS)}")
    return tuple(name for name in REDUCTIONS if name in names)


def _scale(scale: float | None, e: int) -> float:
    if scale is None:
        return e**-0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scale is a finite number; got {scale!r}")
    return float(scale)


def _too_wide(e: int, v: int) -> str:
    return f"heads of width {max(e, v)}, over {MAX_WIDTH}" if max(e, v) > MAX_WIDTH else ""


def _check(
    q: Tensor, k: Tensor, v: Tensor | None, beta: Tensor, log_decay: Tensor | None, state: Tensor | None
) -> None:
    for name, tensor, axes in (("q", q, "E"), ("k", k, "E"), ("v", v, "V")):
        if tensor is None:
            continue
        if tensor.ndim != 4 or 0 in tensor.shape:
            raise ValueError(f"{name} is [B, heads, N, {axes}] and not empty; got {list(tensor.shape)}")
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} is float64, float32, bfloat16 or float16; got {tensor.dtype}")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(f"{name} must have q's {q.dtype} and {q.device}; got {tensor.dtype} on {tensor.device}")
        if tensor.shape[0] != q.shape[0] or tensor.shape[2] != q.shape[2]:
            raise ValueError(f"{name} must share B={q.shape[0]} and N={q.shape[2]} with q; got {list(tensor.shape)}")
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"k must share E={q.shape[3]} with q; got {list(k.shape)}")
    b, _, n, e = q.shape
    if beta.ndim != 3 or beta.shape[0] != b or beta.shape[2] != n or not beta.shape[1]:
        raise ValueError(f"beta is [B, H, N] with B={b} and N={n}; got {list(beta.shape)}")
    h = beta.shape[1]
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor is not None and h % tensor.shape[1]:
            raise ValueError(f"{name}: its {tensor.shape[1]} heads must divide the {h} heads of beta")
    if log_decay is not None and tuple(log_decay.shape) != (b, h, n):
        raise ValueError(f"log_decay is [B, H, N] = {[b, h, n]}; got {list(log_decay.shape)}")
    if state is not None and v is not None and tuple(state.shape) != (b, h, e, v.shape[3]):
        raise ValueError(f"state is [B, H, E, V] = {[b, h, e, v.shape[3]]}; got {list(state.shape)}")
    for name, tensor in (("beta", beta), ("log_decay", log_decay), ("state", state)):
        if tensor is not None and (not tensor.is_floating_point() or tensor.device != q.device):
            raise ValueError(f"{name} is floating point on q's {q.device}; got {tensor.dtype} on {tensor.device}")


def _form(impl: str) -> Any:
    """The module of a form: ``forward``, ``backward`` (not in the reference), ``block_maps`` and ``rows``."""
    if impl == "reference":
        from workbench.kernels.delta import reference

        return reference
    if impl == "triton":
        from workbench.kernels.delta import triton

        return triton
    from workbench.kernels.delta import cpu

    return cpu


def _blocks(
    impl: str,
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    block: int | None,
    names: Iterable[str],
) -> list[Tensor]:
    if block is None:
        return []
    maps = _form(impl).block_maps(q, k, beta, log_decay, scale, min(block, q.shape[2]), tuple(names))
    return [maps[name] for name in names]


def _rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor | None,
    block: int | None,
    reduce: str,
    impl: str,
) -> list[Tensor]:
    output, last = _form(impl).forward(q, k, v, beta, log_decay, scale, state)
    maps = _blocks(impl, q, k, beta, log_decay, scale, block, reduce.split())
    return [output.contiguous(), last.contiguous(), *maps]


def _rule_backward(
    d_output: Tensor | None,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor | None,
    impl: str,
) -> list[Tensor]:
    found = _form(impl).backward(d_output, d_state, q, k, v, beta, log_decay, scale, state)
    like = (q, k, v, beta, log_decay, state)
    return [g.to(x.dtype).contiguous() for g, x in zip(found, like, strict=True) if x is not None]


def _rows(
    q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, lo: int, hi: int, impl: str
) -> Tensor:
    return _form(impl).rows(q, k, beta, log_decay, scale, lo, hi)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, float scale, Tensor? state"
_rule_op = torch.library.custom_op(
    "workbench::gated_delta_rule",
    _rule,
    mutates_args=(),
    schema=f"({_INPUTS}, SymInt? block, str reduce, str impl) -> Tensor[]",
)
_backward_op = torch.library.custom_op(
    "workbench::gated_delta_rule_backward",
    _rule_backward,
    mutates_args=(),
    schema=f"(Tensor? d_output, Tensor? d_state, {_INPUTS}, str impl) -> Tensor[]",
)
_rows_op = torch.library.custom_op(
    "workbench::delta_rows",
    _rows,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor beta, Tensor? log_decay, float scale, SymInt lo, SymInt hi, str impl) -> Tensor",
)


@_rule_op.register_fake
def _(q, k, v, beta, log_decay, scale, state, block, reduce, impl):
    b, h, n = beta.shape
    dtype = working_dtype(q.dtype)
    outputs = [v.new_empty(b, h, n, v.shape[3]), q.new_empty(b, h, q.shape[3], v.shape[3], dtype=dtype)]
    if block is not None:
        side = (n + block - 1) // block
        outputs += [q.new_empty(b, h, side, side, dtype=dtype) for _ in reduce.split()]
    return outputs


@_backward_op.register_fake
def _(d_output, d_state, q, k, v, beta, log_decay, scale, state, impl):
    return [x.new_empty(x.shape) for x in (q, k, v, beta, log_decay, state) if x is not None]


@_rows_op.register_fake
def _(q, k, beta, log_decay, scale, lo, hi, impl):
    b, h, n = beta.shape
    return q.new_empty(b, h, hi - lo, n, dtype=working_dtype(q.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, v, beta, log_decay, scale, state, _, _, impl = inputs
    ctx.save_for_backward(q, k, v, beta, log_decay, state)
    ctx.scale, ctx.impl = scale, impl
    ctx.set_materialize_grads(False)  # so that a gradient that nobody asked for is None


def _gradients(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    d_output, d_state, *d_blocks = grads
    if any(one is not None for one in d_blocks):
        raise RuntimeError("blocks of gated_delta_rule carry no gradient: only its output and its state do")
    q, k, v, beta, log_decay, state = ctx.saved_tensors
    found = torch.ops.workbench.gated_delta_rule_backward(
        d_output, d_state, q, k, v, beta, log_decay, ctx.scale, state, ctx.impl
    )
    dq, dk, dv, dbeta, *rest = found
    dlog = rest.pop(0) if log_decay is not None else None
    dstate = rest.pop(0) if state is not None else None
    return dq, dk, dv, dbeta, dlog, None, dstate, None, None, None


_rule_op.register_autograd(_gradients, setup_context=_save)
