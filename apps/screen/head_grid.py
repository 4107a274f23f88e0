"""One number per head as a grid of layers and heads, the strongest ones beside their null, and a head to look at.

A click on a cell or a dot chooses a head; so do the two lists above, by keyboard. The chosen head stands in the address.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.apps.screen import runs, state
from workbench.apps.screen.charts import draw_heads
from workbench.apps.screen.shown import downloads
from workbench.apps.screen.text import literal
from workbench.errors import UnknownName

if TYPE_CHECKING:
    import pandas as pd

_STRONGEST = 16
_WIDTH, _LEAST, _MOST = 400, 9, 44
_MARK, _GREY = "#e8590c", "#8a8f98"
_PICK = "pick"
_OWN = ("layer", "head", "value", "null", "low", "high")
_AXIS = {"type": "ordinal", "axis": {"labelAngle": 0, "labelOverlap": True, "grid": False}}


def head_grid(
    table: pd.DataFrame,
    unit: str,
    *,
    name: str,
    python: str,
    title: str = "",
    run: str | None = None,
    chance: str = "by chance",
) -> tuple[int | str, int]:
    """Draw ``table``, a row per head with ``layer, head, value`` and, where there are any, ``null, low, high``; what else it has
    is told when a cell is pointed at. Gives the chosen layer and head.

    ``unit``: what one unit of ``value`` is. ``run``: key of the run that the link to the head's page opens; no link without one.
    ``chance`` says what ``null`` is. ``name`` and ``python`` as in ``downloads``, ``title`` is the image's."""
    layer, head = _choose(table, run)
    heads = list(zip(table["layer"], table["head"], strict=True))
    shown = table.assign(
        layer=table["layer"].astype(str),
        name=[f"{one}.{other}" for one, other in heads],
        chosen=[pair == (layer, head) for pair in heads],
    )
    left, right = st.columns([3, 2])
    with left:
        _chart(shown, _cells(shown, unit), f"{name} grid", table, f"{unit}, by layer and head", "content")
    with right:
        size = shown["value"].abs()
        best = shown[size.notna()].loc[size.sort_values(ascending=False, kind="stable").dropna().index].head(_STRONGEST)
        if len(best):
            _chart(best, _dots(best, unit), f"{name} dots", table, f"the heads with the largest {unit}", "stretch")
            st.caption(literal(_legend(best, len(shown), chance)))
        else:
            st.info("No head has a number here.", icon=":material/info:")
    downloads(table, name=name, python=python, draw=partial(draw_heads, table, unit, title))
    return layer, head


def measure_of(frame: pd.DataFrame, measure: str) -> pd.DataFrame:
    """One measure of a table of heads as ``layer, head, value``, with its ``null, low, high`` where these are known."""
    names = {measure: "value"} | {f"{measure}_{end}": end for end in ("null", "low", "high")}
    if measure not in frame:
        raise UnknownName("measure of heads", measure, [name for name in frame if name not in ("layer", "head")])
    ends = [name for name in names if name in frame and (name == measure or frame[name].notna().any())]
    return frame[["layer", "head", *ends]].rename(columns=names)


def run_of(model: str) -> str | None:
    """The key of the newest captured run of a model, whose maps a head's page can show; None if there is none."""
    return next((one.key for one in runs.captured() if one.job.model == model), None)


def _choose(table: pd.DataFrame, run: str | None) -> tuple[int | str, int]:
    """The lists of layers and heads, which start at the strongest head, and the link to the chosen one."""
    pairs = list(zip(table["layer"].tolist(), table["head"].tolist(), strict=True))
    known = table["value"].notna()
    best = pairs[int(table["value"].abs().argmax())] if known.any() else pairs[0]
    row = st.columns([1, 1, 4], vertical_alignment="bottom")
    layers = list(dict.fromkeys(layer for layer, _ in pairs))
    layer = state.choose("Layer", layers, "layer", default=best[0], where=row[0])
    heads = [head for one, head in pairs if one == layer]
    head = state.choose("Head", heads, "head", default=best[1] if layer == best[0] else None, where=row[1])
    if run is None:
        row[2].caption("Capture a run of this model to look at its heads one by one.")
    else:
        row[2].page_link(
            "views/head.py",
            label=f"Look at head {layer}.{head}",
            icon=":material/zoom_in:",
            query_params={"run": run, "layer": str(layer), "head": str(head)},
        )
    return layer, head


