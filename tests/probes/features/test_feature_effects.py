"""Node effects: every number of a hand-written model, exact patching, completeness, replacements, places, padding, refusals."""

from dataclasses import replace

import pytest
import torch
from feature_nets import coder, hugging, native, pairs_of, written

from workbench.datasets.catalogue import task
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.load import load
from workbench.models.protocol import Tokens
from workbench.pairs import Pairs, logit_difference
from workbench.probes.features.feature_effects import feature_effects
from workbench.probes.features.splice import ERROR
from workbench.sites import Site

SITES = ("blocks.0.hook_resid_pre", "blocks.0.hook_mlp_out", "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out",
         "blocks.1.hook_resid_post")  # fmt: skip
# m = 13 p + 21 q; (p, q) goes from (1, 2) to (3, 1), so that the model loses -5 and the features lose:
WRITTEN = [[-26, 21], [-6, 0], [-12, 7], [6, -4], [-2, -3]]


def table(effects):
    """{name: effect}."""
    return dict(zip(effects.names, effects.effect.tolist(), strict=True))


def dictionaries(model, kinds=("resid_pre", "mlp_out", "z", "resid_post"), **options):
    width = model.shape.width
    layers = range(model.shape.layers)
    return {Site(k, l): coder(width, seed=10 * l + i, **options) for l in layers for i, k in enumerate(kinds)}


@pytest.mark.parametrize("method", ["attribution", "ig", "exact"])
@pytest.mark.parametrize("steps", [1, 10])
def test_every_effect_of_the_written_model(method, steps):
    model, pairs, coders = written()
    found = feature_effects(model, coders, pairs, method=method, steps=steps)
    assert found.sites == SITES
    wanted = {f"{site}/{i}": effect for site, row in zip(SITES, WRITTEN, strict=True) for i, effect in enumerate(row)}
    got = table(found)
    assert got.keys() == wanted.keys()  # the dictionaries leave no error
    for name, effect in wanted.items():
        assert got[name] == pytest.approx(effect, abs=1e-10), name
    assert found.full == pytest.approx(55)
    for site in ("resid_pre", "resid_post"):
        sums = found.completeness().set_index("site")
        name = f"blocks.0.hook_{site}"
        assert sums.loc[name, "sum"] == pytest.approx(-5, abs=1e-10) == sums.loc[name, "difference"]


@pytest.mark.parametrize("ablation", ["counterfactual", "zero", "mean"])
def test_attribution_is_exact_on_a_linear_model(ablation):
    """Attention is a causal mean, there is no norm: the metric is linear in every tensor, so all methods agree to 1e-10."""
    model, pairs = native(linear=True), pairs_of()
    coders = dictionaries(model, ("resid_pre", "z", "resid_post"))
    found = {
        m: feature_effects(model, coders, pairs, method=m, ablation=ablation, positions="each")
        for m in ("attribution", "ig", "exact")
    }
    for method in ("attribution", "ig"):
        assert found[method].names == found["exact"].names
        assert float((found[method].effect - found["exact"].effect).abs().max()) < 1e-10
    sums = found["attribution"].completeness()
    assert (sums["sum"] - sums["difference"]).abs().max() < 1e-10
    assert (found["exact"].feature == ERROR).any()
    assert found["exact"].effect.abs().max() > 0.01


def test_integrated_gradients_add_up_over_a_cut_of_the_model():
    """The sum over one resid_post, error included, is m(clean) - m(corrupted) up to (m'(0) - m'(1)) / (2 steps), with m' the
    slope at the two ends of the path."""
    model, pairs = native(), pairs_of(n=8)
    coders = dictionaries(model, ("resid_post",))
    with torch.no_grad():
        clean, corrupt = (logit_difference(model.run(ids).logits, pairs) for ids in (pairs.clean, pairs.corrupt))
    lost = float((clean - corrupt).mean())
    turned = replace(pairs, clean=pairs.corrupt, corrupt=pairs.clean)
    ends = [feature_effects(model, coders, p, method="attribution").completeness()["sum"] for p in (pairs, turned)]
    for steps in (10, 40):
        sums = feature_effects(model, coders, pairs, steps=steps).completeness()
        assert sums["difference"].tolist() == pytest.approx([lost] * 2, abs=1e-10)
        error, predicted = sums["sum"] - lost, (ends[0] + ends[1]) / (2 * steps)
        assert error.tolist() == pytest.approx(predicted.tolist(), rel=1 / steps, abs=0)


def test_ten_steps_add_up_within_two_percent_on_the_bundled_model():
    model = load("tiny-softmax")
    pairs = task("ioi").build(seed=0, tokenizer=model.tokenizer, n=6)
    coders = {Site("resid_post", layer): coder(128, 256, k=16).float() for layer in range(4)}
    sums = feature_effects(model, coders, pairs).completeness()
    assert (sums["sum"] / sums["difference"]).between(0.98, 1.02).all()


