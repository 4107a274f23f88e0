"""Graphs of circuits (layers upwards, heads to the right) and of one prompt (layers upwards, tokens to the right)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench.apps.components.component import Component
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from workbench.circuits import Circuit
    from workbench.feature_graph import FeatureGraph

GRAPH = Component("graph")
"""Events: ``node`` with an identifier, ``edge`` with ``{source, target, channel}``."""
DRAWN = 300
"""Edges that are drawn at most."""
BESIDE = 40
"""Edges that are not kept and are drawn faintly beside those that are."""
COMPARED = ("only in the first", "only in the second", "in both")
_CIRCUIT_SPACING, _PROMPT_SPACING = (92, 92), (58, 96)
_SIDE = 3
"""Nodes of one token and layer that stand side by side; more of them take more lines."""


def circuit_data(
    circuit: Circuit,
    *,
    truth: Circuit | None = None,
    other: Circuit | None = None,
    selected: str | None = None,
    threshold: float | None = None,
    unit: str = "",
    title: str = "",
    limit: int = DRAWN,
) -> dict[str, Any]:
    """What :data:`GRAPH` draws of a circuit, summed over positions.

    Drawn are the kept edges, the strongest first and at most ``limit``, the edges of ``truth``, and the ``BESIDE`` strongest
    of those that are not kept; a circuit of nodes has no edges. ``truth`` marks what is in the known circuit, also nodes by
    a truth of edges. With ``other``, a circuit of the same level, colours tell what is kept here, there, and in both.
    ``selected`` is the name of a node or an edge, ``threshold`` the least |score| that is kept, ``unit`` that of scores.
    """
    if limit < 1:
        raise WorkbenchError(f"limit is a number of edges, from 1; got {limit}")
    if other is not None and other.level != circuit.level:
        raise WorkbenchError(f"a circuit of {circuit.level}s cannot be laid over one of {other.level}s")
    whole = circuit.over_positions()
    there = None if other is None else other.over_positions()
    right = _truth(whole, truth)
    kept = _kept(whole)
    theirs = set() if there is None else _kept(there)
    scores = dict(zip(whole.names, whole.scores.tolist(), strict=True))
    if there is not None:
        scores = {**dict(zip(there.names, there.scores.tolist(), strict=True)), **scores}

    def told(name: str) -> dict[str, Any]:
        group = None if there is None else _group(name in kept, name in theirs)
        return {"score": scores[name], "kept": name in kept or name in theirs, "truth": name in right, "group": group}

    edges: list[dict[str, Any]] = []
    left_out = 0
    if whole.level == "edge":
        names, left_out = _drawn(scores, kept | theirs, right, limit)
        edges = [{**_ends(name), **told(name)} for name in names]
        inside = {end for edge in edges if edge["kept"] for end in (edge["source"], edge["target"])}
        true_ends = {end for name in right for end in _ends(name).values()}
        nodes = {name: {"score": None, "kept": name in inside, "truth": name in true_ends, "group": None}
                 for name in _all_nodes(whole.names)}  # fmt: skip
    else:
        nodes = {name: told(name) for name in scores}
    layout = _Layers(nodes)
    return {
        "nodes": [{"id": name, **layout.node(name, ports=whole.level == "edge"), **said} for name, said in nodes.items()],
        "edges": edges,
        "columns": layout.columns,
        "spots": layout.spots,
        "rows": layout.rows,
        "spacing": list(_CIRCUIT_SPACING),
        "threshold": threshold,
        "selected": _selected(selected, nodes),
        "truth": truth is not None,
        "groups": [] if there is None else list(COMPARED),
        "left_out": left_out,
        "unit": unit,
        "title": title,
    }  # fmt: skip


def attribution_data(
    graph: FeatureGraph,
    *,
    selected: str | None = None,
    pinned: Iterable[str] = (),
    title: str = "",
    limit: int = DRAWN,
) -> dict[str, Any]:
    """What :data:`GRAPH` draws of the graph of a prompt: a column per token, a row per layer, the ``limit`` strongest edges.

    Nodes are called as ``graph.name`` does; ``selected`` is one of them, those ``pinned`` carry a ring. The size of a node
    is its influence on the logits. Raises ``WorkbenchError`` for a graph without nodes.
    """
    from workbench.feature_graph import NODE_KINDS
    from workbench.probes.features.subgraph import describe

    if limit < 1:
        raise WorkbenchError(f"limit is a number of edges, from 1; got {limit}")
    if not len(graph.nodes):
        raise WorkbenchError("the graph has no nodes; keep more of it")
    nodes, rings = graph.nodes, set(pinned)
    names = [graph.name(i) for i in range(len(nodes))]
    kinds = [NODE_KINDS[kind] for kind in nodes.kind.tolist()]
    columns, rows, spots = _prompt_places(graph, kinds)
    influence = [value if math.isfinite(value) else None for value in nodes.influence.tolist()]
    shown = [
        {
            "id": name,
            "label": nodes.label[i] or name,
            "text": describe(graph, i),
            "column": columns[i],
            "row": rows[i],
            "kind": "error" if kinds[i].endswith("error") else "feature" if kinds[i].endswith("feature") else kinds[i],
            "score": influence[i],
            "kept": True,
            "truth": name in rings,
            "group": None,
            "ports": "",
        }
        for i, name in enumerate(names)
    ]
    order = graph.weight.abs().argsort(descending=True, stable=True)[:limit].tolist()
    always = {"kept": True, "truth": False, "group": None}
    source, target, weight = graph.source.tolist(), graph.target.tolist(), graph.weight.tolist()
    edges = [
        {"source": names[source[m]], "target": names[target[m]], "channel": "in", "score": weight[m], **always}
        for m in order
    ]
    depth = max((layer for layer, kind in zip(nodes.layer.tolist(), kinds, strict=True) if kind != "logit"), default=-1)
    return {
        "nodes": shown,
        "edges": edges,
        "columns": list(graph.tokens) or [str(i) for i in range(len(spots))],
        "spots": spots,
        "rows": ["tokens", *(f"layer {layer}" for layer in range(depth + 1)), "logits"],
        "spacing": list(_PROMPT_SPACING),
        "threshold": None,
        "selected": _selected(selected, names),
        "truth": False,
        "groups": [],
        "left_out": len(weight) - len(order),
        "unit": "",
        "title": title,
    }


class _Layers:
    """Places of a circuit's nodes: input at the bottom, heads of a layer in a row with its MLP before them, half a row up."""

    def __init__(self, names: Iterable[str]) -> None:
        found = [_parsed(name) for name in names]
        layers = [layer for kind, layer, _ in found if kind in ("head", "group", "mlp")]
        if not layers:
            raise WorkbenchError("the circuit scores no head and no MLP: there is nothing to draw")
        kinds = {kind for kind, _, _ in found}
        heads, groups = (
            1 + max((index for what, _, index in found if what == kind), default=-1) for kind in ("head", "group")
        )
        self._shared = heads // groups if groups else 0
        self._mlp, self._input, self._layers = int("mlp" in kinds), int("input" in kinds), 1 + max(layers)
        self.columns = [*["MLP"] * self._mlp, *(f"head {head}" for head in range(heads))]
        self.spots = list(range(len(self.columns)))
        self.rows = [
            *["input"] * self._input,
            *(f"layer {layer}" for layer in range(self._layers)),
            *["logits"] * ("logits" in kinds),
        ]

    def node(self, name: str, ports: bool) -> dict[str, Any]:
        kind, layer, index = _parsed(name)
        column, row = self._place(kind, layer + self._input, index)
        said = {
            "head": f"head {index} of layer {layer}",
            "mlp": f"MLP of layer {layer}",
            "group": f"key-value head {index} of layer {layer}",
        }
        inputs = (
            ("kv" if kind == "group" else "q" if self._shared else "qkv") if ports and kind in ("head", "group") else ""
        )
        return {
            "label": name,
            "text": said.get(kind, name),
            "column": column,
            "row": row,
            "kind": kind,
            "ports": inputs,
        }

    def _place(self, kind: str, row: int, index: int) -> tuple[float, float]:
        if kind == "mlp":
            return 0.0, row + 0.5
        if kind == "head":
            return float(self._mlp + index), float(row)
        if kind == "group":
            return self._mlp + self._shared * (index + 0.5) - 0.5, row - 0.45
        return (len(self.columns) - 1) / 2, 0.0 if kind == "input" else float(self._layers + self._input)


