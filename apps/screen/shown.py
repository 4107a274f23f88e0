"""A figure in a page, with its numbers, its image and the code that makes it again."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.apps.screen.text import literal

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_SHOWN = 1000
_DPI = 200
_INK = {"light": "#1d2328", "dark": "#f0f2f6"}
_MIME = {"png": "image/png", "svg": "image/svg+xml"}
_drawing = threading.Lock()
"""matplotlib's settings belong to the process, and sessions are its threads."""


def dark() -> bool:
    """Whether the page is dark."""
    return st.context.theme.type == "dark"


def ink() -> str:
    """The colour of the page's text."""
    return _INK["dark" if dark() else "light"]


@contextmanager
def drawing() -> Iterator[None]:
    """Draw within this what is shown by ``made``."""
    from workbench.figure_html import style

    with _drawing, style():
        yield


def made(figure: Figure, name: str) -> None:
    """A figure that was drawn within ``drawing``, in the page's colours; ``name`` is no other figure's."""
    from workbench.figure_html import inline

    with drawing():
        svg = inline(figure, name)
    st.image(svg.replace("<svg", f'<svg xmlns="http://www.w3.org/2000/svg" style="color:{ink()}"', 1), width="content")


def figure(
    draw: Callable[[], Any], frame: pd.DataFrame, *, name: str, python: str, caption: str = "", width: Any = "content"
) -> None:
    """Draw with matplotlib (``draw`` gives an axis or a figure) in the page's colours; below it ``downloads``.

    A figure with the same ``name`` and ``python`` is drawn once: the code says what it shows."""
    st.image(_drawn(name, python, dark(), "png", draw), width=width)
    if caption:
        st.caption(literal(caption))
    downloads(frame, name=name, python=python, draw=draw)


def downloads(
    frame: pd.DataFrame | Callable[[], pd.DataFrame],
    *,
    name: str,
    python: str,
    draw: Callable[[], Any] | None = None,
) -> None:
    """The row below every figure: its numbers (to read, as CSV, as Parquet), its image, the code that makes it again.

    ``name`` is the files' name and, with it, the key of the row in the page. A ``frame`` that is called is made when a file is
    asked for, and not shown. ``draw`` draws the image with matplotlib; a table has none."""
    from workbench.results import uniform_columns

    made = frame if callable(frame) else lambda: frame
    files: dict[str, tuple[str, Callable[[], Any]]] = {
        "csv": ("text/csv", lambda: made().to_csv(index=False)),
        "parquet": ("application/vnd.apache.parquet", lambda: uniform_columns(made()).to_parquet()),
    }
    images = {} if draw is None else {form: (mime, partial(_file, draw, form)) for form, mime in _MIME.items()}
    with st.popover("numbers, image, code", icon=":material/download:", type="tertiary"):
        numbers, image, code = st.tabs(["Numbers", "Image", "Python"])
        with numbers:
            if not callable(frame):
                st.dataframe(frame.head(_SHOWN), hide_index=True)
                if len(frame) > _SHOWN:
                    st.caption(f"first {_SHOWN:,} of {len(frame):,} rows; the files hold all of them")
            _buttons(name, files)
        with image:
            if images:
                _buttons(name, images)
            else:
                st.caption("This is a table; it has no image.")
        with code:
            st.code(python, language="python")


def _buttons(name: str, files: Mapping[str, tuple[str, Callable[[], Any]]]) -> None:
    with st.container(horizontal=True):
        for form, (mime, content) in files.items():
            label = form.upper() if form != "parquet" else "Parquet"
            st.download_button(
                label,
                content,
                f"{name}.{form}",
                mime,
                key=f"{form} {name}",
                on_click="ignore",
                icon=":material/download:",
            )


@st.cache_data(max_entries=64, show_spinner=False)
def _drawn(name: str, python: str, is_dark: bool, form: str, _draw: Callable[[], Any]) -> bytes:
    return _picture(_draw, form, _INK["dark" if is_dark else "light"])


def _file(draw: Callable[[], Any], form: str) -> bytes:
    """The image for a paper: dark ink on white."""
    return _picture(draw, form, _INK["light"], "white")


def _picture(draw: Callable[[], Any], form: str, ink: str, ground: str = "none") -> bytes:
    import matplotlib as mpl

    from workbench.figure_html import INK, plain_powers, style

    with _drawing, style():
        names = [name for name, value in mpl.rcParams.items() if isinstance(value, str) and value == INK]
        with mpl.rc_context(dict.fromkeys(names, ink)):
            found = draw()
            made = found if hasattr(found, "savefig") else found.figure
            plain_powers(made)
            out = io.BytesIO()
            made.savefig(out, format=form, dpi=_DPI, bbox_inches="tight", facecolor=ground)
    return out.getvalue()
