"""Sinks: the tokens that collect attention whatever the query asks for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.apps.screen import place, runs, sinks_view, state
from workbench.apps.screen.charts import draw_curve
from workbench.apps.screen.head_grid import head_grid
from workbench.apps.screen.need import guarded, job, need
from workbench.apps.screen.questions import show_questions
from workbench.apps.screen.runs import Captured
from workbench.apps.screen.shown import downloads, figure
from workbench.apps.screen.sink_causes import CAUSES
from workbench.apps.screen.text import literal

if TYPE_CHECKING:
    import pandas as pd

_PARTS = {
    "run": "In this run",
    "texts": "Over several texts",
    "cause": "What the sink does",
    "models": "Two models",
}
_NUMBERS = {
    "share": st.column_config.NumberColumn(
        "share", format="%.3f", help="mean weight over the queries that may see the token"
    ),
    "uniform": st.column_config.NumberColumn(
        "if even", format="%.3f", help="the share if attention were spread evenly"
    ),
    "error": st.column_config.NumberColumn("± error", format="%.3f", help="standard error of the mean over texts"),
    "heads": st.column_config.NumberColumn("heads", help="heads whose favourite it is, mean over texts"),
}
_WORK = "workbench.apps.work_sinks"


def page() -> None:
    st.title("Sinks")
    st.caption(
        "A sink is a token to which many heads give most of their attention, whatever the query is about: usually the first one."
    )
    run = runs.current()
    _body(run)


@st.fragment
def _body(run: Captured) -> None:
    guarded(lambda: _part(run))


def _part(run: Captured) -> None:
    part = state.choose("Show", list(_PARTS), "part", show=_PARTS.__getitem__, kind="segmented_control")
    {"run": _run, "texts": _texts, "cause": _cause, "models": _models}[part](run)


# ------------------------------------------------------------------ this run


@st.cache_resource(max_entries=4, show_spinner=False)
def _sinks(folder: str, key: str, raw: bool) -> Any:
    import workbench as wb

    return wb.sinks(wb.open_run(folder), raw=raw)


def _run(run: Captured) -> None:
    opened = runs.opened(run)
    row = st.columns([2, 2, 2], vertical_alignment="bottom")
    gated = sinks_view.is_gated(opened)
    raw = gated and state.flag(
        "inside the gate", "raw", where=row[2], help="The attention before the output gate scales what a head writes."
    )
    epsilon = state.fraction(
        "A first token with a larger share is a sink", 0.05, 0.95, "epsilon", default=0.3, step=0.05, where=row[1]
    )
    found = replace(_sinks(str(run.folder), run.key, raw), epsilon=epsilon)
    known = sinks_view.measures(opened, found)
    name = state.choose("Heads by", list(known), "measure", where=row[0])
    measure = known[name]
    _summary(found)
    st.caption(literal(f"{measure.says[0].upper()}{measure.says[1:]}."))
    layer, head = head_grid(
        measure.table(),
        measure.unit,
        name="sinks",
        python=f"{run.python}\n{measure.code}\nfound.plot()\nfound.frame()",
        title=f"{name}\n{run.title}",
        run=run.key,
        chance=measure.chance or "by chance",
    )
    _one_head(run, found, layer, head)
    _all_heads(run, found)


def _summary(found: Any) -> None:
    layers = [layer for layer in found.share if layer not in found.undefined]
    heads = sum(found.share[layer].shape[0] for layer in layers)
    even = sum(float(found.uniform[layer][:, 0].mean()) for layer in layers) / max(1, len(layers))
    with st.container(horizontal=True, gap="medium"):
        st.metric(
            "heads with a sink", f"{found.sink_score * heads:.0f} of {heads}", width="content",
            help=f"heads that give the first token more than {found.epsilon:.2f} of their attention",
        )  # fmt: skip
        st.metric(
            "attention to the first token", f"{found.f_attn:.1%}", width="content",
            help="mean over queries, heads and layers (F-Attn)",
        )  # fmt: skip
        st.metric("its share if attention were even", f"{even:.1%}", width="content")
    for layer, why in found.undefined.items():
        st.caption(literal(f"Layer {layer}: {why}."))


def _one_head(run: Captured, found: Any, layer: int | str, head: int) -> None:
    st.subheader(f"Head {layer}.{head}, token by token")
    left, right = st.columns([3, 2])
    line = sinks_view.profile(found, layer, head)
    code = f"{run.python}\nfound = wb.sinks(run{', raw=True' if found.raw else ''})\n"
    with left:
        st.vega_lite_chart(line, _LINE, width="stretch", height=260, alt=f"share of every token in head {layer}.{head}")
        downloads(
            line,
            name=f"sinks-{layer}-{head}",
            python=f"{code}frame = found.frame().query('layer == {layer!r} and head == {head}')",
            draw=partial(
                draw_curve, line, "position", {"share": f"head {layer}.{head}", "uniform": "if even"},
                labels=("position", "share"), marks=False,
            ),
        )  # fmt: skip
    with right:
        best = sinks_view.top_keys(found, layer, head).dropna(axis=1, how="all")
        st.dataframe(best, hide_index=True, column_config=_NUMBERS, height=300)


_LINE = {
    "layer": [
        {
            "mark": {"type": "area", "line": True, "interpolate": "step-after", "opacity": 0.5},
            "encoding": {
                "y": {
                    "field": "share",
                    "type": "quantitative",
                    "title": "share (root scale)",
                    "scale": {"type": "sqrt"},
                }
            },
        },
        {
            "mark": {"type": "line", "strokeDash": [4, 3], "color": "#8a8f98"},
            "encoding": {"y": {"field": "uniform", "type": "quantitative"}},
        },
        {
            "mark": {"type": "rule", "opacity": 0, "strokeWidth": 6},
            "encoding": {
                "tooltip": [
                    {"field": "position", "type": "quantitative"},
                    {"field": "token", "type": "nominal"},
                    {"field": "share", "type": "quantitative", "format": ".3f"},
                    {"field": "uniform", "type": "quantitative", "format": ".3f", "title": "if even"},
                ]
            },
        },
    ],
    "encoding": {"x": {"field": "position", "type": "quantitative", "title": "token (dashed: if attention were even)"}},
}


def _all_heads(run: Captured, found: Any) -> None:
    left, right = st.columns([3, 2])
    code = f"{run.python}\nfound = wb.sinks(run{', raw=True' if found.raw else ''})\n"
    with left:
        st.subheader("Where the attention of each layer goes")
        st.caption(
            "Part of a layer's attention that a stretch of the text gets, minus what it would get if attention were even."
        )
        table = sinks_view.stripes(found)
        st.vega_lite_chart(table, _stripes(table), width="stretch", alt="attention by layer and position")
        downloads(table, name="sinks by position", python=f"{code}wb.received(run).frame()")
    with right:
        st.subheader("Favourite tokens")
        heads = sinks_view.favourite_of_heads(found).rename(columns={"value": "share", "null": "uniform"})
        table = sinks_view.favourites(heads).drop(columns="error").astype({"heads": int})
        st.dataframe(table, hide_index=True, column_config=_NUMBERS, height=280)
        downloads(table, name="favourite tokens", python=f"{code}for sink in found.strongest():\n    print(sink)")


def _stripes(table: pd.DataFrame) -> dict[str, Any]:
    layers = table["layer"].drop_duplicates().astype(str).tolist()
    return {
        "height": {"step": max(10, min(28, 640 // len(layers)))},
        "autosize": {"type": "fit-x", "contains": "padding"},
        "mark": {"type": "rect"},
        "transform": [{"calculate": "toString(datum.layer)", "as": "row"}],
        "encoding": {
            "x": {"field": "start", "type": "quantitative", "title": "position", "scale": {"nice": False}},
            "x2": {"field": "end"},
            "y": {
                "field": "row", "type": "ordinal", "title": "layer", "sort": layers,
                "axis": {"labelOverlap": len(layers) > 24},
            },
            "color": {
                "field": "more", "type": "quantitative", "title": "more than even",
                "scale": {"scheme": "blueorange", "reverse": True, "domainMid": 0}, "legend": {"format": "+.0%"},
            },
            "tooltip": [
                {"field": "row", "title": "layer", "type": "nominal"},
                {"field": "start", "type": "quantitative"},
                {"field": "end", "type": "quantitative"},
                {"field": "part", "type": "quantitative", "format": ".1%", "title": "part of the attention"},
                {"field": "even", "type": "quantitative", "format": ".1%", "title": "if even"},
                {"field": "more", "type": "quantitative", "format": "+.1%", "title": "more than even"},
            ],
        },
    }  # fmt: skip


# ------------------------------------------------------------------ several texts


def _texts(run: Captured) -> None:
    import workbench as wb
    from workbench.apps.work_sinks import WORDS

    row = st.columns([2, 1, 1, 2], vertical_alignment="bottom")
    source = state.choose(
        "Texts", ["stories", *wb.tasks()], "task", where=row[0], help="made-up stories, or prompts of a task"
    )
    count = state.number("How many", 2, 100, "texts", default=16, where=row[1], kind="number_input")
    words = (
        state.number("Words each", 8, 500, "words", default=WORDS, where=row[2], kind="number_input")
        if source == "stories"
        else None
    )
    model = run.job.model
    sizes = {"texts": count, "words": words} if source == "stories" else {"examples": count}
    task = None if source == "stories" else source
    done = need(job(f"{_WORK}:sinks_by_text", model, task, **sizes), f"Sinks of {count} texts")
    rows = done.table()
    kinds = rows["map"].unique().tolist()
    kind = (
        kinds[0]
        if len(kinds) == 1
        else state.choose("Gated maps", kinds, "map", kind="segmented_control", where=row[3], show=_KIND.__getitem__)
    )
    rows = rows[rows["map"] == kind]
    python = (
        f"import workbench as wb\nfrom workbench.apps.work_sinks import sinks_by_text\n\nmodel = wb.load({model!r})\n"
        + (f"rows = sinks_by_text(model, texts={count}, words={words})" if task is None
           else f"pairs = wb.task({task!r}).build(0, model.tokenizer, {count})\nrows = sinks_by_text(model, pairs)")
    )  # fmt: skip
    st.caption(
        "Share of the first token, mean over the texts. A head that sinks in one text and not in the next has a wide bar."
    )
    head_grid(
        sinks_view.over_texts(rows), "share of the first token", name="sinks over texts", python=python,
        title=f"First token over {count} texts\n{model}", run=run.key, chance="evenly spread attention",
    )  # fmt: skip
    st.subheader("Favourite tokens over the texts")
    table = sinks_view.favourites(rows).round({"heads": 1})
    st.dataframe(table, hide_index=True, column_config=_NUMBERS, height=280)
    downloads(table, name="favourites over texts", python=python)


_KIND = {"effective": "after the gate", "raw": "inside the gate"}


# ------------------------------------------------------------------ what it does


def _cause(run: Captured) -> None:
    show_questions(CAUSES, run.job.model or "", run=run.key)


# ------------------------------------------------------------------ two models


def _models(run: Captured) -> None:
    from workbench.jobs.revisions import revision_of

    row = st.columns([2, 1, 1, 2], vertical_alignment="bottom")
    model = run.job.model or ""
    others = [name for name in place.models() if name != model]
    twin = {"tiny-softmax": "tiny-gated", "tiny-gated": "tiny-softmax"}.get(model)
    other = state.choose(
        "Beside it", others, "twin", default=twin, where=row[0], help="a second model, on the same texts"
    )
    count = state.number("Texts", 2, 100, "texts", default=16, where=row[1], kind="number_input")
    done = need(
        job(f"{_WORK}:twins", model, other=other, revision=revision_of(other), texts=count), f"{model} and {other}"
    )
    rows, python = done.table(), _twin_code(model, other, count)
    layers, whole, heads = (sinks_view.twin_rows(rows, by) for by in ("layer", "model", "head"))
    left, right = st.columns([3, 2])
    with left:
        st.caption("Mean attention to the first token by layer; shaded: 95% interval over texts.")
        draw = partial(_draw_twins, layers, Path(model).name, Path(other).name)
        figure(draw, layers, name="two models", python=f"{python}\nfound.plot()\nfound.layers()", width="stretch")
    with right:
        st.caption(
            "F-Attn is the attention to the first token, the sink score the part of the heads with a sink, largest the largest "
            "number in a residual stream."
        )
        kept = [name for name in ("model", "map", "f_attn", "sink_score", "largest", "mean_gate") if name in whole]
        st.dataframe(whole[kept], hide_index=True)
        downloads(whole, name="two models, numbers", python=f"{python}\nfound.frame()")
    st.subheader("Which heads differ")
    kinds = heads["map"].unique().tolist()
    kind = kinds[0]
    if len(kinds) > 1:
        kind = state.choose("Gated maps", kinds, "map", kind="segmented_control", show=_KIND.__getitem__)
    names = {"difference": "value", "difference_low": "low", "difference_high": "high", "first": model, "second": other}
    table = heads[heads["map"] == kind].sort_values(["layer", "head"], kind="stable")[["layer", "head", *names]]
    head_grid(
        table.rename(columns=names).reset_index(drop=True),
        f"{Path(other).name} minus {Path(model).name}",
        name="heads of two models",
        python=f"{python}\nfound.heads()",
        run=run.key,
    )


def _draw_twins(layers: pd.DataFrame, model: str, other: str) -> Any:
    """Both models by layer, solid after the gate and dashed inside it."""
    from workbench.results import axis

    ax = axis(None, 5.6, 3.4)
    plain = layers[layers["map"] != "raw"]
    for map_, part in layers.groupby("map", sort=False):
        at = part["layer"].astype(str)
        for i, (column, label) in enumerate((("first", model), ("second", other))):
            inside = map_ == "raw"
            if inside and part[column].tolist() == plain[column].tolist():
                continue  # no gate: one map is both
            line, said = ("--", f"{label}, inside the gate") if inside else ("-", label)
            ax.plot(at, part[column], color=f"C{i}", marker="o", linestyle=line, label=said)
            ax.fill_between(at, part[f"{column}_low"], part[f"{column}_high"], color=f"C{i}", alpha=0.2, linewidth=0)
    ax.set(xlabel="layer", ylabel="attention to the first token", ylim=(0, None))
    ax.legend()
    return ax


def _twin_code(model: str, other: str, texts: int) -> str:
    return (
        "import torch\nimport workbench as wb\nfrom workbench.apps.work_sinks import stories\n\n"
        f"runs = []\nfor name in ({model!r}, {other!r}):\n    model = wb.load(name)\n"
        "    streams = [f'blocks.{layer}.hook_resid_post' for layer in range(model.shape.layers)]\n"
        "    with torch.no_grad():\n"
        f"        runs.append(model.run(stories({texts}), read=streams, maps=wb.capture(), logits=None))\n"
        f"found = wb.compare_sinks(*runs, ({model!r}, {other!r}))"
    )


guarded(page)