def _parsed(name: str) -> tuple[str, int, int]:
    """(kind, layer, index) of a node of a circuit."""
    from workbench.circuits import place

    if name in ("input", "logits"):
        return name, -1, 0
    column, height = place(name)
    if column >= 0:
        return ("group" if ".g" in name else "head"), math.ceil(height), int(column)
    if not math.isfinite(height):
        raise WorkbenchError(f"{name!r} is no node of a circuit: those are input, a0.h1, a0.g1, m0 and logits")
    return "mlp", int(height), 0


def _all_nodes(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(end for name in names for end in (_ends(name)["source"], _ends(name)["target"])))


def _ends(name: str) -> dict[str, str]:
    from workbench.circuits import edge_parts

    source, target, channel = edge_parts(name)
    return {"source": source, "target": target, "channel": channel}


def _kept(circuit: Circuit) -> set[str]:
    return {name for name, kept in zip(circuit.names, circuit.kept.tolist(), strict=True) if kept}


def _group(here: bool, there: bool) -> int | None:
    return 2 if here and there else 0 if here else 1 if there else None


def _truth(circuit: Circuit, truth: Circuit | None) -> set[str]:
    """Names of the circuit that the known circuit holds."""
    if truth is None:
        return set()
    if truth.level == circuit.level:
        return _kept(truth.over_positions()) & set(circuit.names)
    return set(truth.nodes) & set(circuit.names)