def _chart(shown: pd.DataFrame, spec: dict[str, Any], key: str, table: pd.DataFrame, alt: str, width: Any) -> None:
    layers = {str(layer): layer for layer in table["layer"]}

    def picked() -> None:
        rows = st.session_state[key]["selection"].get(_PICK) or []
        if rows:
            state.put("layer", layers[str(rows[0]["layer"])])
            state.put("head", int(rows[0]["head"]))

    st.vega_lite_chart(shown, spec, key=key, width=width, on_select=picked, selection_mode=_PICK, alt=alt)


def _cells(shown: pd.DataFrame, unit: str) -> dict[str, Any]:
    rows, columns = shown["layer"].nunique(), shown["head"].nunique()
    step = max(_LEAST, min(_MOST, _WIDTH // max(columns, rows)))
    axes = {
        "x": {"field": "head", "title": "head", **_AXIS},
        "y": {"field": "layer", "title": "layer", "sort": shown["layer"].drop_duplicates().tolist(), **_AXIS},
    }
    signed = bool((shown["value"] < 0).any())
    scale = (
        {"scheme": "blueorange", "reverse": True, "domainMid": 0} if signed else {"scheme": "viridis", "domainMin": 0}
    )
    colour = {
        "condition": {
            "test": "isValid(datum.value)",
            "field": "value",
            "type": "quantitative",
            "scale": scale,
            "title": None,
        },
        "value": "transparent",
    }
    return {
        "width": {"step": step},
        "height": {"step": step},
        "autosize": "pad",
        "title": {"text": unit, "anchor": "start", "fontSize": 13, "fontWeight": "normal"},
        "layer": [
            {
                "params": [_picking()],
                "mark": {"type": "rect", "cursor": "pointer", "stroke": _GREY, "strokeWidth": 0.4},
                "encoding": {**axes, "color": colour, "tooltip": _tooltip(shown)},
            },
            {
                "transform": [{"filter": "datum.chosen"}],
                "mark": {"type": "rect", "filled": False, "stroke": _MARK, "strokeWidth": 3},
                "encoding": axes,
            },
        ],
    }


def _dots(best: pd.DataFrame, unit: str) -> dict[str, Any]:
    y = {
        "field": "name",
        "type": "nominal",
        "sort": best["name"].tolist(),
        "title": "head",
        "axis": {"labelOverlap": False},
    }
    colour = {"condition": {"test": "datum.chosen", "value": _MARK}, "value": "#1f77b4"}
    layers: list[dict[str, Any]] = []
    if "low" in best:
        layers.append(
            {
                "mark": {"type": "rule", "strokeWidth": 2},
                "encoding": {"x": {"field": "low", "type": "quantitative"}, "x2": {"field": "high"}, "color": colour},
            }
        )
    if "null" in best:
        layers.append(
            {
                "mark": {"type": "tick", "thickness": 2, "color": _GREY, "size": 12},
                "encoding": {"x": {"field": "null", "type": "quantitative"}},
            }
        )
    layers.append(
        {
            "params": [_picking()],
            "mark": {"type": "point", "filled": True, "size": 70, "cursor": "pointer", "opacity": 1},
            "encoding": {
                "x": {"field": "value", "type": "quantitative", "title": unit},
                "color": colour,
                "tooltip": _tooltip(best),
            },
        }
    )
    return {"height": {"step": 17}, "encoding": {"y": y}, "layer": layers}


def _picking() -> dict[str, Any]:
    return {"name": _PICK, "select": {"type": "point", "fields": ["layer", "head"], "clear": False}}


def _tooltip(shown: pd.DataFrame) -> list[dict[str, Any]]:
    said = {"name": "head", "null": "by chance"}
    columns = [str(name) for name in shown]
    others = [name for name in columns if name not in (*_OWN, "name", "chosen")]
    found: list[dict[str, Any]] = []
    for name in ("name", *(one for one in _OWN[2:] if one in columns), *others):
        number = shown[name].dtype.kind == "f"
        kind = {"type": "quantitative", "format": ".3~g"} if number else {"type": "nominal"}
        found.append({"field": name, "title": said.get(name, name), **kind})
    return found


def _legend(best: pd.DataFrame, heads: int, chance: str) -> str:
    said = [f"the {len(best)} strongest of {heads}" if len(best) < heads else f"all {heads} heads"]
    if "low" in best and best["low"].notna().any():
        said.append("bar: 95% interval")
    if "null" in best:
        said.append(f"grey tick: {chance}")
    return "; ".join(said)
