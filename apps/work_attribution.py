"""What the page of attribution graphs has computed, and the graph files that people bring along."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import Refused, WorkbenchError

if TYPE_CHECKING:
    import pandas as pd

    from workbench.feature_graph import FeatureGraph
    from workbench.jobs.probes import Cell
    from workbench.models.protocol import Model

LONGEST = 1024
"""Tokens of a prompt at most: the number of edges grows with the square of the features."""
DRAWN = 400
"""Nodes that are drawn at most."""
_KEY = re.compile(r"[0-9a-f]{16}").fullmatch
_ENDING = ".json"


def prompt_graph(
    cell: Cell, coders: str, prompt: str | None = None, targets: list[str] | None = None, max_features: int = 4096
) -> FeatureGraph:
    """The attribution graph of a prompt, or of the first example of the job's task and its answer against the wrong one.

    ``coders`` is a bundled model with transcoders, or a folder of them; ``targets`` one or two tokens that are explained."""
    if (prompt is None) == (cell.job.task is None):
        raise WorkbenchError("a graph is of a prompt or of a task's example; give one of them")
    if cell.job.task is None:
        assert prompt is not None
        return graph_of(cell.model, coders, prompt, targets, max_features=max_features)
    pairs = cell.pairs(1)
    right, wrong = int(pairs.answer[0, 0]), int(pairs.wrong[0, 0])
    both: Any = (right, wrong) if wrong >= 0 and wrong != right else right
    return graph_of(cell.model, coders, pairs.clean, targets or both, int(pairs.position[0]), max_features)


def graph_of(
    model: Model, coders: str, prompt: Any, targets: Any = None, position: int | None = None, max_features: int = 4096
) -> FeatureGraph:
    """``wb.attribution_graph`` with the transcoders ``coders``; prompts above ``LONGEST`` tokens and empty ones are refused."""
    import workbench as wb

    if isinstance(prompt, str):
        if not prompt.strip():
            raise WorkbenchError("the prompt is empty: it holds no words")
        prompt = model.tokens(prompt)
    ids = getattr(prompt, "ids", prompt)
    if ids.shape[-1] > LONGEST:
        raise Refused(f"the prompt has {ids.shape[-1]:,} tokens; a graph is made of at most {LONGEST:,}")
    chosen = tuple(targets) if isinstance(targets, list | tuple) and len(targets) == 2 else targets
    if isinstance(targets, list) and len(targets) == 1:
        chosen = targets[0]
    return wb.attribution_graph(
        model, transcoders(coders), prompt, targets=chosen, position=position, max_features=max_features
    )


def transcoders(name: str) -> Any:
    """Transcoders by layer: those bundled for the model called ``name``, or those in the folder ``name``."""
    from workbench.coders.bundled import bundled_transcoders

    if Path(name).is_dir():
        from workbench.probes.features.replacement_folder import load_replacement

        return load_replacement(name)
    return bundled_transcoders(name)


def models_with_transcoders() -> list[str]:
    """Bundled models that have transcoders of their own."""
    from workbench.coders.bundled import bundled_coders

    return sorted({name.partition("/")[0] for name in bundled_coders() if "/mlp-" in name})


def reduced(graph: FeatureGraph, node_share: float, edge_share: float) -> FeatureGraph:
    """The graph pruned by influence; one without logits, on which influence is not defined, stays whole."""
    import workbench as wb

    return wb.pruned(graph, node_share, edge_share) if len(graph.logits) else graph


def drawable(graph: FeatureGraph, also: tuple[str, ...] = (), most: int = DRAWN) -> FeatureGraph:
    """The ``most`` nodes of largest influence, logits and those called ``also``, with all edges among them."""
    import torch

    import workbench as wb

    if len(graph.nodes) <= most:
        return graph
    carried = graph.nodes.influence.nan_to_num(0.0)
    carried[graph.logits] = torch.inf
    for name in also:
        carried[_number(graph, name)] = torch.inf
    return wb.subgraph(graph, carried.argsort(descending=True, stable=True)[:most].sort().values)


def _number(graph: FeatureGraph, name: str) -> int:
    from workbench.probes.features.subgraph import node_index

    return int(node_index(graph, name)[0])


def paths_table(graph: FeatureGraph, top: int = 10) -> pd.DataFrame:
    """The strongest paths from tokens and errors to the logits: ``share`` of the logits that goes along one, whether it
    ``raises`` them, ``path`` in words."""
    import pandas as pd

    import workbench as wb

    rows = [
        {"share": path.share, "raises": path.sign > 0, "path": wb.path_text(graph, path)}
        for path in wb.strongest_paths(graph, top)
    ]
    return pd.DataFrame(rows, columns=["share", "raises", "path"])


def store_file(folder: Path, content: bytes) -> str:
    """Keep an attribution-graph JSON under the digest of its content, which is returned; refused unless it can be read."""
    key = hashlib.sha256(content).hexdigest()[:16]
    path = folder / f"{key}{_ENDING}"
    if path.exists():
        return key
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{key}.part{_ENDING}"
    try:
        part.write_bytes(content)
        read_file(part)
        part.replace(path)
    except WorkbenchError as error:
        raise WorkbenchError(str(error).replace(str(part), "the file")) from None
    finally:
        part.unlink(missing_ok=True)
    return key


def stored_files(folder: Path) -> dict[str, Path]:
    """Graph files that were kept, by key, the newest first."""
    found = [path for path in folder.glob(f"*{_ENDING}") if _KEY(path.stem)]
    return {path.stem: path for path in sorted(found, key=lambda path: -path.stat().st_mtime)}


def read_file(path: Path) -> FeatureGraph:
    """The graph of a file, whoever wrote it, with influence computed where the file has none."""
    import workbench as wb
    from workbench.probes.features.influence import graph_scores

    graph = wb.read_feature_graph_json(path)
    if len(graph.logits) and not bool(graph.nodes.influence.isfinite().any()):
        scored = graph_scores(graph)
        return replace(graph, nodes=scored.nodes, meta={**scored.meta, **graph.meta})
    return graph


def file_of(graph: FeatureGraph, name: str) -> bytes:
    """The graph as attribution-graph JSON; ``name`` becomes its slug."""
    import tempfile

    import workbench as wb

    slug = re.sub(r"[^\w-]+", "-", name).strip("-") or "graph"
    with tempfile.TemporaryDirectory() as folder:
        path = wb.write_feature_graph_json(
            graph, Path(folder) / "graph.json", slug=slug, node_share=1, edge_share=1, scan=str(graph.meta.get("model", ""))
        )  # fmt: skip
        return path.read_bytes()


def known_node(graph: FeatureGraph, name: str) -> bool:
    """Whether the graph has a node called so."""
    try:
        _number(graph, name)
    except WorkbenchError:
        return False
    return True
