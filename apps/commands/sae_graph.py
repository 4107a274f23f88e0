"""``sae graph``: through which features does a prompt become the next token?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.apps import inputs
from workbench.apps.commands.tasks import SeedOption, TaskOptions, chosen
from workbench.apps.inputs import JsonOption, ModelArgument, OutOption
from workbench.apps.terminal import answer, log, percent, table, working
from workbench.errors import UnknownName, WorkbenchError

if TYPE_CHECKING:
    from rich.console import Console

    from workbench.feature_graph import FeatureGraph
    from workbench.models.protocol import Model

CodersOption = Annotated[
    Path | None,
    typer.Option(
        "--coders",
        help="A folder with a folder per transcoder, or a cross-layer transcoder. Bundled models have their own by default.",
    ),
]
PromptOption = Annotated[str | None, typer.Option("--prompt", help="The prompt.")]
TaskOption = Annotated[
    str | None, typer.Option("--task", help="A prompt of this task, and its answer against the wrong one.")
]
TargetsOption = Annotated[
    list[str] | None,
    typer.Option("--target", help="The token that is explained; twice: their logit difference. Else the likely ones."),
]
ShareOption = Annotated[
    float, typer.Option("--node-share", min=0, max=1, help="Influence that kept nodes have together.")
]
EdgesOption = Annotated[
    float, typer.Option("--edge-share", min=0, max=1, help="Influence that kept edges have together.")
]
MostOption = Annotated[int, typer.Option("--max-features", min=1, help="Features that are attributed.")]
PathsOption = Annotated[int, typer.Option("--paths", min=1, help="Paths that are shown.")]
HtmlOption = Annotated[Path | None, typer.Option("--html", help="Also write a page with the picture to this file.")]
GraphOption = Annotated[
    Path | None, typer.Option("--json-graph", help="Also write attribution-graph JSON, as circuit-tracer has it.")
]
_SAYS = (
    "replacement: share of what leads to the logits that comes from tokens, not from errors; completeness: share of inputs that "
    "are no errors, by influence; a path's share: of the logits that goes along it"
)


def graph(
    model: ModelArgument,
    coders: CodersOption = None,
    prompt: PromptOption = None,
    task: TaskOption = None,
    target: TargetsOption = None,
    node_share: ShareOption = 0.8,
    edge_share: EdgesOption = 0.98,
    max_features: MostOption = 7500,
    paths: PathsOption = 10,
    seed: SeedOption = 0,
    task_options: TaskOptions = None,
    out: OutOption = None,
    html: HtmlOption = None,
    json_graph: GraphOption = None,
    as_json: JsonOption = False,
) -> None:
    """Attribution graph of a prompt: the features that make the next token likely, and what makes them active.

    MLPs are replaced by transcoders, attention and norms are held as they are on the prompt.
    """
    folder = inputs.fresh(out)
    if (prompt is None) == (task is None):
        raise WorkbenchError("give the prompt with --prompt, or a task with --task" + ("; got both" if prompt else ""))
    for name, file in (("--html", html), ("--json-graph", json_graph)):
        if file is not None:
            if file.is_dir():
                raise WorkbenchError(f"{file} is a folder; {name} wants a file")
            inputs.writable(file.absolute().parent)
    with working(f"{model}: attribution graph"):
        import workbench as wb
        from workbench.feature_graph_plot import graph_html
        from workbench.probes.features.influence import pruned
        from workbench.probes.features.subgraph import path_text, strongest_paths

        loaded = inputs.load(model)
        found = _coders(coders, model)
        given, targets, position = _asked(loaded, prompt, task, target, seed, task_options)
        whole = wb.attribution_graph(
            loaded, found, given, targets=targets, position=position, max_features=max_features
        )
        small = pruned(whole, node_share, edge_share)
        best = strongest_paths(small, paths)
        rows = [{"share": p.share, "raises": p.sign > 0, "path": path_text(small, p), "nodes": p.nodes} for p in best]
        if html is not None:
            html.absolute().parent.mkdir(parents=True, exist_ok=True)
            html.write_text(f"<!doctype html><meta charset='utf-8'><title>{_slug(model)}</title>{graph_html(small)}\n")
        if json_graph is not None:
            json_graph.absolute().parent.mkdir(parents=True, exist_ok=True)
            wb.write_feature_graph_json(small, json_graph, slug=_slug(model), scan=model)
        if folder is not None:  # last: it cannot be written twice, so a refusal of the others must not leave it behind
            small.save(folder)
    payload = {
        "command": "sae graph",
        "model": model,
        "tokens": small.tokens,
        "targets": whole.meta["targets"],
        "replacement_score": whole.meta["replacement_score"],
        "completeness_score": whole.meta["completeness_score"],
        "active_features": whole.meta["active_features"],
        "nodes": len(small.nodes),
        "edges": len(small.source),
        "whole": {"nodes": len(whole.nodes), "edges": len(whole.source)},
        "paths": rows,
        "logits": whole.frame().query("kind == 'logit'")[["label", "probability"]],
        "saved": folder,
        "html": html,
        "json_graph": json_graph,
    }
    files = [file for file in (folder, html, json_graph) if file is not None]
    answer(as_json, payload, lambda console: _show(console, model, whole, small, rows, files))


def _coders(folder: Path | None, model: str) -> Any:
    if folder is not None:
        from workbench.probes.features.replacement_folder import load_replacement

        return load_replacement(folder)
    from workbench.coders.bundled import bundled_transcoders

    try:
        return bundled_transcoders(model)
    except UnknownName as error:
        raise WorkbenchError(f"which transcoders? --coders DIR holds a folder for each layer ({error})") from None


def _asked(
    model: Model, prompt: str | None, task: str | None, targets: list[str] | None, seed: int, options: list[str] | None
) -> tuple[Any, Any, int | None]:
    """The prompt, what is explained, and where."""
    named: Any = None
    if targets:
        if len(targets) > 2:
            raise WorkbenchError(f"--target is given once for a token, twice for a difference; got {len(targets)}")
        named = targets[0] if len(targets) == 1 else tuple(targets)
    if task is None:
        if options:
            raise WorkbenchError("--task-option belongs to --task")
        assert prompt is not None
        if not prompt.strip():
            raise WorkbenchError("the prompt is empty: --prompt holds no words")
        tokens = model.tokens(prompt)
        unknown = getattr(model.tokenizer, "unk_token_id", None)
        lost = 0 if unknown is None else int((tokens.ids == unknown).sum())
        if lost:
            log(f"{lost} of {tokens.ids.numel()} tokens are unknown to the tokenizer of {model.name}")
        return tokens, named, None
    pairs = chosen(task, options).build(seed=seed, tokenizer=model.tokenizer, n=1)
    answer_id, wrong = int(pairs.answer[0, 0]), int(pairs.wrong[0, 0])
    both: Any = (answer_id, wrong) if wrong >= 0 and wrong != answer_id else answer_id
    return pairs.clean, both if named is None else named, int(pairs.position[0])


def _show(
    console: Console,
    model: str,
    whole: FeatureGraph,
    small: FeatureGraph,
    rows: list[dict[str, Any]],
    files: list[Path],
) -> None:
    told = whole.meta
    console.print(" ".join(small.tokens), soft_wrap=True)
    frame = whole.frame().query("kind == 'logit'")
    said = [
        repr(label) + (f" {percent(share)}" if share == share else "")
        for label, share in zip(frame["label"], frame["probability"], strict=True)
    ]
    console.print(f"{model}, explained: {', '.join(said)}", soft_wrap=True)
    cells = [[percent(r["share"]), "raises" if r["raises"] else "lowers", r["path"]] for r in rows]
    console.print(table("strongest paths", {"share": "right", "it": "left", "path": "left"}, cells))
    console.print(
        f"{len(small.nodes):,} of {len(whole.nodes):,} nodes and {len(small.source):,} of {len(whole.source):,} edges kept; "
        f"{told['active_features']:,} features are active. replacement {told['replacement_score']:.3f}, "
        f"completeness {told['completeness_score']:.3f}",
        soft_wrap=True,
    )
    console.print(_SAYS, soft_wrap=True)
    for file in files:
        console.print(f"saved in {file}")


def _slug(model: str) -> str:
    return "".join(c if c.isalnum() or c in "_-" else "-" for c in model) or "graph"
