import pytest
import torch

from workbench.errors import WorkbenchError
from workbench.pairs import Pairs, divergence
from workbench.probes.circuits.components import INPUT, Setting, components
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.masked import masked
from workbench.probes.circuits.optimal import ablation_effects, optimal_constants
from workbench.sites import Site


@pytest.fixture(scope="module")
def toy(make, make_pairs):
    """One linear head over prompts with the same last token: only the head's output differs at the answer."""
    model = make(linear=True, layers=1, heads=1, width=12, head_width=12, vocab=6)
    pairs = make_pairs(n=5, vocab=6)
    clean = pairs.clean.clone()
    clean[:, -1] = 0
    return model, Pairs(clean, pairs.corrupt, pairs.answer, pairs.wrong, pairs.position)


def test_on_a_linear_head_the_optimum_is_the_mean_of_the_distributions(toy):
    model, pairs = toy
    p = model.run(pairs.clean).logits[:, -1].detach().softmax(-1)
    floor = (p * (p / p.mean(0)).log()).sum(-1).mean()  # min_q mean KL(p || q), reached at q = mean p
    found = ablation_effects(model, pairs, steps=300)
    assert floor > 0.01
    assert float(found.scores[0]) == pytest.approx(float(floor), rel=1e-4)
    constant = optimal_constants(Setting.of(model, pairs, None, "zero"), [Site("z", 0)], steps=300)[Site("z", 0)]
    with torch.no_grad():
        run = model.run(pairs.clean, edit={Site("z", 0): lambda z: constant.expand_as(z)})
        whole = model.run(pairs.clean).logits
    q = run.logits[0, -1].softmax(-1)
    torch.testing.assert_close(q, p.mean(0), rtol=0, atol=3e-3)
    assert float(divergence(whole, run.logits, pairs).mean()) == pytest.approx(float(floor), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"kv_heads": None, "mlp_width": 0}])
def test_no_constant_costs_more_than_mean_or_zero(make, make_pairs, options):
    model, pairs = make(**options), make_pairs()
    found = ablation_effects(model, pairs, batch=2)
    assert found.names == tuple(unit.name for unit in components(model))
    for name in ("zero", "mean"):
        assert (found.scores <= found.columns[name] + 1e-12).all()
    assert (found.scores < 0.9 * torch.minimum(found.columns["zero"], found.columns["mean"])).any()


def test_steps_that_overshoot_leave_the_better_of_mean_and_zero(make, make_pairs):
    found = ablation_effects(make(), make_pairs(), steps=2, rate=50.0)
    for name in ("zero", "mean"):
        assert (found.scores <= found.columns[name] + 1e-12).all()


def test_effects_are_those_of_a_loop_over_nodes(make, make_pairs):
    model, pairs = make(), make_pairs()
    found = ablation_effects(model, pairs, batch=2, steps=5)
    whole = model.run(pairs.clean).logits
    for number, unit in enumerate(components(model)):
        at = unit.site.whole
        rows, other = (model.run(ids, read=[at]).acts[at] for ids in (pairs.clean, pairs.corrupt))
        index = (slice(None), slice(None)) if unit.site.head is None else (slice(None), slice(None), unit.site.head)
        for name, new in (
            ("zero", torch.zeros_like(rows)),
            ("mean", rows.mean((0, 1), keepdim=True).expand_as(rows)),
            ("counterfactual", other),
        ):

            def edit(value, index=index, new=new):
                value = value.clone()
                value[index] = new[index]
                return value

            expected = divergence(whole, model.run(pairs.clean, edit={at: edit}).logits, pairs).mean()
            assert float(found.columns[name][number]) == pytest.approx(float(expected), abs=1e-9), (unit.name, name)


def test_the_ablation_uses_these_constants_at_both_levels(make, make_pairs):
    model, pairs = make(), make_pairs()
    setting = Setting.of(model, pairs, None, "optimal")
    found = ablation_effects(model, pairs)
    nodes = masked(setting, "node")
    batch = nodes.prepare(pairs)
    for number in range(len(nodes.names)):
        keep = torch.ones(len(nodes.names))
        keep[number] = 0
        cost = divergence(batch.logits, nodes.logits(batch, keep), pairs).mean()
        assert float(cost) == pytest.approx(float(found.scores[number]), abs=1e-6)
    edges = masked(setting, "edge").prepare(pairs)
    for site, value in edges.instead.items():
        assert value.stride()[:2] == (0, 0), f"{site} is not one constant"
    assert set(edges.instead) == {INPUT, *(Site(k, i) for i in (0, 1) for k in ("result", "mlp_out"))}


def test_parts_do_not_depend_on_their_company_and_repeat(make, make_pairs, monkeypatch):
    model, pairs = make(), make_pairs()
    setting = Setting.of(model, pairs, None, "zero", batch=2)
    sites = [INPUT, Site("z", 0), Site("mlp_out", 1)]
    together, again = (optimal_constants(setting, sites, steps=10) for _ in range(2))
    alone = {site: optimal_constants(setting, [site], steps=10)[site] for site in sites}
    monkeypatch.setattr(Setting, "at_once", 1)
    one_by_one = optimal_constants(setting, sites, steps=10)
    for site in sites:
        assert torch.equal(together[site], again[site])
        torch.testing.assert_close(together[site], alone[site], rtol=0, atol=1e-9)
        torch.testing.assert_close(together[site], one_by_one[site], rtol=0, atol=1e-9)
    assert together[INPUT].shape == (1, 1, model.shape.width)
    assert together[Site("z", 0)].shape == (1, 1, 4, 4)


def test_exact_patching_takes_them_and_nothing_is_left_behind(make, make_pairs):
    model, pairs = make(), make_pairs()
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    found = find_circuit(model, pairs, "patching", "node", "optimal")
    assert found.provenance["ablation"] == "optimal"
    assert all(torch.equal(before[name], value) for name, value in model.net.state_dict().items())
    assert all(parameter.grad is None for parameter in model.net.parameters())


def test_senseless_steps_and_rates_are_refused(make, make_pairs):
    with pytest.raises(WorkbenchError, match="rate > 0"):
        ablation_effects(make(), make_pairs(), rate=0.0)
