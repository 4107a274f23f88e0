"""Block maps and statistics of softmax attention in one pass over q k^T, without ever holding a Q x K tensor.

With p_ij = exp(s_ij - lse_i) (``kernels/scores.py`` defines s; p is 0 where the mask hides j from i) and d_ij = |i - j|:

    blocks["sum"]_IJ   sum of p over the cells of a block     blocks["max"]_IJ   largest p in it
    blocks["mean"]_IJ  that sum over the number of its cells  blocks["abs"]_IJ   sum of |p|, equal to "sum" here
    received_j  = sum_i p_ij                                  entropy_i   = -sum_j p_ij ln p_ij            (nats)
    distance_i  = sum_j p_ij d_ij                             windowed_i  = sum_j p_ij min(d_ij, window)
    distance2_i = sum_j p_ij d_ij^2                           mass_i      = sum_j p_ij w_ij   for given weights w
    top1_i      = max_j p_ij and its key                      topk_i      = the k largest, descending, and their keys

Rows may sum to less than 1 (a sink logit, a row that sees nothing). The missing mass is not part of any statistic: it adds
neither to the entropy nor to the distances, and nothing is renormalised. Blocks at the edges hold the cells that exist.
A row that sees no key is zero: its lse is -inf (or its sink logit), its entropy and distances 0, its top key -1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workbench.kernels.forms import choose
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Bias, Relative, Scores
from workbench.kernels.stats.operator import compute, through_the_operator
from workbench.kernels.stats.request import REDUCTIONS, STATS, Wanted, layout, triton_cannot

Weights = Tensor | Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A set of keys or a weight per pair: a tensor ``[K]`` or ``[B, K]`` (bool or float) or a function ``(b, h, q, k)`` of index
tensors that broadcast (FlexAttention's signature; q and k are absolute positions) to a bool or a weight."""


@dataclass(frozen=True, eq=False)
class AttentionStats:
    """What ``attention_stats`` found. ``lse`` ``[B, H, Q]`` natural log; ``blocks`` reduction -> ``[B, H, Q/size, K/size]``
    (rounded up); ``received`` ``[B, H, K]``; ``entropy``, ``distance``, ``windowed``, ``distance2`` ``[B, H, Q]``; ``top1``
    (values, key indices), both ``[B, H, Q]``; ``topk`` the same, ``[B, H, Q, k]``; ``mass`` name -> ``[B, H, Q]``. What was not
    asked for is None. ``impl`` names the form that ran."""

    lse: Tensor
    blocks: dict[str, Tensor] = field(default_factory=dict)
    received: Tensor | None = None
    entropy: Tensor | None = None
    distance: Tensor | None = None
    windowed: Tensor | None = None
    distance2: Tensor | None = None
    top1: tuple[Tensor, Tensor] | None = None
    topk: tuple[Tensor, Tensor] | None = None
    mass: dict[str, Tensor] = field(default_factory=dict)
    impl: str = ""


def attention_stats(
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    mask: Mask = Mask(causal=True),
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    bias: Bias | None = None,
    block: int | None = None,
    reduce: Iterable[str] = ("sum",),
    stats: Iterable[str] = (),
    window: int | None = None,
    topk: int | None = None,
    mass: Mapping[str, Weights] | None = None,
    gate: Tensor | None = None,
    impl: str | None = None,
) -> AttentionStats:
    """Statistics of softmax attention of q ``[B, H, Q, E]`` over k ``[B, G, K, E]``.

    ``lse`` ``[B, H, Q]`` is the natural log of the row denominators, sink included; it is computed in the same pass if not
    given, and trusted if given. ``block`` is the side of the square blocks (None: no block map), ``reduce`` which of
    ``sum mean max abs``; ``stats`` which of ``received entropy distance windowed distance2 top1``; ``window`` cuts the
    distance of ``windowed``; ``topk`` how many top keys; ``mass`` names sets of keys or weights whose mass is wanted.
    ``gate`` ``[B, H, Q]``, not negative, multiplies the rows: all statistics are then those of g_i p_ij; lse stays p's.

    ``impl``: ``reference`` (plain torch, dense), ``cpu`` (row chunks in plain torch, on any device), ``triton``. None takes
    ``triton`` on CUDA tensors where it can run, else ``cpu``; nothing falls back. float64 stays float64, everything else is
    accumulated and returned in float32.

    Gradients reach q, k, sink and a given lse through lse, received and the block maps ``sum``, ``mean`` and ``abs``. A gradient
    that arrives at anything else raises, as do a bias or a gate that require one. Raises ``ValueError`` naming the argument at
    fault, ``RuntimeError`` if the named form cannot run.
    """
    for name, value in (("block", block), ("window", window), ("topk", topk)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is a positive number of {'keys' if name == 'topk' else 'tokens'}; got {value!r}")
    names, chosen = _names("stats", stats, STATS), _names("reduce", reduce, REDUCTIONS)
    if "windowed" in names and window is None:
        raise ValueError("window: 'windowed' needs the distance at which it is cut, for example window=128")
    scores = Scores(q, k, mask, scale, softcap, sink, bias)
    if topk is not None and topk > scores.shape[3]:
        raise ValueError(f"topk: {topk} keys of {scores.shape[3]}")
    _check_rows(scores, lse, gate)
    sets, pairs = _weights(mass or {}, scores)
    how = choose(impl, q, k, unsupported=triton_cannot(scores, topk))
    wanted = Wanted(
        block, chosen if block else (), names, window, topk, tuple(sets.values()), tuple(pairs.values()), gate
    )
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, sink, lse))
    for name, part in (("bias", bias.table if isinstance(bias, Relative) else bias), ("gate", gate)):
        if torch.is_grad_enabled() and isinstance(part, Tensor) and part.requires_grad:
            raise ValueError(f"{name} requires a gradient, and statistics have none with respect to it: detach it")
    if pairs or not (bias is None or isinstance(bias, Tensor | Relative)):
        if grad:
            raise ValueError("a bias or a mass given as a function has no gradient: detach q and k, or pass tensors")
        with torch.no_grad():
            found = compute(scores, lse, wanted, how)
    else:
        found = through_the_operator(scores, lse, wanted, how)
    return _labelled(found, wanted, (*sets, *pairs), mass or {}, how)


