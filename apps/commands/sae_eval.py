"""``sae eval``: how good is a coder?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.apps import inputs
from workbench.apps.inputs import LARGEST_SEED, JsonOption, ModelArgument
from workbench.apps.terminal import answer, table, working
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from rich.console import Console

    from workbench.coders.coder import Coder
    from workbench.models.protocol import Model, Tokens

CoderArgument = Annotated[
    Path,
    typer.Argument(
        metavar="CODER",
        help="A bundled coder such as tiny-softmax/z-1, or a folder: ours, or one of SAELens and others.",
    ),
]
TextsOption = Annotated[
    str | None,
    typer.Option(
        "--texts",
        help="mixture, filler, task:NAME, or a text file with a document per line (.jsonl: its field text). Bundled models have "
        "their own by default, with documents that no training has drawn.",
    ),
]
NumberOption = Annotated[int, typer.Option("--number", min=1, help="Pieces of text.")]
HeldOutOption = Annotated[
    int,
    typer.Option("--seed", min=0, max=LARGEST_SEED - 10**6, help="Seed of the held-out texts and of random choices."),
]
SiteOption = Annotated[
    str | None, typer.Option("--site", help="Where the coder reads, if not where it says; it is warned of.")
]
TargetOption = Annotated[str | None, typer.Option("--target", help="Where it writes, if not where it says.")]
_HELD_OUT = 10**6
"""Seeds of held-out texts start here, trainings at 0."""
_BATCH = 8
_SAYS = (
    "fvu: variance unexplained, 1 is a constant; ce: loss of the next token in nats, of the model, with the coder, with its site "
    "ablated; ce_recovered: 1 loses nothing, 0 is as bad as the ablation; null: the same code through a shuffled decoder"
)


def evaluate(
    coder: CoderArgument,
    model: ModelArgument,
    texts: TextsOption = None,
    number: NumberOption = 64,
    site: SiteOption = None,
    target: TargetOption = None,
    seed: HeldOutOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Judge a coder: sparsity, reconstruction, and the loss of the model with the coder in it.

    Every number has a 95% interval over texts, and the loss is compared with zero and mean ablation.
    """
    with working(f"{model}: judging {coder}") as tick:
        import workbench as wb

        found, loaded = loaded_coder(coder), inputs.load(model)
        tokens, said = held_out(loaded, found, texts, number, seed)
        result = wb.coder_quality(found, loaded, tokens, site, target, batch=_BATCH, seed=seed, progress=tick)
        counts, edges = result.histogram()
    frame = result.frame()
    payload = {
        "command": "sae eval",
        "coder": coder,
        "model": model,
        "kind": result.kind,
        "features": result.features,
        "reads": list(result.reads),
        "writes": list(result.writes),
        "data": said,
        "texts": result.texts,
        "tokens": result.tokens,
        "rows": frame,
        "dead": result.dead,
        "l0": result.l0,
        "fvu": result.fvu,
        "ce_recovered": {name: result.ce_recovered(name) for name in ("zero", "mean")},
        "density": {"log10": edges, "features": counts},
        "l0_counts": result.l0_counts,
    }

    def show(console: Console) -> None:
        where = " to ".join(dict.fromkeys((", ".join(result.reads), ", ".join(result.writes))))
        title = f"{result.kind} coder of {where}, {result.features:,} features; {result.tokens:,} tokens of {said}"
        columns = {"measure": "left", **dict.fromkeys(("value", "low", "high", "null"), "right")}
        console.print(table(title, columns, frame[list(columns)].values.tolist()))
        console.print(_SAYS, soft_wrap=True)

    answer(as_json, payload, show)


def loaded_coder(folder: Path) -> Coder:
    """The coder in a folder; refuses what is no dictionary of features with one encoder and one decoder."""
    import torch

    from workbench.coders.bundled import coder_folder
    from workbench.coders.coder import Coder
    from workbench.coders.folder import load_coder

    found = load_coder(coder_folder(folder))
    if not isinstance(found, Coder):
        raise WorkbenchError(
            f"{folder} holds a {type(found).__name__}; this command is for coders of one place at a time"
        )
    return found.float() if found.W_enc.dtype in (torch.float16, torch.bfloat16) else found


def held_out(model: Model, coder: Coder, name: str | None, number: int, seed: int) -> tuple[Tokens, str]:
    """The first ``number`` pieces of the texts called ``name`` as tokens, and what they are in words.

    Pieces are as long as the coder's training had them (128 tokens where it does not say), and begin as its texts did."""
    from workbench.apps.texts import first_pieces, texts_of

    data, said = texts_of(model, name, _HELD_OUT + seed)
    context, bos = coder.about.get("context"), coder.about.get("prepend_bos")
    tokens = first_pieces(
        model,
        data,
        number,
        context=context if isinstance(context, int) else None,
        bos=bos if isinstance(bos, bool) else None,
    )
    return tokens, said
