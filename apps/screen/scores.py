"""One number per head that walls and tables of heads are sorted by: from the stored maps at once, or from the model as a job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import streamlit as st
import torch
from torch import Tensor

from workbench.apps.screen import runs
from workbench.apps.screen.need import Done, ask, job
from workbench.apps.screen.runs import Captured
from workbench.apps.screen.text import literal
from workbench.errors import UnknownName, WorkbenchError

if TYPE_CHECKING:
    import pandas as pd

    from workbench.jobs.job import Job
    from workbench.probes.atlas import Atlas

_CHARACTERS = 1500

STORED: Mapping[str, str] = {
    "sink": "mean share of the attention that the head's favourite token gets",
    "entropy": "how spread out a query's attention is, in nats",
    "distance": "how far back a query looks on average, in tokens",
    "locality": "part of the weight that stays in the query's block of tokens and the blocks beside it",
    "largest block": "the largest mean weight of a block far from the diagonal, the first tokens left out",
}
"""Scores that the stored maps give at once, each in a sentence."""


@dataclass(frozen=True)
class Asked:
    """A score that needs the model: what it is, the job for a run, and the column of its table, which has a row per head."""

    says: str
    job: Callable[[Captured], Job]
    column: str


def scores(run: Captured) -> dict[str, pd.DataFrame]:
    """Every score of ``STORED`` as a table ``layer, head, value``, a row per head of the run; NaN where it has no meaning."""
    return map_scores(runs.atlas_of(run))


def asked(run: Captured, name: str) -> Done | None:
    """The finished cell of a score of ``ASKED``; None while it is not there, and then the page says how far it is.

    ``score_of`` makes the table of it. Raises ``UnknownName`` for another name."""
    score = _asked(name)
    try:
        wanted = score.job(run)
    except WorkbenchError as error:
        st.error(literal(str(error)))
        return None
    return ask(wanted, f"The {name} score of every head")


def score_of(done: Done, name: str) -> pd.DataFrame:
    """The table ``layer, head, value`` of a finished score of ``ASKED``."""
    frame = done.table()
    return frame[["layer", "head"]].assign(value=frame[_asked(name).column])


def map_scores(atlas: Atlas) -> dict[str, pd.DataFrame]:
    """The scores of ``STORED``. An atlas without block maps has no ``locality`` and no ``largest block``: these are NaN."""
    frame = atlas.frame()
    found = {"sink": frame["share"], "entropy": frame["entropy"], "distance": frame["distance"]}
    blocks: dict[str, list[float]] = {"locality": [], "largest block": []}
    for layer, entropy in atlas.entropy.items():
        near, far = _blocks(atlas, layer, len(entropy))
        blocks["locality"] += near.tolist()
        blocks["largest block"] += far.tolist()
    return {name: frame[["layer", "head"]].assign(value=values) for name, values in (found | blocks).items()}


def _blocks(atlas: Atlas, layer: int | str, heads: int) -> tuple[Tensor, Tensor]:
    """Locality and largest far block, ``[H]`` each; NaN for maps whose queries are not their keys."""
    undefined = torch.full((heads,), float("nan"), dtype=torch.float64)
    maps = atlas.blocks.get(layer)
    if maps is None or maps.shape[1] != maps.shape[2]:
        return undefined, undefined
    size, side = atlas.size or 1, maps.shape[1]
    length = atlas.received[layer].shape[1]
    rows = torch.tensor([min(size, length - lo) for lo in range(0, side * size, size)], dtype=torch.float64)
    mass = maps.double().abs()
    apart = (torch.arange(side)[:, None] - torch.arange(side)).abs()
    total = (mass * rows[:, None]).sum((1, 2))
    near = torch.where(total > 0, (mass * rows[:, None] * (apart <= 1)).sum((1, 2)) / total, float("nan"))
    away = mass.masked_fill((apart <= 1) | (torch.arange(side) == 0), -1.0).amax((1, 2))
    return near, torch.where(away < 0, float("nan"), away)


def _asked(name: str) -> Asked:
    if name not in ASKED:
        raise UnknownName("score of a model", name, ASKED)
    return ASKED[name]


def _induction(run: Captured) -> Job:
    return job("head-scores", run.job.model, kinds=["induction"], batches=2, sequences=4)


def _retrieval(run: Captured) -> Job:
    return job("retrieval-heads", run.job.model, lengths=[96], depths=3, trials=2)


def _importance(run: Captured) -> Job:
    name = "first-order-importance"
    if run.job.task is not None:
        return job(name, run.job.model, run.job.task, seed=run.job.seed, examples=4, exact=False)
    text: Any = runs.about(run)["text"]
    if text is None:
        raise WorkbenchError("importance is what a loss on text loses without a head; this run is of an image")
    return job(name, run.job.model, text=_cut(text), exact=False)


def _cut(text: str) -> str:
    """The first ``_CHARACTERS`` characters, to the end of a word if there is one."""
    if len(text) <= _CHARACTERS:
        return text
    return text[:_CHARACTERS].rsplit(maxsplit=1)[0] or text[:_CHARACTERS]


ASKED: Mapping[str, Asked] = {
    "induction": Asked(
        "mean weight on what followed an earlier copy of the query's token, on repeated random words",
        _induction,
        "value",
    ),
    "retrieval": Asked(
        "part of a hidden fact that the head copies while the model writes its answer", _retrieval, "score"
    ),
    "importance": Asked(
        f"change of the loss on the text (its first {_CHARACTERS:,} characters, or 4 prompts of the task) without the head, "
        "to first order, in nats",
        _importance,
        "importance",
    ),
}
"""Scores that need the model: jobs with small sizes, by name."""
