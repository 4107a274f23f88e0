"""FlashBlock: block diffusion that reuses what a block got from outside of itself in an earlier step.

    o_i = exp(lse^x_i - lse_i) o^x_i + exp(lse^in_i - lse_i) o^in_i,   lse_i = log(exp(lse^x_i) + exp(lse^in_i))

``in`` is the attention of the block's queries to the block's own keys, fresh in every step; (o^x, lse^x) is the attention to the
context before the block, kept from the step in which it was last computed, with the queries of that step. So the map has two
tiles with one denominator, and the external tile's scores are those of older queries. Source: FlashBlock (2026).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.flash import union_attention
from workbench.mixers.local import check_qkv
from workbench.patterns.union import UnionMap


def flash_block_attention(
    q: Tensor, cached_q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
) -> tuple[Tensor, UnionMap]:
    """Attention of a block of Q tokens to X tokens before it (stale) and to itself (fresh, bidirectional).

    q and cached_q ``[B, H, Q, E]`` (queries of this step, and of the step that filled the cache), k ``[B, G, X + Q, E]``, v
    ``[B, G, X + Q, V]``, the context first. With cached_q = q this is full attention. Output ``[B, H, Q, V]``; the map's tiles
    are ``maps[0]`` (external) and ``maps[1]`` (internal).
    """
    check_qkv(q, k, v)
    if cached_q.shape != q.shape or cached_q.dtype != q.dtype:
        raise WorkbenchError(f"cached_q is {q.dtype} {list(q.shape)} as q; got {cached_q.dtype} {list(cached_q.shape)}")
    external = k.shape[2] - q.shape[2]
    if external < 0:
        raise WorkbenchError(f"k holds the context and the block, at least {q.shape[2]} tokens; got {k.shape[2]}")
    outside = (torch.arange(k.shape[2], device=k.device) < external)[None]
    tiles = [(cached_q, k, Mask(keys=outside, offset=external)), (q, k, Mask(keys=~outside, offset=external))]
    return union_attention(tiles, v, scale=scale)


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    keys = tokens + 6
    shapes = {"q": (2, 4, tokens, 8), "cached_q": (2, 4, tokens, 8), "k": (2, 2, keys, 8), "v": (2, 2, keys, 8)}
    return dict(example_tensors(seed, dtype, **shapes))


VARIANTS = (
    Variant(
        name="flashblock-attention",
        paper="#99 FlashBlock: Attention Caching for Efficient Long-Context Block Diffusion (2026)",
        family="softmax",
        priority="B",
        operator=flash_block_attention,
        example=_example,
        reference="definition",
        note="No code was found beside the project's page. Values of the context do not change between steps.",
    ),
)
