"""Prompts of the needle test as the scores take them: one length per batch, the needle's place, chance elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.pairs import Pairs

NAMES = ("NEEDLE", "needle", "VALUE")


def needle_spans(pairs: Pairs, span: str | None = None) -> Tensor:
    """Where the needle stands, ``[B, 2]``: the span of that name, by default the first of ``NAMES`` that there is."""
    names = NAMES if span is None else (span,)
    name = next((name for name in names if name in pairs.spans), None)
    if name is None:
        raise WorkbenchError(
            f"the needle is a span named {' or '.join(names)}; these prompts have: {', '.join(pairs.spans) or 'none'}"
        )
    found = pairs.spans[name].cpu()
    if bool((found[:, 0] < 0).any()) or bool((found[:, 1] <= found[:, 0]).any()):
        raise WorkbenchError(f"span {name!r} is absent or empty in some example; give prompts that all have it")
    return found


def by_position(pairs: Pairs | Sequence[Pairs]) -> Iterator[Pairs]:
    """The examples in batches whose answers stand at one position."""
    given = [pairs] if isinstance(pairs, Pairs) else list(pairs)
    if not given or not all(isinstance(part, Pairs) for part in given) or not sum(map(len, given)):
        raise WorkbenchError("expected Pairs, or a list of them; build some with wb.task('needle').build(...)")
    for part in given:
        if len(part.position.unique()) == 1:
            yield part
        else:
            yield from (part[i : i + 1] for i in range(len(part)))


def windows_elsewhere(running: Tensor, lo: int, hi: int, length: int, begin: int = 0) -> Tensor:
    """Sums over every window of ``hi - lo`` keys from ``begin`` to ``length`` that does not touch ``[lo, hi)``.

    ``running`` ``[..., K + 1]`` are cumulative sums over keys, from 0 on. Returns ``[..., W]``, empty if there is no room.
    """
    size = hi - lo
    starts = torch.arange(begin, max(begin, length - size + 1), device=running.device)
    starts = starts[(starts + size <= lo) | (starts >= hi)]
    return running[..., starts + size] - running[..., starts]
