"""Retrieval: which heads fetch a fact from far back, and whether the answer needs them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.apps.screen import needle_view, place, predict, state
from workbench.apps.screen.charts import draw_curve, draw_grid
from workbench.apps.screen.head_grid import head_grid, run_of
from workbench.apps.screen.need import guarded, job, need, work
from workbench.apps.screen.questions import show_questions
from workbench.apps.screen.runs import MODEL
from workbench.apps.screen.shown import figure
from workbench.apps.screen.text import literal

if TYPE_CHECKING:
    import pandas as pd

    from workbench.jobs.job import Job

_PARTS = {"needles": "Needles", "without": "Without the heads", "scores": "Other scores"}
_SCORES = {
    "score": (
        "copy score",
        "part of the needle that the head copies, token by token, while the model writes its answer",
    ),
    "looks": ("part of the steps", "how often the head's largest weight lies on the needle, whatever is written"),
    "beyond": ("part of the needle", "copies that following an earlier repeat of the token would not explain"),
}
_PATIENCE = 15.0
"""Seconds that a test may take without being asked for."""
_OFF = 2.0
"""What the sets of heads that are switched off take, a draw of each, in needle tests of the same size."""
_MUCH = 60_000
"""Tokens that a test may read without being asked for where no time is known yet."""


def page() -> None:
    st.title("Retrieval")
    st.caption(
        "A fact, the needle, is hidden in a long text and asked for at its end. Retrieval heads look at it and copy it while the "
        "model writes its answer."
    )
    _body()


@st.fragment
def _body() -> None:
    guarded(_part)


def _part() -> None:
    row = st.columns([2, 3], vertical_alignment="bottom")
    model = state.choose(
        "Model", place.models(), "model", default=MODEL, show=lambda path: Path(path).name, where=row[0]
    )
    part = state.choose("Show", list(_PARTS), "needle", show=_PARTS.__getitem__, kind="segmented_control", where=row[1])
    if part == "scores":
        show_questions(needle_view.SCORES, model, key="score", run=run_of(model), label="Score")
        return
    of = predict.sizes(model)
    row = st.columns([2, 1, 1, 2], vertical_alignment="bottom")
    choices = needle_view.fitting(of.context if of else None)
    default = next((one for one in ("64-128-256", "64-128") if one in choices), None)
    chosen = state.choose(
        "Lengths in tokens", choices, "lengths", default=default, show=lambda one: one.replace("-", ", "), where=row[0]
    )
    lengths = [int(one) for one in chosen.split("-")]
    places = state.number(
        "Depths", 2, 11, "depths", default=5, where=row[1], kind="number_input",
        help="places of the needle, evenly from the start to the end",
    )  # fmt: skip
    trials = state.number(
        "Prompts", 1, 16, "trials", default=2, where=row[2], kind="number_input", help="for each length and depth"
    )
    {"needles": _needles, "without": _without}[part](model, lengths, places, trials)


def _needles(model: str, lengths: list[int], places: int, trials: int) -> None:
    wanted = job(needle_view.PROBE, model, lengths=lengths, depths=places, trials=trials)
    if not _agreed(wanted, wanted):
        return
    done = need(wanted, f"Needles for {Path(model).name}")
    frame, python = done.table(), _code(model, lengths, places, trials)
    _summary(frame, len(lengths) * places * trials)
    left, right = st.columns(2)
    with left:
        st.subheader("Does the model find it?")
        grid = needle_view.recall_grid(done.load())
        draw = partial(
            draw_grid,
            grid,
            "length",
            "depth",
            "recall",
            labels=("tokens in the prompt", "depth of the needle"),
            unit="recall",
        )
        figure(draw, grid, name="needle recall", python=f"{python}\nfound.plot_grid()\nfound.grid()", width="stretch")
    with right:
        st.subheader("How many heads copy?")
        figure(
            partial(needle_view.draw_spread, frame),
            frame,
            name="copy scores",
            python=f"{python}\nfound.frame()",
            width="stretch",
        )
    st.subheader("Which heads?")
    score = state.choose(
        "Score",
        list(_SCORES),
        "by",
        show=lambda one: _SCORES[one][0] if one == "score" else one,
        kind="segmented_control",
    )
    unit, says = _SCORES[score]
    st.caption(literal(f"{says[0].upper()}{says[1:]}."))
    head_grid(
        needle_view.of_score(frame, score), unit, name="retrieval heads", python=f"{python}\nfound.plot()\nfound.frame()",
        title=f"{unit}\n{model}", run=run_of(model), chance="as many positions outside the needle",
    )  # fmt: skip


def _summary(frame: pd.DataFrame, prompts: int) -> None:
    used, scored = int(frame["trials"].iloc[0]), frame["score"].notna().any()
    with st.container(horizontal=True, gap="medium"):
        if scored:
            st.metric("retrieval heads", f"{int(frame['retrieval'].sum())} of {len(frame)}", width="content",
                      help="heads that copy at least a tenth of the needle on average")  # fmt: skip
            st.metric("heads that copy nothing", f"{int((frame['score'] == 0).sum())}", width="content")
        st.metric("prompts with the needle found", f"{used} of {prompts}", width="content",
                  help="only these count: where the model does not answer, no head can copy")  # fmt: skip
    if not scored:
        st.warning("The model never found the needle, so the scores are undefined. Shorter texts may be easier.")


def _without(model: str, lengths: list[int], places: int, trials: int) -> None:
    row = st.columns([1.4, 1, 3], vertical_alignment="bottom")
    metric = state.choose(
        "Measured", ["recall", "probability", "accuracy"], "metric", where=row[0], help="of the answer"
    )
    random = state.number("Random draws", 1, 16, "random", default=2, where=row[1], kind="number_input")
    st.caption(
        "The heads with the largest copy scores are set to zero while the answer is written; beside them as many random others."
    )
    sizes: dict[str, Any] = {"lengths": lengths, "depths": min(places, 3), "trials": trials}
    wanted = job("workbench.apps.work_retrieval:without_heads", model, **sizes, random=random, metric=metric)
    if not _agreed(wanted, job(needle_view.PROBE, model, **sizes), times=1 + _OFF * (1 + random)):
        return
    done = need(wanted, f"{Path(model).name} without its retrieval heads")
    frame = done.table()
    code = (
        f"import workbench as wb\nfrom workbench.apps.work_retrieval import without_heads\n\nmodel = wb.load({model!r})\n"
        f"found = without_heads(model, {lengths}, {min(places, 3)}, {trials}, random={random}, metric={metric!r})\n"
        "found.plot()\nfound.frame()"
    )
    draw = partial(
        draw_curve, frame, "removed", {"ranked": "retrieval heads", "random": "random heads"}, base="base",
        labels=("heads set to zero", f"needle {metric}"),
    )  # fmt: skip
    left, right = st.columns([3, 2])
    with left:
        figure(
            draw,
            frame,
            name="without retrieval heads",
            python=code,
            caption="Shaded: 95% interval over prompts, range over random draws.",
            width="stretch",
        )
    right.dataframe(frame, hide_index=True)


def _agreed(wanted: Job, like: Job, times: float = 1.0) -> bool:
    """Whether a job may run that takes ``times`` as long as the needle test ``like``: it is done or under way, it is short, or
    it was asked for."""
    if work().state(wanted.key).kind != "missing":
        return True
    took = needle_view.seconds(like)
    if took is None:
        short = needle_view.work_of(like) * times <= _MUCH
        said = "How long this takes is not known yet: no test of this model ran here before."
    else:
        short = took * times <= _PATIENCE
        said = f"This takes about {_spoken(took * times)}."
    if short:
        return True
    st.info(f"{said} It runs in the background, and the page stays usable.", icon=":material/timer:")
    return bool(st.button("Run it", key=f"run {wanted.key}", type="primary"))


def _spoken(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _code(model: str, lengths: list[int], places: int, trials: int) -> str:
    return (
        f"import workbench as wb\n\nmodel = wb.load({model!r})\n"
        f"found = wb.retrieval_heads(model, {lengths}, {places}, trials={trials})"
    )


guarded(page)
