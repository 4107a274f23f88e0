"""One head: its whole map, any part of it exactly, the text coloured by what a token attends to, and another run beside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import streamlit as st

from workbench.apps.components.tilemap import SCALES, TILEMAP
from workbench.apps.components.tokens import PAGE, TOKENS
from workbench.apps.head_data import WAYS, map_data, text_data
from workbench.apps.screen import head_view, runs, state
from workbench.apps.screen.head_view import Look
from workbench.apps.screen.need import guarded
from workbench.apps.screen.runs import Captured
from workbench.apps.screen.shown import downloads
from workbench.apps.screen.text import literal, readable
from workbench.errors import WorkbenchError

_SINK = {"show": "sink shown", "hide": "sink hidden", "renormalise": "rest renormalised"}
_DIRECTION = {"from": "what it attends to", "to": "who attends to it"}
_STRONGEST = 10
_NONE = "nothing"
_FOLLOW = -1
"""The text starts where the token in focus is."""


def page() -> None:
    st.title("Head")
    st.caption(
        "Queries run downwards, keys to the right. Zoom in with the wheel until the weights are exact; click a cell to see its "
        "query in the text, and a token to see whom it attends to."
    )
    ours = runs.current()
    _head(ours)


@st.fragment
def _head(ours: Captured) -> None:
    guarded(lambda: _controls(ours))


def _controls(ours: Captured) -> None:
    run = runs.opened(ours)
    state.forget_unless("run of the view", ours.key, ("view", "focus", "key", "start"))
    row = st.columns([1, 1, 1.6, 1.6, 3], vertical_alignment="bottom")
    layer = state.choose("Layer", list(run.maps), "layer", where=row[0])
    amap = run.maps[layer]
    heads = state.choose(
        "Head", head_view.heads_of(amap), "head", where=row[1], help="kv0 is the mean of a group of heads."
    )
    way = state.choose("Cells show", list(WAYS), "way", show=WAYS.__getitem__, where=row[2])
    scale = state.held("scale", lambda text: text if text in SCALES else None, "sqrt")
    sink = state.choose("First token", list(_SINK), "sink", show=_SINK.__getitem__, where=row[3])
    others = {one.key: one for one in runs.captured() if one.key != ours.key}
    other = state.choose(
        "Beside it",
        [_NONE, *others],
        "other",
        show=lambda key: others[key].title if key in others else key,
        where=row[4],
        help="A second run, of another text or another model, at the same layer and head.",
    )
    raw = head_view.is_gated(amap) and state.flag(
        "inside the gate", "raw", help="The attention before the output gate scales each query's result."
    )
    _, _, q, k = amap.shape
    view = state.held("view", _read_view, (0, q, 0, k), say=lambda v: "-".join(map(str, v)))
    if view[0] >= q or view[2] >= k:
        asked = "-".join(map(str, view))
        st.warning(
            f"The part {asked} of this link lies outside of the {q:,} x {k:,} tokens of this map; all of it is shown."
        )
    hide = (0,) if sink != "show" else ()
    look = Look(layer, heads, head_view.fitted(view, amap), way, raw, hide, sink == "renormalise")
    second = others.get(other)
    if second is None:
        left, right = st.columns([3, 2])
        with left:
            _map(ours, look, scale)
        with right:
            _text(ours, look)
        return
    _beside(ours, second, look, scale)


def _map(run: Captured, look: Look, scale: str, name: str = "map") -> Any:
    """One map with its downloads; gives what it shows."""
    opened = runs.opened(run)
    found = head_view.part(opened, look)
    _draw(run, look, found, scale, name)
    downloads(
        found.frame, name=f"{name}-{look.layer}-{look.heads.name}", python=look.python(run.python), draw=found.plot
    )
    return found


def _draw(run: Captured, look: Look, found: Any, scale: str, name: str, signed: bool = False) -> None:
    opened = runs.opened(run)
    focus = _focus(look.map(opened).shape[2])
    chosen = _chosen() is not None
    TILEMAP.show(
        map_data(
            opened,
            look,
            found,
            scale=scale,
            cross=(focus, state.held("key", _read_token, 0)) if chosen else None,
            source=f"{run.key} {look.layer} {look.heads.name} {look.way} {look.raw} {look.hide} {look.renormalise}",
            signed=signed,
        ),
        key=f"tilemap {name}",
        on={
            "view": lambda value: state.put("view", tuple(map(int, value))),
            "cell": _cell,
            "scale": lambda value: state.put("scale", value),
        },
    )


def _cell(value: Any) -> None:
    query, key = map(int, value)
    state.put("focus", query)
    state.put("key", key)
    state.put("start", _FOLLOW)


def _text(run: Captured, look: Look) -> None:
    """The text around the token in focus, coloured by its weights; the strongest ones by name."""
    opened = runs.opened(run)
    amap = look.map(opened)
    _, _, q, k = amap.shape
    queries, keys = head_view.token_names(opened, look.layer)
    direction = state.choose(
        "The text shows", list(_DIRECTION), "direction", show=_DIRECTION.__getitem__, kind="segmented_control"
    )
    length = q if direction == "from" else k
    focus = min(_focus(q), length - 1)
    shown = keys if direction == "from" else queries
    weights = head_view.weights_of(opened, look, focus, direction)
    start = state.held("start", _read_start, _FOLLOW)
    if start == _FOLLOW:
        start = focus // PAGE * PAGE
    TOKENS.show(
        text_data(opened, look, focus, direction, start, weights),
        key="tokens",
        on={
            "focus": lambda value: state.put("focus", int(value)),
            "page": lambda value: state.put("start", int(value)),
        },
    )
    best = weights.abs().topk(min(_STRONGEST, len(weights)))
    import pandas as pd

    table = pd.DataFrame(
        {
            "position": best.indices.numpy(),
            "token": [readable(shown[int(i)]) for i in best.indices],
            "weight": weights[best.indices].numpy(),
        }
    )
    st.dataframe(
        table, hide_index=True, height=200, column_config={"weight": st.column_config.NumberColumn(format="%.4f")}
    )
    line = f"weights = wb.zoom(run.maps[{look.layer!r}], {list(look.heads.indices)}"
    span = f"({focus}, {focus + 1}), (0, {k})" if direction == "from" else f"(0, {q}), ({focus}, {focus + 1})"
    downloads(
        lambda: pd.DataFrame({"position": range(len(shown)), "token": shown, "weight": weights.numpy()}),
        name=f"row-{look.layer}-{look.heads.name}-{focus}",
        python=f"{run.python}\n{line}, {span}, cells=10**9)\nweights.frame()",
    )


def _beside(ours: Captured, theirs: Captured, look: Look, scale: str) -> None:
    """Two runs and their difference."""
    opened = runs.opened(theirs)
    if look.layer not in opened.maps:
        raise WorkbenchError(f"{theirs.title} has no layer {look.layer}; it has {', '.join(map(str, opened.maps))}")
    amap = opened.maps[look.layer]
    if max(look.heads.indices) >= amap.shape[1]:
        raise WorkbenchError(f"{theirs.title} has {amap.shape[1]} heads; head {look.heads.name} is not among them")
    second = replace(look, view=head_view.fitted(look.view, amap), raw=look.raw and head_view.is_gated(amap))
    left, middle, right = st.columns(3)
    with left:
        a = _map(ours, look, scale)
        st.caption(literal(ours.title))
    with middle:
        b = _map(theirs, second, scale, "other")
        st.caption(literal(theirs.title))
    with right:
        lengths = [tuple(shown.map(runs.opened(run)).shape[2:]) for run, shown in ((ours, look), (theirs, second))]
        if lengths[0] != lengths[1]:
            said = " and ".join(f"{q:,} x {k:,}" for q, k in lengths)
            st.info(f"The maps are {said} tokens: a difference needs runs of one length.", icon=":material/info:")
            return
        apart = head_view.difference(a, b)
        _draw(ours, look, apart, scale, "difference", signed=True)
        heads = list(look.heads.indices)
        python = (
            f"import workbench as wb\n\nours = wb.open_run({str(ours.folder)!r})\ntheirs = wb.open_run({str(theirs.folder)!r})\n"
            f"span = ({look.view[0]}, {look.view[1]}), ({look.view[2]}, {look.view[3]})\n"
            f"a, b = (wb.zoom(run.maps[{look.layer!r}], {heads}, *span) for run in (ours, theirs))\napart = a.values - b.values"
        )
        downloads(apart.frame, name=f"difference-{look.layer}-{look.heads.name}", python=python, draw=apart.plot)
        st.caption("ours minus the other's")


def _focus(queries: int) -> int:
    """The token that is looked at; the last one to begin with."""
    chosen = _chosen()
    return queries - 1 if chosen is None else min(chosen, queries - 1)


def _chosen() -> int | None:
    return state.held("focus", _read_token, None, say=lambda at: "" if at is None else str(at))


def _read_token(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() else None


def _read_start(text: str) -> int | None:
    return _FOLLOW if text == str(_FOLLOW) else _read_token(text)


def _read_view(text: str) -> tuple[int, int, int, int] | None:
    parts = [_read_token(one) for one in text.split("-")]
    if len(parts) != 4 or None in parts:
        return None
    q0, q1, k0, k1 = (int(one or 0) for one in parts)
    return (q0, q1, k0, k1) if q0 < q1 and k0 < k1 else None


guarded(page)
