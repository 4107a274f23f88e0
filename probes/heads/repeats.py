"""Random tokens that repeat after a period, and their twins that do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model

_SHORTEST = 4


def repeats(
    model: Model,
    batches: int,
    sequences: int,
    period: tuple[int, int],
    generator: torch.Generator,
    words: Sequence[int | str] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of id tensors ``[sequences, 1 + 2 p]``, p drawn per batch from the closed range ``period``.

    ::

        repeated   <bos> a b c d a b c d
        control    <bos> a b c d e f g h      (all tokens different)

    Tokens are drawn from ``words`` (ids or texts of single tokens), or from all but the special ones; the first
    token is the tokenizer's bos or cls token, left out where it has neither. The period is cut to what the context
    and the vocabulary allow; less than four tokens are refused.
    """
    low, high = period
    if not _SHORTEST <= low <= high:
        raise WorkbenchError(f"period is a range (low, high) with {_SHORTEST} <= low <= high; got {period}")
    start, drawn = vocabulary(model, words)
    room = [len(drawn) // 2]
    if model.shape.context is not None:
        room.append((model.shape.context - len(start)) // 2)
    if min(room) < _SHORTEST:
        raise Refused(
            f"{model.name} has {len(drawn)} different tokens to draw and a context of {model.shape.context}: no room for "
            f"{_SHORTEST} different tokens and their repeat"
        )
    low, high = min(low, *room), min(high, *room)
    for _ in range(batches):
        p = int(torch.randint(low, high + 1, (1,), generator=generator))
        picks = torch.stack([drawn[torch.randperm(len(drawn), generator=generator)[: 2 * p]] for _ in range(sequences)])
        head = start.expand(sequences, -1)
        yield torch.cat([head, picks[:, :p], picks[:, :p]], 1), torch.cat([head, picks], 1)


def vocabulary(model: Model, words: Sequence[int | str] | None = None) -> tuple[Tensor, Tensor]:
    """The token every prompt starts with (empty if none) and the ids to draw from; unknown words raise."""
    if model.shape.vocab is None:
        raise Refused(f"{model.name} has no token vocabulary: these scores need a model that reads tokens")
    tokenizer = model.tokenizer
    special = set(getattr(tokenizer, "all_special_ids", ()) or ())
    size = model.shape.vocab if tokenizer is None else min(model.shape.vocab, len(tokenizer))
    first = next(
        (i for name in ("bos", "cls") if (i := getattr(tokenizer, f"{name}_token_id", None)) is not None), None
    )
    start = torch.tensor([] if first is None else [first], dtype=torch.long)
    ids = range(size) if words is None else [_id(word, tokenizer, size) for word in dict.fromkeys(words)]
    return start, torch.tensor([i for i in ids if i not in special], dtype=torch.long)


def task_words(model: Model) -> tuple[int, ...] | None:
    """Ids of the words that ``task("induction")`` repeats, for a native model whose tokenizer has them, else None.

    The bundled models have a few hundred words and were trained to repeat these alone; other words mean nothing to them
    outside of their sentences.
    """
    from workbench.models.native import NativeModel

    if not isinstance(model, NativeModel) or model.tokenizer is None:
        return None
    import workbench as wb

    try:
        clean = wb.task("induction").build(0, model.tokenizer, 64).clean
    except Refused:
        return None
    return tuple(clean.unique().tolist())


def _id(word: int | str, tokenizer: Any, size: int) -> int:
    number = word
    if isinstance(word, str):
        found = tokenizer(word, add_special_tokens=False)["input_ids"] if tokenizer is not None else []
        if len(found) != 1 or found[0] == getattr(tokenizer, "unk_token_id", None):
            raise WorkbenchError(f"{word!r} is not one token of this model's tokenizer")
        number = found[0]
    if not 0 <= int(number) < size:
        raise WorkbenchError(f"token ids lie in [0, {size}); got {number}")
    return int(number)
