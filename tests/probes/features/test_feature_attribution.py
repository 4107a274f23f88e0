from dataclasses import replace

import pytest
import torch
from builders import hugging_face
from coders_at import coder_at
from hypothesis import given, settings
from hypothesis import strategies as st
from natives import CONFIG, DATA, VARIANTS, by_hand, make, words

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.features.feature_attribution import feature_attribution

ONE = DATA[:1]
SITES = ("attn.hook_z", "hook_attn_out", "hook_resid_pre", "ln1.hook_normalized", "hook_resid_post")
WITH_MLP = ("hook_resid_mid", "hook_mlp_in", "ln2.hook_normalized")


def width(model, site):
    return model.shape.heads * model.shape.head_width if site.endswith("hook_z") else model.shape.width


def own(model, coder, ids, site):
    """The coder's pre-activations of what the model has at the site, [T, F]."""
    return coder.pre(model.run(ids, [site]).acts[site][0].flatten(1).to(coder.W_enc)).detach()


@pytest.mark.parametrize("name", VARIANTS)
def test_native_sums_are_the_pre_activations(name):
    model = make(VARIANTS[name])
    sites = [f"blocks.1.{site}" for site in (*SITES, *(WITH_MLP if VARIANTS[name].mlp_width else ()))]
    for site in [*sites, "ln_final.hook_normalized"]:
        coder = coder_at(site, width(model, site))
        found = feature_attribution(coder, model, ONE, [2, 5], [6, 3])
        pre = own(model, coder, ONE, site)[[6, 3]][:, [2, 5]].T
        assert (found.pre - pre).abs().max() == 0
        assert (found.total - pre).abs().max() < 1e-10
        assert found.positions == (6, 3)
        assert found.features == (2, 5)
        if CONFIG.causal and name != "both ways":
            assert not found.values[:, 1, :, 4:].any()


