"""Maps of linear attention: low rank, with a decay per head and token or per channel.

    LinearMap         M_ij = scale (q_i . k_j) exp(a_{j+1} + ... + a_i) / norm_i
    ChannelDecayMap   M_ij = scale sum_r q_ir k_jr exp(a_{j+1,r} + ... + a_{i,r})

q and k are what is multiplied: after feature maps, rotations and gates. Without a causal mask the map has rank R and every sum of
it is a product of sums; with one, sums go chunk by chunk through a state of R x E numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from workbench.attention_map import METADATA, AttentionMap, block_cells
from workbench.errors import WorkbenchError
from workbench.kernels.linear_attention import linear_attention
from workbench.kernels.scores import working_dtype
from workbench.maps import head_index, state_metadata
from workbench.mods import Mod
from workbench.patterns.decays import (
    after,
    channel_scan,
    channel_scan_back,
    channel_square_before,
    channel_tile,
    decay_tile,
)


class LinearMap(AttentionMap):
    """M_ij = scale (q_i . k_j) exp(a_{j+1} + ... + a_i) / norm_i, for j <= i only if ``causal``.

    ``q`` ``[B, H, Q, R]``, ``k`` ``[B, G, K, R]``; ``log_decay`` a: None, ``[H]`` or ``[B, H, K]``, not positive, causal maps
    only; ``norm`` ``[B, H, Q]`` or None. A row whose norm is 0 is zero. ``offset`` is the position of query 0. ``kv_heads``
    is the number of value heads where it is not that of k. Counts as signed with free row sums unless told otherwise
    (``sign=``, ``row_sum=``, ``value_space=``).
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        log_decay: Tensor | None = None,
        *,
        causal: bool,
        scale: float = 1.0,
        norm: Tensor | None = None,
        kv_heads: int | None = None,
        offset: int = 0,
        **metadata: str,
    ) -> None:
        b, h, n, _, g, m = _check_pair(q, k)
        super().__init__((b, h, n, m), kv_heads=g if kv_heads is None else kv_heads, offset=offset)
        if h % self.kv_heads:
            raise WorkbenchError(f"kv_heads divides the {h} heads of q; got {kv_heads}")
        if log_decay is not None:
            _check_decay(log_decay, (h,), (b, h, m))
            if not causal or offset + n > m:
                raise WorkbenchError(
                    f"log_decay is for causal maps with a key for every query; got causal={causal}, "
                    f"queries {offset} .. {offset + n - 1} and {m} keys"
                )
            log_decay = log_decay.detach()
        if norm is not None and (tuple(norm.shape) != (b, h, n) or not norm.is_floating_point()):
            raise WorkbenchError(f"norm is floating point [B, H, Q] = {[b, h, n]}; got {norm.dtype} {list(norm.shape)}")
        self.q, self.k, self.log_decay = q.detach(), k.detach(), log_decay
        self.causal, self.scale = causal, scale
        self.norm = None if norm is None else norm.detach()
        self._work = working_dtype(q.dtype)
        state_metadata(self, {"sign": "signed", "row_sum": "free", **metadata})

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self._weights(lo, hi, 0, self.shape[3])

    def parts(self) -> dict[str, Any] | None:
        return {
            "q": self.q,
            "k": self.k,
            "log_decay": self.log_decay,
            "causal": self.causal,
            "scale": self.scale,
            "norm": self.norm,
            "kv_heads": self.kv_heads,
            "offset": self.offset,
        }

    def heads(self, indices: Sequence[int]) -> LinearMap:
        chosen = head_index(indices, self.shape[1])
        group = self.shape[1] // self.k.shape[1]
        log = self.log_decay
        if log is not None:
            log = log[chosen] if log.ndim == 1 else log[:, chosen]
        norm = None if self.norm is None else self.norm[:, chosen]
        return self._like(self.q[:, chosen], self.k[:, [head // group for head in chosen]], log, norm, len(chosen))

    def matvec(self, v: Tensor) -> Tensor:
        self._check_values(v)
        if not self._chunked:
            return super().matvec(v)
        g = self.k.shape[1]
        values = v.to(torch.promote_types(self._work, v.dtype))
        k = self.k
        if self.kv_heads != g:
            values, k = self._per_head(values), self._per_head(k)
        return self._forward(values, k).to(v.dtype)

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        if not self._chunked:
            return super().rmatvec(y)
        back = self._transposed(y.to(torch.promote_types(self._work, y.dtype)))
        return back.unflatten(1, (self.kv_heads, -1)).sum(2).to(y.dtype)

    def row_sums(self) -> Tensor:
        if not self._chunked:
            return super().row_sums()
        b, _, _, m = self.shape
        ones = self.q.new_ones(b, self.k.shape[1], m, 1, dtype=self._work)
        return self._remember(("row_sums",), lambda: self._forward(ones, self.k)[..., 0])

    # ------------------------------------------------------------------------

    @property
    def _chunked(self) -> bool:
        """Whether sums need no pairs: low rank, or the state of a square causal map."""
        return not self.causal or (self.shape[2] == self.shape[3] and self.offset == 0)

    def _like(
        self, q: Tensor, k: Tensor, log: Tensor | None, norm: Tensor | None, kv_heads: int, **changed: str
    ) -> LinearMap:
        told = {name: getattr(self, name) for name in METADATA} | changed
        return LinearMap(
            q, k, log, causal=self.causal, scale=self.scale, norm=norm, kv_heads=kv_heads, offset=self.offset, **told
        )

    def _scaled(self, gate: Tensor) -> LinearMap:
        q = self.q.to(self._work) * gate.to(self.q.device, self._work)[..., None]
        return self._like(q, self.k, self.log_decay, self.norm, self.kv_heads, row_sum="gate")

    def _queries(self, lo: int = 0, hi: int | None = None) -> Tensor:
        """Rows of q in the working type, with the scale and the norm in them."""
        q = self.q[:, :, lo:hi].to(self._work) * self.scale
        if self.norm is None:
            return q
        norm = self.norm[:, :, lo:hi, None].to(self._work)
        return torch.where(norm == 0, 0.0, q / torch.where(norm == 0, 1.0, norm))

    def _per_head(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.shape[1] // x.shape[1], 1)

    def _tile(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        return self._weights(q_lo, q_hi, k_lo, k_hi)

    def _weights(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        b, h, _, _ = self.shape
        g, k = self.k.shape[1], self.k[:, :, k_lo:k_hi].to(self._work)
        q = self._queries(q_lo, q_hi)
        m = (q.reshape(b, g, -1, q.shape[3]) @ k.transpose(-1, -2)).view(b, h, q_hi - q_lo, k_hi - k_lo)
        if not self.causal:
            return m
        lo, hi = q_lo + self.offset, q_hi + self.offset
        if self.log_decay is None:
            return m.tril(lo - k_lo)
        log = self.log_decay
        log = log[None, :, None].expand(1, h, self.shape[3]) if log.ndim == 1 else log
        return m * decay_tile(log, lo, hi, k_lo, k_hi)

    def _forward(self, v: Tensor, k: Tensor) -> Tensor:
        """M v for values and keys of equally many heads."""
        q, k = self._queries().to(v.dtype), k.to(v.dtype)
        if self.causal:
            return linear_attention(q, k, v, self.log_decay).output
        b, h, n, r = q.shape
        folded = q.reshape(b, k.shape[1], -1, r) @ (k.transpose(-1, -2) @ v)
        return folded.view(b, h, n, v.shape[3])

    def _transposed(self, y: Tensor) -> Tensor:
        """M^T y of every head, ``[B, H, K, E]``."""
        q, k = self._queries().to(y.dtype), self._per_head(self.k.to(y.dtype))
        if not self.causal:
            return k @ (q.transpose(-1, -2) @ y)
        log = self.log_decay
        if log is not None and log.ndim == 3:
            log = pad(log[:, :, 1:].flip(2), (1, 0))  # what decays on the way from i down to j is a_{j+1} .. a_i
        return linear_attention(k.flip(2), q.flip(2), y.flip(2), log).output.flip(2)

    def _received(self) -> Tensor:
        if not self._chunked:
            return super()._received()
        return self._transposed(self.q.new_ones(*self.shape[:3], 1, dtype=self._work))[..., 0]

    def _mass(self, mod: Mod | Tensor) -> Tensor:
        if not isinstance(mod, Tensor) or not self._chunked:
            return super()._mass(mod)
        weights = mod.to(self.q.device, self._work)[:, None, :, None]
        return self._forward(weights.expand(self.shape[0], self.k.shape[1], -1, -1), self.k)[..., 0]

    def _blocks(self, size: int, reduce: str) -> Tensor:
        if not self._chunked:
            return super()._blocks(size, reduce)
        if reduce == "abs" and self.sign == "nonnegative":
            return self.blocks(size, "sum")
        if self.causal:
            k = self.k.to(self._work)
            values = k.new_zeros(*k.shape[:3], 1)
            return linear_attention(self._queries(), k, values, self.log_decay, block=size, reduce=reduce).blocks[
                reduce
            ]
        if reduce not in ("sum", "mean"):
            return super()._blocks(size, reduce)
        q, k = _block_sums(self._queries(), size), _block_sums(self.k.to(self._work), size)
        sums = q @ self._per_head(k).transpose(-1, -2)
        return sums / block_cells(self.shape[2], self.shape[3], size, sums) if reduce == "mean" else sums


class ChannelDecayMap(AttentionMap):
    """M_ij = scale sum_r q_ir k_jr exp(a_{j+1,r} + ... + a_{i,r}) for j <= i: gated linear attention with gates per channel.

    ``q``, ``k`` and ``log_decay`` a are ``[B, H, N, R]``, a not positive. With ``diagonal`` ``[B, H, N]`` row i reads the
    state before its own token, exp(a_{j+1,r} + ... + a_{i-1,r}), and M_ii is ``diagonal`` as it is (RWKV-6's bonus).
    ``kv_heads`` is the number of value heads, H unless given. Counts as signed with free row sums unless told otherwise.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        log_decay: Tensor,
        *,
        scale: float = 1.0,
        diagonal: Tensor | None = None,
        kv_heads: int | None = None,
        **metadata: str,
    ) -> None:
        b, h, n, _, g, m = _check_pair(q, k)
        if (g, m) != (h, n):
            raise WorkbenchError(f"k has the heads and tokens of q {[h, n]}; got {[g, m]}")
        _check_decay(log_decay, tuple(q.shape))
        if diagonal is not None and tuple(diagonal.shape) != (b, h, n):
            raise WorkbenchError(f"diagonal is [B, H, N] = {[b, h, n]}; got {list(diagonal.shape)}")
        super().__init__((b, h, n, n), kv_heads=kv_heads)
        if h % self.kv_heads:
            raise WorkbenchError(f"kv_heads divides the {h} heads of q; got {kv_heads}")
        self.q, self.k, self.log_decay = q.detach(), k.detach(), log_decay.detach()
        self.diagonal = None if diagonal is None else diagonal.detach()
        self.scale = scale
        self._work = working_dtype(q.dtype)
        state_metadata(self, {"sign": "signed", "row_sum": "free", **metadata})

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self._weights(lo, hi, 0, self.shape[3])

    def parts(self) -> dict[str, Any] | None:
        return {
            "q": self.q,
            "k": self.k,
            "log_decay": self.log_decay,
            "scale": self.scale,
            "diagonal": self.diagonal,
            "kv_heads": self.kv_heads,
        }

    def heads(self, indices: Sequence[int]) -> ChannelDecayMap:
        chosen = head_index(indices, self.shape[1])
        diagonal = None if self.diagonal is None else self.diagonal[:, chosen]
        told = {name: getattr(self, name) for name in METADATA}
        q, k, log = (x[:, chosen] for x in (self.q, self.k, self.log_decay))
        return ChannelDecayMap(q, k, log, scale=self.scale, diagonal=diagonal, **told)

    def matvec(self, v: Tensor) -> Tensor:
        self._check_values(v)
        values = v.repeat_interleave(self.shape[1] // self.kv_heads, 1)
        return self._scan(channel_scan, values).to(v.dtype)

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        return self._scan(channel_scan_back, y).unflatten(1, (self.kv_heads, -1)).sum(2).to(y.dtype)

    def row_sums(self) -> Tensor:
        ones = self.q.new_ones(*self.shape[:3], 1)
        return self._remember(("row_sums",), lambda: self._scan(channel_scan, ones)[..., 0])

    # ------------------------------------------------------------------------

    def _parts(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        return self.q.to(dtype), self.k.to(dtype), self.log_decay.to(dtype)

    def _scan(self, scan: Callable[..., Tensor], x: Tensor) -> Tensor:
        dtype = torch.promote_types(self._work, x.dtype)
        q, k, a = self._parts(dtype)
        diagonal = None if self.diagonal is None else self.diagonal.to(dtype)
        return scan(q, k, x.to(dtype), a, scale=self.scale, diagonal=diagonal)

    def _scaled(self, gate: Tensor) -> ChannelDecayMap:
        gate = gate.to(self.q.device, self._work)
        diagonal = None if self.diagonal is None else self.diagonal.to(self._work) * gate
        told = {name: getattr(self, name) for name in METADATA} | {"row_sum": "gate"}
        q, k, a = self._parts(self._work)
        return ChannelDecayMap(
            q * gate[..., None], k, a, scale=self.scale, diagonal=diagonal, kv_heads=self.kv_heads, **told
        )

    def _tile(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        return self._weights(q_lo, q_hi, k_lo, k_hi)

    def _weights(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        q, k, a = self._parts(self._work)
        if self.diagonal is None:
            return channel_tile(q, k, a, q_lo, q_hi, k_lo, k_hi) * self.scale
        if q_hi == q_lo or k_hi == k_lo:
            return q.new_zeros(*q.shape[:2], q_hi - q_lo, k_hi - k_lo)
        # The row of token i reads the state after token i - 1: the row i - 1 of the plain map of the next token's query.
        lead = q_lo == 0
        m = channel_tile(
            q[:, :, 1:], k[:, :, :-1], a[:, :, :-1], q_lo - 1 + lead, q_hi - 1, k_lo, min(k_hi, k.shape[2] - 1)
        )
        m = pad(m * self.scale, (0, k_hi - k_lo - m.shape[-1], int(lead), 0))
        lo, hi = max(q_lo, k_lo), min(q_hi, k_hi)
        if lo < hi:
            diagonal = self.diagonal[:, :, lo:hi].to(self._work)
            m[:, :, lo - q_lo : hi - q_lo, lo - k_lo : hi - k_lo].diagonal(0, -2, -1).copy_(diagonal)
        return m

    def _received(self) -> Tensor:
        return self._scan(channel_scan_back, self.q.new_ones(*self.shape[:3], 1))[..., 0]

    def _mass(self, mod: Mod | Tensor) -> Tensor:
        if not isinstance(mod, Tensor):
            return super()._mass(mod)
        weights = mod.to(self.q.device, self._work)[:, None, :, None]
        return self._scan(channel_scan, weights.expand(*self.shape[:2], -1, -1))[..., 0]

    def _blocks(self, size: int, reduce: str) -> Tensor:
        """A block below the diagonal is sum_r (decayed sum of q)_r (decayed sum of k)_r exp(decay of the blocks between)."""
        if reduce == "abs" and self.sign == "nonnegative":
            return self.blocks(size, "sum")
        if reduce not in ("sum", "mean"):
            return super()._blocks(size, reduce)
        n = self.shape[2]
        q, k, a = (pad(x, (0, 0, 0, -n % size)).unflatten(2, (-1, size)) for x in self._parts(self._work))
        rise, d = a.cumsum(-2), None
        if self.diagonal is not None:
            rise = pad(rise[..., :-1, :], (0, 0, 1, 0))
            d = pad(self.diagonal.to(self._work), (0, -n % size)).reshape(self.shape[0], -1, size)
        parts = [x.flatten(1, 2) for x in (q, k, torch.ones_like(q[..., :1]), a)]
        own = channel_scan(*parts, scale=self.scale, diagonal=d).sum((-2, -1)).view(*q.shape[:3])
        sums = channel_square_before((q * rise.exp()).sum(-2), (k * after(a).exp()).sum(-2), a.sum(-2))
        sums = sums * self.scale + torch.diag_embed(own)
        return sums / block_cells(n, n, size, sums) if reduce == "mean" else sums


def _block_sums(x: Tensor, size: int) -> Tensor:
    """Sums of ``size`` tokens each: ``[B, H, N, R]`` to ``[B, H, N / size, R]``, rounded up."""
    return pad(x, (0, 0, 0, -x.shape[2] % size)).unflatten(2, (-1, size)).sum(3)


def _check_pair(q: Tensor, k: Tensor) -> tuple[int, int, int, int, int, int]:
    """B, H, Q, R of q, and G, K of k."""
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4 or 0 in x.shape or not x.is_floating_point():
            raise WorkbenchError(f"{name} is floating point [B, heads, N, R], not empty; got {x.dtype} {list(x.shape)}")
    b, h, n, r = q.shape
    g, m = k.shape[1:3]
    if k.shape[0] != b or k.shape[3] != r or h % g or k.dtype != q.dtype or k.device != q.device:
        raise WorkbenchError(
            f"k is [B, G, K, R] with B, R = {[b, r]}, G dividing {h}, {q.dtype} on {q.device}; "
            f"got {list(k.shape)}, {k.dtype} on {k.device}"
        )
    return b, h, n, r, g, m


def _check_decay(log_decay: Tensor, *shapes: tuple[int, ...]) -> None:
    if tuple(log_decay.shape) not in shapes or not log_decay.is_floating_point():
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise WorkbenchError(f"log_decay is floating point {wanted}; got {log_decay.dtype} {list(log_decay.shape)}")
    if not bool((log_decay <= 0).all()):
        raise WorkbenchError("log_decay is the log of a factor of at most 1: not positive, not NaN")
