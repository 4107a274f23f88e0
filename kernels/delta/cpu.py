"""``gated_delta_rule`` by chunks in plain torch; ``kernels/delta/reference.py`` derives the formulas and names the symbols.

What lies inside a chunk (Gamma, T, P) is computed for all chunks at once, in memory linear in N; only the states at the chunk
borders, or the rows of the map, are carried from chunk to chunk in a loop. Tokens that pad the last chunk, or the last chunk of
a block, have zero queries, keys, values, beta and log decay: they neither read nor write nor decay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kernels.delta.reference import heads, pair_decay
from workbench.kernels.scores import working_dtype

CHUNK = 64
ROWS = 512
"""Rows of the map that walk together."""


@dataclass(frozen=True)
class Layout:
    """Tokens in chunks that lie inside one block or hold whole blocks. A chunk has ``sub`` cells of ``side`` tokens, a block
    ``per`` cells (1 unless it is longer than a chunk); the last cell of a block may be padded."""

    n: int
    block: int = CHUNK

    @property
    def per(self) -> int:
        return -(-self.block // CHUNK)

    @property
    def side(self) -> int:
        return -(-self.block // self.per)

    @property
    def sub(self) -> int:
        return max(1, CHUNK // self.block)

    @property
    def blocks(self) -> int:
        return -(-self.n // self.block)

    @property
    def chunks(self) -> int:
        return -(-self.blocks * self.per // self.sub)

    def split(self, x: Tensor, axis: int) -> Tensor:
        """The token axis (not negative) as ``[chunks, tokens of a chunk]``, padded with zeros."""
        if self.per > 1 and self.block % self.side:
            x = _pad(x, axis, self.blocks * self.block).unflatten(axis, (self.blocks, self.block))
            x = _pad(x, axis + 1, self.per * self.side).flatten(axis, axis + 1)
        return _pad(x, axis, self.chunks * self.sub * self.side).unflatten(axis, (self.chunks, self.sub * self.side))

    def pool(self, cells: Tensor, axis: int, reduce: str) -> Tensor:
        """Cells to blocks along a negative axis."""
        cells = cells.narrow(axis, 0, self.blocks * self.per).unflatten(axis, (self.blocks, self.per))
        return cells.amax(axis) if reduce == "max" else cells.sum(axis)


def _pad(x: Tensor, axis: int, length: int) -> Tensor:
    missing = length - x.shape[axis]
    if not missing:
        return x
    shape = [*x.shape[:axis], missing, *x.shape[axis + 1 :]]
    return torch.cat([x, x.new_zeros(shape)], dim=axis)


@dataclass(frozen=True, eq=False)
class Chunks:
    """What the chunks hold, in the working type: q and k ``[B, H, chunks, C, E]``, beta, rise and fall ``[B, H, chunks, C]``,
    gamma, gram = stril(Gamma * K K^T), inverse = (I + diag(beta) gram)^{-1} and reads = P ``[B, H, chunks, C, C]``."""

    q: Tensor
    k: Tensor
    beta: Tensor
    rise: Tensor
    fall: Tensor
    gamma: Tensor
    gram: Tensor
    inverse: Tensor
    reads: Tensor

    @property
    def last(self) -> Tensor:
        """rise_C ``[B, H, chunks, 1, 1]``."""
        return self.rise[..., -1:, None]


def prepare(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, layout: Layout) -> Chunks:
    h = beta.shape[1]
    dtype = working_dtype(q.dtype)
    queries, keys = layout.split(heads(q, h), 2), layout.split(heads(k, h), 2)
    strength = layout.split(beta.to(dtype), 2)
    log = torch.zeros_like(strength) if log_decay is None else layout.split(log_decay.to(dtype), 2)
    gamma = pair_decay(log)
    gram = (keys @ keys.transpose(-1, -2)).mul_(gamma).tril_(-1)
    reads = (queries @ keys.transpose(-1, -2)).mul_(gamma)
    one = torch.eye(gram.shape[-1], dtype=dtype, device=q.device)
    system = strength[..., None] * gram
    inverse = torch.linalg.solve_triangular(system, one.expand_as(system), upper=False, unitriangular=True)
    rise, fall = log.cumsum(-1).exp(), gamma[..., -1, :].clone()
    return Chunks(queries, keys, strength, rise, fall, gamma, gram, inverse, reads)


def _states(c: Chunks, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """States before each chunk ``[B, H, chunks, E, V]``, the last state, and U ``[B, H, chunks, C, V]``."""
    b, h, chunks = c.q.shape[:3]
    s = c.q.new_zeros(b, h, c.q.shape[4], v.shape[4]) if state is None else state.to(c.q)
    write = c.inverse * c.beta[..., None, :]
    u, erase = write @ v, write @ (c.rise[..., None] * c.k)
    keys = (c.fall[..., None] * c.k).transpose(-1, -2)
    before = c.q.new_empty(b, h, chunks, *s.shape[2:])
    for n in range(chunks):
        before[:, :, n] = s
        u[:, :, n] -= erase[:, :, n] @ s
        s = c.last[:, :, n] * s + keys[:, :, n] @ u[:, :, n]
    return before, s, u


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    layout = Layout(q.shape[2])
    c = prepare(q, k, beta, log_decay, layout)
    before, last, u = _states(c, layout.split(heads(v, beta.shape[1]), 2), state)
    out = (c.rise[..., None] * c.q) @ before
    out += c.reads @ u
    return out.mul_(scale).flatten(2, 3)[:, :, : q.shape[2]].to(v.dtype), last


def backward(
    d_output: Tensor | None,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    scale: float,
    state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, beta, log_decay and the initial state, in the working type; runs on any device."""
    layout = Layout(q.shape[2])
    c = prepare(q, k, beta, log_decay, layout)
    values = layout.split(heads(v, beta.shape[1]), 2)
    before, last, u = _states(c, values, state)
    do = torch.zeros_like(u) if d_output is None else layout.split(d_output.to(u), 2) * scale
    ds = torch.zeros_like(last) if d_state is None else d_state.to(u)

    rising, falling = c.rise[..., None] * c.k, c.fall[..., None] * c.k
    z = c.reads.transpose(-1, -2) @ do
    down = (c.rise[..., None] * c.q).transpose(-1, -2) @ do
    after = torch.empty_like(before)
    dv = torch.empty_like(u)
    for n in reversed(range(before.shape[2])):
        after[:, :, n] = ds
        z[:, :, n] = c.inverse[:, :, n].transpose(-1, -2) @ (z[:, :, n] + falling[:, :, n] @ ds)
        dv[:, :, n] = c.beta[:, :, n, :, None] * z[:, :, n]
        ds = c.last[:, :, n] * ds + down[:, :, n] - rising[:, :, n].transpose(-1, -2) @ dv[:, :, n]

    error = values - rising @ before - c.gram @ u
    dbeta = (z * error).sum(-1)
    reads = (do @ u.transpose(-1, -2)).tril_()
    gram = (dv @ u.transpose(-1, -2)).tril_(-1).neg_()
    pairs = reads * c.reads + gram * c.gram
    reads, gram = reads.mul_(c.gamma), gram.mul_(c.gamma)
    read_q = c.rise[..., None] * (do @ before.transpose(-1, -2))
    read_k = c.rise[..., None] * (dv @ before.transpose(-1, -2))
    wrote_k = c.fall[..., None] * (u @ after.transpose(-1, -2))
    dq = read_q + reads @ c.k
    dk = (gram + gram.transpose(-1, -2)) @ c.k + reads.transpose(-1, -2) @ c.q + wrote_k - read_k

    dlog = (pairs.flip(-2).cumsum(-2).flip(-2)).tril_(-1).sum(-1)
    dlog += (c.q * read_q - c.k * read_k).sum(-1).flip(-1).cumsum(-1).flip(-1)
    wrote = (c.k * wrote_k).sum(-1)
    dlog[..., 1:] += wrote.cumsum(-1)[..., :-1]
    dlog += c.last[..., 0] * (before * after).sum((-2, -1))[..., None]

    def tokens(x: Tensor, shared: int | None = None) -> Tensor:
        x = x.flatten(2, 3)[:, :, : q.shape[2]]
        return x if shared is None else x.unflatten(1, (shared, -1)).sum(2)

    grads = (tokens(dq, q.shape[1]), tokens(dk, k.shape[1]), tokens(dv, v.shape[1]))
    return *grads, tokens(dbeta), tokens(dlog), ds