@pytest.mark.parametrize("make", [native, hugging], ids=["native", "llama"])
def test_exact_effects_are_interventions(make):
    """Against a loop that moves one feature's direction at one position in one prompt."""
    model = make()
    pairs = pairs_of(n=2, length=4, vocab=11, low=3)
    site = Site("z", 1)
    made = coder(model.shape.heads * model.shape.head_width)
    found = feature_effects(model, {site: made}, pairs, method="exact", positions="each")
    with torch.no_grad():
        before, after = (model.run(ids, read=[site]).acts[site].flatten(2) for ids in (pairs.clean, pairs.corrupt))
        f, g = made.encode(before), made.encode(after)
        m = logit_difference(model.run(pairs.clean).logits, pairs)
        for name, feature, place, effect in zip(
            found.names, found.feature.tolist(), found.place.tolist(), found.effect.tolist(), strict=True
        ):
            moved = before.clone()
            if feature == ERROR:
                moved[:, place] += (after - made.decode(g) - before + made.decode(f))[:, place]
            else:
                moved[:, place] += (g - f)[:, place, feature, None] * made.W_dec[feature]
            held = moved.view(2, 4, model.shape.heads, -1)
            instead = logit_difference(model.run(pairs.clean, edit={site: held}).logits, pairs)
            assert effect == pytest.approx(float((m - instead).mean()), abs=1e-9), name
    active = {(t, i) for t in range(4) for i in range(made.features) if (f[:, t, i] + g[:, t, i]).any()}
    assert {(p, f) for p, f in zip(found.place.tolist(), found.feature.tolist(), strict=True) if f != ERROR} == active


def test_attribution_is_the_slope_of_exact_patching():
    """dm/df (clean - replaced) against a central difference along each feature."""
    model, pairs, site = native(), pairs_of(n=3), Site("mlp_out", 0)
    made = coder(8)
    found = feature_effects(model, {site: made}, pairs, method="attribution", ablation="zero")
    h = 1e-5
    with torch.no_grad():
        x = model.run(pairs.clean, read=[site]).acts[site]
        f = made.encode(x)
        for feature, effect in zip(found.feature.tolist(), found.effect.tolist(), strict=True):
            step = x - made.decode(f) if feature == ERROR else f[..., feature, None] * made.W_dec[feature]
            up, down = (
                logit_difference(model.run(pairs.clean, edit={site: x + sign * h * step}).logits, pairs)
                for sign in (1, -1)
            )
            assert effect == pytest.approx(float((up - down).mean()) / (2 * h), abs=1e-7)


def test_mean_is_over_the_corrupted_prompts_of_all_batches():
    model, pairs, site = native(), pairs_of(n=5), Site("resid_post", 0)
    made = coder(8)
    found = feature_effects(model, {site: made}, pairs, ablation="mean", positions="each", batch=2)
    with torch.no_grad():
        mean = made.encode(model.run(pairs.corrupt, read=[site]).acts[site]).mean(0)
        own = made.encode(model.run(pairs.clean, read=[site]).acts[site]).mean(0)
    for p, f, clean, replaced in zip(
        found.place.tolist(), found.feature.tolist(), found.clean.tolist(), found.replaced.tolist(), strict=True
    ):
        if f != ERROR:
            assert replaced == pytest.approx(float(mean[p, f]))
            assert clean == pytest.approx(float(own[p, f]))


def test_means_leave_padding_out():
    """Two of five prompts are padded at the first position: the mean there is that of the other three."""
    model, pairs, site = native(), pairs_of(n=5), Site("resid_post", 0)
    made, mask = coder(8), torch.ones(5, 6, dtype=torch.bool)
    mask[:2, 0] = False
    found = feature_effects(model, {site: made}, pairs, ablation="mean", positions="each", mask=mask)
    with torch.no_grad():
        codes = made.encode(model.run(Tokens(pairs.corrupt, mask), read=[site]).acts[site])
    first = found.take(((found.place == 0) & (found.feature != ERROR)).nonzero()[:, 0])
    wanted = codes[2:, 0].mean(0)[first.feature] * 3 / 5  # three of the five pairs have this place
    torch.testing.assert_close(first.replaced, wanted)


def test_batches_and_places_add_up():
    model, pairs = native(), pairs_of(n=5)
    coders = dictionaries(model)
    whole = table(feature_effects(model, coders, pairs))
    assert table(feature_effects(model, coders, pairs, batch=2)) == pytest.approx(whole, abs=1e-12)
    for positions in ("each", "spans"):
        parts = feature_effects(model, coders, pairs, positions=positions)
        sums = {}
        for name, effect in table(parts).items():
            sums[name.split("@")[0]] = sums.get(name.split("@")[0], 0) + effect
        assert sums == pytest.approx(whole, abs=1e-10)
    assert parts.places == ("early", "END", "rest")


