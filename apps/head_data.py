"""What the tile map and the coloured text of a head are given to draw, in the app and in notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from workbench.apps.components.tilemap import LABELLED, tilemap_data
from workbench.apps.components.tokens import PAGE, tokens_data
from workbench.apps.screen.head_view import Look, square, token_names
from workbench.apps.screen.text import readable

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.run import Run
    from workbench.zooming import Zoom

WAYS = {"mass": "mass per query", "max": "largest weight"}


def map_data(
    run: Run,
    look: Look,
    found: Zoom,
    *,
    scale: str,
    cross: Sequence[int] | None,
    source: str,
    title: str = "",
    signed: bool = False,
) -> dict[str, Any]:
    """The part ``found`` of the map that ``look`` names, for ``TILEMAP``; ``signed`` for differences of two maps."""
    amap = look.map(run)
    _, _, q, k = amap.shape
    (q0, q1), (k0, k1) = found.queries, found.keys
    queries, keys = token_names(run, look.layer)
    return tilemap_data(
        found.values,
        queries=q,
        keys=k,
        view=(q0, q1, k0, k1),
        size=found.size,
        exact=found.size == 1,
        signed=signed or amap.sign == "signed",
        scale=scale,
        cross=cross,
        query_labels=[readable(token) for token in queries[q0:q1]] if q1 - q0 <= LABELLED else (),
        key_labels=[readable(token) for token in keys[k0:k1]] if k1 - k0 <= LABELLED else (),
        unit="weight" if found.size == 1 else WAYS[look.way],
        title=title or found.title,
        source=source,
    )


def text_data(
    run: Run, look: Look, focus: int, direction: str, start: int, weights: Tensor, title: str = ""
) -> dict[str, Any]:
    """The page of the text that begins at ``start``, for ``TOKENS``: ``weights`` of the token ``focus`` with every other one."""
    queries, keys = token_names(run, look.layer)
    shown = keys if direction == "from" else queries
    start = max(0, min(start, (len(shown) - 1) // PAGE * PAGE))
    end = min(len(shown), start + PAGE)
    return tokens_data(
        list(shown[start:end]),
        start=start,
        total=len(shown),
        focus=focus,
        direction=direction,
        weights=weights[start:end],
        top=float(weights.abs().max()) or 1.0,
        tile=square(run, look, start, end),
        signed=look.map(run).sign == "signed",
        title=title,
    )