Entry = Callable[[int], tuple[int, int, Callable[[Tensor], Tensor]]]
"""Which rows enter the walk at a chunk: their slots ``[lo, hi)`` and what turns the rows of the chunk into them."""


def _walk(c: Chunks, last: int, slots: int, scale: float, enter: Entry) -> Iterator[tuple[int, int, Tensor]]:
    """Rows of the map, or sums of rows, from chunk ``last - 1`` down to the first.

    Yields the chunk, the first slot that has entered, and the coefficients ``[B, H, slots - first, C]`` of its values.
    """
    b, h, _, _, e = c.q.shape
    r = c.q.new_zeros(b, h, slots, e)
    write = c.inverse * c.beta[..., None, :]
    for n in reversed(range(last)):
        k, fall, rise = c.k[:, :, n], c.fall[:, :, n, None], c.rise[:, :, n, None]
        first, stop, pick = enter(n)
        p = (r[:, :, first:] @ k.transpose(-1, -2)).mul_(fall)
        if stop > first:
            p[:, :, : stop - first] += scale * pick(c.reads[:, :, n])
        m = p @ write[:, :, n]
        r[:, :, first:] *= c.last[:, :, n]
        r[:, :, first:] -= (m * rise) @ k
        if stop > first:
            r[:, :, first:stop] += scale * pick(c.rise[:, :, n, :, None] * c.q[:, :, n])
        yield n, first, m


