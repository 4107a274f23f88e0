"""``sae train``: a coder of what flows through a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.apps import inputs
from workbench.apps.inputs import LARGEST_SEED, JsonOption, ModelArgument
from workbench.apps.terminal import answer, cell, percent, working
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from rich.console import Console

    from workbench.coders.coder import Coder

_DEFAULT_OUT = Path("results") / "coders"
_LAST = 50
"""Steps at the end whose metrics are averaged for the summary."""


def train(
    model: ModelArgument,
    site: Annotated[
        list[str],
        typer.Option(
            "--site", help="Where to train, such as blocks.1.attn.hook_z; several give several coders in one pass."
        ),
    ],
    writes: Annotated[
        list[str] | None,
        typer.Option("--writes", help="A transcoder: predict this site from --site; may be given several times."),
    ] = None,
    skip: Annotated[bool, typer.Option("--skip", help="With --writes: a linear map beside the features.")] = False,
    crosscoder: Annotated[bool, typer.Option("--crosscoder", help="One dictionary for all sites together.")] = False,
    kind: Annotated[str, typer.Option("--kind", help="The kind of coder; an unknown one lists them.")] = "topk",
    features: Annotated[int, typer.Option("--features", min=1, help="Number of features.")] = 1024,
    k: Annotated[
        int | None, typer.Option("--k", min=1, help="Active features per token, for kinds that have it; 32 by default.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Training steps; 500 by default.")] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Length of the training in tokens, in the place of steps.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Tokens per step.")] = 1024,
    rate: Annotated[float | None, typer.Option("--rate", help="Learning rate; by default chosen by width.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed of the data and the start.")] = 0,
    context: Annotated[
        int | None,
        typer.Option("--context", min=1, help="Tokens of a piece of text; 128 by default, if the model takes as many."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="mixture, filler, task:NAME, or a text file with a document per line (.jsonl: its field text). Bundled models "
            "have their own by default.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="A further option of the kind or of the training, as name=value."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder of the training; by default in results/coders. Given again it goes on where it was interrupted.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a sparse autoencoder, a transcoder or a crosscoder on a model.

    A killed training goes on by the same command, to the same result.
    """
    given = inputs.assignments(option, "--option")
    for name, value in (("k", k), ("rate", rate), ("steps", steps), ("tokens", tokens), ("context", context)):
        if value is not None and name in given:
            raise WorkbenchError(f"--{name} and --option {name} say the same twice")
    for name in ("out", "tick", "store", "resume", "data", "kind", "features", "batch", "seed"):
        if name in given:
            raise WorkbenchError(f"--option sets options of the kind and of the training; {name} is none of them here")
    if "log" in given:  # the summary is read from the file of metrics
        given["log"] = ("jsonl", *([given["log"]] if given["log"] != "jsonl" else []))
    named = {"k": k, "rate": rate, "steps": steps, "tokens": tokens, "context": context}
    given |= {name: value for name, value in named.items() if value is not None}
    if skip and not writes:
        raise WorkbenchError("--skip belongs to a transcoder: give --writes")
    if crosscoder and (writes or len(site) < 2):
        raise WorkbenchError("--crosscoder joins at least two --site, without --writes")
    folder = _DEFAULT_OUT / _name(model, site, writes, kind, crosscoder) if out is None else out
    inputs.writable(folder.parent)
    with working(f"{model}: training on {', '.join(site)}") as tick:
        import workbench as wb
        from workbench.apps.texts import texts_of

        loaded = inputs.load(model)
        texts, said = texts_of(loaded, data, seed)
        before = (folder / "coder").is_dir() or (folder / "coders").is_dir()
        shared: dict[str, Any] = {
            "kind": kind, "features": features, "batch": batch, "seed": seed, "out": folder, "tick": tick, "data": said, **given,
        }  # fmt: skip
        if writes:
            coders = [wb.train_transcoder(loaded, site, writes, texts, skip=skip, **shared)]
        elif crosscoder:
            coders = [wb.train_crosscoder(loaded, site, texts, **shared)]
        else:
            coders = list(wb.train_sae(loaded, site, texts, **shared))
        rows = _summary(folder, coders)
    payload = {
        "command": "sae train",
        "model": model,
        "data": said,
        "kind": kind,
        "features": features,
        "folder": folder,
        "rows": rows,
        "about": coders[0].about,
    }

    def show(console: Console) -> None:
        for row in rows:
            console.print(
                f"{row['coder']}: {kind}, {features} features, {row['tokens']:,} tokens of {said}", soft_wrap=True
            )
            console.print(
                f"over the last {row['over']} steps {cell(row['l0'])} features are active per token, "
                f"{percent(row['fvu'])} of the variance is left over, {percent(row['dead'])} of the features are dead",
                soft_wrap=True,
            )
        if before:
            console.print(f"{folder} held this training already")
        for row in rows:
            console.print(f"saved in {row['saved']}", soft_wrap=True)

    answer(as_json, payload, show)


def _name(model: str, sites: list[str], writes: list[str] | None, kind: str, crosscoder: bool) -> str:
    parts = [Path(model).name or model, *sites[:2], *(["and-more"] if len(sites) > 2 else [])]
    parts += ["to", *writes[:1]] if writes else ["crosscoder"] if crosscoder else []
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join([*parts, kind]))


def _summary(folder: Path, coders: list[Coder]) -> list[dict[str, Any]]:
    """What the last steps of each coder came to, from the metrics of the training."""
    import json

    from workbench.coders.metrics import METRICS
    from workbench.coders.specs import CoderSpec
    from workbench.coders.training import names_of, places_of

    recipe = json.loads((folder / "recipe.json").read_text())
    specs = [CoderSpec.of(told) for told in recipe["coders"]]
    last: dict[str, list[dict[str, Any]]] = {name: [] for name in names_of(specs)}
    with (folder / METRICS).open(encoding="utf-8") as file:
        for line in file:
            found = json.loads(line)
            last[found["coder"]] = [*last[found["coder"]][1 - _LAST :], found]
    rows = []
    for (name, lines), coder, place in zip(last.items(), coders, places_of(folder, specs), strict=True):
        means = {key: sum(line[key] for line in lines) / len(lines) for key in ("l0", "fvu", "dead", "loss")}
        rows.append(
            {"coder": name, "reads": coder.about["reads"], "writes": coder.about["writes"], "tokens": coder.about["tokens"],
             "steps": recipe["steps"], "over": len(lines), **means, "saved": place}
        )  # fmt: skip
    return rows
