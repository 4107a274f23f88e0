"""What a run, its maps, one map and a store of jobs show of themselves in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.errors import WorkbenchError
from workbench.figure_html import picture
from workbench.fragments import ROWS, facts, line, table, view
from workbench.jobs.status import status, status_by_grid
from workbench.maps import METADATA, answered
from workbench.models.protocol import Tokens
from workbench.results import axis
from workbench.run import Generation, Maps, Run
from workbench.zooming import stored_sizes, zoom

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from workbench.jobs.store import JobStore
    from workbench.pairs import Pairs
    from workbench.stored_run import StoredRun

CHEAP = 2**20
"""Weights per head that are computed for the picture of a map; of longer ones only block maps that are there are drawn."""
HEADS, CELLS, TOKENS, FAILURES = 8, 48, 40, 10
"""Heads in the picture of a map, cells on a side of each, tokens of a text, and failed cells of a store that are shown."""


def run_html(run: Run | Generation) -> str:
    """The input, the model and its settings, what was read, and what was captured of every layer."""
    return view(type(run).__name__, *_run_parts(run), said=run.provenance.model)


def stored_html(stored: StoredRun) -> str:
    """The run that is to be saved, and what goes with it."""
    return view("StoredRun", facts(dict(stored.about)), *_run_parts(stored.run), said=stored.run.provenance.model)


def maps_html(maps: Maps) -> str:
    """One row per captured layer."""
    return view("Maps", _layers(maps), said=f"{len(maps)} layers")


def map_html(amap: AttentionMap) -> str:
    """What kind of map it is, what is known of it without further work, and a small picture of its heads."""
    told = {name.replace("_", " "): getattr(amap, name) for name in METADATA}
    told |= {"first query": amap.offset or None, "answers at hand": ", ".join(answered(amap))}
    return view(type(amap).__name__, facts(told), _small(amap), said=_size(amap))


def pairs_html(pairs: Pairs) -> str:
    """The clean prompts, as text where the task has texts, with their labels."""
    prompts = list(pairs.texts) or [" ".join(map(str, row)) for row in pairs.clean[:ROWS].tolist()]
    shown = min(ROWS, len(pairs))
    columns = {"clean prompt" if pairs.texts else "ids of the clean prompt": prompts[:shown]}
    frame = pd.DataFrame({**columns, **{name: values[:shown] for name, values in pairs.labels.items()}})
    dropped = f", {pairs.dropped:,} refused" if pairs.dropped else ""
    more = f", first {shown} shown" if len(pairs) > shown else ""
    said = f"{len(pairs):,} of {pairs.clean.shape[1]:,} tokens, clean and corrupted{dropped}{more}"
    return view("Pairs", table(frame), said=said)


def store_html(store: JobStore) -> str:
    """How far every grid is, and the newest failures; a folder that is no store says so."""
    try:
        whole, grids = status(store), status_by_grid(store)
        rows = [{"grid": name, **found.dict()} for name, found in grids.items()]
        states = pd.DataFrame([*rows, {"grid": "all", **whole.dict()}])
        failed = pd.DataFrame([_failure(store, key) for key in whole.failures[:FAILURES]])
    except WorkbenchError as error:
        return view("JobStore", line(str(error)), said=str(store.path))
    more = f"{len(whole.failures)} failed cells, first {FAILURES} shown"
    parts = [] if failed.empty else [line(more if len(whole.failures) > FAILURES else "failed cells"), table(failed)]
    return view("JobStore", table(states), *parts, said=str(store.path))


def _run_parts(run: Run | Generation) -> list[str]:
    source = run.provenance
    told: dict[str, Any] = {
        "input": _texts(run.tokens),
        "tokens": _labels(run.tokens),
        "revision": source.revision,
        "computed": ", ".join(filter(None, (source.dtype, f"on {source.device}", source.attention))),
        "statistics by": source.kernel,
        "logits": _shape(run.logits),
    }
    if isinstance(run, Generation):
        told["generated"] = f"{run.new.shape[1]:,} tokens behind {run.prompt:,}"
        acts: Mapping[Any, Tensor] = {}
    else:
        acts = run.acts
        told |= {"output": _shape(run.output), "cache": "kept" if run.cache is not None else None}
    read = pd.DataFrame([{"read": str(site), "shape": _shape(tensor)} for site, tensor in acts.items()])
    captured = _layers(run.maps) if run.maps else line("no attention was captured: run with maps=wb.capture()")
    return [facts(told), captured, "" if read.empty else table(read)]


def _layers(maps: Maps) -> str:
    rows = [
        {
            "layer": layer,
            "map": type(amap).__name__,
            "heads": amap.shape[1],
            "queries": amap.shape[2],
            "keys": amap.shape[3],
            "row sum": amap.row_sum,
            "exactness": amap.exactness,
            "answers at hand": ", ".join(answered(amap)),
        }
        for layer, amap in maps.items()
    ]
    return table(pd.DataFrame(rows), rows=max(1, len(rows)))


def _texts(tokens: Tokens) -> str:
    texts, length = tokens.ids.shape
    padded = int((~tokens.mask).sum())
    said = f"{texts:,} {'text' if texts == 1 else 'texts'} of {length:,} tokens" if length else ""
    if padded:
        said += f", {padded:,} of them padding"
    return ", ".join(filter(None, (said, *(f"{name} {list(x.shape)}" for name, x in tokens.inputs.items()))))


def _labels(tokens: Tokens) -> str:
    if not tokens.labels:
        return ""
    labels = tokens.labels[0]
    more = f" … and {len(labels) - TOKENS:,} more" if len(labels) > TOKENS else ""
    return " ".join(labels[:TOKENS]) + more


def _shape(tensor: Tensor | None) -> str | None:
    return None if tensor is None else f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _size(amap: AttentionMap) -> str:
    b, h, q, k = amap.shape
    return f"{f'{b:,} texts, ' if b > 1 else ''}{h:,} heads, {q:,} queries x {k:,} keys"


def _small(amap: AttentionMap) -> str:
    """The first heads side by side, or a line that says how to see them."""
    _, h, q, k = amap.shape
    if not (h and q and k):
        return ""
    if q * k > CHEAP and not stored_sizes(amap):
        return line(
            f"no picture: {q:,} x {k:,} weights are not computed to be shown, and there are no block maps; capture with "
            "blocks=64, or look at a part with wb.zoom(map, head, queries, keys)"
        )
    return picture(lambda: draw_heads(amap), "attention of the first heads")


def draw_heads(amap: AttentionMap, ax: Axes | None = None) -> Axes:
    """The first heads of the first text side by side, queries downwards and keys to the right: square roots of weights, each
    head on a scale of its own; negative ones are orange."""
    shown = min(HEADS, amap.shape[1])
    tiles = [zoom(amap, head, cells=CELLS).values for head in range(shown)]
    rows, columns = tiles[0].shape
    gap = max(1, columns // 16)
    wall = torch.full((rows, shown * (columns + gap) - gap), float("nan"))
    for i, tile in enumerate(tiles):
        top = tile.nan_to_num().abs().max().clamp(min=1e-30)
        wall[:, i * (columns + gap) : i * (columns + gap) + columns] = tile.sign() * (tile.abs() / top).sqrt()
    signed = bool((wall.nan_to_num() < 0).any())
    height = min(2.4, max(0.6, 1.3 * rows / columns))
    ax = axis(ax, 1.35 * shown + 0.3, height + 0.6)
    ax.imshow(
        wall.numpy(),
        cmap="PuOr_r" if signed else "magma",
        vmin=-1.0 if signed else 0.0,
        vmax=1.0,
        aspect="auto",
        interpolation="nearest",
    )
    middle = [i * (columns + gap) + (columns - 1) / 2 for i in range(shown)]
    ax.set_xticks(middle, [f"head {i}" for i in range(shown)])
    ax.set_yticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    what = "first text, " if amap.shape[0] > 1 else ""
    more = f"first {shown} of {amap.shape[1]} heads, " if amap.shape[1] > shown else ""
    ax.set_title(f"{what}{more}square roots of weights", fontweight="normal", fontsize="small", loc="left")
    return ax


def _failure(store: JobStore, key: str) -> dict[str, Any]:
    record = store.failure(key)
    job = record["job"]
    first = (record["message"].splitlines() or [""])[0]
    return {"cell": key, "probe": job["probe"], "model": job["model"], "kind": record["kind"], "message": first}
