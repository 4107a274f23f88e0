import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.circuits import Circuit, circuit_graph
from workbench.errors import WorkbenchError
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.judgement.compare import compare_circuits
from workbench.results import load_result

NAMES = tuple(f"a0.h{i}" for i in range(6))


def nodes(*kept, names=NAMES):
    return Circuit.of("node", names, [NAMES[i] for i in kept])


def by_counting(size_a, size_b, common, n=6):
    """Expected overlap, expected IoU and p over all pairs of subsets of these sizes."""
    fixed = set(range(size_a))
    found = [len(fixed & set(other)) for other in itertools.combinations(range(n), size_b)]
    iou = sum(k / (size_a + size_b - k) for k in found) / len(found)
    return sum(found) / len(found), iou, sum(k >= common for k in found) / len(found)


@given(st.sets(st.integers(0, 5), min_size=1), st.sets(st.integers(0, 5), min_size=1))
def test_overlaps_and_chance_are_those_of_all_subsets(left, right):
    result = compare_circuits(nodes(*left), nodes(*right))
    common = len(left & right)
    row = result.frame().iloc[0]
    assert (row.level, row.parts, row.a, row.b, row.common) == ("node", 6, len(left), len(right), common)
    assert row.iou == pytest.approx(common / len(left | right))
    assert row.min_overlap == pytest.approx(common / min(len(left), len(right)))
    assert row.overlap == pytest.approx(common / len(left))
    expected, iou, p = by_counting(len(left), len(right), common)
    assert (row.expected, row.expected_iou, row.p) == pytest.approx((expected, iou, p))
    assert row.expected_low <= row.expected <= row.expected_high


def test_the_published_overlap_is_of_the_first_circuit():
    graph = [f"a{layer}.h{head}" for layer in range(24) for head in range(16)]
    first, second = Circuit.of("node", graph, graph[:32]), Circuit.of("node", graph, graph[7:45])
    result = compare_circuits(first, second)
    assert float(result.overlap[0]) == 25 / 32
    assert float(compare_circuits(second, first).overlap[0]) == 25 / 38
    assert float(result.expected[0]) == pytest.approx(32 * 38 / 384)
    assert float(result.p_value[0]) < 1e-12


def test_edges_are_compared_as_edges_and_by_their_nodes():
    graph = circuit_graph(2, 4, mlp=False)
    a = Circuit.of("edge", graph.edges, ["input->a0.h1<v>", "a0.h1->a1.h2<k>", "a1.h2->logits"])
    b = Circuit.of("edge", graph.edges[::-1], ["input->a0.h1<k>", "a0.h1->a1.h2<v>", "a1.h2->logits"])
    table = compare_circuits(a, b).frame().set_index("level")
    assert table.common.to_dict() == {"edge": 1, "node": 2}
    assert table.parts.to_dict() == {"edge": 81, "node": 8}
    assert table.iou.to_dict() == pytest.approx({"edge": 1 / 5, "node": 1})


def test_a_circuit_of_edges_and_one_of_nodes_meet_at_nodes():
    graph = circuit_graph(1, 6, mlp=False)
    edges = Circuit.of("edge", graph.edges, ["input->a0.h2<v>", "a0.h2->logits"])
    result = compare_circuits(edges, nodes(2, 4))
    assert result.frame().iloc[0][["level", "parts", "a", "b", "common"]].tolist() == ["node", 6, 1, 2, 1]
    assert math.isnan(result.spearman)
    assert "no rank correlation" in result.note


def test_places_are_compared_and_then_left_out():
    names = [f"a0.h{h}@{place}" for h in range(3) for place in ("S", "END")]
    a, b = Circuit.of("node", names, ["a0.h0@S", "a0.h1@S"]), Circuit.of("node", names, ["a0.h0@END", "a0.h1@S"])
    table = compare_circuits(a, b).frame().set_index("level")
    assert table.common.to_dict() == {"node at place": 1, "node": 2}
    assert table.parts.to_dict() == {"node at place": 6, "node": 3}


def test_rank_correlations_are_of_the_scores_by_name():
    a = Circuit("node", NAMES, torch.tensor([1.0, 2, 3, 4, 5, 6]), torch.ones(6, dtype=torch.bool))
    b = Circuit("node", NAMES[::-1], torch.tensor([7.0, 5, 4, 3, 2, 1]), torch.ones(6, dtype=torch.bool))
    result = compare_circuits(a, b)
    assert (result.spearman, result.kendall) == pytest.approx((1, 1))
    turned = compare_circuits(a, b.rescored(b.scores.flip(0)))
    assert (turned.spearman, turned.kendall) == pytest.approx((-1, -1))
    swapped = compare_circuits(a, a.rescored(torch.tensor([2.0, 1, 3, 4, 5, 6])))
    assert swapped.kendall == pytest.approx(1 - 2 / 15)
    assert swapped.spearman == pytest.approx(1 - 6 * 2 / (6 * 35))


def test_undefined_and_impossible_comparisons(tmp_path):
    nothing = compare_circuits(nodes(), nodes(1))
    assert nothing.overlap.isnan().all()
    assert nothing.min_overlap.isnan().all()
    assert nothing.iou.tolist() == [0]
    assert "all scores of one circuit are equal" in nothing.note
    assert compare_circuits(nodes(), nodes()).iou.isnan().all()
    with pytest.raises(WorkbenchError, match=r"a0\.h0.*one of them only"):
        compare_circuits(nodes(1), nodes(1, names=NAMES[1:]))
    result = compare_circuits(nodes(1, 2), nodes(2, 3))
    assert load_result(result.save(tmp_path / "c")).frame().equals(result.frame())
    result.plot()


def test_methods_agree_on_a_soft_model(soft, induction):
    exact, eap = (find_circuit(soft, induction, name) for name in ("patching", "eap"))
    result = compare_circuits(exact.top(4), eap.top(4))
    assert result.iou.tolist() == [1, 1]
    assert float(result.p_value[0]) < 1e-5
