"""A stand-alone HTML report: one file, opened from disk, nothing fetched."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.apps.terminal import cell
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

TEMPLATE = "report.html"


@dataclass(frozen=True)
class Prose:
    """A paragraph, or several findings as a list. Plain text: it is escaped."""

    lines: tuple[str, ...]
    listed: bool = False
    failed: bool = False


@dataclass(frozen=True)
class Numbers:
    """A table; ``rows`` limits what is shown, and the caption then says how many there are."""

    frame: pd.DataFrame
    caption: str = ""
    rows: int = 40

    @property
    def columns(self) -> list[tuple[str, bool]]:
        """Names, and whether the column holds numbers."""
        return [(str(n), self.frame[n].dtype.kind in "ifu") for n in self.frame.columns]

    @property
    def cells(self) -> list[list[str]]:
        return [[cell(value) for value in row] for row in self.frame.head(self.rows).itertuples(index=False)]

    @property
    def note(self) -> str:
        cut = f"first {self.rows} of {len(self.frame):,} rows" if len(self.frame) > self.rows else ""
        return "; ".join(filter(None, (self.caption, cut)))


@dataclass(frozen=True)
class Picture:
    """A matplotlib figure drawn within ``figure_html.style()``; ``alt`` says in words what it shows."""

    figure: Figure
    caption: str
    alt: str = ""


@dataclass(frozen=True)
class Link:
    """A line that leads to ``address``, which is http or https; others are refused."""

    text: str
    address: str

    def __post_init__(self) -> None:
        if not self.address.startswith(("http://", "https://")):
            raise WorkbenchError(f"a link of a report leads to http or https; got {self.address[:200]!r}")


Part = Prose | Numbers | Picture | Link


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    parts: tuple[Part, ...]


def write_report(
    sections: Sequence[Section], path: str | Path, *, title: str, facts: Iterable[tuple[str, str]] = ()
) -> Path:
    """Write ``sections`` as one HTML file at ``path``, replacing it in one step; ``facts`` stand under the title.

    Every text is escaped. Figures become inline SVG, so the file needs no other file and no network.
    """
    html = render(sections, title=title, facts=facts)
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(html, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise WorkbenchError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def render(sections: Sequence[Section], *, title: str, facts: Iterable[tuple[str, str]] = ()) -> str:
    """The report as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from workbench.figure_html import inline

    def view(section: Section, number: int) -> dict[str, Any]:
        parts: list[dict[str, Any]] = []
        for i, part in enumerate(section.parts):
            drawn = Markup(inline(part.figure, f"f{number}-{i}")) if isinstance(part, Picture) else None
            parts.append({"kind": type(part).__name__, "part": part, "svg": drawn})
        return {"title": section.title, "anchor": f"s{number}", "parts": parts}

    folder = Path(__file__).resolve().parent / "templates"
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    views = [view(section, number) for number, section in enumerate(sections)]
    return environment.get_template(TEMPLATE).render(title=title, facts=list(facts), sections=views)
