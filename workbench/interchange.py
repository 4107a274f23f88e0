"""Circuits in other tools' files: EAP-IG and MIB graphs, MIB submission folders, attribution-graph JSON.

All are JSON. EAP-IG's ``.pt`` files are pickles and are not read; its ``Graph.to_json`` writes the same content.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from workbench.circuits import Circuit
from workbench.errors import Refused, WorkbenchError
from workbench.graph import Graph, circuit_graph, edge_name, edge_parts, name_place
from workbench.results import new_folder

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Shares of the edges of the nine circuits of a MIB submission of kept sets; the tenth is the whole model."""

_HEAD = re.compile(r"^a(\d+)\.[hg](\d+)$")
_MLP = re.compile(r"^m(\d+)$")
_EVERYWHERE = "(all positions)"


def write_eap_json(circuit: Circuit, path: str | Path, width: int | None = None) -> Path:
    """Write the JSON graph that EAP-IG's ``Graph.from_json`` and the MIB circuit track read.

    ``width`` is the model's D, taken from the circuit's provenance if not given. The circuit must score every edge of
    a model without grouped key-value heads, over all positions; others are refused.
    """
    path = Path(path)
    path.write_text(json.dumps(_eap_record(circuit, width), indent=1))
    return path


def read_eap_json(path: str | Path) -> Circuit:
    """The edge circuit of a JSON graph written by EAP-IG or for MIB; scores that are not there are 0.

    Scores of nodes and neurons, where the file has them, are left out.
    """
    record = _json(path)
    missing = {"cfg", "nodes", "edges"} - set(record)
    if missing:
        raise WorkbenchError(f"{path} is no EAP-IG graph: it has no {', '.join(sorted(missing))}")
    config = record["cfg"]
    if config.get("parallel_attn_mlp"):
        raise Refused(
            f"{path} is of a model whose attention and MLP run in parallel, which this graph does not describe"
        )
    mlp = any(_MLP.match(name) for name in record["nodes"])
    graph = circuit_graph(int(config["n_layers"]), int(config["n_heads"]), mlp=mlp)
    strange = set(record["edges"]) ^ set(graph.edges)
    if strange:
        raise WorkbenchError(
            f"{path} does not hold the {graph.n_edges:,} edges of {graph}: {sorted(strange)[0]!r} is only on one side"
        )
    rows = [record["edges"][name] for name in graph.edges]
    return Circuit(
        "edge",
        graph.edges,
        torch.tensor([float(row.get("score") or 0.0) for row in rows], dtype=torch.float64),
        torch.tensor([bool(row["in_graph"]) for row in rows]),
        {"method": "imported", "file": Path(path).name, "width": config.get("d_model")},
    )


def write_mib(
    circuits: Mapping[tuple[str, str], Circuit], folder: str | Path, *, kept: bool = False, width: int | None = None
) -> Path:
    """Write a submission folder of the MIB circuit track (arXiv 2504.13151): ``<task>_<model>/`` for each key
    ``(task, model)``.

    Each holds ``importances.json`` with the score of every edge or, with ``kept=True``, nine circuits of the edges
    with the largest absolute score, ``0.1`` to ``50`` percent. MIB names tasks ``ioi``, ``mcqa``,
    ``arithmetic-addition`` ..., models ``gpt2``, ``qwen2.5``, ``gemma2``, ``llama3``, ``interpbench``, and wants at
    least two of each.
    """
    if not circuits:
        raise WorkbenchError("a submission holds at least one circuit: {('ioi', 'gpt2'): circuit}")
    folder = Path(folder)
    with new_folder(folder) as part:
        for (task, model), circuit in circuits.items():
            place = part / f"{task.replace('_', '-')}_{model}"
            place.mkdir()
            if not kept:
                write_eap_json(circuit, place / "importances.json", width)
                continue
            for fraction in MIB_FRACTIONS:
                chosen = circuit.top(int(fraction * len(circuit.names) + 1e-9))
                write_eap_json(chosen, place / f"{100 * fraction:g}.json", width)
    return folder


