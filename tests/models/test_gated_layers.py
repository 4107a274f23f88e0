"""Softmax layers with an output gate: their maps are the gated ones, with the softmax inside as ``raw``."""

import builders as B
import pytest
import torch
from full_precision import FullPrecision

import workbench as wb
from workbench.captures import capture
from workbench.models.hf import HFModel
from workbench.patterns.per_channel import ChannelGatedMap
from workbench.probes.sinks.scores import sinks

GATED = ("qwen3_next", "qwen3_5", "qwen3_5_moe")


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_map_of_a_gated_layer_is_the_gated_one(name, implementation):
    case = B.hugging_face(name, implementation)
    attention = case.net.model.layers[1].self_attn
    seen = {}
    handles = [
        attention.q_proj.register_forward_hook(lambda m, i, o: seen.update(projected=o)),
        attention.v_proj.register_forward_hook(lambda m, i, o: seen.update(v=o)),
        attention.o_proj.register_forward_pre_hook(lambda m, i: seen.update(z=i[0])),
    ]
    with torch.no_grad(), FullPrecision():
        run = case.model.run(case.inputs, read=["blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern"], maps=capture())
    for handle in handles:
        handle.remove()
    found = run.maps[1]
    gate = seen["projected"].view(*case.inputs.shape, B.H, 16)[..., 8:].sigmoid()
    v = seen["v"].unflatten(-1, (B.G, -1)).transpose(1, 2)
    z = seen["z"].unflatten(-1, (B.H, -1))
    assert isinstance(found, ChannelGatedMap)
    assert torch.allclose(found.matvec(v).transpose(1, 2), z, atol=1e-12)
    assert torch.equal(run.acts["blocks.1.attn.hook_z"], z)
    assert torch.allclose(found.dense(), gate.mean(-1).transpose(1, 2)[..., None] * found.raw.dense(), atol=1e-12)
    assert torch.allclose(run.acts["blocks.1.attn.hook_pattern"], found.raw.dense(), atol=1e-12)
    assert torch.allclose(found.raw.row_sums(), torch.ones(1, dtype=torch.float64))
    assert case.model.manifest().layers[1].mixer == "softmax + output gate per channel"


def test_an_edited_pattern_is_gated_too():
    case = B.hugging_face("qwen3_next", "eager")
    sites = ["blocks.1.attn.hook_z", "blocks.1.attn.hook_v"]
    with torch.no_grad():
        run = case.model.run(
            case.inputs, read=sites, maps=capture(), edit={"blocks.1.attn.hook_pattern": lambda p: p / 2}
        )
    z = run.maps[1].matvec(run.acts[sites[1]].transpose(1, 2)).transpose(1, 2)
    assert torch.allclose(z, run.acts[sites[0]], atol=1e-12)


def test_gated_maps_are_stored_with_the_gate_of_every_channel(tmp_path):
    case = B.hugging_face("qwen3_next")
    with torch.no_grad():
        kept = case.model.run(case.inputs, maps=capture(layers=[1])).maps[1]
        case.model.run(case.inputs, maps=capture(layers=[1], blocks=4, store=tmp_path / "maps"))
    found = wb.open_maps(tmp_path / "maps")[1]
    v = torch.randn(2, B.G, 11, 8, dtype=torch.float64)
    assert torch.equal(found.channel_gate, kept.channel_gate)
    assert torch.equal(found.matvec(v), kept.matvec(v))
    assert torch.equal(found.blocks(4), kept.blocks(4))


def test_sinks_of_gated_layers_are_those_of_what_acts():
    case = B.hugging_face("qwen3_next")
    with torch.no_grad():
        found = case.model.run(case.inputs, maps=capture(layers=[1])).maps
    gated, raw = sinks(found), sinks(found, raw=True)
    mean = found[1].gate[:, :, :, None] * found[1].raw.dense()
    assert torch.allclose(gated.paid[1], mean[..., 0].mean(-1), atol=1e-12)
    assert torch.allclose(raw.paid[1], found[1].raw.dense()[..., 0].mean(-1), atol=1e-12)
    assert (gated.paid[1] < raw.paid[1]).all()
    assert torch.allclose(gated.gate[1], found[1].gate.mean((0, 2)), atol=1e-12)


def test_steps_of_gated_layers_are_gated():
    case = B.hugging_face("qwen3_next")
    text = wb.generate(case.model, case.inputs, steps=4, maps=capture(layers=[1]))
    with torch.no_grad():
        whole = case.model.run(text.tokens.ids, maps=capture(layers=[1])).maps[1]
    lo, hi = text.prompt - 1, text.prompt + 3
    assert isinstance(text.maps[1], ChannelGatedMap)
    assert torch.allclose(text.maps[1].dense(), whole.dense()[:, :, lo:hi, :hi], atol=1e-5)
    assert torch.allclose(text.maps[1].channel_gate, whole.channel_gate[:, :, lo:hi], atol=1e-5)


def test_a_gate_that_is_not_modelled_is_said_to_be_missing():
    import transformers as hf

    net = B.net(hf.AfmoeForCausalLM, hf.AfmoeConfig(**B.DECODER, head_dim=8, num_experts=2, num_dense_layers=2))
    assert all("output gate" in record.missing for record in HFModel(net).manifest().layers)
    assert "gate" not in B.hugging_face("llama").model.manifest().layers[0].missing
