"""Tables and charts of the page of rhythm: a number per token along a text of any length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.apps.screen.text import readable

if TYPE_CHECKING:
    import pandas as pd

    from workbench.probes.rhythm.rhythm import Rhythm
    from workbench.results import SavedResult

POINTS = 800
"""Points of a line at most."""
PAGE = 256
"""Tokens of the text that are coloured at a time."""


def rebuilt(saved: SavedResult) -> Rhythm:
    """The rhythm that a cell saved, for ``wb.couplings``."""
    from workbench.probes.rhythm.rhythm import Rhythm
    from workbench.run import Provenance

    values = {name: saved.tensors[f"values.{name}"] for name in saved.labels["values"]}
    local, over = (tuple((layer, head) for layer, head in saved.labels[name]) for name in ("local", "over"))
    return Rhythm(
        saved.labels["title"],
        values,
        saved.labels["units"],
        local=local,
        over=over,
        prompt=saved.labels["prompt"],
        provenance=Provenance(saved.labels["provenance"]["model"]),
    )


def line(table: pd.DataFrame, value: str, points: int = POINTS) -> pd.DataFrame:
    """``position, token, value`` and, if the table has them, ``preplan`` and ``anchor``, of at most ``points`` stretches of the
    text; of several tokens the one with the largest value stands for all, so that no peak is lost."""
    kept = [name for name in ("preplan", "anchor") if name in table]
    shown = table[["position", "token", value, *kept]].rename(columns={value: "value"})
    stretch = -(-len(shown) // points)
    if stretch > 1:
        best = shown["value"].fillna(float("-inf")).groupby(shown["position"] // stretch).idxmax()
        shown = shown.loc[best]
    return shown.assign(token=[readable(token) for token in shown["token"]]).reset_index(drop=True)


def chart(
    points: pd.DataFrame, unit: str, page: tuple[int, int] | None, mark: str | None, picked: str
) -> dict[str, Any]:
    """The Vega-Lite spec of a line over the text: the coloured page, if it is a part, shaded, and the tokens with 1 in the
    column ``mark`` as triangles. A click gives the token's position to the parameter ``picked``."""
    position = {"field": "position", "type": "quantitative", "title": "token", "scale": {"nice": False}}
    tooltip = [
        {"field": "position", "type": "quantitative"},
        {"field": "token", "type": "nominal"},
        {"field": "value", "type": "quantitative", "format": ".3~g", "title": unit},
    ]
    value = {"field": "value", "type": "quantitative", "title": unit, "axis": {"format": ".3~g"}}
    layers: list[dict[str, Any]] = [
        {"mark": {"type": "line", "strokeWidth": 1.4}, "encoding": {"x": position, "y": value}}
    ]
    if page is not None:
        shade = {
            "data": {"values": [{"from": page[0], "to": page[1] - 1}]},
            "mark": {"type": "rect", "opacity": 0.12, "color": "#e8590c"},
            "encoding": {"x": {"field": "from", "type": "quantitative"}, "x2": {"field": "to"}},
        }
        layers.insert(0, shade)
    if mark is not None:
        layers.append(
            {
                "transform": [{"filter": f"datum['{mark}'] == 1"}],
                "mark": {"type": "point", "shape": "triangle-down", "filled": True, "size": 30, "color": "#e8590c"},
                "encoding": {"x": position, "y": value},
            }
        )
    layers.append(
        {
            "params": [
                {"name": picked, "select": {"type": "point", "fields": ["position"], "nearest": True, "clear": False}}
            ],
            "mark": {"type": "point", "opacity": 0, "cursor": "pointer"},
            "encoding": {"x": position, "y": value, "tooltip": tooltip},
        }
    )
    return {"layer": layers}
