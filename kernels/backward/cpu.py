"""``softmax_backward`` in row chunks of plain torch; the chunks are those of the forward (``kernels/flash/chunks.py``).

Each chunk holds whole rows, so that D is summed from the very p and G that it is subtracted from: in place, G becomes p G, its
row sums are D, and p G - p D is ds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.pairs.chunks import Buffers, base_two, blank, chunks, key_length, unseen, whole
from workbench.kernels.pairs.span import LOG2E
from workbench.kernels.scores import HIDDEN, Scores


def blocked_backward(
    scores: Scores,
    lse: Tensor,
    out: Tensor | None,
    d_out: Tensor | None,
    v: Tensor | None,
    d_lse: Tensor | None,
    d_blocks: Tensor | None,
    block: int | None,
    d_received: Tensor | None,
    gate: Tensor | None,
    through_lse: bool,
) -> list[Tensor]:
    """dq, dk, dv (empty without v) and D. ``out`` is not needed here: D is a sum over whole rows."""
    assert scores.scale is not None
    k = scores.shape[3]
    like = scores.q.new_empty(0, dtype=scores.dtype)
    hidden_keys, hidden_rows = unseen(scores)
    length = key_length(scores)
    queries = blank(scores.q, hidden_rows)
    keys = whole(blank(scores.k, hidden_keys).to(like), length)
    values = None if v is None else whole(blank(v, hidden_keys).to(like), length)
    upstream = None if d_out is None else blank(d_out, hidden_rows)
    dq = torch.zeros_like(scores.q, memory_format=torch.contiguous_format)
    dk = torch.zeros_like(keys)
    dv = None if values is None else torch.zeros_like(values)
    d_row = like.new_zeros(lse.shape) if d_lse is None else -d_lse.to(like)
    base = lse.to(like) * LOG2E
    base = base.masked_fill(base.isinf(), -HIDDEN)
    spare = Buffers(like)
    for chunk in chunks(scores, None):
        x, bent = base_two(chunk, queries, keys, spare)
        p = torch.exp2(x.sub_(chunk.take_rows(base)[..., None]), out=x)
        g = spare.take(1, chunk.flat)
        if values is None or upstream is None or dv is None:
            g.zero_()
        else:
            received = chunk.take_rows(upstream).to(like)
            torch.bmm(received, chunk.take_keys(values).transpose(1, 2), out=g)
            chunk.add_keys(dv, torch.bmm(p.transpose(1, 2), received))
        extra = None if d_received is None else chunk.along_keys(d_received).to(like)
        if d_blocks is not None and block is not None:
            spread = chunk.spread(d_blocks.to(like), block)
            extra = spread if extra is None else spread.add_(extra)
        if extra is not None:
            if gate is not None:
                extra = extra * chunk.take_rows(gate).to(like).view(*chunk.full[:3], 1)
            g.view(chunk.full).add_(extra)
        g.mul_(p)
        d = g.sum(-1).add_(chunk.take_rows(d_row))
        chunk.put_rows(d_row, d)
        if through_lse:
            g.addcmul_(p, d[..., None], value=-1)
        if bent is not None:
            g.mul_(bent.square_().neg_().add_(1))
        g.mul_(scores.scale)
        chunk.put_rows(dq, torch.bmm(g, chunk.take_keys(keys)))
        chunk.add_keys(dk, torch.bmm(g.transpose(1, 2), chunk.take_rows(queries).to(like)))
    dk = dk[:, :, :k].to(scores.k.dtype).contiguous()
    dv = like.new_empty(0).to(scores.q.dtype) if dv is None or v is None else dv[:, :, :k].to(v.dtype).contiguous()
    return [dq, dk, dv, d_row]
