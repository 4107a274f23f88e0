"""Questions that a job answers: a list to choose from with a sentence each, then the answer with its figure and numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.apps.screen import state
from workbench.apps.screen.head_grid import head_grid, measure_of
from workbench.apps.screen.need import job, need
from workbench.apps.screen.shown import downloads, figure
from workbench.apps.screen.text import literal

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Question:
    """``says``: what is done and how to read it. ``probe`` and ``args`` are the job, on a task if it names one. ``code`` gives
    ``found`` from ``model``, and the code ``frame`` the table of the job.

    Tables of heads name their ``heads``: measure -> its unit, the first is shown first. Of others ``draw`` makes the figure.
    ``chance`` says what the null is."""

    says: str
    probe: str
    args: Mapping[str, Any]
    code: str
    heads: Mapping[str, str] = field(default_factory=dict)
    draw: Callable[[pd.DataFrame], Any] | None = None
    chance: str = "by chance"
    task: Any = None
    frame: str = "found.frame()"


def show_questions(
    questions: Mapping[str, Question],
    model: str,
    *,
    key: str = "question",
    run: str | None = None,
    label: str = "Question",
) -> None:
    """Choose one of the questions (``key`` in the address), have it answered for the model, and draw the answer. ``run`` as in
    ``head_grid``."""
    row = st.columns([2, 4], vertical_alignment="bottom")
    name = state.choose(label, list(questions), key, where=row[0])
    asked = questions[name]
    row[1].caption(literal(asked.says))
    done = need(job(asked.probe, model, asked.task, **asked.args), f"{name}, {Path(model).name}")
    frame = done.table()
    python = code_of(model, asked.code)
    if asked.heads:
        measure = state.choose(
            "Heads by",
            list(asked.heads),
            f"{key} measure",
            show=lambda one: one.replace("_", " "),
            kind="segmented_control",
        )
        head_grid(
            measure_of(frame, measure),
            asked.heads[measure],
            name=name,
            python=f"{python}\n{asked.frame}",
            title=f"{measure.replace('_', ' ')}\n{model}",
            run=run,
            chance=asked.chance,
        )
    elif asked.draw is not None:
        left, right = st.columns([3, 2])
        with left:
            draw = partial(asked.draw, frame)
            figure(draw, frame, name=name, python=f"{python}\nfound.plot()\nfound.frame()", width="stretch")
        right.dataframe(frame, hide_index=True)
    else:
        st.dataframe(frame, hide_index=True)
        downloads(frame, name=name, python=f"{python}\nfound.frame()")
    if note := done.about.get("note"):
        st.caption(literal(str(note)))


def code_of(model: str, code: str) -> str:
    """``code`` after the lines that load the model."""
    imports = [line for line in code.splitlines() if line.startswith(("from ", "import "))]
    rest = [line for line in code.splitlines() if line not in imports]
    return "\n".join(["import workbench as wb", *imports, "", f"model = wb.load({model!r})", *rest])
