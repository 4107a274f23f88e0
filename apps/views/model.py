"""Model: what it is made of, what of it can be captured, and what that takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.apps.screen import place, state
from workbench.apps.screen.need import guarded, job, need
from workbench.apps.screen.shown import downloads, figure
from workbench.apps.screen.text import literal

if TYPE_CHECKING:
    import pandas as pd

_LENGTHS = tuple(512 * 2**i for i in range(9))


def page() -> None:
    st.title("Model")
    st.caption(
        "What a model is made of, how the attention of each layer is read, and how much memory it takes to keep that for a "
        "given length of input."
    )
    name = state.choose(
        "Model", place.models(), "model", show=lambda path: Path(path).name, where=st.container(width=400)
    )
    done = need(job("workbench.apps.work_model:model_facts", name), f"Loading {Path(name).name}")
    facts = done.load().labels
    python = f"import workbench as wb\n\nmodel = wb.load({name!r})"
    _sizes(facts)
    _layers(done.table(), python)
    _memory(facts, python)
    _sites(facts)
    _card(name)


def _sizes(facts: Mapping[str, Any]) -> None:
    shape = facts["shape"]
    with st.container(horizontal=True, gap="medium"):
        for label, value, said in (
            ("layers", shape["layers"], None),
            ("heads", shape["heads"], "query heads of each layer"),
            (
                "key heads",
                shape["kv_heads"],
                "heads of keys and values; fewer than query heads where several share one",
            ),
            ("width", shape["width"], "numbers per token between layers"),
            ("head width", shape["head_width"], "numbers per token in one head"),
            ("vocabulary", shape["vocab"], "classes or tokens that it tells apart"),
            ("longest input", shape["context"], "tokens that the model accepts"),
            ("longest in training", shape["trained"], "tokens; what is longer is new to the model"),
            ("parameters", facts["parameters"], f"as they run: {facts['dtype']}"),
        ):
            if value is not None:
                st.metric(label, f"{value:,}", help=said, width="content")
    grid, causal = facts["grid"], shape["causal"]
    sees = "a token sees itself and what comes before it" if causal else "every token sees all tokens"
    reads = f"; it reads images of {grid['rows']} × {grid['cols']} patches" if grid else ""
    st.text(f"{facts['kind']}, {facts['dtype']}: {sees}{reads}.")


def _layers(frame: pd.DataFrame, python: str) -> None:
    st.subheader("Layers")
    for (mixer, route, exactness), part in frame.groupby(["mixer", "route", "exactness"], sort=False):
        layers = [str(layer) for layer in part["layer"]]
        numbers = ", ".join(layers) if len(layers) <= 4 else f"{layers[0]} … {layers[-1]}"
        how = "not captured" if route == "none" else f"captured ({route}), {exactness}"
        st.text(f"{len(layers)} layer{'s' * (len(layers) != 1)} of {mixer} ({numbers}): {how}")
    for missing, part in frame[frame["missing"] != ""].groupby("missing", sort=False):
        st.warning(literal(f"layers {', '.join(map(str, part['layer']))}: {missing}"))
    with st.expander("Every layer"):
        st.dataframe(frame, hide_index=True)
    downloads(frame, name="layers", python=f"{python}\nmodel.manifest().frame()")


def _memory(facts: Mapping[str, Any], python: str) -> None:
    from workbench.apps.memory import memory_frame, memory_plot
    from workbench.apps.work_model import shape_of
    from workbench.jobs.guard import total_memory

    st.subheader("Memory by length of input")
    st.caption(
        "Dense patterns are what most tools hold; block maps, queries and keys, and received mass are what is captured here. "
        "All layers and heads of one input."
    )
    tokens = state.choose(
        "Tokens",
        _LENGTHS,
        "tokens",
        default=8192,
        show=lambda n: f"{n:,}",
        kind="select_slider",
        help="length of the input",
    )
    shape, dtype = shape_of(facts), facts["dtype"]
    longest = shape.context
    if longest is not None and tokens > longest:
        st.info(
            f"This model accepts {longest:,} tokens at most; the numbers are those of a model like it that accepts more."
        )
    frame = memory_frame(shape, tokens, dtype=dtype)
    figure(
        lambda: memory_plot(shape, tokens, dtype=dtype, machine=total_memory()),
        frame,
        name="memory",
        python=(
            f"{python}\nfrom workbench.apps.memory import memory_frame, memory_plot\n\n"
            f"memory_plot(model.shape, {tokens}, dtype={dtype!r})\nmemory_frame(model.shape, {tokens}, dtype={dtype!r})"
        ),
        width=860,
    )
    st.dataframe(
        frame[["kept", "size", "formula"]],
        hide_index=True,
        column_config={"kept": "what is kept", "size": st.column_config.TextColumn(alignment="right")},
    )


def _sites(facts: Mapping[str, Any]) -> None:
    sites = list(dict.fromkeys(re.sub(r"\.\d+\.", ".N.", site) for site in facts["manifest"]["sites"]))
    with st.expander(f"{len(sites)} kinds of activations that can be read or changed"):
        st.caption("Names for model.run(read=...) and model.run(edit=...); N stands for the number of a layer.")
        st.code("\n".join(sites), language=None)


def _card(name: str) -> None:
    from workbench.apps.work_model import card

    said = card(name)
    if said:
        with st.expander("Its card: how it was made and what it can do"):
            st.markdown(said)


guarded(page)
