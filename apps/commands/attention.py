"""``capture``, ``sinks``, ``heads``: what the heads of a model do with a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.apps import inputs
from workbench.apps.inputs import (
    LARGEST_SEED,
    FileOption,
    HeadOption,
    JsonOption,
    LayerOption,
    ModelArgument,
    OutOption,
    TextOption,
)
from workbench.apps.terminal import answer, cell, log, table, working
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from rich.console import Console

    from workbench.probes.sinks.compare import SinkComparison
    from workbench.probes.sinks.scores import SinkResult
    from workbench.run import Run

_SHOWN = 12
_APART = 6
_TEXTS, _TOKENS = 16, 127


def capture(
    model: ModelArgument,
    text: TextOption = None,
    file: FileOption = None,
    blocks: Annotated[
        int, typer.Option("--blocks", max=2**24, help="Side of a block of the block maps, in tokens.")
    ] = 64,
    layer: LayerOption = None,
    head: HeadOption = None,
    site: Annotated[
        list[str] | None,
        typer.Option("--site", help="Read this activation too, by TransformerLens's name; repeatable."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Run again without capture and report max |delta logits|.")
    ] = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Block maps and per-head statistics of one text."""
    words, target = inputs.prompt(text, file), inputs.fresh(out)
    with working(f"{model}: capturing"):
        import workbench as wb
        from workbench.probes.atlas import atlas

        request = wb.capture(
            layers=inputs.layers(layer), blocks=blocks, reduce=("sum", "max"), stats=("received", "entropy", "distance")
        )
        wrapped, run = inputs.run(model, words, request, site or ())
        result = atlas(run, blocks)
        frame = inputs.only(result.frame(), head)
        parity = _parity(wrapped, run, request) if check else None
        if target is not None:
            result.save(target)
    sites = [
        {
            "site": name,
            "shape": list(value.shape),
            "mean": float(value.double().mean()),
            "largest": float(value.abs().max()),
        }
        for name, value in result.acts.items()
    ]
    payload = {
        "command": "capture",
        "model": run.provenance.model,
        "tokens": result.tokens,
        "blocks": {"size": blocks, "shape": {k: list(v.shape) for k, v in result.blocks.items()}},
        "rows": frame,
        "sites": sites,
        "parity": parity,
        "saved": target,
        "provenance": run.provenance,
    }

    def show(console: Console) -> None:
        rows = [
            [r["layer"], r["head"], r["entropy"], r["distance"], r["token"], r["key"], r["share"]]
            for r in records(frame)
        ]
        columns = ["layer", "head", "entropy (nats)", "distance (tokens)", "largest share to", "at", "share"]
        console.print(table(f"{model}: {len(result.tokens)} tokens", dict.fromkeys(columns, "right"), rows))
        if sites:
            console.print(table("activations", list(sites[0]), [list(row.values()) for row in sites]))
        if parity is not None:
            console.print(f"max |delta logits| with capture on and off: {parity:g}")
        size = next(iter(result.blocks.values())).shape[-1]
        console.print(f"block maps: {size} x {size} blocks of {blocks} tokens per head")
        if target is not None:
            console.print(f"saved in {target}")

    if target is None:
        log("the block maps are not saved; give --out DIR to keep them")
    answer(as_json, payload, show)


