"""The command line, ``workbench``. Commands live in ``apps/commands``; nothing slow is imported before one runs."""

from __future__ import annotations

import typer

from workbench.apps.commands import (
    analyses,
    attention,
    bench,
    circuits,
    jobs,
    judge,
    models,
    retrieval,
    reuse,
    sae,
    tasks,
    variants,
)
from workbench.apps.terminal import Commands

app = typer.Typer(
    name="workbench",
    cls=Commands,
    help="See and explain what attention does inside neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(models.models)
app.command()(variants.variants)
app.add_typer(tasks.tasks, name="tasks")
for command in (
    circuits.methods,
    attention.capture,
    attention.sinks,
    retrieval.retrieval,
    attention.heads,
    analyses.analyses,
    analyses.analyse,
    circuits.circuit,
    circuits.faithfulness,
    judge.judge,
    reuse.reuse,
    models.report,
    models.app,
    models.doctor,
):
    app.command()(command)
app.add_typer(sae.sae, name="sae")
app.add_typer(jobs.jobs, name="jobs")
app.command(context_settings=bench.PASS_ON)(bench.bench)


def main() -> None:
    """Entry point of the console script and of ``python -m workbench``."""
    app()


if __name__ == "__main__":
    main()
