"""Attention maps that need no operator: given as numbers, gated, summarised. ``AttentionMap`` is the base of all maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from workbench.attention_map import DENSE_LIMIT, METADATA, AttentionMap, TopK, block_cells
from workbench.captures import Capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.mods import Mod

__all__ = [
    "DENSE_LIMIT",
    "METADATA",
    "AttentionMap",
    "DenseMap",
    "GatedMap",
    "SummaryMap",
    "TopK",
    "block_cells",
    "head_index",
    "row_sum_of",
    "state_metadata",
]


class DenseMap(AttentionMap):
    """A map given as numbers. Made by ``AttentionMap.from_dense``.

    The offset defaults to K - Q: the last query stands on the last key. Rows count as summing to 1 within 1e-5 (float32,
    float64) or two units in the last place of 1 (bfloat16, float16). A stated sign or row sum that the numbers contradict by
    more than 2e-2 raises. ``mask`` tells who may see whom where zeros do not: analyses with nulls ask for it.
    """

    def __init__(
        self,
        weights: Tensor,
        *,
        offset: int | None = None,
        kv_heads: int | None = None,
        mask: Mask | None = None,
        **metadata: str,
    ) -> None:
        if not isinstance(weights, Tensor):
            raise WorkbenchError(
                f"weights are a tensor [B, H, Q, K]; got a {type(weights).__name__}: torch.as_tensor(it)"
            )
        if weights.ndim != 4 or 0 in weights.shape:
            raise WorkbenchError(f"weights are [B, H, Q, K], not empty; got {list(weights.shape)}")
        if not weights.is_floating_point():
            raise WorkbenchError(f"weights are floating point; got {weights.dtype}")
        b, h, q, k = weights.shape
        super().__init__((b, h, q, k), kv_heads=kv_heads, offset=max(0, k - q) if offset is None else offset)
        self.weights = weights.detach()
        self.mask = mask if mask is None else self._seen(mask)
        sums = self.weights.sum(-1, dtype=torch.float64)
        if not bool(torch.isfinite(sums).all()):
            raise WorkbenchError("weights hold NaN or infinity")
        tolerance = max(1e-5, 2 * torch.finfo(weights.dtype).eps)
        negative = bool(self.weights.amin() < 0)
        self.sign = "signed" if negative else "nonnegative"
        self.row_sum = "free" if negative else row_sum_of(sums, tolerance)
        state_metadata(self, metadata)
        if self.sign == "nonnegative" and negative:
            raise WorkbenchError(f"sign='nonnegative', but the smallest weight is {float(self.weights.amin()):.4g}")
        if self.row_sum in ("1", "<=1") and row_sum_of(sums, 2e-2) not in ("1", self.row_sum):
            raise WorkbenchError(
                f"row_sum={self.row_sum!r}, but rows sum to {float(sums.min()):.4g} .. {float(sums.max()):.4g}"
            )

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self.weights[:, :, lo:hi]

    def heads(self, indices: Sequence[int]) -> AttentionMap:
        told = {name: getattr(self, name) for name in METADATA}
        index = head_index(indices, self.shape[1])
        mask = self.mask if self.mask is None else self.mask.select(heads=torch.tensor(index))
        return DenseMap(self.weights[:, index], offset=self.offset, mask=mask, **told)

    def _seen(self, mask: Mask) -> Mask:
        """The mask at this map's offset; raises if it does not fit or hides a key that has weight."""
        mask = mask.at(self.offset)
        try:
            mask.check(self.shape)
        except ValueError as error:
            raise WorkbenchError(f"this mask does not fit weights of {list(self.shape)}: {error}") from None
        allowed = mask.tile(slice(0, self.shape[2]), slice(0, self.shape[3]), self.weights.device)
        if allowed is not None:
            places = ((self.weights != 0) & ~allowed).nonzero()
            if len(places):
                raise WorkbenchError(
                    f"mask hides {len(places)} places that have weight, the first at [B, H, Q, K] = {places[0].tolist()}"
                )
        return mask


