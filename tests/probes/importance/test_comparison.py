"""Rankings side by side: the area is literal, a perfect ranking beats shuffled ones, tables become parts."""

import pytest
import torch
from builders import hugging_face, native

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.ablation import ablation_curve
from workbench.probes.examples import needles
from workbench.probes.importance.comparison import compare_rankings, ranked_parts
from workbench.probes.importance.first_order import first_order
from workbench.probes.importance.leave_one_out import leave_one_head_out
from workbench.probes.removal import Heads
from workbench.probes.tables import HeadTable
from workbench.results import load_result
from workbench.sites import Site


@pytest.fixture(scope="module")
def compiled():
    return wb.load("compiled-needle")


@pytest.fixture(scope="module")
def pairs(compiled):
    return needles(compiled, 32, 4)


def test_a_good_ranking_beats_shuffled_orders_and_a_bad_one_does_not(compiled, pairs):
    train = wb.task("needle", length=32, depth=0.5, split="test").build(7, compiled.tokenizer, 4)
    good = leave_one_head_out(compiled, train, ablation="zero", draws=0)
    worst = list(reversed(ranked_parts(good)))
    found = compare_rankings(
        compiled, pairs, {"good": good, "worst": worst}, metric="probability", ablation="zero", counts=(1, 2), random=6
    )
    table = found.frame().set_index("ranking")
    assert table.loc["good", "high"] < 0
    assert table.loc["good", "area"] <= table.loc["good", "chance_low"]
    assert table.loc["worst", "area"] > table.loc["good", "area"] + 0.05
    assert table.loc["good", "agreement_worst"] == pytest.approx(-1)
    assert table.loc["good", "first"] == "blocks.1.attn.hook_z[1]"
    assert len(found.plot().lines) >= 3


def test_without_counts_the_control_never_overlaps(compiled, pairs):
    whole = [(layer, head) for layer in range(2) for head in range(4)]
    found = compare_rankings(compiled, pairs, {"all": whole, "five": whole[:5]}, random=2)
    assert found.curves["all"].counts == (1, 2, 3, 4)
    assert found.curves["all"].metric == "probability"
    short = compare_rankings(compiled, pairs, {"all": whole, "three": whole[:3]}, random=2)
    assert short.curves["all"].counts == (1, 2, 3)


def test_batches_of_several_lengths_are_compared_together(compiled, pairs):
    other = needles(compiled, 40, 2, depth=0.2)
    order = {"one": [(1, 1), (0, 1)]}
    options = dict(counts=(1, 2), random=3, seed=5)
    both, *alone = (compare_rankings(compiled, given, order, **options) for given in ([pairs, other], pairs, other))
    for name in ("base", "ranked", "random"):
        parts = [getattr(each.curves["one"], name) for each in alone]
        torch.testing.assert_close(getattr(both.curves["one"], name), torch.cat(parts, -1))
    torch.testing.assert_close(both.areas["one"], torch.cat([each.areas["one"] for each in alone]))
    with pytest.raises(WorkbenchError, match="holds nothing else"):
        compare_rankings(compiled, [pairs, "a text"], order)
    with pytest.raises(WorkbenchError, match="answers of their own"):
        compare_rankings(compiled, [pairs, other], order, labels=torch.tensor([0]))


def test_texts_are_compared_by_their_loss():
    case = native()
    found = compare_rankings(case.model, case.inputs, {"one": [(0, 0), (1, 1)]}, random=2)
    assert found.curves["one"].metric == "loss"
    assert found.by_count()[["ranking", "removed"]].to_numpy().tolist() == [["one", 1], ["one", 2]]


