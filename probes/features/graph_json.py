"""Attribution graphs of features as JSON: the form that circuit-tracer writes and Neuronpedia shows.

Schema: Neuronpedia's ``graph-schema.json`` 1.0.0; identifiers and fields are those of circuit-tracer (schema_version 1). A
feature's number there is the Cantor pairing of layer and index, and ``influence`` is cumulative: the share of all influence
that a node and all stronger ones have. What the schema has no place for stands in further keys (``carried``, columns of edges,
``metadata.workbench``), which viewers pass over and ``read_feature_graph_json`` reads.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.feature_graph import NODE_KINDS, FeatureGraph, FeatureNodes
from workbench.probes.features.influence import influence, pruned

LIMIT = 100 * 1024 * 1024
"""Bytes that Neuronpedia takes."""
_LINK, _NODE = 50, 200
"""Fewest bytes that a link and a node take."""

_TYPES = {
    "embedding": "embedding", "feature": "cross layer transcoder", "error": "mlp reconstruction error",
    "attention feature": "lorsa", "attention error": "lorsa error", "head": "attention head", "bias": "bias", "logit": "logit",
    "residual feature": "residual feature", "residual error": "residual reconstruction error",
}  # fmt: skip
"""Our kinds of nodes and their ``feature_type``."""
_KINDS = {name: kind for kind, name in _TYPES.items()} | {"transcoder": "feature", "per layer transcoder": "feature"}
_MIDDLES = {
    "feature": "{f}", "error": "-1", "attention feature": "lor_{f}", "attention error": "error_attn", "head": "head_{f}",
    "bias": "bias_-1", "residual feature": "res_{f}", "residual error": "error_resid",
}  # fmt: skip
"""What stands between layer and position in the identifier of a node."""
_LOGIT = re.compile(r'^(?:Output|Logit) "(.*)" \(p=', re.S)
_REQUIRED = {
    "node_id": str, "layer": str | int, "ctx_idx": int, "feature_type": str, "jsNodeId": str, "clerp": str,
}  # fmt: skip


def write_feature_graph_json(
    graph: FeatureGraph,
    path: str | Path,
    *,
    slug: str,
    scan: str = "",
    node_share: float = 0.8,
    edge_share: float = 0.98,
    source_set: str = "",
    limit_bytes: int = LIMIT,
) -> Path:
    """Write the strongest part of ``graph`` as attribution-graph JSON.

    ``slug`` names the graph, ``scan`` the model (from ``graph.meta`` if not given), ``source_set`` the features on Neuronpedia.
    A graph that is not pruned yet is pruned to the nodes of ``node_share`` of the influence and the edges of ``edge_share``; 1
    and 1 keep all. Refuses files above ``limit_bytes``, by default what Neuronpedia takes, and a graph without logits.
    """
    if not re.fullmatch(r"[\w-]+", slug):
        raise WorkbenchError(f"a slug is letters, digits, _ and -; got {slug!r}")
    known = graph.meta.get("node_share")
    if known is None:
        cumulative = _cumulative(influence(graph), graph)
        shown = graph if node_share == edge_share == 1 else pruned(graph, node_share, edge_share)
        kept = cumulative[_positions(graph.nodes, shown.nodes)]
    else:
        shown, node_share, edge_share = graph, float(known), float(graph.meta.get("edge_share", 1.0))
        kept = _known_cumulative(graph, node_share)
    least = _LINK * len(shown.source) + _NODE * len(shown.nodes)
    text = (
        "" if least > limit_bytes else json.dumps(_record(shown, kept, slug, scan, node_share, edge_share, source_set))
    )
    size = max(least, len(text.encode()))
    if size > limit_bytes:
        raise Refused(
            f"the graph of {len(shown.nodes):,} nodes and {len(shown.source):,} edges comes to at least {size / 2**20:,.1f} MiB; "
            f"{limit_bytes / 2**20:,.1f} MiB can be uploaded. Lower node_share (now {node_share:g}) or edge_share "
            f"(now {edge_share:g})"
        )
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text)
        part.rename(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise WorkbenchError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def read_feature_graph_json(path: str | Path) -> FeatureGraph:
    """The graph in an attribution-graph JSON of features, whoever wrote it.

    Logits stand one layer behind the last. ``influence`` is read from our own key ``carried`` and is undefined without it; the
    cumulative one is the column ``cumulative_influence``. Refuses what the schema refuses, unknown types of nodes, links to nodes
    that are not there, and numbers that are none.
    """
    path = Path(path)
    record = _checked(path)
    metadata, rows = record["metadata"], record["nodes"]
    ours = metadata.get("workbench") or {}
    kinds = [_kind(row, path) for row in rows]
    layers = [-1 if kind == "embedding" else _layer(row, path) for kind, row in zip(kinds, rows, strict=True)]
    last = max((layer for kind, layer in zip(kinds, layers, strict=True) if kind != "logit"), default=-1) + 1
    behind = ours.get("layers", max([last, *(n - 1 for kind, n in zip(kinds, layers, strict=True) if kind == "logit")]))
    tokens = tuple(metadata["prompt_tokens"])
    try:
        nodes = FeatureNodes.of(
            kinds,
            [behind if kind == "logit" else layer for kind, layer in zip(kinds, layers, strict=True)],
            [row["ctx_idx"] for row in rows],
            [_feature(kind, row, path) for kind, row in zip(kinds, rows, strict=True)],
            activation=_numbers(row.get("activation") for row in rows),
            influence=_numbers(row.get("carried") for row in rows),
            probability=_numbers(
                row.get("token_prob") if kind == "logit" else None for kind, row in zip(kinds, rows, strict=True)
            ),
            label=[_label(kind, row, tokens) for kind, row in zip(kinds, rows, strict=True)],
            columns={"cumulative_influence": _numbers(row.get("influence") for row in rows)},
        )
        number = {row["node_id"]: i for i, row in enumerate(rows)}
        links = record["links"]
        source, target = (
            torch.tensor([number[link[end]] for link in links], dtype=torch.int64) for end in ("source", "target")
        )
        columns = {name: _numbers(link.get(name) for link in links) for name in ours.get("columns", ())}
        weight = torch.tensor([link["weight"] for link in links], dtype=torch.float64)
        return FeatureGraph(nodes, source, target, weight, tokens, _meta(metadata, ours, path), columns)
    except WorkbenchError as error:
        raise WorkbenchError(f"{path}: {error}") from None


def cantor(layer: int, index: int) -> int:
    """The number of a feature: pairs of whole numbers, counted along diagonals."""
    return (layer + index) * (layer + index + 1) // 2 + index


def uncantor(number: int) -> tuple[int, int]:
    """Layer and index of a feature's number."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    index = number - diagonal * (diagonal + 1) // 2
    return diagonal - index, index


