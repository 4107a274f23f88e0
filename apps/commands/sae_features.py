"""``sae features``: what do the features of a coder stand for?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.apps import inputs
from workbench.apps.commands.sae_eval import (
    CoderArgument,
    HeldOutOption,
    NumberOption,
    SiteOption,
    TargetOption,
    TextsOption,
    held_out,
    loaded_coder,
)
from workbench.apps.inputs import JsonOption, ModelArgument
from workbench.apps.terminal import answer, percent, working
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from rich.console import Console

    from workbench.probes.features.feature_pages import Example, FeatureDashboard, FeaturePage

_SHOWN = 10
"""Pages on a terminal."""


def features(
    coder: CoderArgument,
    model: ModelArgument,
    feature: Annotated[
        list[int] | None,
        typer.Option(
            "--feature", help="Only this feature; may be given several times. By default those that write most."
        ),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Strongest tokens of each feature.")] = 5,
    texts: TextsOption = None,
    number: NumberOption = 64,
    attributed: Annotated[
        int, typer.Option("--attributed", min=0, help="Of so many of them, what each source token adds.")
    ] = 0,
    site: SiteOption = None,
    target: TargetOption = None,
    seed: HeldOutOption = 0,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write all pages to this HTML file, which needs nothing else.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Pages of features: the tokens at which they are active, the logits that they move, the heads that they write through."""
    if html is not None:
        if html.is_dir():
            raise WorkbenchError(f"{html} is a folder; --html wants a file")
        inputs.writable(html.absolute().parent)
    with working(f"{model}: features of {coder}") as tick:
        import workbench as wb

        found, loaded = loaded_coder(coder), inputs.load(model)
        tokens, said = held_out(loaded, found, texts, number, seed)
        board = wb.feature_dashboard(
            found, loaded, tokens, feature or None, site=site, target=target, top=top, attributed=attributed, seed=seed,
            progress=tick,
        )  # fmt: skip
        if html is not None:
            html.absolute().parent.mkdir(parents=True, exist_ok=True)
            board.write_html(html)
    payload = {
        "command": "sae features",
        "coder": coder,
        "model": model,
        "kind": board.kind,
        "features": board.features,
        "reads": list(board.reads),
        "writes": list(board.writes),
        "data": said,
        "texts": board.texts,
        "tokens": board.tokens,
        "pages": [_plain(page) for page in board.pages],
        "notes": list(board.notes),
        "html": html,
    }
    answer(as_json, payload, lambda console: _show(console, board, said, html))


def _plain(page: FeaturePage) -> dict[str, Any]:
    from dataclasses import asdict

    found = asdict(page)
    for name in ("raises", "lowers"):
        found[name] = [{"token": token, "logit": value} for token, value in found[name]]
    found["goes_with"] = [{"feature": other, "correlation": r} for other, r in found["goes_with"]]
    for example in found["examples"]:
        example["token"] = example["tokens"][example["at"]]
    return found


def _show(console: Console, board: FeatureDashboard, said: str, html: Path | None) -> None:
    console.print(f"{board.kind} coder of {', '.join(board.reads)}; {board.tokens:,} tokens of {said}", soft_wrap=True)
    for page in board.pages[:_SHOWN]:
        console.print(
            f"feature {page.feature}: active at {percent(page.density)}, largest {page.largest:.3g}", style="bold"
        )
        if len(page.heads):
            best = page.heads.argsort(descending=True)[:3].tolist()
            console.print("  heads " + ", ".join(f"{h} {percent(float(page.heads[h]))}" for h in best))
        if page.raises:
            console.print("  raises " + " ".join(repr(token) for token, _ in page.raises[:5]), soft_wrap=True)
        for example in page.group("top"):
            console.print(f"  {example.activation:7.3g} {_window(example)}", soft_wrap=True)
    for note in board.notes:
        console.print(note, soft_wrap=True)
    if len(board.pages) > _SHOWN:
        console.print(f"{len(board.pages) - _SHOWN} more features: --json or --html has them")
    if html is not None:
        console.print(f"pages written to {html}")


def _window(example: Example) -> str:
    from workbench.probes.features.page_html import shown

    parts = [shown(token) for token in example.tokens]
    parts[example.at] = f"[{parts[example.at]}]"
    gap = "" if any(part.startswith(" ") for part in parts[1:]) else " "
    return gap.join(parts)
