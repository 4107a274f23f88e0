import json
import math
from dataclasses import replace

import pytest
import torch
from copier import ASK, STOP, Copier, prompts

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.pairs import Pairs
from workbench.probes.retrieval.copying import retrieval_heads
from workbench.probes.retrieval.masking import masking
from workbench.results import load_result
from workbench.run import Maps


def scores(result):
    return {(row.layer, row.head): row for row in result.frame().itertuples()}


def test_the_copying_head_scores_one_and_the_others_nothing():
    result = wb.retrieval_heads(Copier(), lengths=(12, 20), depths=3, prompts=prompts())
    found = scores(result)
    assert {head: row.score for head, row in found.items()} == {(0, 0): 0, (0, 1): 0, (1, 0): 1, (1, 1): 0}
    assert found[1, 0].trials == 2 * 3 * 2
    assert (found[1, 0].low, found[1, 0].high) == (1, 1)
    assert [head[:2] for head in result.heads()] == [(1, 0)]
    assert result.frame()["retrieval"].tolist() == [False, False, True, False]
    assert not result.reason


def test_looking_is_not_copying():
    result = retrieval_heads(Copier(), 12, (0.5,), prompts=prompts())
    found = scores(result)
    assert found[1, 0].looks == 1
    assert found[1, 1].looks == pytest.approx(2 / 3)
    assert found[1, 1].score == 0
    assert found[0, 0].looks == 0
    assert found[1, 0].looks_null == 0
    assert found[0, 0].looks_null == pytest.approx(3 / (12 - 3))
    assert found[0, 1].looks_null == pytest.approx(1 / 3 * 3 / (12 - 3))  # later rows look at tokens it wrote itself
    assert all(row.null == 0 for row in found.values())


def test_the_null_sees_copies_from_elsewhere():
    """Head 0.0 looks at the first token, which is what the model is made to write; no needle, all control."""

    def build(length, depth, seed):
        found = prompts(needle=(5,))(length, 1.0, seed)
        clean = found.clean.clone()
        clean[:, 0] = 5
        return Pairs(clean, clean, found.answer, found.wrong, found.position, found.spans)

    result = retrieval_heads(Copier(), 9, (1.0,), prompts=build, seed=2)
    found = scores(result)
    assert found[0, 0].score == 0
    assert 0 < found[0, 0].null < 0.5
    assert found[1, 0].score == 1
    assert found[1, 0].null == 0


def test_a_row_without_weight_looks_nowhere():
    """The second head of both layers sees nothing, and the model writes what the last place of the prompt holds."""

    class Blind(Copier):
        def run(self, tokens, *args, **options):
            run = super().run(tokens, *args, **options)
            seen = torch.tensor([1.0, 0.0])[:, None, None]
            return replace(run, maps=Maps({k: AttentionMap.from_dense(m.dense() * seen) for k, m in run.maps.items()}))

    result = retrieval_heads(Blind(says=lambda needle: [ASK]), 9, (0.0,), prompts=prompts(needle=(5,)))
    assert (result.looks_null[:, :, 1] == 0).all()
    assert (result.null[:, :, 1] == 0).all()


def test_unique_and_published_forms_differ_where_tokens_repeat():
    twice = Copier(says=lambda needle: [*needle, *needle, STOP])
    assert scores(retrieval_heads(twice, 12, (0.5,), prompts=prompts()))[1, 0].score == 1.0
    published = retrieval_heads(twice, 12, (0.5,), prompts=prompts(), form="published")
    assert scores(published)[1, 0].score == 2.0
    doubled = prompts(needle=(5, 5, 6))
    assert scores(retrieval_heads(Copier(), 12, (0.5,), prompts=doubled))[1, 0].score == 1.0
    assert scores(retrieval_heads(Copier(), 12, (0.5,), prompts=doubled, form="published"))[1, 0].score == 1.0


def test_failed_trials_are_left_out():
    result = retrieval_heads(Copier(fails=lambda line: len(line) >= 20), (12, 20), 2, prompts=prompts())
    assert scores(result)[1, 0].score == 1.0
    assert scores(result)[1, 0].trials == 4
    grid = result.grid()
    assert grid["recall"].tolist() == [1, 1, 0, 0]
    assert grid["retrieved"].tolist() == [1, 1, 0, 0]
    assert grid["trials"].tolist() == [2, 2, 2, 2]


def test_the_gate_is_recall_above_one_half():
    one, two = (Copier(says=lambda needle, n=n: [*needle[:n], STOP]) for n in (1, 2))
    assert retrieval_heads(one, 12, 1, prompts=prompts()).reason
    result = retrieval_heads(two, 12, 1, prompts=prompts())
    assert result.recall.tolist() == pytest.approx([2 / 3] * 2)
    assert scores(result)[1, 0].score == pytest.approx(2 / 3)
    parrot = Copier(says=lambda needle: [needle[0]] * 4 + [STOP])
    assert retrieval_heads(parrot, 12, 1, prompts=prompts()).recall.tolist() == pytest.approx([1 / 3] * 2)
    half = retrieval_heads(two, 12, 1, prompts=prompts(needle=(5, 6, 7, 8)))
    assert half.recall.tolist() == [0.5, 0.5]
    assert half.reason
    assert half.score.isnan().all()


