"""Known heads: what each head looks at and writes, the roles that follow, and whether the model needs them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import streamlit as st

from workbench.apps.screen import head_scores, place, runs, sinks_view, state
from workbench.apps.screen.charts import draw_curve
from workbench.apps.screen.head_grid import head_grid, measure_of, run_of
from workbench.apps.screen.need import ask, guarded, job, need
from workbench.apps.screen.questions import show_questions
from workbench.apps.screen.shown import downloads, figure
from workbench.apps.screen.text import literal

_PARTS = {"scores": "Scores", "roles": "Roles", "text": "In a text of yours"}
_WORK = "workbench.apps.work_heads"


def page() -> None:
    st.title("Known heads")
    st.caption(
        "Heads whose job has a name: they look at the token before, at copies, behind copies, at the first token; each score "
        "beside what it would be by chance."
    )
    _body()


@st.fragment
def _body() -> None:
    guarded(_part)


def _part() -> None:
    part = state.choose("Show", list(_PARTS), "known", show=_PARTS.__getitem__, kind="segmented_control")
    if part == "text":
        _text()
        return
    model = state.choose(
        "Model",
        place.models(),
        "model",
        default=runs.MODEL,
        show=lambda path: Path(path).name,
        where=st.columns([2, 3])[0],
    )
    if part == "scores":
        show_questions(head_scores.SCORES, model, key="score", run=run_of(model), label="Score")
    else:
        _roles(model)


def _roles(model: str) -> None:
    done = need(job("head-roles", model), f"Roles of the heads of {Path(model).name}")
    frame = done.table()
    python = f"import workbench as wb\n\nmodel = wb.load({model!r})\nroles = wb.head_roles(model)"
    counts = head_scores.role_counts(frame)
    st.caption(
        "A head has a role where its score is high enough and well above its null; it may have several. A role says what a "
        "head does on these inputs, not that the model needs it: that is what switching the heads off tells."
    )
    st.dataframe(counts, hide_index=True, column_config={"which": st.column_config.TextColumn("which", width="large")})
    downloads(frame, name="roles", python=f"{python}\nroles.frame()")
    default = "induction" if "induction" in set(counts["role"]) else None
    role = state.choose("Role", counts["role"].tolist(), "role", default=default, kind="segmented_control")
    score = head_scores.ROLE_SCORE.get(role, role)
    head_grid(
        head_scores.role_table(frame, role),
        f"score: {score.replace('_', ' ')}",
        name=f"role {role}",
        python=f"{python}\nroles.plot(score={score!r})\nroles.heads({role!r})",
        title=f"{score}\n{model}",
        run=run_of(model),
    )
    for name, why in (done.load().labels.get("undefined") or {}).items():
        st.caption(literal(f"{name} is undefined: {why}."))
    st.subheader("Does the model need them?")
    _without(model, role, python)


def _without(model: str, role: str, python: str) -> None:
    st.caption(
        "Loss on the second half of repeated random words while the heads of the role are replaced by their means, strongest "
        "first, beside random heads of the same layers."
    )
    done = ask(job(f"{_WORK}:without_role", model, role=role), f"{Path(model).name} without its {role} heads")
    if done is None:
        return
    frame = done.table()
    left, right = st.columns([3, 2])
    with left:
        draw = partial(
            draw_curve, frame, "removed", {"ranked": f"{role} heads", "random": "random heads"}, base="base",
            labels=("heads replaced by their means", "loss, nats"),
        )  # fmt: skip
        figure(
            draw, frame, name=f"without {role} heads", width="stretch",
            python=f"{python}\nfound = wb.role_ablation(model, roles, {role!r}, random=4)\nfound.plot()\nfound.frame()",
        )  # fmt: skip
    right.dataframe(frame, hide_index=True)


def _text() -> None:
    run = runs.current()
    gated = sinks_view.is_gated(runs.opened(run))
    raw = gated and state.flag(
        "inside the gate", "raw", help="The attention before the output gate scales what a head writes."
    )
    done = need(job(f"{_WORK}:looks_in_run", run=run.key, raw=raw or None), f"Known heads in {run.title}")
    kind = state.choose("Heads by", list(head_scores.LOOKS), "score measure", kind="segmented_control")
    inside = ", raw=True" if raw else ""
    head_grid(
        measure_of(done.table(), kind),
        head_scores.LOOKS[kind],
        name=f"{kind} in a text",
        python=f"{run.python}\nfound = wb.head_scores(run, kinds=[{kind!r}]{inside})\nfound.plot(kind={kind!r})\nfound.frame()",
        title=f"{kind}\n{run.title}",
        run=run.key,
        chance="the tokens of the text shuffled",
    )


guarded(page)