@pytest.mark.parametrize("name", ["grouped", "gated", "biased", "both ways"])
def test_every_number_is_weight_times_value(name):
    """z coders: A from plain matrix products, gates in it; v read from the model."""
    model = make(VARIANTS[name])
    _, patterns = by_hand(model.net, ONE[0])
    v = model.run(ONE, ["blocks.1.attn.hook_v"]).acts["blocks.1.attn.hook_v"][0]
    coder = coder_at("blocks.1.attn.hook_z", 24)
    found = feature_attribution(coder, model, ONE, [7], [5])
    for h, component in enumerate(found.components):
        assert component == ("head", 1, h)
        for s in range(7):
            wanted = patterns[1][h, 5, s] * (v[s, h // 2] @ coder.W_enc[h * 6 : h * 6 + 6, 7])
            assert abs(found.values[0, 0, h, s] - wanted) < 1e-12
    assert abs(found.constants["coder"][0, 0] - (coder.b_enc[7] - coder.b_dec @ coder.W_enc[:, 7])) < 1e-12


def test_removing_a_value_removes_its_numbers():
    model = make(VARIANTS["biased"])
    site = "blocks.1.hook_attn_out"
    coder = coder_at(site, 16)
    found = feature_attribution(coder, model, ONE, [1], [-1])

    def blank(v):
        v = v.clone()
        v[:, 2, 1] = 0
        return v

    run = model.run(ONE, [site], {"blocks.1.attn.hook_v": blank})
    dropped = found.pre[0, 0] - coder.pre(run.acts[site][0, -1:])[0, 1]
    assert abs(found.values[0, 0, 2:, 2].sum() - dropped) < 1e-12  # query heads 2 and 3 read values of group 1


def test_a_coder_behind_a_norm_reads_components_with_the_size_held():
    """Pushed along one component with the size of the norm held, the pre-activation moves by that component's number."""
    model = make(VARIANTS["grouped"])
    site = "blocks.1.ln2.hook_normalized"
    coder = coder_at(site, 16)
    found = feature_attribution(coder, model, ONE, [4], [3])
    run = model.run(ONE, ["blocks.1.hook_resid_mid", "blocks.0.hook_mlp_out"])
    x, norm = run.acts["blocks.1.hook_resid_mid"][0, 3], model.net.blocks[1].ln2
    size = (x.square().mean() + 1e-6).sqrt()
    wanted = (run.acts["blocks.0.hook_mlp_out"][0, 3] / size * norm.w) @ coder.W_enc[:, 4]
    at = found.components.index(("mlp", 0, -1))
    assert abs(found.by_component[0, 0, at] - wanted) < 1e-12
    assert found.values[0, 0, at].nonzero().tolist() == [[3]]


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gpt2", "mistral", "gemma2", "gpt_neox", "phi3", "olmo2", "opt", "gpt_oss"]
)
def test_hugging_face_sums(name):
    model = hugging_face(name).model
    ids = torch.arange(9)[None] + 3
    normed = "blocks.1.ln2.hook_normalized"
    sites = ["blocks.1.attn.hook_z", "blocks.1.hook_attn_out", "blocks.1.hook_resid_post", "blocks.0.hook_resid_mid"]
    for site in [*sites, *([normed] if normed in model.manifest().sites else [])]:
        coder = coder_at(site, width(model, site))
        found = feature_attribution(coder, model, ids, [1, 3], [-1, 4])
        pre = own(model, coder, ids, site)[[8, 4]][:, [1, 3]].T
        assert (found.total - pre).abs().max() < 1e-6  # norms of transformers work in float32
        kinds = {component.kind for component in found.components}
        assert ("position" in kinds) == (name == "gpt2" and ("resid" in site or site == normed))


def test_gates_per_channel_are_in_the_numbers():
    case = hugging_face("qwen3_next")
    model, ids = case.model, case.inputs[:1]
    layer = next(r.layer for r in model.manifest().layers if "gate per channel" in r.mixer)
    site = f"blocks.{layer}.attn.hook_z"
    z = model.run(ids, [site]).acts[site]
    coder = coder_at(site, z[0, 0].numel())
    found = feature_attribution(coder, model, ids, [0], [-1])
    assert found.error < 1e-6
    assert abs(found.pre) > 1e-3


@pytest.mark.parametrize("mixer", ["sigmoid-attention", "deltanet", "sink-logits", "rwkv-4", "mamba"])
def test_variants_through_their_own_map(mixer):
    """Weights of one sign or not, of rows that sum to anything, of every channel by itself."""
    model = make(replace(CONFIG, mixer=mixer, positions="none", kv_heads=None))
    coder = coder_at("blocks.1.attn.hook_z", 24)
    found = feature_attribution(coder, model, ONE, [0, 1], [-1, 2])
    assert found.error < 1e-10
    assert not found.values[:, 1, :, 3:].any()


def test_variants_whose_map_does_not_multiply_the_values_are_refused():
    model = make(replace(CONFIG, mixer="lightning-attention", positions="none", kv_heads=None))
    with pytest.raises(Refused, match="not the map times the values"):
        feature_attribution(coder_at("blocks.1.attn.hook_z", 24), model, ONE, 0)


def test_only_rows_of_the_positions_are_made(monkeypatch):
    asked = []
    rows = SoftmaxMap.rows
    monkeypatch.setattr(SoftmaxMap, "rows", lambda self, lo, hi: asked.append((lo, hi)) or rows(self, lo, hi))
    model = make(VARIANTS["grouped"])
    ids = torch.randint(0, 23, (1, 60), generator=torch.Generator().manual_seed(0))
    found = feature_attribution(coder_at("blocks.1.hook_resid_post", 16), model, ids, [0], [50, 7])
    assert set(asked) == {(50, 51), (7, 8)}
    assert found.error < 1e-10


def test_float32_of_the_bundled_model():
    model = wb.load("tiny-softmax")
    text = "the cat sat on the mat and the cat sat"
    for site in ("blocks.2.attn.hook_z", "blocks.3.ln2.hook_normalized"):
        coder = coder_at(site, 128, 64, dtype=torch.float32)
        found = wb.feature_attribution(coder, model, text, range(8), [-1, 3])
        assert found.error <= 1e-5 * max(1.0, float(found.values.abs().sum((2, 3)).max()))


@settings(max_examples=15, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]),
    length=st.integers(1, 9),
    mixer=st.sampled_from(["softmax", "gated-softmax"]),
    bias=st.booleans(),
    site=st.sampled_from(["blocks.1.attn.hook_z", "blocks.0.hook_attn_out", "blocks.1.hook_resid_post"]),
    seed=st.integers(0, 99),
)
def test_any_sizes(heads, length, mixer, bias, site, seed):
    model = make(replace(CONFIG, heads=heads[0], kv_heads=heads[1], mixer=mixer, bias=bias))
    ids = torch.randint(0, 23, (1, length), generator=torch.Generator().manual_seed(seed))
    found = feature_attribution(coder_at(site, width(model, site), seed=seed), model, ids, [0, 8], [-1, 0])
    assert found.error < 1e-10