def padded(pairs, left):
    """The same prompts with three tokens of padding, and the mask."""
    n, length = pairs.clean.shape
    junk = torch.full((n, 3), 7)
    ids = [torch.cat([junk, x] if left else [x, junk], 1) for x in (pairs.clean, pairs.corrupt)]
    mask = torch.ones(n, length + 3, dtype=torch.bool)
    mask[:, :3] = not left
    mask[:, -3:] = left
    return Pairs(*ids, pairs.answer, pairs.wrong, pairs.position + 3 * left), mask


@pytest.mark.parametrize("make", [native, hugging], ids=["native", "llama"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("ablation", ["counterfactual", "mean"])
def test_padding_takes_no_part(make, left, ablation):
    model = make()
    pairs = pairs_of(n=3, vocab=11, low=3)
    coders = dictionaries(model, ("mlp_out", "resid_post"))
    alone = feature_effects(model, coders, pairs, ablation=ablation)
    longer, mask = padded(pairs, left)
    found = feature_effects(model, coders, longer, ablation=ablation, mask=mask)
    assert table(found) == pytest.approx(table(alone), abs=1e-9)
    assert found.full == pytest.approx(alone.full)
    assert torch.allclose(found.without, alone.without)


@pytest.mark.parametrize(
    "family", [("LlamaForCausalLM", "LlamaConfig"), ("GPTNeoXForCausalLM", "GPTNeoXConfig")], ids=lambda f: f[0]
)
def test_hugging_face_effects_add_up(family):
    model, pairs = hugging(*family), pairs_of(vocab=61, low=3)
    sums = feature_effects(model, dictionaries(model, ("z", "mlp_out", "resid_post")), pairs, steps=30).completeness()
    cut = sums[sums.site.str.contains("resid_post")]
    assert (cut["sum"] - cut["difference"]).abs().max() < 0.05 * cut["difference"].abs().max()


def test_result_is_a_table_that_draws_and_saves(tmp_path):
    from workbench.results import load_result

    model, pairs, coders = written()
    found = feature_effects(model, coders, pairs)
    frame = found.frame()
    assert frame.iloc[0].to_dict() | {"clean": 1.0, "replaced": 3.0} == frame.iloc[0].to_dict()
    assert frame.iloc[0]["site"] == SITES[0]
    assert frame.iloc[0]["effect"] == pytest.approx(-26)
    assert found.plot().get_title() == "10 of 10 features and errors"
    assert len(found.of("blocks.1.hook_mlp_out")) == 2
    with pytest.raises(UnknownName, match="spliced site"):
        found.of("blocks.0.hook_attn_out")
    saved = load_result(found.save(tmp_path / "effects"))
    assert torch.equal(saved.tensors["effect"], found.effect)


def test_refusals():
    model, pairs = native(), pairs_of()
    coders = {"blocks.0.hook_mlp_out": coder(8)}
    with pytest.raises(UnknownName, match="method of feature effects"):
        feature_effects(model, coders, pairs, method="guess")
    with pytest.raises(UnknownName, match="ablation of features 'optimal'"):
        feature_effects(model, coders, pairs, ablation="optimal")
    with pytest.raises(WorkbenchError, match="steps"):
        feature_effects(model, coders, pairs, steps=0)
    with pytest.raises(WorkbenchError, match=r"mask is bool \[5, 6\]"):
        feature_effects(model, coders, pairs, mask=torch.ones(5, 7, dtype=torch.bool))
    hidden = torch.ones_like(pairs.clean, dtype=torch.bool)
    hidden[:, -1] = False
    with pytest.raises(WorkbenchError, match="lies on padding"):
        feature_effects(model, coders, pairs, mask=hidden)
    with pytest.raises(WorkbenchError, match="not a finite number"):
        feature_effects(model, coders, pairs, lambda logits, pairs: logits[:, -1, 0] * float("nan"))
    with pytest.raises(Refused, match="no gradient"):
        feature_effects(model, coders, pairs, lambda logits, pairs: logits[:, -1, 0].detach())
    with pytest.raises(WorkbenchError, match="one length"):
        Pairs(pairs.clean, pairs.corrupt[:, :4], pairs.answer, pairs.wrong, pairs.position)
    model.net.train()
    with pytest.raises(Refused, match="training mode"):
        feature_effects(model, coders, pairs)


def test_silent_dictionaries_are_refused():
    model, pairs, coders = written()
    eye = coders[SITES[0]]
    eye.b_enc.fill_(-100.0)
    eye.b_dec.zero_()
    found = feature_effects(model, {SITES[0]: eye}, pairs)
    assert found.feature.tolist() == [ERROR]  # all is error
    assert found.effect.tolist() == pytest.approx([-5])
