from dataclasses import replace

import pytest
import torch
from builders import hugging_face
from coders_at import coder_at
from natives import CONFIG, DATA, VARIANTS, make

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.features.layer_weights import Norm, Projection
from workbench.probes.features.qk_attribution import qk_attribution
from workbench.probes.features.qk_operator import Side

ONE = DATA[:1]
IDS = torch.arange(9)[None] + 3


def own_score(model, ids, layer, head, p, j, scale):
    """rot_q . rot_k * scale of what the model itself computed."""
    served = model.manifest().sites
    names = [f"blocks.{layer}.attn.hook_rot_{x}" for x in "qk"]
    names = [name if name in served else name.replace("rot_", "") for name in names]
    q, k = (model.run(ids, names).acts[name][0] for name in names)
    return float(q[p, head] @ k[j, head // (q.shape[1] // k.shape[1])]) * scale


@pytest.mark.parametrize("name", VARIANTS)
def test_native_terms_sum_to_the_models_own_score(name):
    model = make(VARIANTS[name])
    coder = coder_at("blocks.1.hook_resid_pre", 16, 20)
    wanted = own_score(model, ONE, 1, 3, 6, 2, 6**-0.5)
    for pair in [(None, None), (coder, None), (None, coder), (coder, coder)]:
        found = qk_attribution(model, ONE, 1, 3, -1, 2, *pair)
        assert abs(found.total - wanted) < 1e-10
        assert abs(found.score - wanted) < 1e-12
        assert found.logit == pytest.approx(wanted, abs=1e-12)
        assert found.values.shape == (len(found.query_terms), len(found.key_terms))


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gpt2", "mistral", "gpt_neox", "phi3", "gemma2", "gemma3", "olmo2", "gpt_oss"]
)
def test_hugging_face_terms_sum_to_the_models_own_score(name):
    """Norms on queries and keys, partial and scaled rotations, learned positions, groups of keys."""
    model = hugging_face(name).model
    scale = model.run(IDS, maps=wb.capture()).maps[1].scores.scale
    coder = coder_at("blocks.1.hook_resid_pre", 32, 20)
    for head in (0, 3):
        wanted = own_score(model, IDS, 1, head, 8, 6, scale)
        for pair in [(None, None), (coder, coder)]:
            found = wb.qk_attribution(model, IDS, 1, head, 8, 6, *pair)
            assert abs(found.total - wanted) < 1e-6  # norms of transformers work in float32
    if name == "gemma2":
        assert found.softcap == 5.0
        assert found.logit == pytest.approx(5 * torch.tensor(wanted / 5).tanh().item(), abs=1e-6)


def test_float32_of_the_bundled_model():
    model = wb.load("tiny-softmax")
    ids = model.tokens("the cat sat on the mat and the cat sat").ids
    for layer, head in [(0, 1), (2, 5), (3, 0)]:
        wanted = own_score(model, ids, layer, head, 8, 3, 0.25)
        coder = coder_at(f"blocks.{layer}.hook_resid_pre", 128, 64, dtype=torch.float32)
        for pair in [(None, None), (coder, coder)]:
            found = qk_attribution(model, ids, layer, head, 8, 3, *pair)
            assert abs(found.total - wanted) < 1e-5 * max(1.0, float(found.values.abs().sum()))


def test_one_pair_of_features_by_hand():
    """f_a f_b d_a W_Q R W_K^T d_b over the sizes of the norm and the scale."""
    model = make(VARIANTS["grouped"])
    coder = coder_at("blocks.1.hook_resid_pre", 16, 20)
    found = qk_attribution(model, ONE, 1, 3, 5, 2, coder, coder)
    x = model.run(ONE, ["blocks.1.hook_resid_pre"]).acts["blocks.1.hook_resid_pre"][0]
    f, attn, norm = coder.encode(x), model.net.blocks[1].attn, model.net.blocks[1].ln1.w
    size = (x.square().mean(-1) + 1e-6).sqrt()
    rates = 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)

    def turned(v, t):  # as complex numbers
        return torch.complex(v[:3], v[3:]) * torch.polar(torch.ones(3, dtype=torch.float64), t * rates)

    for a, left in enumerate(found.query_terms):
        for b, right in enumerate(found.key_terms):
            if left.kind == right.kind == "feature":
                q = turned((f[5, left.number] * coder.W_dec[left.number] * norm / size[5]) @ attn.W_Q[3], 5)
                k = turned((f[2, right.number] * coder.W_dec[right.number] * norm / size[2]) @ attn.W_K[1], 2)
                assert abs(found.values[a, b] - (q * k.conj()).real.sum() * 6**-0.5) < 1e-12
    features = {term.number for term in found.query_terms if term.kind == "feature"}
    assert features == set(f[5].nonzero()[:, 0].tolist())


def test_components_are_what_wrote_the_stream():
    """Without a component the query's part is that of the rest: edits of the stream with the size of the norm held."""
    model = make(replace(VARIANTS["bare"], layers=2, kv_heads=None))
    found = qk_attribution(model, ONE, 1, 2, 5, 3)
    at = [term.kind for term in found.query_terms].index("embedding")
    run = model.run(ONE, ["blocks.1.hook_resid_pre", "hook_embed"])
    x, attn = run.acts["blocks.1.hook_resid_pre"][0], model.net.blocks[1].attn
    wanted = run.acts["hook_embed"][0, 5] @ attn.W_Q[2] @ (x[3] @ attn.W_K[2]) * 6**-0.5
    assert abs(found.values[at].sum() - wanted) < 1e-12


