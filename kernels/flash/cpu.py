"""``flash_attention`` in row chunks of plain torch. Per chunk, in base 2 and in one reused buffer:

x = s log2(e) - max,   e = 2^x,   l = sum e,   o = (e v) / l;   p = e / l is never formed: maxima are those of x
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.pairs.chunks import LN2, Buffers, base_two, blank, chunks, key_length, product, unseen, whole
from workbench.kernels.scores import HIDDEN, Scores


def blocked_flash(
    scores: Scores, v: Tensor, block: int | None, sums: bool, peaks: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Output, lse, block sums and block maxima (None where not asked for)."""
    b, h, q, k = scores.shape
    like = scores.q.new_empty(0, dtype=scores.dtype)
    hidden_keys, hidden_rows = unseen(scores)
    queries = blank(scores.q, hidden_rows)
    keys, values = (whole(blank(part, hidden_keys).to(like), key_length(scores)) for part in (scores.k, v))
    output = v.new_zeros(b, h, q, v.shape[3])
    lse = like.new_full((b, h, q), float("-inf"))
    if scores.sink is not None:
        lse.copy_(scores.sink.to(like)[None, :, None].expand_as(lse))
    grid = None if block is None else (b, h, -(-q // block), -(-k // block))
    mass = like.new_zeros(grid) if grid and sums else None
    peak = like.new_zeros(grid) if grid and peaks else None
    spare = Buffers(like)
    for chunk in chunks(scores, block):
        x, _ = base_two(chunk, queries, keys, spare)
        tops = chunk.tops(x, block) if peak is not None and block is not None else None
        top, sink = x.amax(-1) if tops is None else tops.amax(-1), chunk.sink()
        base = top if sink is None else torch.maximum(top, sink)
        base = base.masked_fill(base <= HIDDEN / 2, 0.0)
        e = torch.exp2(x.sub_(base[..., None]), out=x)
        total = e.sum(-1)
        denominator = total if sink is None else total + torch.exp2(sink - base)
        chunk.put_rows(lse, (base + denominator.log2()).mul_(LN2))
        weight = denominator.reciprocal().masked_fill_(denominator == 0, 0.0)
        chunk.put_rows(output, product(e, chunk.take_keys(values)).mul_(weight[..., None]))
        if mass is not None:
            chunk.add_sums(e, weight, mass, block, None)
        if peak is not None and block is not None and tops is not None:
            chunk.raise_peak(peak, torch.exp2(tops - base[..., None]).mul_(weight[..., None]), block)
    return output, lse, mass, peak
