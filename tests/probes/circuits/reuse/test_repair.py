"""The planted repair, against literal edits of the pattern and counts by hand."""

import pytest
import torch

import workbench as wb
from workbench.errors import UnknownName, WorkbenchError
from workbench.probes.circuits.reuse.repair import repair
from workbench.sites import Site

OTHERS = ("OTHER1", "OTHER2")
INHIBITION, NEGATIVE, MOVER = "a1.h0", "a3.h2", "a3.h1"


@pytest.fixture(scope="module")
def model():
    return wb.load("compiled-two-task")


@pytest.fixture(scope="module")
def pairs(model):
    return wb.task("colored-objects").build(seed=0, tokenizer=model.tokenizer, n=24)


@pytest.fixture(scope="module")
def both(model, pairs):
    return repair(model, pairs, [INHIBITION, NEGATIVE], OTHERS, movers=[MOVER], controls=3)


def test_the_planted_repair_is_recovered(model, pairs, both):
    """As published in kind: half right before, nearly all after, each part alone less or as much, no new mistakes."""
    before, after = both.accuracy[:2].tolist()
    assert 0.35 < before < 0.65
    assert after == 1
    assert int(both.broken[1].sum()) == 0
    assert int(both.fixed[1].sum()) == round((after - before) * len(pairs))
    alone = repair(model, pairs, [INHIBITION], OTHERS, controls=0)
    negative = repair(model, pairs, [NEGATIVE], OTHERS, controls=0)
    assert before < float(negative.accuracy[1]) < after
    assert float(alone.accuracy[1]) == after
    gain = (both.difference[1] - both.difference[0]).mean()
    parts = [(each.difference[1] - each.difference[0]).mean() for each in (alone, negative)]
    assert min(parts) > 0.5
    assert gain > max(parts)


def test_the_movers_turn_from_the_wrong_colors_to_the_right_one(both):
    table = both.frame().set_index("condition")
    assert table.on_answer["forced"] > table.on_answer["as it is"] + 0.3
    assert table.on_forced["forced"] < table.on_forced["as it is"] - 0.3


def test_random_heads_of_the_same_layers_repair_nothing(both):
    assert both.conditions[2:] == ("random 1", "random 2", "random 3")
    assert len(set(both.heads[2:])) == 3
    for heads in both.heads[2:]:
        assert [name[:2] for name in heads] == ["a1", "a3"]
        assert not {INHIBITION, NEGATIVE, MOVER} & set(heads)
    assert (both.accuracy[2:] == both.accuracy[0]).all()
    assert not both.fixed[2:].any()


def test_each_example_equals_an_edit_of_the_patterns(model, pairs, both):
    part = pairs[:5]

    def put(head):
        def edit(pattern):
            for b in range(5):
                spans = [part.spans[name][b] for name in OTHERS]
                pattern[b, head, part.position[b]] = 0
                for start, stop in spans:
                    pattern[b, head, part.position[b], start:stop] = 1 / sum(int(e - s) for s, e in spans)
            return pattern

        return edit

    edits = {Site("pattern", 1): put(0), Site("pattern", 3): put(2)}
    with torch.no_grad():
        run = model.run(part.clean, edit=edits, read=[Site("pattern", 3, 1)])
    for b in range(5):
        last = run.logits[b, part.position[b]]
        right, wrong = part.answer[b, 0], part.wrong[b, 0]
        assert bool(both.correct[1, b]) == (int(last.argmax()) == int(right))
        assert float(both.difference[1, b]) == pytest.approx(float(last[right] - last[wrong]), abs=1e-4)
        row = run.acts[Site("pattern", 3, 1)][b, part.position[b]]
        mass = float(row[part.clean[b] == right].sum())
        assert float(both.on_answer[1, b]) == pytest.approx(mass, abs=1e-5)
        forced = sum(float(row[slice(*part.spans[name][b].tolist())].sum()) for name in OTHERS)
        assert float(both.on_forced[1, b]) == pytest.approx(forced, abs=1e-5)


def test_the_other_spans_hold_the_other_two_colors(model, pairs):
    from workbench.datasets.words import words

    for i in range(8):
        names = [
            model.tokenizer.convert_ids_to_tokens(pairs.clean[i, slice(*pairs.spans[s][i].tolist())]) for s in OTHERS
        ]
        right = model.tokenizer.convert_ids_to_tokens(pairs.answer[i].tolist())
        wrong = model.tokenizer.convert_ids_to_tokens(pairs.wrong[i].tolist())
        assert all(len(name) == 1 and name[0].strip() in words("colors") for name in names)
        assert right not in names
        assert wrong in names
        assert names[0] != names[1]
        assert pairs.spans["OTHER1"][i, 0] < pairs.spans["OTHER2"][i, 0] < pairs.spans["QUERY"][i, 0]


def test_batches_seeds_and_folder(model, pairs, both, tmp_path):
    few = pairs[:4]
    one = repair(model, few, [INHIBITION, NEGATIVE], OTHERS, movers=[MOVER], controls=3, batch=3)
    again = repair(model, few, [INHIBITION, NEGATIVE], OTHERS, movers=[MOVER], controls=3, batch=3)
    assert one.heads == both.heads
    assert torch.equal(one.difference, again.difference)
    torch.testing.assert_close(one.difference, both.difference[:, :4], rtol=1e-4, atol=1e-4)
    one.save(tmp_path / "repair")
    assert one.plot().get_ylabel() == "accuracy"
    assert not any(point.fwd_hooks for point in model.net.hook_dict.values())


def test_without_movers_attention_is_undefined(model, pairs):
    table = repair(model, pairs[:4], [INHIBITION], OTHERS, controls=0).frame()
    assert table[["on_answer", "on_forced"]].isna().all(axis=None)
    assert table.condition.tolist() == ["as it is", "forced"]


def test_a_layer_without_other_heads_has_no_control(model, pairs):
    found = repair(model, pairs[:2], [f"a1.h{h}" for h in range(3)], OTHERS, controls=3)
    assert found.conditions == ("as it is", "forced")


@pytest.mark.parametrize(
    ("heads", "onto", "movers", "match"),
    [
        (["a9.h0"], OTHERS, [], "no head of compiled-two-task 'a9.h0'"),
        ([INHIBITION], ["S2"], [], "no span of these pairs 'S2'.*OTHER1"),
        ([INHIBITION], OTHERS, [INHIBITION], "other heads to watch"),
        ([], OTHERS, [], "heads to force"),
        ([INHIBITION], [], [], "spans to force"),
    ],
)
def test_mistakes_are_named(model, pairs, heads, onto, movers, match):
    with pytest.raises((WorkbenchError, UnknownName), match=match):
        repair(model, pairs[:2], heads, onto, movers=movers)


def test_spans_that_some_prompt_lacks_are_refused(model, pairs):
    from dataclasses import replace

    spans = {**pairs.spans, "OTHER1": pairs.spans["OTHER1"].clone()}
    spans["OTHER1"][1] = -1
    with pytest.raises(WorkbenchError, match="'OTHER1' is absent from some prompt"):
        repair(model, replace(pairs, spans=spans)[:2], [INHIBITION], OTHERS)
