import math

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from workbench.circuits import Circuit, circuit_graph
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.judgement.labels import auprc, auroc, recovery
from workbench.results import load_result

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


@pytest.mark.parametrize("seed", range(5))
def test_average_precision_and_auroc_are_scikit_learns(seed):
    generator = torch.Generator().manual_seed(seed)
    n = 40
    names = [f"a{i}.h0" for i in range(n)]
    values = torch.randint(-6, 7, (n,), generator=generator).double()
    inside = torch.rand(n, generator=generator) < 0.2
    truth = Circuit.of("node", names, [name for name, flag in zip(names, inside.tolist(), strict=True) if flag])
    circuit = Circuit("node", names, values, inside)
    for signed in (False, True):
        key = (values if signed else values.abs()).numpy()
        assert auprc(circuit, truth, signed=signed) == pytest.approx(average_precision_score(inside.numpy(), key))
        assert auroc(circuit, truth, signed=signed) == pytest.approx(roc_auc_score(inside.numpy(), key))
    assert recovery(circuit, truth).auprc == auprc(circuit, truth)


def test_average_precision_of_noise_is_the_prevalence():
    generator = torch.Generator().manual_seed(0)
    names = [f"a{i}.h0" for i in range(2000)]
    circuit = Circuit("node", names, torch.rand(2000, generator=generator), torch.ones(2000, dtype=torch.bool))
    result = recovery(circuit, Circuit.of("node", names, names[::10]), draws=50)
    assert result.prevalence == 0.1
    assert result.auprc == pytest.approx(0.1, abs=0.02)
    assert result.auroc == pytest.approx(0.5, abs=0.05)
    assert result.frame().chance.tolist() == [0.5, 0.1]


def test_intervals_draw_parts_within_the_labels():
    generator = torch.Generator().manual_seed(1)
    names = [f"a{i}.h0" for i in range(60)]
    inside = torch.arange(60) < 20
    values = torch.rand(60, generator=generator).double() + 0.4 * inside
    circuit, truth = Circuit("node", names, values, inside), Circuit.of("node", names, names[:20])
    result = recovery(circuit, truth, draws=200, seed=4)
    generator = torch.Generator().manual_seed(4)
    drawn = [
        start + torch.randint(size, (200, size), generator=generator).numpy() for start, size in ((0, 20), (20, 40))
    ]
    rows = []
    for picks in np.concatenate(drawn, axis=1):
        labels, scores = inside.numpy()[picks], values.numpy()[picks]
        rows.append((roc_auc_score(labels, scores), average_precision_score(labels, scores)))
    low, high = np.percentile(rows, [2.5, 97.5], axis=0)
    assert result.auroc_interval.tolist() == pytest.approx([low[0], high[0]])
    assert result.auprc_interval.tolist() == pytest.approx([low[1], high[1]])
    assert result.auroc_interval[0] < result.auroc < result.auroc_interval[1]


def test_recovery_saves_draws_and_says_what_is_undefined(tmp_path):
    truth = Circuit.of("node", NAMES, NAMES[:2])
    result = recovery(scored([3.0, 1.0, 2.0, 0.0, 0.0, 0.0]), truth)
    assert load_result(result.save(tmp_path / "r")).frame().equals(result.frame())
    assert "AUROC" in result.plot().get_title()
    nothing = recovery(scored([3.0, 1.0, 2.0, 0.0, 0.0, 0.0]), Circuit.of("node", NAMES, []))
    assert math.isnan(nothing.auroc)
    assert math.isnan(nothing.auprc)
    assert nothing.auroc_interval.isnan().all()
    assert "nothing to separate" in nothing.note
    nothing.plot()
    with pytest.raises(WorkbenchError, match="at least 20"):
        recovery(scored([0.0] * 6), truth, draws=3)