def test_a_model_that_never_retrieves_has_no_scores(tmp_path):
    result = retrieval_heads(Copier(fails=lambda line: True), 12, 1, prompts=prompts())
    assert result.score.isnan().all()
    assert result.frame()["score"].isna().all()
    assert result.frame()["trials"].tolist() == [0] * 4
    assert "retrieved no needle in 2 trials" in result.reason
    assert result.heads() == result.heads(0.0) == []
    assert "undefined" in result.plot().get_title()
    with pytest.raises(WorkbenchError, match="nothing to export"):
        result.to_json(tmp_path / "scores.json")
    with pytest.raises(Refused, match="no retrieval heads to remove"):
        masking(Copier(), result, prompts=prompts())


def test_one_token_answers_take_one_step():
    model = Copier(says=lambda needle: [*needle, *needle, STOP])
    result = retrieval_heads(model, 12, 1, prompts=prompts(needle=(9,), span="VALUE"))
    assert scores(result)[1, 0].score == 1.0
    assert model.captured == [(True, 1)]


def test_only_one_row_is_captured_per_step_and_without_cache_nothing_changes():
    cached, plain = Copier(), Copier()
    first = retrieval_heads(cached, 12, (0.5,), prompts=prompts())
    second = retrieval_heads(plain, 12, (0.5,), prompts=prompts(), cache=False)
    assert cached.captured == [(True, 1)] * 4
    assert plain.captured == [(False, 12), (False, 13), (False, 14), (False, 15)]
    assert first.frame().equals(second.frame())


def test_batched_prompts_are_scored_one_by_one():
    together = retrieval_heads(Copier(), 12, 2, prompts=prompts(n=3))
    assert together.copied.shape == (6, 2, 2)
    assert together.length.tolist() == [12] * 6
    assert together.depth.tolist() == [0, 0, 0, 1, 1, 1]


def test_prompts_of_unequal_positions_are_run_apart():
    def build(length, depth, seed):
        a = prompts(n=2)(length, depth, seed)
        clean = a.clean.clone()
        clean[1, :-1] = a.clean[1, 1:]
        spans = {"NEEDLE": a.spans["NEEDLE"] - torch.tensor([[0], [1]])}
        return Pairs(clean, clean, a.answer, a.wrong, torch.tensor([length - 1, length - 2]), spans)

    assert scores(retrieval_heads(Copier(), 12, (0.5,), prompts=build))[1, 0].score == 1.0


def test_exported_scores_have_one_list_per_head(tmp_path):
    result = retrieval_heads(Copier(fails=lambda line: len(line) >= 20), (12, 20), 2, prompts=prompts())
    table = json.loads(result.to_json(tmp_path / "scores.json").read_text())
    assert table == {"0-0": [0.0] * 4, "0-1": [0.0] * 4, "1-0": [1.0] * 4, "1-1": [0.0] * 4}
    with pytest.raises(WorkbenchError, match="cannot write"):
        result.to_json(tmp_path / "nowhere" / "scores.json")


def test_progress_counts_cells():
    seen = []
    retrieval_heads(Copier(), (12, 14), 2, prompts=prompts(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [({}, [512, 2048]), ({"context": 100}, [25, 100]), ({"context": 9000}, [512, 2048]), ({"trained": 48}, [12, 48])],
)
def test_lengths_are_by_default_those_the_model_was_made_for(sizes, expected):
    model = Copier()
    model.shape = replace(model.shape, **sizes)
    asked = []

    def source(length, depth, seed):
        asked.append(length)
        return prompts()(length, depth, seed)

    retrieval_heads(model, depths=1, prompts=source)
    assert asked == expected


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UnknownName, match="unique, published"):
        retrieval_heads(Copier(), form="capped")
    with pytest.raises(WorkbenchError, match="2000 is 1900 tokens more than the context"):
        retrieval_heads(Copier(context=100), (50, 2000), prompts=prompts())
    for lengths in ((), (0,), (64.5,)):
        with pytest.raises(WorkbenchError, match="lengths are token counts"):
            retrieval_heads(Copier(), lengths, prompts=prompts())
    for depths in (0, (), (0.5, 1.5)):
        with pytest.raises(WorkbenchError, match="depths"):
            retrieval_heads(Copier(), 12, depths, prompts=prompts())
    with pytest.raises(WorkbenchError, match="these have: OTHER"):
        retrieval_heads(Copier(), 12, 1, prompts=prompts(span="OTHER"))
    with pytest.raises(WorkbenchError, match="come together"):
        retrieval_heads(Copier(), 12, 1, texts="hay")
    with pytest.raises(WorkbenchError, match="max_new_tokens"):
        retrieval_heads(Copier(), 12, 1, prompts=prompts(), max_new_tokens=0)
    with pytest.raises(WorkbenchError, match="13 tokens, 1 more than the model's context of 12"):
        retrieval_heads(Copier(context=12), 12, 1, prompts=lambda length, depth, seed: prompts()(13, depth, seed))


def test_results_are_drawn_shown_and_saved(tmp_path):
    result = retrieval_heads(Copier(), (12, 20), 2, prompts=prompts())
    assert result.plot().get_title() == "Retrieval heads\ncopier"
    ax = result.plot_grid()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["12", "20"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0%", "100%"]
    assert load_result(result.save(tmp_path / "retrieval")).tensors["copied"].equal(result.copied)
    effect = masking(Copier(), result, prompts=prompts())
    assert load_result(effect.save(tmp_path / "masking")).labels["conditions"][0] == "none"


def test_untrained_models_retrieve_nothing():
    assert math.isnan(float(retrieval_heads(Copier(says=lambda needle: [STOP]), 12, 1, prompts=prompts()).score[0, 0]))
