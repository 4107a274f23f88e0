"""The map of softmax attention: any mask spec, grouped heads, softcap, sink logits, additive bias."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from workbench.captures import Capture
from workbench.errors import WorkbenchError
from workbench.kernels.attention_stats import AttentionStats, attention_stats
from workbench.kernels.mask import Mask
from workbench.kernels.scores import HIDDEN, Bias, Relative, Scores
from workbench.maps import AttentionMap, TopK, head_index
from workbench.mods import Mod


class SoftmaxMap(AttentionMap):
    """M_ij = exp(s_ij - lse_i), with s as in ``kernels/scores.py``.

    ``q`` ``[B, H, Q, E]`` and ``k`` ``[B, G, K, E]`` are what the scores are made of, after rotary positions; ``lse``
    ``[B, H, Q]`` is the natural logarithm of the row's denominator, sink included, computed on first use if not given.
    Rows that see no key are zero and have lse -inf. ``row_sum`` is ``"<=1"`` with a sink or if such rows are possible.
    Tensors are detached; narrower types than float32 are answered in float32.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor | None = None,
        *,
        mask: Mask,
        scale: float | None = None,
        softcap: float | None = None,
        sink: Tensor | None = None,
        bias: Bias | None = None,
    ) -> None:
        bias = bias.detach() if isinstance(bias, Tensor) else bias
        try:
            scores = Scores(q.detach(), k.detach(), mask, scale, softcap, None if sink is None else sink.detach(), bias)
        except ValueError as error:
            raise WorkbenchError(str(error)) from None
        super().__init__(scores.shape, kv_heads=k.shape[1], offset=mask.offset)
        if lse is not None and (tuple(lse.shape) != self.shape[:3] or not lse.is_floating_point()):
            raise WorkbenchError(
                f"lse is floating point [B, H, Q] = {list(self.shape[:3])}; got {lse.dtype} {list(lse.shape)}"
            )
        self.scores = scores
        self.impl = ""
        self._lse = None if lse is None else lse.detach().to(scores.q.device, scores.dtype)
        self._gate: Tensor | None = None
        hides = isinstance(bias, Tensor) and bool((bias <= HIDDEN).any())
        self.row_sum = "1" if sink is None and not hides and mask.covers(self.shape[2], self.shape[3]) else "<=1"

    @property
    def mask(self) -> Mask:
        return self.scores.mask

    @property
    def lse(self) -> Tensor:
        """Natural log of the row denominators, ``[B, H, Q]``."""
        if self._lse is None:
            self._stats()
        assert self._lse is not None
        return self._lse

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self._weights(lo, hi, 0, self.shape[3])

    def row_sums(self) -> Tensor:
        if self.row_sum == "1":
            return torch.ones(self.shape[:3], dtype=self.scores.dtype, device=self.scores.q.device)
        return super().row_sums()

    def heads(self, indices: Sequence[int]) -> SoftmaxMap:
        chosen = head_index(indices, self.shape[1])
        old = self.scores
        group = self.shape[1] // self.kv_heads
        bias = old.bias
        if isinstance(bias, Tensor):
            bias = bias[:, chosen] if bias.ndim == 4 and bias.shape[1] > 1 else bias
            bias = bias[chosen] if bias.ndim == 3 and bias.shape[0] > 1 else bias
        elif isinstance(bias, Relative):
            bias = Relative(bias.table[chosen], bias.first) if bias.table.shape[0] > 1 else bias
        elif bias is not None:
            bias = _chosen_rows(bias, chosen)
        return SoftmaxMap(
            old.q[:, chosen],
            old.k[:, [head // group for head in chosen]],
            None if self._lse is None else self._lse[:, chosen],
            mask=old.mask.select(heads=torch.tensor(chosen)),
            scale=old.scale,
            softcap=old.softcap,
            sink=None if old.sink is None else old.sink[chosen],
            bias=bias,
        )

    def _tile(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        return self._weights(q_lo, q_hi, k_lo, k_hi)

    def _weights(self, lo: int, hi: int, k_lo: int, k_hi: int) -> Tensor:
        """The tile, from the keys that its rows may see; zero elsewhere."""
        b, h, _, keys = self.shape
        out = torch.zeros(b, h, hi - lo, k_hi - k_lo, dtype=self.scores.dtype, device=self.scores.q.device)
        first, last = self.mask.span(lo, hi, keys) if hi > lo else (0, 0)
        left, right = max(first, k_lo), min(last, k_hi)
        if left >= right:
            return out
        with torch.no_grad():
            if self._lse is not None:
                lse = self._lse[:, :, lo:hi]
                scores = self.scores.tile(slice(lo, hi), slice(left, right))
            else:
                whole = self.scores.tile(slice(lo, hi), slice(first, last))
                lse, sink = whole.logsumexp(-1), self.scores.sink_logits()
                lse = lse if sink is None else torch.logaddexp(lse, sink)
                scores = whole[..., left - first : right - first]
            weights = scores.sub_(lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp_()
            if self._gate is not None:
                weights *= self._gate[:, :, lo:hi, None]
            out[..., left - k_lo : right - k_lo] = weights
        return out

    def _scaled(self, gate: Tensor) -> SoftmaxMap:
        scaled = copy.copy(self)
        scaled._memo = {}
        scaled._gate = gate.detach().to(self.scores.q.device, self.scores.dtype)
        scaled.row_sum = "gate"
        return scaled

    def _learn(self, scaled: AttentionMap) -> None:
        assert isinstance(scaled, SoftmaxMap)
        self._lse = scaled._lse

    def _stats(
        self,
        block: int | None = None,
        reduce: tuple[str, ...] = (),
        stats: tuple[str, ...] = (),
        window: int | None = None,
        topk: int | None = None,
        mass: Mapping[str, Mod | Tensor] | None = None,
    ) -> AttentionStats:
        """One pass of the statistics kernel; everything it found but masses is remembered."""
        s = self.scores
        try:
            found = attention_stats(
                s.q, s.k, self._lse, mask=s.mask, scale=s.scale, softcap=s.softcap, sink=s.sink, bias=s.bias,
                block=block, reduce=reduce, stats=stats, window=window, topk=topk, mass=mass, gate=self._gate,
            )  # fmt: skip
        except WorkbenchError:
            raise
        except ValueError as error:
            raise WorkbenchError(str(error)) from error
        self.impl = found.impl
        self._lse = found.lse if self._lse is None else self._lse
        for name, blocks in found.blocks.items():
            self._memo["blocks", block, name] = blocks
        if found.received is not None:
            self._memo["received",] = found.received
        if found.entropy is not None:
            self._memo["entropy",] = found.entropy
        if found.distance is not None:
            self._memo["distance", None] = found.distance
        if found.windowed is not None:
            self._memo["distance", window] = found.windowed
        if found.distance2 is not None:
            self._memo["distance2",] = found.distance2
        if found.topk is not None:
            self._memo["topk", topk] = TopK(*found.topk)
        if found.top1 is not None:
            self._memo["topk", 1] = TopK(*(part[..., None] for part in found.top1))
        return found

    def _precompute(self, request: Capture) -> None:
        held = {"distance": ("distance", None), "windowed": ("distance", request.window), "top1": ("topk", 1)}
        reduce = tuple(r for r in request.reduce if request.blocks and ("blocks", request.blocks, r) not in self._memo)
        named = dict.fromkeys((*request.stats, *(() if request.window is None else ("windowed",))))
        if request.topk == 1:
            named["top1"] = None
        elif request.topk is not None:
            self._check_topk(request.topk)
        stats = tuple(name for name in named if held.get(name, (name,)) not in self._memo)
        topk = None if request.topk == 1 or ("topk", request.topk) in self._memo else request.topk
        mass = {name: self._key_weights(weights) for name, weights in request.mass}
        if reduce or stats or topk or mass:
            block = request.blocks if reduce else None
            found = self._stats(block, reduce, stats, request.window if "windowed" in stats else None, topk, mass)
            for name, value in found.mass.items():
                self._memo["mass", name] = value

    def _blocks(self, size: int, reduce: str) -> Tensor:
        return self._stats(size, (reduce,)).blocks[reduce]

    def _received(self) -> Tensor:
        self._stats(stats=("received",))
        return self._memo["received",]

    def _entropy(self) -> Tensor:
        self._stats(stats=("entropy",))
        return self._memo["entropy",]

    def _distance(self, window: int | None) -> Tensor:
        self._stats(stats=("distance" if window is None else "windowed",), window=window)
        return self._memo["distance", window]

    def _distance2(self) -> Tensor:
        self._stats(stats=("distance2",))
        return self._memo["distance2",]

    def _mass(self, mod: Mod | Tensor) -> Tensor:
        return self._stats(mass={"": mod}).mass[""]

    def _topk(self, k: int) -> TopK:
        if k == 1:
            self._stats(stats=("top1",))
        else:
            self._stats(topk=k)
        return self._memo["topk", k]


def _chosen_rows(bias: Callable[[int, int], Tensor], chosen: list[int]) -> Callable[[int, int], Tensor]:
    def rows(lo: int, hi: int) -> Tensor:
        part = bias(lo, hi)
        axis = part.ndim - 3
        if axis < 0 or part.shape[axis] == 1:
            return part
        return part.index_select(axis, torch.tensor(chosen, device=part.device))

    return rows
