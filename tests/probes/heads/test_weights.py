import pytest
import torch
from builders import hugging_face
from natives import CONFIG, make

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.native_net import NativeConfig
from workbench.probes.heads.weights import embedding, folding, grouped, head_weights, unembedding, weight_layers

SERVED = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "gpt2", "gpt_neox", "phi3", "olmo2", "opt"]


def scaled(module):
    """Norm scales that are not 1, biases that are not 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 and "bias" not in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            elif parameter.ndim == 1:
                parameter.zero_()


def proportional(a, b):
    """Rows of a are positive multiples of rows of b."""
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(a.double(), dim=-1), unit(b.double(), dim=-1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SERVED)
def test_folded_weights_read_the_residual_stream(name):
    """Queries, keys and values of the model are positive multiples of what the folded weights make of the stream."""
    case = hugging_face(name)
    scaled(case.net)
    model = case.model
    ids = torch.arange(5)[None] + 3
    # the first position: rotary turns nothing there
    sites = ["q", "k", "v"] if "blocks.1.attn.hook_q" in map(str, model.sites()) else ["rot_q", "rot_k", "v"]
    run = model.run(ids, ["blocks.1.hook_resid_pre", *(f"blocks.1.attn.hook_{s}" for s in sites)])
    x = run.acts["blocks.1.hook_resid_pre"][0, 0]
    found = head_weights(model, 1)
    read = torch.stack([x @ w for w in found.v])
    proportional(read, run.acts["blocks.1.attn.hook_v"][0, 0])
    if name not in ("qwen3", "gemma3", "olmo2"):
        proportional(torch.stack([x @ w for w in found.q]), run.acts[f"blocks.1.attn.hook_{sites[0]}"][0, 0])
        proportional(torch.stack([x @ w for w in found.k]), run.acts[f"blocks.1.attn.hook_{sites[1]}"][0, 0])
    assert found.q.shape[0] % found.k.shape[0] == 0
    assert found.groups.tolist() == [h // (len(found.q) // len(found.k)) for h in range(len(found.q))]


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt"])
def test_the_unembedding_makes_the_models_logits(name):
    case = hugging_face(name)
    scaled(case.net)
    model = case.model
    run = model.run(torch.arange(5)[None] + 3, ["blocks.1.hook_resid_post"])
    x, found = run.acts["blocks.1.hook_resid_post"], unembedding(model)
    logits = run.logits
    if name == "gemma2":
        cap = case.net.config.final_logit_softcapping
        torch.testing.assert_close(cap * torch.tanh(found.logits(x) / cap), logits, atol=1e-5, rtol=1e-5)
    else:
        torch.testing.assert_close(found.logits(x), logits, atol=1e-6, rtol=1e-6)
        relative = logits - logits.mean(-1, keepdim=True)
        torch.testing.assert_close(x @ found.matrix / found.size(x)[..., None], relative, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["rms", "none"])
def test_native_weights(norm):
    model = make(NativeConfig(**{**CONFIG.dict(), "norm": norm, "kv_heads": 1}))
    scaled(model.net)
    run = model.run(torch.arange(4)[None], ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_q", "blocks.1.attn.hook_v"])
    x, found = run.acts["blocks.1.hook_resid_pre"][0, 2], head_weights(model, 1)
    proportional(torch.stack([x @ w for w in found.q]), run.acts["blocks.1.attn.hook_q"][0, 2])
    proportional(torch.stack([x @ w for w in found.v]), run.acts["blocks.1.attn.hook_v"][0, 2])
    assert found.k.shape[0] == 1


@pytest.mark.parametrize("width", [8, 9])
def test_a_norm_is_recognised_by_what_it_does(width):
    layer = torch.nn.LayerNorm(width).double()
    scaled(layer)
    with torch.no_grad():
        layer.bias.copy_(torch.arange(width))
    found = folding(layer, width)
    assert found.centred
    torch.testing.assert_close(found.scale, layer.weight.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.shift, layer.bias.detach(), atol=1e-4, rtol=1e-4)
    rms = torch.nn.RMSNorm(width).double()
    scaled(rms)
    found = folding(rms, width)
    assert not found.centred
    torch.testing.assert_close(found.scale, rms.weight.detach(), atol=1e-4, rtol=1e-4)


def test_the_effective_embedding_is_what_the_first_mlp_makes_of_a_token():
    model = make(NativeConfig(**{**CONFIG.dict(), "positions": "none"}))
    block = model.net.blocks[0]
    with torch.no_grad():
        by_hand = block.mlp(block.ln2(model.net.W_E))
    torch.testing.assert_close(embedding(model, "effective", chunk=7), by_hand)
    assert embedding(model).equal(model.net.W_E)
    with pytest.raises(UnknownName, match="direct, effective"):
        embedding(model, "both")


def test_models_without_such_weights_are_refused_by_name():
    with pytest.raises(Refused, match="no plain projections"):
        head_weights(hugging_face("deepseek_v3").model, 0)
    with pytest.raises(Refused, match="several stacks"):
        head_weights(hugging_face("t5").model, 0)
    with pytest.raises(Refused, match="does not predict next tokens"):
        unembedding(hugging_face("bert").model)
    with pytest.raises(UnknownName, match="attention layer"):
        head_weights(hugging_face("llama").model, 9)
    with pytest.raises(WorkbenchError, match="layers 0 to 1"):
        head_weights(make(), 2)
    with pytest.raises(Refused, match="no plain projections"):
        weight_layers(hugging_face("deepseek_v3").model)


def test_groups():
    values = torch.tensor([1.0, 3.0, 5.0, 5.0])
    assert grouped(values, 2, "kv").tolist() == [2, 5]
    assert grouped(values, 2, "kv-max").tolist() == [3, 5]
    assert grouped(values, 2, "query") is values
    with pytest.raises(UnknownName, match="query, kv, kv-max"):
        grouped(values, 2, "group")