# ------------------------------------------------------------ writing


def _record(
    graph: FeatureGraph, cumulative: Tensor, slug: str, scan: str, node_share: float, edge_share: float, source_set: str
) -> dict[str, Any]:
    meta = dict(graph.meta)
    settings = {"max_n_logits": "max_logits", "desired_logit_prob": "mass", "max_feature_nodes": "max_features"}
    behind = graph.nodes.layer[graph.logits]
    names = [_names(graph.nodes, i) for i in range(len(graph.nodes))]
    links: dict[str, list[Any]] = {
        "source": [names[i][0] for i in graph.source.tolist()],
        "target": [names[i][0] for i in graph.target.tolist()],
        "weight": graph.weight.tolist(),
        **{name: [_finite(v) for v in values.tolist()] for name, values in graph.columns.items()},
    }
    return {
        "metadata": {
            "slug": slug,
            "scan": scan or str(meta.get("model", "")),
            "transcoder_list": [],
            "prompt_tokens": list(graph.tokens),
            "prompt": str(meta.get("prompt", "".join(graph.tokens))),
            "node_threshold": node_share,
            "schema_version": 1,
            **({"feature_details": {"neuronpedia_source_set": source_set}} if source_set else {}),
            "info": {"generator": {"name": "attention-workbench"}},
            "generation_settings": {name: meta[key] for name, key in settings.items() if key in meta},
            "pruning_settings": {"node_threshold": node_share, "edge_threshold": edge_share},
            "workbench": {
                "layers": int(behind.max()) if len(behind) else None,
                "columns": list(graph.columns),
                "meta": json.loads(json.dumps(meta, default=str)),
            },
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [_node(graph, i, *names[i], _finite(float(cumulative[i]))) for i in range(len(graph.nodes))],
        "links": [dict(zip(links, row, strict=True)) for row in zip(*links.values(), strict=True)],
    }


def _names(nodes: FeatureNodes, i: int) -> tuple[str, str]:
    """``node_id`` and ``jsNodeId``; the second leaves the position out, where a feature may stand at several."""
    kind, layer, position, feature = (
        int(values[i]) for values in (nodes.kind, nodes.layer, nodes.position, nodes.feature)
    )
    name = NODE_KINDS[kind]
    if name == "embedding":
        return f"E_{feature}_{position}", f"E_{feature}-{position}"
    if name == "logit":
        return f"{layer + 1}_{feature}_{position}", f"L_{feature}-{position}"
    middle = _MIDDLES[name].format(f=feature)
    at = position if feature < 0 else 0
    return f"{layer}_{middle}_{position}", f"{layer}_{middle}-{at}"


def _node(graph: FeatureGraph, i: int, node_id: str, js: str, cumulative: float | None) -> dict[str, Any]:
    nodes = graph.nodes
    kind, layer, position = NODE_KINDS[int(nodes.kind[i])], int(nodes.layer[i]), int(nodes.position[i])
    feature, probability = int(nodes.feature[i]), _finite(float(nodes.probability[i])) or 0.0
    numbered = "feature" in kind
    return {
        "node_id": node_id,
        "feature": position if kind == "embedding" else cantor(layer, feature) if numbered else feature,
        "layer": "E" if kind == "embedding" else str(layer + (kind == "logit")),
        "ctx_idx": position,
        "feature_type": _TYPES[kind],
        "token_prob": probability,
        "is_target_logit": kind == "logit" and i == int(graph.logits[0]),
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": js,
        "clerp": _clerp(kind, nodes.label[i], feature, probability),
        "influence": None if kind == "logit" else cumulative,
        "activation": _finite(float(nodes.activation[i])),
        "carried": _finite(float(nodes.influence[i])),
    }


def _clerp(kind: str, label: str, feature: int, probability: float) -> str:
    if kind == "logit":
        return f'Output "{label or feature}" (p={probability:.3f})'
    return "" if kind == "embedding" else label


def _cumulative(carried: Tensor, graph: FeatureGraph) -> Tensor:
    """Of each node the share of all influence that it and all stronger nodes have, ``[N]``."""
    order = carried.argsort(descending=True, stable=True)
    total = float(carried.sum())
    shares = carried[order].cumsum(0) / total if total > 0 else torch.zeros_like(carried)
    return torch.zeros_like(carried).scatter(0, order, shares)


def _known_cumulative(graph: FeatureGraph, node_share: float) -> Tensor:
    """What is left of a larger graph keeps what is known of it: the file's own numbers, or its nodes' shares of the part they
    have of all influence."""
    read = graph.nodes.columns.get("cumulative_influence")
    if read is not None:
        return read
    known = graph.nodes.influence
    carried = influence(graph) if bool(known.isnan().all()) else known.nan_to_num(0.0)
    return node_share * _cumulative(carried, graph)


def _positions(whole: FeatureNodes, part: FeatureNodes) -> Tensor:
    """Where each node of ``part`` stands in ``whole``."""
    index = {tuple(row): i for i, row in enumerate(whole.key.tolist())}
    return torch.tensor([index[tuple(row)] for row in part.key.tolist()], dtype=torch.int64)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ------------------------------------------------------------ reading


def _checked(path: Path) -> dict[str, Any]:
    """The record of a file that fits the schema."""
    if path.suffix == ".pt":
        raise Refused(
            f"{path} is a pickle, which can run code when it is read; circuit-tracer's create_graph_files writes JSON"
        )
    if not path.is_file():
        raise WorkbenchError(f"no file {path}")
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise WorkbenchError(f"{path} is not JSON: {error}") from None
    parts = {"metadata": dict, "qParams": dict, "nodes": list, "links": list}
    for name, kind in parts.items():
        if not isinstance(record, dict) or not isinstance(record.get(name), kind):
            raise WorkbenchError(f"{path} is no attribution graph: it has no {name}")
    metadata = record["metadata"]
    for name in ("slug", "scan", "prompt"):
        if not isinstance(metadata.get(name), str):
            raise WorkbenchError(f"{path}: metadata.{name} is no text")
    tokens = metadata.get("prompt_tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise WorkbenchError(f"{path}: metadata.prompt_tokens is no list of texts")
    for row in record["nodes"]:
        for name, form in _REQUIRED.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), form) or isinstance(row.get(name), bool):
                raise WorkbenchError(f"{path}: a node has no {name}: {str(row)[:80]}")
    known = {row["node_id"] for row in record["nodes"]}
    if len(known) != len(record["nodes"]):
        raise WorkbenchError(f"{path}: node_id is not unique")
    for link in record["links"]:
        weight = link.get("weight") if isinstance(link, dict) else None
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise WorkbenchError(f"{path}: a link has no weight: {str(link)[:80]}")
        for end in ("source", "target"):
            if link.get(end) not in known:
                raise WorkbenchError(f"{path} links to {link.get(end)!r}, which is no node of it")
    return record


