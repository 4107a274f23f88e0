"""Faithfulness and completeness: limits, a run by hand, means, neurons, errors, padding, refusals."""

import pytest
import torch
from feature_nets import coder, hugging, native, pairs_of

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.pairs import Pairs, logit_difference
from workbench.probes.features.feature_circuit import feature_circuit
from workbench.probes.features.feature_effects import feature_effects
from workbench.probes.features.feature_faithfulness import feature_faithfulness
from workbench.probes.features.neurons import neurons_of
from workbench.probes.features.splice import ERROR, splice
from workbench.sites import Site


def dictionaries(model):
    kinds = ("z", "mlp_out", "resid_post")
    sites = [Site(kind, layer) for layer in range(model.shape.layers) for kind in kinds]
    return {site: coder(model.shape.width, seed=i) for i, site in enumerate(sites)}


@pytest.mark.parametrize("make", [native, hugging], ids=["native", "llama"])
@pytest.mark.parametrize("ablation", ["mean", "counterfactual", "zero"])
def test_limits(make, ablation):
    """Nothing kept is 0, everything taken away is 0; nothing taken away is 1 (everything kept: below)."""
    model, pairs = make(), pairs_of(vocab=11, low=3)
    circuit = feature_circuit(model, dictionaries(model), pairs, ablation=ablation)
    found = feature_faithfulness(model, dictionaries(model), circuit, pairs, ablation=ablation, controls=2)
    assert found.sizes[0] == 0
    assert found.sizes[-1] == len(circuit.effects)
    for inside, outside in ((found.faithfulness, found.completeness), (found.neurons, found.neurons_completeness)):
        assert float(inside[0]) == pytest.approx(0, abs=1e-6)
        assert float(outside[0]) == pytest.approx(1, abs=1e-6)
    if ablation != "mean":  # features that are active on neither side have nothing to be replaced by
        assert float(found.faithfulness[-1]) == pytest.approx(1, abs=1e-6)
    assert float(found.completeness[-1]) != pytest.approx(1, abs=0.1)
    assert found.own_size == len(circuit)
    at = feature_faithfulness(
        model, dictionaries(model), circuit.effects, pairs, ablation=ablation, sizes=[len(circuit)], neurons=False
    )
    assert float(at.faithfulness) == pytest.approx(found.own, abs=1e-9)
    assert float(at.completeness) == pytest.approx(found.own_completeness, abs=1e-9)
    assert found.full == pytest.approx(circuit.effects.full)


@pytest.mark.parametrize("positions", ["all", "each"])
@pytest.mark.parametrize("inside", [True, False])
def test_kept_features_are_those_of_a_run_by_hand(positions, inside):
    """Two sites, ten nodes kept or taken away, by plain edits: code the stream as it arrives, put the mean over the corrupted
    prompts where a node is gone, decode, add the error."""
    model, pairs = native(), pairs_of()
    sites = [Site("mlp_out", 0), Site("resid_post", 1)]
    coders = {site: coder(8, seed=i) for i, site in enumerate(sites)}
    effects = feature_effects(model, coders, pairs, positions=positions, ablation="mean")
    n = 10
    chosen = effects.take(effects.order[:n])
    rows = list(zip(chosen.site.tolist(), chosen.place.tolist(), chosen.feature.tolist(), strict=True))
    assert ERROR in chosen.feature
    with torch.no_grad():
        acts = model.run(pairs.corrupt, read=sites).acts

        def edit_at(number, drop_all=False):
            made, x = coders[sites[number]], acts[sites[number]]
            f0 = made.encode(x)
            mean_f, mean_e = f0.mean(0), (x - made.decode(f0)).mean(0)

            def edit(x):
                f = made.encode(x)
                e = x - made.decode(f)
                for t in range(x.shape[1]):
                    for i in range(made.features + 1):
                        feature = ERROR if i == made.features else i
                        named = (number, t if positions == "each" else 0, feature) in rows
                        if (named == inside) and not drop_all:
                            continue
                        if feature == ERROR:
                            e[:, t] = mean_e[t]
                        else:
                            f[:, t, i] = mean_f[t, i]
                return made.decode(f) + e

            return edit

        values = []
        for drop_all in (False, True):
            run = model.run(pairs.clean, edit={site: edit_at(i, drop_all) for i, site in enumerate(sites)})
            values.append(float(logit_difference(run.logits, pairs).mean()))
        full = float(logit_difference(model.run(pairs.clean).logits, pairs).mean())
    found = feature_faithfulness(model, coders, effects, pairs, sizes=[n], neurons=False, controls=0, batch=2)
    share = found.faithfulness if inside else found.completeness
    assert found.empty == pytest.approx(values[1], abs=1e-9)
    assert float(share) == pytest.approx((values[0] - values[1]) / (full - values[1]), abs=1e-9)


def test_errors_are_nodes_or_kept_or_replaced():
    model, pairs = native(), pairs_of()
    coders = dictionaries(model)
    effects = feature_effects(model, coders, pairs)
    options = {"ablation": "counterfactual", "neurons": False, "controls": 0, "sizes": [0, len(effects)]}
    found = {
        errors: feature_faithfulness(model, coders, effects, pairs, errors=errors, **options)
        for errors in ("nodes", "kept", "replaced")
    }
    assert found["kept"].faithfulness.tolist() == pytest.approx([0, 1], abs=1e-6)
    assert found["kept"].empty != pytest.approx(found["nodes"].empty, abs=1e-3)
    assert found["replaced"].empty == pytest.approx(found["nodes"].empty, abs=1e-9)
    assert float(found["replaced"].faithfulness[1]) != pytest.approx(1, abs=0.01)


