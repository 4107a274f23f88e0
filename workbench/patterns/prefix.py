"""Softmax over the past with scores of the keys alone, which may fade: one number per token instead of pairs.

    M_ij = exp(s_j - (i - 1 - j) w - lse_i)  for j < i,      M_ii = exp(s_i + u - lse_i),      lse_i so that rows sum to 1

w >= 0 is the rate at which the past fades, u the bonus of the own token; without both every query weighs its past by exp(s_j)
(Aaren), with both this is RWKV-4. The past of a token is kept as the logarithm of its mass and the mean of its values, so that
nothing overflows whatever the scores. Plain differentiable torch, linear in the number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.attention_map import METADATA, AttentionMap, block_cells
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.maps import head_index, state_metadata
from workbench.mods import Mod

CHUNK = 64
"""Tokens that the recurrence takes at a time."""


def prefix_softmax(
    scores: Tensor, v: Tensor, decay: Tensor | None = None, bonus: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``M v`` ``[B, H, N, E]`` and ``lse`` ``[B, H, N]`` of scores s ``[B, H, N]``, v ``[B, H, N, E]``, w and u ``[H]``."""
    b, h, n = scores.shape
    w, u = (scores.new_zeros(h) if x is None else x.to(scores) for x in (decay, bonus))
    w, u = w[:, None, None], u[:, None, None]
    mass, mean = scores.new_full((b, h, 1), -torch.inf), v.new_zeros(b, h, 1, v.shape[3])
    parts, sums = [], []
    for lo in range(0, n, CHUNK):
        here, values = scores[:, :, lo : lo + CHUNK], torch.cat([mean, v[:, :, lo : lo + CHUNK]], 2)
        size = here.shape[2]
        logits = torch.cat([mass[..., None] - w * _places(here)[:, None], _pairs(here, w, u)], -1)
        lse = logits.logsumexp(-1, keepdim=True)
        parts.append((logits - lse).exp() @ values)
        sums.append(lse[..., 0])
        ends = torch.cat([mass - w[..., 0] * size, here - w[..., 0] * (size - 1 - _places(here))], -1)
        mass = ends.logsumexp(-1, keepdim=True)
        empty = mass.isneginf()
        mean = (ends - mass.masked_fill(empty, 0.0)).exp()[:, :, None] @ values
    return torch.cat(parts, 2), torch.cat(sums, 2)


def _places(like: Tensor) -> Tensor:
    return torch.arange(like.shape[-1], dtype=like.dtype, device=like.device)