def _eap_record(circuit: Circuit, width: int | None) -> dict[str, Any]:
    if circuit.level != "edge":
        raise Refused("the EAP-IG format holds edge circuits; find one with find_circuit(..., level='edge')")
    width = circuit.provenance.get("width") if width is None else width
    if width is None:
        raise WorkbenchError("the EAP-IG format states the model's width, which this circuit does not know: width=")
    graph = _graph(circuit)
    kept = dict(zip(circuit.names, circuit.kept.tolist(), strict=True))
    score = dict(zip(circuit.names, circuit.scores.tolist(), strict=True))
    nodes = set(circuit.nodes)
    return {
        "cfg": {"n_layers": graph.layers, "n_heads": graph.heads, "parallel_attn_mlp": False, "d_model": width},
        "nodes": {name: {"in_graph": name in nodes} for name in graph.nodes},
        "edges": {name: {"score": score[name], "in_graph": kept[name]} for name in graph.edges},
    }


def _graph(circuit: Circuit) -> Graph:
    """The graph whose edges these are."""
    ends = {end for name in circuit.names for end in edge_parts(name)[:2]}
    heads = [match for end in ends if (match := _HEAD.match(end))]
    layers = [int(match[1]) for match in heads] + [int(match[1]) for end in ends if (match := _MLP.match(end))]
    if heads:
        count = 1 + max(int(match[2]) for match in heads)
        graph = circuit_graph(1 + max(layers), count, mlp=any(_MLP.match(end) for end in ends))
        if set(graph.edges) == set(circuit.names):
            return graph
    raise Refused(
        "this circuit does not list all edges of a sequential model with one key-value head per query head, each over "
        "all positions; circuit.over_positions() drops the places"
    )


