"""What a worker does for the page of jobs: estimates of grids, with one cell of every unknown kind computed."""

from __future__ import annotations

from collections.abc import Sequence

from workbench.jobs.probes import Outcome


def estimated(
    spec: str, store: str, workers: int, seconds: float = 60.0, retry: bool = False, standing: Sequence[int] = ()
) -> Outcome:
    """The cost of what is missing of the grid with the text ``spec`` in the folder ``store``: one row per kind of cells, as
    ``Estimate.frame`` has it; the note tells the totals in sentences, a line each.

    ``seconds`` limit the calibration. ``standing`` (numbers of finished and failed cells) changes nothing: with it an estimate
    made earlier is not taken for one of now."""
    from workbench.apps.commands.jobs_estimate import sentences
    from workbench.apps.grids.spec_text import read_text
    from workbench.jobs.estimate import estimate
    from workbench.jobs.settings import DEFAULTS, settled

    grid = read_text(spec, lambda path: None)  # the page has confined it
    settings = settled({**DEFAULTS, **grid.run, "workers": workers}, grid)
    found = estimate(grid, store, workers=workers, retry=retry, budget=seconds, settings=settings)
    return Outcome(found.frame(), None, "\n".join(sentences(found)))
