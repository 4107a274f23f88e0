"""Maps with a few weights per row: bands, neighbourhoods, top-k selections, local convolutions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench import attention_map
from workbench.attention_map import AttentionMap, TopK, block_cells
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.maps import head_index, row_sum_of, state_metadata
from workbench.mods import Mod


class SparseMap(AttentionMap):
    """S weights per row: M_ij = sum of ``weights[b, h, i, s]`` over the s with ``indices[b, h, i, s] == j``.

    ``indices`` ``[B or 1, H or 1, Q, S]`` int64 of keys, -1 where there is nothing; ``weights`` ``[B, H, Q, S]``; ``keys`` is
    K. Memory is that of the weights; every answer costs O(Q S) where no key comes twice in a row. Sign and row-sum contract are
    read off unless told (sums count as 1 within 1e-5, or two units in the last place of a narrower type).
    """

    def __init__(
        self,
        indices: Tensor,
        weights: Tensor,
        keys: int,
        *,
        kv_heads: int | None = None,
        offset: int = 0,
        **metadata: str,
    ) -> None:
        if weights.ndim != 4 or not weights.is_floating_point():
            raise WorkbenchError(f"weights are floating point [B, H, Q, S]; got {weights.dtype} {list(weights.shape)}")
        b, h, q, s = weights.shape
        fits = indices.ndim == 4 and indices.shape[0] in (1, b) and indices.shape[1] in (1, h)
        if indices.dtype != torch.int64 or not fits or indices.shape[2:] != (q, s):
            wanted = f"int64 [B or 1, H or 1, Q, S] for weights {[b, h, q, s]}"
            raise WorkbenchError(f"indices are {wanted}; got {indices.dtype} {list(indices.shape)}")
        if s and (int(indices.max()) >= keys or int(indices.min()) < -1):
            span = f"{int(indices.min())} .. {int(indices.max())}"
            raise WorkbenchError(f"indices are keys 0 .. {keys - 1}, or -1; got {span}")
        super().__init__((b, h, q, keys), kv_heads=kv_heads, offset=offset)
        self.indices = indices.detach()
        self.weights, nothing = weights.detach(), self.indices < 0
        if bool((nothing & (self.weights != 0)).any()):  # else memory-mapped weights stay so
            self.weights = self.weights.masked_fill(nothing, 0.0)
        order = self.indices.sort(-1).values
        self._unique = not bool(((order[..., 1:] == order[..., :-1]) & (order[..., 1:] >= 0)).any())
        negative = bool((self.weights < 0).any())
        self.sign = "signed" if negative else "nonnegative"
        tolerance = max(1e-5, 2 * torch.finfo(weights.dtype).eps)
        self.row_sum = "free" if negative else row_sum_of(self.weights.sum(-1, dtype=torch.float64), tolerance)
        state_metadata(self, metadata)

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        at, weights = self._entries(lo, hi)
        weights = weights.to(working_dtype(weights.dtype))
        out = weights.new_zeros(*weights.shape[:3], self.shape[3])
        return out.scatter_add_(-1, at.expand_as(weights), weights)

    def parts(self) -> dict[str, Any] | None:
        return {
            "indices": self.indices,
            "weights": self.weights,
            "keys": self.shape[3],
            "kv_heads": self.kv_heads,
            "offset": self.offset,
        }

    def heads(self, indices: Sequence[int]) -> SparseMap:
        chosen = head_index(indices, self.shape[1])
        at = self.indices if self.indices.shape[1] == 1 else self.indices[:, chosen]
        told = {name: getattr(self, name) for name in attention_map.METADATA}
        return SparseMap(at, self.weights[:, chosen], self.shape[3], offset=self.offset, **told)

    def row_sums(self) -> Tensor:
        return self.weights.to(working_dtype(self.weights.dtype)).sum(-1)

    def matvec(self, v: Tensor) -> Tensor:
        self._check_values(v)
        b, h, _q, _k = self.shape
        g, width = self.kv_heads, v.shape[3]
        work = torch.promote_types(working_dtype(self.weights.dtype), v.dtype)
        values = v.to(work).repeat_interleave(h // g, 1) if g != h else v.to(work)
        parts = []
        for lo, hi in self._pieces(width):
            at, weights = self._entries(lo, hi)
            at = at.expand(b, h, -1, -1).flatten(2, 3)[..., None]
            seen = values.gather(2, at.expand(-1, -1, -1, width)).view(b, h, hi - lo, -1, width)
            parts.append((weights.to(work)[..., None, :] @ seen).squeeze(-2).to(v.dtype))
        return torch.cat(parts, 2)

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        b, h, _q, k = self.shape
        g, width = self.kv_heads, y.shape[3]
        work = torch.promote_types(working_dtype(self.weights.dtype), y.dtype)
        out = y.new_zeros(b, h, k, width, dtype=work)
        for lo, hi in self._pieces(width):
            at, weights = self._entries(lo, hi)
            part = (weights.to(work)[..., None] * y[:, :, lo:hi, None].to(work)).flatten(2, 3)
            index = at.expand(b, h, -1, -1).flatten(2, 3)[..., None].expand(-1, -1, -1, width)
            out.scatter_add_(2, index, part)
        return out.view(b, g, h // g, k, width).sum(2).to(y.dtype)

    # ------------------------------------------------------------------------

    def _entries(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """Keys of some rows (0 in the place of -1, where the weight is 0) and their weights."""
        return self.indices[:, :, lo:hi].clamp(min=0), self.weights[:, :, lo:hi]

    def _pieces(self, width: int) -> Iterator[tuple[int, int]]:
        b, h, q, s = self.weights.shape
        step = max(1, min(q, attention_map.CHUNK // max(1, b * h * s * width)))
        for lo in range(0, q, step):
            yield lo, min(q, lo + step)

    def _all(self) -> tuple[Tensor, Tensor]:
        at, weights = self._entries(0, self.shape[2])
        return at.expand_as(weights), weights.to(working_dtype(weights.dtype))

    def _received(self) -> Tensor:
        b, h, _, k = self.shape
        out = self.weights.new_zeros(b, h, k, dtype=working_dtype(self.weights.dtype))
        for lo, hi in self._pieces(1):
            at, weights = self._entries(lo, hi)
            out.scatter_add_(-1, at.expand_as(weights).flatten(2), weights.to(out.dtype).flatten(2))
        return out

    def _entropy(self) -> Tensor:
        return torch.special.entr(self._all()[1]).sum(-1) if self._unique else super()._entropy()

    def _mass(self, mod: Mod | Tensor) -> Tensor:
        at, weights = self._all()
        if isinstance(mod, Tensor):
            table = mod.to(weights)[:, None].expand(self.shape[0], self.shape[1], -1)
            return (weights * table.gather(-1, at.flatten(2)).view_as(weights)).sum(-1)
        b, h, q, _ = self.shape
        device = weights.device
        value = mod(
            torch.arange(b, device=device)[:, None, None, None],
            torch.arange(h, device=device)[None, :, None, None],
            torch.arange(q, device=device)[None, None, :, None] + self.offset,
            at,
        )
        if not isinstance(value, Tensor) or value.ndim > 4:
            return super()._mass(mod)
        try:
            return (weights * value.to(weights.dtype).expand_as(weights)).sum(-1)
        except RuntimeError:
            return super()._mass(mod)

    def _blocks(self, size: int, reduce: str) -> Tensor:
        if reduce not in ("sum", "mean") and not (self._unique and (reduce == "abs" or self.sign == "nonnegative")):
            return super()._blocks(size, reduce)
        b, h, q, k = self.shape
        nq, nk = -(-q // size), -(-k // size)
        out = self.weights.new_zeros(b, h, nq * nk, dtype=working_dtype(self.weights.dtype))
        for lo, hi in self._pieces(1):
            at, weights = self._entries(lo, hi)
            cell = (torch.arange(lo, hi, device=at.device) // size)[:, None] * nk + at // size
            values = (weights.abs() if reduce == "abs" else weights).to(out.dtype).flatten(2)
            out.scatter_reduce_(-1, cell.expand_as(weights).flatten(2), values, "amax" if reduce == "max" else "sum")
        blocks = out.view(b, h, nq, nk)
        return blocks / block_cells(q, k, size, blocks) if reduce == "mean" else blocks

    def _topk(self, k: int) -> TopK:
        if not self._unique or self.sign == "signed" or k > self.weights.shape[3] or k == 1:
            return super()._topk(k)
        at, weights = self._all()
        values, places = weights.topk(k, dim=-1)
        return TopK(values, at.gather(-1, places).masked_fill(values == 0, -1))