def test_frame_plot_page_and_file(tmp_path):
    model = make(VARIANTS["grouped"], tokenizer=words())
    coder = coder_at("blocks.1.attn.hook_z", 24)
    tokens = wb.Tokens(ONE, torch.ones_like(ONE, dtype=torch.bool), (("<script>", "$a", "b", "c", "d", "e", "f"),))
    found = feature_attribution(coder, model, tokens, [2, 3], [-1, 1])
    frame = found.frame()
    sums = frame.groupby(["feature", "position"]).value.sum()
    assert abs(sums.loc[2, 6] - float(found.pre[0, 0])) < 1e-12
    assert list(frame.columns[:4]) == ["feature", "position", "token", "component"]
    page = found._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert found.plot(feature=3, position=1).get_title().startswith("feature 3 at 1")
    with pytest.raises(UnknownName, match="feature"):
        found.plot(feature=8)
    saved = wb.load_result(found.save(tmp_path / "found"))
    assert torch.equal(saved.tensors["values"], found.values)


def test_refusals():
    model = make(VARIANTS["grouped"])
    coder = coder_at("blocks.1.attn.hook_z", 24)
    with pytest.raises(UnknownName, match="feature"):
        feature_attribution(coder, model, ONE, 9, 0)
    for position in (7, -8):
        with pytest.raises(UnknownName, match="0 to 6"):
            feature_attribution(coder, model, ONE, 0, position)
    with pytest.raises(WorkbenchError, match="one text"):
        feature_attribution(coder, model, DATA, 0, 0)
    with pytest.raises(Refused, match="transcoder"):
        feature_attribution(coder_at("blocks.1.hook_mlp_out", 16), model, ONE, 0, 0)
    with pytest.raises(WorkbenchError, match="expects 16"):
        feature_attribution(coder_at("blocks.1.attn.hook_z", 16), model, ONE, 0, 0)
    with pytest.raises(WorkbenchError, match="layers 0 to 1"):
        feature_attribution(coder_at("blocks.2.attn.hook_z", 24), model, ONE, 0, 0)
    with pytest.raises(WorkbenchError, match="site="):
        feature_attribution(coder_at(None, 24), model, ONE, 0, 0)
    two = coder_at(["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"], 32)
    with pytest.raises(Refused, match="reads 2 sites"):
        feature_attribution(two, model, ONE, 0, 0)
    with pytest.raises(Refused, match="norms stand behind"):
        feature_attribution(coder_at("blocks.1.hook_resid_pre", 32), hugging_face("bert").model, ONE, 0, 0)
    with pytest.raises(Refused, match="plain projections"):
        feature_attribution(coder_at("blocks.1.hook_resid_pre", 32), hugging_face("deepseek_v3").model, ONE, 0, 0)


def test_a_map_that_is_not_the_models_own_is_refused(monkeypatch):
    rows = SoftmaxMap.rows
    monkeypatch.setattr(SoftmaxMap, "rows", lambda self, lo, hi: rows(self, lo, hi) * 1.01)
    with pytest.raises(Refused, match="not the map times the values"):
        feature_attribution(coder_at("blocks.1.attn.hook_z", 24), make(VARIANTS["grouped"]), ONE, 0, 0)
