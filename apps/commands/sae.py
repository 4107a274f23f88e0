"""``sae``: sparse autoencoders and transcoders, from training to circuits of features."""

from __future__ import annotations

import typer

from workbench.apps.commands import sae_eval, sae_features, sae_graph, sae_train
from workbench.apps.terminal import Commands

sae = typer.Typer(
    name="sae",
    cls=Commands,
    help="Sparse autoencoders: train, judge and look at features, and graph how they cause each other.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
sae.command("train")(sae_train.train)
sae.command("eval")(sae_eval.evaluate)
sae.command("features")(sae_features.features)
sae.command("graph")(sae_graph.graph)
