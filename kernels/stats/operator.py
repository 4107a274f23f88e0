"""``attention_stats`` as a custom operator of torch, so that compiled and exported models keep it, with its gradient.

Block sums, received mass and lse have gradients; they are recomputed from q, k and lse, like the statistics themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.kernels.scores import N_SCORES, SCORES_SCHEMA, Scores, score_parts, scores_of, working_dtype
from workbench.kernels.stats.request import Wanted, block_cells, layout

_ARGUMENTS = (
    f"{SCORES_SCHEMA}, Tensor? lse, int? block, str[] reduce, str[] stats, int? cut, int? topk, Tensor[] sets, Tensor? gate, "
    "str impl"
)
_SETS = -3


def compute(scores: Scores, lse: Tensor | None, wanted: Wanted, impl: str) -> list[Tensor]:
    """What ``wanted`` asks for in the order of ``layout``, by one form, without a gradient."""
    if impl == "reference":
        from workbench.kernels.stats.reference import reference_stats

        return reference_stats(scores, lse, wanted)
    if impl == "triton":
        from workbench.kernels.stats.triton import triton_stats

        return triton_stats(scores, lse, wanted)
    from workbench.kernels.stats.cpu import blocked_stats

    return blocked_stats(scores, lse, wanted)


def through_the_operator(scores: Scores, lse: Tensor | None, wanted: Wanted, impl: str) -> list[Tensor]:
    """``compute`` with a gradient, seen by torch as one operation. The bias is a tensor or a ``Relative`` table."""
    return torch.ops.workbench.attention_stats(
        *score_parts(scores), lse, wanted.block, wanted.reduce, wanted.stats, wanted.window, wanted.topk, wanted.keys,
        wanted.gate, impl,
    )  # fmt: skip


def _given(arguments: tuple[Any, ...]) -> tuple[Scores, Tensor | None, Wanted, str]:
    """The operator's arguments as what they came from."""
    return scores_of(arguments[:N_SCORES]), arguments[N_SCORES], _wanted(arguments), arguments[-1]


def _wanted(arguments: tuple[Any, ...]) -> Wanted:
    block, reduce, stats, window, topk, keys, gate = arguments[N_SCORES + 1 : -1]
    return Wanted(block, tuple(reduce), tuple(stats), window, topk, tuple(keys), (), gate)


def _body(*arguments: Any) -> list[Tensor]:
    scores, lse, wanted, impl = _given(arguments)
    found = [value.contiguous() for value in compute(scores, lse, wanted, impl)]
    return [found[0].clone() if found[0] is lse else found[0], *found[1:]]


_op = torch.library.custom_op(
    "workbench::attention_stats", _body, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor[]"
)


@_op.register_fake
def _fake(*arguments: Any) -> list[Tensor]:
    q, k = arguments[:2]
    wanted = _wanted(arguments)
    b, h, n, m = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    like = q.new_empty(0, dtype=working_dtype(q.dtype))
    size = wanted.block or 1
    found = []
    for name in layout(wanted):
        shape: tuple[Any, ...] = (b, h, n)
        if name.startswith("blocks"):
            shape = (b, h, -(-n // size), -(-m // size))
        elif name == "received":
            shape = (b, h, m)
        elif name.startswith("topk"):
            shape = (b, h, n, wanted.topk)
        kind = torch.int64 if name.endswith(" keys") else like.dtype
        found.append(like.new_empty(shape, dtype=kind))
    return found


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.plain = [None if isinstance(part, Tensor) else part for part in inputs]
    ctx.held = [i for i, part in enumerate(inputs) if isinstance(part, Tensor)]
    ctx.save_for_backward(output[0].detach(), *(inputs[i] for i in ctx.held))


def _backward(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    arguments = list(ctx.plain)
    lse, *held = ctx.saved_tensors
    for i, tensor in zip(ctx.held, held, strict=True):
        arguments[i] = tensor
    scores, given, wanted, impl = _given(tuple(arguments))
    at = dict(zip(layout(wanted), gradients, strict=True))
    blocks = _block_gradient(at, scores, wanted)
    for name, gradient in at.items():
        if gradient is not None and name not in ("lse", "received") and not name.startswith("blocks "):
            raise RuntimeError(f"attention_stats: {name.split()[0]} is not differentiable; detach it before the loss")
    sums = {"d_blocks": blocks, "d_received": at.get("received"), "d_lse": None if given is not None else at["lse"]}
    if impl == "reference":
        from workbench.kernels.stats.reference import reference_backward

        dq, dk, d_sink, d_given = reference_backward(scores, given, wanted, sums)
    else:
        from workbench.kernels.softmax_backward import softmax_backward

        dq, dk, _, rows = softmax_backward(
            scores,
            lse,
            block=None if blocks is None else wanted.block,
            gate=wanted.gate,
            through_lse=given is None,
            impl=impl,
            **sums,
        )
        d_given, d_sink = (-rows if given is not None else None), None
        if scores.sink is not None and given is None:
            share = (scores.sink_logits() - lse).exp()
            d_sink = -(share * rows).sum((0, 2)).to(scores.sink.dtype)
    if given is not None and d_given is not None:
        d_given = d_given.to(given.dtype) if at["lse"] is None else d_given.to(given.dtype) + at["lse"].to(given.dtype)
    # Lists that may hold tensors must come back as lists, and torch takes every empty list for one.
    out: list[Any] = [[] if isinstance(part, list | tuple) and not part else None for part in arguments]
    out[0], out[1], out[N_SCORES], out[N_SCORES - 3] = dq, dk, d_given, d_sink
    out[_SETS] = [None] * len(wanted.keys)
    return tuple(out)


def _block_gradient(at: dict[str, Tensor | None], scores: Scores, wanted: Wanted) -> Tensor | None:
    """The gradient of the block sums, from those of everything that is made of them."""
    _, _, q, k = scores.shape
    total: Tensor | None = None
    for name in wanted.reduce:
        part = at[f"blocks {name}"]
        if part is None:
            continue
        if name == "max":
            raise RuntimeError("attention_stats: the block map 'max' is not differentiable; detach it before the loss")
        if name == "mean":
            assert wanted.block is not None
            part = part / block_cells(q, k, wanted.block, part)
        total = part if total is None else total + part
    return total


_op.register_autograd(_backward, setup_context=_setup)
