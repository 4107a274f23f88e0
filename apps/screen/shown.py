"""A figure in a page, with its numbers, its image and the code that makes it again."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.apps.screen.text import literal

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_SHOWN = 1000
_INK = {"light": "#1d2328", "dark": "#f0f2f6"}


def dark() -> bool:
    """Whether the page is dark."""
    return st.context.theme.type == "dark"


def figure(
    draw: Callable[[], Any], frame: pd.DataFrame, *, name: str, python: str, caption: str = "", width: Any = "content"
) -> None:
    """Draw with matplotlib (``draw`` gives an axis or a figure) in the page's colours; below it ``downloads``."""
    found = drawn(draw)
    st.image(_bytes(found, "png", 200), width=width)
    if caption:
        st.caption(literal(caption))
    downloads(frame, name=name, python=python, picture=found)


def drawn(draw: Callable[[], Any]) -> Figure:
    """The figure of ``draw`` in the colours of the page."""
    import matplotlib as mpl

    from workbench.apps.svg import INK, style

    ink = _INK["dark" if dark() else "light"]
    with style():
        names = [name for name, value in mpl.rcParams.items() if isinstance(value, str) and value == INK]
        with mpl.rc_context(dict.fromkeys(names, ink)):
            found = draw()
            made: Figure = found if hasattr(found, "savefig") else found.figure
            return made


def _bytes(picture: Figure, form: str, dpi: int = 200) -> bytes:
    out = io.BytesIO()
    picture.savefig(out, format=form, dpi=dpi, bbox_inches="tight")
    return out.getvalue()


def downloads(
    frame: pd.DataFrame,
    *,
    name: str,
    python: str,
    picture: Figure | None = None,
    image: Callable[[], bytes] | None = None,
) -> None:
    """The row below every figure: its numbers (to read, as CSV, as Parquet), its image, the code that makes it again.

    ``name`` is the files' name and, with it, the key of the row in the page; ``image`` gives a PNG where the figure is not
    matplotlib's."""
    from workbench.results import uniform_columns

    with st.popover("numbers, image, code", icon=":material/download:", type="tertiary"):
        tabs = st.tabs(["Numbers", "Image", "Python"])
        with tabs[0]:
            st.dataframe(frame.head(_SHOWN), hide_index=True)
            if len(frame) > _SHOWN:
                st.caption(f"first {_SHOWN:,} of {len(frame):,} rows; the files hold all of them")
            left, right = st.columns(2)
            left.download_button(
                "CSV",
                lambda: frame.to_csv(index=False),
                f"{name}.csv",
                "text/csv",
                key=f"csv {name}",
                on_click="ignore",
            )
            right.download_button(
                "Parquet",
                lambda: uniform_columns(frame).to_parquet(),
                f"{name}.parquet",
                "application/vnd.apache.parquet",
                key=f"parquet {name}",
                on_click="ignore",
            )
        with tabs[1]:
            if picture is not None:
                for form, mime in (("png", "image/png"), ("svg", "image/svg+xml")):
                    st.download_button(
                        form.upper(),
                        partial(_bytes, picture, form),
                        f"{name}.{form}",
                        mime,
                        key=f"{form} {name}",
                        on_click="ignore",
                    )
            elif image is not None:
                st.download_button("PNG", image, f"{name}.png", "image/png", key=f"png {name}", on_click="ignore")
            else:
                st.caption("This is a table; it has no image.")
        with tabs[2]:
            st.code(python, language="python")
