"""What does every head look at, at a glance?

One row per head: how spread out a query's attention is (entropy, in nats), how far back it looks (mean distance, in
tokens), and which key it gives the largest share to. With a block size, one small picture per head too: cell (i, j)
is the mean over the queries of block i of the weight that they give to the keys of block j, so the cells of a row
sum to the row's mass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.probes.padding import padding
from workbench.probes.sinks.scores import sinks
from workbench.results import Result, axis
from workbench.run import Provenance, Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Atlas(Result):
    """``entropy`` and ``distance`` layer -> ``[H]``, means over queries, NaN where undefined. ``received``
    layer -> ``[H, K]``: column sums. ``blocks`` layer -> ``[H, ceil(Q/size), ceil(K/size)]``: mean mass per
    query (see the module), empty without a block size. ``peaks``: the same blocks' largest single weight."""

    entropy: Mapping[int | str, Tensor]
    distance: Mapping[int | str, Tensor]
    received: Mapping[int | str, Tensor]
    blocks: Mapping[int | str, Tensor]
    peaks: Mapping[int | str, Tensor]
    strongest: tuple[tuple[int | str, int, int, str, float], ...]
    """Per head ``(layer, head, key, token, share)``, as in ``sinks(run).strongest()``."""
    tokens: tuple[str, ...]
    size: int | None = None
    acts: Mapping[str, Tensor] = field(default_factory=dict)
    """Sites that the run read, by name."""
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def frame(self) -> pd.DataFrame:
        """One row per head: ``layer, head, entropy, distance, key, token, share``."""
        import pandas as pd

        best = {(layer, head): rest for layer, head, *rest in self.strongest}
        rows: list[dict[str, Any]] = []
        for layer, entropy in self.entropy.items():
            for head in range(len(entropy)):
                key, token, share = best.get((layer, head), (None, "", float("nan")))
                numbers = {"entropy": float(entropy[head]), "distance": float(self.distance[layer][head])}
                rows.append({"layer": layer, "head": head, **numbers, "key": key, "token": token, "share": share})
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The wall: one block map per head, layers downwards, heads to the right, each on a square-root scale
        of its own."""
        if not self.blocks:
            raise WorkbenchError("this atlas has no block maps; capture with blocks=64 to draw them")
        heads = max(len(maps) for maps in self.blocks.values())
        ax = axis(ax, 1.2 * heads + 0.6, 1.2 * len(self.blocks) + 0.6)
        ax.set_title(f"Attention by blocks of {self.size} tokens: {self.provenance.model}")
        return draw_wall(ax, self.blocks)


def atlas(run: Run, blocks: int | None = None) -> Atlas:
    """The atlas of a run of one sequence. ``blocks`` is the side of a block in tokens; none, no block maps.

    Statistics that the run captured are taken as they are; others are computed now, which needs maps that kept q and k.
    """
    if not run.maps:
        raise WorkbenchError("this run captured no attention; run it again with maps=wb.capture(blocks=64)")
    parts: dict[str, dict[int | str, Tensor]] = {n: {} for n in ("entropy", "distance", "received", "blocks", "peaks")}
    for layer, amap in run.maps.items():
        batch, _, queries, _ = amap.shape
        if batch != 1 or not bool(run.tokens.mask.all()):
            raise Refused(
                f"an atlas shows one sequence without padding; this run has a batch of {batch}: run texts one by one"
            )
        parts["received"][layer] = amap.received()[0].detach().cpu()
        parts["distance"][layer] = _mean(amap.distance())
        parts["entropy"][layer] = _entropy(amap)
        if blocks is not None:
            mass = amap.blocks(blocks, "sum")[0].detach().cpu()
            rows = torch.tensor([min(blocks, queries - lo) for lo in range(0, queries, blocks)])
            parts["blocks"][layer] = mass / rows[:, None]
            parts["peaks"][layer] = amap.blocks(blocks, "max")[0].detach().cpu()
    strongest = tuple((s.layer, s.head, s.key, s.token, s.share) for s in sinks(run).strongest())
    labels = run.tokens.labels[0] if run.tokens.labels else ()
    acts = {str(site): tensor.detach().cpu() for site, tensor in run.acts.items()}
    return Atlas(**parts, strongest=strongest, tokens=labels, size=blocks, acts=acts, provenance=run.provenance)


def _mean(values: Tensor) -> Tensor:
    return values[0].double().mean(-1).detach().cpu()


def _entropy(amap: AttentionMap) -> Tensor:
    """NaN where rows are no distributions."""
    try:
        return _mean(amap.entropy())
    except Refused:
        return torch.full((amap.shape[1],), float("nan"), dtype=torch.float64)


@dataclass(frozen=True)
class Tile(Result):
    """Exact weights of a part of one head's map: ``weights`` ``[queries, keys]``, counted from the two starts."""

    layer: int | str
    head: int
    query_start: int
    key_start: int
    query_tokens: tuple[str, ...]
    key_tokens: tuple[str, ...]
    weights: Tensor
    note: str = ""
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def frame(self) -> pd.DataFrame:
        """One row per pair: ``query, key, query_token, key_token, weight``."""
        import pandas as pd

        rows, columns = self.weights.shape
        return pd.DataFrame(
            {
                "query": [self.query_start + i for i in range(rows) for _ in range(columns)],
                "key": [self.key_start + j for _ in range(rows) for j in range(columns)],
                "query_token": [token for token in self.query_tokens for _ in range(columns)],
                "key_token": list(self.key_tokens) * rows,
                "weight": self.weights.flatten().double().numpy(),
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Heat map with the tokens on both axes."""
        ax = axis(ax, 1.8 + 0.3 * self.weights.shape[1], 1.4 + 0.26 * self.weights.shape[0])
        ax.set_title(f"head {self.layer}.{self.head}")
        return draw_tile(ax, self.weights, self.query_tokens, self.key_tokens)


def tile(run: Run, layer: int | str, head: int, queries: slice, keys: slice, note: str = "") -> Tile:
    """Exact weights of ``queries`` on ``keys`` in one head of the first sequence, computed now from what the map kept.

    Keys and queries whose tokens are not known (a cache, patches, the queries of cross-attention) are called by their
    position."""
    amap = run.maps[layer]
    if not 0 <= head < amap.shape[1]:
        raise UnknownName(f"head of layer {layer}", head, range(amap.shape[1]))
    (q0, q1, _), (k0, k1, _) = queries.indices(amap.shape[2]), keys.indices(amap.shape[3])
    if q0 >= q1 or k0 >= k1:
        raise WorkbenchError(
            f"the tile is empty: queries {q0} to {q1}, keys {k0} to {k1} of a map {list(amap.shape[2:])}"
        )
    weights = amap.tile(slice(q0, q1), slice(k0, k1))[0, head].detach().cpu()
    at = slice(amap.offset + q0, amap.offset + q1)
    keyed = padding(layer, amap, run.tokens).names[0]
    names = tuple(text or str(i) for i, text in enumerate(keyed or ("",) * max(amap.shape[3], at.stop)))
    across = isinstance(layer, str) and layer.startswith("cross.")  # queries and keys are of two texts
    shown = tuple(map(str, range(at.start, at.stop))) if across else names[at]
    return Tile(layer, head, at.start, k0, shown, names[k0:k1], weights, note, run.provenance)


def draw_wall(ax: Axes, maps: Mapping[int | str, Tensor]) -> Axes:
    """Block maps ``[H, rows, columns]`` of every layer: layers downwards, heads to the right, brighter is more."""
    heads = max(len(layer) for layer in maps.values())
    for row, layer in enumerate(maps.values()):
        for head, picture in enumerate(layer):
            spot = (head + 0.03, head + 0.97, row + 0.97, row + 0.03)
            shown = picture.float().clamp(min=0).sqrt().numpy()
            ax.imshow(shown, extent=spot, cmap="magma", aspect="auto", interpolation="nearest", vmin=0)
    ax.set(xlim=(0, heads), ylim=(len(maps), 0), xlabel="head", ylabel="layer")
    ax.set_xticks([h + 0.5 for h in range(heads)], [str(h) for h in range(heads)])
    ax.set_yticks([i + 0.5 for i in range(len(maps))], [str(layer) for layer in maps])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def draw_tile(ax: Axes, weights: Tensor, queries: Sequence[str], keys: Sequence[str]) -> Axes:
    """Weights ``[queries, keys]`` with the tokens on both axes."""
    image = ax.imshow(weights.float().numpy(), cmap="magma", vmin=0, aspect="auto", interpolation="nearest")
    ax.set_xticks(range(len(keys)), list(keys), rotation=60, ha="right", fontsize=8, parse_math=False)
    ax.set_yticks(range(len(queries)), list(queries), fontsize=8, parse_math=False)
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(image, ax=ax, label="weight")
    return ax
