"""Of several needles in one context, does a head go to the one that is asked for?

Every context holds n needles and is asked for each of them in turn; only the question changes. While the answer is written,
the largest weight of a head's last row lies on the needle asked for (``asked``), on another one (``others``), or elsewhere:

    right = asked / (asked + others),    counted over all turns of a context, then averaged over contexts.

A head that likes a place or a kind of sentence goes to the same needle whatever is asked and is right in 1 / n of the turns: the
null. Question and answer alone tell the turns apart, so what changes between them is caused by the question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model
from workbench.models.requests import check_length
from workbench.pairs import Pairs
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled
from workbench.probes.retrieval.copy_scores import recall_of
from workbench.probes.retrieval.copying import RECALL, steps_of, target
from workbench.probes.retrieval.decoding import decode
from workbench.probes.retrieval.haystack import Prompts, haystack_prompts
from workbench.probes.tables import HeadTable
from workbench.run import Provenance


@dataclass(frozen=True)
class NeedleChoice(HeadTable):
    """Measures ``right``, ``asked``, ``others`` per head, see the module. ``recall``: part of the needles asked for that the
    model wrote; ``confused``: part of the turns in which it wrote another needle of the context instead."""

    needles: int = 0
    recall: float = float("nan")
    confused: float = float("nan")


def needle_choice(
    model: Model,
    lengths: Sequence[int] | int = 96,
    depths: Sequence[float] = (0.0, 0.5, 1.0),
    *,
    distractors: int = 2,
    needles: Sequence[Sequence[str]] | None = None,
    texts: str | Sequence[str] | None = None,
    prompts: Prompts | None = None,
    trials: int = 4,
    max_new_tokens: int | None = None,
    cache: bool = True,
    seed: int = 0,
) -> NeedleChoice:
    """Where the heads look when one of several needles in one context is asked for.

    Contexts are ``trials`` per length and depth (of the first needle) of ``wb.task("needle")`` with ``distractors`` further
    facts; or one per cell with ``needles`` (fact, question, answer) and ``texts`` as in ``haystack_prompts``; or come from
    ``prompts(length, depth, seed)``: the n turns of one context in a row, the other needles named by spans ``OTHER.0``,
    ``OTHER.1`` ... Turns in which the model fails are left out; without any other, measures are undefined. ``right`` is NaN
    for a head that never looks at a needle. Intervals are over contexts; shares are of the steps of an answer.
    """
    sizes = (lengths,) if isinstance(lengths, int) else tuple(lengths)
    source = prompts if prompts is not None else _default(model, distractors, needles, texts, trials)
    turns: list[_Turn] = []
    layers: tuple[int | str, ...] = ()
    provenance = Provenance(model.name)
    context = 0
    for cell, (length, depth) in enumerate((length, depth) for length in sizes for depth in depths):
        pairs = source(length, depth, seed + cell)
        spans, others = target(pairs), _others(pairs)
        n = 1 + len(others)
        if len(pairs) % n:
            raise WorkbenchError(f"{len(pairs)} prompts are no turns of contexts with {n} needles")
        for i in range(len(pairs)):
            prompt = pairs.clean[i : i + 1, : int(pairs.position[i]) + 1]
            check_length(prompt.shape[1], model.shape)
            steps = steps_of(model, prompt, spans[i : i + 1], max_new_tokens)
            decoded = decode(model, prompt, steps, cache=cache)
            keys = decoded.keys[decoded.alive[0], 0]
            written = decoded.tokens[0, decoded.alive[0]]
            line = prompt[0].cpu()
            recalls = [recall_of(written, line[lo:hi], torch.tensor([-1])) for lo, hi in _turn(spans, others, i)]
            looks = [((keys >= lo) & (keys < hi)).double().mean(0) for lo, hi in _turn(spans, others, i)]
            turns.append(_Turn(context + i // n, recalls, looks[0], torch.stack(looks[1:]).sum(0)))
        context += len(pairs) // n
        layers, provenance = decoded.layers, decoded.last.provenance
    return _table(turns, n, layers, provenance)


class _Turn(NamedTuple):
    """One question: ``recalls`` of the needle asked for and of the others; looks ``[L, H]``."""

    context: int
    recalls: list[float]
    asked: Tensor
    others: Tensor


def _table(turns: list[_Turn], n: int, layers: tuple[int | str, ...], provenance: Provenance) -> NeedleChoice:
    solved = [turn for turn in turns if turn.recalls[0] > RECALL]
    confused = sum(max(turn.recalls[1:]) > max(RECALL, turn.recalls[0]) for turn in turns)
    shape = turns[0].asked.shape
    rows: dict[str, list[Tensor]] = {"right": [], "asked": [], "others": []}
    for context in sorted({turn.context for turn in solved}):
        own = [turn for turn in solved if turn.context == context]
        asked, others = (torch.stack([getattr(turn, name) for turn in own]) for name in ("asked", "others"))
        rows["right"].append(asked.sum(0) / (asked + others).sum(0))  # 0 / 0: no needle was looked at
        rows["asked"].append(asked.mean(0))
        rows["others"].append(others.mean(0))
    nothing = torch.full((1, *shape), float("nan"), dtype=torch.float64)
    kept = {name: torch.stack(each) if each else nothing for name, each in rows.items()}
    bounds = {name: interval(each) for name, each in kept.items()}
    mean = {name: each.nanmean(0) for name, each in kept.items()}
    undefined = {} if solved else {"right": f"the model wrote none of the {len(turns)} needles it was asked for"}
    undefined |= {
        f"{layers[i]}.{h}": "never looks at a needle"
        for i, h in (mean["right"].isnan().nonzero().tolist() if solved else ())
    }

    def by_layer(values: Tensor) -> dict[int | str, Tensor]:
        return dict(zip(layers, values, strict=True))

    return NeedleChoice(
        title=f"Which of {n} needles",
        values={name: by_layer(each) for name, each in mean.items()},
        units={"right": "part of the looks at needles", "asked": "part of the steps", "others": "part of the steps"},
        low={name: by_layer(low) for name, (low, _) in bounds.items()},
        high={name: by_layer(high) for name, (_, high) in bounds.items()},
        null={"right": by_layer(torch.full(shape, 1 / n, dtype=torch.float64))},
        undefined=undefined,
        provenance=provenance,
        needles=n,
        recall=sum(turn.recalls[0] for turn in turns) / len(turns),
        confused=confused / len(turns),
    )


def _others(pairs: Pairs) -> list[Tensor]:
    found = [pairs.spans[name] for name in pairs.spans if name.startswith("OTHER.")]
    if not found:
        raise WorkbenchError(
            f"prompts name the other needles by spans OTHER.0, OTHER.1 ...; these have: {', '.join(pairs.spans) or 'none'}"
        )
    return found


def _turn(spans: Tensor, others: list[Tensor], i: int) -> list[list[int]]:
    """Spans of example i: of the needle asked for, then of the others."""
    return [spans[i].tolist(), *(other[i].tolist() for other in others)]


def _default(
    model: Model,
    distractors: int,
    needles: Sequence[Sequence[str]] | None,
    texts: str | Sequence[str] | None,
    trials: int,
) -> Prompts:
    if (needles is None) != (texts is None):
        raise WorkbenchError("needles (fact, question, answer) and texts (the haystack) come together; got one of them")
    if needles is not None and texts is not None:
        if len(needles) < 2:
            raise WorkbenchError(f"several needles are two or more; got {len(needles)}")
        return haystack_prompts(model, needles, texts, together=True)
    if distractors < 1 or trials < 1:
        raise WorkbenchError(f"distractors and trials are at least 1; got {distractors} and {trials}")

    def build(length: int, depth: float, seed: int) -> Pairs:
        import workbench as wb

        task = wb.task("needle", length=length, depth=depth, distractors=distractors, split="test")
        return in_turn(task.build(seed, model.tokenizer, trials), distractors)

    return build


def in_turn(pairs: Pairs, distractors: int) -> Pairs:
    """Prompts of the needle task asked for each of their facts in turn, ``1 + distractors`` rows for each.

    The other facts are found as the same sentence with another key and value: the spans KEY, VALUE and QUERY say which words
    those are. Refuses prompts in which a tokenizer makes them of different lengths, so that they cannot be exchanged.
    """
    clean, answer, spans = [], [], []
    for i, line in enumerate(pairs.clean):
        at = {name: pairs.spans[name][i].tolist() for name in ("NEEDLE", "KEY", "VALUE", "QUERY")}
        facts = _facts(line, at)
        if len(facts) != 1 + distractors:
            raise Refused(
                f"{len(facts)} facts of the form of the needle were found, not {1 + distractors}: with this tokenizer their keys "
                "or values have different lengths; give needles= and texts= of your own"
            )
        (key_lo, key_hi), (lo, hi), (query_lo, query_hi) = at["KEY"], at["VALUE"], at["QUERY"]
        for fact in facts:
            row = line.clone()
            shift = fact - at["NEEDLE"][0]
            row[query_lo:query_hi] = line[key_lo + shift : key_hi + shift]
            clean.append(row)
            answer.append(line[lo + shift : lo + shift + 1])
            moved = [other - at["NEEDLE"][0] for other in (fact, *(f for f in facts if f != fact))]
            spans.append([(lo + step, hi + step) for step in moved])
    found = torch.tensor(spans)  # [rows, needles, 2]
    named = {"VALUE": found[:, 0]} | {f"OTHER.{j}": found[:, 1 + j] for j in range(distractors)}
    rows = torch.stack(clean)
    return replace(
        pairs,
        clean=rows,
        corrupt=rows,
        answer=torch.stack(answer),
        wrong=torch.full((len(rows), 1), -1),
        position=pairs.position.repeat_interleave(1 + distractors),
        spans=named,
        labels={},
        texts=(),
    )


def _facts(line: Tensor, at: dict[str, list[int]]) -> list[int]:
    """Where sentences like the needle's start, its own first."""
    (lo, hi), key, value = at["NEEDLE"], at["KEY"], at["VALUE"]
    fixed = torch.ones(hi - lo, dtype=torch.bool)
    for start, end in (key, value):
        fixed[start - lo : end - lo] = False
    windows = line.unfold(0, hi - lo, 1)
    alike = (windows[:, fixed] == line[lo:hi][fixed]).all(1).nonzero()[:, 0].tolist()
    return [lo, *(start for start in alike if start != lo)]


ANALYSES = (
    Analysis(
        name="needle-choice",
        question="Of several needles in one context, does a head go to the one that is asked for?",
        function=needle_choice,
        example=lambda: {
            "model": bundled("compiled-needle"),
            "lengths": 64,
            "depths": (0.2, 0.8),
            "trials": 2,
        },
        paper="Wu et al. 2024 (arXiv 2404.15574), section 2: needles with several facts",
        source="model",
        null="1 / needles, what a head that ignores the question is right in",
        cause="the question alone changes between the turns",
        definition="our definition: the published sweeps have one needle per context",
    ),
)
