"""``workbench sae train``: one command gives a trained coder; given again it goes on; mistakes are one line."""

from __future__ import annotations

import json
import random

import pytest
import torch

import workbench as wb
from workbench.apps.texts import Lines, texts_of
from workbench.errors import WorkbenchError

Z, POST = "blocks.1.attn.hook_z", "blocks.1.hook_resid_post"
SHORT = ("--features", "32", "--k", "4", "--steps", "6", "--batch", "64", "--context", "24", "--option", "block=512")


@pytest.fixture
def words(model, tmp_path):
    """The beginning of a short training on filler, in a folder of its own."""
    return ("sae", "train", model, "--data", "filler", *SHORT, "--out", tmp_path / "out")


def test_a_coder_is_trained_and_saved(workbench, words, tmp_path):
    got = workbench(*words, "--site", Z, "--json").json
    (row,) = got["rows"]
    assert row["reads"] == row["writes"] == [Z]
    assert row["tokens"] == 6 * 64
    assert row["l0"] == 4
    assert row["saved"] == str(tmp_path / "out" / "coder")
    coder = wb.load_coder(row["saved"])
    assert (coder.kind, coder.features) == ("topk", 32)
    assert got["about"]["texts"] == got["data"] == "filler, seed 0"
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 6
    again = workbench(*words, "--site", Z)
    assert again.code == 0
    assert "held this training already" in " ".join(again.out.split())
    assert str(tmp_path / "out" / "coder") in again.out.replace("\n", "")
    assert "seed was 0 and is 1" in workbench(*words, "--site", Z, "--seed", "1").mistake()


def test_without_out_it_goes_to_results(workbench, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got = workbench("sae", "train", model, "--site", Z, "--data", "filler", *SHORT, "--json").json
    assert got["folder"] == f"results/coders/random-{Z}-topk"
    assert (tmp_path / got["rows"][0]["saved"] / "cfg.json").is_file()


def test_several_sites_transcoders_and_crosscoders(workbench, model, tmp_path):
    base = ("sae", "train", model, "--data", "filler", *SHORT)
    several = workbench(*base, "--site", Z, "--site", POST, "--out", tmp_path / "a", "--json").json
    assert [row["reads"] for row in several["rows"]] == [[Z], [POST]]
    assert all((tmp_path / "a" / "coders" / f"{i}-{site}").is_dir() for i, site in enumerate((Z, POST)))
    pair = ("--site", "blocks.1.ln2.hook_normalized", "--writes", "blocks.1.hook_mlp_out", "--skip")
    (row,) = workbench(*base, *pair, "--out", tmp_path / "b", "--json").json["rows"]
    assert row["writes"] == ["blocks.1.hook_mlp_out"]
    assert wb.load_coder(row["saved"]).W_skip is not None
    (row,) = workbench(*base, "--site", Z, "--site", POST, "--crosscoder", "--out", tmp_path / "c", "--json").json[
        "rows"
    ]
    assert row["reads"] == [Z, POST]


def test_options_of_the_kind_and_of_the_training(workbench, words):
    more = ("--option", "aux=0.0", "--option", "normalise=none", "--option", "start=random", "--rate", "0.002")
    about = workbench(*words, "--site", Z, *more, "--json").json["about"]
    assert about["options"]["aux"] == 0.0
    assert (about["normalise"], about["start"], about["rate"]) == ("none", "random", 0.002)


def test_texts_of_a_file_and_prompts_of_a_task(workbench, model, tmp_path):
    (tmp_path / "t.txt").write_text("The doctor sang.\n\nThe pilot walked to the market.\n" * 20)
    (tmp_path / "t.jsonl").write_text('{"text": "The doctor sang in the winter."}\n' * 20)
    for data in (tmp_path / "t.txt", tmp_path / "t.jsonl", "task:ioi"):
        out = tmp_path / f"out-{str(data)[-5:].strip('.:')}"
        got = workbench("sae", "train", model, "--site", Z, "--data", data, *SHORT, "--out", out, "--json").json
        assert got["rows"][0]["steps"] == 6


def test_a_file_is_read_line_by_line(tmp_path):
    lines = [f"Line {i} - ünïcode {'x' * random.Random(i).randint(0, 9)}" for i in range(50)]
    (tmp_path / "t.txt").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    found = Lines(tmp_path / "t.txt")
    assert len(found) == 50
    assert list(found) == found[0:50] == lines
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"words": "bad"}\n')
    with pytest.raises(WorkbenchError, match=r'line 1 of the documents in .*bad.jsonl is not JSON with a field "text"'):
        Lines(tmp_path / "bad.jsonl")[1]
    (tmp_path / "latin.txt").write_bytes("één\n".encode("latin-1"))
    with pytest.raises(WorkbenchError, match="not UTF-8 text: byte 0xe9"):
        Lines(tmp_path / "latin.txt")[0]
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(WorkbenchError, match="holds no text"):
        Lines(tmp_path / "blank.txt")


@pytest.mark.parametrize(
    ("name", "said"),
    [("tiny-softmax", "training mixture"), ("compiled-ioi", "prompts of ioi"), ("siit-ioi-1", "prompts of ioi")],
)
def test_bundled_models_have_texts_of_their_own(name, said):
    model = wb.load(name)
    texts, told = texts_of(model, None, 0)
    assert told.startswith(said)
    site = model.manifest().sites[0]
    rows = next(wb.site_rows(model, site, (text for text, _ in zip(texts, range(3), strict=False))))
    assert len(rows[site]) > 10
    again, other = texts_of(model, None, 0)[0], texts_of(model, None, 1)[0]
    first = next(texts_of(model, None, 0)[0])
    same, different = next(again), next(other)
    equal = torch.equal if isinstance(first, torch.Tensor) else lambda a, b: a == b
    assert equal(first, same)
    assert not equal(first, different)


def test_mistakes_are_one_line(workbench, words, model, tmp_path):
    assert "hook_resid_post" in workbench(*words, "--site", "blocks.7.hook_resid_post").mistake()
    assert "nearest: topk" in workbench(*words, "--site", Z, "--kind", "topkk").mistake()
    assert (
        "option of topk coders or of training 'alpha'"
        in workbench(*words, "--site", Z, "--option", "alpha=1").mistake()
    )
    assert "say the same twice" in workbench(*words, "--site", Z, "--option", "k=3").mistake()
    assert "in steps or in tokens" in workbench(*words, "--site", Z, "--tokens", "100").mistake()
    assert "give --writes" in workbench(*words, "--site", Z, "--skip").mistake()
    assert "at least two --site" in workbench(*words, "--site", Z, "--crosscoder").mistake()
    assert not (tmp_path / "out").exists()
    base = ("sae", "train", model, "--site", Z, *SHORT, "--out", tmp_path / "out")
    assert "no bundled model" in workbench(*base).mistake()
    assert "no such file" in workbench(*base, "--data", "nowhere.txt").mistake()
    assert "no task 'nothing'" in workbench(*base, "--data", "task:nothing").mistake()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    assert "holds no training" in workbench(*base, "--data", "filler").mistake()
    assert json.dumps(sorted(path.name for path in (tmp_path / "out").iterdir())) == '["letter.txt"]'
