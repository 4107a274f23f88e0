"""Which patches depend on which, as a tree?

In reversed attention a token sends its value to the tokens it attends to instead of gathering theirs: a child j distributes
itself over its parents i, so that a map M (o_i = sum_j M_ij v_j) has columns that sum to 1 (Ding et al., Visual Dependency
Transformers, arXiv 2304.03282). Any attention map is read this way by the softmax of its scores over the other axis
(``reverse``) or, where only weights are known, by dividing its columns by their sums. The tree is the maximum spanning
arborescence of the mass sent from child to parent, averaged over heads and layers; its root is the patch that receives most.
The paper reads the parents off as each child's largest one, which is the same tree where these have no cycle; leaves are what
its Lite model prunes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.sources import Source, provenance_of
from workbench.probes.vision.grid import Grid
from workbench.probes.vision.on_patches import patch_maps, patch_rows, patch_sums
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

LIMIT = 256
"""Patches up to which all pairs are candidates: the search takes tens of seconds there."""


@dataclass(frozen=True)
class DependencyTree(Result):
    """Per image: ``parent`` ``[B, N]`` (the root's is -1), ``mass`` ``[B, N]`` what a patch receives from all others as a parent,
    ``sent`` ``[B, N]`` the share that it sends to its parent (0 at the root), ``depth`` ``[B, N]`` steps to the root.

    ``null`` measure -> ``[R, B]``: ``depth`` (mean), ``leaves`` (share of patches) and ``root`` (share of all mass that the
    root receives) if every child's distribution is shuffled over the parents.
    """

    parent: Tensor
    mass: Tensor
    sent: Tensor
    depth: Tensor
    null: Mapping[str, Tensor]
    grid: Grid
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    @property
    def root(self) -> Tensor:
        """The patch without a parent, ``[B]``."""
        return (self.parent < 0).long().argmax(1)

    @property
    def leaf(self) -> Tensor:
        """Patches that are nobody's parent, ``[B, N]``."""
        return ~_parents(self.parent)

    def keep(self, patches: int) -> Tensor:
        """Which patches stay, ``[B, N]`` bool, if leaves go one after another, the one that receives least first, until so many
        are left (the pruning of DependencyViT-Lite; the order is ours). The rest is a tree with the same root."""
        if not 1 <= patches <= self.grid.patches:
            raise WorkbenchError(f"between 1 and {self.grid.patches} patches can stay; got {patches}")
        stay = torch.ones_like(self.parent, dtype=torch.bool)
        for image, (parent, mass) in enumerate(zip(self.parent, self.mass, strict=True)):
            for _ in range(self.grid.patches - patches):
                leaves = stay[image] & ~_parents(torch.where(stay[image], parent, -1)[None])[0]
                stay[image, mass.masked_fill(~leaves, float("inf")).argmin()] = False
        return stay

    def summary(self) -> pd.DataFrame:
        """One row per image: ``image``, then mean ``depth``, share of ``leaves`` and the ``root``'s share of mass, each with the
        mean and the 95% range over shuffled trees."""
        import pandas as pd

        found = _shape(self.parent, self.mass, self.depth)
        columns: dict[str, object] = {"image": range(len(self.parent)), "root_patch": self.root.numpy()}
        for name, values in found.items():
            null = self.null[name]
            columns[name] = values.numpy()
            columns[f"{name}_null"] = null.mean(0).numpy()
            columns[f"{name}_null_low"] = null.quantile(0.025, dim=0).numpy()
            columns[f"{name}_null_high"] = null.quantile(0.975, dim=0).numpy()
        return pd.DataFrame(columns)

    def frame(self) -> pd.DataFrame:
        """One row per image and patch: ``image, patch, row, column, parent, depth, mass, sent, leaf``."""
        names = ("parent", "depth", "mass", "sent", "leaf")
        return self.grid.table({name: getattr(self, name) for name in names})

    def plot(self, ax: Axes | None = None, image: int = 0) -> Axes:
        """The tree of one image, a line from each patch to its parent; darker patches receive more."""
        if not 0 <= image < len(self.parent):
            raise UnknownName("image", image, range(len(self.parent)))
        ax = axis(ax, 4.4, 4.0)
        down, right = self.grid.centres.T.numpy()
        for child, parent in enumerate(self.parent[image].tolist()):
            if parent >= 0:
                ax.plot(
                    [right[child], right[parent]], [down[child], down[parent]], color="0.6", linewidth=0.8, zorder=1
                )
        ax.scatter(right, down, c=self.mass[image].numpy(), cmap="Blues", edgecolors="0.4", zorder=2)
        root = int(self.root[image])
        ax.scatter([right[root]], [down[root]], facecolors="none", edgecolors="red", s=120, zorder=3)
        ax.set(
            xlim=(0, self.grid.size[1]), ylim=(self.grid.size[0], 0), xlabel="pixels", ylabel="pixels",
            title=f"Dependency tree, root circled\n{self.provenance.model}",
        )  # fmt: skip
        return ax


@torch.no_grad()
def dependency_tree(
    source: Source, grid: Grid, *, raw: bool = False, candidates: int | None = None, draws: int = 16, seed: int = 0
) -> DependencyTree:
    """The tree of which patch depends on which, one per image, from the mean over heads and layers of the mass that each child
    sends to its parents.

    Maps whose columns are distributions (reversed attention, ``reverse(map)``) count as they are; of others each column is
    divided by its sum over patches. ``candidates`` keeps the strongest parents of each child only, which a grid of more than
    256 patches needs: the tree is then the best of these. The answer is a graph of N x N patches, so N x N numbers are made.
    Refuses an image in which no patch sends anything to another: any tree would be as good.
    """
    if grid.patches < 2:
        raise WorkbenchError("a tree takes two patches or more")
    if candidates is not None and candidates < 1:
        raise WorkbenchError(f"a child has at least one candidate; got {candidates}")
    if candidates is None and grid.patches > LIMIT:
        raise Refused(f"all pairs of {grid.patches} patches are too many to search; pass candidates=16")
    maps = patch_maps(source, grid, raw=raw)
    batches = {amap.shape[0] for amap in maps.values()}
    if len(batches) > 1:
        raise WorkbenchError(f"layers of one run have one batch; got {sorted(batches)}")
    sent = torch.stack([_sent(amap, grid) for amap in maps.values()]).mean(0)
    silent = (sent.sum((1, 2)) == 0).nonzero()[:, 0].tolist()
    if silent:
        raise Refused(
            f"no patch of image {silent[0]} sends anything to another one in any layer, so that there is no tree"
        )
    generator = torch.Generator().manual_seed(seed)
    parent, mass, depth, paid = _trees(sent, candidates)
    shuffled: dict[str, list[Tensor]] = {"depth": [], "leaves": [], "root": []}
    for _ in range(draws):
        trees = _trees(_shuffled(sent, generator), candidates)
        for name, values in _shape(*trees[:3]).items():
            shuffled[name].append(values)
    null = {name: torch.stack(values) for name, values in shuffled.items()}
    return DependencyTree(parent, mass, paid, depth, null, grid, provenance_of(source))


def reverse(amap: AttentionMap) -> AttentionMap:
    """The reversed reading of a softmax map: the softmax of its scores over queries, so that each key distributes itself over
    those that look at it. Scores are the log weights plus the log-sum-exp of the row, so the map must know its ``lse``."""
    lse = getattr(amap, "lse", None)
    if lse is None:
        raise Refused(
            f"{amap!r} knows no scores (no lse); dependency_tree divides the columns of its weights by their sums instead"
        )
    scores = amap.dense().double().log() + lse.double()[..., None]
    columns = scores.softmax(-2).nan_to_num(0.0)
    return AttentionMap.from_dense(columns, row_sum="columns")


def _sent(amap: AttentionMap, grid: Grid) -> Tensor:
    """Mean over heads of what child j sends to parent i, ``[B, i, j]`` in float64, nothing to itself."""
    sums = torch.ones(*amap.shape[:2], grid.patches, dtype=torch.float64)
    if amap.row_sum != "columns":
        sums = patch_sums(amap, grid)[0]
    out = torch.zeros(amap.shape[0], grid.patches, grid.patches, dtype=torch.float64)
    for part in patch_rows(amap, grid):
        rows = part.rows[..., grid.index] / sums[:, :, None].clamp(min=torch.finfo(torch.float64).tiny)
        out[:, part.queries] = rows.mean(1)
    return out * (1 - torch.eye(grid.patches, dtype=torch.float64))


def _trees(sent: Tensor, candidates: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parents, mass, depth, and what each child sends to its parent; all ``[B, N]``."""
    mass = sent.sum(2)
    parent = torch.stack(
        [arborescence(each, int(root), candidates) for each, root in zip(sent, mass.argmax(1), strict=True)]
    )
    depth = torch.zeros_like(parent)
    at = parent.clone()
    while bool((at >= 0).any()):
        depth += at >= 0
        at = torch.where(at >= 0, parent.gather(1, at.clamp(min=0)), -1)
    paid = sent.gather(1, parent.clamp(min=0)[:, None])[:, 0]
    return parent, mass, depth, torch.where(parent >= 0, paid, 0.0)


def arborescence(weight: Tensor, root: int, candidates: int | None = None) -> Tensor:
    """The tree with the largest sum of ``weight[parent, child]`` ``[N, N]`` that hangs on ``root``: each child's parent ``[N]``,
    -1 for the root."""
    import networkx as nx

    n = len(weight)
    offered = weight.clone()
    offered.fill_diagonal_(float("-inf"))
    best = offered.argmax(0)
    best[root] = -1
    hangs = torch.zeros(n, dtype=torch.bool)
    hangs[root] = True
    for _ in range(n):
        further = hangs | hangs[best.clamp(min=0)]
        if torch.equal(further, hangs):
            break
        hangs = further
    loose = (~hangs).nonzero()[:, 0].tolist()
    if not loose:
        return best
    # Patches whose largest parents lead to the root keep them in the best tree: they stand together as its root.
    value, place = offered[hangs].max(0)
    held = hangs.nonzero()[:, 0]
    graph = nx.DiGraph()
    graph.add_weighted_edges_from((n, child, float(value[child])) for child in loose)
    for child in loose:
        order = offered[loose, child].argsort(descending=True, stable=True)[:candidates]
        parents = [loose[i] for i in order.tolist() if loose[i] != child]
        graph.add_weighted_edges_from((parent, child, float(offered[parent, child])) for parent in parents)
    for parent, child in nx.maximum_spanning_arborescence(graph).edges:
        best[child] = int(held[place[child]]) if parent == n else parent
    return best


def _shuffled(sent: Tensor, generator: torch.Generator) -> Tensor:
    """Each child's mass on parents in random order, its own place left empty."""
    n = sent.shape[-1]
    order = (
        torch.rand(n, n, generator=generator).fill_diagonal_(2.0).argsort(0)[:-1]
    )  # [parents, child], itself comes last
    others = torch.arange(n - 1)[:, None] + (torch.arange(n - 1)[:, None] >= torch.arange(n))
    out = torch.zeros_like(sent)
    return out.scatter_(1, others.expand(len(sent), -1, -1), sent.gather(1, order.expand(len(sent), -1, -1)))


def _shape(parent: Tensor, mass: Tensor, depth: Tensor) -> dict[str, Tensor]:
    return {
        "depth": depth.double().mean(1),
        "leaves": (~_parents(parent)).double().mean(1),
        "root": mass.amax(1) / mass.sum(1),
    }


def _parents(parent: Tensor) -> Tensor:
    """Which patches are a parent, ``[B, N]``."""
    counts = torch.zeros(len(parent), parent.shape[1] + 1)
    counts.scatter_(1, torch.where(parent < 0, parent.shape[1], parent), 1.0)
    return counts[:, :-1] > 0


ANALYSES = (
    Analysis(
        name="dependency-tree",
        question="Which patches depend on which, as a tree?",
        function=dependency_tree,
        example=lambda: {"source": random_maps(tokens=12, causal=False), "grid": Grid(3, 4, (8, 8)), "draws": 4},
        paper="Ding et al. 2023 (arXiv 2304.03282), section 3",
        source="maps",
        null="each child's mass shuffled over the parents: depth, leaves and the root's share",
        definition="columns of the map divided by their sums, mean over heads and layers, maximum spanning arborescence",
    ),
)