def sinks(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="A model; two of them with --compare.")],
    text: TextOption = None,
    file: FileOption = None,
    layer: LayerOption = None,
    head: HeadOption = None,
    epsilon: Annotated[
        float, typer.Option("--epsilon", help="A first token with a larger share counts as a sink.")
    ] = 0.3,
    raw: Annotated[bool, typer.Option("--raw", help="Gated models: look at the attention inside the gate.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Show two models on the same text side by side.")] = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Attention sinks.

    Which tokens collect attention whatever the query asks for, next to what even attention would give them.
    """
    if len(models) != (2 if compare else 1):
        wanted = "two models: sinks --compare A B" if compare else "one model (two with --compare)"
        raise WorkbenchError(f"sinks wants {wanted}; got {' '.join(models)}")
    if compare and models[0] == models[1]:
        raise WorkbenchError(f"sinks --compare wants two different models; got {models[0]} twice")
    if compare and out is not None:
        raise WorkbenchError("--out saves one result; run sinks on each model by itself to save it")
    if compare:
        _compare_sinks(models, text, file, layer, head, epsilon, raw, as_json)
        return
    words, target = inputs.prompt(text, file), inputs.fresh(out)
    with working(f"{models[0]}: sinks"):
        import workbench as wb

        request = wb.capture(layers=inputs.layers(layer), stats=("received",))
        result = wb.sinks(inputs.run(models[0], words, request)[1], epsilon=epsilon, raw=raw)
        frame = inputs.only(result.frame(), head)
        if target is not None:
            result.save(target)
    payload = {"command": "sinks", **_sink_payload(models[0], result, frame), "saved": target}
    answer(as_json, payload, lambda c: _show_sinks(c, models[0], result, head, target))


def _compare_sinks(
    models: list[str],
    text: str | None,
    file: str | None,
    layer: list[str] | None,
    head: list[int] | None,
    epsilon: float,
    raw: bool,
    as_json: bool,
) -> None:
    """Two models on one text, or on several generated ones, which give intervals."""
    from workbench.apps.sentences import PUBLISHED, compared

    if text is None and file is None:
        from workbench.datasets.corpus import filler_text

        words = [filler_text(seed, _TOKENS) for seed in range(_TEXTS)]
        log(f"no --text or --file: comparing on {_TEXTS} generated texts of {_TOKENS} tokens (seeds 0 to {_TEXTS - 1})")
    else:
        words = [inputs.prompt(text, file)]
    runs = []
    for model in models:
        with working(f"{model}: sinks"):
            runs.append(_streams(model, words, layer))
    import workbench as wb

    found = wb.compare_sinks(*runs, labels=(models[0], models[1]), epsilon=epsilon)
    results = [pair[-1 if raw else 0] for pair in found.results]
    frames = [inputs.only(result.frame(), head) for result in results]
    table, heads_apart = found.frame(), inputs.only(found.heads(), head)
    payload = {
        "command": "sinks",
        "compare": [_sink_payload(*each) for each in zip(models, results, frames, strict=True)],
        "difference": inputs.only(compared(*results), head),
        "models": table,
        "layers": found.layers(),
        "heads": heads_apart,
        "ratio": {kind: found.ratio("f_attn", kind) for kind in ("effective", "raw")},
        "published": PUBLISHED,
        "sequences": found.sequences,
        "paired": found.paired,
    }
    answer(as_json, payload, lambda c: _show_comparison(c, found, table, heads_apart, raw))


def _streams(model: str, words: list[str], layer: list[str] | None) -> Run:
    """Column sums, and the residual streams of the model that can be read."""
    import workbench as wb
    from workbench.sites import Site

    loaded = inputs.load(model)
    streams = [site for site in loaded.manifest().sites if Site.parse(site).kind.startswith("resid_")]
    return inputs.recorded(loaded, words, wb.capture(layers=inputs.layers(layer), stats=("received",)), streams)


def _show_comparison(
    console: Console, found: SinkComparison, models: pd.DataFrame, heads: pd.DataFrame, raw: bool
) -> None:
    from workbench.apps.sentences import comparison_lines, furthest_lines, spread

    first, second = found.labels
    quantities = ("f_attn", "sink_score", "largest", "largest_later")
    names = ["F-Attn", "sink score", "largest activation", "after the first token"]
    rows = []
    for r in records(models):
        gate = cell(r["mean_gate"]).replace("undefined", "")
        rows.append([r["model"], r["map"], gate, *(spread(r, name) for name in quantities)])
    console.print(
        table(f"{found.sequences[0]} texts, 95% intervals over texts", ["model", "map", "mean gate", *names], rows)
    )
    pair = ("first", "second", "difference")
    for title, at, frame in (
        ("attention to the first token by layer", ["layer"], found.layers()),
        (f"by head, the {_APART} that differ most", ["layer", "head"], heads),
    ):
        kinds = ("raw",) if raw and found.gated else ("effective", "both")
        shown = [r for r in records(frame) if at == ["layer"] or r["map"] in kinds]
        shown = shown if at == ["layer"] else sorted(shown, key=lambda r: -abs(r["difference"]))[:_APART]
        lines = [[*(r[name] for name in at), r["map"], *(spread(r, name) for name in pair)] for r in shown]
        console.print(table(title, [*at, "map", first, second, "difference"], lines))
    for line in (
        *comparison_lines(found),
        *furthest_lines(found.labels, *(f[-1 if raw else 0] for f in found.results)),
    ):
        console.print(line)


def _sink_payload(model: str, result: SinkResult, frame: pd.DataFrame) -> dict[str, Any]:
    return {
        "model": model,
        "tokens": next(iter(result.tokens.values()), ()),
        "epsilon": result.epsilon,
        "sink_score": result.sink_score,
        "f_attn": result.f_attn,
        "strongest": [sink._asdict() for sink in result.strongest()],
        "rows": frame,
        "undefined": result.undefined,
        "provenance": result.provenance,
    }


def _show_sinks(console: Console, model: str, result: SinkResult, head: list[int] | None, saved: Path | None) -> None:
    from workbench.apps.sentences import sink_lines

    strongest = [sink for sink in result.strongest() if not head or sink.head in head]
    rows = [[s.layer, s.head, s.token, s.key, s.share, s.uniform] for s in strongest[:_SHOWN]]
    columns = dict.fromkeys(["layer", "head", "token", "at", "share", "even attention"], "right")
    more = f", the {_SHOWN} strongest of {len(strongest)} heads" if len(strongest) > _SHOWN else ""
    console.print(table(f"{model}: favourite key of each head{more}", columns, rows))
    for line in sink_lines(result):
        console.print(line)
    for name, reason in result.undefined.items():
        console.print(f"layer {name} left out of the scores: {reason}")
    if saved is not None:
        console.print(f"saved in {saved}")


def heads(
    model: ModelArgument,
    text: TextOption = None,
    file: FileOption = None,
    layer: LayerOption = None,
    head: HeadOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Gated models: look at the attention inside the gate.")] = False,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed of the random tokens and of the nulls.")
    ] = 0,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Previous-token, duplicate-token, induction heads, and what else each head does.

    On a text or, without one, on random tokens that repeat; the roles of the heads (copying, positional, copy suppression ...)
    are told without a text alone.
    """
    words = inputs.prompt(text, file) if text is not None or file is not None else None
    target = inputs.fresh(out)
    with working(f"{model}: head scores"):
        import workbench as wb

        chosen = inputs.layers(layer)
        source: Any = inputs.load(model) if words is None else inputs.run(model, words, wb.capture(layers=chosen))[1]
        result = wb.head_scores(source, layers=chosen, raw=raw, seed=seed)
        frame = inputs.only(result.frame(), head)
        found = wb.head_roles(source, raw=raw, seed=seed) if words is None and chosen is None else None
        if target is not None:
            result.save(target)
    payload = {
        "command": "heads",
        "model": model,
        "source": result.source,
        "rows": frame,
        "roles": None if found is None else inputs.only(found.frame(), head),
        "roles_undefined": {} if found is None else found.undefined,
        "undefined": result.undefined,
        "skipped": result.skipped,
        "saved": target,
        "provenance": result.provenance,
    }

    def show(console: Console) -> None:
        from workbench.apps.sentences import head_lines, role_lines

        columns = dict.fromkeys(["layer", "head", "score", "null", "z"], "right")
        for kind in result.kinds:
            rows = [list(best) for best in result.top(kind) if not head or best.head in head][:5]
            console.print(table(f"{model}: {kind}, {result.source}", columns, rows))
        if found is not None:
            scores = ("first", "positional", "copying", "matching", "predicted", "own_logit")
            columns = {"layer": "right", "head": "right", "roles": "left", **dict.fromkeys(scores, "right")}
            rows = [[row[name] for name in columns] for row in records(inputs.only(found.frame(), head))]
            part = f", the first 64 of {len(rows)} (all with --json)" if len(rows) > 64 else ""
            console.print(table(f"{model}: what each head does{part}", columns, rows[:64]))
        for line in [*head_lines(result), *(role_lines(found) if found is not None else [])]:
            console.print(line)
        if target is not None:
            console.print(f"saved in {target}")

    answer(as_json, payload, show)


def _parity(model: Any, run: Any, request: Any) -> float:
    """Largest absolute difference of the logits (or outputs) with capture on and off."""
    import torch

    with torch.no_grad():
        on, off = (model.run(run.tokens, maps=maps) for maps in (request, None))
    pair = (on.logits, off.logits) if on.logits is not None else (on.output, off.output)
    return float((pair[0] - pair[1]).abs().max())


def records(frame: Any) -> list[dict[str, Any]]:
    return frame.to_dict("records")
