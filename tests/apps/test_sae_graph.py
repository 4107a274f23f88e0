"""``workbench sae graph`` on a random model with random transcoders."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

import workbench as wb
from workbench.apps.commands.sae_graph import graph
from workbench.apps.terminal import Commands
from workbench.coders.catalogue import make_coder
from workbench.coders.cross_layer_kinds import make_cross_layer

PROMPT = "When Mary and John went to the store, John gave a ring to"


@pytest.fixture(scope="module")
def run():
    app = typer.Typer(cls=Commands, rich_markup_mode=None)
    app.command("graph")(graph)
    app.command("other")(lambda: None)
    return lambda *words: CliRunner().invoke(app, ["graph", *map(str, words)])


@pytest.fixture(scope="module")
def coders(tmp_path_factory):
    """A folder with a transcoder per layer, under names that do not tell the layer."""
    folder = tmp_path_factory.mktemp("transcoders")
    for layer in range(2):
        made = make_coder("topk", 16, 40, d_out=16, k=4, centred=False, generator=torch.Generator().manual_seed(layer))
        made.about = {"reads": f"blocks.{layer}.ln2.hook_normalized", "writes": f"blocks.{layer}.hook_mlp_out"}
        made.save(folder / "ba"[layer])
    (folder / "notes").mkdir()
    return folder


def test_json_names_paths_scores_and_files(run, model, coders, tmp_path):
    out, page, exported = tmp_path / "graph", tmp_path / "deep" / "page.html", tmp_path / "graph.json"
    got = run(
        model, "--coders", coders, "--prompt", PROMPT, "--target", "Mary", "--target", "John", "--json",
        "--out", out, "--html", page, "--json-graph", exported,
    )  # fmt: skip
    assert got.exit_code == 0, got.stderr
    told = json.loads(got.stdout)
    assert told["targets"] == ["Mary - John"]
    assert told["tokens"][-1] == "to"
    assert told["active_features"] == 2 * 4 * len(told["tokens"])
    saved = wb.FeatureGraph.load(out)
    assert (len(saved.nodes), len(saved.source)) == (told["nodes"], told["edges"])
    assert saved.meta["replacement_score"] == told["replacement_score"]
    assert len(told["paths"]) <= 10
    assert told["paths"][0]["path"].endswith("-> logit 'Mary - John'")
    assert "<svg" in page.read_text()
    assert wb.read_feature_graph_json(exported).tokens == saved.tokens


def test_words(run, model, coders):
    got = run(model, "--coders", coders, "--prompt", PROMPT, "--paths", 3, "--node-share", 0.5)
    assert got.exit_code == 0, got.stderr
    for word in (
        "explained:",
        "strongest paths",
        "-> logit",
        "replacement 0.",
        "completeness 0.",
        "features are active",
    ):
        assert word in got.stdout


def test_a_task_gives_prompt_answer_and_place(run, model, coders):
    told = json.loads(run(model, "--coders", coders, "--task", "ioi", "--json").stdout)
    built = wb.task("ioi").build(seed=0, tokenizer=wb.load(model).tokenizer, n=1)
    words = wb.load(model).tokenizer.convert_ids_to_tokens([int(built.answer[0, 0]), int(built.wrong[0, 0])])
    assert told["targets"] == [f"{words[0]} - {words[1]}"]


def test_a_cross_layer_transcoder_and_one_coder(run, model, coders, tmp_path):
    make_cross_layer("jumprelu", 2, 16, 30).save(tmp_path / "across")
    for folder in (tmp_path / "across", coders / "a"):
        got = run(model, "--coders", folder, "--prompt", PROMPT, "--json")
        assert json.loads(got.stdout)["nodes"] > 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--prompt"),
        (("--prompt", "Mary", "--task", "ioi"), "got both"),
        (("--prompt", " "), "empty"),
        (("--prompt", "Mary", "--task-option", "a=1"), "--task-option belongs"),
        (("--prompt", "Mary", "--target", "a", "--target", "b", "--target", "c"), "twice"),
        (("--prompt", "Mary", "--target", "xyzzy"), "xyzzy"),
        (("--prompt", "Mary", "--html", "."), "wants a file"),
        (("--prompt", "Mary", "--json-graph", "."), "wants a file"),
        (("--prompt", "Mary", "--out", "."), "exists already"),
    ],
)
def test_mistakes(run, model, coders, words, said):
    got = run(model, "--coders", coders, *words)
    assert got.exit_code == 2
    assert said in got.stderr
    assert not got.stdout
    assert "Traceback" not in got.stderr


def test_folders_without_transcoders(run, model, tmp_path):
    for folder, said in ((tmp_path / "none", "no folder"), (tmp_path, "holds no transcoders")):
        got = run(model, "--coders", folder, "--prompt", "Mary")
        assert got.exit_code == 2
        assert said in got.stderr
    for name in ("one", "two"):
        made = make_coder("topk", 16, 20, d_out=16, k=2, centred=False)
        made.about = {"writes": "blocks.1.hook_mlp_out"}
        made.save(tmp_path / name)
    got = run(model, "--coders", tmp_path, "--prompt", "Mary")
    assert "two coders of layer 1" in got.stderr
