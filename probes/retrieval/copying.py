"""Which heads copy the answer out of a long context?

The copy score of Wu et al. (arXiv 2404.15574, section 2): while the model writes token w, a head copies it if the
key with the largest weight in its last attention row lies in the needle and holds the token w. Over a whole answer,

    score = |tokens of the needle that the head copied| / |tokens of the needle|,

averaged over the trials in which the model retrieved the needle (recall of its tokens above one half). Heads at or
above 0.1 are retrieval heads. ``form="published"`` adds 1 / |needle| at every copy as the authors' code does, so that
repeats count and a score may exceed 1; see ``copy_scores``.

Trials the model fails are left out, because a head cannot be seen copying what was not said; if none is left the
score is undefined. Nulls: the same statistic for as many random positions outside the needle, and for a head that
looks anywhere evenly; and, causally, ``masking``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.models.protocol import Model
from workbench.models.requests import check_length
from workbench.pairs import Pairs
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled
from workbench.probes.retrieval.copy_scores import FORMS, Answer, recall_of, trial
from workbench.probes.retrieval.decoding import decode
from workbench.probes.retrieval.haystack import Prompts, default_prompts
from workbench.probes.retrieval.score_files import counts_of, write_scores
from workbench.results import Result, axis, head_map
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

TARGETS = ("VALUE", "NEEDLE", "needle")
RECALL = 0.5
LONGEST = 2048
STEPS = 50


class RetrievalHead(NamedTuple):
    """One head's copy score."""

    layer: int | str
    head: int
    score: float
    null: float


