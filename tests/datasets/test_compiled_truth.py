"""The labels of compiled models against exact patching by an independent path, and against cutting edges."""

import pytest
import torch

from workbench.datasets.catalogue import task
from workbench.datasets.models.compile import COMPILERS, compiled, labels, measured, plan
from workbench.datasets.models.compiled.effects import edge_effects
from workbench.errors import Refused, UnknownName
from workbench.models.load import load
from workbench.probes.circuits.find import find_circuit

NAMES = sorted(COMPILERS)
SHORT = {"induction": {"length": 12}, "needle": {"length": 48}}
LEAST = 0.01
"""An effect is non-zero from 1% of the largest on: soft attention leaks about half of that through edges that do nothing."""
IDLE = {
    # halves of what tells the inhibition head the name; each is enough
    "compiled-two-task": {"a0.h0->a1.h0<v>", "input->a1.h0<v>"},
    # the backup rests, and stands in for what the mover loses
    "compiled-ioi": {"a1.h2->a3.h2<q>", "a3.h2->logits", "input->a2.h0<v>", "input->a3.h2<q>", "input->a3.h2<v>"},
    "compiled-backup": {
        "a0.h0->a1.h1<k>",
        "a0.h0->a2.h3<k>",
        "a0.h2->a1.h1<q>",
        "a0.h2->a2.h3<q>",
        "a2.h3->logits",
        "input->a1.h1<v>",
        "input->a2.h3<q>",
        "input->a2.h3<v>",
    },
}


def built(name, model, n, which=0, **options):
    kind, own = plan(name).tasks[which]
    chosen = task(kind, **{**SHORT.get(kind, {}), **own, **options})
    return chosen, chosen.build(seed=0, tokenizer=model.tokenizer, n=n)


def marked(truth, flags):
    return {name for name, flag in zip(truth.names, flags.tolist(), strict=True) if flag}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attention", ["hard", "soft"])
def test_kept_edges_are_those_with_an_exact_effect(name, attention):
    """Exact single-edge patching, as the circuit methods do it, finds the kept edges and gives the stored kind of effects."""
    model = compiled(name, attention)
    chosen, pairs = built(name, model, 24 if model.shape.vocab < 100 else 8)
    exact = find_circuit(model, pairs, method="patching", level="edge", metric=chosen.metric)
    truth = model.ground_truth
    assert exact.names == truth.names
    effect = exact.scores.abs()
    assert marked(truth, effect >= LEAST * effect.max()) == marked(truth, truth.kept)
    torch.testing.assert_close(edge_effects(model, chosen, pairs), exact.scores, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["compiled-ioi", "compiled-greater-than", "compiled-dyck"])
@pytest.mark.parametrize("changed", [{"rotate": 3}, {"norm": "rms", "rotate": 4}], ids=str)
def test_truth_holds_rotated_and_behind_a_norm(name, changed):
    model = compiled(name, **changed)
    chosen, pairs = built(name, model, 32)
    exact = find_circuit(model, pairs, method="patching", level="edge", metric=chosen.metric).scores.abs()
    assert marked(model.ground_truth, exact >= LEAST * exact.max()) == marked(
        model.ground_truth, model.ground_truth.kept
    )


@pytest.mark.parametrize("name", NAMES)
def test_needed_edges_are_those_that_matter_when_cut(name):
    """With zeros in an edge's place the metric moves if and only if the edge is needed, but for what has a substitute."""
    model = compiled(name)
    truth = model.ground_truth
    needed = marked(truth, truth.columns["needed"])
    assert marked(truth, truth.kept) <= needed
    moved = set()
    for which in range(len(plan(name).tasks)):
        chosen, pairs = built(name, model, 32 if model.shape.vocab < 100 else 12, which)
        if chosen.name == "colored-objects":  # the scenes are told apart only where an object stands in both
            again = (pairs.clean == pairs.clean.gather(1, pairs.spans["QUERY"][:, :1])).sum(1)
            first = int((again > 2).nonzero()[0])
            pairs = pairs[first : first + 4]
        zero = find_circuit(model, pairs, "patching", level="edge", ablation="zero", metric=chosen.metric)
        moved |= marked(zero, zero.scores.abs() > 0.02 * zero.scores.abs().max())
    assert moved == needed - IDLE.get(name, set())


@pytest.mark.parametrize("name", ["compiled-ioi", "compiled-two-task", "compiled-histogram"])
def test_stored_effects_are_those_of_every_corruption(name):
    model = load(name)
    truth = model.ground_truth
    for which, (kind, _) in enumerate(plan(name).tasks):
        for corruption in task(kind).corruptions:
            chosen, pairs = built(name, model, 8, which, corruption=corruption)
            found = edge_effects(model, chosen, pairs).abs()
            stored = labels(truth, kind, corruption)
            assert marked(truth, stored.kept) == marked(truth, found >= 0.02 * found.max())
    with pytest.raises(UnknownName, match="no_such"):
        labels(truth, kind, "no_such")


def test_default_labels_are_the_kept_edges():
    for name in NAMES:
        truth = load(name).ground_truth
        kind, own = truth.provenance["task"], truth.provenance["options"]
        assert labels(truth, kind, task(kind, **own).corruption).edges == truth.edges


def test_measuring_adds_a_column_and_grouped_heads_are_refused():
    model = compiled("compiled-sort")
    found = measured(model, plan("compiled-sort"), n=8)
    assert {"effect_sort_resample", "effect_sort_one"} <= set(found.columns)
    grouped = compiled("compiled-sort", kv_heads=1)
    chosen, pairs = built("compiled-sort", grouped, 4)
    with pytest.raises(Refused, match="without kv_heads"):
        edge_effects(grouped, chosen, pairs)