class GatedMap(AttentionMap):
    """Effective map of an attention whose head outputs are scaled per token: rows g_i M_ij.

    ``raw`` is the inner map, ``gate`` ``[B, H, Q]`` the factor (head-wise gated attention, arXiv 2505.06708). The row-sum
    contract ``"gate"`` says that rows sum to their gate times what the rows of ``raw`` sum to. Entropy is refused if a gate
    exceeds 1, as such rows are no sub-distributions.
    """

    row_sum = "gate"

    def __init__(self, raw: AttentionMap, gate: Tensor) -> None:
        if tuple(gate.shape) != tuple(raw.shape[:3]):
            raise WorkbenchError(f"a gate is [B, H, Q] = {list(raw.shape[:3])}; got {list(gate.shape)}")
        if not gate.is_floating_point():
            raise WorkbenchError(f"a gate is floating point; got {gate.dtype}")
        super().__init__(raw.shape, kv_heads=raw.kv_heads, offset=raw.offset)
        self.raw = raw
        self.gate = gate.detach()
        negative = bool((self.gate < 0).any())
        self.sign = "signed" if raw.sign == "signed" or negative else "nonnegative"
        if raw.row_sum in ("free", "columns"):
            self.row_sum = "free"
        self.value_space, self.exactness, self.domain = raw.value_space, raw.exactness, raw.domain
        self.channelwise = self.channelwise or raw.channelwise
        self._fast = None if negative else raw._scaled(self.gate)

    @property
    def impl(self) -> str:
        """Form of the statistics kernel that ran last, empty if none did."""
        return str(getattr(self._fast or self.raw, "impl", ""))

    def rows(self, lo: int, hi: int) -> Tensor:
        return self._gated(self.raw.rows(lo, hi), lo, hi)

    def row_sums(self) -> Tensor:
        sums = self.raw.row_sums()
        return self.gate.to(sums.dtype) * sums

    def matvec(self, v: Tensor) -> Tensor:
        return self._times(self.raw.matvec(v))

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        return self.raw.rmatvec(self._times(y))

    def _times(self, values: Tensor) -> Tensor:
        work = torch.promote_types(self.gate.dtype, working_dtype(values.dtype))
        return (self.gate.to(work)[..., None] * values.to(work)).to(values.dtype)

    def entropy(self) -> Tensor:
        if ("entropy",) not in self._memo and bool((self.gate > 1).any()):
            raise Refused(
                f"a gate of {float(self.gate.max()):.4g} makes rows that are no distribution: see raw.entropy()"
            )
        return super().entropy()

    def heads(self, indices: Sequence[int]) -> AttentionMap:
        return GatedMap(self.raw.heads(indices), self.gate[:, head_index(indices, self.shape[1])])

    def _tile(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        return self._gated(self.raw._tile(q_lo, q_hi, k_lo, k_hi), q_lo, q_hi)

    def _gated(self, rows: Tensor, lo: int, hi: int) -> Tensor:
        work = working_dtype(rows.dtype)  # a product of two bfloat16 numbers is none
        return rows.to(work) * self.gate[:, :, lo:hi, None].to(work)

    def _precompute(self, request: Capture) -> None:
        if self._fast is None:
            super()._precompute(request)
            return
        if "entropy" in request.stats and bool((self.gate > 1).any()):
            self.entropy()
        self._fast._precompute(request)
        self._memo.update(self._fast._memo)
        self.raw._learn(self._fast)

    def _summary(self, request: Capture) -> AttentionMap:
        """A gated map whose ``raw`` is a summary too, with the same statistics of the ungated rows."""
        self.raw._precompute(request)
        kept = GatedMap(SummaryMap(self.raw), self.gate)
        kept._memo = dict(self._memo)
        return kept

    def _blocks(self, size: int, reduce: str) -> Tensor:
        return super()._blocks(size, reduce) if self._fast is None else self._fast.blocks(size, reduce)

    def _received(self) -> Tensor:
        return super()._received() if self._fast is None else self._fast.received()

    def _entropy(self) -> Tensor:
        return super()._entropy() if self._fast is None else self._fast.entropy()

    def _distance(self, window: int | None) -> Tensor:
        return super()._distance(window) if self._fast is None else self._fast.distance(window)

    def _distance2(self) -> Tensor:
        return super()._distance2() if self._fast is None else self._fast.distance(moment=2)

    def _mass(self, mod: Mod | Tensor) -> Tensor:
        return super()._mass(mod) if self._fast is None else self._fast._mass(mod)

    def _topk(self, k: int) -> TopK:
        return super()._topk(k) if self._fast is None else self._fast.topk(k)


class SummaryMap(AttentionMap):
    """What was computed of a map whose q and k were let go (``capture(keep=False)``). Anything else is refused.

    ``lse`` and ``mask`` are those of the map it was made from, None where that has none.
    """

    def __init__(self, source: AttentionMap) -> None:
        super().__init__(source.shape, kv_heads=source.kv_heads, offset=source.offset)
        for name in METADATA:
            setattr(self, name, getattr(source, name))
        self.channelwise = source.channelwise
        self.lse: Tensor | None = getattr(source, "lse", None)
        self.mask: Mask | None = getattr(source, "mask", None)
        self.impl = str(getattr(source, "impl", ""))
        self._memo = dict(source._memo)

    @classmethod
    def told(
        cls,
        shape: tuple[int, int, int, int],
        kv_heads: int,
        offset: int,
        metadata: Mapping[str, str],
        lse: Tensor | None,
        mask: Mask | None,
        impl: str,
    ) -> SummaryMap:
        """A summary as it was stored; its answers are put in by the reader."""
        found = cls.__new__(cls)
        AttentionMap.__init__(found, shape, kv_heads=kv_heads, offset=offset)
        for name in METADATA:
            setattr(found, name, metadata[name])
        found.lse, found.mask, found.impl = lse, mask, impl
        return found

    @property
    def has(self) -> tuple[str, ...]:
        """The calls that this map answers."""
        return answered(self)

    def rows(self, lo: int, hi: int) -> Tensor:
        raise Refused(
            f"this map was captured with keep=False and answers only {', '.join(self.has) or 'nothing'}; "
            "name more in capture(...) or capture with keep=True"
        )

    def row_sums(self) -> Tensor:
        if self.row_sum == "1" and ("row_sums",) not in self._memo:
            like = self.lse if self.lse is not None else torch.empty(0)
            return torch.ones(self.shape[:3], dtype=like.dtype, device=like.device)
        return super().row_sums()

    def heads(self, indices: Sequence[int]) -> AttentionMap:
        raise Refused("a summary cannot select heads; take them from its answers: axis 1 is the head")


def answered(amap: AttentionMap) -> tuple[str, ...]:
    """The calls that a map answers without further work: what was captured, and what was asked of it since."""
    calls = (("distance", "moment=2") if key == ("distance2",) else (key[0], *map(repr, key[1:])) for key in amap._memo)
    return tuple(f"{name}({', '.join(part for part in parts if part != 'None')})" for name, *parts in calls)


def state_metadata(amap: AttentionMap, metadata: Mapping[str, str]) -> None:
    """Set what is told about a map; raises on names and values that do not exist."""
    for name, value in metadata.items():
        if name not in METADATA:
            raise UnknownName("map metadata", name, METADATA)
        known = METADATA[name]
        if known is not None and value not in known:
            raise UnknownName(f"map {name}", value, known)
        setattr(amap, name, value)


def head_index(indices: Sequence[int], heads: int) -> list[int]:
    """The indices as a list; raises on one that does not exist."""
    for index in indices:
        if not 0 <= index < heads:
            raise UnknownName("head", index, range(heads))
    if not len(indices):
        raise WorkbenchError("no heads selected")
    return [int(index) for index in indices]


def row_sum_of(sums: Tensor, tolerance: float) -> str:
    """The row-sum contract that non-negative rows with these sums keep: ``"1"``, ``"<=1"`` or ``"free"``."""
    if bool((sums <= 1 + tolerance).all()):
        return "1" if bool((sums >= 1 - tolerance).all()) else "<=1"
    return "free"
