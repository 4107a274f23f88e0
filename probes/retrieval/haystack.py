"""The prompts of the needle test: those of the bundled task, or needles of your own in text of your own for any tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs

Prompts = Callable[[int, float, int], Pairs]
"""``prompts(length, depth, seed)``: examples of ``length`` tokens with the needle at ``depth`` (0 start, 1 end)."""

QUESTION = "\nBased on the content of the book, Question: {question}\nAnswer:"


def default_prompts(
    model: Model,
    trials: int = 4,
    needles: Sequence[Sequence[str]] | None = None,
    texts: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
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
    model: Model,
    needles: Sequence[Sequence[str]],
    texts: str | Sequence[str] | Sequence[Sequence[str]],
    question: str = QUESTION,
    *,
    together: bool = False,
) -> Prompts:
    """``prompts(length, depth, seed)``: one example per needle, ``(fact, question)`` or ``(fact, question, answer)``, of
    ``length`` tokens.

    ::

        <bos> haystack ... fact ... haystack <question> Answer:     clean, the fact's tokens are the span NEEDLE
        <bos> haystack ... more haystack ... <question> Answer:     corrupt

    ``answer`` is the part of the fact that is asked for, the span VALUE. The haystack is ``texts`` joined, repeated if too
    short, starting at a place drawn from ``seed``; with a list of texts for each needle, every needle has a haystack of its own.
    The fact is moved back to the end of a sentence if there is one. With ``together`` all facts stand in one haystack, the first
    at ``depth`` and the others evenly apart from there, round the end; the examples differ in the question alone, and spans
    ``OTHER.0``, ``OTHER.1`` ... are the answers that are not asked for. Refuses a fact that the haystack contains or whose words
    the tokenizer does not know, an answer that is not part of its fact, and lengths without room.
    """
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise WorkbenchError(f"{model.name} has no tokenizer: give prompts(length, depth, seed) instead of texts")
    if not needles or not all(len(pair) in (2, 3) and not isinstance(pair, str) for pair in needles):
        raise WorkbenchError(
            "needles are pairs (fact, question), or (fact, question, answer); none or something else was given"
        )
    joined = _haystacks(texts, len(needles))
    if together and any(hay != joined[0] for hay in joined):
        raise WorkbenchError("needles that stand together have one haystack; give texts as one list")
    for (fact, *_), hay in zip(needles, joined, strict=True):
        if fact.strip() in hay:
            raise WorkbenchError(f"the haystack contains the needle already: {fact!r}")

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    unknown = getattr(tokenizer, "unk_token_id", None)
    facts, values = [], []
    for fact, _, *answer in needles:
        found = ids(" " + fact.strip())
        if unknown is not None and unknown in found:
            raise WorkbenchError(f"the tokenizer of {model.name} does not know every word of the needle {fact!r}")
        facts.append(found)
        values.append(_part(found, ids(" " + answer[0].strip()), fact, answer[0]) if answer else (0, len(found)))
    hays = [ids(text) for text in joined]
    stops = {ids(f"a{mark}")[-1] for mark in (".", "?", "!")}
    first = [tokenizer.bos_token_id] if getattr(tokenizer, "bos_token_id", None) is not None else []
    name = "VALUE" if any(len(pair) == 3 for pair in needles) else "NEEDLE"

    def build(length: int, depth: float, seed: int) -> Pairs:
        generator = torch.Generator().manual_seed(seed)
        clean, corrupt, answers = [], [], []
        spans: dict[str, list[tuple[int, int]]] = {}
        drawn, longest = 0, max(len(ids(question.format(question=asked))) for _, asked, *_ in needles)
        for n, (_, asked, *_) in enumerate(needles):
            tail = ids(question.format(question=asked))
            here = [n, *(i for i in range(len(needles)) if together and i != n)]
            room = length - len(first) - len(tail) - sum(len(facts[i]) for i in here)
            if room < 1 + together * (longest - len(tail)):
                raise WorkbenchError(
                    f"{length} tokens leave no room for the haystack: needle and question take {length - room}"
                )
            if not (together and n):
                drawn = int(torch.randint(len(hays[n]), (1,), generator=generator))
            stretch = [hays[n][(drawn + i) % len(hays[n])] for i in range(room + len(facts[n]))]
            # Facts that stand together do not move with the length of the question.
            span = room if not together else room + len(tail) - longest
            depths = {i: (depth + i / len(needles)) % 1.0 if together and i else depth for i in here}
            places = {i: _sentence_end(stretch, round(share * span), span, stops) for i, share in depths.items()}
            body, starts = _laid(stretch[:room], places, facts)
            clean.append([*first, *body, *tail])
            others = {i: place for i, place in places.items() if i != n}
            corrupt.append([*first, *_laid(stretch, others, facts)[0], *tail])
            named = {"NEEDLE": (n, (0, len(facts[n]))), name: (n, values[n])}
            named |= {f"OTHER.{j}": (i, values[i]) for j, i in enumerate(here[1:])}
            for key, (i, (lo, hi)) in named.items():
                at = len(first) + starts[i]
                spans.setdefault(key, []).append((at + lo, at + hi))
            answers.append(sorted(set(facts[n][slice(*values[n])])))
        width = max(map(len, answers))
        answer = torch.tensor([row + [-1] * (width - len(row)) for row in answers])
        return Pairs(
            clean=torch.tensor(clean),
            corrupt=torch.tensor(corrupt),
            answer=answer,
            wrong=torch.full((len(needles), 1), -1),
            position=torch.full((len(needles),), length - 1),
            spans={key: torch.tensor(rows) for key, rows in spans.items()},
            labels={"fact": tuple(fact for fact, *_ in needles)},
        )

    return build


def _sentence_end(hay: list[int], at: int, room: int, stops: set[int]) -> int:
    """``at``, or the nearest end of a sentence before it; the start and the end of the haystack stay where they are."""
    return next((i for i in range(at, 0, -1) if hay[i - 1] in stops), at) if 0 < at < room else at


def _laid(hay: list[int], places: dict[int, int], facts: list[list[int]]) -> tuple[list[int], dict[int, int]]:
    """The haystack with facts put in at their places, and where each starts."""
    line: list[int] = []
    starts, at = {}, 0
    for i in sorted(places, key=lambda i: places[i]):
        line += hay[at : places[i]]
        at, starts[i] = places[i], len(line)
        line += facts[i]
    return line + hay[at:], starts


def locate_needle(ids: Tensor, needle: Tensor | Sequence[int], overlap: float = 0.9) -> tuple[int, int]:
    """Span ``[lo, hi)`` of a needle in a prompt ``[T]``, found as the authors of the copy score find it: the first window of the
    needle's length that holds more than ``overlap`` of its different tokens.

    Tokenizers split a needle differently inside a text, hence no exact match. With more than ten different tokens the first
    such window can stand a token early. Refuses a prompt without such a window.
    """
    prompt = torch.as_tensor(ids).flatten()
    wanted = torch.as_tensor(needle).flatten().to(prompt)
    if not len(wanted) or not len(prompt):
        raise WorkbenchError("the needle and the prompt have at least one token")
    starts = torch.arange(len(prompt))
    ends = (starts + len(wanted)).clamp(max=len(prompt))
    shares = torch.zeros(len(prompt), dtype=torch.float64)
    different = wanted.unique()
    for token in different:
        seen = torch.cat([torch.zeros(1, dtype=torch.long), (prompt == token).cumsum(0).cpu()])
        shares += seen[ends] > seen[starts]
    shares /= len(different)
    found = (shares > overlap).nonzero()
    if not len(found):
        best = int(shares.argmax())
        raise WorkbenchError(
            f"no {len(wanted)} tokens of the prompt hold more than {overlap:.0%} of the needle's; the nearest, at {best}, hold "
            f"{float(shares[best]):.0%}: was the needle encoded by the prompt's tokenizer?"
        )
    lo = int(found[0, 0])
    return lo, min(len(prompt), lo + len(wanted))


def _haystacks(texts: str | Sequence[str] | Sequence[Sequence[str]], needles: int) -> list[str]:
    """The haystack of each needle."""
    if isinstance(texts, str) or not texts or isinstance(texts[0], str):
        joined = [texts if isinstance(texts, str) else "\n".join(map(str, texts))] * needles
    else:
        if len(texts) != needles:
            raise WorkbenchError(f"a list of texts for each needle: got {len(texts)} lists for {needles} needles")
        joined = ["\n".join(own) for own in texts]
    if not all(hay.strip() for hay in joined):
        raise WorkbenchError("the haystack is empty")
    return joined


def _part(fact: list[int], answer: list[int], text: str, wanted: str) -> tuple[int, int]:
    """Where the answer's tokens stand in the fact's."""
    for lo in range(len(fact) - len(answer) + 1):
        if answer and fact[lo : lo + len(answer)] == answer:
            return lo, lo + len(answer)
    raise WorkbenchError(f"the answer {wanted!r} is no part of the needle {text!r}, token by token")
