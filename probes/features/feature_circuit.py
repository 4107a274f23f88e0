"""Sparse feature circuits: the features that carry a behaviour, and the edges between them (Marks et al., arXiv 2403.19647)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.circuits.components import Metric
from workbench.probes.features.feature_edges import edge_effects
from workbench.probes.features.feature_effects import FeatureEffects, scored
from workbench.probes.features.node_gradients import Patching
from workbench.probes.features.splice import ERROR, Coders
from workbench.results import Result
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from workbench.feature_graph import FeatureGraph

METHODS = ("ig", "attribution")
_KINDS = {
    "mlp_pre": "", "mlp_post": "", "mlp_out": "", "z": "attention ", "attn_out": "attention ", "embed": "residual ",
    "resid_pre": "residual ", "resid_mid": "residual ", "resid_post": "residual ",
}  # fmt: skip


@dataclass(frozen=True)
class FeatureCircuit(Result):
    """Features and error terms whose effect reaches ``node_threshold``, and the edges between them that reach ``edge_threshold``.

    ``effects`` are all scored nodes, ``kept`` ``[N]`` the rows of those in the circuit, in the order of computation. Edge m leads
    from kept node ``source[m]`` to kept node ``target[m]``, or to the metric, which is node N; ``weight`` ``[M]`` float64 is what
    the source does to the metric through the target, mean over pairs, positive supports the clean behaviour.
    """

    effects: FeatureEffects
    kept: Tensor
    source: Tensor
    target: Tensor
    weight: Tensor
    node_threshold: float
    edge_threshold: float
    provenance: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of nodes, without the metric."""
        return len(self.kept)

    @property
    def nodes(self) -> FeatureEffects:
        """The nodes of the circuit."""
        return self.effects.take(self.kept)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the nodes, as ``FeatureEffects.names`` has them, and last the metric."""
        return (*self.nodes.names, "metric")

    def threshold(self, node: float | None = None, edge: float | None = None) -> FeatureCircuit:
        """The circuit at higher thresholds; edges of lower ones were not computed or not kept, and are refused."""
        node = self.node_threshold if node is None else node
        edge = self.edge_threshold if edge is None else edge
        if node < self.node_threshold or edge < self.edge_threshold:
            raise Refused(
                f"this circuit was found with thresholds {self.node_threshold} (node) and {self.edge_threshold} (edge); find it "
                f"again for {node} and {edge}: feature_circuit(..., node_threshold={node}, edge_threshold={edge})"
            )
        stay = self.nodes.effect.abs() >= node
        number = torch.cat([stay.long().cumsum(0) - 1, stay.sum()[None]])
        both = torch.cat([stay, torch.tensor([True])])
        edges = both[self.source] & both[self.target] & (self.weight.abs() >= edge)
        return replace(
            self,
            kept=self.kept[stay],
            source=number[self.source[edges]],
            target=number[self.target[edges]],
            weight=self.weight[edges],
            node_threshold=node,
            edge_threshold=edge,
        )

    def frame(self) -> pd.DataFrame:
        """The nodes: columns ``site place feature effect clean replaced``, largest absolute effect first."""
        return self.nodes.frame()

    def edge_frame(self) -> pd.DataFrame:
        """The edges: columns ``source target weight``, largest absolute weight first."""
        import pandas as pd

        names, order = self.names, self.weight.abs().argsort(descending=True, stable=True)
        return pd.DataFrame(
            {
                "source": [names[i] for i in self.source[order].tolist()],
                "target": [names[i] for i in self.target[order].tolist()],
                "weight": self.weight[order].numpy(),
            }
        )

    def graph(self) -> FeatureGraph:
        """The circuit as a ``FeatureGraph``, which prunes, draws and exports.

        Positions of nodes are those of the circuit's places, the metric is its one logit node. Weights are effects on the
        metric through the target, not additions to it (``meta["weights"]``). Refused where two sites of one layer would be the
        same node: z and attn_out, or two tensors of the residual stream.
        """
        from workbench.feature_graph import FeatureGraph, FeatureNodes

        nodes = self.nodes
        where = [_where(Site.parse(name)) for name in nodes.sites]
        if len(set(where)) < len(where):
            twice = next(i for i, at in enumerate(where) if at in where[:i])
            first = where.index(where[twice])
            raise Refused(
                f"a graph cannot tell {nodes.sites[first]} from {nodes.sites[twice]}; find the circuit with coders at one of them"
            )
        kinds = [
            where[s][0] + ("error" if f == ERROR else "feature")
            for s, f in zip(nodes.site.tolist(), nodes.feature.tolist(), strict=True)
        ]
        layers, end = [where[s][1] for s in nodes.site.tolist()], len(nodes.places) - 1
        blank = torch.tensor([float("nan")], dtype=torch.float64)
        made = FeatureNodes.of(
            [*kinds, "logit"],
            [*layers, self.provenance["layers"]],
            [*nodes.place.tolist(), end],
            [*nodes.feature.tolist(), 0],
            activation=torch.cat([nodes.clean, blank]),
            probability=torch.cat([torch.full_like(nodes.clean, float("nan")), torch.ones(1, dtype=torch.float64)]),
            label=[*nodes.names, self.provenance["metric"]],
            columns={"effect": torch.cat([nodes.effect, blank]), "replaced": torch.cat([nodes.replaced, blank])},
        )
        meta = {**self.provenance, "weights": "effect of the source on the metric through the target"}
        return FeatureGraph(
            made, self.source, self.target, self.weight, tokens=tuple(p or "all" for p in nodes.places), meta=meta
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Layers from bottom to top, places from left to right."""
        return self.graph().plot(ax)


def feature_circuit(
    model: Model,
    coders: Coders,
    pairs: Pairs,
    metric: Metric | None = None,
    *,
    node_threshold: float = 0.1,
    edge_threshold: float = 0.01,
    ablation: str = "counterfactual",
    steps: int = 10,
    method: str = "ig",
    positions: str = "all",
    batch: int = 16,
    mask: Tensor | None = None,
) -> FeatureCircuit:
    """Find the features and errors whose absolute effect is at least ``node_threshold`` and the edges between them of at
    least ``edge_threshold``, both in units of the metric, means over pairs.

    The other arguments are those of ``feature_effects``; ``method="exact"`` has no gradients and so no edges.
    """
    if method not in METHODS:
        raise UnknownName("method of feature circuits", method, METHODS)
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not value >= 0:
            raise WorkbenchError(f"{name} is compared with absolute effects, at least 0; got {value}")
    patching = Patching.of(model, coders, pairs, metric, ablation, batch, positions, mask)
    effects, batches = scored(patching, method, steps)
    kept = (effects.effect.abs() >= node_threshold).nonzero()[:, 0]
    weights = edge_effects(patching, batches, effects.take(kept))
    source, target = ((weights.abs() >= edge_threshold) & (weights != 0)).nonzero(as_tuple=True)
    return FeatureCircuit(
        effects,
        kept,
        source,
        target,
        weights[source, target],
        float(node_threshold),
        float(edge_threshold),
        {**effects.provenance, "layers": model.shape.layers},
    )


def _where(site: Site) -> tuple[str, int]:
    """The kind of node, up to ``feature`` or ``error``, and the layer that a site has in a graph."""
    if site.kind not in _KINDS:
        raise Refused(f"a feature graph has no nodes for {site}; it has: {', '.join(_KINDS)}")
    layer = -1 if site.layer is None else site.layer
    return _KINDS[site.kind], layer - 1 if site.kind == "resid_pre" else layer