def write_graph_json(
    circuit: Circuit,
    path: str | Path,
    *,
    slug: str,
    tokens: Sequence[str] = (),
    answer: str = "",
    scan: str = "",
) -> Path:
    """Write the kept edges as an attribution-graph JSON, as circuit-tracer and Neuronpedia show it.

    Nodes are embeddings, heads, MLPs and the logits; links carry the score and, as an extra key, the input ``channel``.
    A circuit that tells each position apart is drawn over ``tokens``, and its links stay within their position, as
    edges of the residual stream do; otherwise there is one column for all positions. ``slug`` names the graph,
    ``scan`` the model (from the provenance if not given), ``answer`` labels the logits.
    """
    if circuit.level != "edge":
        raise Refused("an attribution graph has edges; find the circuit with find_circuit(..., level='edge')")
    if not re.fullmatch(r"[\w-]+", slug):
        raise WorkbenchError(f"a slug is letters, digits, _ and -; got {slug!r}")
    rows = [
        (*edge_parts(name), name_place(name)[1], score)
        for name, kept, score in zip(circuit.names, circuit.kept.tolist(), circuit.scores.tolist(), strict=True)
        if kept
    ]
    columns = _columns({place for *_, place, _ in rows} - {""}, tokens)
    layers = _layers(circuit)
    nodes: dict[str, dict[str, Any]] = {}
    links = []
    for source, target, channel, place, score in rows:
        at = columns.index(place) if place else 0
        for end in (source, target):
            node = _node(end, at, layers, answer)
            nodes.setdefault(node["node_id"], node)
        links.append(
            {
                "source": _node(source, at, layers, answer)["node_id"],
                "target": _node(target, at, layers, answer)["node_id"],
                "weight": score,
                "channel": channel,
            }
        )
    shown = list(tokens) if tokens else columns
    record = {
        "metadata": {
            "slug": slug,
            "scan": scan or str(circuit.provenance.get("model", "")),
            "transcoder_list": [],
            "prompt_tokens": shown,
            "prompt": "".join(tokens),
            "schema_version": 1,
            "info": {"generator": {"name": "attention-workbench"}},
            "places": columns,
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": list(nodes.values()),
        "links": links,
    }
    path = Path(path)
    path.write_text(json.dumps(record, indent=1))
    return path


def read_graph_json(path: str | Path) -> Circuit:
    """The edge circuit of an attribution-graph JSON of heads and MLPs, as ``write_graph_json`` makes it.

    Everything in it is kept. Graphs of transcoder features are refused: their nodes are no parts of the model.
    """
    record = _json(path)
    missing = {"metadata", "nodes", "links"} - set(record)
    if missing:
        raise WorkbenchError(f"{path} is no attribution graph: it has no {', '.join(sorted(missing))}")
    places = record["metadata"].get("places", [_EVERYWHERE])
    names: dict[str, str] = {}
    spots: dict[str, int] = {}
    for node in record["nodes"]:
        part = node.get("clerp", "").split(" ")[0] if node.get("feature_type") in _TYPES else ""
        if not part:
            raise Refused(
                f"{path} has a node {node.get('node_id')!r} of type {node.get('feature_type')!r}; a circuit has "
                f"{', '.join(_TYPES)}"
            )
        names[node["node_id"]], spots[node["node_id"]] = part, int(node["ctx_idx"])
    found: dict[str, float] = {}
    for link in record["links"]:
        for end in ("source", "target"):
            if link[end] not in names:
                raise WorkbenchError(f"{path} links to {link[end]!r}, which is no node of it")
        name = edge_name(names[link["source"]], names[link["target"]], link.get("channel", "in"))
        if places != [_EVERYWHERE]:
            name += f"@{places[spots[link['target']]]}"
        found[name] = float(link["weight"])
    scores = torch.tensor(list(found.values()), dtype=torch.float64)
    provenance = {"method": "imported", "file": Path(path).name, "model": record["metadata"].get("scan", "")}
    return Circuit("edge", tuple(found), scores, torch.ones(len(found), dtype=torch.bool), provenance)


_TYPES = ("embedding", "attention head", "mlp", "logit")


def _columns(places: set[str], tokens: Sequence[str]) -> list[str]:
    """The columns of the drawing: each position in order, spans by name, or one for all."""
    if not places:
        return [_EVERYWHERE]
    if all(place.isdigit() for place in places):
        last = max(map(int, places))
        if tokens and last >= len(tokens):
            raise WorkbenchError(f"the circuit has position {last} and there are {len(tokens)} tokens")
        return [str(i) for i in range(len(tokens) or last + 1)]
    if tokens:
        raise WorkbenchError("tokens label positions; the places of this circuit are spans")
    return sorted(places)


def _layers(circuit: Circuit) -> int:
    ends = {end for name in circuit.names for end in edge_parts(name)[:2]}
    found = [match for end in ends if (match := _HEAD.match(end) or _MLP.match(end))]
    return 1 + max((int(match[1]) for match in found), default=-1)


def _node(name: str, at: int, layers: int, answer: str) -> dict[str, Any]:
    head, mlp = _HEAD.match(name), _MLP.match(name)
    if name == "input":
        layer, feature, kind, text = "E", 0, "embedding", "input"
    elif name == "logits":
        layer, feature, kind, text = str(layers + 1), 0, "logit", f"logits {answer}".strip()
    elif head:
        layer, feature, kind, text = head[1], int(head[2]), "attention head", name
    elif mlp:
        layer, feature, kind, text = mlp[1], -1, "mlp", name
    else:
        raise WorkbenchError(f"{name!r} is no node of a transformer's residual stream")
    group = "g" if ".g" in name else ""
    identity = f"{layer}_{group}{feature}_{at}"
    return {
        "node_id": identity,
        "feature": feature,
        "layer": layer,
        "ctx_idx": at,
        "feature_type": kind,
        "jsNodeId": f"{layer}_{group}{feature}-{at}",
        "clerp": text,
        "token_prob": 0.0,
        "is_target_logit": kind == "logit",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
    }


def _json(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if path.suffix == ".pt":
        raise Refused(f"{path} is a pickle, which can run code when it is read; write it again with Graph.to_json")
    if not path.is_file():
        raise WorkbenchError(f"no file {path}")
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise WorkbenchError(f"{path} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise WorkbenchError(f"{path} holds a {type(record).__name__}, not a graph")
    return record
