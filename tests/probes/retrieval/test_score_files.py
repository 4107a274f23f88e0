"""Score files in the published form: read, counted, refused, written again."""

import json
import math

import pytest
import torch
from copier import Copier, prompts

import workbench as wb
from workbench.errors import WorkbenchError
from workbench.probes.retrieval.score_files import counts_of, load_scores, write_scores
from workbench.results import load_result


def written(tmp_path, table):
    path = tmp_path / "scores.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    return path


def test_scores_are_read_by_layer_and_head(tmp_path):
    table = {"11-15": [0.9, 0.94], "0-0": [0.0, 0.0], "0-2": [0.1, 0.1], "11-0": [0.05, 0.2], "0-1": [0.0, 0.3]}
    scores = load_scores(written(tmp_path, table))
    assert scores.layers == (0, 11)
    assert [(head.layer, head.head) for head in scores.heads()] == [(11, 15), (0, 1), (11, 0), (0, 2)]
    assert [head.value for head in scores.heads(0.9)] == [pytest.approx(0.92)]
    frame = scores.frame().set_index(["layer", "head"])
    assert frame.loc[(0, 1), "score"] == pytest.approx(0.15)
    assert (frame.loc[(0, 1), "score_low"], frame.loc[(0, 1), "score_high"]) == (0, pytest.approx(0.3))
    assert len(frame) == 3 + 16
    assert math.isnan(frame.loc[(11, 7), "score"])
    assert scores.undefined["11-7"] == "no score in the file"
    counts = scores.counts().iloc[0]
    assert (counts["heads"], counts["above"], counts["zero"], counts["undefined"]) == (5, 4, 1, 14)
    assert counts["share_above"] == pytest.approx(0.8)


def test_counts_are_those_of_a_table_of_a_known_make():
    """As the published counts: 33 of 1,024 heads at .1 or more, half of them at exactly 0."""
    scores = torch.full((3, 32, 32), 0.04, dtype=torch.float64)
    scores.view(3, -1)[:, :33] = 0.1
    scores.view(3, -1)[:, 512:] = 0
    row = counts_of(scores).iloc[0]
    assert (row["heads"], row["above"], row["zero"]) == (1024, 33, 512)
    assert row["share_above"] == pytest.approx(0.032, abs=5e-4)
    assert row["low"] == row["high"] == row["share_above"]
    assert math.isnan(row["null_above"])
    assert counts_of(scores, null=scores.clamp(max=0.09)).iloc[0]["null_above"] == 0
    assert counts_of(scores[:0]).empty
    wide = torch.tensor([[[0.0, 0.3]], [[0.0, 0.0]]], dtype=torch.float64)
    row = counts_of(wide).iloc[0]
    assert (row["share_above"], row["low"], row["high"]) == (0.5, 0, 0.5)


def test_a_sweep_comes_back_as_it_was(tmp_path):
    result = wb.retrieval_heads(wb.load("compiled-needle"), (48, 64), 2, trials=2)
    scores = load_scores(result.to_json(tmp_path / "scores.json"), model="compiled-needle")
    assert torch.stack(list(scores.values["score"].values())).equal(result.score)
    assert [head[:2] for head in scores.heads()] == [head[:2] for head in result.heads()]
    for column in ("heads", "above", "share_above", "low", "high", "zero", "share_zero", "undefined", "trials"):
        assert scores.counts()[column][0] == result.counts()[column][0]
    again = write_scores(tmp_path / "again.json", scores.layers, torch.stack(list(scores.trials.values()), 1))
    assert json.loads(again.read_text()) == json.loads((tmp_path / "scores.json").read_text())
    saved = load_result(scores.save(tmp_path / "saved"))
    assert saved.tensors["values.score.1"].equal(result.score[1])


def test_no_score_is_not_zero(tmp_path):
    path = written(tmp_path, '{"0-0": [NaN, 0.5], "0-1": [NaN], "0-2": [], "0-3": [null, 0.25], "0-4": 0.75}')
    scores = load_scores(path)
    row = scores.values["score"][0]
    assert row.isnan().tolist() == [False, True, True, False, False]
    assert row[[0, 3, 4]].tolist() == [0.5, 0.25, 0.75]
    assert scores.undefined == {"0-1": "its scores are NaN", "0-2": "no score in the file"}
    assert [head.head for head in scores.heads(0.0)] == [4, 0, 3]
    assert scores.counts()["undefined"].tolist() == [2]
    back = write_scores(tmp_path / "back.json", (0,), scores.trials[0][:, None])
    assert json.loads(back.read_text()) == {"0-0": [0.5], "0-1": [], "0-2": [], "0-3": [0.25], "0-4": [0.75]}
    assert load_scores(back).values["score"][0].nan_to_num(-1).equal(row.nan_to_num(-1))


def test_layers_of_two_stacks_are_kept_in_order(tmp_path):
    scores = load_scores(written(tmp_path, {"encoder.10-0": [0.1], "cross.0-0": [0.2], "encoder.2-0": [0.3]}))
    assert scores.layers == ("cross.0", "encoder.2", "encoder.10")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"0-0": ["a"]}, "scores of head 0-0 are numbers; got 'a'"),
        ({"0-0": [True]}, "are numbers; got True"),
        ('{"0-0": [Infinity]}', "finite or NaN; got inf"),
        ({"0_0": [1.0]}, "'0_0' names no head"),
        ({"0-0-1": [1.0]}, "names no head"),
        ('{"0-0": [1.0], "0-0": [0.5]}', "head 0-0 is there twice"),
        ({}, "holds no head scores"),
        ([1, 2], "holds no head scores"),
        ("{", "is not JSON"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, table, said):
    with pytest.raises(WorkbenchError, match=said):
        load_scores(written(tmp_path, table))


def test_files_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(WorkbenchError, match="cannot read"):
        load_scores(tmp_path / "none.json")
    with pytest.raises(WorkbenchError, match="cannot write"):
        write_scores(tmp_path / "no" / "x.json", (0,), torch.zeros(1, 1, 1))
    failed = wb.retrieval_heads(Copier(fails=lambda line: True), 12, 1, prompts=prompts())
    assert failed.counts().empty
