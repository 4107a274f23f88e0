"""Figures of tables that jobs left: what ``plot`` of their results draws, where only the table came back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from workbench.results import axis, head_map, wrapped

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_TICKS = 12


def draw_heads(table: pd.DataFrame, unit: str, title: str = "", ax: Axes | None = None) -> Axes:
    """Layer x head heat map of ``value``; ``table`` has a row per head: ``layer, head, value``."""
    layers = table["layer"].drop_duplicates().tolist()
    rows = [
        torch.from_numpy(part["value"].to_numpy(float)) for part in (table[table["layer"] == one] for one in layers)
    ]
    low = float(np.nanmin([0.0, *table["value"]]))
    return head_map(ax, rows, layers, title=title, unit=unit, limits=(low, None))


def draw_curve(
    table: pd.DataFrame,
    x: str,
    lines: Mapping[str, str],
    *,
    base: str | None = None,
    labels: tuple[str, str] = ("", ""),
    title: str = "",
    level: str = "nothing removed",
    marks: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Columns of ``table`` over its column ``x``: ``lines`` column -> what it is called, with its ``_low`` and ``_high``
    where there are any; ``base`` a column that is drawn as one line, called ``level``.
    ``labels`` are those of the two axes; ``marks`` marks the points."""
    ax = axis(ax, 5.2, 3.4)
    for i, (column, label) in enumerate(lines.items()):
        mark = "o" if i == 0 else "x"
        ax.plot(
            table[x],
            table[column],
            label=label,
            color=f"C{i}",
            linestyle="-" if i == 0 else "--",
            marker=mark if marks else "",
        )
        if f"{column}_low" in table:
            ax.fill_between(
                table[x], table[f"{column}_low"], table[f"{column}_high"], alpha=0.2, linewidth=0, color=f"C{i}"
            )
    if base is not None:
        ax.axhline(float(table[base].iloc[0]), color="0.6", linewidth=1, label=level)
    if len(table) <= _TICKS:
        ax.set_xticks(table[x])
    ax.set(xlabel=labels[0], ylabel=wrapped(labels[1], 2.8), title=wrapped(title, 4.4))
    ax.legend()
    return ax


def draw_bars(
    names: Sequence[str],
    values: Mapping[str, Iterable[float]],
    *,
    unit: str,
    title: str = "",
    ends: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A group of bars per name, one bar per entry of ``values``; ``ends`` gives the ends of its intervals."""
    ax = axis(ax, min(8.0, max(4.8, 1.6 + 0.4 * len(names) * len(values))), 3.2)
    wide = 0.8 / len(values)
    for i, (label, heights) in enumerate(values.items()):
        places = np.arange(len(names)) + wide * (i - (len(values) - 1) / 2)
        tops = np.asarray(list(heights), float)
        ax.bar(places, tops, wide, label=label)
        if ends and label in ends:
            low, high = (np.asarray(end, float) for end in ends[label])
            down, up = np.maximum(tops - low, 0), np.maximum(high - tops, 0)
            ax.errorbar(places, tops, [down, up], fmt="none", ecolor="0.4", capsize=3)
    ax.set_xticks(range(len(names)), list(names), parse_math=False)
    if title:
        ax.set_title(wrapped(title, 4.4))
    ax.set_ylabel(wrapped(unit, 2.8))
    if len(values) > 1:
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return ax


def draw_grid(
    table: pd.DataFrame,
    x: str,
    y: str,
    value: str,
    *,
    labels: tuple[str, str],
    unit: str,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Heat map of ``value``, 0 to 1, with its numbers: columns by ``x``, rows by ``y``; ``labels`` are those of the two axes."""
    wide = table.pivot(index=y, columns=x, values=value)
    ax = axis(ax, 2.2 + 0.7 * wide.shape[1], 1.6 + 0.4 * wide.shape[0])
    image = ax.imshow(wide.to_numpy(), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    for i, row in enumerate(wide.to_numpy()):
        for j, number in enumerate(row):
            if np.isfinite(number):
                ax.text(
                    j,
                    i,
                    f"{number:.2f}".lstrip("0") or "0",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="black" if number > 0.6 else "white",
                )
    ax.set_xticks(range(wide.shape[1]), [f"{one:,}" for one in wide.columns])
    ax.set_yticks(range(wide.shape[0]), [f"{one:.0%}" if isinstance(one, float) else str(one) for one in wide.index])
    ax.set(xlabel=labels[0], ylabel=labels[1], title=wrapped(title, 4.4))
    ax.figure.colorbar(image, ax=ax, label=unit)
    return ax
