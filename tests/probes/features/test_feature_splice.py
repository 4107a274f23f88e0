"""Splicing changes no bit of a run, and gradients lead to features and errors; what cannot be spliced is refused."""

import pytest
import torch
from feature_nets import coder, hugging, native, pairs_of

from workbench.coders.catalogue import make_coder
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Tokens
from workbench.pairs import logit_difference
from workbench.probes.features.splice import splice
from workbench.sites import Site

KINDS = {"resid_pre": 8, "z": 8, "attn_out": 8, "resid_mid": 8, "mlp_post": 12, "mlp_out": 8, "resid_post": 8}
FAMILIES = [
    ("LlamaForCausalLM", "LlamaConfig"),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig"),
    ("GPT2LMHeadModel", "GPT2Config"),
    ("Gemma2ForCausalLM", "Gemma2Config"),
]


def everywhere(widths=KINDS, layers=2, **options):
    return {Site(kind, layer): coder(width, **options) for layer in range(layers) for kind, width in widths.items()}


@pytest.mark.parametrize("kind", ["relu", "topk", "jumprelu", "gated", "batchtopk", "matryoshka", "p-anneal"])
def test_logits_are_those_of_the_plain_run_bit_by_bit(kind):
    model, pairs = native(), pairs_of()
    plain = model.run(pairs.clean).logits
    spliced = splice(model, everywhere(kind=kind))
    for cut in (False, True):
        assert torch.equal(spliced.run(pairs.clean, cut=cut).logits, plain)
    with torch.no_grad():
        assert torch.equal(spliced.run(pairs.clean).logits, plain)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f[0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hugging_face_models_are_spliced_bit_by_bit(family, dtype):
    options = {"n_embd": 32, "n_layer": 2, "n_head": 4} if "GPT2" in family[0] else {"head_dim": 8}
    model = hugging(*family, **options)
    model.model.to(dtype)
    kinds = [
        k
        for k in ("resid_pre", "z", "attn_out", "mlp_out", "resid_post")
        if f"blocks.0.{Site(k, 0).hook[9:]}" in model.manifest().sites
    ]
    assert {"z", "mlp_out", "resid_post"} <= set(kinds)
    spliced = splice(model, everywhere(dict.fromkeys(kinds, 32)))
    ids = pairs_of(vocab=61, low=3).clean
    run = spliced.run(ids)
    with torch.no_grad():
        plain = model.run(ids).logits
    assert torch.equal(run.logits, plain)
    assert run.logits.requires_grad
    leaf = run.sites[Site("z", 0)].features
    (grad,) = torch.autograd.grad(run.logits.float().sum(), leaf)
    assert grad.abs().sum() > 0


def test_parts_add_up_and_gradients_reach_them():
    """x = f W_dec + b_dec + eps; dm/df = dm/dx W_dec^T and dm/deps = dm/dx with dm/dx of the model without coders."""
    model, pairs = native(), pairs_of()
    sites = [Site("mlp_out", 0), Site("resid_post", 0), Site("z", 1), Site("resid_post", 1)]
    coders = {site: coder(8, seed=i) for i, site in enumerate(sites)}
    run = splice(model, coders).run(pairs.clean)
    metric = logit_difference(run.logits, pairs).sum()
    leaves = {}

    def keep(site):
        def edit(value):
            leaves[site] = value.detach().requires_grad_() if not value.requires_grad else value
            return leaves[site].clone()

        return edit

    plain = model.run(pairs.clean, edit={site: keep(site) for site in sites})
    slopes = torch.autograd.grad(logit_difference(plain.logits, pairs).sum(), [leaves[site] for site in sites])
    for site, slope in zip(sites, slopes, strict=True):
        part, slope = run.sites[site], slope.flatten(2)
        x = part.features @ coders[site].W_dec + coders[site].b_dec + part.error
        torch.testing.assert_close(x, leaves[site].flatten(2), rtol=1e-12, atol=1e-12)
        f, eps = torch.autograd.grad(metric, [part.features, part.error], retain_graph=True)
        torch.testing.assert_close(f, slope @ coders[site].W_dec.T, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(eps, slope, rtol=1e-10, atol=1e-12)


def test_cut_gradients_end_at_the_nearest_site():
    model, pairs = native(), pairs_of()
    first, middle, last = Site("resid_pre", 0), Site("resid_post", 0), Site("resid_post", 1)
    spliced = splice(model, {site: coder(8) for site in (last, first, middle)})
    assert spliced.sites == (first, middle, last)  # the order of computation, whatever was passed
    run = spliced.run(pairs.clean, cut=True)
    code = run.sites[last].encoded.sum()
    grads = torch.autograd.grad(code, [run.sites[s].features for s in (first, middle)], allow_unused=True)
    assert grads[0] is None
    assert grads[1].abs().sum() > 0
    torch.testing.assert_close(run.sites[last].encoded, run.sites[last].features)
    open_run = spliced.run(pairs.clean)
    (through,) = torch.autograd.grad(open_run.logits.sum(), open_run.sites[first].features)
    assert through.abs().sum() > 0


def test_changed_features_change_what_the_model_reads():
    model, pairs = native(), pairs_of()
    site = Site("resid_post", 0)
    made = coder(8)

    def change(at, f, eps):
        return torch.zeros_like(f), torch.zeros_like(eps)

    run = splice(model, {site: made}).run(pairs.clean, change)
    by_hand = model.run(pairs.clean, edit={site: lambda x: made.b_dec.expand_as(x)}).logits
    torch.testing.assert_close(run.logits, by_hand)


def test_coders_that_know_their_site():
    model, made = native(), coder(8)
    made.about = {"reads": ["blocks.1.hook_mlp_out"], "writes": ["blocks.1.hook_mlp_out"]}
    assert splice(model, [made]).sites == (Site("mlp_out", 1),)
    with pytest.raises(WorkbenchError, match="does not say where"):
        splice(model, [coder(8)])


def test_refusals():
    model, pairs, made = native(), pairs_of(), coder(8)
    with pytest.raises(UnknownName, match="blocks.7.hook_mlp_out"):
        splice(model, {"blocks.7.hook_mlp_out": made})
    with pytest.raises(Refused, match="two coders at blocks.0.hook_mlp_out"):
        splice(model, {"blocks.0.hook_mlp_out": made, Site("mlp_out", 0): made})
    with pytest.raises(Refused, match="width 8, and random has 12"):
        splice(model, {"blocks.0.mlp.hook_post": made}).run(pairs.clean)
    with pytest.raises(Refused, match="whole tensors"):
        splice(model, {"blocks.0.attn.hook_z[1]": made})
    with pytest.raises(Refused, match="whole tensors"):
        splice(model, {"blocks.0.attn.hook_pattern": made})
    with pytest.raises(WorkbenchError, match="no coder"):
        splice(model, {"blocks.0.hook_mlp_out": torch.nn.Linear(8, 8)})
    with pytest.raises(WorkbenchError, match="there are no coders"):
        splice(model, {})
    with pytest.raises(Refused, match="autoencoders"):
        splice(model, {"blocks.0.hook_mlp_out": make_coder("relu", 8, 16, d_out=4)})
    trans = make_coder("relu", 8, 16, d_out=8)
    trans.about = {"reads": ["blocks.0.hook_mlp_in"], "writes": ["blocks.0.hook_mlp_out"]}
    with pytest.raises(Refused, match="transcoder"):
        splice(model, {"blocks.0.hook_mlp_out": trans})
    with pytest.raises(Refused, match="transcoder"):
        splice(model, {"blocks.0.hook_mlp_out": make_coder("relu", 8, 16, skip=True)})


def test_numbers_that_are_not_finite_are_refused():
    model, pairs = native(), pairs_of()
    broken = coder(8)
    broken.W_enc[0, 0] = float("nan")
    with pytest.raises(WorkbenchError, match=r"coder at blocks\.0\.hook_mlp_out gives numbers that are not finite"):
        splice(model, {"blocks.0.hook_mlp_out": broken}).run(pairs.clean)
    model.net.blocks[0].mlp.b_out.data[0] = float("nan")
    with pytest.raises(WorkbenchError, match="random has numbers that are not finite"):
        splice(model, {"blocks.0.hook_mlp_out": coder(8)}).run(pairs.clean)


def test_padding_reaches_the_model():
    model, pairs = native(), pairs_of()
    mask = torch.ones_like(pairs.clean, dtype=torch.bool)
    mask[:, 4:] = False
    tokens = Tokens(pairs.clean, mask)
    run = splice(model, everywhere()).run(tokens)
    assert torch.equal(run.logits, model.run(tokens).logits)
