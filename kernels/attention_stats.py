"""Block maps and statistics of softmax attention in one pass over q k^T, without ever holding a Q x K tensor.

With p_ij = exp(s_ij - lse_i) (``kernels/scores.py`` defines s; p is 0 where the mask hides j from i):

    blocks["sum"]_IJ   sum of p over the cells of a block     blocks["max"]_IJ   largest p in it
    blocks["mean"]_IJ  that sum over the number of its cells  blocks["abs"]_IJ   sum of |p|, equal to "sum" here
    received_j = sum_i p_ij                                   entropy_i  = -sum_j p_ij ln p_ij            (nats)
    distance_i = sum_j p_ij min(|i - j|, window)              top1_i     = max_j p_ij and its key

Rows may sum to less than 1 (a sink logit, a row that sees nothing). The missing mass is not part of any statistic: it adds
neither to the entropy nor to the distance, and nothing is renormalised. Blocks at the edges hold the cells that exist.
A row that sees no key is zero: its lse is -inf (or its sink logit), its entropy and distance 0, its top key -1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workbench.kernels.mask import Mask
from workbench.kernels.scores import Bias, Scores

REDUCTIONS = ("sum", "mean", "max", "abs")
STATS = ("received", "entropy", "distance", "top1")
IMPLS = ("reference", "cpu", "triton")


@dataclass(frozen=True, eq=False)
class AttentionStats:
    """What ``attention_stats`` found. ``lse`` ``[B, H, Q]`` natural log; ``blocks`` reduction -> ``[B, H, Q/size, K/size]``
    (rounded up); ``received`` ``[B, H, K]``; ``entropy`` and ``distance`` ``[B, H, Q]``; ``top1`` (values, key indices), both
    ``[B, H, Q]``. What was not asked for is None. ``impl`` names the form that ran."""

    lse: Tensor
    blocks: dict[str, Tensor] = field(default_factory=dict)
    received: Tensor | None = None
    entropy: Tensor | None = None
    distance: Tensor | None = None
    top1: tuple[Tensor, Tensor] | None = None
    impl: str = ""


@dataclass(frozen=True)
class Wanted:
    """A checked request: block side, reductions, statistics, cut of the distance."""

    block: int | None
    reduce: tuple[str, ...]
    stats: tuple[str, ...]
    window: int | None
    gate: Tensor | None


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
    gate: Tensor | None = None,
    impl: str | None = None,
) -> AttentionStats:
    """Statistics of softmax attention of q ``[B, H, Q, E]`` over k ``[B, G, K, E]``.

    ``lse`` ``[B, H, Q]`` is the natural log of the row denominators, sink included; it is computed in the same pass if not
    given, and trusted if given. ``block`` is the side of the square blocks (None: no block map), ``reduce`` which of
    ``sum mean max abs``; ``stats`` which of ``received entropy distance top1``; ``window`` cuts the distance.
    ``gate`` ``[B, H, Q]``, not negative, multiplies the rows: all statistics are then those of g_i p_ij; lse stays p's.

    ``impl``: ``reference`` (plain torch, dense), ``cpu`` (row chunks in plain torch, on any device), ``triton``. None takes
    ``cpu``. A form that cannot run raises ``RuntimeError``; nothing falls back. float64 stays float64, everything else is
    accumulated and returned in float32. No gradient flows. Raises ``ValueError`` naming the argument at fault.
    """
    wanted = Wanted(block, _names("reduce", reduce, REDUCTIONS), _names("stats", stats, STATS), window, gate)
    for name, value in (("block", block), ("window", window)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} is a positive number of tokens; got {value!r}")
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"impl: no form {impl!r}; known: {', '.join(IMPLS)}")
    if impl == "triton":
        raise RuntimeError("impl='triton' is not part of this version; use impl='cpu' (any device) or impl='reference'")
    scores = Scores(q, k, mask, scale, softcap, sink, bias)
    if lse is not None:
        if tuple(lse.shape) != scores.shape[:3]:
            raise ValueError(f"lse is [B, H, Q] = {list(scores.shape[:3])}; got {list(lse.shape)}")
        if lse.dtype not in (torch.float32, torch.float64) or lse.device != q.device:
            raise ValueError(f"lse is float32 or float64 on q's device {q.device}; got {lse.dtype} on {lse.device}")
    if gate is not None:
        if tuple(gate.shape) != scores.shape[:3] or gate.device != q.device or not gate.is_floating_point():
            raise ValueError(
                f"gate is floating point [B, H, Q] = {list(scores.shape[:3])} on {q.device}; "
                f"got {gate.dtype} {list(gate.shape)} on {gate.device}"
            )
        if bool((gate < 0).any()):
            raise ValueError("gate must not be negative here: entropy and the largest weight of a signed row differ")
    with torch.no_grad():
        if impl == "reference":
            from workbench.kernels.stats.reference import reference_stats

            return reference_stats(scores, lse, wanted)
        from workbench.kernels.stats.cpu import blocked_stats

        return blocked_stats(scores, lse, wanted)


def _names(argument: str, given: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if name not in known:
            raise ValueError(f"{argument}: no {name!r}; known: {', '.join(known)}")
    return names
