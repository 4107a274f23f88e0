"""Universal RPE attention (URPE): softmax with a relative bias, times a learned number per distance.

    A_ij = softmax_j(scale q_i . k_j + b_d) c_d,   d = j - i,   c = 1 at the start

Row-stochastic weights cannot tell how many tokens there are or where one stands; the factor c, a Toeplitz matrix with any sign,
can. Rows do not sum to 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import Parameter, Recipe, Variant, example_tensors
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Relative, working_dtype
from workbench.mixers.relative import distances
from workbench.mixers.scored import check_tensor, checked, masked_softmax, plain_scores, visible, weighted
from workbench.patterns.softmax import SoftmaxMap


def urpe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    factor: Tensor,
    *,
    mask: Mask,
    first: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, UrpeMap]:
    """URPE attention of q ``[B, H, Q, E]`` over k ``[B, G, K, E]`` and v ``[B, G, K, V]``.

    ``bias`` and ``factor`` are ``[H or 1, M]``, one number per distance j - i from ``first`` on (default ``1 - M``: the past and
    the query itself); distances beyond their ends take the number at the end. Source: Luo et al., Your Transformer May Not be
    as Powerful as You Expect, arXiv:2205.13401, section 4.
    """
    _, h, n, m = checked(q, k, v, mask)
    check_tensor("bias", bias, (h, "M"), (1, "M"))
    check_tensor("factor", factor, (h, bias.shape[1]), (1, bias.shape[1]))
    start = 1 - bias.shape[1] if first is None else first
    work = working_dtype(q.dtype)
    away = distances(n, m, mask.offset, q.device)
    weights, lse = masked_softmax(
        plain_scores(q, k, scale) + _spread(bias.to(work), start, away), visible(mask, n, m, q.device)
    )
    out = weighted(weights * _spread(factor.to(work), start, away), v)
    # Distances of this map in order, so that its bias is a table of them.
    span = torch.arange(1 - mask.offset - n, m - mask.offset, device=q.device)
    table = Relative(_spread(bias.detach().to(work), start, span), int(span[0]))
    softmax = SoftmaxMap(q, k, lse, mask=mask, scale=scale, bias=table)
    return out, UrpeMap(softmax, factor, start)


class UrpeMap(AttentionMap):
    """Weights of ``softmax`` times one number per distance: row i, column j is ``P_ij factor[h, j - i - first]``.

    ``softmax`` is the map before, a softmax with the relative bias; ``factor`` is ``[H or 1, M]``.
    """

    row_sum = "free"

    def __init__(self, softmax: SoftmaxMap, factor: Tensor, first: int) -> None:
        super().__init__(softmax.shape, kv_heads=softmax.kv_heads, offset=softmax.offset)
        self.softmax, self.factor, self.first = softmax, factor.detach().to(softmax.scores.dtype), first
        self.sign = "signed" if bool((self.factor < 0).any()) else "nonnegative"

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        away = distances(hi - lo, self.shape[3], self.offset, self.factor.device, lo)
        return self.softmax.rows(lo, hi) * _spread(self.factor, self.first, away)


def _spread(table: Tensor, first: int, away: Tensor) -> Tensor:
    """``table[h, d - first]`` ``[H or 1, *away.shape]``, with the table's ends beyond them."""
    return table[:, (away - first).clamp(0, table.shape[1] - 1)]


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 8), "bias": (4, 9), "factor": (4, 9)}
    given = example_tensors(seed, dtype, **shapes)
    return {**given, "factor": given["factor"] - 0.5, "mask": Mask(causal=True)}


VARIANTS = (
    Variant(
        name="urpe-attention",
        paper="#41 Your Transformer May Not be as Powerful as You Expect (2022)",
        family="weighted softmax",
        priority="C",
        operator=urpe_attention,
        example=_example,
        causal=True,
        reference="lsj2408/URPE fairseq MultiheadAttention",
        recipe=Recipe(parameters={"bias": Parameter("H64"), "factor": Parameter("H64", torch.ones)}),
    ),
)
