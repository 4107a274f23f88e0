"""Masks of FlexAttention and masks of the workbench, in both directions.

A ``mask_mod`` of FlexAttention is a function of four scalars (b, h, i, j) with query i counted from 0; a ``Mask`` describes the
same pairs, with query i at position i + offset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask, in_window
from workbench.mods import Mod

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

DENSE_LIMIT = 2**26
"""``mask_from_mod`` keeps a mask as numbers up to this many pairs."""
CHUNK = 2**22


def to_mask_mod(mask: Mask) -> Mod:
    """The mask as a ``mask_mod`` for ``create_block_mask``. Queries count from 0: the mask's offset is inside. ``from_flex`` and
    ``mask_from_mod`` know such a mod by its mask."""

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = q + mask.offset
        shown = (row == row) & (k == k)
        if mask.window is not None:
            near = in_window(row, k, mask.window)
            shown = near if mask.causal else near | in_window(k, row, mask.window)
        elif mask.causal:
            shown = k <= row
        if mask.prefix:
            shown = shown | (k < mask.prefix)
        if mask.documents is not None:
            shown = shown & (_entry(mask.documents, b, row) == _entry(mask.documents, b, k))
        if mask.keys is not None:
            shown = shown & _entry(mask.keys, b, k)
        if mask.queries is not None:
            shown = shown & _entry(mask.queries, b, q)
        if mask.dense is not None:
            shown = shown & _pair(mask.dense, b, h, q, k)
        if mask.blocks is not None and mask.side is not None:
            shown = shown & _pair(mask.blocks, b, h, q // mask.side, k // mask.side)
        return shown

    mod.mask = mask  # type: ignore[attr-defined]
    return mod


def mask_from_mod(
    mod: Mod,
    queries: int,
    keys: int,
    *,
    batch: int = 1,
    heads: int = 1,
    offset: int = 0,
    side: int = 64,
    device: torch.device | str = "cpu",
) -> Mask:
    """The ``Mask`` that shows what a ``mask_mod`` shows to ``queries`` x ``keys``, as a description where one fits: everything,
    causal, a window, a prefix, blocks of ``side`` tokens; otherwise as numbers (up to 2^26 pairs).

    The mod is evaluated on every pair, some rows at a time, so the answer is exact. ``batch`` and ``heads`` are the numbers of
    examples and heads that it tells apart; ``offset`` is the position of query 0, with the mod's queries counted from 0.
    ``device`` is where tensors are that it reads.
    """
    if min(queries, keys, batch, heads, side) < 1:
        got = f"{queries} x {keys} pairs, batch={batch}, heads={heads}, side={side}"
        raise WorkbenchError(f"a mask has at least one query, key, example and head, and a side; got {got}")
    known = getattr(mod, "mask", None)
    if isinstance(known, Mask) and known.offset == offset:
        return known
    at = torch.device(device)
    step = max(1, CHUNK // (batch * heads * keys) // side) * side

    def shown(lo: int, hi: int) -> Tensor:
        return over_tile(mod, (), *indices(batch, heads, (lo, hi), (0, keys), at)).bool()

    def chunks() -> Iterator[tuple[int, Tensor]]:
        for lo in range(0, queries, step):
            yield lo, shown(lo, min(queries, lo + step))

    described = _candidates(shown(0, 1), shown(queries - 1, queries), queries, offset)
    for lo, part in chunks():
        described = [mask for mask in described if _same(mask, part, lo)]
        if not described:
            break
    if described:
        return described[0]
    blocks: list[Tensor] | None = []
    whole: list[Tensor] | None = [] if batch * heads * queries * keys <= DENSE_LIMIT else None
    for _, part in chunks():
        tiles = None if blocks is None else _tiles(part, side)
        blocks = [*blocks, tiles] if blocks is not None and tiles is not None else None
        if whole is not None:
            whole.append(part)
        elif blocks is None:
            raise Refused(
                f"this mod is no causal, windowed, prefix or block mask of side {side}, and its {queries} x {keys} pairs are too "
                "many to keep as numbers: give it to from_flex, which evaluates it per tile"
            )
    if blocks is not None:
        return Mask(blocks=torch.cat(blocks, 2), side=side, offset=offset)
    assert whole is not None
    return Mask(dense=torch.cat(whole, 2), offset=offset)


def mask_of(block_mask: BlockMask | None, offset: int) -> tuple[Mask, Mod | None]:
    """The mask of a ``BlockMask`` and the mod that applies inside of its blocks, None where nothing is left to it."""
    from torch.nn.attention.flex_attention import noop_mask

    if block_mask is None:
        return Mask(offset=offset), None
    known = getattr(block_mask.mask_mod, "mask", None)
    if isinstance(known, Mask):
        return known, None
    partial = _blocks(block_mask.kv_num_blocks, block_mask.kv_indices)
    full = torch.zeros_like(partial)
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    rows, columns = block_mask.BLOCK_SIZE
    side = math.gcd(rows, columns)
    present = (partial | full).repeat_interleave(rows // side, 2).repeat_interleave(columns // side, 3)
    queries, keys = block_mask.seq_lengths
    present = present[:, :, : -(-queries // side), : -(-keys // side)]
    hide = None if block_mask.mask_mod is noop_mask or not bool(partial.any()) else block_mask.mask_mod
    if bool(present.all()):
        return Mask(offset=offset), hide
    return Mask(blocks=present, side=side, offset=offset), hide


def indices(
    batch: int,
    heads: int,
    rows: tuple[int, int],
    keys: tuple[int, int],
    device: torch.device,
    chosen: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Example, head, query and key numbers of a tile, one axis each; ``chosen`` are the heads' own numbers."""
    head = torch.arange(heads, device=device) if chosen is None else torch.tensor(list(chosen), device=device)
    return (
        torch.arange(batch, device=device),
        head,
        torch.arange(*rows, device=device),
        torch.arange(*keys, device=device),
    )


