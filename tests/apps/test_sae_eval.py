"""``workbench sae eval`` and ``workbench sae features`` on small coders in folders."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from workbench.apps.commands.sae_eval import evaluate, held_out
from workbench.apps.commands.sae_features import features
from workbench.apps.terminal import Commands
from workbench.coders.catalogue import make_coder

SITE = "blocks.1.attn.hook_z"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random coder of the random model's second attention layer."""
    coder = make_coder("topk", 16, 24, k=4, generator=torch.Generator().manual_seed(0))
    coder.about = {"model": "random", "reads": SITE, "writes": SITE, "context": 12, "prepend_bos": True}
    return str(coder.save(tmp_path_factory.mktemp("coders") / "coder"))


@pytest.fixture(scope="module")
def call():
    app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False)
    app.command("eval")(evaluate)
    app.command("features")(features)
    runner = CliRunner()

    def run(*words):
        return runner.invoke(app, [str(word) for word in words])

    return run


def mistake(result):
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    return result.stderr


def test_a_coder_is_judged_on_texts_of_a_file(call, folder, model, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("The kind baker walked to the store.\nThe boy ran near the river in the morning again and again.\n")
    got = call("eval", folder, model, "--texts", path, "--json")
    assert got.exit_code == 0, got.stderr
    found = json.loads(got.stdout)
    rows = {row["measure"]: row for row in found["rows"]}
    assert found["reads"] == found["writes"] == [SITE]
    assert rows["l0"]["value"] == found["l0"] <= 4
    assert found["texts"] == 3
    assert rows["fvu"]["null"] is not None
    assert rows["dead"]["low"] is None
    assert sum(found["density"]["features"]) == round(24 * (1 - found["dead"]))
    assert set(found["ce_recovered"]) == {"zero", "mean"}
    assert "warning" not in got.stderr
    shown = call("eval", folder, model, "--texts", path).stdout
    assert f"topk coder of {SITE}, 24 features" in shown


def test_a_coder_at_another_site_is_warned_of(call, folder, model):
    got = call("eval", folder, model, "--texts", "filler", "--number", 2, "--site", "blocks.0.attn.hook_z", "--json")
    assert got.exit_code == 0
    assert f"trained to read {SITE} and is used at blocks.0.attn.hook_z" in got.stderr
    assert json.loads(got.stdout)["reads"] == ["blocks.0.attn.hook_z"]


def test_features_have_pages(call, folder, model, tmp_path):
    path = tmp_path / "new" / "pages.html"
    words = ("features", folder, model, "--texts", "filler", "--number", 4)
    got = call(*words, "--feature", 3, "--feature", 7, "--top", 2, "--attributed", 1, "--html", path, "--json")
    assert got.exit_code == 0, got.stderr
    found = json.loads(got.stdout)
    assert [page["feature"] for page in found["pages"]] == [3, 7]
    page = found["pages"][0]
    assert len(page["heads"]) == 2
    assert len(page["raises"]) == 10
    tops = [example for example in page["examples"] if example["group"] == "top"]
    assert len(tops) <= 2
    for example in tops:
        assert example["token"] == example["tokens"][example["at"]]
    assert path.read_text().startswith("<!doctype html>")
    shown = call(*words, "--top", 1).stdout
    assert "feature " in shown
    assert "heads " in shown
    assert "more features: --json or --html has them" in shown


def test_mistakes_are_one_line(call, folder, model, tmp_path):
    assert "no feature '24'" in mistake(call("features", folder, model, "--texts", "filler", "--feature", 24))
    assert "no coder folder or bundled coder" in mistake(call("eval", tmp_path / "none", model, "--texts", "filler"))
    assert "give --data" in mistake(call("eval", folder, model))
    assert "is a folder" in mistake(call("features", folder, model, "--html", tmp_path))
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "holds no text" in mistake(call("eval", folder, model, "--texts", empty))
    assert "width 8" in mistake(call("eval", folder, model, "--texts", "filler", "--site", f"{SITE}[0]"))


def test_long_texts_are_cut_to_what_the_coder_was_trained_on_and_are_held_out(folder, model):
    import workbench as wb
    from workbench.apps.texts import texts_of

    loaded, coder = wb.load(model), wb.load_coder(folder)
    tokens, said = held_out(loaded, coder, "filler", 7, 0)
    assert tokens.ids.shape == (7, 12)
    assert "seed 1000000" in said
    assert all(row[0] == loaded.tokenizer.bos_token for row in tokens.labels)
    seen, _ = texts_of(loaded, "filler", 0)
    assert loaded.tokens(next(seen)).ids[0, :12].tolist() != tokens.ids[0].tolist()
