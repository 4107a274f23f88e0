"""FlexAttention (``torch.nn.attention.flex_attention``): its output, and a map that needs no Q x K numbers.

    s_ij = score_mod(scale q_i . k_j, b, h, i, j),   -inf unless block_mask and its mask_mod show j to i
    M_ij = exp(s_ij - lse_i)

The mods are the caller's own functions of (b, h, i, j). They are evaluated per tile when the map is asked, and not in blocks that
the ``BlockMask`` leaves out. FlexAttention called without ``torch.compile`` builds all scores; pass
``attention=torch.compile(flex_attention)`` to have its fused kernel. The map is linear in tokens either way.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.adapters.flex_masks import indices, mask_of, over_tile
from workbench.attention_map import CHUNK, AttentionMap
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Scores
from workbench.maps import head_index
from workbench.mods import Mod
from workbench.patterns.softmax import SoftmaxMap

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""How far FlexAttention may be from float64 on the rows that are checked, relative to 1 + the largest number there."""


def from_flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | None = None,
    mask_mod: Mod | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    offset: int = 0,
    attention: Callable[..., Any] | None = None,
) -> tuple[Tensor, AttentionMap]:
    """FlexAttention's output ``[B, H, Q, V]`` for q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]``, and its map.

    ``score_mod``, ``block_mask``, ``scale`` and ``enable_gqa`` are FlexAttention's own. ``mask_mod`` stands for a block mask
    that is made of it here (torch builds Q x K numbers for that: make it once with ``create_block_mask`` for long inputs).
    ``offset`` tells where query 0 stands, for distances; mods count queries from 0, as FlexAttention does. ``attention`` is the
    function that is called, by default torch's own without compilation.

    Without ``score_mod`` the map is a ``SoftmaxMap``; a mask made by ``to_mask_mod`` is known by what it was made of, so that
    the fused statistics apply. Three rows are computed again in float64: an output that the mods do not explain is refused,
    and a log-sum-exp that is not the natural log (back ends have returned base 2) is computed here, with a warning.
    """
    from torch.nn.attention import flex_attention as flex

    if mask_mod is not None and block_mask is not None:
        raise WorkbenchError("from_flex takes a block_mask or a mask_mod: a BlockMask holds its mod already")
    _check(q, k, v, enable_gqa)
    if mask_mod is not None:
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        block_mask = flex.create_block_mask(mask_mod, *shape, device=q.device)
    mask, hide = mask_of(block_mask, offset)
    noop = block_mask is not None and block_mask.mask_mod is flex.noop_mask
    if attention is None and noop and mask.blocks is not None:
        raise Refused(
            "uncompiled FlexAttention looks at the mask_mod alone and ignores which blocks a BlockMask lists: give this one a "
            "mask_mod, or pass attention=torch.compile(flex_attention)"
        )
    call = attention or flex.flex_attention
    options: dict[str, Any] = dict(score_mod=score_mod, block_mask=block_mask, scale=scale, enable_gqa=enable_gqa)
    try:
        out, aux = call(q, k, v, **options, return_aux=flex.AuxRequest(lse=True))
        lse = aux.lse
    except (NotImplementedError, RuntimeError) as error:
        if "return_lse" not in str(error):
            raise
        # Compiled for a CPU, it has no log-sum-exp yet.
        out, lse = call(q, k, v, **options), None
    lse = _checked(q, k, v, out, lse, mask, hide, score_mod, scale)
    if score_mod is not None:
        return out, ScoreModMap(q, k, lse, mask=mask, mask_mod=hide, score_mod=score_mod, scale=scale)
    bias = None if hide is None else _Hidden(hide, q.shape[0], q.shape[1], k.shape[2], q.device)
    found = SoftmaxMap(q, k, lse, mask=mask, scale=scale, bias=bias)
    if found.row_sum == "1" and bias is not None:
        found.row_sum = "<=1"
    if lse is not None and not bool(lse.isneginf().any()):
        found.row_sum = "1"
    return out, found