def over_tile(mod: Callable[..., Tensor], before: tuple[Tensor, ...], *at: Tensor) -> Tensor:
    """``mod`` of every (b, h, i, j) of a tile, ``[B, H, rows, columns]``; ``before`` are tensors of that shape that come first.

    A mod is a function of scalars, so it is mapped with ``vmap``, as FlexAttention does. Mods that look at the numbers they
    get, as ``mods.document`` does, cannot be mapped and get index tensors that broadcast instead.
    """
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    mapped = mod
    for axis in (3, 2, 1, 0):
        own = [0 if place == axis else None for place in range(4)]
        mapped = torch.vmap(mapped, in_dims=(*(0,) * len(before), *own))
    try:
        with TransformGetItemToIndex():
            return mapped(*before, *at)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        spread = [part.view([-1 if axis == place else 1 for axis in range(4)]) for place, part in enumerate(at)]
        return mod(*before, *spread).expand(tuple(len(part) for part in at))


def _entry(table: Tensor, b: Tensor, at: Tensor) -> Tensor:
    return table[0][at] if table.shape[0] == 1 else table[b, at]


def _pair(table: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    if table.shape[0] == 1 and table.shape[1] == 1:
        return table[0, 0][q, k]
    if table.shape[0] == 1:
        return table[0][h, q, k]
    return table[:, 0][b, q, k] if table.shape[1] == 1 else table[b, h, q, k]


def _blocks(counts: Tensor, order: Tensor) -> Tensor:
    """Which blocks a BlockMask lists, bool ``[B, H, Q/side, K/side]``: the first ``counts`` of every row of ``order``."""
    listed = torch.arange(order.shape[-1], device=order.device) < counts[..., None]
    found = torch.zeros(order.shape, dtype=torch.int32, device=order.device)
    return found.scatter_add_(-1, order.long(), listed.int()) > 0


def _candidates(first: Tensor, last: Tensor, queries: int, offset: int) -> list[Mask]:
    """Descriptions that the first and the last row do not rule out, the simplest first."""
    top, bottom = first[0, 0, 0], last[0, 0, 0]
    end = offset + queries - 1
    own = bottom[: end + 1].flip(0)  # from the query's own key backwards
    near = int(own.cummin(0).values.sum()) if len(own) and end < len(bottom) else 0
    start = int(top.cummin(0).values.sum())
    found = [Mask(offset=offset), Mask(causal=True, offset=offset)]
    if near:
        found += [Mask(causal=True, window=near, offset=offset), Mask(window=near, offset=offset)]
    if start:
        found.append(Mask(causal=True, prefix=start, offset=offset))
        tail = int(bottom[:start].cummin(0).values.sum())
        if near and tail:
            found.append(Mask(causal=True, window=near, prefix=tail, offset=offset))
    return found


def _same(mask: Mask, shown: Tensor, lo: int) -> bool:
    told = mask.tile(slice(lo, lo + shown.shape[2]), slice(0, shown.shape[3]), shown.device)
    return bool(shown.all()) if told is None else torch.equal(told.expand_as(shown), shown)


def _tiles(shown: Tensor, side: int) -> Tensor | None:
    """The rows as blocks, or None where a block is shown in part."""
    b, h, rows, columns = shown.shape
    down, across = -(-rows // side), -(-columns // side)
    pad = (0, across * side - columns, 0, down * side - rows)
    spread = torch.nn.functional.pad(shown, pad).view(b, h, down, side, across, side)
    cells = torch.nn.functional.pad(torch.ones_like(shown), pad).view(b, h, down, side, across, side).sum((3, 5))
    count = spread.sum((3, 5))
    return None if bool(((count > 0) & (count < cells)).any()) else count > 0
