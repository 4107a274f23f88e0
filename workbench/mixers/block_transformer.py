"""Block Transformer: attention among blocks, whose result stands before each next block as one more token.

    C_t = sum_{u <= t} B_tu mean_{j in block u} v_j                                      block decoder: causal over blocks
    o_i = sum_{j <= i, block(j) = block(i)} A_ij v_j + a_i C_{block(i) - 1}              token decoder: local, with a prefix

A and a share one softmax: the logits are scale q_i . k_j for the tokens and scale q_i . p_{block(i) - 1} for the prefix. So

    M = A + diag(a) S B E,   S shifts to the previous block, E averages over a block

Tokens of the first block have no prefix. In the network the two decoders are stacks of layers; here each is one layer, and the
prefix's value is the block decoder's output. Source: Ho et al., arXiv:2406.02657, section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Learned, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.flash import flash_attention, merge_partial, partial_attention
from workbench.mixers.scored import check_tensor
from workbench.mixers.windows import at_least_one, check_square
from workbench.patterns.algebra import ProductMap, SumMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.sparse import SparseMap


def block_transformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_q: Tensor,
    block_k: Tensor,
    prefix_k: Tensor,
    *,
    block: int = 4,
    scale: float | None = None,
) -> tuple[Tensor, SumMap]:
    """One block-level and one token-level attention, the first read by the second as a prefix.

    q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]``; for the ceil(N / ``block``) blocks block_q ``[B, H, M, E]``,
    block_k ``[B, G, M, E]``, and prefix_k ``[B, G, M, E]``, the key under which a block's result stands before the next one.
    Output ``[B, H, N, V]``. The map is the sum of the local part and of a product: ``native()[1].native()`` is the prefix
    column of every token ``[N, M]`` and the map from blocks to tokens ``[M, N]``.
    """
    check_square(q, k, v)
    at_least_one("block", block)
    (b, h, n, e), g = q.shape, k.shape[1]
    count = -(-n // block)
    for name, part, heads in (("block_q", block_q, h), ("block_k", block_k, g), ("prefix_k", prefix_k, g)):
        check_tensor(name, part, (b, heads, count, e))
        if part.dtype != q.dtype:
            raise WorkbenchError(f"{name} is {q.dtype} as q; got {part.dtype}")
    scale = e**-0.5 if scale is None else scale
    number = torch.arange(n, device=q.device) // block
    local = Mask(causal=True, documents=number[None])
    keys, values = (part.repeat_interleave(h // g, 1) for part in (block_k, block_means(v, block)))
    context, among_blocks = flash_attention(block_q, keys, values, mask=Mask(causal=True), scale=scale)
    near, near_lse = partial_attention(q, k, v, mask=local, scale=scale)
    before = number - 1
    heads_of_prefix = prefix_k[:, :, before.clamp(min=0)].repeat_interleave(h // g, 1)
    logits = (q.to(near_lse) * heads_of_prefix.to(near_lse)).sum(-1) * scale
    logits = logits.masked_fill(before < 0, float("-inf"))
    out, lse = merge_partial([near, context[:, :, before.clamp(min=0)]], [near_lse, logits])
    tile = SoftmaxMap(q, k, lse.detach(), mask=local, scale=scale)
    tile.row_sum = "<=1"
    column = SparseMap(before[None, None, :, None], (logits - lse).exp().detach()[..., None], count)
    through = ProductMap(column, ProductMap(among_blocks, _averages(b, h, n, block, lse, g)))
    return out, SumMap(tile, through, row_sum="1")


def block_means(x: Tensor, block: int) -> Tensor:
    """Means over blocks of tokens, ``[B, G, N, E]`` to ``[B, G, ceil(N / block), E]``; the last block is of what is there."""
    n = x.shape[2]
    sums = torch.nn.functional.pad(x, (0, 0, 0, -n % block)).unflatten(2, (-1, block)).sum(3)
    lengths = (n - torch.arange(0, n, block, device=x.device)).clamp(max=block)
    return sums / lengths[:, None]


def _averages(batch: int, heads: int, tokens: int, block: int, like: Tensor, kv_heads: int) -> SparseMap:
    count = -(-tokens // block)
    members = torch.arange(count * block, device=like.device).view(count, block)
    members = members.masked_fill(members >= tokens, -1)
    weights = (members >= 0).to(like.dtype) / (members >= 0).sum(1, keepdim=True)
    return SparseMap(members[None, None], weights.expand(batch, heads, -1, -1), tokens, kv_heads=kv_heads)


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    count = -(-tokens // 4)
    shapes = {
        "q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 8),
        "block_q": (2, 4, count, 8), "block_k": (2, 2, count, 8), "prefix_k": (2, 2, count, 8),
    }  # fmt: skip
    return {**example_tensors(seed, dtype, **shapes), "block": 4}


def _prepare(given: dict[str, Any]) -> dict[str, Any]:
    """A block's query and keys are means of projections of its tokens."""
    pooled = {name: block_means(given[name], 4) for name in ("block_q", "block_k", "prefix_k")}
    return {name: given[name] for name in ("q", "k", "v")} | pooled | {"block": 4}


VARIANTS = (
    Variant(
        name="block-transformer",
        paper="#130 Block Transformer: Global-to-Local Language Modeling for Fast Inference (2024)",
        family="softmax",
        priority="B",
        operator=block_transformer_attention,
        example=_example,
        causal=True,
        reference="itsnamgyu/block-transformer",
        note="One layer of each decoder; a block's value is the mean of its tokens' values, where the network has an embedder.",
        recipe=Recipe(
            learned={"block_q": Learned("HE"), "block_k": Learned("GE"), "prefix_k": Learned("GE")}, prepare=_prepare
        ),
    ),
)
