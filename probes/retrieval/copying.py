"""Which heads copy the answer out of a long context?

The copy score of Wu et al. (arXiv 2404.15574, section 2): while the model writes token w, a head copies it if the
key with the largest weight in its last attention row lies in the needle and holds the token w. Over a whole answer,

    score = |tokens of the needle that the head copied| / |tokens of the needle|,

averaged over the trials in which the model retrieved the needle (recall of its tokens above one half). Heads at or
above 0.1 are retrieval heads. ``form="published"`` counts repeats as the authors' code does, so it may exceed 1.

Trials the model fails are left out, because a head cannot be seen copying what was not said; if none is left the
score is undefined. Nulls: the same statistic for as many random positions outside the needle; and, causally,
``masking``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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
from workbench.probes.retrieval.decoding import Decoded, decode
from workbench.probes.retrieval.haystack import Prompts, default_prompts
from workbench.results import Result, axis, head_map
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FORMS = ("unique", "published")
TARGETS = ("VALUE", "NEEDLE", "needle")
RECALL = 0.5
LONGEST = 2048
_CONTROLS = 16


class RetrievalHead(NamedTuple):
    """One head's copy score."""

    layer: int | str
    head: int
    score: float
    null: float


@dataclass(frozen=True)
class RetrievalResult(Result):
    """``copied null looks looks_null`` are ``[R, L, H]`` over R trials, ``length depth recall`` ``[R]``.

    ``copied``: copy score of each trial; ``looks``: part of the steps whose largest weight lies on the needle,
    whatever was written; ``null`` and ``looks_null``: the same for as many random positions. Scores average the
    trials with recall above ``RECALL``. ``reason`` says why they are undefined if none is.
    """

    copied: Tensor
    null: Tensor
    looks: Tensor
    looks_null: Tensor
    length: Tensor
    depth: Tensor
    recall: Tensor
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
        """One row per head: ``layer, head, score, low, high, null, looks, looks_null, retrieval, trials``.

        ``low high`` is the 95% bootstrap interval over the trials used, whose number is ``trials``.
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
                "looks": self._mean(self.looks).flatten().numpy(),
                "looks_null": self._mean(self.looks_null).flatten().numpy(),
                "retrieval": (score >= self.threshold).flatten().numpy(),
                "trials": int(self.used.sum()),
            }
        )

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
        path = Path(path)
        if self.reason:
            raise WorkbenchError(f"nothing to export: {self.reason}")
        used = self.copied[self.used]
        table = {
            f"{layer}-{head}": [float(x) for x in used[:, i, head]]
            for i, layer in enumerate(self.layers)
            for head in range(used.shape[2])
        }
        try:
            path.write_text(json.dumps(table))
        except OSError as error:
            raise WorkbenchError(f"cannot write {path}: {error.strerror or error}") from error
        return path

    def _mean(self, values: Tensor) -> Tensor:
        used = values[self.used]
        return used.mean(0) if len(used) else torch.full(values.shape[1:], float("nan"), dtype=values.dtype)


def retrieval_heads(
    model: Model,
    lengths: Sequence[int] | int | None = None,
    depths: Sequence[float] | int = 5,
    *,
    prompts: Prompts | None = None,
    needles: Sequence[tuple[str, str]] | None = None,
    texts: str | Sequence[str] | None = None,
    trials: int = 4,
    max_new_tokens: int | None = None,
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
    cell of ``wb.task("needle")``; with ``needles`` (pairs of fact and question) and ``texts`` (the haystack) they
    are made from those; or ``prompts(length, depth, seed)`` gives them, with the copied part named by the span
    ``VALUE`` or ``NEEDLE``. ``max_new_tokens``: 1 for one-token needles and 50 otherwise, unless given.
    ``cache=False`` decodes without a key-value cache. ``progress(done, total)`` is called after every cell.
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
            _cell(model, group, length, depth, max_new_tokens, form, cache, torch.Generator().manual_seed(seed + done))
            for group in _by_position(pairs)
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


def _by_position(pairs: Pairs) -> list[Pairs]:
    """The prompts up to the answer, in batches of one length."""
    found = []
    for position in pairs.position.unique().tolist():
        rows = (pairs.position == position).nonzero()[:, 0].tolist()
        one = [pairs[i : i + 1] for i in rows]
        found += one if len(rows) < len(pairs) else [pairs]
    return found


def _cell(
    model: Model,
    pairs: Pairs,
    length: int,
    depth: float,
    max_new_tokens: int | None,
    form: str,
    cache: bool,
    generator: torch.Generator,
) -> _Cell:
    spans = _target(pairs)
    longest = int((spans[:, 1] - spans[:, 0]).max())
    steps = max_new_tokens if max_new_tokens is not None else 1 if longest == 1 else 50
    if steps < 1:
        raise WorkbenchError(f"max_new_tokens is at least 1; got {steps}")
    prompt = pairs.clean[:, : int(pairs.position[0]) + 1]
    check_length(prompt.shape[1], model.shape)
    if model.shape.context is not None:
        steps = min(steps, model.shape.context - prompt.shape[1] + 1)
    decoded = decode(model, prompt, steps, cache=cache)
    rows = [_trial(decoded, b, prompt[b].cpu(), spans[b].tolist(), form, generator) for b in range(len(prompt))]
    recall = [_recall(decoded, b, prompt[b].cpu(), spans[b].tolist(), pairs.answer[b]) for b in range(len(prompt))]
    tensors = dict(
        zip(("copied", "null", "looks", "looks_null"), map(torch.stack, zip(*rows, strict=True)), strict=True)
    )
    tensors["length"] = torch.full((len(prompt),), length)
    tensors["depth"] = torch.full((len(prompt),), depth, dtype=torch.float64)
    tensors["recall"] = torch.tensor(recall, dtype=torch.float64)
    return _Cell(tensors, decoded.layers, decoded.last.provenance)


def _target(pairs: Pairs) -> Tensor:
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


def _trial(
    decoded: Decoded, b: int, prompt: Tensor, span: list[int], form: str, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one trial: copy score, its null, looks and their null, each ``[L, H]``."""
    lo, hi = span
    steps = decoded.alive[b].nonzero()[:, 0]
    keys, written = decoded.keys[steps, b], decoded.tokens[b, steps]  # [S, L, H], [S]
    inside = (keys >= 0) & (keys < len(prompt))  # -1: a row without weight
    at = keys.clamp(0, len(prompt) - 1)
    same = inside & (prompt[at] == written[:, None, None])
    needle = (keys >= lo) & (keys < hi)
    size = hi - lo if form == "published" else len(prompt[lo:hi].unique())
    others = torch.cat([torch.arange(lo), torch.arange(hi, len(prompt))])
    nulls = []
    for _ in range(_CONTROLS if len(others) >= hi - lo else 0):
        chosen = torch.zeros(len(prompt), dtype=torch.bool)
        chosen[others[torch.randperm(len(others), generator=generator)[: hi - lo]]] = True
        nulls.append(_copied(same & chosen[at], written, size, form))
    null = torch.stack(nulls).mean(0) if nulls else torch.full(keys.shape[1:], float("nan"), dtype=torch.float64)
    chance = (inside & ~needle).double().mean(0) * min(1.0, (hi - lo) / max(1, len(others)))
    return _copied(same & needle, written, size, form), null, needle.double().mean(0), chance


def _copied(hits: Tensor, written: Tensor, size: int, form: str) -> Tensor:
    """Copy score ``[L, H]`` from the steps ``[S, L, H]`` that copied: repeats count in the published form only."""
    if form == "published":
        return hits.sum(0, dtype=torch.float64) / size
    found = torch.zeros(hits.shape[1:], dtype=torch.float64)
    for token in written.unique():
        found += hits[written == token].any(0)
    return found / size


def _recall(decoded: Decoded, b: int, prompt: Tensor, span: list[int], answer: Tensor) -> float:
    """Part of the needle's tokens that were written, each as often as it occurs (ROUGE-1 recall); for a needle of one
    token, whether it or one of the accepted answers was written."""
    written = decoded.tokens[b][decoded.alive[b]].tolist()
    wanted = prompt[span[0] : span[1]].tolist()
    if len(wanted) == 1:
        return float(bool({*wanted, *(a for a in answer.tolist() if a >= 0)} & set(written)))
    return sum(min(written.count(token), wanted.count(token)) for token in set(wanted)) / len(wanted)
