import math

import pytest
import torch

from workbench.circuits import Circuit, circuit_graph
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.judgement.labels import auroc

NAMES = tuple(f"a0.h{i}" for i in range(6))


def scored(values, **columns):
    return Circuit("node", NAMES, torch.tensor(values), torch.ones(6, dtype=torch.bool), {}, columns)


def pairwise(values, inside):
    """Share of (inside, outside) pairs in the right order, ties counting half."""
    wins = [
        (values[i] > values[j]) + 0.5 * (values[i] == values[j])
        for i in range(6)
        for j in range(6)
        if inside[i] and not inside[j]
    ]
    return sum(wins) / len(wins)


@pytest.mark.parametrize("seed", range(5))
def test_auroc_counts_ordered_pairs_with_ties(seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-3, 4, (6,), generator=generator).double()
    inside = [True, False, True, False, False, True]
    truth = Circuit.of("node", NAMES, [name for name, flag in zip(NAMES, inside, strict=True) if flag])
    assert auroc(scored(values.tolist()), truth) == pytest.approx(pairwise(values.abs().tolist(), inside))
    assert auroc(scored(values.tolist()), truth, signed=True) == pytest.approx(pairwise(values.tolist(), inside))


def test_columns_can_be_judged_too():
    truth = Circuit.of("node", NAMES, NAMES[:2])
    circuit = scored([0.0] * 6, z=torch.tensor([2.0, 3.0, -9.0, 0.0, 0.0, 1.0]), p=torch.full((6,), torch.nan))
    assert auroc(circuit, truth) == 0.5
    assert auroc(circuit, truth, column="z") == 1.0
    with pytest.raises(UnknownName, match="z, p"):
        auroc(circuit, truth, column="probe")
    with pytest.raises(Refused, match="undefined"):
        auroc(circuit, truth, column="p")


def test_nodes_are_judged_by_the_ends_of_the_true_edges():
    graph = circuit_graph(1, 6, mlp=False)
    truth = Circuit.of("edge", graph.edges, ["input->a0.h2<v>", "a0.h2->logits"])
    assert auroc(scored([0.0, 0.1, 9.0, 0.2, 0.3, 0.4]), truth) == 1.0
    with pytest.raises(Refused, match="level='node'"):
        auroc(truth, scored([0.0] * 6))


def test_a_truth_that_is_not_scored_or_not_a_contrast():
    with pytest.raises(WorkbenchError, match="does not score 'a9.h9'"):
        auroc(scored([0.0] * 6), Circuit.of("node", ["a9.h9"], ["a9.h9"]))
    assert math.isnan(auroc(scored([0.0] * 6), Circuit.of("node", NAMES, [])))
    assert math.isnan(auroc(scored([0.0] * 6), Circuit.of("node", NAMES, NAMES)))


def test_methods_recover_the_compiled_mechanism(hard, induction):
    for method in ("patching", "eap-ig"):
        assert auroc(find_circuit(hard, induction, method), hard.ground_truth) == 1.0
        assert auroc(find_circuit(hard, induction, method, "node"), hard.ground_truth) == 1.0
