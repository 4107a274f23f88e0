"""Attention scores of any tile: what softmax attention exponentiates, before the exponential.

    s_ij = cap(scale * q_i . k_j) + bias_ij,   cap(x) = softcap * tanh(x / softcap) or x,   -inf where the mask hides j from i
    lse_i = log(sum_j exp(s_ij) + exp(sink))

Query head h reads key head ``h // (H / G)``; its group's rows are folded into one matrix product, keys are never repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.kernels.mask import SCHEMA, Mask

HIDDEN = -1e30


@dataclass(frozen=True, eq=False)
class Relative:
    """A bias that depends on the distance alone (T5, ALiBi, Music Transformer): query at absolute position i and key j get
    ``table[h, j - i - first]``. ``table`` is ``[H or 1, M]`` for the M distances j - i from ``first`` on. Linear memory."""

    table: Tensor
    first: int

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or not self.table.is_floating_point() or not self.table.numel():
            raise ValueError(f"a relative bias table is [H, M]; got {self.table.dtype} {list(self.table.shape)}")

    def check(self, shape: tuple[int, int, int, int], mask: Mask) -> None:
        """Raise ``ValueError`` unless every visible pair of a map ``(B, H, Q, K)`` has its distance in the table."""
        _, h, q, k = shape
        if self.table.shape[0] not in (1, h):
            raise ValueError(f"bias: its table has {self.table.shape[0]} heads; q has {h}")
        low = -(mask.offset + q - 1)
        if mask.window is not None and not mask.prefix:
            low = max(low, 1 - mask.window)
        high = k - 1 - mask.offset
        if mask.causal or (mask.window is not None):
            ahead = 0 if mask.causal or mask.window is None else mask.window - 1
            high = min(high, max(ahead, mask.prefix - 1 - mask.offset))
        last = self.first + self.table.shape[1] - 1
        if self.first > low or last < high:
            raise ValueError(f"bias: its table holds distances {self.first} to {last}; this map needs {low} to {high}")

    def tile(self, rows: slice, columns: slice, offset: int) -> Tensor:
        """``[1, H or 1, rows, columns]``; pairs outside the table, which the mask hides, hold the end's value."""
        at = torch.arange(columns.start, columns.stop, device=self.table.device)
        at = at - (torch.arange(rows.start, rows.stop, device=self.table.device)[:, None] + offset + self.first)
        return self.table[:, at.clamp_(0, self.table.shape[1] - 1)][None]


