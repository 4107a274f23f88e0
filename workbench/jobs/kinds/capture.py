"""``capture``: the attention of a model over one input, kept so that any part of any head can be looked at later."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from workbench.errors import Refused, WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.kinds.above import above
from workbench.jobs.kinds.checks import check_needs, check_value, whole
from workbench.jobs.kinds.pictures import is_picture_name, made_input, picture_input
from workbench.jobs.probes import Cell, Outcome, Probe

ARGUMENTS: Mapping[str, Any] = {
    "text": None, "filler": None, "needle": None, "image": None, "picture": None, "side": "clean", "blocks": None, "layers": None,
    "check": True,
}  # fmt: skip
_INPUTS = ("text", "filler", "needle", "image", "picture")
_STATS = ("entropy", "received", "distance", "top1")
_CELLS, _LEAST = 512, 4


def block_size(tokens: int) -> int:
    """The side of the finest block maps that are kept, in tokens: a power of two from 4, at most 512 blocks a side."""
    size = _LEAST
    while tokens > size * _CELLS:
        size *= 2
    return size


def capture(cell: Cell) -> Outcome:
    """One row per head: entropy in nats (NaN for signed maps), distance in tokens, the key with the largest share. The run is
    saved (``wb.open_run``).

    The input is ``text``; or ``filler``, so many tokens of made-up text, or ``needle``, the same with facts in it; or the first
    example of the job's task (its ``side`` clean or corrupt); or, for models that read images, ``image``, the number of a made
    image with a planted shape, or ``picture``, the name of an uploaded one (``kinds.pictures``). ``blocks`` is the side of the
    block maps in tokens, by length if not given; ``layers`` limits what is captured. ``check`` runs the model again without
    capture: ``logit_difference`` is the largest difference of the last position's logits (of the whole output where the model has
    no logits), and must be 0.
    """
    import torch

    import workbench as wb

    args = {**ARGUMENTS, **cell.job.args}
    given = _input(cell, args)
    model = cell.model
    tokens = model.tokens(given) if isinstance(given, str) else given
    length = int(tokens.ids.shape[1]) if not isinstance(tokens, torch.Tensor) and tokens.ids.numel() else 1
    size = args["blocks"] or block_size(length)
    layers = args["layers"]
    folder = cell.scratch / "maps"
    request = wb.capture(layers=layers, blocks=size, reduce=("sum", "max"), stats=_STATS, store=folder)
    started, note = time.perf_counter(), ""
    with torch.no_grad():
        try:
            run = model.run(tokens, maps=request, logits="last")
        except Refused as refused:
            # Signed maps have no entropy; what else was refused is refused again.
            shutil.rmtree(folder, ignore_errors=True)
            started, note = time.perf_counter(), f"captured without entropy: {refused}"
            run = model.run(tokens, maps=replace(request, stats=_STATS[1:]), logits="last")
        seconds = time.perf_counter() - started
        difference = _difference(run, model.run(tokens, logits="last")) if args["check"] else None
    table = _table(run, size)
    from workbench.stored_run import StoredRun

    about = {
        "model": model.name, "text": given if isinstance(given, str) else None, "blocks": size, "seconds": seconds,
        "logit_difference": difference, "tokens": max((m.shape[3] for m in run.maps.values()), default=0),
        "bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
    }  # fmt: skip
    said = [note] if note else []
    if difference:
        said.append(f"the logits differ by {difference:g} with capture on")
    return Outcome(table, StoredRun(run, about, folder, size), "; ".join(said))


def _table(run: Any, size: int) -> Any:
    """The atlas; of maps whose rows are no shares ``layer, head, distance`` alone."""
    try:
        return above("probes.atlas").atlas(run, size).frame()
    except Refused:
        import pandas as pd

        rows = [
            {"layer": layer, "head": head, "distance": float(value)}
            for layer, amap in run.maps.items()
            for head, value in enumerate(amap.distance()[0].double().mean(-1))
        ]
        return pd.DataFrame(rows)


def check(job: Job) -> None:
    """Refuse an input that is none or two, before a model is loaded."""
    check_needs(job, "required", "optional")
    for name in job.args:
        if name not in ARGUMENTS:
            from workbench.errors import UnknownName

            raise UnknownName("argument of capture", name, ARGUMENTS)
    given = [name for name in _INPUTS if job.args.get(name) is not None] + (["task"] if job.task is not None else [])
    if len(given) != 1:
        said = " and ".join(given) or "none"
        raise WorkbenchError(f"capture wants one input: text, filler, needle, image, picture or a task; got {said}")
    if "text" in job.args and job.args["text"] is not None:
        check_value("argument text of capture", str, job.args["text"])
        if not job.args["text"].strip():
            raise WorkbenchError("the prompt is empty: it holds no words")
    for name, least in (("filler", 1), ("needle", 64), ("image", 0), ("blocks", 1)):
        if job.args.get(name) is not None:
            whole(job, name, 0, least)
    if job.args.get("picture") is not None and not is_picture_name(job.args["picture"]):
        raise WorkbenchError(
            f"argument picture of capture is the name of an uploaded picture; got {job.args['picture']!r}"
        )
    if job.args.get("side", "clean") not in ("clean", "corrupt"):
        raise WorkbenchError(f"side of capture is clean or corrupt; got {job.args['side']!r}")
    check_value("argument check of capture", bool, job.args.get("check", True))
    if job.args.get("layers") is not None:
        check_value("argument layers of capture", int | str | list[int | str], job.args["layers"])


def _input(cell: Cell, args: Mapping[str, Any]) -> Any:
    """The text, tokens or image that the arguments name."""
    corpus = above("datasets.corpus")
    if args["text"] is not None:
        return args["text"]
    if args["filler"] is not None:
        return corpus.filler_text(cell.job.seed, args["filler"])
    if args["needle"] is not None:
        return corpus.needle_text(cell.job.seed, args["needle"]).text
    if args["image"] is not None or args["picture"] is not None:
        size, source = above("probes.vision.grid").grid_of(cell.model).size, cell.job.model or ""
        if args["picture"] is not None:
            return picture_input(args["picture"], cell.uploads, cell.model, size, source)
        return made_input(args["image"], cell.job.seed, cell.model, size, source)
    from workbench.models.protocol import Tokens

    ids = getattr(cell.pairs(1), args["side"])
    return Tokens.of(ids[:1], cell.model.tokenizer)


def _difference(on: Any, off: Any) -> float:
    a, b = (on.logits, off.logits) if on.logits is not None else (on.output, off.output)
    if a is None or b is None:
        raise WorkbenchError("the model gives neither logits nor output, so nothing tells whether capture changed it")
    return float((a - b).abs().max())


PROBES = (
    Probe(
        "capture",
        "What does every head attend to over one input? Keeps the maps.",
        "required",
        "optional",
        ARGUMENTS,
        capture,
        check,
    ),
)