@pytest.mark.parametrize(("name", "layer"), [("llama", 0), ("llama", 1), ("qwen3", 0), ("qwen3", 1)])
def test_without_the_rotation_the_operator_is_another_one(name, layer):
    model = hugging_face(name).model
    weights = wb.head_weights(model, layer)
    x = model.run(IDS, [f"blocks.{layer}.hook_resid_pre"]).acts[f"blocks.{layer}.hook_resid_pre"][0]
    x = x / x.square().mean(-1, keepdim=True).sqrt()
    errors = []
    for p in range(1, 9):
        for j in range(p):
            found = qk_attribution(model, IDS, layer, 1, p, j)
            naive = float(x[p] @ weights.q[1] @ weights.k[0].T @ x[j]) * found.scale
            errors.append(abs(naive - found.score) / abs(found.score))
            assert found.error < 1e-6
    assert sorted(errors)[len(errors) // 2] > 0.3


def test_a_coder_behind_the_norm():
    model = make(VARIANTS["biased"])
    coder = coder_at("blocks.1.ln1.hook_normalized", 16, 20)
    gpt2, behind = hugging_face("gpt2").model, coder_at("blocks.1.ln1.hook_normalized", 32, 20)
    assert qk_attribution(model, ONE, 1, 0, 4, 1, coder, coder).error < 1e-10
    assert qk_attribution(gpt2, IDS, 1, 0, 4, 1, behind, behind).error < 1e-10


def test_norms_with_shifts_on_heads():
    """Layer norms on queries, with biases, one per head and one over all heads without taking a mean away."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(5).double(), torch.randn(3, 5, 4).double(), torch.randn(3, 4).double()
    before, on_head, on_all = torch.nn.LayerNorm(5), torch.nn.LayerNorm(4), torch.nn.RMSNorm(12)
    for norm in (before, on_head, on_all):
        norm.double()
        for parameter in norm.parameters():
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    front = Norm.of(before, 5, x)
    parts = torch.stack([0.3 * x + 1, 0.7 * x - 1])
    made = torch.einsum("d,hde->he", before(x), weight) + bias
    for fitted, joint, wanted in [
        (Norm.of(on_head, 4, x), False, on_head(made[1])),
        (Norm.of(on_all, 12, x), True, on_all(made.flatten()).view(3, 4)[1]),
    ]:
        side = Side(front, Projection(weight, bias, fitted, joint), x, 1, None, "here")
        assert (side.of_stream(parts).sum(0) + side.constant - wanted).abs().max() < 1e-12
    mixed = Projection(weight, bias, Norm.of(torch.nn.LayerNorm(12).double(), 12, x), True)
    with pytest.raises(Refused, match="mixes heads"):
        Side(front, mixed, x, 1, None, "here")


def test_frame_kinds_plot_and_file(tmp_path):
    model = make(VARIANTS["biased"])
    coder = coder_at("blocks.1.hook_resid_pre", 16, 20)
    tokens = wb.Tokens(ONE, torch.ones_like(ONE, dtype=torch.bool), (("<i>", "$", "c", "d", "e", "f", "<i>"),))
    found = qk_attribution(model, tokens, 1, 2, 6, 1, coder, None)
    frame = found.frame()
    assert abs(frame["value"].sum() - found.score) < 1e-10
    assert (frame["value"].abs().diff().dropna() <= 0).all()
    assert abs(found.kinds().to_numpy().sum() - found.score) < 1e-10
    assert {"error", "decoder bias", "bias"} <= set(frame["query_kind"])
    assert "head 0.3" in set(frame["key_term"])
    assert "<i>" not in found._repr_html_()
    assert "&lt;i&gt;" in found._repr_html_()
    found.plot().figure.canvas.draw()
    assert torch.equal(wb.load_result(found.save(tmp_path / "qk")).tensors["values"], found.values)


def test_refusals():
    model = make(VARIANTS["grouped"])
    with pytest.raises(Refused, match="hidden"):
        qk_attribution(model, ONE, 1, 0, 2, 5)
    with pytest.raises(UnknownName, match="head"):
        qk_attribution(model, ONE, 1, 4, 2, 1)
    with pytest.raises(UnknownName, match="layer"):
        qk_attribution(model, ONE, 2, 0, 2, 1)
    for query, key in [(7, 1), (2, -8)]:
        with pytest.raises(UnknownName, match="0 to 6"):
            qk_attribution(model, ONE, 1, 0, query, key)
    with pytest.raises(Refused, match="autoencoder"):
        qk_attribution(model, ONE, 1, 0, 2, 1, coder_at("blocks.0.hook_resid_pre", 16))
    with pytest.raises(Refused, match="autoencoder"):
        qk_attribution(model, ONE, 1, 0, 2, 1, coder_at("blocks.1.hook_resid_pre", 16, 9, "blocks.1.hook_mlp_out"))
    with pytest.raises(WorkbenchError, match="expects 24"):
        qk_attribution(model, ONE, 1, 0, 2, 1, coder_at("blocks.1.hook_resid_pre", 24))
    with pytest.raises(Refused, match="no scores"):
        qk_attribution(
            make(replace(CONFIG, mixer="linear-attention", positions="none", kv_heads=None)), ONE, 1, 0, 2, 1
        )
    with pytest.raises(Refused, match="plain projections"):
        qk_attribution(hugging_face("deepseek_v3").model, IDS, 1, 0, 2, 1)
    with pytest.raises(Refused, match="no linear function"):
        qk_attribution(hugging_face("opt").model, IDS, 1, 0, 2, 1)
