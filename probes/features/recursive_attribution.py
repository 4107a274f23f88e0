"""Where does what a head moved to a feature come from? Its values, written as a sum over what is upstream, again and again.

Direct attribution ends at v[h, s]. With the sizes of norms and the patterns held, that value is linear in the stream at s, which
the embedding, earlier heads and MLPs wrote (Kissane et al., arXiv 2406.17759, "recursive direct feature attribution"):

    v[h, s] . w  =  sum over components c upstream of  out_c(s) . (L^T W_V^h w) / size(s)   + biases,

and every earlier head is again a sum over its own sources. The tree holds these sums: the children of a node sum to it exactly.
What is too small to follow is added up in a ``rest`` under the node that it belongs to, so that nothing is lost. Where a coder is
given for the stream or for an MLP's output, its features, its decoder's bias and its error stand in the place of the stream or of
the MLP; they are leaves, since a feature is not linear in what is before it, and so are MLPs.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.fragments import table_view
from workbench.models.protocol import Model
from workbench.probes.features.feature_attribution import Component, Reader, coder_constant, own_pre, site_of
from workbench.probes.features.heat import heat_limits, plain, token_heat
from workbench.probes.features.reading import check_features
from workbench.probes.features.stream import Point, point_of
from workbench.probes.features.upstream import Part, Upstream
from workbench.results import Result, axis
from workbench.run import Provenance
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from workbench.coders.coder import Coder

_SHOWN = 40


@dataclass(frozen=True)
class RecursiveAttribution(Result):
    """The tree in columns, node 0 the feature's pre-activation. ``parent`` ``[N]`` (-1 for the root), ``value`` ``[N]`` what the
    node adds to the pre-activation; ``kind``, ``layer``, ``index`` (head, feature, or how many parts a ``rest`` holds),
    ``position`` where it writes and, of heads, the ``source`` it reads; ``expanded`` ``[N]`` whether it has children.

    ``upstream`` ``[C, T]``: the same feature by ``components`` (embeddings and MLPs) and token, all paths through all heads
    added up and nothing cut; with ``constant`` it sums to ``pre`` too. Positive raises the feature.
    """

    site: str
    feature: int
    position: int
    tokens: tuple[str, ...]
    pre: float
    parent: Tensor
    depth: Tensor
    kind: tuple[str, ...]
    layer: Tensor
    index: Tensor
    where: Tensor
    source: Tensor
    value: Tensor
    expanded: Tensor
    components: tuple[Component, ...]
    upstream: Tensor
    constant: float
    threshold: float
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    @property
    def error(self) -> float:
        """Largest difference between a node and the sum of its children: rounding."""
        sums = torch.zeros_like(self.value).index_add_(0, self.parent[1:], self.value[1:])
        return float((sums - self.value)[self.expanded].abs().max())

    @property
    def rest(self) -> float:
        """Sum of all that was too small to follow."""
        return float(sum(v for v, kind in zip(self.value.tolist(), self.kind, strict=True) if kind == "rest"))

    def name(self, node: int) -> str:
        """A readable name: ``head 1.3 @ 9 from 4``."""
        kind, layer, index = self.kind[node], int(self.layer[node]), int(self.index[node])
        if kind == "root":
            return f"feature {self.feature} of {self.site} @ {self.position}"
        if kind == "rest":
            return f"rest ({index} parts)"
        number = f" {layer}.{index}" if layer >= 0 and index >= 0 else f" {layer}" if layer >= 0 else ""
        number = f" {index} of layer {layer}" if kind == "feature" else number
        source = int(self.source[node])
        return f"{kind}{number} @ {int(self.where[node])}" + (f" from {source}" if source >= 0 else "")

    def frame(self) -> pd.DataFrame:
        """One row per node: ``node parent depth name kind layer index position source token value expanded``."""
        import pandas as pd

        stands = torch.where(self.source >= 0, self.source, self.where).tolist()
        return pd.DataFrame(
            {
                "node": range(len(self.value)),
                "parent": self.parent.numpy(),
                "depth": self.depth.numpy(),
                "name": [self.name(i) for i in range(len(self.value))],
                "kind": list(self.kind),
                "layer": self.layer.numpy(),
                "index": self.index.numpy(),
                "position": self.where.numpy(),
                "source": self.source.numpy(),
                "token": [self.tokens[s] for s in stands],
                "value": self.value.numpy(),
                "expanded": self.expanded.numpy(),
            }
        )

    def leaves(self) -> pd.DataFrame:
        """The nodes without children, those of one thing at one place added up, strongest first. They sum to ``pre``."""
        frame = self.frame()
        found = frame[~frame["expanded"]]
        keys = ["kind", "layer", "index", "position", "source", "token"]
        summed = found.groupby(keys, as_index=False, sort=False).agg(value=("value", "sum"), nodes=("value", "size"))
        return summed.sort_values("value", key=lambda column: -column.abs(), ignore_index=True)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Heat of embeddings and MLPs by token, all paths added up."""
        part = self.upstream.double().numpy()
        ax = axis(ax, max(5.0, 2 + 0.3 * len(self.tokens)), max(2.6, 1.8 + 0.3 * len(part)))
        low, high = heat_limits(part)
        image = ax.imshow(part, aspect="auto", cmap="RdBu", vmin=low, vmax=high, interpolation="nearest")
        step = max(1, len(self.tokens) // 60)
        ax.set_xticks(range(0, len(self.tokens), step), plain(self.tokens[::step]), rotation=60, ha="right")
        ax.set_yticks(range(len(part)), list(map(str, self.components)))
        ax.set(xlabel="token", title=f"{self.name(0)}: {self.pre:.3g}")
        ax.figure.colorbar(image, ax=ax, label="added to the pre-activation")
        return ax

    def _repr_html_(self) -> str:
        heat = token_heat(self.tokens, self.upstream.sum(0), f"{self.name(0)}: {self.pre:.4g}", self.position)
        lines: list[str] = []
        stack = [0]
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parent.tolist()):
            children.setdefault(parent, []).append(node)
        while stack and len(lines) < _SHOWN:
            node = stack.pop()
            pad = "&nbsp;" * 4 * int(self.depth[node])
            lines.append(f"{pad}{escape(self.name(node))}: {float(self.value[node]):.4g}")
            stack += sorted(children.get(node, []), key=lambda i: abs(float(self.value[i])))
        tree = "<br>".join(lines)
        return f'{heat}<p style="font-family:monospace">{tree}</p>' + table_view(self.leaves(), "leaves", rows=12)


