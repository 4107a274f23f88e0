"""Random tokens that repeat after a period, and their twins that do not."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model

_SHORTEST = 4


def repeats(
    model: Model, batches: int, sequences: int, period: tuple[int, int], generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of id tensors ``[sequences, 1 + 2 p]``, p drawn per batch from the closed range ``period``.

    ::

        repeated   <bos> a b c d a b c d
        control    <bos> a b c d e f g h      (all tokens different)

    Special tokens are never drawn; the first token is the tokenizer's bos or cls token, left out where it has neither.
    The period is cut to what the context and the vocabulary allow; less than four tokens are refused.
    """
    low, high = period
    if not _SHORTEST <= low <= high:
        raise WorkbenchError(f"period is a range (low, high) with {_SHORTEST} <= low <= high; got {period}")
    start, words = vocabulary(model)
    room = [len(words) // 2]
    if model.shape.context is not None:
        room.append((model.shape.context - len(start)) // 2)
    if min(room) < _SHORTEST:
        raise Refused(
            f"{model.name} has {len(words)} ordinary tokens and a context of {model.shape.context}: no room for "
            f"{_SHORTEST} different tokens and their repeat"
        )
    low, high = min(low, *room), min(high, *room)
    for _ in range(batches):
        p = int(torch.randint(low, high + 1, (1,), generator=generator))
        picks = torch.stack([words[torch.randperm(len(words), generator=generator)[: 2 * p]] for _ in range(sequences)])
        head = start.expand(sequences, -1)
        yield torch.cat([head, picks[:, :p], picks[:, :p]], 1), torch.cat([head, picks], 1)


def vocabulary(model: Model) -> tuple[Tensor, Tensor]:
    """The token every prompt starts with (empty if none) and the ids of ordinary tokens."""
    if model.shape.vocab is None:
        raise Refused(f"{model.name} has no token vocabulary: these scores need a model that reads tokens")
    tokenizer = model.tokenizer
    special = set(getattr(tokenizer, "all_special_ids", ()) or ())
    size = model.shape.vocab if tokenizer is None else min(model.shape.vocab, len(tokenizer))
    first = next(
        (i for name in ("bos", "cls") if (i := getattr(tokenizer, f"{name}_token_id", None)) is not None), None
    )
    start = torch.tensor([] if first is None else [first], dtype=torch.long)
    return start, torch.tensor([i for i in range(size) if i not in special], dtype=torch.long)
