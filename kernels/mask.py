"""Which keys a query may see, as a description instead of an N x N tensor.

Positions: query row i stands at absolute position ``i + offset``, key column j at position j. With a key-value cache the
offset is the number of keys that came before the first query.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def in_window(q: Tensor, k: Tensor, window: int) -> Tensor:
    """Whether key k lies in query q's causal window of ``window`` tokens: ``0 <= q - k < window``. The only such line."""
    return (q - k >= 0) & (q - k < window)


@dataclass(frozen=True, eq=False)
class Mask:
    """Allowed (query, key) pairs: the conjunction of the parts that are set.

    ``causal``: ``k <= q``. ``window``: ``0 <= q - k < window`` (with ``causal=False``: ``|q - k| < window``).
    ``prefix``: the first ``prefix`` keys are visible to every query, whatever ``causal`` and ``window`` say.
    ``documents`` ``[B, K]`` int: query and key must carry the same number. ``keys`` ``[B, K]`` bool: False hides a key
    (padding). ``dense`` ``[B or 1, H or 1, Q, K]`` bool: an explicit mask, for short inputs.
    """

    causal: bool = False
    window: int | None = None
    prefix: int = 0
    documents: Tensor | None = None
    keys: Tensor | None = None
    dense: Tensor | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window keeps at least one key; got window={self.window}")
        if self.dense is not None and (self.dense.ndim != 4 or self.dense.dtype != torch.bool):
            raise ValueError(f"a dense mask is bool [B, H, Q, K]; got {self.dense.dtype} {list(self.dense.shape)}")
        for name in ("documents", "keys"):
            part = getattr(self, name)
            if part is not None and part.ndim != 2:
                raise ValueError(f"mask part {name!r} is [B, K]; got {list(part.shape)}")

    def check(self, shape: tuple[int, int, int, int]) -> None:
        """Raise ``ValueError`` naming the part that does not fit a map of shape ``(B, H, Q, K)``."""
        b, h, q, k = shape
        for name in ("documents", "keys"):
            part = getattr(self, name)
            if part is not None and (part.shape[0] not in (1, b) or part.shape[1] != k):
                raise ValueError(f"mask.{name} is [B, K] = [{b}, {k}]; got {list(part.shape)}")
        if self.documents is not None and self.offset + q > k:
            raise ValueError(f"mask.documents numbers {k} keys, but queries stand at up to {self.offset + q - 1}")
        if self.dense is not None:
            got = tuple(self.dense.shape)
            if got[0] not in (1, b) or got[1] not in (1, h) or got[2:] != (q, k):
                raise ValueError(f"mask.dense broadcasts to [B, H, Q, K] = {[b, h, q, k]}; got {list(got)}")

    def covers(self, queries: int, keys: int) -> bool:
        """Whether every query is sure to see a key, judged without building the mask. False when in doubt."""
        if self.dense is not None or keys == 0:
            return False
        if self.prefix and self.documents is None:
            return self.keys is None or bool(self.keys[:, : self.prefix].any(1).all())
        last = self.offset + queries - 1
        reaches_self = last < keys if self.window is None or self.causal else last < keys
        if self.keys is None:
            if self.documents is not None:
                return reaches_self
            return self.window is None or last - self.window < keys - 1
        if self.documents is not None or self.window is not None:
            return bool(self.keys.all()) and reaches_self
        return bool((self.keys[:, : self.offset + 1] if self.causal else self.keys).any(1).all())

    def span(self, lo: int, hi: int, keys: int) -> tuple[int, int]:
        """Smallest key range ``[first, last)`` outside of which no query row in ``[lo, hi)`` sees anything."""
        first, last = 0, keys
        if self.causal:
            last = min(keys, max(hi + self.offset, self.prefix))
            if self.window is not None and not self.prefix:
                first = max(0, lo + self.offset - self.window + 1)
        elif self.window is not None and not self.prefix:
            first = max(0, lo + self.offset - self.window + 1)
            last = min(keys, hi + self.offset + self.window - 1)
        return min(first, last), last

    def tile(self, q: slice, k: slice, device: torch.device | str | None = None) -> Tensor | None:
        """Allowed pairs of a tile as bool, broadcastable to ``[B, H, rows, columns]``; None if all are allowed."""
        rows = torch.arange(q.start, q.stop, device=device)[:, None] + self.offset
        columns = torch.arange(k.start, k.stop, device=device)[None, :]
        allowed: Tensor | None = None
        if self.window is not None:
            near = in_window(rows, columns, self.window)
            allowed = near if self.causal else near | in_window(columns, rows, self.window)
        elif self.causal:
            allowed = columns <= rows
        if allowed is not None and self.prefix:
            allowed = allowed | (columns < self.prefix)
        parts = [] if allowed is None else [allowed[None, None]]
        if self.documents is not None:
            documents = self.documents.to(device)
            at = rows[:, 0].clamp(max=documents.shape[1] - 1)
            parts.append((documents[:, at, None] == documents[:, None, k])[:, None])
        if self.keys is not None:
            parts.append(self.keys.to(device)[:, None, None, k])
        if self.dense is not None:
            parts.append(self.dense.to(device)[:, :, q, k])
        if not parts:
            return None
        out = parts[0]
        for part in parts[1:]:
            out = out & part
        return out

    def at(self, offset: int) -> Mask:
        """The same mask with another query offset."""
        return replace(self, offset=offset)
