"""The prompts of the needle test: those of the bundled task, or needles of your own in text of your own for any tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from workbench.errors import WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs

Prompts = Callable[[int, float, int], Pairs]
"""``prompts(length, depth, seed)``: examples of ``length`` tokens with the needle at ``depth`` (0 start, 1 end)."""

QUESTION = "\nBased on the content of the book, Question: {question}\nAnswer:"


def default_prompts(
    model: Model,
    trials: int = 4,
    needles: Sequence[tuple[str, str]] | None = None,
    texts: str | Sequence[str] | None = None,
) -> Prompts:
    """The prompts ``retrieval_heads`` uses when none are given."""
    if (needles is None) != (texts is None):
        raise WorkbenchError("needles (fact, question) and texts (the haystack) come together; got only one of them")
    if needles is not None and texts is not None:
        return haystack_prompts(model, needles, texts)
    if trials < 1:
        raise WorkbenchError(f"trials is at least 1 per cell; got {trials}")

    def build(length: int, depth: float, seed: int) -> Pairs:
        import workbench as wb

        return wb.task("needle", length=length, depth=depth, split="test").build(seed, model.tokenizer, trials)

    return build


def haystack_prompts(
    model: Model, needles: Sequence[tuple[str, str]], texts: str | Sequence[str], question: str = QUESTION
) -> Prompts:
    """``prompts(length, depth, seed)``: one example per needle, ``(fact, question)``, of ``length`` tokens.

    ::

        <bos> haystack ... fact ... haystack <question> Answer:     clean, the fact's tokens are the span NEEDLE
        <bos> haystack ... more haystack ... <question> Answer:     corrupt

    The haystack is ``texts`` joined, repeated if too short, starting at a place drawn from ``seed``; the fact is
    moved back to the end of a sentence if there is one. Refuses a fact that the haystack contains or whose words the
    tokenizer does not know, and lengths without room.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise WorkbenchError(f"{model.name} has no tokenizer: give prompts(length, depth, seed) instead of texts")
    if not needles or not all(len(pair) == 2 for pair in needles):
        raise WorkbenchError("needles are pairs (fact, question); none or something else was given")
    joined = texts if isinstance(texts, str) else "\n".join(texts)
    if not joined.strip():
        raise WorkbenchError("the haystack is empty")
    for fact, _ in needles:
        if fact.strip() in joined:
            raise WorkbenchError(f"the haystack contains the needle already: {fact!r}")

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    unknown = getattr(tokenizer, "unk_token_id", None)
    for fact, _ in needles:
        if unknown is not None and unknown in ids(" " + fact.strip()):
            raise WorkbenchError(f"the tokenizer of {model.name} does not know every word of the needle {fact!r}")
    hay = ids(joined)
    stops = {ids(f"a{mark}")[-1] for mark in (".", "?", "!")}
    first = [tokenizer.bos_token_id] if getattr(tokenizer, "bos_token_id", None) is not None else []

    def build(length: int, depth: float, seed: int) -> Pairs:
        generator = torch.Generator().manual_seed(seed)
        clean, corrupt, spans, answers = [], [], [], []
        for fact, asked in needles:
            needle, tail = ids(" " + fact.strip()), ids(question.format(question=asked))
            room = length - len(first) - len(needle) - len(tail)
            if room < 1:
                raise WorkbenchError(
                    f"{length} tokens leave no room for the haystack: needle and question take {length - room}"
                )
            start = int(torch.randint(len(hay), (1,), generator=generator))
            stretch = [hay[(start + i) % len(hay)] for i in range(room + len(needle))]
            at = round(depth * room)
            at = next((i for i in range(at, 0, -1) if stretch[i - 1] in stops), at) if 0 < at < room else at
            spans.append((len(first) + at, len(first) + at + len(needle)))
            clean.append(first + stretch[:at] + needle + stretch[at:room] + tail)
            corrupt.append(first + stretch + tail)
            answers.append(sorted(set(needle)))
        width = max(map(len, answers))
        answer = torch.tensor([row + [-1] * (width - len(row)) for row in answers])
        return Pairs(
            clean=torch.tensor(clean),
            corrupt=torch.tensor(corrupt),
            answer=answer,
            wrong=torch.full((len(needles), 1), -1),
            position=torch.full((len(needles),), length - 1),
            spans={"NEEDLE": torch.tensor(spans)},
            labels={"fact": tuple(fact for fact, _ in needles)},
        )

    return build
