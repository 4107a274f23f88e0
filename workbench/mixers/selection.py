"""Block selection: each query, or block of queries, scores blocks of keys by a summary and attends to the best.

    MoBA        g_iJ = q_i . mean(k_J)                                  the own block and the best past ones, ``top`` in all
    NSA         p^c_iJ = softmax_J(scale q_i . mean(k_J)) over complete blocks, averaged over the query heads of a key head
                o_i = g^c_i sum_J p^c_iJ mean(v_J) + g^s_i attend(best blocks by p^c) + g^w_i attend(last ``window`` keys)
    DHSA        r_C = sqrt(|C|) mean(k_j, j in C) for chunks C of any length; the score r_I . r_C of a query block with a chunk is
                that of all its tokens, and the ``budget`` best tokens are kept, the last ``local`` ones always
    DHSA code   g_IJ = mean(q_I) . mean(k_J); first and own block and the best others, ``top`` in all

J, I are blocks of ``side`` tokens; the last may be shorter. A choice is made in the past of a query and is not differentiated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Learned, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.kernels.seer import select_blocks
from workbench.maps import GatedMap
from workbench.mixers.chosen import (
    RoutedMap,
    best,
    block_means,
    check_side,
    chosen_softmax,
    in_blocks,
    positions,
    sees_itself,
)
from workbench.mixers.scored import check_tensor, checked, masked_softmax, plain_scores, weighted
from workbench.mixers.softmax import softmax_attention
from workbench.patterns.algebra import ProductMap, SumMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.sparse import SparseMap


def moba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    top: int = 3,
    side: int = 512,
    mask: Mask = Mask(causal=True),
    scale: float | None = None,
) -> tuple[Tensor, RoutedMap]:
    """Mixture of block attention: q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]``.

    Every query takes its own block and the blocks before it whose mean key has the largest product with it, ``top`` in all.
    ``map.native()`` ``[B, H, Q, K/side]`` holds the products with the blocks up to its own (-inf after), ``map.kept`` the
    choice. Source: Lu et al., MoBA, arXiv:2502.13189, section 2.2.
    """
    _, _, n, m = _causal(q, k, v, mask)
    check_side("side", side)
    gates = plain_scores(q.detach(), block_means(k.detach(), side, mask.keys), 1.0)
    block = torch.arange(gates.shape[-1], device=q.device)
    own = positions(mask, n, q.device) // side
    seen = (block <= own).expand_as(gates)
    if mask.keys is not None:
        seen = seen & (block_means(mask.keys[:, None, :, None].double(), side) > 0).squeeze(-1)[:, :, None]
    kept = best(gates, top, seen, block == own)
    out, executed = chosen_softmax(q, k, v, in_blocks(kept, side, m), mask=mask, scale=scale)
    router = gates.masked_fill(~seen, float("-inf"))
    return out, RoutedMap(executed, router, kept, whole=sees_itself(mask, n, m))


class NativeSparseMap(SumMap):
    """The three branches of native sparse attention, gated and added.

    ``compressed`` ``[B, H, Q, K/side]`` is the map over block means (domain ``block``, also ``native()``), ``selected`` and
    ``window`` the maps of the other two, all before their gates; ``kept`` ``[B, G, Q, K/side]`` are the selected blocks.
    """

    def __init__(
        self,
        compressed: SoftmaxMap,
        pool: SparseMap,
        selected: RoutedMap,
        window: SoftmaxMap,
        gates: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        branches = (ProductMap(compressed, pool, domain="token"), selected, window)
        super().__init__(*(GatedMap(m, gate) for m, gate in zip(branches, gates, strict=True)))
        self.compressed, self.selected, self.window, self.kept = compressed, selected, window, selected.kept

    def native(self) -> SoftmaxMap:
        """The map over compressed blocks."""
        return self.compressed


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    *,
    top: int = 16,
    side: int = 64,
    window: int = 512,
    scale: float | None = None,
    offset: int = 0,
) -> tuple[Tensor, NativeSparseMap]:
    """Native sparse attention: q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]``, causal.

    ``gates`` ``[B, H, Q, 3]`` weigh the compressed, the selected and the window branch (sigmoids of a projection of the layer's
    input). The first, the own and the previous block are always selected; the others by the compressed weights, averaged over
    the query heads that share a key head; ``top`` in all. A query before the end of the first block has no compressed key.

    Compression is the mean of a block, as in the code of flash-linear-attention; the paper learns it, and gives every branch
    keys and values of its own. Source: Yuan et al., Native Sparse Attention, arXiv:2502.11089, section 3.
    """
    mask = Mask(causal=True, offset=offset)
    b, h, n, m = checked(q, k, v, mask)
    check_tensor("gates", gates, (b, h, n, 3))
    check_side("side", side)
    check_side("window", window)
    group = h // k.shape[1]
    block = torch.arange(-(-m // side), device=q.device)
    at = positions(mask, n, q.device)
    complete = (block + 1) * side - 1 <= at
    means = block_means(k, side).repeat_interleave(group, 1)
    weights, lse = masked_softmax(plain_scores(q, means, scale), complete)
    coarse = weighted(weights, block_means(v, side).to(weights.dtype))

    def incomplete(lo: int, hi: int) -> Tensor:
        return torch.zeros_like(complete[lo:hi], dtype=weights.dtype).masked_fill(~complete[lo:hi], float("-inf"))

    compressed = SoftmaxMap(q, means, lse, mask=Mask(offset=offset), scale=scale, bias=incomplete)
    compressed.domain, compressed.row_sum = "block", "<=1"
    cells = block[:, None] * side + torch.arange(side, device=q.device)
    parts = 1.0 / (m - block * side).clamp(max=side).to(weights.dtype)
    pool = SparseMap(
        cells.masked_fill(cells >= m, -1)[None, None],
        parts[:, None].expand(b, h, -1, side),
        m,
        kv_heads=k.shape[1],
        row_sum="1",
    )
    shared = weights.detach().unflatten(1, (-1, group)).mean(2)
    forced = (block == 0) | ((block <= at // side) & (block >= at // side - 1))
    kept = best(shared, top, (complete | forced).expand_as(shared), forced)
    fine, executed = chosen_softmax(q, k, v, in_blocks(kept, side, m, group), mask=mask, scale=scale)
    near, windowed = softmax_attention(q, k, v, mask=replace(mask, window=window), scale=scale)
    each = gates.unbind(-1)
    out = sum(gate[..., None].to(part.dtype) * part for gate, part in zip(each, (coarse, fine, near), strict=True))
    assert isinstance(out, Tensor)
    selected = RoutedMap(executed, shared, kept)
    return out.to(v.dtype), NativeSparseMap(compressed, pool, selected, windowed, (each[0], each[1], each[2]))


def dynamic_hierarchical_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunks: Tensor,
    *,
    budget: int,
    side: int = 64,
    local: int = 1,
    mask: Mask = Mask(causal=True),
    scale: float | None = None,
) -> tuple[Tensor, RoutedMap]:
    """Dynamic hierarchical sparse attention: q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]``.

    ``chunks`` ``[B or 1, K]`` int64 numbers the chunk of every key, not decreasing: the boundaries that a predictor found. Chunks
    and blocks of ``side`` queries are represented by the mean over tokens and heads times the root of the number of tokens; a
    token's score is that of its chunk, and a block of queries keeps the ``budget`` best keys up to its end, the last ``local``
    of them always (equal scores: the earlier key). One choice serves all heads.

    ``map.native()`` ``[B, Q/side, chunks]`` are the scores of chunks, ``map.kept`` ``[B, 1, Q/side, K]`` the kept keys. Source:
    Xiong et al., Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs.
    """
    b, _, n, m = _causal(q, k, v, mask)
    check_side("side", side)
    check_side("local", local)
    steps = chunks.diff() if isinstance(chunks, Tensor) and chunks.ndim == 2 else None
    fits = steps is not None and chunks.shape[0] in (1, b) and chunks.shape[1] == m and chunks.dtype == torch.int64
    if not fits or bool((chunks < 0).any()) or (steps is not None and bool((steps < 0).any())):
        got = f"{chunks.dtype} {list(chunks.shape)}" if isinstance(chunks, Tensor) else type(chunks).__name__
        raise WorkbenchError(f"chunks are int64 [B or 1, K] = {[b, m]}, from 0 and not decreasing along K; got {got}")
    work = working_dtype(q.dtype)
    real = torch.ones(b, m, device=q.device) if mask.keys is None else mask.keys.expand(b, m)
    keys, numbers = k.detach().to(work).mean(1) * real[..., None].to(work), chunks.expand(b, m)
    size = int(chunks.max()) + 1
    total = keys.new_zeros(b, size, keys.shape[2]).scatter_add_(1, numbers[..., None].expand_as(keys), keys)
    count = keys.new_zeros(b, size).scatter_add_(1, numbers, real.to(work))
    ends = torch.arange(0, n, side, device=q.device)
    lengths = (n - ends).clamp(max=side)
    blocks = block_means(q.detach().to(work).mean(1, keepdim=True), side)[:, 0] * lengths[:, None].to(work).sqrt()
    scores = blocks @ (total / count.clamp(min=1)[..., None].sqrt()).transpose(1, 2)
    last = (ends + lengths - 1 + mask.offset)[:, None]
    place = torch.arange(m, device=q.device)
    seen = (place <= last) & real[:, None].bool()
    token = scores.gather(2, numbers[:, None].expand(-1, len(ends), -1))
    kept = best(token, budget, seen, place > last - local, name="budget")[:, None]

    def rows(lo: int, hi: int) -> Tensor:
        return kept[:, :, torch.arange(lo, hi, device=q.device) // side]

    out, executed = chosen_softmax(q, k, v, rows, mask=mask, scale=scale)
    return out, RoutedMap(executed, scores, kept, whole=local >= side and sees_itself(mask, n, m))


def block_mean_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    top: int,
    side: int = 128,
    mask: Mask = Mask(causal=True),
    scale: float | None = None,
) -> tuple[Tensor, RoutedMap]:
    """The rule in the released code of dynamic hierarchical sparse attention: q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v
    ``[B, G, K, V]``.

    A block of queries keeps the first block of keys, its own, and the blocks between whose mean key has the largest product
    with its mean query, ``top`` in all. ``map.native()`` ``[B, H, Q/side, K/side]`` are the products, ``map.kept`` the choice;
    the executed map is block-sparse.
    """
    _, _, n, m = _causal(q, k, v, mask)
    check_side("side", side)
    if mask.blocks is not None:
        raise WorkbenchError("mask.blocks is what this operator chooses; give a mask without it")
    gates = plain_scores(block_means(q.detach(), side, mask.queries), block_means(k.detach(), side, mask.keys), 1.0)
    try:
        kept = select_blocks(gates, top=top, always=("diagonal", "first"), side=side, offset=mask.offset)
    except ValueError as error:
        raise WorkbenchError(str(error)) from None
    out, executed = softmax_attention(q, k, v, mask=replace(mask, blocks=kept, side=side), scale=scale)
    return out, RoutedMap(executed, gates, kept, whole=sees_itself(mask, n, m))


def _causal(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[int, int, int, int]:
    shape = checked(q, k, v, mask)
    if not mask.causal or mask.prefix:
        raise WorkbenchError("mask is causal here, without a prefix: blocks are chosen in the past of a query")
    return shape


# ---------------------------------------------------------------------------- records


def _tensors(seed: int, tokens: int, dtype: torch.dtype, **more: tuple[int, ...]) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 6), **more}
    return example_tensors(seed, dtype, **shapes)


def _moba_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_tensors(seed, tokens, dtype), "top": 2, "side": 3, "mask": Mask(causal=True)}


def _nsa_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    given = _tensors(seed, tokens, dtype, gates=(2, 4, tokens, 3))
    return {**given, "gates": given["gates"].sigmoid(), "top": 4, "side": 2, "window": 4}


def _dhsa_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    given = _tensors(seed, tokens, dtype, starts=(2, tokens))
    chunks = (given.pop("starts") > 0.5).long().cumsum(1)
    return {**given, "chunks": chunks, "budget": 5, "side": 3, "local": 3, "mask": Mask(causal=True)}


def _block_mean_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_tensors(seed, tokens, dtype), "top": 3, "side": 2, "mask": Mask(causal=True)}


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in ("q", "k", "v", "mask")}


def prepare_moba(given: dict[str, Any]) -> dict[str, Any]:
    """The paper's top 3, of blocks of 8 tokens: texts of a native model are short."""
    return {**_plain(given), "top": 3, "side": 8}


