"""Rhythm: how far back heads look, and which tokens later ones come back to, along the text."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.apps.components.examples import EXAMPLES, example_row, examples_data
from workbench.apps.screen import rhythm_view, runs, sinks_view, state
from workbench.apps.screen.charts import draw_curve
from workbench.apps.screen.head_grid import head_grid, measure_of
from workbench.apps.screen.need import guarded, job, need
from workbench.apps.screen.rhythm_view import PAGE
from workbench.apps.screen.runs import Captured
from workbench.apps.screen.shown import downloads, figure
from workbench.apps.screen.text import literal, readable
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    import pandas as pd

_WORK = "workbench.apps.work_rhythm"
_VALUES = {
    "waad": ("WAAD", "tokens", "preplan", "local heads",
             "How far back a token looks, up to 10 tokens. Where it jumps (triangles) a new stretch of the text begins."),
    "fai": ("FAI", "mean weight", "anchor", "global heads",
            "How much the tokens 10 to 50 later look back at a token. The largest (triangles) are anchors."),
}  # fmt: skip
_PICK = "token"


def page() -> None:
    st.title("Rhythm")
    st.caption(
        "How attention moves while a text is read: WAAD says how far back each token looks, FAI how much later tokens come back "
        "to it."
    )
    run = runs.current()
    _body(run)


@st.fragment
def _body(run: Captured) -> None:
    guarded(lambda: _rhythm(run))


def _rhythm(run: Captured) -> None:
    opened = runs.opened(run)
    length = next(iter(opened.maps.values())).shape[2]
    if length < 4:
        raise WorkbenchError(f"a rhythm needs a text; this run has {length} tokens")
    row = st.columns([1.2, 1.9, 1, 2], vertical_alignment="bottom")
    name = state.choose(
        "Along the text",
        list(_VALUES),
        "value",
        show=lambda one: _VALUES[one][0],
        kind="segmented_control",
        where=row[0],
    )
    *_, group, says = _VALUES[name]
    which = state.choose(
        "Heads", ["group", "one"], "of", kind="segmented_control", where=row[1],
        show=lambda one: group if one == "group" else "one head",
        help="the 30% of all heads that look least far back are local, the 30% that look farthest global",
    )  # fmt: skip
    prompt = state.number(
        "Left out", 0, min(length - 3, 1000), "prompt", default=min(10, length // 4), where=row[2], kind="number_input",
        help="first tokens that do not count: the first one would collect everything",
    )  # fmt: skip
    raw = sinks_view.is_gated(opened) and state.flag(
        "inside the gate", "raw", where=row[3], help="The attention before the output gate scales what a head writes."
    )
    asked: dict[str, Any] = {"run": run.key, "prompt": prompt, **({"raw": True} if raw else {})}
    st.caption(literal(says))
    code = f"prompt={prompt}{', raw=True' if raw else ''}"
    if which == "group":
        _group(run, asked, name, code)
    else:
        _one(run, asked, name, code)


def _group(run: Captured, asked: dict[str, Any], name: str, code: str) -> None:
    title, unit, mark, group, _ = _VALUES[name]
    done = need(job(f"{_WORK}:rhythm_of_run", **asked), f"The rhythm of {run.title}")
    saved = done.load()
    python = f"{run.python}\nfound = wb.rhythm(run, {code})"
    heads = saved.labels["local" if name == "waad" else "over"]
    st.caption(
        literal(f"Mean over {len(heads)} {group}: {', '.join(f'{layer}.{head}' for layer, head in heads[:24])}.")
    )
    _along(done.table(), name, mark, f"{title}, {unit}", f"{python}\nfound.plot(measure={name!r})\nfound.frame()")
    left, right = st.columns(2)
    with left:
        _couplings(saved, python)
    with right:
        st.subheader("Strongest tokens")
        table = done.table().sort_values(name, ascending=False, kind="stable")[["position", "token", name]].head(50)
        st.dataframe(table, hide_index=True, height=300, column_config={
            name: st.column_config.NumberColumn(format="%.4g")
        })  # fmt: skip
    st.subheader("How far each head looks back")
    spans = need(job(f"{_WORK}:spans_of_run", **asked), "Spans of the heads")
    head_grid(
        measure_of(spans.table(), "span"), "mean distance, tokens", name="spans", run=run.key,
        python=f"{run.python}\nfound = wb.head_spans(run, {code})\nfound.plot()\nfound.frame()",
        title=f"head span\n{run.title}", chance="evenly spread attention",
    )  # fmt: skip


def _one(run: Captured, asked: dict[str, Any], name: str, code: str) -> None:
    title, unit, *_ = _VALUES[name]
    opened = runs.opened(run)
    row = st.columns([1, 1, 4], vertical_alignment="bottom")
    layer = state.choose("Layer", list(opened.maps), "layer", where=row[0])
    head = state.choose("Head", list(range(opened.maps[layer].shape[1])), "head", where=row[1])
    link = {"run": run.key, "layer": str(layer), "head": str(head)}
    row[2].page_link(
        "views/head.py", label=f"Look at head {layer}.{head}", icon=":material/zoom_in:", query_params=link
    )
    done = need(job(f"{_WORK}:rhythm_of_heads", layer=layer, **asked), f"The rhythm of layer {layer}")
    frame = done.table()
    frame = frame[frame["head"] == head].drop(columns="head").reset_index(drop=True)
    frame.insert(1, "token", _labels(opened, len(frame)))
    call = "waad" if name == "waad" else "fai"
    inner = ".raw" if asked.get("raw") else ""
    python = f"{run.python}\nvalues = wb.{call}(run.maps[{layer!r}]{inner}, prompt={asked['prompt']})[0, {head}]"
    _along(frame, name, None, f"{title} of head {layer}.{head}, {unit}", python)


def _labels(opened: Any, length: int) -> list[str]:
    labels = list(opened.tokens.labels[0]) if opened.tokens.labels else []
    return [*labels[:length], *map(str, range(len(labels), length))]


def _along(frame: pd.DataFrame, name: str, mark: str | None, unit: str, python: str) -> None:
    """The line over the text, and a page of the text in its colours."""
    pages = -(-len(frame) // PAGE)
    at = 0
    if pages > 1:
        at = state.number(
            "Coloured page",
            0,
            pages - 1,
            "page",
            default=0,
            where=st.columns([1, 5])[0],
            kind="number_input",
            help=f"{PAGE} tokens of the text; a click on the line goes to its page",
        )
    start, end = at * PAGE, min(len(frame), (at + 1) * PAGE)
    points = rhythm_view.line(frame, name)

    def picked() -> None:
        rows = st.session_state["rhythm line"]["selection"].get(_PICK) or []
        if rows:
            state.put("token", int(rows[0]["position"]))
            state.put("page", int(rows[0]["position"]) // PAGE)

    page = (start, end) if pages > 1 else None
    st.vega_lite_chart(
        points, rhythm_view.chart(points, unit, page, mark, _PICK), key="rhythm line", height=240, width="stretch",
        on_select=picked, selection_mode=_PICK, alt=f"{unit} along the text",
    )  # fmt: skip
    downloads(
        frame, name=f"rhythm {name}", python=python,
        draw=partial(draw_curve, frame, "position", {name: unit}, labels=("token", unit), marks=False),
    )  # fmt: skip
    shown = frame.iloc[start:end]
    token = state.held("token", _token, -1)
    values = shown[name] - shown[name].median() if name == "waad" else shown[name]
    said = f"{unit}, minus the median of the page" if name == "waad" else unit
    row = example_row(
        [readable(one) for one in shown["token"]],
        values.fillna(0.0).tolist(),
        at=token - start if start <= token < end else -1,
    )
    st.caption(
        "The text, each token on its own number: blue above the median of what is shown, orange below."
        if name == "waad"
        else "The text: the darker a token, the larger its number."
    )
    EXAMPLES.show(
        examples_data([(f"tokens {start:,} to {end - 1:,} of {len(frame):,}", [row])], unit=said), key="rhythm text"
    )


def _token(text: str) -> int | None:
    """A position in the address; -1 is none."""
    return int(text) if text == "-1" or (text.isascii() and text.isdecimal()) else None


def _couplings(saved: Any, python: str) -> None:
    import workbench as wb

    st.subheader("Do anchors follow preplan tokens?")
    found = wb.couplings(rhythm_view.rebuilt(saved))
    figure(
        found.plot, found.frame(), name="couplings", width="stretch",
        python=f"{python}\ncoupled = wb.couplings(found)\ncoupled.plot()\ncoupled.frame()",
        caption="Part of the anchors with a preplan token at most so many tokens before; by chance: the preplan tokens shifted.",
    )  # fmt: skip


guarded(page)
