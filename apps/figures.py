"""Figures of reports, drawn from saved tables and tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

SHADES = "viridis"
COLOURS = ("#2a7f9e", "#d1703c", "#7a6fb0", "#4c9a62")
NULL = "#8a949c"
DARK = "#1d2328"
_ANNOTATED = 160
_WIDE = 9.5
"""Inches of a report's column: what is wider is shrunk there, and its numbers become too small to read."""


def panels(columns: int, rows: int = 1, width: float = 3.6, height: float = 2.9) -> tuple[Figure, list[Axes]]:
    """A new figure and its axes in reading order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, list(np.ravel(figure.subplots(rows, columns, squeeze=False)))


def heads_grid(tables: Mapping[str, pd.DataFrame], value: str, unit: str, top: float | None = 1.0) -> Figure:
    """One layer x head picture per table (columns ``layer``, ``head`` and ``value``), all on one colour scale."""
    grids = {title: frame.pivot(index="layer", columns="head", values=value) for title, frame in tables.items()}
    largest = max((float(np.nanmax(g.to_numpy(float), initial=0.0)) for g in grids.values()), default=1.0)
    limit = max(largest, 1e-9) if top is None else max(top, largest)
    heads = max(g.shape[1] for g in grids.values())
    layers = max(g.shape[0] for g in grids.values())
    across = max(1, min(len(grids), int(_WIDE // (1.0 + 0.42 * heads))))
    figure, axes = panels(across, -(-len(grids) // across), 1.0 + 0.42 * heads, 1.1 + 0.42 * layers)
    for ax in axes[len(grids) :]:
        ax.set_axis_off()
    image: Any = None
    for ax, (title, grid) in zip(axes, grids.items(), strict=False):
        numbers = grid.to_numpy(float)
        image = ax.imshow(numbers, cmap=SHADES, vmin=0, vmax=limit, aspect="auto")
        ax.set_title(title)
        ax.set(xlabel="head", ylabel="layer")
        ax.set_xticks(range(grid.shape[1]), [str(h) for h in grid.columns])
        ax.set_yticks(range(grid.shape[0]), [str(layer) for layer in grid.index])
        ax.spines[:].set_visible(False)
        if numbers.size <= _ANNOTATED:
            for (y, x), number in np.ndenumerate(numbers):
                if np.isfinite(number):
                    ink = "white" if number < 0.6 * limit else "black"
                    ax.text(x, y, f"{number:.2f}".removeprefix("0"), ha="center", va="center", fontsize=7, color=ink)
    figure.colorbar(image, ax=axes, label=unit, shrink=0.9 / -(-len(grids) // across))
    return figure


def curves(
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    nulls: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
) -> Figure:
    """Lines against their nulls (dashed, grey); the x axis is logarithmic from the smallest positive value on."""
    figure, (ax,) = panels(1, width=6.4, height=3.6)
    smallest = min((x for xs, _ in lines.values() for x in xs if x > 0), default=1e-3)
    ax.axhline(1.0, color=NULL, linewidth=0.8)
    ax.axhline(0.0, color=NULL, linewidth=0.8)
    for colour, (name, (xs, ys)) in zip(COLOURS * 4, lines.items(), strict=False):
        ax.plot(xs, ys, color=colour, marker="o", markersize=4, label=name)
    for (name, (xs, ys)), dash in zip(nulls.items(), ("--", ":", "-.") * 4, strict=False):
        ax.plot(xs, ys, color=NULL, linestyle=dash, marker=".", markersize=4, label=name)
    ax.set_xscale("symlog", linthresh=smallest)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_formatter(lambda x, _: f"{100 * x:g}%")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def grid(table: pd.DataFrame, xlabel: str, ylabel: str, unit: str) -> Figure:
    """Numbers between 0 and 1 over two named axes, written into their cells."""
    numbers = table.to_numpy(float)
    figure, (ax,) = panels(1, 1, 2.2 + 0.6 * numbers.shape[1], 1.4 + 0.32 * numbers.shape[0])
    image = ax.imshow(numbers, cmap=SHADES, vmin=0, vmax=1, aspect="auto")
    for (y, x), number in np.ndenumerate(numbers):
        if np.isfinite(number):
            ax.text(
                x, y, f"{number:.2f}", ha="center", va="center", fontsize=8, color="white" if number < 0.6 else "black"
            )
    ax.set_xticks(range(numbers.shape[1]), [f"{c:,}" for c in table.columns])
    ax.set_yticks(range(numbers.shape[0]), [f"{100 * d:.0f}%" for d in table.index])
    ax.spines[:].set_visible(False)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    figure.colorbar(image, ax=ax, label=unit)
    return figure


def block_maps(maps: Mapping[str, Tensor], size: int, columns: int = 3) -> Figure:
    """Block maps ``[rows, columns]`` of single heads, positions in tokens on both axes, each on its own square-root scale."""
    across = min(columns, len(maps))
    figure, axes = panels(across, -(-len(maps) // across), 3.1, 3.1)
    for ax in axes[len(maps) :]:
        ax.set_axis_off()
    for ax, (title, numbers) in zip(axes, maps.items(), strict=False):
        rows, keys = numbers.shape
        shown = numbers.float().clamp(min=0).sqrt().numpy()
        ax.imshow(shown, cmap="magma", vmin=0, extent=(0, keys * size, rows * size, 0), interpolation="nearest")
        ax.set_title(title)
        ax.tick_params(labelsize=7)
        ax.set(xlabel="key position", ylabel="query position")
    return figure
