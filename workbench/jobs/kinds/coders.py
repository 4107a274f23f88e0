"""``train_sae``: a sparse autoencoder of a site, and how good it is on texts that it was not trained on."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.kinds.above import above
from workbench.jobs.kinds.checks import check_needs, check_value, whole
from workbench.jobs.probes import REQUIRED, Cell, Outcome, Probe

if TYPE_CHECKING:
    from workbench.coders.coder import Coder
    from workbench.models.protocol import Model, Tokens

_OWN: Mapping[str, Any] = {
    "site": REQUIRED,
    "kind": "topk",
    "features": 1024,
    "data": None,
    "judged": 64,
    "start": None,
}
_HELD_OUT = 10**6
"""Seeds of the texts that judge start here, trainings at 0; as in `workbench sae eval`."""
_AT_ONCE = 64
"""Prompts of a task that are drawn together."""
_NOT_OURS = ("seed", "store", "data", "device", "out", "resume", "every", "log", "tick", "dtype")
"""Options of a training that a cell has no say in: it leaves no files, and its seed is the job's."""
_TYPES: Mapping[str, Any] = {
    "steps": int | None,
    "tokens": int | None,
    "batch": int,
    "rate": float | None,
    "context": int | None,
    "prepend_bos": bool | None,
    "skip_first": bool,
    "block": int | None,
    "normalise": str,
    "dead_after": int | None,
}


def train_sae(cell: Cell) -> Outcome:
    """One row that says how good the coder is; the coder is saved.

    It is trained on prompts of the job's task, or on ``data``: ``mixture``, ``filler``, ``task:NAME`` or a file with a text per
    line; without either on what a bundled model was made for. It is judged on ``judged`` pieces of texts with other seeds, of a
    file its last tenth, which is kept back. Columns are the measures of ``wb.coder_quality``: ``l0``, ``fvu``, losses and
    their recovered share ..., ``dead``, and the numbers of tokens.
    """
    import pandas as pd

    import workbench as wb

    args = {**_OWN, **cell.job.args}
    own = {name: value for name, value in cell.job.args.items() if name not in ("site", "data", "judged")}
    texts, held, said = _texts(cell, args["data"])
    coder = wb.train_sae(cell.model, args["site"], texts, data=said, seed=cell.job.seed, **own)
    tokens = _pieces(cell.model, coder, held, args["judged"])
    quality = wb.coder_quality(coder, cell.model, tokens, seed=cell.job.seed)
    row = {**quality.values, "dead": quality.dead, "tokens": quality.tokens, "trained_tokens": coder.about["tokens"]}
    return Outcome(pd.DataFrame([row]), coder, f"trained on {said}")


def check(job: Job) -> None:
    """Refuse what a training would refuse without looking at a model."""
    import workbench as wb

    check_needs(job, "required", "optional")
    args = {**_OWN, **job.args}
    if args["site"] is REQUIRED:
        raise WorkbenchError(f"{job.probe} needs a site to train on; add site: blocks.1.attn.hook_z to the spec")
    for name in ("site", "kind"):
        check_value(f"argument {name} of {job.probe}", str, args[name])
    for name in ("data", "start"):
        check_value(f"argument {name} of {job.probe}", str | None, args[name])
    for name in ("features", "judged"):
        whole(job, name, _OWN[name])
    if args["data"] is not None and job.task is not None:
        raise WorkbenchError(
            f"{job.probe} reads data: or the prompts of task:; got {args['data']!r} and {job.task_name!r}"
        )
    if args["data"] is not None:
        above("apps.texts").check_name(args["data"])
    kinds = wb.coder_kinds()
    if args["kind"] not in kinds:
        raise UnknownName("kind of coder", args["kind"], kinds)
    of_kind = kinds[args["kind"]].defaults
    known = {**_OWN, **of_kind, **_training()}
    for name, value in job.args.items():
        if name not in known:
            raise UnknownName(f"argument of {job.probe} with kind {args['kind']}", name, known)
        if name in _TYPES:
            check_value(f"argument {name} of {job.probe}", _TYPES[name], value)
    options = {name: value for name, value in job.args.items() if name in of_kind}
    wb.CoderSpec(args["site"], args["site"], args["kind"], args["features"], start=args["start"], options=options)
    if job.args.get("steps") is not None and job.args.get("tokens") is not None:
        raise WorkbenchError(f"the length of a training is given in steps or in tokens; got both for {job.probe}")


@cache
def _training() -> dict[str, Any]:
    """Options of a training that a cell can set, with their defaults."""
    import workbench as wb

    parameters = inspect.signature(wb.train_coders).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in _NOT_OURS}


def _texts(cell: Cell, data: str | None) -> tuple[Any, Any, str]:
    """Texts to train on, texts to judge on, and what they are in words."""
    if cell.job.task is not None:
        said = f"prompts of {cell.job.task_name}, from seed {cell.job.seed}"
        return _prompts(cell, cell.job.seed), _prompts(cell, _HELD_OUT + cell.job.seed), said
    texts = above("apps.texts")
    found, said = texts.texts_of(cell.model, data, cell.job.seed)
    if data is None or not isinstance(found, texts.Lines):
        return found, texts.texts_of(cell.model, data, _HELD_OUT + cell.job.seed)[0], said
    back = max(1, len(found) // 10)
    if len(found) < 2:
        raise WorkbenchError(f"{Path(data)} holds one text: there is none left to judge the coder on")
    return found[:-back], found[-back:], f"{said} without its last {back} texts"


def _prompts(cell: Cell, seed: int) -> Iterator[Any]:
    while True:
        yield cell.pairs(_AT_ONCE, seed).clean
        seed += 1


def _pieces(model: Model, coder: Coder, texts: Any, number: int) -> Tokens:
    """Pieces as the training had them."""
    context, bos = coder.about.get("context"), coder.about.get("prepend_bos")
    found: Tokens = above("apps.texts").first_pieces(model, texts, number, context=context, bos=bos)
    return found


PROBES = (
    Probe(
        "train_sae",
        "a sparse autoencoder of a site, judged on held-out texts",
        "required",
        "optional",
        _OWN,
        train_sae,
        check,
    ),
)
