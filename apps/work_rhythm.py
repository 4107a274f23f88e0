"""Jobs of the page of rhythm, on the maps that a capture stored: the rhythm of its text, and of each head of a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.apps.work_runs import stored_run
from workbench.errors import UnknownName

if TYPE_CHECKING:
    import pandas as pd

    from workbench.jobs.probes import Cell
    from workbench.probes.rhythm.rhythm import Rhythm
    from workbench.probes.tables import HeadTable


def rhythm_of_run(cell: Cell, run: str, prompt: int = 10, raw: bool = False) -> Rhythm:
    """``wb.rhythm`` of a captured run, the first ``prompt`` tokens left out."""
    import workbench as wb

    return wb.rhythm(stored_run(cell, run), prompt=prompt, raw=raw)


def spans_of_run(cell: Cell, run: str, prompt: int = 10, raw: bool = False) -> HeadTable:
    """``wb.head_spans`` of a captured run: how far each head looks back on average, in tokens."""
    import workbench as wb

    return wb.head_spans(stored_run(cell, run), prompt=prompt, raw=raw)


def rhythm_of_heads(cell: Cell, run: str, layer: int | str, prompt: int = 10, raw: bool = False) -> pd.DataFrame:
    """``head, position, waad, fai`` of every head of one layer: ``wb.waad`` in tokens and ``wb.fai`` as a mean weight."""
    import pandas as pd

    import workbench as wb
    from workbench.probes.sources import inner

    maps = stored_run(cell, run).maps
    if layer not in maps:
        raise UnknownName("layer of the run", layer, list(maps))
    amap = inner(layer, maps[layer], raw)
    waad, fai = wb.waad(amap, prompt=prompt)[0], wb.fai(amap, prompt=prompt)[0]
    parts = []
    for head, (near, later) in enumerate(zip(waad.cpu(), fai.cpu(), strict=True)):
        columns = {"head": head, "position": range(len(near)), "waad": near.numpy(), "fai": later.numpy()}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)
