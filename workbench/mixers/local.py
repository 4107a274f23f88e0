"""Softmax over listed keys: the routine behind windows, neighbourhoods, selections and token groups.

    P_is = exp(scale q_i . k_{n(i, s)} + b_is) / sum_t exp(scale q_i . k_{n(i, t)} + b_it),   o_i = sum_s P_is v_{n(i, s)}

``n(i, s)`` is the s-th key that query i sees. ``local_softmax`` takes that table row by row; ``grouped_softmax`` takes groups of
queries that share their keys, so that keys are gathered once per group. Both return the weights as a ``SparseMap``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.patterns.sparse import SparseMap


def local_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    zero_padding: bool = False,
    offset: int = 0,
) -> tuple[Tensor, SparseMap]:
    """Softmax of every query over its own list of keys.

    q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]``; ``indices`` ``[B or 1, H or 1, Q, S]`` int64 of keys, -1 for
    nothing; ``bias`` broadcasts to ``[B, H, Q, S]`` and is added to the logits (-inf hides). ``scale=None`` is ``E ** -0.5``.
    With ``zero_padding`` an index of -1 is a key and a value of zeros: it takes its share of the softmax (logit: its bias) and
    gives nothing. A query without keys gives zeros. Gradients flow to q, k, v and bias. Output ``[B, H, Q, V]``.
    """
    check_qkv(q, k, v)
    if indices.ndim != 4 or indices.shape[2] != q.shape[2]:
        raise WorkbenchError(f"indices are [B or 1, H or 1, Q, S] with Q = {q.shape[2]}; got {list(indices.shape)}")
    rows = torch.arange(q.shape[2], device=q.device)[None, None, :, None]
    bias = None if bias is None else bias[..., None, :]
    return grouped_softmax(q, k, v, rows, indices, scale=scale, bias=bias, zero_padding=zero_padding, offset=offset)


def grouped_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    allowed: Tensor | None = None,
    zero_padding: bool = False,
    offset: int = 0,
) -> tuple[Tensor, SparseMap]:
    """Softmax inside of groups: the queries of group w over the keys of group w.

    ``queries`` ``[B or 1, H or 1, W, L]`` and ``keys`` ``[B or 1, H or 1, W, S]`` are int64, -1 where a group is not full;
    every query stands in exactly one group, a key in any number of them. ``bias`` and ``allowed`` (bool, False hides) broadcast
    to ``[B, H, W, L, S]``. The rest as in ``local_softmax``.
    """
    check_qkv(q, k, v)
    b, h, n, e = q.shape
    m = k.shape[2]
    _check_groups(queries, (b, h), n, "queries")
    _check_groups(keys, (b, h), m, "keys")
    if queries.shape[2] != keys.shape[2]:
        raise WorkbenchError(f"queries and keys have the same groups; got {queries.shape[2]} and {keys.shape[2]}")
    groups, length, width = queries.shape[2], queries.shape[3], keys.shape[3]
    shape = (b, h, groups, length, width)
    slots = _slots(queries, n)
    work = working_dtype(q.dtype)
    q_in = _pick(q.to(work) * (e**-0.5 if scale is None else scale), queries)
    k_in, v_in = _pick(k.to(work), keys), _pick(v, keys)
    s = (q_in.unflatten(1, (k_in.shape[1], -1)) @ k_in[:, :, None].transpose(-1, -2)).flatten(1, 2)
    filled = (keys >= 0)[..., None, :]
    if zero_padding:
        s = s.masked_fill(~filled, 0.0)
        hidden = None
    else:
        hidden = ~filled
    for name, part in (("bias", bias), ("allowed", allowed)):
        if part is not None and not _broadcasts(part, shape):
            raise WorkbenchError(
                f"{name} broadcasts to {list(shape)} (or without the groups' axes); got {list(part.shape)}"
            )
    if bias is not None:
        s = s + bias.to(work)
    if allowed is not None:
        hidden = ~allowed if hidden is None else hidden | ~allowed
    weights = masked_softmax(s, hidden)
    if zero_padding:
        weights = weights.masked_fill(~filled, 0.0)
    out = (weights.to(v.dtype).unflatten(1, (v_in.shape[1], -1)) @ v_in[:, :, None]).flatten(1, 2)
    table = keys.repeat_interleave(length, 2).gather(2, _spread(slots, keys)[..., None].expand(-1, -1, -1, width))
    found = SparseMap(table, _at(weights.detach(), slots), m, kv_heads=k.shape[1], offset=offset)
    return _at(out, slots), found


def masked_softmax(s: Tensor, hidden: Tensor | None) -> Tensor:
    """Softmax over the last axis without the places that are ``hidden`` or -inf; a row without places is zero."""
    if hidden is not None:
        s = s.masked_fill(hidden, float("-inf"))
    top = s.detach().amax(-1, keepdim=True)
    weights = (s - top.masked_fill(top.isneginf(), 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1.0)


def chosen(*names: str, **options: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """How a recipe prepares its operator's arguments: these of the layer's, and these options."""

    def prepare(given: dict[str, Any]) -> dict[str, Any]:
        return {name: given[name] for name in names} | options

    return prepare


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ``WorkbenchError`` unless q ``[B, H, Q, E]``, k ``[B, G, K, E]`` and v ``[B, G, K, V]`` fit together."""
    for name, part in (("q", q), ("k", k), ("v", v)):
        if not isinstance(part, Tensor) or part.ndim != 4 or 0 in part.shape or not part.is_floating_point():
            got = f"{part.dtype} {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            raise WorkbenchError(f"{name} is floating point [B, heads, tokens, width], not empty; got {got}")
    b, h, _, e = q.shape
    if k.shape[0] != b or k.shape[3] != e or h % k.shape[1]:
        raise WorkbenchError(f"k is [B, G, K, E] with B={b}, E={e} and G a divisor of {h}; got {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise WorkbenchError(f"v is [B, G, K, V] = {[*k.shape[:3], 'V']}; got {list(v.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise WorkbenchError(f"q, k and v have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}")
    if not q.device == k.device == v.device:
        raise WorkbenchError(f"q, k and v are on one device; got {q.device}, {k.device} and {v.device}")


def _check_groups(index: Tensor, axes: tuple[int, int], tokens: int, name: str) -> None:
    fits = index.ndim == 4 and all(have in (1, want) for have, want in zip(index.shape, axes, strict=False))
    if index.dtype != torch.int64 or not fits or 0 in index.shape:
        wanted = f"int64 [{axes[0]} or 1, {axes[1]} or 1, groups, tokens]"
        raise WorkbenchError(f"{name} of groups are {wanted}; got {index.dtype} {list(index.shape)}")
    if int(index.max()) >= tokens or int(index.min()) < -1:
        span = f"{int(index.min())} .. {int(index.max())}"
        raise WorkbenchError(f"{name} of groups are tokens 0 .. {tokens - 1}, or -1; got {span}")


def _broadcasts(part: Tensor, shape: tuple[int, ...]) -> bool:
    return part.ndim <= 5 and all(have in (1, want) for have, want in zip(part.shape[::-1], shape[::-1], strict=False))


def _slots(queries: Tensor, tokens: int) -> Tensor:
    """Where each query stands in its groups laid end to end, ``[B or 1, H or 1, Q]``."""
    flat = queries.flatten(2)
    places = torch.arange(flat.shape[2], device=flat.device).expand_as(flat)
    # Places of the padding land in one spare column.
    slots = flat.new_full((*flat.shape[:2], tokens + 1), -1)
    slots = slots.scatter_(2, flat.masked_fill(flat < 0, tokens), places)[..., :tokens]
    if bool((slots < 0).any()) or bool(((flat >= 0).sum(2) != tokens).any()):
        raise WorkbenchError(f"every one of the {tokens} queries stands in exactly one group")
    return slots


def _spread(index: Tensor, like: Tensor) -> Tensor:
    """``index`` and ``like`` brought to the same first two axes, as far as ``index`` is concerned."""
    b, h = max(index.shape[0], like.shape[0]), max(index.shape[1], like.shape[1])
    return index.expand(b, h, *index.shape[2:])


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of x ``[B, G, N, E]`` at ``index`` ``[B or 1, H or 1, W, L]``: ``[B, G or H, W, L, E]``; any token for -1.

    Value heads are repeated only where the groups differ between heads.
    """
    index = index.clamp(min=0)
    if index.shape[:2] == (1, 1):
        return x[:, :, index[0, 0]]
    heads = index.shape[1]
    if heads > x.shape[1]:
        x = x.repeat_interleave(heads // x.shape[1], 1)
    flat = index.flatten(2).expand(x.shape[0], x.shape[1], -1)
    return x.gather(2, flat[..., None].expand(-1, -1, -1, x.shape[3])).unflatten(2, index.shape[2:])


def _at(x: Tensor, slots: Tensor) -> Tensor:
    """``x`` ``[B, H, W, L, C]`` in the order of the queries, ``[B, H, Q, C]``."""
    flat = x.flatten(2, 3)
    if slots.shape[:2] == (1, 1):
        return flat[:, :, slots[0, 0]]
    return flat.gather(2, slots.expand(*flat.shape[:2], -1)[..., None].expand(-1, -1, -1, flat.shape[3]))