def _labelled(
    found: list[Tensor], wanted: Wanted, order: tuple[str, ...], asked: Mapping[str, Weights], impl: str
) -> AttentionStats:
    at = dict(zip(layout(wanted), found, strict=True))
    masses = {name: at[f"mass {i}"] for i, name in enumerate(order)}
    return AttentionStats(
        lse=at["lse"],
        blocks={name: at[f"blocks {name}"] for name in wanted.reduce},
        top1=(at["top1 values"], at["top1 keys"]) if "top1" in wanted.stats else None,
        topk=(at["topk values"], at["topk keys"]) if wanted.topk else None,
        mass={name: masses[name] for name in asked},
        impl=impl,
        **{name: at[name] for name in wanted.stats if name != "top1"},
    )


def _check_rows(scores: Scores, lse: Tensor | None, gate: Tensor | None) -> None:
    rows, device = scores.shape[:3], scores.q.device
    if lse is not None:
        if tuple(lse.shape) != rows:
            raise ValueError(f"lse is [B, H, Q] = {list(rows)}; got {list(lse.shape)}")
        if lse.dtype not in (torch.float32, torch.float64) or lse.device != device:
            raise ValueError(f"lse is float32 or float64 on q's device {device}; got {lse.dtype} on {lse.device}")
    if gate is not None:
        if tuple(gate.shape) != rows or gate.device != device or not gate.is_floating_point():
            raise ValueError(
                f"gate is floating point [B, H, Q] = {list(rows)} on {device}; "
                f"got {gate.dtype} {list(gate.shape)} on {gate.device}"
            )
        if not torch.compiler.is_compiling() and bool((gate < 0).any()):
            raise ValueError("gate must not be negative here: entropy and the largest weight of a signed row differ")


def _weights(mass: Mapping[str, Weights], scores: Scores) -> tuple[dict[str, Tensor], dict[str, Callable[..., Tensor]]]:
    """Weights per key ``[B or 1, K]`` in the working type, and weights per pair."""
    b, _, _, k = scores.shape
    sets: dict[str, Tensor] = {}
    pairs: dict[str, Callable[..., Tensor]] = {}
    for name, weights in mass.items():
        if not isinstance(weights, Tensor):
            if not callable(weights):
                kind = type(weights).__name__
                raise ValueError(f"mass[{name!r}] is a tensor [K] or [B, K] or a function (b, h, q, k); got {kind}")
            pairs[name] = weights
            continue
        table = weights[None] if weights.ndim == 1 else weights
        if table.ndim != 2 or table.shape[0] not in (1, b) or table.shape[1] != k:
            raise ValueError(f"mass[{name!r}] is [{k}] or [{b}, {k}], one weight per key; got {list(weights.shape)}")
        sets[name] = table.to(scores.q.device, scores.dtype)
    return sets, pairs


def _names(argument: str, given: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(dict.fromkeys(given))
    for name in names:
        if name not in known:
            raise ValueError(f"{argument}: no {name!r}; known: {', '.join(known)}")
    return names
