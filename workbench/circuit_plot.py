"""Drawing of circuits on a matplotlib axis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from workbench.circuits import Circuit, edge_parts, place

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_POSITIVE, _NEGATIVE = "#1f6f8b", "#c1502e"


def draw_nodes(circuit: Circuit, ax: Axes) -> Axes:
    """Layer by head, the MLP in the column left of head 0; kept nodes are framed, nodes without a score stay white."""
    from matplotlib.patches import Rectangle

    spots = {name: place(name) for name in circuit.names if np.isfinite(place(name)[1]) and name != "input"}
    rows = 1 + max((int(y) for _, y in spots.values()), default=0)
    columns = 2 + max((int(x) for x, _ in spots.values()), default=0)
    grid = np.full((rows, columns), np.nan)
    scores = dict(zip(circuit.names, circuit.scores.tolist(), strict=True))
    kept = set(circuit.nodes)
    for name, (x, y) in spots.items():
        grid[int(y), int(x) + 1] = scores[name]
    bound = max(np.nanmax(np.abs(grid), initial=0.0), 1e-12)
    image = ax.imshow(grid, origin="lower", cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto")
    for name, (x, y) in spots.items():
        if name in kept and len(kept) < len(spots):
            ax.add_patch(Rectangle((int(x) + 0.5, int(y) - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.5))
    ax.set_xticks(range(columns), ["MLP", *(str(i) for i in range(columns - 1))])
    ax.set_yticks(range(rows))
    ax.set(xlabel="head", ylabel="layer", title=_title(circuit))
    ax.figure.colorbar(image, ax=ax, label="score")
    return ax


def draw_edges(circuit: Circuit, ax: Axes, limit: int) -> Axes:
    """Kept edges from bottom (``input``) to top (``logits``), width by absolute score, colour by sign."""
    scores = circuit.scores.abs() * circuit.kept
    order = scores.argsort(descending=True, stable=True)[: min(limit, len(circuit))].tolist()
    names = [circuit.names[i] for i in order]
    ends = list(dict.fromkeys(end for name in names for end in edge_parts(name)[:2]))
    heights = [place(end)[1] for end in ends if np.isfinite(place(end)[1])]
    top = np.floor(max(heights, default=0)) + 1
    spots = {end: (x, min(y, top)) for end, (x, y) in ((end, place(end)) for end in ends)}
    strongest = max((float(scores[i]) for i in order), default=0.0) or 1.0
    for i, name in zip(order, names, strict=True):
        source, target, _ = edge_parts(name)
        (x0, y0), (x1, y1) = spots[source], spots[target]
        colour = _POSITIVE if circuit.scores[i] >= 0 else _NEGATIVE
        ax.plot([x0, x1], [y0, y1], color=colour, linewidth=0.5 + 3 * float(scores[i]) / strongest, alpha=0.6, zorder=1)
    for end, (x, y) in spots.items():
        box = {"boxstyle": "round", "facecolor": "white"}
        ax.text(x, y, end, ha="center", va="center", fontsize=8, color="black", zorder=2, bbox=box)
    left = f", strongest {limit} drawn" if len(circuit) > limit else ""
    ax.set_xlim(-2, 1 + max((x for x, _ in spots.values()), default=0))
    ax.set_ylim(-1.5, top + 0.5)
    ax.set_xticks([])
    ax.set_yticks(range(int(top)), [f"layer {i}" for i in range(int(top))])
    ax.set_title(_title(circuit) + left)
    return ax


def _title(circuit: Circuit) -> str:
    method = circuit.provenance.get("method", "")
    return f"{method + ': ' if method else ''}{len(circuit):,} of {len(circuit.names):,} {circuit.level}s"
