"""Landmark attention: the last token of every block stands for the block, and softmax has two levels.

    own block      P_ij = exp(s_ij) / Z_i
    past block c   P_ij = exp(s_il) / Z_i  softmax_{j in c}(s_ij)      l the landmark of c, j its other tokens

with Z_i the sum over the tokens of the query's own block and the landmarks of all past blocks.

Landmarks themselves get no weight: neither those of past blocks, whose weight goes to their tokens, nor the own one, which is
hidden. Block by block the rows sum to the landmarks' weights, so the block map is had from N / block keys per query.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap, block_cells
from workbench.catalogue import Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Scores
from workbench.mixers.scored import checked, masked_softmax, plain_scores, visible, weighted
from workbench.patterns.lazy import LazyMap

STEP = 128
"""Query rows that the block map works on at a time."""


def landmark_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, block: int, scale: float | None = None
) -> tuple[Tensor, LandmarkMap]:
    """Landmark attention of q ``[B, H, Q, E]`` over k ``[B, G, K, E]`` and v ``[B, G, K, V]`` to ``[B, H, Q, V]``.

    Tokens ``block - 1``, ``2 block - 1``, ... are landmarks (50 tokens and a landmark in the paper); a last block that is not
    full has none. The mask is causal; what else it hides is hidden on both levels. ``native()`` of the map is the weight of every
    block. Source: Mohtashami and Jaggi, arXiv:2305.16300, section 3.1, grouped softmax.
    """
    _, _, n, m = checked(q, k, v, mask)
    found = LandmarkMap(q, k, mask=mask, block=block, scale=scale)
    weights, _ = landmark_weights(plain_scores(q, k, scale), visible(mask, n, m, q.device), block, mask.offset)
    return weighted(weights, v), found


def landmark_weights(scores: Tensor, allowed: Tensor, block: int, first: int) -> tuple[Tensor, Tensor]:
    """Weights ``[B, H, R, K]`` of scores of rows from position ``first`` on, and what each block got ``[B, H, R, K / block]``."""
    rows, keys = scores.shape[-2:]
    at = torch.arange(keys, device=scores.device)
    own = at // block == (torch.arange(first, first + rows, device=scores.device) // block)[:, None]
    landmark = at % block == block - 1
    top, _ = masked_softmax(scores, allowed & (own ^ landmark))
    folded = (-(-keys // block), block)
    short = folded[0] * block - keys
    within, _ = masked_softmax(
        _fold(scores, folded, short), _fold((allowed & ~own & ~landmark).expand_as(scores), folded, short)
    )
    level = _fold(top * ~own, folded, short).sum(-1)
    spread = (within * level[..., None]).flatten(-2)[..., :keys]
    kept = top * own
    return kept + spread, level * within.sum(-1).detach() + _fold(kept, folded, short).sum(-1)


def _fold(x: Tensor, folded: tuple[int, int], short: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, short)).unflatten(-1, folded)


class LandmarkMap(AttentionMap):
    """The two-level map of ``landmark_attention``; ``native()`` ``[B, H, Q, K / block]`` is its upper level."""

    def __init__(self, q: Tensor, k: Tensor, *, mask: Mask, block: int, scale: float | None = None) -> None:
        if not mask.causal:
            raise WorkbenchError("mask is causal in landmark attention: blocks after the query have no landmark to see")
        if isinstance(block, bool) or not isinstance(block, int) or block < 2:
            raise WorkbenchError(f"block is a landmark and at least one other token; got {block!r}")
        try:
            self.scores = Scores(q.detach(), k.detach(), mask, scale)
        except ValueError as error:
            raise WorkbenchError(str(error)) from None
        super().__init__(self.scores.shape, kv_heads=k.shape[1], offset=mask.offset)
        self.block = block
        hides = (mask.window, mask.documents, mask.keys, mask.dense, mask.queries, mask.blocks)
        self._plain = all(part is None for part in hides) and not mask.prefix
        self._plain = self._plain and mask.offset + self.shape[2] <= self.shape[3]
        self.row_sum = "1" if self._plain else "<=1"

    @property
    def mask(self) -> Mask:
        return self.scores.mask

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self._both(lo, hi)[0]

    def native(self) -> AttentionMap:
        """The weight of every block, ``[B, H, Q, K / block]`` rounded up: exactly the row sums of this map block by block."""
        b, h, n, m = self.shape
        make = self._levels if self._plain else lambda lo, hi: self._both(lo, hi)[1]
        return LazyMap((b, h, n, -(-m // self.block)), make, domain="block", row_sum=self.row_sum, offset=self.offset)

    def _both(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            keys = self.shape[3]
            scores = self.scores.tile(slice(lo, hi), slice(0, keys))
            allowed = visible(self.mask, hi - lo, keys, scores.device, lo)
            return landmark_weights(scores, allowed, self.block, self.offset + lo)

    def _levels(self, lo: int, hi: int) -> Tensor:
        """The upper level alone, from landmarks and own blocks: linear in K for a row's N / block + block keys."""
        step = max(self.block, STEP)
        parts = [self._level(start, min(start + step, hi)) for start in range(lo, hi, step)]
        return torch.cat(parts, 2) if parts else self._both(lo, lo)[1]

    def _level(self, lo: int, hi: int) -> Tensor:
        first, last = (self.offset + lo) // self.block, (self.offset + hi - 1) // self.block
        left, right = first * self.block, min((last + 1) * self.block, self.shape[3])
        near = self.scores.tile(slice(lo, hi), slice(left, right))
        at = torch.arange(left, right, device=near.device)
        places = torch.arange(lo, hi, device=near.device)[:, None] + self.offset
        own = (at // self.block == places // self.block) & (at % self.block != self.block - 1)
        ends = self.scores.k[:, :, self.block - 1 :: self.block]
        far = plain_scores(self.scores.q[:, :, lo:hi], ends, self.scores.scale) if ends.shape[2] else near[..., :0]
        past = torch.arange(far.shape[-1], device=near.device) < places // self.block
        weights, _ = masked_softmax(
            torch.cat([far, near.masked_fill(~own, float("-inf"))], -1), torch.cat([past, own & (at <= places)], -1)
        )
        out = weights.new_zeros(*weights.shape[:3], -(-self.shape[3] // self.block))
        out[..., : far.shape[-1]] = weights[..., : far.shape[-1]]
        mine = weights[..., far.shape[-1] :].sum(-1, keepdim=True)
        return out.scatter_add_(-1, (places // self.block).expand_as(mine), mine)

    def _blocks(self, size: int, reduce: str) -> Tensor:
        if not self._plain or size != self.block or reduce not in ("sum", "mean", "abs"):
            return super()._blocks(size, reduce)
        levels = self.native().dense(limit=2**62)
        short = -levels.shape[2] % size
        blocks = torch.nn.functional.pad(levels, (0, 0, 0, short)).unflatten(2, (-1, size)).sum(3)
        return blocks / block_cells(self.shape[2], self.shape[3], size, blocks) if reduce == "mean" else blocks


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 8)}
    return {**example_tensors(seed, dtype, **shapes), "mask": Mask(causal=True), "block": 4}


def _prepare(given: dict[str, Any]) -> dict[str, Any]:
    """Blocks of 7 tokens and a landmark: a native model's texts are short."""
    return {**{name: given[name] for name in ("q", "k", "v", "mask")}, "block": 8}


VARIANTS = (
    Variant(
        name="landmark-attention",
        paper="#102 Landmark Attention: Random-Access Infinite Context Length for Transformers (2023)",
        family="routing",
        priority="B",
        operator=landmark_attention,
        example=_example,
        causal=True,
        reference="epfml/landmark-attention llama_mem.py",
        note="landmarks are the tokens at the ends of blocks; whoever makes the text puts landmark tokens there",
        recipe=Recipe(prepare=_prepare),
    ),
)