def prepare_nsa(given: dict[str, Any]) -> dict[str, Any]:
    """Blocks of 4 tokens, 4 of them selected, and a window of 8."""
    named = {"top": 4, "side": 4, "window": 8, "offset": given["mask"].offset}
    return {**{name: given[name] for name in ("q", "k", "v", "gates")}, **named}


def prepare_dhsa(given: dict[str, Any]) -> dict[str, Any]:
    """A chunk starts where the heads' mean of ``starts`` is positive, and every 4 tokens; 12 keys are kept, the last 4 always.

    A block is one query and the chunk that it stands in is kept whole, so that nothing later enters a choice."""
    starts = given["starts"].detach().mean(1) > 0
    starts = starts | (torch.arange(starts.shape[1], device=starts.device) % 4 == 0)
    return {**_plain(given), "chunks": starts.long().cumsum(1) - 1, "budget": 12, "side": 1, "local": 4}


def prepare_block_means(given: dict[str, Any]) -> dict[str, Any]:
    """Blocks of one token, so that nothing later enters a choice; 8 of them are read."""
    return {**_plain(given), "top": 8, "side": 1}


DHSA = "#113 Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs (2025)"

VARIANTS = (
    Variant(
        name="mixture-of-block-attention",
        paper="MoBA: Mixture of Block Attention for Long-Context LLMs (2025)",
        family="routing",
        priority="A",
        operator=moba,
        example=_moba_example,
        causal=True,
        reference="MoonshotAI/MoBA moba_naive.py",
        recipe=Recipe(prepare=prepare_moba),
    ),
    Variant(
        name="native-sparse-attention",
        paper="Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention (2025)",
        family="routing",
        priority="A",
        operator=native_sparse_attention,
        example=_nsa_example,
        causal=True,
        reference="flash-linear-attention ops/nsa naive.py",
        note="compression by means and one set of keys and values for the three branches, as in the reference",
        recipe=Recipe(learned={"gates": Learned("H3", torch.sigmoid)}, prepare=prepare_nsa),
    ),
    Variant(
        name="dynamic-hierarchical-sparse-attention",
        paper=DHSA,
        family="routing",
        priority="B",
        operator=dynamic_hierarchical_attention,
        example=_dhsa_example,
        causal=True,
        reference="xiongsiheng/DHSA legacy/utils/helper.py",
        note="chunk boundaries are an argument; a choice looks at the queries of the whole block, later ones included",
        recipe=Recipe(learned={"starts": Learned("H")}, prepare=prepare_dhsa),
    ),
    Variant(
        name="block-mean-selection",
        paper=DHSA,
        family="routing",
        priority="B",
        operator=block_mean_attention,
        example=_block_mean_example,
        causal=True,
        reference="xiongsiheng/DHSA Block-Sparse-Attention/DHSA_patch.py",
        note="the rule of the released kernel; a choice looks at the queries of the whole block, later ones included",
        recipe=Recipe(prepare=prepare_block_means),
    ),
)
