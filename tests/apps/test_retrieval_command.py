"""``workbench retrieval`` with what it can write and remove."""

import json

from workbench.probes.retrieval.score_files import load_scores

SMALL = ("retrieval", "compiled-needle", "--lengths", "48", "--depths", "1", "--trials", "2")


def test_removing_the_head_is_part_of_the_answer(workbench, monkeypatch):
    got = workbench(*SMALL, "--mask", "--json").json
    assert got["counts"][0]["above"] == 1
    assert got["counts"][0]["share_zero"] == 7 / 8
    assert got["masking"]["metric"] == "needle recall (random: outside the top 1)"
    first = got["masking"]["rows"][0]
    assert (first["removed"], first["ranked"], first["random"]) == (1, 0, 1)
    monkeypatch.setenv("COLUMNS", "160")
    shown = workbench(*SMALL, "--mask").out
    assert "without the best head the model retrieves 0% of a needle, without as many random ones 100%" in shown
    assert "12% of the heads (0% by chance) copy 10% of the needle or more; 88% copy nothing at all" in shown


def test_scores_are_written_in_the_published_form(workbench, tmp_path):
    path = tmp_path / "scores.json"
    got = workbench(*SMALL, "--form", "published", "--scores", str(path), "--json").json
    assert got["form"] == "published"
    assert json.loads(path.read_text())["1-1"] == [1.0, 1.0]
    assert [head[:2] for head in load_scores(path).heads()] == [(1, 1)]


def test_an_unknown_form_and_a_model_that_fails_are_one_line(workbench):
    assert "known: unique, published" in workbench(*SMALL, "--form", "capped").mistake()
    got = workbench("retrieval", "compiled-induction", "--lengths", "48", "--depths", "1", "--mask", "--json").json
    assert got["masking"] is None
    assert "retrieved no needle" in got["undefined"]
