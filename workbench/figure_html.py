"""Figures as text that can stand inside an HTML page: no file, no network, ink in the page's own colour."""

from __future__ import annotations

import io
import re
import uuid
import warnings
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Drawn in this colour, a line or a letter takes the colour of the page's text."""
_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
HEAVY = 1_000_000
"""Characters of the longest drawing of lines and shapes; in longer ones these become one image, and the words stay words."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "workbench",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "text.parse_math": False,
}


def style() -> Any:
    """The look of figures in reports; draw and turn into SVG within ``with style():``."""
    import matplotlib as mpl

    return mpl.rc_context(_STYLE)


def picture(draw: Callable[[], Axes], label: str) -> str:
    """The figure that ``draw`` makes, as HTML for one place in a notebook: its ids are in no other picture. ``label`` names it
    to those who cannot see it.

    A figure that cannot be drawn is one line that says why."""
    try:
        with style():
            figure: Any = draw().figure
            drawn = inline(figure, f"f{uuid.uuid4().hex[:12]}")
        return f'<div role="img" aria-label="{escape(label)}">{drawn}</div>'
    except Exception as error:
        said = " ".join(str(error).split())
        return f"<p>no figure: {escape(f'{type(error).__name__}: {said}' if said else type(error).__name__)}</p>"


def inline(figure: Figure, name: str) -> str:
    """The figure as an ``<svg>`` element. ``name`` makes its ids unique in the page."""
    plain_powers(figure)
    text = _svg(figure)
    if len(text) > HEAVY:
        for ax in figure.axes:
            for artist in (*ax.collections, *ax.lines, *ax.patches):
                artist.set_rasterized(True)
        text = _svg(figure)
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text, count=2)
    text = re.sub(r"<[^>]*>", lambda tag: _own(tag[0], name), text)
    text = text.replace(r"\$", "$")  # labels that keep matplotlib from reading mathematics; here it reads none
    text, sized = re.subn(
        r'width="([\d.]+)pt" height="([\d.]+)pt"',
        lambda size: f'width="{float(size[1]) * 4 / 3:.0f}" height="{float(size[2]) * 4 / 3:.0f}"',
        text,
        count=1,
    )
    if not sized:
        raise RuntimeError("matplotlib's SVG states no size in pt, so the figure cannot be scaled to the page")
    return text


def plain_powers(figure: Figure) -> None:
    """Powers of ten on axes as letters, before a figure is saved within ``style``: matplotlib writes them as mathematics, which
    the style does not read."""
    from matplotlib.ticker import Formatter, LogFormatterMathtext

    class Letters(Formatter):
        def __init__(self, inner: Formatter) -> None:
            self.inner = inner

        def set_axis(self, axis: Any) -> None:
            super().set_axis(axis)
            self.inner.set_axis(axis)

        def set_locs(self, locs: Any) -> None:
            self.inner.set_locs(locs)

        def __call__(self, x: float, pos: int | None = None) -> str:
            text = re.sub(r"\$\\mathdefault\{(.*)\}\$", r"\1", self.inner(x, pos)).replace(r"\times", "×")
            return re.sub(r"\^\{(.*?)\}", lambda power: power[1].translate(_RAISED), text)

    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            if isinstance(axis.get_major_formatter(), LogFormatterMathtext):
                axis.set_major_formatter(Letters(axis.get_major_formatter()))
            if isinstance(axis.get_minor_formatter(), LogFormatterMathtext):
                axis.set_minor_formatter(Letters(axis.get_minor_formatter()))


def _svg(figure: Figure) -> str:
    raw = io.StringIO()
    with warnings.catch_warnings():
        # The reader's browser has letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(raw, format="svg", bbox_inches="tight", dpi=144, metadata={"Date": None, "Creator": None})
    return raw.getvalue()


def _own(tag: str, name: str) -> str:
    """One tag with the page's ink and with ids of its own. What stands between the tags are tokens, which stay as they are."""
    tag = tag.replace("xlink:href", "href").replace(INK, "currentColor")
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", tag)
