"""What a worker does for the page of reports: one stand-alone HTML file of a results folder, or of cells that pages computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from workbench.jobs.probes import Cell
from workbench.jobs.store import JobStore

FILE = "report.html"


@dataclass(frozen=True)
class Report:
    """A written report that ``save`` moves to where it is kept. One row: its ``title`` and its ``bytes``."""

    title: str
    path: Path

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame({"title": [self.title], "bytes": [self.path.stat().st_size]})

    def save(self, folder: str | Path) -> Path:
        folder = Path(folder)
        folder.mkdir(parents=True)
        return self.path.rename(folder / FILE)


def folder_report(cell: Cell, store: str, state: str = "") -> Report:
    """The report of everything saved in the folder ``store``, as ``workbench report`` writes it. ``state`` is read by
    nobody: with it the report of the folder as it was is not taken for one of now."""
    from workbench.apps.sections import report_of

    return Report("folder", report_of(store, cell.scratch / FILE))


def cells_report(cell: Cell, store: str, cells: Sequence[str], link: str = "") -> Report:
    """The report of finished cells of a store of jobs, by their keys; ``link`` is the app's address, which it leads back to."""
    from workbench.apps.cell_sections import cell_sections
    from workbench.apps.report import write_report
    from workbench.figure_html import style

    with style():
        sections = cell_sections(JobStore(store), cells, link)
        facts = [("cells", f"{len(cells):,}"), ("store", store), *([("app", link)] if link else [])]
        path = write_report(sections, cell.scratch / FILE, title="What the workbench computed", facts=facts)
    return Report("cells", path)