def _kind(row: dict[str, Any], path: Path) -> str:
    kind = _KINDS.get(row["feature_type"])
    if kind is None:
        hint = "; read_graph_json reads graphs of heads and MLPs" if row["feature_type"] == "mlp" else ""
        raise Refused(f"{path} has a node of type {row['feature_type']!r}; read are {', '.join(_KINDS)}{hint}")
    return kind


def _layer(row: dict[str, Any], path: Path) -> int:
    text = str(row["layer"])
    if not text.isdigit():
        raise WorkbenchError(f"{path}: {row['node_id']!r} has the layer {text!r}, which is no number")
    return int(text)


def _feature(kind: str, row: dict[str, Any], path: Path) -> int:
    """The index of a feature, or a token id, from the identifier; from the paired number where that does not tell."""
    if kind in ("error", "attention error", "residual error", "bias"):
        return -1
    parts = row["node_id"].split("_")
    if len(parts) >= 3 and parts[-2].isdigit() and parts[-1] == str(row["ctx_idx"]):
        return int(parts[-2])
    number = row.get("feature")
    if not isinstance(number, int) or number < 0:
        raise WorkbenchError(f"{path}: {row['node_id']!r} does not tell which feature it is")
    return uncantor(number)[1] if "feature" in kind else number


def _label(kind: str, row: dict[str, Any], tokens: tuple[str, ...]) -> str:
    clerp: str = row["clerp"]
    if kind == "logit":
        match = _LOGIT.match(clerp)
        return match[1] if match else clerp
    if kind == "embedding" and 0 <= row["ctx_idx"] < len(tokens):
        return tokens[row["ctx_idx"]]
    return clerp


def _numbers(values: Iterable[Any]) -> Tensor:
    return torch.tensor([float("nan") if value is None else float(value) for value in values], dtype=torch.float64)


def _meta(metadata: dict[str, Any], ours: dict[str, Any], path: Path) -> dict[str, Any]:
    if ours:
        return dict(ours.get("meta") or {})
    pruning = metadata.get("pruning_settings") or {}
    known = {
        "model": metadata["scan"],
        "prompt": metadata["prompt"],
        "slug": metadata["slug"],
        "file": path.name,
        "node_share": metadata.get("node_threshold") or pruning.get("node_threshold"),
        "edge_share": pruning.get("edge_threshold"),
        "generator": ((metadata.get("info") or {}).get("generator") or {}).get("name"),
    }
    return {name: value for name, value in known.items() if value is not None}