def _drawn(scores: Mapping[str, float], kept: set[str], truth: set[str], limit: int) -> tuple[list[str], int]:
    """Names of the edges that are drawn, and how many kept ones are not."""
    order = sorted(scores, key=lambda name: -abs(scores[name]))
    strong = [name for name in order if name in kept]
    beside = [name for name in order if name not in kept and scores[name]][:BESIDE]
    chosen = {*strong[:limit], *truth, *(beside if len(strong) < limit else [])}
    return [name for name in order if name in chosen], len(set(strong) - chosen)


def _selected(name: str | None, nodes: Iterable[str]) -> Any:
    if name is None or name in nodes:
        return name
    try:
        return _ends(name)
    except WorkbenchError:
        return None


def _prompt_places(graph: FeatureGraph, kinds: Sequence[str]) -> tuple[list[float], list[float], list[float]]:
    """(column, row) of every node, and where the columns of the tokens are: tokens with many nodes in a layer are wider."""
    nodes = graph.nodes
    positions = nodes.position.tolist()
    last = max((layer for layer, kind in zip(nodes.layer.tolist(), kinds, strict=True) if kind != "logit"), default=-1)
    levels = [
        last + 2 if kind == "logit" else layer + 1 for layer, kind in zip(nodes.layer.tolist(), kinds, strict=True)
    ]
    cells: dict[tuple[int, int], list[int]] = {}
    for i, cell in enumerate(zip(positions, levels, strict=True)):
        cells.setdefault(cell, []).append(i)
    tokens = max(len(graph.tokens), 1 + max(positions))
    wide = [1.0] * tokens
    for (position, _), members in cells.items():
        wide[position] = max(wide[position], 0.2 + 0.4 * min(len(members), _SIDE))
    starts = [sum(wide[:i]) for i in range(tokens)]
    spots = [start + size / 2 - 0.5 for start, size in zip(starts, wide, strict=True)]
    columns, rows = [0.0] * len(nodes), [0.0] * len(nodes)
    for (position, level), members in cells.items():
        lines = -(-len(members) // _SIDE)
        across = -(-len(members) // lines)
        for n, i in enumerate(members):
            line, column = divmod(n, across)
            inside = min(across, len(members) - line * across)
            columns[i] = spots[position] + 0.4 * (column - (inside - 1) / 2)
            rows[i] = level + (0.3 if lines < 4 else 0.85 / lines) * (line - (lines - 1) / 2)
    return columns, rows, spots
