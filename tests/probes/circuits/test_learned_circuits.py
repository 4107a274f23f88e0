import pytest
import torch

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.circuits.components import ABLATIONS
from workbench.probes.circuits.find import find_circuit, methods
from workbench.probes.circuits.judgement.labels import auroc

LEARNED = ("subnetwork-probing", "edge-pruning", "ugs", "ibcircuit")


def find(model, pairs, name, level="edge", ablation=None, **options):
    chosen = ablation or ("mean" if name == "ibcircuit" else "counterfactual")
    return find_circuit(model, pairs, name, level, chosen, **options)


@pytest.mark.parametrize("mode", ["hard", "soft"])
@pytest.mark.parametrize("name", LEARNED)
def test_the_active_edges_are_found(name, mode, induction, request):
    model = request.getfixturevalue(mode)
    found = find(model, induction, name)
    assert auroc(found, model.ground_truth) >= (0.99 if mode == "soft" else 0.95)
    assert found.scores.min() > 0
    assert found.scores.max() < 1


@pytest.mark.parametrize("name", LEARNED)
def test_the_active_heads_are_found(name, soft, induction):
    options = {"steps": 200, "target": 0.75} if name == "edge-pruning" else {"steps": 100}
    assert auroc(find(soft, induction, name, "node", **options), soft.ground_truth) == 1


@pytest.mark.parametrize("name", ["subnetwork-probing", "ugs"])
def test_the_learned_circuit_is_the_true_one(name, soft, induction):
    assert set(find(soft, induction, name).threshold(0.5).edges) == set(soft.ground_truth.edges)


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("subnetwork-probing", "sparsity", (0.0, 2.0, 500.0)),
        ("ugs", "sparsity", (0.0, 2.0, 500.0)),
        ("edge-pruning", "target", (0.0, 0.9, 20.0)),
        ("ibcircuit", "beta", (0.0, 0.01, 50.0)),
    ],
)
def test_pressure_closes_parts(name, option, values, soft, induction):
    """No pressure keeps every edge open, all of it next to none."""
    counts = [int((find(soft, induction, name, steps=120, **{option: v}).scores > 0.5).sum()) for v in values]
    assert counts[0] == 81
    assert counts[0] > counts[1] >= 4
    assert counts[2] <= 1


@pytest.mark.parametrize("seed", [0, 1])
def test_a_target_beyond_reach_keeps_no_head(soft, induction, seed):
    found = find(soft, induction, "edge-pruning", "node", target=20.0, steps=120, seed=seed)
    assert found.scores.max() < 0.5


@pytest.mark.parametrize("name", LEARNED)
def test_twice_is_bit_identical_and_seeds_differ(name, make, make_pairs):
    model, pairs = make(), make_pairs()
    state = torch.random.get_rng_state()
    first, again, other = (find(model, pairs, name, steps=6, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.scores, again.scores)
    assert not torch.equal(first.scores, other.scores)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.net.parameters())


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("level", ["node", "edge"])
def test_every_ablation_and_place_that_is_declared(name, level, make, make_pairs):
    model, pairs = make(), make_pairs()
    method = methods()[name]
    assert method.training
    assert method.positions
    assert method.levels == ("node", "edge")
    for ablation in method.ablations:
        assert len(find(model, pairs, name, level, ablation, steps=3)) > 0
    apart = find(model, pairs, name, level, steps=3, positions="each")
    whole = find(model, pairs, name, level, steps=3)
    assert len(apart.names) == len(whole.names) * pairs.clean.shape[1]


def test_the_bottleneck_has_one_ablation(make, make_pairs):
    assert [set(methods()[name].ablations) for name in LEARNED] == [set(ABLATIONS)] * 3 + [{"mean"}]
    with pytest.raises(Refused, match="cannot use ablation 'zero'; it has: mean"):
        find(make(), make_pairs(), "ibcircuit", "node", "zero")


def test_native_mixers_can_be_masked(make, make_pairs):
    model, pairs = make(kv_heads=None, mixer="linear-attention"), make_pairs()
    for name in LEARNED:
        assert torch.isfinite(find(model, pairs, name, steps=3).scores).all()


def test_a_mask_at_places_finds_where(soft, induction):
    """The last head's output matters at the answer position alone."""
    found = find(soft, induction, "ugs", "node", positions="each")
    scores = dict(zip(found.names, found.scores.tolist(), strict=True))
    last = int(induction.position[0])
    assert scores[f"a1.h2@{last}"] > 0.5
    assert max(scores[f"a1.h2@{place}"] for place in range(last)) < 0.1


def test_every_prompt_draws_masks_of_its_own(make, make_pairs):
    """With one prompt per step and with several the masks differ, and a short last batch is no trouble."""
    model, pairs = make(), make_pairs(n=5)
    for prompts in (1, 2, 5, 50):
        assert torch.isfinite(find(model, pairs, "ugs", steps=4, prompts=prompts).scores).all()


def test_constants_are_learned_along(make, make_pairs):
    model, pairs = make(), make_pairs()
    fixed, moving = (find(model, pairs, "ugs", "node", "optimal", steps=20, constants_rate=r) for r in (0.0, 0.1))
    assert not torch.equal(fixed.scores, moving.scores)


def test_sources_have_masks_too(soft, induction):
    found = find(soft, induction, "edge-pruning", node_target=0.5, target=0.9)
    frame = found.frame()
    assert (frame.groupby("source")["source_open"].nunique() == 1).all()
    assert (frame["score"] <= frame["source_open"]).all()
    assert auroc(found, soft.ground_truth) >= 0.95
    assert frame.groupby("source")["source_open"].first()[["a0.h1", "a1.h2"]].min() > 0.5


def test_the_objective_can_be_the_metric(soft, induction):
    found = find(soft, induction, "subnetwork-probing", objective="metric", sparsity=8.0)
    assert auroc(found, soft.ground_truth) >= 0.95


def test_scores_do_not_tie_where_logits_differ(soft, induction):
    for name in ("edge-pruning", "ugs"):
        found = find(soft, induction, name, steps=40)
        order = found.columns["logit"].argsort()
        rises = found.columns["logit"][order].diff() > 1e-12
        assert (found.scores[order].diff()[rises] > 0).all()


def test_mistakes_are_told(make, make_pairs):
    model, pairs = make(), make_pairs()
    with pytest.raises(UnknownName, match="kl, metric"):
        find(model, pairs, "ugs", objective="loss")
    with pytest.raises(WorkbenchError, match="between 0 and 1"):
        find(model, pairs, "edge-pruning", start=1.0)
    with pytest.raises(WorkbenchError, match="steps"):
        find(model, pairs, "subnetwork-probing", steps=0)
    with pytest.raises(WorkbenchError, match="window"):
        find(model, pairs, "ugs", window=3.0)
    with pytest.raises(WorkbenchError, match="node_target"):
        find(model, pairs, "edge-pruning", "node", node_target=0.5)
    with pytest.raises(WorkbenchError, match="at least 2 pairs"):
        find(model, pairs[:1], "ibcircuit")
    with pytest.raises(WorkbenchError, match="at least 0"):
        find(model, pairs, "edge-pruning", target=-0.1)
