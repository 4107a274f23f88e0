"""Softmax attention by tiles: FlashAttention, the merging of partial results, and ring attention.

A part t of the keys gives each row an output o^t and the logarithm of its denominator, lse^t. The whole row follows from them:

    lse = log(sum_t exp(lse^t)),   o = sum_t exp(lse^t - lse) o^t,   M_ij = exp(s_ij - lse_i)

so neither a kernel nor a ring of devices ever needs more than (o, lse), and the map of any tile follows from the total lse.
Sources: Dao et al., FlashAttention (2022); Li et al., Sequence Parallelism (2021), whose ring passes keys and values around;
Liu et al., Ring Attention (2023), which merges as above.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels import flash_attention as kernel
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Bias, Relative
from workbench.mixers.local import check_qkv, chosen
from workbench.mixers.scored import checked
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.union import UnionMap


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask = Mask(causal=True),
    scale: float | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
    bias: Bias | None = None,
) -> tuple[Tensor, SoftmaxMap]:
    """FlashAttention: softmax attention in tiles over the keys, without Q x K memory; the map is made of q, k and the lse.

    q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]`` to ``[B, H, Q, V]``; ``sink`` ``[H]``; ``bias`` as in
    ``kernels/scores.py``. A bias that asks for a gradient is computed densely.
    """
    out, lse = partial_attention(q, k, v, mask=mask, scale=scale, softcap=softcap, sink=sink, bias=bias)
    return out, SoftmaxMap(q, k, lse, mask=mask, scale=scale, softcap=softcap, sink=sink, bias=bias)


def partial_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask, **options: Any) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, Q, V]`` and lse ``[B, H, Q]`` (-inf where a row sees nothing) of the pairs that ``mask`` allows."""
    check_qkv(q, k, v)
    bias = options.get("bias")
    table = bias.table if isinstance(bias, Relative) else bias
    learned = isinstance(table, Tensor) and table.requires_grad and torch.is_grad_enabled()
    try:
        found = kernel.flash_attention(q, k, v, mask=mask, impl="reference" if learned else None, **options)
    except WorkbenchError:
        raise
    except ValueError as error:
        raise WorkbenchError(str(error)) from error
    return found.output, found.lse


def merge_partial(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Output and lse of the union of disjoint parts, from theirs: ``[B, H, Q, V]`` and ``[B, H, Q]`` each.

    A row that no part sees is zero, with lse -inf."""
    each = torch.stack(list(lses))
    top = each.detach().amax(0)
    top = top.masked_fill(top.isneginf(), 0.0)
    weights = (each - top).exp()
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    shares = (weights / total)[..., None]
    out = sum(share * part.to(share.dtype) for share, part in zip(shares, outputs, strict=True))
    assert isinstance(out, Tensor)
    return out.to(outputs[0].dtype), (total.log() + top).masked_fill(empty, float("-inf"))


def union_attention(
    tiles: Sequence[tuple[Tensor, Tensor, Mask]], v: Tensor, *, scale: float | None = None
) -> tuple[Tensor, UnionMap]:
    """Softmax attention over the union of tiles (q, k, mask) that allow no pair twice, with the memory of each of them.

    Shapes as in ``flash_attention``; tiles may share their queries and keys or have some of their own."""
    parts = [partial_attention(q, k, v, mask=mask, scale=scale) for q, k, mask in tiles]
    out, lse = merge_partial([out for out, _ in parts], [lse for _, lse in parts])
    lse = lse.detach()
    return out, UnionMap(*(SoftmaxMap(q, k, lse, mask=mask, scale=scale) for q, k, mask in tiles))


def with_keys(mask: Mask, keys: Tensor) -> Mask:
    """The mask with only the keys that ``keys`` ``[B or 1, K]`` allows as well."""
    return replace(mask, keys=keys if mask.keys is None else keys & mask.keys.to(keys.device))


def with_rows(mask: Mask, rows: Tensor, keys: int, side: int = 64) -> Mask:
    """The mask with only the rows that ``rows`` ``[B or 1, Q]`` allows as well.

    Blocks of rows without any are hidden as blocks, which kernels skip."""
    if mask.blocks is not None:
        raise WorkbenchError("rows of a mask with blocks are not chosen here; give a mask without blocks")
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % side)).unflatten(1, (-1, side)).any(2)
    blocks = padded[:, None, :, None].expand(-1, -1, -1, -(-keys // side))
    rows = rows if mask.queries is None else rows & mask.queries.to(rows.device)
    return replace(mask, queries=rows, blocks=blocks, side=side)


class RingMap(UnionMap):
    """The map of ring attention: a tile per rank that holds keys. ``native()`` is the mass of every row on each rank."""

    def native(self) -> Tensor:
        """``[B, H, Q, ranks]``: the weights by which partial outputs are merged."""
        return self.masses()


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, ranks: int, mask: Mask = Mask(causal=True), scale: float | None = None
) -> tuple[Tensor, RingMap]:
    """Ring attention over ``ranks`` devices: keys and values are split into contiguous shares, which travel around.

    At every step each rank attends from its queries to the share that is passing and merges the partial (output, lse) into
    what it has. Run here in one process, one share after the other, for all queries at once; ranks beyond the keys hold none.
    Shapes as in ``flash_attention``; the map is that of the unsplit attention, with one tile per share.
    """
    checked(q, k, v, mask)
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise WorkbenchError(f"ranks is a number of devices, at least 1; got {ranks!r}")
    positions = torch.arange(k.shape[2], device=q.device)
    masks = [with_keys(mask, torch.isin(positions, share)[None]) for share in positions.tensor_split(ranks)]
    out, lse = partial_attention(q, k, v, mask=masks[0], scale=scale)
    for part in masks[1:]:
        passing, share_lse = partial_attention(q, k, v, mask=part, scale=scale)
        out, lse = merge_partial([out, passing], [lse, share_lse])
    return out, RingMap(*(SoftmaxMap(q, k, lse.detach(), mask=part, scale=scale) for part in masks))


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 8)}
    return {**example_tensors(seed, dtype, **shapes), "mask": Mask(causal=True)}


def _ring_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_example(seed, tokens, dtype), "ranks": 3}


VARIANTS = (
    Variant(
        name="flash-attention",
        paper="#88 FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness (2022)",
        family="softmax",
        priority="A",
        operator=flash_attention,
        example=_example,
        causal=True,
        reference="flash-attn flash_attn_func(return_attn_probs=True): output and lse",
        recipe=Recipe(),
    ),
    Variant(
        name="ring-attention",
        paper="#150 Sequence Parallelism: Long Sequence Training from System Perspective (2021)",
        family="softmax",
        priority="A",
        operator=ring_attention,
        example=_ring_example,
        causal=True,
        reference="definition: softmax over the union of the shares",
        note="One process stands for the ring; also the context parallelism of #61. The ring of #150 sends scores and values "
        "around; the merging of partial outputs by their lse is Ring Attention's (2023) and gives the same map.",
        recipe=Recipe(prepare=chosen("q", "k", "v", "mask", ranks=2)),
    ),
)