def test_the_area_is_the_mean_over_counts_of_the_difference(compiled, pairs):
    order = [(0, 0), (1, 1), (0, 2)]
    found = compare_rankings(compiled, pairs, {"one": order}, metric="loss", counts=(1, 3), random=3, seed=4)
    curve = ablation_curve(compiled, pairs, order, metric="loss", counts=(1, 3), random=3, seed=4)
    wanted = [
        sum(float(curve.ranked[c, n] - sum(curve.random[r, c, n] for r in range(3)) / 3) for c in range(2)) / 2
        for n in range(len(pairs))
    ]
    torch.testing.assert_close(found.areas["one"], torch.tensor(wanted, dtype=torch.float64))
    assert found.shuffled.shape == (3,)


def test_tables_groups_stacks_and_lists_are_rankings():
    values = {"a": {0: torch.tensor([0.1, 0.9]), 1: torch.tensor([float("nan"), 0.5])}}
    values["b"] = {0: torch.tensor([1.0, 0.0]), 1: torch.tensor([3.0, 2.0])}
    table = HeadTable("t", values, {"a": "", "b": ""})
    assert ranked_parts(table) == [Site("z", 0, 1), Site("z", 1, 1), Site("z", 0, 0)]
    assert ranked_parts((table, "b"))[0] == Site("z", 1, 0)
    assert ranked_parts([(0, 1), Site("mlp_out", 1)]) == [(0, 1), Site("mlp_out", 1)]
    case = native()
    groups = leave_one_head_out(case.model, case.inputs, by="kv-group", draws=0)
    assert set(ranked_parts(groups)) == {Heads(l, heads) for l in range(2) for heads in ((0, 1), (2, 3))}
    t5 = hugging_face("t5")
    stack = leave_one_head_out(t5.model, t5.inputs, stack="decoder", draws=0)
    assert all(part.stack == "decoder" for part in ranked_parts(stack))
    judged = compare_rankings(t5.model, t5.inputs, {"one": ranked_parts(stack)[:2]}, metric="kl", random=3)
    assert judged.curves["one"].order[0].startswith("decoder.")
    nothing = HeadTable("t", {"a": {0: torch.tensor([float("nan")])}}, {"a": ""})
    with pytest.raises(Refused, match="nothing to rank"):
        ranked_parts(nothing)
    with pytest.raises(UnknownName):
        ranked_parts((table, "c"))


def test_groups_go_through_the_same_test():
    case = native()
    groups = leave_one_head_out(case.model, case.inputs, by="kv-group", draws=0)
    found = compare_rankings(case.model, case.inputs, {"groups": groups}, random=2)
    assert found.curves["groups"].order[0].endswith("]")
    assert found.frame()["chance_low"].notna().all()


def test_classes_of_images():
    vit = hugging_face("vit")
    labels = torch.tensor([0, 1])
    table = first_order(vit.model, vit.inputs, labels=labels, exact=False)
    options = dict(labels=labels, metric="probability", random=2, counts=(1, 4))
    found = compare_rankings(vit.model, vit.inputs, {"first": table}, **options)
    assert found.curves["first"].metric == "probability"
    with torch.no_grad():
        wanted = vit.model.run(vit.inputs).logits.softmax(-1)[torch.arange(2), labels]
    torch.testing.assert_close(found.curves["first"].base, wanted)
    with pytest.raises(UnknownName, match="metric of a class"):
        compare_rankings(vit.model, vit.inputs, {"first": table}, labels=labels, metric="kl")


def test_saved_and_refused(compiled, pairs, tmp_path):
    found = compare_rankings(compiled, pairs, {"one": [(0, 0)], "two": [(1, 1)]}, random=2)
    assert load_result(found.save(tmp_path / "comparison")).type == "RankingComparison"
    assert found.frame()["agreement_two"].isna()[0]
    with pytest.raises(WorkbenchError, match="no ranking given"):
        compare_rankings(compiled, pairs, {})
    with pytest.raises(Refused, match="ranking 'none' names no parts"):
        compare_rankings(compiled, pairs, {"none": []})
    with pytest.raises(WorkbenchError, match="at least 2"):
        compare_rankings(compiled, pairs, {"one": [(0, 0)]}, random=1)
