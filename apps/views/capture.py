"""Capture: run a model on an input and keep what its heads attended to."""

from __future__ import annotations

from typing import Any

import streamlit as st

from workbench.apps.memory import size_text
from workbench.apps.screen import place, predict, runs, state
from workbench.apps.screen.need import ask, guarded, job
from workbench.apps.screen.runs import Captured
from workbench.apps.screen.shown import downloads
from workbench.apps.screen.text import literal
from workbench.errors import WorkbenchError
from workbench.jobs.job import Job

TEXT = "When Mary and John went to the store, John gave a ring to"
_SOURCES = {
    "text": "a text",
    "file": "a text file",
    "filler": "made-up text",
    "needle": "made-up text with facts and a question",
    "task": "a prompt of a task",
    "image": "a made image",
}
_LONGEST = 5_000_000
_CHARACTERS = 4
"""Characters of a token, about: what a text's length is judged by before it is tokenized."""
_MOST = 131_072


def page() -> None:
    st.title("Capture")
    st.caption(
        "Runs the model once, as it always runs, and keeps the queries and keys of every head, so that any part of any map "
        "can be looked at later. The maps themselves are never built: what is stored grows with the tokens, not their square."
    )
    left, right = st.columns([3, 2], gap="large")
    with left:
        wanted, tokens, about = _form()
    with right:
        _prediction(wanted, tokens, about)
        if st.button("Capture", type="primary", icon=":material/photo_camera:", disabled=wanted is None):
            st.session_state["capturing"] = wanted
    asked: Job | None = st.session_state.get("capturing")
    if asked is None:
        return
    done = ask(asked, f"Capturing {asked.model}")
    if done is not None:
        _outcome(Captured(done.key, done.job))


def _form() -> tuple[Job | None, int, bool]:
    """The job as it is filled in, its tokens, and whether that is a guess from the characters."""
    model = state.choose("Model", place.models(), "model", default=runs.MODEL)
    sizes = predict.sizes(model)
    source = state.choose("Input", list(_SOURCES), "source", show=_SOURCES.__getitem__)
    args: dict[str, Any] = {}
    task, seed, tokens, about = None, 0, 0, False
    longest = min(_MOST, (sizes.context if sizes and sizes.context else _MOST)) - 1
    if source == "text":
        words = st.text_area("Text", TEXT, height=160, key="captured text", persist_state="session")
        args, tokens, about = {"text": words}, -(-len(words) // _CHARACTERS), True
    elif source == "file":
        given = st.file_uploader("Text file, UTF-8", type=["txt", "md", "py", "json", "csv", "log"], max_upload_size=5)
        if given is None:
            return None, 0, True
        words = _text_of(given.name, given.getvalue())
        args, tokens, about = {"text": words}, -(-len(words) // _CHARACTERS), True
    elif source in ("filler", "needle"):
        tokens = state.number("Tokens", 64, max(64, longest), "tokens", default=512, kind="number_input")
        seed = state.number("Seed", 0, 10_000, "seed", default=0, kind="number_input")
        args = {source: tokens}
    elif source == "task":
        import workbench as wb

        task = state.choose("Task", list(wb.tasks()), "task", default="ioi")
        side = state.choose("Prompt", ["clean", "corrupt"], "side", kind="segmented_control")
        seed = state.number("Seed", 0, 10_000, "seed", default=0, kind="number_input")
        args, tokens, about = {"side": side}, 32, True
    else:
        number = state.number("Number of the image", 0, 63, "image", default=0, kind="number_input")
        args, tokens, about = {"image": number}, 64, True
    try:
        return job("capture", model, task, seed=seed, **args), tokens, about
    except WorkbenchError as error:
        st.error(literal(str(error)))
        return None, tokens, about


def _text_of(name: str, raw: bytes) -> str:
    if len(raw) > _LONGEST:
        raise WorkbenchError(f"{name} has {len(raw):,} bytes; a text file here has at most {_LONGEST:,}")
    try:
        words = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise WorkbenchError(f"{name} is not UTF-8 text: byte 0x{raw[error.start]:02x} at {error.start}") from None
    if "\0" in words:
        raise WorkbenchError(f"{name} is not text: it holds zero bytes")
    return words


def _prediction(wanted: Job | None, tokens: int, about: bool) -> None:
    """Bytes and time before it runs."""
    if wanted is None or wanted.model is None or not tokens:
        return
    sizes = predict.sizes(wanted.model)
    roughly = "about " if about else ""
    row = st.container(horizontal=True, gap="medium")
    row.metric("Tokens", f"{roughly}{tokens:,}", width="content")
    if sizes is None:
        st.caption(
            "The config of this model does not say its sizes, so what will be stored is not known before it ran."
        )
        return
    size = predict.disk(sizes, tokens)
    took = predict.seconds(wanted.model, tokens)
    row.metric("On disk", f"{roughly}{size_text(size)}", width="content")
    row.metric(
        "Time",
        "not known yet" if took is None else f"≤ {max(1, round(took)):,} s",
        width="content",
        help="From captures of this model that ran here; twice the tokens take at most four times as long.",
    )
    dense = 4 * sizes.layers * sizes.heads * tokens**2
    st.caption(literal(f"The maps in full, which are never built, would take {size_text(dense)}."))
    if sizes.context is not None and tokens > sizes.context:
        st.warning(f"The model takes at most {sizes.context:,} tokens.")
    if size > 0.8 * predict.free():
        st.warning(f"The disk of the results folder has {size_text(predict.free())} left.")


def _outcome(run: Captured) -> None:
    about = runs.about(run)
    state.put("run", run.key)
    st.subheader("Captured")
    row = st.container(horizontal=True, gap="large")
    row.metric("Tokens", f"{about['tokens']:,}", width="content")
    row.metric("Seconds", f"{about['seconds']:.2f}", width="content")
    row.metric("On disk", size_text(about["bytes"]), width="content")
    difference = about["logit_difference"]
    row.metric(
        "Logit difference", "not checked" if difference is None else f"{difference:g}", width="content",
        help="Largest difference of the last position's logits with capture on and off. It has to be 0: looking changes nothing.",
    )  # fmt: skip
    if difference:
        st.error("The output changed while it was looked at; do not trust these maps.")
    query = {"run": run.key}
    with st.container(horizontal=True):
        st.page_link("views/atlas.py", label="All heads", icon=":material/apps:", query_params=query)
        st.page_link("views/head.py", label="One head", icon=":material/grid_on:", query_params=query)
        st.page_link("views/sinks.py", label="Sinks", icon=":material/vertical_align_bottom:", query_params=query)
    frame = runs.atlas_of(run).frame()
    st.dataframe(frame, hide_index=True, height=300)
    downloads(frame, name="capture", python=f"{run.python}\nwb.atlas(run, blocks={about['blocks']}).frame()")


guarded(page)
