"""Attribution graphs of one prompt: features, errors and embeddings as nodes, their direct effects as edges.

Columnar, so that a hundred thousand nodes and millions of edges are a few tensors. Operations on a graph (pruning,
influence, sub-graphs) live outside and return new graphs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.results import Result, axis, new_folder

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

NODE_KINDS = (
    "embedding",  # the token at a position; feature = token id, layer = -1
    "feature",  # a feature of the coder that replaces the MLP of its layer
    "error",  # what that coder leaves of the MLP output; feature = -1
    "attention feature",  # a feature of the coder that replaces the attention of its layer
    "attention error",  # what that coder leaves of the attention output; feature = -1
    "head",  # a whole attention head; feature = its index
    "bias",  # a bias that acts as a source; feature = -1
    "logit",  # the logit of one token, centred over the vocabulary; feature = token id, layer = number of layers
    "residual feature",  # a feature of the coder that stands in the residual stream behind its layer
    "residual error",  # what that coder leaves of the stream; feature = -1
)
_WITHOUT_INDEX = ("error", "attention error", "residual error", "bias")
_NODE_COLUMNS = ("kind", "layer", "position", "feature", "activation", "influence", "probability", "label")
_FORMAT = 1
_FILES = ("nodes.parquet", "edges.parquet", "graph.json")


@dataclass(frozen=True)
class FeatureNodes:
    """Nodes in columns. ``kind`` ``[N]`` indexes ``NODE_KINDS``; ``layer position feature`` ``[N]`` are whole numbers.

    ``layer`` is -1 for embeddings and the number of layers for logits. ``feature`` is the index in the coder, the token
    id of embeddings and logits, and -1 where there is none. ``activation`` is the value of the feature on the prompt,
    ``influence`` the share of the logits that it carries, ``probability`` the model's for logits; NaN means undefined.
    ``label`` is free text; for embeddings and logits the text of the token. ``columns`` holds further numbers per node (for
    example its pre-activation).

    No two nodes have the same kind, layer, position and feature.
    """

    kind: Tensor
    layer: Tensor
    position: Tensor
    feature: Tensor
    activation: Tensor
    influence: Tensor
    probability: Tensor
    label: tuple[str, ...]
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.kind)
        for name in ("kind", "layer", "position", "feature"):
            values = torch.as_tensor(getattr(self, name)).detach().cpu()
            if values.is_floating_point() or values.dtype == torch.bool:
                raise WorkbenchError(f"{name} of the nodes of a graph is a whole number; got {values.dtype}")
            object.__setattr__(self, name, values.long())
        for name in ("activation", "influence", "probability"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name)).detach().cpu().double())
        object.__setattr__(self, "label", tuple(self.label))
        columns = {name: torch.as_tensor(values).detach().cpu() for name, values in self.columns.items()}
        object.__setattr__(self, "columns", columns)
        taken = sorted({*_NODE_COLUMNS, "token"} & set(columns))
        if taken:
            raise WorkbenchError(f"a column of nodes cannot be called {taken[0]!r}: nodes have one of their own")
        for name, values in columns.items():
            if tuple(values.shape) != (n,):
                raise WorkbenchError(
                    f"{name} of the nodes of a graph is [N] with N={n} nodes; got {list(values.shape)}"
                )
        for name in ("layer", "position", "feature", "activation", "influence", "probability", "label"):
            values = getattr(self, name)
            shape = tuple(values.shape) if isinstance(values, Tensor) else (len(values),)
            if shape != (n,):
                raise WorkbenchError(f"{name} of the nodes of a graph is [N] with N={n} nodes; got {list(shape)}")
        if n and (int(self.kind.min()) < 0 or int(self.kind.max()) >= len(NODE_KINDS)):
            raise WorkbenchError(f"kind of a node is 0 to {len(NODE_KINDS) - 1}, an index of NODE_KINDS")
        if n and (int(self.layer.min()) < -1 or int(self.position.min()) < 0 or int(self.feature.min()) < -1):
            raise WorkbenchError("layers of nodes count from -1, positions from 0, features from -1")
        if len(torch.unique(self.key, dim=0)) != n:
            seen: set[tuple[int, ...]] = set()
            for row in map(tuple, self.key.tolist()):
                if row in seen:
                    kind, layer, position, feature = row
                    raise WorkbenchError(
                        f"a graph has each node once; the {NODE_KINDS[kind]} {feature} of layer {layer} at position "
                        f"{position} occurs twice"
                    )
                seen.add(row)

    @classmethod
    def of(
        cls,
        kind: Sequence[str] | Tensor,
        layer: Sequence[int] | Tensor,
        position: Sequence[int] | Tensor,
        feature: Sequence[int] | Tensor,
        *,
        activation: Sequence[float] | Tensor | None = None,
        influence: Sequence[float] | Tensor | None = None,
        probability: Sequence[float] | Tensor | None = None,
        label: Sequence[str] | None = None,
        columns: Mapping[str, Tensor] | None = None,
    ) -> FeatureNodes:
        """Nodes from columns, ``kind`` by name or index; what is left out is undefined, labels empty."""
        n = len(kind)
        blank = torch.full((n,), float("nan"), dtype=torch.float64)

        def whole(values: Sequence[int] | Tensor) -> Tensor:
            return values if isinstance(values, Tensor) else torch.tensor(list(values), dtype=torch.int64)

        def real(values: Sequence[float] | Tensor | None) -> Tensor:
            return blank if values is None else torch.as_tensor(values, dtype=torch.float64)

        codes = kind if isinstance(kind, Tensor) else torch.tensor([kind_code(k) for k in kind], dtype=torch.int64)
        return cls(
            codes,
            whole(layer),
            whole(position),
            whole(feature),
            real(activation),
            real(influence),
            real(probability),
            tuple(label) if label is not None else ("",) * n,
            columns or {},
        )

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def key(self) -> Tensor:
        """``[N, 4]``: kind, layer, position, feature; one row names one node."""
        return torch.stack([self.kind, self.layer, self.position, self.feature], dim=1)

    @property
    def depth(self) -> Tensor:
        """``[N]``: place in the order of computation: -1 embeddings, 2l attention and 2l + 1 MLP and stream of layer l, then
        the logits. An edge never leads to a smaller depth."""
        depth = 2 * self.layer
        depth[self.where("feature", "error", "residual feature", "residual error")] += 1
        depth[self.where("embedding", "bias")] = -1
        depth[self.where("logit")] = torch.iinfo(torch.int64).max
        return depth

    def where(self, *kinds: str) -> Tensor:
        """Indices ``[n]`` of the nodes of these kinds, in order."""
        codes = torch.tensor([kind_code(k) for k in kinds], dtype=torch.int64)
        return torch.isin(self.kind, codes).nonzero()[:, 0]

    def take(self, index: Tensor) -> FeatureNodes:
        """The nodes at ``index`` ``[n]``, in that order."""
        return FeatureNodes(
            self.kind[index],
            self.layer[index],
            self.position[index],
            self.feature[index],
            self.activation[index],
            self.influence[index],
            self.probability[index],
            tuple(self.label[i] for i in index.tolist()),
            {name: values[index] for name, values in self.columns.items()},
        )


@dataclass(frozen=True)
class FeatureGraph(Result):
    """Direct effects between the nodes of one prompt: edge ``m`` leads from ``source[m]`` to ``target[m]``.

    ``source target`` ``[M]`` index ``nodes``; ``weight`` ``[M]`` is what the source adds to the target (to the
    pre-activation of a feature, to the centred logit), in the target's unit; positive raises it. ``tokens`` are the texts
    of the prompt, one per position. ``columns`` holds further numbers per edge (for example the head that carries it).
    ``meta`` is JSON-able: model, coders, settings, scores.
    """

    nodes: FeatureNodes
    source: Tensor
    target: Tensor
    weight: Tensor
    tokens: tuple[str, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", torch.as_tensor(self.source).detach().cpu().long())
        object.__setattr__(self, "target", torch.as_tensor(self.target).detach().cpu().long())
        object.__setattr__(self, "weight", torch.as_tensor(self.weight).detach().cpu())
        object.__setattr__(self, "tokens", tuple(self.tokens))
        columns = {name: torch.as_tensor(values).detach().cpu() for name, values in self.columns.items()}
        object.__setattr__(self, "columns", columns)
        m, n = len(self.source), len(self.nodes)
        for name, values in (("target", self.target), ("weight", self.weight), *columns.items()):
            if tuple(values.shape) != (m,):
                raise WorkbenchError(f"{name} of a graph is [M] with M={m} edges; got {list(values.shape)}")
        taken = sorted({"source", "target", "weight"} & set(columns))
        if taken:
            raise WorkbenchError(f"a column of edges cannot be called {taken[0]!r}: a graph has one of its own")
        if not self.weight.is_floating_point() or not torch.isfinite(self.weight).all():
            raise WorkbenchError("weights of a graph are finite numbers; some are not")
        if m and int(torch.minimum(self.source, self.target).min()) < 0:
            raise WorkbenchError("edges of a graph lead between nodes 0 ... N-1; one is negative")
        if m and int(torch.maximum(self.source, self.target).max()) >= n:
            raise WorkbenchError(f"edges of a graph lead between its {n} nodes; one leads elsewhere")
        depth = self.nodes.depth
        wrong = (depth[self.source] > depth[self.target]) | (self.source == self.target)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise WorkbenchError(
                f"an edge leads back, from {self.name(int(self.source[at]))} to {self.name(int(self.target[at]))}; "
                "edges follow the order of computation"
            )
        last = int(self.nodes.position.max()) if n else -1
        if self.tokens and last >= len(self.tokens):
            raise WorkbenchError(f"a node is at position {last} and there are {len(self.tokens)} tokens")

    def name(self, node: int) -> str:
        """A readable name of a node: ``L3 feature 17 @ 5``."""
        nodes = self.nodes
        kind, feature = NODE_KINDS[int(nodes.kind[node])], int(nodes.feature[node])
        layer = f"L{int(nodes.layer[node])} " if kind not in ("embedding", "logit") else ""
        index = "" if kind in _WITHOUT_INDEX else f" {feature}"
        return f"{layer}{kind}{index} @ {int(nodes.position[node])}"

    @property
    def logits(self) -> Tensor:
        """Indices of the logit nodes."""
        return self.nodes.where("logit")

    def matrix(self) -> Tensor:
        """``[N, N]`` sparse COO, ``[target, source]``: row t holds what adds to node t."""
        n = len(self.nodes)
        where = torch.stack([self.target, self.source])
        return torch.sparse_coo_tensor(where, self.weight, (n, n), check_invariants=True).coalesce()

    def frame(self) -> pd.DataFrame:
        """One row per node: ``kind layer position feature token activation influence probability label``, then ``columns``."""
        import pandas as pd

        nodes = self.nodes
        shown = [self.tokens[i] if self.tokens else "" for i in nodes.position.tolist()]
        return pd.DataFrame(
            {
                "kind": [NODE_KINDS[k] for k in nodes.kind.tolist()],
                "layer": nodes.layer.numpy(),
                "position": nodes.position.numpy(),
                "feature": nodes.feature.numpy(),
                "token": shown,
                "activation": nodes.activation.numpy(),
                "influence": nodes.influence.numpy(),
                "probability": nodes.probability.numpy(),
                "label": list(nodes.label),
                **{name: values.numpy() for name, values in nodes.columns.items()},
            }
        )

    def edge_frame(self) -> pd.DataFrame:
        """One row per edge: ``source target weight`` (indices of nodes), then ``columns``."""
        import pandas as pd

        extra = {name: values.numpy() for name, values in self.columns.items()}
        plain = {"source": self.source.numpy(), "target": self.target.numpy(), "weight": self.weight.numpy()}
        return pd.DataFrame({**plain, **extra})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Positions from left to right, layers from bottom to top; the strongest edges (at most 300)."""
        from workbench.feature_graph_plot import draw

        return draw(self, axis(ax, 8, 5))

    def _repr_html_(self) -> str:
        from workbench.feature_graph_plot import graph_html

        return graph_html(self)

    def save(self, path: str | Path) -> Path:
        """Write ``nodes.parquet``, ``edges.parquet`` and ``graph.json`` into the new folder ``path``."""
        path = Path(path)
        record = {
            "format": _FORMAT,
            "nodes": len(self.nodes),
            "edges": len(self.source),
            "tokens": list(self.tokens),
            "columns": list(self.columns),
            "meta": dict(self.meta),
        }
        with new_folder(path) as part:
            self.frame().drop(columns="token").to_parquet(part / "nodes.parquet")
            self.edge_frame().to_parquet(part / "edges.parquet")
            (part / "graph.json").write_text(json.dumps(record, indent=1, default=str))
        return path

    @classmethod
    def load(cls, path: str | Path) -> FeatureGraph:
        """The graph saved in the folder ``path``; a missing, half-written or damaged one is refused."""
        import pandas as pd

        path = Path(path)
        if not path.is_dir():
            raise WorkbenchError(f"no graph folder at {path}")
        for name in _FILES:
            if not (path / name).is_file():
                raise WorkbenchError(f"{path} is no complete feature graph: {name} is missing; save it again")
        try:
            record = json.loads((path / "graph.json").read_text())
            if record["format"] != _FORMAT:
                raise WorkbenchError(f"{path} has graph format {record['format']}; this version reads {_FORMAT}")
            nodes, edges = pd.read_parquet(path / "nodes.parquet"), pd.read_parquet(path / "edges.parquet")
            for table, announced in ((nodes, record["nodes"]), (edges, record["edges"])):
                if len(table) != announced:
                    raise WorkbenchError(f"{path} is damaged: {len(table)} rows, {announced} announced; save it again")

            def column(table: pd.DataFrame, name: str) -> Tensor:
                return torch.from_numpy(table[name].to_numpy(copy=True))

            read = FeatureNodes.of(
                list(nodes["kind"]),
                column(nodes, "layer"),
                column(nodes, "position"),
                column(nodes, "feature"),
                activation=column(nodes, "activation"),
                influence=column(nodes, "influence"),
                probability=column(nodes, "probability"),
                label=list(nodes["label"]),
                columns={name: column(nodes, name) for name in nodes.columns if name not in _NODE_COLUMNS},
            )
            return cls(
                read,
                column(edges, "source"),
                column(edges, "target"),
                column(edges, "weight"),
                tokens=tuple(record["tokens"]),
                meta=record["meta"],
                columns={name: column(edges, name) for name in record["columns"]},
            )
        except WorkbenchError:
            raise
        except Exception as error:
            raise WorkbenchError(f"{path} is damaged: {type(error).__name__}: {error}; save it again") from error

    def __repr__(self) -> str:
        counts = torch.bincount(self.nodes.kind, minlength=len(NODE_KINDS)).tolist()
        kinds = ", ".join(f"{n:,} {kind}" for n, kind in zip(counts, NODE_KINDS, strict=True) if n)
        return f"FeatureGraph({len(self.nodes):,} nodes ({kinds}), {len(self.source):,} edges)"


def kind_code(kind: str) -> int:
    """The index of a node kind in ``NODE_KINDS``."""
    if kind not in NODE_KINDS:
        raise UnknownName("kind of node", kind, NODE_KINDS)
    return NODE_KINDS.index(kind)