class ScoreModMap(AttentionMap):
    """M_ij = exp(score_mod(scale q_i . k_j) - lse_i) where ``mask`` and ``mask_mod`` show the key, made by tiles.

    ``q`` ``[B, H, Q, E]``, ``k`` ``[B, G, K, E]``, ``lse`` ``[B, H, Q]`` (computed on first use if not given). The mods are
    functions of scalars, mapped over the tile as FlexAttention maps them; ``chosen`` are the numbers of the heads that they
    get, if not 0 to H - 1. Rows sum to 1, or to 0 where no key is shown.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor | None,
        *,
        mask: Mask,
        score_mod: ScoreMod,
        mask_mod: Mod | None = None,
        scale: float | None = None,
        chosen: Sequence[int] | None = None,
    ) -> None:
        try:
            self.scores = Scores(q.detach(), k.detach(), Mask(offset=mask.offset), scale)
            mask.check(self.scores.shape)
        except ValueError as error:
            raise WorkbenchError(str(error)) from None
        super().__init__(self.scores.shape, kv_heads=k.shape[1], offset=mask.offset)
        self.mask, self.mask_mod, self.score_mod = mask, mask_mod, score_mod
        self._chosen = list(range(self.shape[1])) if chosen is None else list(chosen)
        self._lse = None if lse is None else lse.detach().to(self.scores.dtype)
        self.row_sum = "1" if lse is not None and not bool(lse.isneginf().any()) else "<=1"

    @property
    def lse(self) -> Tensor:
        """Natural log of the row denominators, ``[B, H, Q]``."""
        if self._lse is None:
            b, h, q, k = self.shape
            step = max(1, CHUNK // (b * h * k))
            parts = [self._scores(lo, min(q, lo + step), 0, k).logsumexp(-1) for lo in range(0, q, step)]
            self._lse = torch.cat(parts, 2)
        return self._lse

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self._tile(lo, hi, 0, self.shape[3])

    def heads(self, indices: Sequence[int]) -> ScoreModMap:
        picked = head_index(indices, self.shape[1])
        group = self.shape[1] // self.kv_heads
        return ScoreModMap(
            self.scores.q[:, picked],
            self.scores.k[:, [head // group for head in picked]],
            None if self._lse is None else self._lse[:, picked],
            mask=self.mask.select(heads=torch.tensor(picked)),
            mask_mod=self.mask_mod,
            score_mod=self.score_mod,
            scale=self.scores.scale,
            chosen=[self._chosen[head] for head in picked],
        )

    def _tile(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        b, h, _, keys = self.shape
        out = torch.zeros(b, h, q_hi - q_lo, k_hi - k_lo, dtype=self.scores.dtype, device=self.scores.q.device)
        first, last = self.mask.span(q_lo, q_hi, keys) if q_hi > q_lo else (0, 0)
        left, right = max(first, k_lo), min(last, k_hi)
        if left < right:
            lse = self.lse[:, :, q_lo:q_hi, None]
            weights = (self._scores(q_lo, q_hi, left, right) - lse.masked_fill(lse.isinf(), 0.0)).exp()
            out[..., left - k_lo : right - k_lo] = weights
        return out

    def _scores(self, lo: int, hi: int, left: int, right: int) -> Tensor:
        """Scores of a tile, -inf where hidden."""
        with torch.no_grad():
            raw = self.scores.tile(slice(lo, hi), slice(left, right))
            at = indices(self.shape[0], self.shape[1], (lo, hi), (left, right), raw.device, self._chosen)
            scores = over_tile(self.score_mod, (raw,), *at).to(raw.dtype)
            shown = self.mask.tile(slice(lo, hi), slice(left, right), raw.device)
            if self.mask_mod is not None:
                own = over_tile(self.mask_mod, (), *at)
                shown = own if shown is None else own & shown
            return scores if shown is None else scores.masked_fill(~shown, float("-inf"))


class _Hidden:
    """A mask mod as rows of a bias, 0 or -inf."""

    def __init__(self, mod: Mod, batch: int, heads: int, keys: int, device: torch.device) -> None:
        self.mod, self.batch, self.heads, self.keys, self.device = mod, batch, heads, keys, device

    def __call__(self, lo: int, hi: int) -> Tensor:
        shown = over_tile(self.mod, (), *indices(self.batch, self.heads, (lo, hi), (0, self.keys), self.device))
        return torch.zeros(shown.shape, device=self.device).masked_fill_(~shown, float("-inf"))


def _check(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    for name, part in (("q", q), ("k", k), ("v", v)):
        if not isinstance(part, Tensor) or part.ndim != 4:
            got = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
            raise WorkbenchError(f"{name} is a tensor [B, heads, tokens, width]; got {got}")
    if k.shape[0] != q.shape[0] or v.shape[:3] != k.shape[:3]:
        raise WorkbenchError(
            f"k and v share batch, heads and tokens, and q's batch {q.shape[0]}; got {list(k.shape)} and {list(v.shape)}"
        )
    if q.shape[1] != k.shape[1] and not enable_gqa:
        raise WorkbenchError(f"k has q's {q.shape[1]} heads, or enable_gqa=True is given; got {k.shape[1]} heads")


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    mask: Mask,
    hide: Mod | None,
    score_mod: ScoreMod | None,
    scale: float | None,
) -> Tensor | None:
    """The log-sum-exp if it is the natural one on some rows, else None; raises if the output is not what the mods say."""
    b, h, queries, keys = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    tolerance = TOLERANCE[q.dtype]
    group = h // k.shape[1]
    with torch.no_grad():
        for row in sorted({0, queries // 2, queries - 1}):
            here = slice(row, row + 1)
            factor = q.shape[3] ** -0.5 if scale is None else scale
            query = q[:, :, here].double().view(b, k.shape[1], group, -1) * factor
            s = (query @ k.double().transpose(-1, -2)).view(b, h, 1, keys)
            at = indices(b, h, (row, row + 1), (0, keys), q.device)
            s = s if score_mod is None else over_tile(score_mod, (s,), *at).double()
            for shown in (
                mask.tile(here, slice(0, keys), q.device),
                None if hide is None else over_tile(hide, (), *at),
            ):
                s = s if shown is None else s.masked_fill(~shown, float("-inf"))
            exact = s.logsumexp(-1)
            weights = (s - exact[..., None].masked_fill(exact[..., None].isinf(), 0.0)).exp()
            wanted = (weights.view(b, k.shape[1], group, keys) @ v.double()).view(b, h, 1, v.shape[3])
            away = float((wanted - out[:, :, here]).abs().max())
            if not away <= tolerance * (1 + float(v.abs().max())):
                raise Refused(
                    f"FlexAttention's output of row {row} is {away:.2g} away from what score_mod and mask give: no map would "
                    "be exact"
                )
            if lse is not None and not _close(lse[:, :, here], exact, tolerance):
                base = _close(lse[:, :, here] * math.log(2.0), exact, tolerance)
                told = "is in base 2" if base else "is not the natural log of the row's denominator"
                warnings.warn(f"FlexAttention's log-sum-exp {told}: it is computed here instead", stacklevel=3)
                lse = None
    return lse


def _close(lse: Tensor, exact: Tensor, tolerance: float) -> bool:
    return torch.allclose(lse.double(), exact, rtol=tolerance, atol=tolerance)