def rows(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, lo: int, hi: int) -> Tensor:
    layout = Layout(hi)
    log = None if log_decay is None else log_decay[:, :, :hi]
    c = prepare(q[:, :, :hi], k[:, :, :hi], beta[:, :, :hi], log, layout)
    b, h, n = beta.shape
    out = c.q.new_zeros(b, h, hi - lo, n)

    def enter(chunk: int) -> tuple[int, int, Callable[[Tensor], Tensor]]:
        start = chunk * CHUNK
        first, stop = max(lo, start), min(hi, start + CHUNK)
        return max(first - lo, 0), max(stop - lo, 0), lambda x: x[:, :, first - start : stop - start]

    for chunk, first, m in _walk(c, layout.chunks, hi - lo, scale, enter):
        start = chunk * CHUNK
        stop = min(hi, start + CHUNK)
        out[:, :, first:, start:stop] = m[..., : stop - start]
    return out


def block_maps(
    q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, block: int, reduce: tuple[str, ...]
) -> dict[str, Tensor]:
    layout = Layout(q.shape[2], block)
    c = prepare(q, k, beta, log_decay, layout)
    found = _every_row(c, layout, scale, reduce) if {"abs", "max"} & set(reduce) else {}
    if not found and reduce:
        found["sum"] = _summed_rows(c, layout, scale)
    if "mean" in reduce:
        lengths = torch.full((layout.blocks,), block).to(found["sum"])
        lengths[-1] = layout.n - (layout.blocks - 1) * block
        found["mean"] = found["sum"] / (lengths[:, None] * lengths)
    return {name: found[name] for name in reduce}


def _summed_rows(c: Chunks, layout: Layout, scale: float) -> Tensor:
    """Block sums ``[B, H, blocks, blocks]`` by one transported row per row block."""
    b, h = c.q.shape[:2]
    slots = -(-layout.chunks * layout.sub // layout.per)
    out = c.q.new_zeros(b, h, slots, layout.chunks * layout.sub)
    split = (layout.sub, layout.side)

    def enter(n: int) -> tuple[int, int, Callable[[Tensor], Tensor]]:
        first = n // layout.per * layout.sub
        return first, first + layout.sub, lambda x: x.unflatten(-2, split).sum(-2)

    for n, first, m in _walk(c, layout.chunks, slots, scale, enter):
        out[:, :, first:, n * layout.sub : (n + 1) * layout.sub] = m.unflatten(-1, split).sum(-1)
    return layout.pool(out[:, :, : layout.blocks], -1, "sum").contiguous()


def _every_row(c: Chunks, layout: Layout, scale: float, reduce: tuple[str, ...]) -> dict[str, Tensor]:
    """Block reductions by walking every row, ``ROWS`` at a time."""
    b, h = c.q.shape[:2]
    cells, chunk = layout.chunks * layout.sub, layout.sub * layout.side
    names = ["sum"] * bool({"sum", "mean"} & set(reduce)) + [name for name in ("abs", "max") if name in reduce]
    found = {name: c.q.new_zeros(b, h, cells, cells) for name in names}
    real = layout.split(torch.ones(layout.n, dtype=torch.bool, device=c.q.device), 0)
    split = (layout.sub, layout.side)
    step = max(1, ROWS // chunk)
    for top in range(0, layout.chunks, step):
        stop = min(layout.chunks, top + step)

        def enter(n: int, top: int = top) -> tuple[int, int, Callable[[Tensor], Tensor]]:
            first = max(0, (n - top) * chunk)
            return first, first + chunk * (n >= top), lambda x: x

        for n, _, m in _walk(c, stop, (stop - top) * chunk, scale, enter):
            tile = m.unflatten(-1, split).unflatten(-3, (-1, layout.side))
            into = (
                ...,
                slice(max(n, top) * layout.sub, stop * layout.sub),
                slice(n * layout.sub, (n + 1) * layout.sub),
            )
            if "sum" in found:
                found["sum"][into] = tile.sum((-3, -1))
            if "abs" in found:
                found["abs"][into] = tile.abs().sum((-3, -1))
            if "max" in found:
                exists = real[max(n, top) : stop].flatten()[:, None] & real[n]
                hidden = ~exists.unflatten(-1, split).unflatten(-3, (-1, layout.side))
                found["max"][into] = tile.masked_fill(hidden, float("-inf")).amax((-3, -1))
    if "max" in found:  # a cell above the diagonal is 0 if it exists
        empty = ~real.unflatten(-1, split).any(-1).flatten()
        found["max"].masked_fill_(empty[:, None] | empty, float("-inf"))
    return {name: layout.pool(layout.pool(x, -1, name), -2, name).contiguous() for name, x in found.items()}
