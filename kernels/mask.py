"""Which keys a query may see, as a description instead of an N x N tensor.

Positions: query row i stands at absolute position ``i + offset``, key column j at position j. With a key-value cache the
offset is the number of keys that came before the first query.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


def in_window(q: Tensor, k: Tensor, window: int) -> Tensor:
    """Whether key k lies in query q's causal window of ``window`` tokens: ``0 <= q - k < window``. The only such line."""
    return (k <= q) & (q - window < k)


@dataclass(frozen=True, eq=False)
class Mask:
    """Allowed (query, key) pairs: the conjunction of the parts that are set.

    ``causal``: ``k <= q``. ``window``: ``0 <= q - k < window`` (with ``causal=False``: ``|q - k| < window``).
    ``prefix``: the first ``prefix`` keys are visible to every query, whatever ``causal`` and ``window`` say (the other
    parts still hide them). ``documents`` ``[B or 1, K]`` int: query and key must carry the same number; it needs every
    query to stand on a key. ``keys`` ``[B or 1, K]`` bool: False hides a key (padding). ``queries`` ``[B or 1, Q]`` bool:
    False empties a row, so that padding tokens give no mass to anything. ``dense`` ``[B or 1, H or 1, Q, K]`` bool: an
    explicit mask, for short inputs. ``blocks`` ``[B or 1, H or 1, Q/side, K/side]`` (rounded up) bool: False hides a whole
    block of ``side`` query rows by ``side`` keys, counted like the blocks of a block map (rows by index, without the offset).
    """

    causal: bool = False
    window: int | None = None
    prefix: int = 0
    documents: Tensor | None = None
    keys: Tensor | None = None
    dense: Tensor | None = None
    offset: int = 0
    queries: Tensor | None = None
    blocks: Tensor | None = None
    side: int | None = None

    def __post_init__(self) -> None:
        if (self.blocks is None) != (self.side is None):
            raise ValueError(
                "mask.blocks and mask.side go together: which blocks are visible, and how many tokens a side"
            )
        if self.side is not None and (isinstance(self.side, bool) or not isinstance(self.side, int) or self.side < 1):
            raise ValueError(f"mask.side is a positive number of tokens; got {self.side!r}")
        if self.blocks is not None and (self.blocks.ndim != 4 or self.blocks.dtype != torch.bool):
            got = f"{self.blocks.dtype} {list(self.blocks.shape)}"
            raise ValueError(f"mask.blocks is bool [B, H, Q/side, K/side]; got {got}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"mask.window keeps at least one key; got {self.window}")
        for name in ("prefix", "offset"):
            if getattr(self, name) < 0:
                raise ValueError(f"mask.{name} is not negative; got {getattr(self, name)}")
        if self.dense is not None and (self.dense.ndim != 4 or self.dense.dtype != torch.bool):
            raise ValueError(f"mask.dense is bool [B, H, Q, K]; got {self.dense.dtype} {list(self.dense.shape)}")
        for name, axes in (("documents", "[B, K]"), ("keys", "[B, K]"), ("queries", "[B, Q]")):
            part = getattr(self, name)
            if part is None:
                continue
            if part.ndim != 2:
                raise ValueError(f"mask.{name} is {axes}; got {list(part.shape)}")
            if name == "documents" and (part.is_floating_point() or part.dtype == torch.bool):
                raise ValueError(f"mask.documents holds integers; got {part.dtype}")
            if name != "documents" and part.dtype != torch.bool:
                raise ValueError(f"mask.{name} holds bools, False hides; got {part.dtype}")

    def parts(self) -> tuple[Any, ...]:
        """The fields in order, as plain arguments of a custom operator: ``Mask(*mask.parts())`` is the mask again."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def check(self, shape: tuple[int, int, int, int]) -> None:
        """Raise ``ValueError`` naming the part that does not fit a map of shape ``(B, H, Q, K)``."""
        b, h, q, k = shape
        for name, length in (("documents", k), ("keys", k), ("queries", q)):
            part = getattr(self, name)
            if part is not None and (part.shape[0] not in (1, b) or part.shape[1] != length):
                raise ValueError(f"mask.{name} is {[b, length]} or {[1, length]} here; got {list(part.shape)}")
        if self.documents is not None and self.offset + q > k:
            raise ValueError(f"mask.documents numbers {k} positions; the last query stands at {self.offset + q - 1}")
        if self.dense is not None:
            got = tuple(self.dense.shape)
            if got[0] not in (1, b) or got[1] not in (1, h) or got[2:] != (q, k):
                raise ValueError(f"mask.dense broadcasts to [B, H, Q, K] = {[b, h, q, k]}; got {list(got)}")

        if self.blocks is not None and self.side is not None:
            got, want = tuple(self.blocks.shape), (b, h, -(-q // self.side), -(-k // self.side))
            if got[0] not in (1, b) or got[1] not in (1, h) or got[2:] != want[2:]:
                raise ValueError(
                    f"mask.blocks broadcasts to [B, H, Q/{self.side}, K/{self.side}] = {list(want)}; got {list(got)}"
                )

    def covers(self, queries: int, keys: int) -> bool:
        """Whether every query is sure to see a key, judged without building the mask; False when in doubt."""
        if self.dense is not None or self.queries is not None or self.blocks is not None or not keys:
            return False
        last = self.offset + queries - 1
        if last < keys and (self.keys is None or bool(self.keys[:, self.offset : last + 1].all())):
            return True  # every query sees itself
        if self.documents is not None:
            return False
        if self.prefix and (self.keys is None or bool(self.keys[:, : self.prefix].any(1).all())):
            return True
        if self.window is not None:
            return self.keys is None and last - self.window < keys - 1
        if self.keys is None:
            return True
        return bool((self.keys[:, : self.offset + 1] if self.causal else self.keys).any(1).all())

    def span(self, lo: int, hi: int, keys: int) -> tuple[int, int]:
        """A key range ``[first, last)`` outside of which no query row in ``[lo, hi)`` sees anything."""
        first, last = 0, keys
        if self.causal:
            last = min(last, max(hi + self.offset, self.prefix))
        elif self.window is not None:
            last = min(last, max(hi + self.offset + self.window - 1, self.prefix))
        if self.window is not None and not self.prefix:
            first = max(0, lo + self.offset - self.window + 1)
        first = min(first, last)
        if self.documents is not None:
            here = self.documents[:, lo + self.offset : hi + self.offset]
            seen = torch.stack([torch.isin(row, own) for row, own in zip(self.documents, here, strict=True)])
            first, last = _narrow(seen, first, last)
        if self.keys is not None:
            first, last = _narrow(self.keys, first, last)
        if self.blocks is not None and self.side is not None:
            seen = self.blocks[:, :, lo // self.side : -(-hi // self.side)].flatten(0, 2)
            left, right = _narrow(seen, 0, seen.shape[1])
            first, last = max(first, left * self.side), min(last, right * self.side)
            first = min(first, last)
        return first, last

    def open(self, lo: int, hi: int, first: int, last: int) -> tuple[int, int]:
        """A key range inside ``[first, last)`` in which every query row in ``[lo, hi)`` sees every key; may be empty."""
        if any(part is not None for part in (self.documents, self.keys, self.dense, self.queries, self.blocks)):
            return first, first
        low, high = lo + self.offset, hi - 1 + self.offset
        start, stop = first, last
        if self.window is not None:
            start = max(start, high - self.window + 1)
            stop = min(stop, low + 1 if self.causal else low + self.window)
        elif self.causal:
            stop = min(stop, max(low + 1, self.prefix))
        return (start, stop) if start < stop else (first, first)

    def tile(self, q: slice, k: slice, device: torch.device | str | None = None) -> Tensor | None:
        """Allowed pairs of a tile as bool, broadcastable to ``[B, H, rows, columns]``; None if all are allowed.

        ``q`` and ``k`` need explicit bounds and no step.
        """
        device = torch.device("cpu" if device is None else device)
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
            numbers = self.documents.to(device)
            if q.stop + self.offset > numbers.shape[1]:
                raise ValueError(
                    f"mask.documents numbers {numbers.shape[1]} positions; asked up to {q.stop + self.offset - 1}"
                )
            own = numbers[:, q.start + self.offset : q.stop + self.offset]
            parts.append((own[:, :, None] == numbers[:, None, k])[:, None])
        if self.keys is not None:
            parts.append(self.keys.to(device)[:, None, None, k])
        if self.queries is not None:
            parts.append(self.queries.to(device)[:, None, q, None])
        if self.dense is not None:
            parts.append(self.dense.to(device)[:, :, q, k])
        if self.blocks is not None and self.side is not None:
            blocks = self.blocks.to(device)[:, :, torch.arange(q.start, q.stop, device=device) // self.side]
            parts.append(blocks[..., torch.arange(k.start, k.stop, device=device) // self.side])
        if not parts:
            return None
        out = parts[0]
        for part in parts[1:]:
            out = out & part
        return out

    def at(self, offset: int) -> Mask:
        """The same mask with another query offset."""
        return replace(self, offset=offset)

    def select(self, batch: slice = slice(None), heads: slice | Tensor = slice(None)) -> Mask:
        """The mask of some examples and heads."""

        def take(part: Tensor | None) -> Tensor | None:
            return part if part is None or part.shape[0] == 1 else part[batch]

        def pick(part: Tensor | None) -> Tensor | None:
            part = take(part)
            return part if part is None or part.shape[1] == 1 else part[:, heads]

        return replace(
            self,
            documents=take(self.documents),
            keys=take(self.keys),
            queries=take(self.queries),
            dense=pick(self.dense),
            blocks=pick(self.blocks),
        )


def _narrow(seen: Tensor, first: int, last: int) -> tuple[int, int]:
    """``[first, last)`` cut down to the columns that any row of ``seen`` ``[B, K]`` has."""
    at = seen.any(0)[first:last].nonzero()
    return (first + int(at[0]), first + int(at[-1]) + 1) if len(at) else (first, first)


SCHEMA = (
    "bool causal, int? window, int prefix, Tensor? documents, Tensor? keys, Tensor? dense, int offset, Tensor? queries, "
    "Tensor? blocks, int? side"
)
"""``Mask.parts()`` in the schema language of ``torch.library``."""