@torch.no_grad()
def recursive_attribution(
    coder: Coder,
    model: Model,
    text: Any,
    feature: int,
    position: int = -1,
    *,
    coders: Mapping[str | Site, Coder] | Sequence[Coder] = (),
    depth: int | None = None,
    threshold: float = 0.02,
    nodes: int = 2000,
    site: str | Site | None = None,
) -> RecursiveAttribution:
    """The pre-activation of one feature at one position as a tree of exact sums, down to the embeddings.

    ``coders``: coders of ``hook_resid_pre``, ``hook_resid_post`` or ``hook_mlp_out`` (autoencoders or transcoders) whose features
    stand for what they write; by the site that they write, or a list of coders that say so. ``depth``: how many heads a path
    crosses at most. ``threshold``: parts smaller than this share of all that the first level moves (sum of absolute values) go
    to a ``rest``; 0 keeps everything. Heads are opened from the largest on until there are ``nodes`` nodes; those not opened
    are leaves with their exact value. ``site``: what the coder reads, its own by default, as in ``feature_attribution``.
    """
    if depth is not None and depth < 1:
        raise WorkbenchError(f"depth counts the heads that a path crosses, from 1; got {depth}")
    if not 0 <= threshold < 1:
        raise WorkbenchError(f"threshold is a share from 0 to below 1; got {threshold}")
    if nodes < 2:
        raise WorkbenchError(f"a tree has 2 nodes or more; got nodes={nodes}")
    where = site_of(coder, site)
    check_features([feature], coder.features)
    layer = where.layer
    if where.kind in ("z", "attn_out"):
        assert layer is not None
        reach = Point(layer + 1, layer)
    else:
        last = model.shape.layers
        point = Point(last, last) if where.kind == "final_norm" else point_of(where)
        if point is None:
            raise Refused(f"{where} is no sum of heads and components; feature_attribution names the sites that are")
        reach = point
    tree = Upstream(model, text, reach, where, coders)
    t = tree.stream.check_position(position)
    pre = float(own_pre(coder, tree.stream, where, [feature], [t])[0, 0])
    reader = Reader(tree.stream, where, coder.W_enc.detach()[:, [feature]])
    first = [Part("coder bias", -1, -1, t, -1, float(coder_constant(coder, [feature])[0]))]
    if where.kind in ("z", "attn_out"):
        assert layer is not None
        here = tree.stream.layers[layer]
        if where.kind == "z":
            reads, constant = reader.columns.T.unflatten(1, (here.heads, -1)), 0.0
        else:
            reads, constant = here.heads_read(reader.columns.T, t), float((here.bias(t) @ reader.columns)[0])
        first += [Part("bias", -1, -1, t, -1, constant), *tree.heads(here, reads[0], t)]
        merged = tree.merged_heads(here, reads[0], t)
    else:
        r, constants = reader.directions(t)
        first += [Part("bias", -1, -1, t, -1, float(sum(c[0] for c in constants.values())))]
        first += tree.parts(r[0], reach, t)
        merged = tree.merged(r[0], reach, t)
    constant = first[0].value + first[1].value + merged.bias
    grown = _grow(tree, first, pre, t, depth, threshold, nodes)
    return RecursiveAttribution(
        site=str(where),
        feature=feature,
        position=t,
        tokens=tree.stream.tokens,
        pre=pre,
        components=merged.components,
        upstream=merged.values.cpu(),
        constant=constant,
        threshold=threshold,
        provenance=tree.stream.run.provenance,
        **grown,
    )