Bias = Tensor | Relative | Callable[[int, int], Tensor]
"""Additive bias: a tensor that broadcasts to ``[B, H, Q, K]``, a ``Relative`` table, or a function (lo, hi) -> rows
``[B or 1, H or 1, hi - lo, K]``. A value of -1e30 or less hides the key, as the mask does."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Accumulation type: float64 stays, everything narrower than float32 becomes float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of q ``[B, H, Q, E]`` against k ``[B, G, K, E]``, checked once at construction.

    ``scale`` defaults to ``E ** -0.5``. ``sink`` ``[H]`` is one more logit per head in the denominator; it has no key.
    Raises ``ValueError`` naming the argument at fault.
    """

    q: Tensor
    k: Tensor
    mask: Mask
    scale: float | None = None
    softcap: float | None = None
    sink: Tensor | None = None
    bias: Bias | None = None

    def __post_init__(self) -> None:
        q, k = self.q, self.k
        for name, tensor in (("q", q), ("k", k)):
            if not isinstance(tensor, Tensor) or tensor.ndim != 4:
                got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{name} is a tensor [B, heads, tokens, E]; got {got}")
            if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"{name} is float64, float32, bfloat16 or float16; got {tensor.dtype}")
        (b, h, _, e), (bk, g, _, ek) = q.shape, k.shape
        if (bk, ek) != (b, e):
            raise ValueError(f"k must share B={b} and E={e} with q {list(q.shape)}; got k {list(k.shape)}")
        if g == 0 or h % g:
            raise ValueError(f"k: its {g} heads must divide the {h} heads of q")
        if k.dtype != q.dtype or k.device != q.device:
            raise ValueError(f"k must have q's dtype and device ({q.dtype}, {q.device}); got {k.dtype}, {k.device}")
        if 0 in (*self.shape, e):
            raise ValueError(f"q and k must not be empty; got q {list(q.shape)} and k {list(k.shape)}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap is a positive number; got {self.softcap}")
        if self.sink is not None and self.sink.shape != (h,):
            raise ValueError(f"sink is one logit per query head, [{h}]; got {list(self.sink.shape)}")
        if self.scale is None:
            object.__setattr__(self, "scale", e**-0.5)
        self.mask.check(self.shape)
        if isinstance(self.bias, Tensor):
            self._check_bias(self.bias, self.shape, "bias")
        elif isinstance(self.bias, Relative):
            self.bias.check(self.shape, self.mask)
        elif self.bias is not None and not callable(self.bias):
            kinds = "a tensor, a Relative table or a function (lo, hi) -> rows"
            raise ValueError(f"bias is {kinds}; got {type(self.bias).__name__}")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(B, H, Q, K)``."""
        return (self.q.shape[0], self.q.shape[1], self.q.shape[2], self.k.shape[2])

    @property
    def dtype(self) -> torch.dtype:
        return working_dtype(self.q.dtype)

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """Scores ``[B, H, rows, columns]`` in the working type, -inf where hidden. A fresh tensor: safe to overwrite."""
        assert self.scale is not None
        b, h, _, e = self.q.shape
        g = self.k.shape[1]
        q = self.q[:, :, rows].to(self.dtype) * self.scale
        n = q.shape[2]
        k = self.k[:, :, columns].to(self.dtype)
        s = (q.reshape(b, g, h // g * n, e) @ k.transpose(-1, -2)).view(b, h, n, k.shape[2])
        if self.softcap is not None:
            s = s.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.bias is not None:
            bias = self.bias_tile(rows, columns)
            s += bias.masked_fill(bias <= HIDDEN, float("-inf"))
        allowed = self.mask.tile(rows, columns, s.device)
        return s if allowed is None else s.masked_fill_(~allowed, float("-inf"))

    def sink_logits(self) -> Tensor | None:
        """``[1, H, 1]`` in the working type."""
        return None if self.sink is None else self.sink.to(self.q.device, self.dtype)[None, :, None]

    def bias_tile(self, rows: slice, columns: slice, batch: slice = slice(None), heads: slice = slice(None)) -> Tensor:
        """Bias of a tile in the working type, broadcastable to ``[B, H, rows, columns]`` of these examples and heads."""
        b, h, _, k = self.shape
        if isinstance(self.bias, Relative):
            part = self.bias.tile(rows, columns, self.mask.offset).to(self.q.device, self.dtype)
            return part[:, heads] if part.shape[1] > 1 else part
        if isinstance(self.bias, Tensor):
            part = self.bias[(None,) * (4 - self.bias.ndim)]
            part = part[:, :, rows] if part.shape[2] > 1 else part
        else:
            assert self.bias is not None
            part = self.bias(rows.start, rows.stop)
            self._check_bias(part, (b, h, rows.stop - rows.start, k), f"bias({rows.start}, {rows.stop})")
            part = part[(None,) * (4 - part.ndim)]
        part = part[..., columns] if part.shape[3] > 1 else part
        part = part[batch] if part.shape[0] > 1 else part
        part = part[:, heads] if part.shape[1] > 1 else part
        return part.to(self.q.device, self.dtype)

    @staticmethod
    def _check_bias(bias: Tensor, shape: tuple[int, int, int, int], name: str) -> None:
        if bias.ndim > 4 or any(n not in (1, full) for n, full in zip(bias.shape[::-1], shape[::-1], strict=False)):
            raise ValueError(f"{name} must broadcast to [B, H, rows, K] = {list(shape)}; got {list(bias.shape)}")


SCORES_SCHEMA = (
    f"Tensor q, Tensor k, {SCHEMA}, float? scale, float? softcap, Tensor? sink, Tensor? bias, int? bias_first"
)
"""``score_parts`` in the schema language of ``torch.library``; ``bias_first`` is set if ``bias`` is a ``Relative``'s table."""
N_SCORES = 2 + SCHEMA.count(",") + 1 + 5


def score_parts(scores: Scores) -> tuple[Any, ...]:
    """Scores as plain arguments of a custom operator; not for a bias function. ``scores_of`` makes them scores again."""
    given = scores.bias
    bias, first = (given.table, given.first) if isinstance(given, Relative) else (given, None)
    assert bias is None or isinstance(bias, Tensor)
    return (scores.q, scores.k, *scores.mask.parts(), scores.scale, scores.softcap, scores.sink, bias, first)


def scores_of(parts: tuple[Any, ...]) -> Scores:
    q, k, *mask, scale, softcap, sink, bias, first = parts
    return Scores(q, k, Mask(*mask), scale, softcap, sink, bias if first is None else Relative(bias, first))