def test_neurons_stand_for_the_sites_of_the_coders():
    for model in (native(), hugging()):
        coders = splice(model, dictionaries(model) | {Site("attn_out", 0): coder(model.shape.width)})
        units = neurons_of(coders, pairs_of(vocab=11, low=3).clean[:1])
        assert [site.kind for site in units.sites] == ["z", "mlp_post", "resid_post"] * 2
        run = units.run(pairs_of(vocab=11, low=3).clean)
        assert all(not part.error.any() for part in run.sites.values())
        assert units.coders[Site("mlp_post", 0)].features > model.shape.width


def test_neurons_keep_the_behaviour_when_all_are_kept():
    model, pairs = native(), pairs_of()
    effects = feature_effects(model, dictionaries(model), pairs)
    units = 2 * (8 + 12 + 8)
    found = feature_faithfulness(
        model, dictionaries(model), effects, pairs, sizes=[0, 10, units, len(effects)], controls=0
    )
    assert float(found.neurons[2]) == pytest.approx(1, abs=1e-9)
    assert float(found.neurons_completeness[2]) == pytest.approx(0, abs=1e-9)
    assert found.neurons[3].isnan()
    assert found.neurons_empty == pytest.approx(found.empty)  # the last site's mean is the same, whatever its basis


def test_padding_takes_no_part():
    model, pairs = native(), pairs_of()
    coders = dictionaries(model)
    junk = torch.full((5, 3), 7)
    longer = Pairs(
        torch.cat([pairs.clean, junk], 1),
        torch.cat([pairs.corrupt, junk], 1),
        pairs.answer,
        pairs.wrong,
        pairs.position,
    )
    mask = torch.ones_like(longer.clean, dtype=torch.bool)
    mask[:, 6:] = False
    short = feature_faithfulness(model, coders, feature_effects(model, coders, pairs), pairs, controls=0)
    found = feature_faithfulness(
        model, coders, feature_effects(model, coders, longer, mask=mask), longer, controls=0, mask=mask
    )
    torch.testing.assert_close(found.faithfulness, short.faithfulness)
    torch.testing.assert_close(found.completeness, short.completeness)
    torch.testing.assert_close(found.neurons, short.neurons, equal_nan=True)


def test_what_stands_on_padding_is_not_replaced():
    """A metric that reads the logits of a padded position, behind the last site: nothing that is replaced reaches it."""
    model, pairs, site = native(), pairs_of(), Site("resid_post", 1)
    mask = torch.ones_like(pairs.clean, dtype=torch.bool)
    mask[:, 0] = False

    def metric(logits, batch):
        return logits[:, 0, 0]

    effects = feature_effects(model, {site: coder(8)}, pairs, metric, mask=mask, ablation="zero")
    assert float(effects.without) == pytest.approx(effects.full, abs=1e-12)
    assert not effects.effect.any()
    found = feature_faithfulness(model, {site: coder(8)}, effects, pairs, metric, mask=mask, neurons=False, controls=0)
    assert found.empty == pytest.approx(found.full, abs=1e-12)


def test_undefined_shares_say_so():
    model, pairs = native(), pairs_of()
    coders = dictionaries(model)
    same = Pairs(pairs.clean, pairs.clean, pairs.answer, pairs.wrong, pairs.position)
    effects = feature_effects(model, coders, pairs)
    found = feature_faithfulness(model, coders, effects, same, ablation="counterfactual", neurons=False)
    assert found.faithfulness.isnan().all()
    assert "undefined" in found.note


def test_result_is_a_table_that_draws_and_saves(tmp_path):
    model, pairs = native(), pairs_of()
    coders = dictionaries(model)
    found = feature_faithfulness(model, coders, feature_effects(model, coders, pairs), pairs, controls=2)
    assert list(found.frame().columns) == [
        "nodes", "faithfulness", "completeness", "neurons", "neurons_completeness", "random", "random_low", "random_high",
        "random_completeness",
    ]  # fmt: skip
    assert {text.get_text() for text in found.plot().get_legend().get_texts()} == {"features", "neurons", "random"}
    found.save(tmp_path / "found")


def test_refusals():
    model, pairs = native(), pairs_of()
    coders = dictionaries(model)
    effects = feature_effects(model, coders, pairs)
    with pytest.raises(Refused, match="found with coders at"):
        feature_faithfulness(model, {Site("z", 0): coder(8)}, effects, pairs)
    with pytest.raises(Refused, match="whose coder has 2"):
        feature_faithfulness(model, {site: coder(8, 2, k=1) for site in coders}, effects, pairs)
    with pytest.raises(UnknownName, match="treatment of errors"):
        feature_faithfulness(model, coders, effects, pairs, errors="none")
    with pytest.raises(WorkbenchError, match="sizes"):
        feature_faithfulness(model, coders, effects, pairs, sizes=[10**6])
    with pytest.raises(WorkbenchError, match="controls"):
        feature_faithfulness(model, coders, effects, pairs, controls=-1)
    each = feature_effects(model, coders, pairs, positions="each")
    with pytest.raises(WorkbenchError, match="6 places apart"):
        feature_faithfulness(model, coders, each, pairs_of(length=8))