def _pairs(scores: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Exponents of a chunk with itself ``[B, H, L, L]``, -inf ahead of the query."""
    at = _places(scores)
    gap = at[:, None] - 1 - at
    logits = scores[:, :, None] - w * gap.clamp(min=0) + u * (gap == -1)
    return logits.masked_fill(gap < -1, -torch.inf)


class PrefixSoftmaxMap(AttentionMap):
    """M_ij = exp(s_j - (i - 1 - j) w - lse_i) for j < i, exp(s_i + u - lse_i) for j = i: rows that sum to 1.

    ``scores`` s ``[B, H, N]``, ``decay`` w (not negative) and ``bonus`` u ``[H]`` or None. Memory is that of the scores;
    products and block sums take time linear in N (and the number of blocks). ``native()`` is the vector of scores.
    """

    def __init__(
        self,
        scores: Tensor,
        decay: Tensor | None = None,
        bonus: Tensor | None = None,
        *,
        kv_heads: int | None = None,
        **metadata: str,
    ) -> None:
        if scores.ndim != 3 or 0 in scores.shape or not scores.is_floating_point():
            raise WorkbenchError(f"scores are floating point [B, H, N]; got {scores.dtype} {list(scores.shape)}")
        b, h, n = scores.shape
        super().__init__((b, h, n, n), kv_heads=kv_heads)
        for name, part in (("decay", decay), ("bonus", bonus)):
            if part is not None and tuple(part.shape) != (h,):
                raise WorkbenchError(f"{name} is [H] = {[h]}; got {list(part.shape)}")
        if decay is not None and not bool((decay >= 0).all() and decay.isfinite().all()):
            raise WorkbenchError("decay is a rate, finite and not negative")
        work = working_dtype(scores.dtype)
        self.scores = scores.detach().to(work)
        self.decay = None if decay is None else decay.detach().to(self.scores)
        self.bonus = None if bonus is None else bonus.detach().to(self.scores)
        self.gate: Tensor | None = None
        self._lse: Tensor | None = None
        state_metadata(self, metadata)

    @property
    def lse(self) -> Tensor:
        """Natural logarithms of the row denominators, ``[B, H, N]``."""
        if self._lse is None:
            nothing = torch.zeros_like(self.scores)[..., None]
            self._lse = prefix_softmax(self.scores, nothing, self.decay, self.bonus)[1]
        return self._lse

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self._weights(lo, hi, 0, self.shape[3])

    def native(self) -> Tensor:
        return self.scores

    def parts(self) -> dict[str, Any] | None:
        if self.gate is not None:
            return None
        return {"scores": self.scores, "decay": self.decay, "bonus": self.bonus, "kv_heads": self.kv_heads}

    def heads(self, indices: Sequence[int]) -> PrefixSoftmaxMap:
        chosen = head_index(indices, self.shape[1])
        told = {name: getattr(self, name) for name in METADATA}
        w, u = (None if part is None else part[chosen] for part in (self.decay, self.bonus))
        found = PrefixSoftmaxMap(self.scores[:, chosen], w, u, **told)
        found.gate = None if self.gate is None else self.gate[:, chosen]
        return found

    def row_sums(self) -> Tensor:
        return torch.ones_like(self.scores) if self.gate is None else self.gate

    def matvec(self, v: Tensor) -> Tensor:
        self._check_values(v)
        return self._forward(v.repeat_interleave(self.shape[1] // self.kv_heads, 1)).to(v.dtype)

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        return self._transposed(y).unflatten(1, (self.kv_heads, -1)).sum(2).to(y.dtype)

    # ------------------------------------------------------------------------

    def _scaled(self, gate: Tensor) -> PrefixSoftmaxMap:
        told = {name: getattr(self, name) for name in METADATA} | {"row_sum": "gate"}
        scaled = PrefixSoftmaxMap(self.scores, self.decay, self.bonus, kv_heads=self.kv_heads, **told)
        scaled.gate = gate.detach().to(self.scores)
        return scaled

    def _rate(self) -> Tensor:
        return self.scores.new_zeros(self.shape[1]) if self.decay is None else self.decay

    def _row_logs(self) -> Tensor:
        """What is subtracted from the exponents of a row: lse, less the logarithm of the gate."""
        return self.lse if self.gate is None else self.lse - self.gate.log()

    def _tile(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        return self._weights(q_lo, q_hi, k_lo, k_hi)

    def _weights(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        device = self.scores.device
        gap = torch.arange(q_lo, q_hi, device=device)[:, None] - 1 - torch.arange(k_lo, k_hi, device=device)
        logits = self.scores[:, :, None, k_lo:k_hi] - self._row_logs()[:, :, q_lo:q_hi, None]
        logits = logits - self._rate()[:, None, None] * gap.clamp(min=0)
        if self.bonus is not None:
            logits = logits + self.bonus[:, None, None] * (gap == -1)
        return logits.exp().masked_fill(gap < -1, 0.0)

    def _forward(self, v: Tensor) -> Tensor:
        """M v ``[B, H, N, E]``, a value head per head."""
        work = torch.promote_types(self.scores.dtype, v.dtype)
        out, _ = prefix_softmax(self.scores.to(work), v.to(work), self.decay, self.bonus)
        return out if self.gate is None else out * self.gate[..., None].to(work)

    def _transposed(self, y: Tensor) -> Tensor:
        """M^T y ``[B, H, N, E]``, from the last chunk to the first.

        ``later`` is the sum over the rows after a chunk of exp(-(i - end) w - log_i - top) y_i, with top the largest exponent.
        """
        work = torch.promote_types(self.scores.dtype, y.dtype)
        y, n, logs = y.to(work), self.shape[2], self._row_logs().to(work)
        s, w = self.scores.to(work), self._rate().to(work)[:, None]
        top = s.new_full((*s.shape[:2], 1), -torch.inf)
        later = y.new_zeros(*y.shape[:2], 1, y.shape[3])
        parts = []
        for lo in reversed(range(0, n, CHUNK)):
            hi = min(n, lo + CHUNK)
            at = _places(s[:, :, lo:hi])
            own = self._weights(lo, hi, lo, hi).to(work).transpose(-1, -2) @ y[:, :, lo:hi]
            reach = (s[:, :, lo:hi] - w * (hi - 1 - lo - at) + top).exp()
            parts.append(own + reach[..., None] * later)
            rows = torch.cat([top - w * (hi - lo), -w * at - logs[:, :, lo:hi]], -1)
            top = rows.amax(-1, keepdim=True)
            shares = (rows - top.masked_fill(top.isneginf(), 0.0)).exp()
            later = shares[:, :, None] @ torch.cat([later, y[:, :, lo:hi]], 2)
        return torch.cat(parts[::-1], 2)

    def _received(self) -> Tensor:
        return self._transposed(torch.ones_like(self.scores)[..., None])[..., 0]

    def _mass(self, mod: Mod | Tensor) -> Tensor:
        if not isinstance(mod, Tensor):
            return super()._mass(mod)
        weights = mod.to(self.scores)[:, None, :, None]
        return self._forward(weights.expand(*self.shape[:2], -1, -1))[..., 0]

    def _blocks(self, size: int, reduce: str) -> Tensor:
        """Below the diagonal a block is exp(log sum over keys + log sum over rows - decay in between); on it, the mass of the
        tokens of the block alone."""
        if reduce == "max":
            return super()._blocks(size, reduce)
        _, h, n, _ = self.shape
        short, rate = -n % size, self._rate()
        s = pad(self.scores, (0, short), value=-torch.inf).unflatten(2, (-1, size))
        logs = pad(self._row_logs(), (0, short), value=torch.inf).unflatten(2, (-1, size))
        count, at = s.shape[2], _places(s)
        keys = (s - rate[:, None, None] * (size - 1 - at)).logsumexp(-1)
        rows = (-rate[:, None, None] * at - logs).logsumexp(-1)
        gap = (torch.arange(count, device=s.device)[:, None] - 1 - torch.arange(count, device=s.device)) * size
        below = rows[..., None] + keys[:, :, None] - rate[:, None, None] * gap.clamp(min=0)
        below = below.exp().masked_fill(gap < 0, 0.0)
        w, u = (None if part is None else part.repeat_interleave(count) for part in (self.decay, self.bonus))
        flat = s.flatten(1, 2)
        own = prefix_softmax(flat, flat.new_zeros(*flat.shape, 1), w, u)[1].unflatten(1, (h, count))
        sums = below + torch.diag_embed((own - logs).exp().sum(-1))
        return sums / block_cells(n, n, size, sums) if reduce == "mean" else sums