@dataclass(frozen=True)
class RetrievalResult(Result):
    """``copied null looks looks_null beyond`` are ``[R, L, H]`` over R trials, ``length depth recall uniform example`` ``[R]``.

    ``copied``: copy score of each trial; ``looks``: part of the steps whose largest weight lies on the needle,
    whatever was written; ``null`` and ``looks_null``: the same for as many random positions; ``uniform``: the copy score
    of a head that looks anywhere evenly; ``beyond``: the part copied where an induction head would not have looked.
    ``example``: the trial's number among those of its length and depth (which needle). Scores average the trials with recall
    above ``RECALL``. ``reason`` says why they are undefined if none is.
    """

    copied: Tensor
    null: Tensor
    looks: Tensor
    looks_null: Tensor
    beyond: Tensor
    uniform: Tensor
    length: Tensor
    depth: Tensor
    recall: Tensor
    example: Tensor
    layers: tuple[int | str, ...]
    form: str
    threshold: float
    seed: int
    reason: str = ""
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    @property
    def used(self) -> Tensor:
        """Trials in which the model retrieved the needle, bool ``[R]``."""
        return _retrieved(self.recall)

    @property
    def score(self) -> Tensor:
        """Copy score ``[L, H]``; NaN if the model never retrieved the needle."""
        return self._mean(self.copied)

    def heads(self, threshold: float | None = None) -> list[RetrievalHead]:
        """Heads at or above the threshold, best first; 0 lists all heads, and none is listed if scores are
        undefined."""
        bar = self.threshold if threshold is None else threshold
        score, null = self.score, self._mean(self.null)
        found = [
            RetrievalHead(self.layers[i], h, float(score[i, h]), float(null[i, h]))
            for i in range(score.shape[0])
            for h in range(score.shape[1])
            if score[i, h] >= bar
        ]
        return sorted(found, key=lambda head: -head.score)

    def frame(self) -> pd.DataFrame:
        """One row per head: ``layer, head, score, low, high, null, uniform, looks, looks_null, beyond, retrieval, trials``.

        ``low high`` is the 95% bootstrap interval over the trials used, whose number is ``trials``; ``beyond`` is NaN if every
        copy could have been made by following a repeat.
        """
        import pandas as pd

        score = self.score
        low, high = interval(self.copied[self.used])
        layers, heads = score.shape
        return pd.DataFrame(
            {
                "layer": [layer for layer in self.layers for _ in range(heads)],
                "head": list(range(heads)) * layers,
                "score": score.flatten().numpy(),
                "low": low.flatten().numpy(),
                "high": high.flatten().numpy(),
                "null": self._mean(self.null).flatten().numpy(),
                "uniform": float(self._mean(self.uniform)),
                "looks": self._mean(self.looks).flatten().numpy(),
                "looks_null": self._mean(self.looks_null).flatten().numpy(),
                "beyond": self._mean(self.beyond).flatten().numpy(),
                "retrieval": (score >= self.threshold).flatten().numpy(),
                "trials": int(self.used.sum()),
            }
        )

    def counts(self) -> pd.DataFrame:
        """How many heads reach the threshold and how many score exactly 0, as the published tables count, with the share by
        chance: see ``score_files.counts_of``. Empty if scores are undefined."""
        return counts_of(self.copied[self.used], self.threshold, self.null[self.used])

    def grid(self) -> pd.DataFrame:
        """One row per length and depth: ``length, depth, recall`` (mean over trials), ``retrieved`` and ``trials``."""
        import pandas as pd

        rows = pd.DataFrame({"length": self.length.numpy(), "depth": self.depth.numpy(), "recall": self.recall.numpy()})
        rows["retrieved"] = self.used.numpy()
        cells = rows.groupby(["length", "depth"], as_index=False)
        return cells.agg(recall=("recall", "mean"), retrieved=("retrieved", "mean"), trials=("recall", "size"))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Layer x head heat map of the copy score."""
        title = f"Retrieval heads\n{self.provenance.model}"
        if self.reason:
            title += "\n(undefined: the needle was never retrieved)"
        return head_map(ax, list(self.score), self.layers, title=title, unit="copy score", limits=(0.0, 1.0))

    def plot_grid(self, ax: Axes | None = None) -> Axes:
        """Recall of the model by context length and needle depth."""
        table = self.grid().pivot(index="depth", columns="length", values="recall")
        ax = axis(ax)
        image = ax.imshow(table.to_numpy(), aspect="auto", cmap="RdYlGn", vmin=0, vmax=1)
        ax.set_xticks(range(table.shape[1]), [str(length) for length in table.columns])
        ax.set_yticks(range(table.shape[0]), [f"{depth:.0%}" for depth in table.index])
        title = f"Needle recall\n{self.provenance.model}"
        ax.set(xlabel="context length (tokens)", ylabel="depth of the needle", title=title)
        ax.figure.colorbar(image, ax=ax, label="recall")
        return ax

    def to_json(self, path: str | Path) -> Path:
        """Write ``{"layer-head": [score of every trial used]}``, the exchange format of published score files."""
        if self.reason:
            raise WorkbenchError(f"nothing to export: {self.reason}")
        return write_scores(path, self.layers, self.copied[self.used])

    def _mean(self, values: Tensor) -> Tensor:
        used = values[self.used]
        return used.nanmean(0) if len(used) else torch.full(values.shape[1:], float("nan"), dtype=values.dtype)


def retrieval_heads(
    model: Model,
    lengths: Sequence[int] | int | None = None,
    depths: Sequence[float] | int = 5,
    *,
    prompts: Prompts | None = None,
    needles: Sequence[Sequence[str]] | None = None,
    texts: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
    trials: int = 4,
    max_new_tokens: int | None = None,
    stop: Collection[int] = (),
    form: str = "unique",
    threshold: float = 0.1,
    seed: int = 0,
    cache: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> RetrievalResult:
    """Copy scores over a grid of context lengths and needle depths.

    ``lengths`` in tokens; by default a quarter and all of what the model was made for (``Shape.trained``, else
    ``Shape.context``), 2,048 at most.
    ``depths``: how many, spread evenly over [0, 1], or the depths themselves. Prompts are ``trials`` examples per
    cell of ``wb.task("needle")``; with ``needles`` (fact, question and, if only a part is asked for, the answer) and
    ``texts`` (the haystack, or a list of texts for each needle) every needle is a trial of every cell; or
    ``prompts(length, depth, seed)`` gives them, with the copied part named by the span ``VALUE`` or ``NEEDLE``.
    ``max_new_tokens``: 1 for one-token needles and 50 otherwise, unless given; ``stop``: tokens that end an answer (the
    authors end it at a line break). ``cache=False`` decodes without a key-value cache. ``progress(done, total)`` is called
    after every cell.

    The authors' setting: three needles, each with a haystack of its own, 20 lengths from 1,000 to 50,000 and 10 depths; recall
    counts stemmed words there, tokens here.
    """
    if form not in FORMS:
        raise UnknownName("form of the copy score", form, FORMS)
    if lengths is None:
        longest = min(LONGEST, model.shape.trained or model.shape.context or LONGEST)
        lengths = (longest // 4, longest)
    lengths = (lengths,) if isinstance(lengths, int) else tuple(lengths)
    places = _depths(depths)
    if not lengths or not all(isinstance(length, int) and length >= 1 for length in lengths):
        raise WorkbenchError(f"lengths are token counts of at least 1; got {lengths}")
    if model.shape.context is not None and max(lengths) > model.shape.context:
        raise WorkbenchError(
            f"length {max(lengths)} is {max(lengths) - model.shape.context} tokens more than the context of {model.name} "
            f"({model.shape.context})"
        )
    source = prompts if prompts is not None else default_prompts(model, trials, needles, texts)
    parts: list[_Cell] = []
    cells = [(length, depth) for length in lengths for depth in places]
    for done, (length, depth) in enumerate(cells):
        pairs = source(length, depth, seed + done)
        parts += [
            _cell(model, pairs, rows, (length, depth), max_new_tokens, stop, form, cache, seed + done)
            for rows in _by_position(pairs)
        ]
        if progress is not None:
            progress(done + 1, len(cells))
    tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
    recall = tensors["recall"]
    best = f"recall {float(recall.max()):.2f} at best, more than {RECALL} needed"
    return RetrievalResult(
        **tensors,
        layers=parts[0].layers,
        form=form,
        threshold=threshold,
        seed=seed,
        reason=""
        if bool((recall > RECALL).any())
        else f"{model.name} retrieved no needle in {len(recall)} trials ({best})",
        provenance=parts[0].provenance,
    )


def _retrieved(recall: Tensor) -> Tensor:
    return recall > RECALL


class _Cell(NamedTuple):
    """Trials of one length and depth: the tensors of a ``RetrievalResult`` by name."""

    tensors: dict[str, Tensor]
    layers: tuple[int | str, ...]
    provenance: Provenance


def _depths(depths: Sequence[float] | int) -> tuple[float, ...]:
    if isinstance(depths, int):
        if depths < 1:
            raise WorkbenchError(f"depths is how many, at least 1, or a list of numbers in [0, 1]; got {depths}")
        return (0.5,) if depths == 1 else tuple(round(i / (depths - 1), 6) for i in range(depths))
    places = tuple(float(depth) for depth in depths)
    if not places or not all(0 <= depth <= 1 for depth in places):
        raise WorkbenchError(f"depths lie in [0, 1]; got {places}")
    return places


def _by_position(pairs: Pairs) -> list[list[int]]:
    """The examples in groups whose prompts, up to the answer, can share a batch."""
    if len(pairs.position.unique()) == 1:
        return [list(range(len(pairs)))]
    return [[i] for i in range(len(pairs))]


def _cell(
    model: Model,
    pairs: Pairs,
    rows: list[int],
    cell: tuple[int, float],
    max_new_tokens: int | None,
    stop: Collection[int],
    form: str,
    cache: bool,
    seed: int,
) -> _Cell:
    """The trials ``rows`` of one length and depth."""
    group = pairs[rows[0] : rows[-1] + 1]
    spans = target(group)
    prompt = group.clean[:, : int(group.position[0]) + 1]
    check_length(prompt.shape[1], model.shape)
    decoded = decode(model, prompt, steps_of(model, prompt, spans, max_new_tokens), cache=cache, stop=stop)
    generator = torch.Generator().manual_seed(seed)
    found: list[dict[str, Tensor]] = []
    for b, line in enumerate(prompt.cpu()):
        alive = decoded.alive[b].nonzero()[:, 0]
        lo, hi = spans[b].tolist()
        answer = Answer(line, (lo, hi), decoded.tokens[b, alive], decoded.keys[alive, b])
        recall = recall_of(answer.written, answer.needle, group.answer[b])
        found.append(trial(answer, form, generator) | {"recall": torch.tensor(recall, dtype=torch.float64)})
    tensors = {name: torch.stack([each[name] for each in found]) for name in found[0]}
    tensors["length"] = torch.full((len(prompt),), cell[0])
    tensors["depth"] = torch.full((len(prompt),), cell[1], dtype=torch.float64)
    tensors["example"] = torch.tensor(rows)
    return _Cell(tensors, decoded.layers, decoded.last.provenance)


def steps_of(model: Model, prompt: Tensor, spans: Tensor, asked: int | None = None) -> int:
    """Tokens to decode: as asked, else 1 for one-token needles and ``STEPS``; no more than the context holds."""
    longest = int((spans[:, 1] - spans[:, 0]).max())
    steps = asked if asked is not None else 1 if longest == 1 else STEPS
    if steps < 1:
        raise WorkbenchError(f"max_new_tokens is at least 1; got {steps}")
    if model.shape.context is not None:
        steps = min(steps, model.shape.context - prompt.shape[1] + 1)
    return steps


def target(pairs: Pairs) -> Tensor:
    """Span ``[B, 2]`` of the part of the context that the answer repeats."""
    for name in TARGETS:
        if name in pairs.spans:
            spans = pairs.spans[name].cpu()
            if bool((spans[:, 0] < 0).any()) or bool((spans[:, 1] <= spans[:, 0]).any()):
                raise WorkbenchError(f"span {name!r} is absent or empty in some example")
            return spans
    raise WorkbenchError(
        f"prompts name the needle by a span {' or '.join(TARGETS)}; these have: {', '.join(pairs.spans) or 'none'}"
    )


ANALYSES = (
    Analysis(
        name="retrieval-heads",
        question="Which heads copy the answer out of a long context?",
        function=retrieval_heads,
        example=lambda: {
            "model": bundled("compiled-needle"),
            "lengths": (48, 64),
            "depths": 2,
            "trials": 2,
        },
        paper="Wu et al. 2024 (arXiv 2404.15574), section 2 and the authors' code",
        source="model",
        null="as many random positions outside the needle; a head that looks anywhere evenly",
        cause="masking, masking_curve",
        definition="recall over tokens instead of stemmed words; ties go to the first key",
    ),
)
