"""One picture of what the demo found, ``overview.png`` beside its results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.apps import figures
from workbench.probes.atlas import draw_wall
from workbench.results import load_result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def overview(folder: Path) -> Figure:
    """Sinks of both models, induction heads, faithfulness, and the long input's block maps, drawn from what the demo saved
    in ``folder``."""
    from matplotlib.figure import Figure

    saved = {p.name: load_result(p) for p in sorted(folder.iterdir()) if (p / "result.json").is_file()}
    figure = Figure(figsize=(12, 9.6), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=(1.6, 3.2), hspace=0.04)
    top, bottom = parts
    axes: Any = top.subplots(1, 4, width_ratios=(1, 1, 1, 1.5))
    for ax, name in zip(axes, ("tiny-softmax", "tiny-gated"), strict=False):
        table = saved[f"sinks-{name}"].table
        _grid(ax, table[table["key"] == 0], "share", f"attention to <bos>\n{name}")
    heads = saved["heads"].table
    _grid(axes[2], heads[heads["kind"] == "induction"], "value", "induction\ntiny-softmax")
    for method, colour in zip(("eap-ig", "discrete-sae"), figures.COLOURS, strict=False):
        table = saved[f"faithfulness-{method}"].table
        axes[3].plot(table["fraction"], table["faithfulness"], marker="o", markersize=4, color=colour, label=method)
        axes[3].plot(table["fraction"], table["random"], color=colour, linestyle=":", label="random")
    axes[3].set_xscale("log")
    axes[3].set(xlabel="part of the model kept", title="faithfulness of the\nIOI circuit")
    axes[3].legend(frameon=False, fontsize=8)
    long = saved["long"]
    layers = long.table["layer"].unique()
    wall: Any = bottom.subplots()
    draw_wall(wall, {layer: long.tensors[f"blocks.{layer}"] for layer in layers})
    wall.set_title(f"every head on {len(long.labels['tokens']):,} tokens, in blocks of {long.labels['size']}")
    return figure


def _grid(ax: Any, table: Any, value: str, title: str) -> None:
    grid = table.pivot(index="layer", columns="head", values=value)
    ax.imshow(grid.to_numpy(float), cmap=figures.SHADES, vmin=0, vmax=1, aspect="auto")
    for (y, x), number in np.ndenumerate(grid.to_numpy(float)):
        ink = "white" if number < 0.6 else "black"
        ax.text(x, y, f"{number:.2f}".removeprefix("0"), ha="center", va="center", fontsize=6, color=ink)
    ax.set(xlabel="head", ylabel="layer", title=title, xticks=range(grid.shape[1]), yticks=range(grid.shape[0]))
