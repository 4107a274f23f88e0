"""Saved results: what commands and the demo left in the results folder."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.apps.report import Numbers, Picture, Prose
from workbench.apps.screen import place, state
from workbench.apps.screen.need import guarded
from workbench.apps.screen.shown import downloads, drawing, made
from workbench.apps.screen.text import literal
from workbench.apps.store import Stored, account, stored
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 1000


def page() -> None:
    st.title("Saved results")
    st.caption(
        "What `workbench ... --out FOLDER` and `make demo` saved in the results folder, each with its figures and numbers."
    )
    root = place.store()
    things = stored(root) if root.is_dir() else []
    if not things:
        st.info(
            f"Nothing is saved in {literal(str(root))} yet. `make demo` saves results, and so does a command with `--out`; "
            "what pages and grids compute is in Jobs."
        )
        return
    _findings(root)
    broken = {thing.name: why for thing in things if (why := _damage(str(thing.path), thing.kind, _changed(thing)))}
    for name, why in broken.items():
        st.error(literal(f"{name} cannot be read: {why}"), icon=":material/broken_image:")
    whole = {thing.name: thing for thing in things if thing.name not in broken}
    if whole:
        chosen = state.choose("Result", list(whole), "result", always=True, where=st.container(width=560))
        _show(whole[chosen])


def _findings(root: Path) -> None:
    """What the demo said of each of its steps."""
    try:
        told = account(root)
    except WorkbenchError as error:
        st.error(literal(str(error)))
        return
    if told is None:
        return
    with st.expander("What the demo found", expanded="result" not in st.query_params, icon=":material/lightbulb:"):
        for step in told["steps"]:
            st.markdown(f"**{literal(step['title'])}**")
            st.text("\n".join(step["lines"]) if not step.get("error") else f"failed: {step['error']}")


def _show(thing: Stored) -> None:
    """One result: figures, the tables beside them, then all of its rows."""
    st.subheader(literal(thing.name), anchor=False)
    frame, parts = _parts(str(thing.path), thing.name, thing.kind, _changed(thing))
    reader = "wb.Circuit.load" if thing.kind == "circuit" else "wb.load_result"
    python = (
        "import workbench as wb\nfrom workbench.apps.sections import parts_of\n\n"
        f"found = {reader}({str(thing.path)!r})\nfound.frame()\nparts = list(parts_of({{{thing.name!r}: found}}))"
    )
    for i, part in enumerate(parts):
        if isinstance(part, Picture):
            made(part.figure, f"r{i}")
            st.caption(literal(part.caption))
            downloads(frame, name=f"{thing.path.name}-{i}", python=python, draw=partial(_figure, part))
        elif isinstance(part, Numbers):
            st.dataframe(part.frame.head(part.rows), hide_index=True)
            st.caption(literal(part.note))
        elif isinstance(part, Prose):
            for line in part.lines:
                st.text(line)
    with st.expander(f"all {len(frame):,} rows"):
        st.dataframe(frame.head(_SHOWN), hide_index=True)
        downloads(frame, name=thing.path.name, python=python)


def _figure(part: Picture) -> Figure:
    return part.figure


def _changed(thing: Stored) -> tuple[tuple[str, int, int], ...]:
    """Sizes and times of the files of a result, so that another one is not taken for it."""
    found = []
    for path in sorted(thing.path.iterdir()):
        about = path.stat()
        found.append((path.name, about.st_size, about.st_mtime_ns))
    return tuple(found)


@st.cache_data(max_entries=500, show_spinner="Reading the results")
def _damage(path: str, kind: str, changed: Any) -> str:
    """Why a result cannot be read, in one line; empty if it can."""
    try:
        Stored("", Path(path), kind).load()
    except WorkbenchError as error:
        return " ".join(str(error).split())
    return ""


@st.cache_resource(max_entries=8, show_spinner="Drawing")
def _parts(path: str, name: str, kind: str, changed: Any) -> Any:
    from workbench.apps.sections import parts_of

    saved = Stored(name, Path(path), kind).load()
    members: Mapping[str, Any] = {name: saved}
    with drawing():
        return saved.frame(), list(parts_of(members))


guarded(page)