def _grow(
    tree: Upstream, first: list[Part], pre: float, t: int, depth: int | None, threshold: float, nodes: int
) -> dict[str, Any]:
    """Columns of the tree. Heads are opened largest first."""
    parents, depths, found, expanded = [-1], [0], [Part("root", -1, -1, t, -1, pre)], [True]
    least = threshold * sum(abs(part.value) for part in first)
    heap: list[tuple[float, int]] = []

    def add(parent: int, level: int, parts: list[Part]) -> None:
        kept = [part for part in parts if part.value and abs(part.value) >= least]
        small = [part for part in parts if part.value and abs(part.value) < least]
        if small:
            kept.append(Part("rest", -1, len(small), found[parent].position, -1, sum(part.value for part in small)))
        for part in kept:
            if part.opens is not None and (depth is None or level < depth):
                heapq.heappush(heap, (-abs(part.value), len(found)))
            parents.append(parent)
            depths.append(level)
            found.append(part)
            expanded.append(False)

    add(0, 1, first)
    while heap and len(found) < nodes:
        _, node = heapq.heappop(heap)
        add(node, depths[node] + 1, tree.open(found[node]))
        expanded[node] = True
    return {
        "parent": torch.tensor(parents),
        "depth": torch.tensor(depths),
        "kind": tuple(part.kind for part in found),
        "layer": torch.tensor([part.layer for part in found]),
        "index": torch.tensor([part.number for part in found]),
        "where": torch.tensor([part.position for part in found]),
        "source": torch.tensor([part.source for part in found]),
        "value": torch.tensor([part.value for part in found], dtype=torch.float64),
        "expanded": torch.tensor(expanded),
    }
