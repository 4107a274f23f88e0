"""``retrieval``: which heads of a model fetch a fact from far back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.apps import inputs
from workbench.apps.inputs import LARGEST_SEED, JsonOption, ModelArgument, OutOption
from workbench.apps.terminal import answer, table, working

if TYPE_CHECKING:
    from rich.console import Console

_SHOWN = 12


def retrieval(
    model: ModelArgument,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            help="Lengths of the texts in tokens, separated by commas.",
            show_default="a quarter and all of what the model was made for, 2,048 at most",
        ),
    ] = None,
    depths: Annotated[int, typer.Option("--depths", min=1, help="Number of depths at which the needle stands.")] = 5,
    trials: Annotated[int, typer.Option("--trials", min=1, help="Needles for every length and depth.")] = 4,
    form: Annotated[
        str, typer.Option("--form", help="unique: at most 1, repeats count once; published: the authors' code.")
    ] = "unique",
    mask: Annotated[
        bool, typer.Option("--mask", help="Also remove the best heads, and as many random ones, and ask again.")
    ] = False,
    scores: Annotated[
        Path | None, typer.Option("--scores", help='Write {"layer-head": [scores]} to this file.', show_default="")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed of the texts.")] = 0,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Retrieval heads.

    Which heads fetch a fact from far back, over lengths of the text and depths of the fact.
    """
    sizes, target = None if lengths is None else inputs.numbers(lengths, "--lengths"), inputs.fresh(out)
    if scores is not None:
        inputs.writable(scores.parent)
    curve = None
    with working(f"{model}: retrieval heads") as tick:
        import workbench as wb

        loaded = inputs.load(model)
        result = wb.retrieval_heads(
            loaded, lengths=sizes, depths=depths, trials=trials, form=form, seed=seed, progress=tick
        )
        if target is not None:
            result.save(target)
        if scores is not None:
            result.to_json(scores)
    if mask and not result.reason:
        with working(f"{model}: removing heads") as tick:
            curve = wb.masking_curve(loaded, result, progress=tick)
    payload = {
        "command": "retrieval",
        "model": model,
        "lengths": sorted({int(length) for length in result.length}),
        "depths": depths,
        "form": form,
        "threshold": result.threshold,
        "rows": result.frame(),
        "grid": result.grid(),
        "counts": result.counts(),
        "masking": None if curve is None else {"metric": curve.metric, "rows": curve.frame()},
        "undefined": result.reason,
        "saved": target,
        "scores": scores,
        "provenance": result.provenance,
    }

    def show(console: Console) -> None:
        from workbench.apps.sentences import masking_curve_lines, retrieval_lines

        grid = result.grid().pivot(index="depth", columns="length", values="recall")
        rows = [[f"{100 * depth:.0f}%", *row] for depth, row in zip(grid.index, grid.values.tolist(), strict=True)]
        names = ["depth", *(f"{length:,} tokens" for length in grid.columns)]
        console.print(table(f"{model}: part of the needles retrieved", dict.fromkeys(names, "right"), rows))
        heads = [[h.layer, h.head, h.score, h.null] for h in result.heads()[:_SHOWN]]
        columns = dict.fromkeys(["layer", "head", "copy score", "null"], "right")
        console.print(table("retrieval heads", columns, heads))
        if curve is not None:
            shown = curve.frame()[["removed", "ranked", "ranked_low", "ranked_high", "random"]]
            numbers = [[int(row[0]), *row[1:]] for row in shown.to_numpy().tolist()]
            console.print(table(curve.metric, dict.fromkeys(shown, "right"), numbers))
        for line in [*retrieval_lines(result), *(masking_curve_lines(curve) if curve is not None else ())]:
            console.print(line)
        for path in (target, scores):
            if path is not None:
                console.print(f"saved in {path}")

    answer(as_json, payload, show)
