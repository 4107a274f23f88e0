"""``workbench reuse``: the planted experiment, and the published one on a random model of GPT-2 medium's shape."""

import json

import pytest
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from workbench.apps.commands.circuits import circuit
from workbench.apps.commands.reuse import reuse
from workbench.apps.terminal import Commands
from workbench.datasets.tokenizer import vocabulary

app = typer.Typer(cls=Commands, pretty_exceptions_enable=False)
app.command()(reuse)
app.command()(circuit)


def call(*arguments):
    return CliRunner().invoke(app, ["reuse", *arguments])


def mistake(*arguments):
    result = call(*arguments)
    assert result.exit_code == 2
    assert not result.stdout
    assert len(result.stderr.strip().splitlines()[-1:]) == 1
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def medium(tmp_path_factory):
    """24 layers of 16 heads with two numbers each, random weights, and a byte-level tokenizer that knows the words."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=9000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    inner.train_from_iterator([f" {word}" for word in vocabulary() for _ in range(3)], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", bos_token="<end>", unk_token="<end>")
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=24, n_head=16, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "medium"
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


PLANTED = ("compiled-two-task", "-n", "4", "--option", "keep=0.15", "--onto", "OTHER1,OTHER2", "--controls", "1")


def test_the_planted_experiment_in_one_command(tmp_path, monkeypatch):
    folder = tmp_path / "reuse"
    monkeypatch.setenv("COLUMNS", "200")
    result = call(*PLANTED, "--json", "--out", str(folder))
    assert result.exit_code == 0, result.stderr
    got = json.loads(result.stdout)
    assert got["shared"] == ["a3.h1"]
    assert got["overlap"]["common"] == 1
    assert list(got["repairs"]) == ["inhibition + negative", "inhibition", "negative"]
    rows = got["repairs"]["inhibition + negative"]
    assert rows[0]["accuracy"] < 1
    assert (rows[1]["accuracy"], rows[1]["broken"]) == (1, 0)
    names = {path.name for path in folder.iterdir()}
    assert {"overlap", "circuit-ioi", "circuit-colored-objects", "roles-ioi", "repair-0"} <= names


def test_it_reads_as_a_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = call("compiled-two-task", "-n", "2")
    assert result.exit_code == 0, result.stderr
    assert "1 of the 3 nodes of ioi are among the 3 of colored-objects: 33%" in result.stdout
    assert "a3.h1" in result.stdout


def test_the_published_experiment_runs_on_a_model_of_its_shape(medium):
    """The heads of the paper forced in a local GPT-2 of 24 x 16 heads: what is needed is the weights."""
    result = call(medium, "--published", "--onto", "OTHER1,OTHER2", "-n", "4", "--controls", "1", "--json")
    assert result.exit_code == 0, result.stderr
    got = json.loads(result.stdout)
    assert {"a15.h14", "a16.h15", "a17.h4", "a18.h5", "a19.h15", "a6.h4", "a9.h3"} == set(got["shared"])
    rows = got["repairs"]["inhibition + negative"]
    assert set(rows[1]["heads"].split(", ")) == {"a12.h3", "a13.h4", "a13.h13", "a19.h1"}
    assert rows[1]["difference"] != rows[0]["difference"]
    assert 0 < rows[0]["on_forced"] < 1


def test_the_published_circuits_are_found_by_path_patching_on_its_shape(medium, monkeypatch):
    """The search over 384 heads, cut to its first stage and two examples to stay short."""
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--method", "path-patching", "-n", "2", "--option", "stages=1", "--json"]
    result = CliRunner().invoke(app, ["circuit", medium, "ioi", *arguments])
    assert result.exit_code == 0, result.stderr
    got = json.loads(result.stdout)
    assert len(got["rows"]) == 384
    assert 1 <= got["kept"] <= 8  # 2% of the heads


def test_mistakes_are_one_line(medium):
    planted = "compiled-two-task"
    assert "two different tasks" in mistake(planted, "--from", "ioi", "--to", "ioi")
    assert "no task 'cobs'" in mistake(planted, "--to", "cobs")
    assert "no named word of colored-objects 'S2'" in mistake(planted, "--onto", "S2", "-n", "2")
    assert "--onto, which words" in mistake(planted, "--heads", "1.0")
    assert "layer.head" in mistake(planted, "--heads", "one", "--onto", "OTHER1", "-n", "2")
    assert "got head 9.0" in mistake(planted, "--heads", "9.0", "--onto", "OTHER1", "-n", "2")
    assert "no circuit of ioi is published for a model of 4 layers with 4 heads" in mistake(
        planted, "--published", "-n", "2"
    )
    assert "belong to finding them" in mistake(medium, "--published", "--top", "3")
    assert "no circuit method" in mistake(planted, "--method", "magic", "-n", "2")
