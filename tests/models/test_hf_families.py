"""Maps of every Hugging Face family against the family's own eager attention."""

import sys

import builders as B
import pytest
import torch
import transformers as hf
from torch.overrides import TorchFunctionMode

from workbench.captures import capture
from workbench.errors import Refused
from workbench.models.hf import HFModel
from workbench.sites import Site


class FullPrecision(TorchFunctionMode):
    """Many eager attentions cast their scores to float32; with float64 scores that cast is left out."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.softmax and args[0].dtype == torch.float64:
            kwargs.pop("dtype", None)
        if func is torch.Tensor.float and args[0].dtype == torch.float64 and args[0].ndim > 2:
            return args[0]
        return func(*args, **kwargs)


def forward(net, given, **options):
    return net(**(given if isinstance(given, dict) else {"input_ids": given}), **options)


def eager_attentions(name, dtype, source):
    """Attention weights of an eager copy by map key: from its outputs, where they list every layer, or its modules."""
    net = B.NETS[name]("eager", dtype)
    net.load_state_dict(source.net.state_dict())
    seen = {}
    for layer in source.model._layers:
        net.get_submodule(layer.path).register_forward_hook(lambda m, i, o, k=layer.key: seen.__setitem__(k, o[-1]))
    with torch.no_grad(), FullPrecision():
        out = forward(net, source.inputs, output_attentions=True)
    if name == "swin":  # lists one entry per stage
        return seen
    if "encoder_attentions" in out:
        stacks = {"encoder": out.encoder_attentions, "decoder": out.decoder_attentions, "cross": out.cross_attentions}
    elif name == "clip":
        stacks = {"text": out.text_model_output.attentions, "vision": out.vision_model_output.attentions}
    else:
        return dict(enumerate(out.attentions))
    return {f"{stack}.{i}": x for stack, found in stacks.items() for i, x in enumerate(found)}


@pytest.mark.parametrize("name", B.NETS)
def test_maps_are_the_eager_attention_in_float64(name):
    case = B.hugging_face(name, "eager" if name == "falcon-alibi" else None)
    with torch.no_grad(), FullPrecision():
        run = case.model.run(case.inputs, maps=capture())
    expected = eager_attentions(name, torch.float64, case)
    assert tuple(run.maps) == case.keys
    assert set(expected) == set(case.keys)
    for key, weights in expected.items():
        assert weights.std() > 0.01, "the test model's pattern is flat"
        found = run.maps[key].native() if name == "swin" else run.maps[key]
        assert torch.allclose(found.dense(), weights, atol=1e-12, rtol=0), key
    if name == "gpt_oss":
        assert run.maps[0].row_sum == "<=1"
        assert run.maps[0].row_sums().max() < 1


@pytest.mark.parametrize("name", B.NETS)
def test_float32_maps_err_no_more_than_float32_eager(name):
    """Distance to the float64 pattern: ours at most twice that of the family's own float32 eager run, plus rounding."""
    exact = B.hugging_face(name, "eager")
    single = B.hugging_face(name, "eager", torch.float32)
    given = single.inputs
    with torch.no_grad(), FullPrecision():
        truth = exact.model.run(exact.inputs, maps=capture()).maps
    eager = eager_attentions(name, torch.float32, single)
    default = B.hugging_face(name, None, torch.float32) if name != "falcon-alibi" else single
    with torch.no_grad():
        run = default.model.run(given, maps=capture())
    for key in exact.keys:
        found, right = (maps[key].native() if name == "swin" else maps[key] for maps in (run.maps, truth))
        ours = (found.dense().double() - right.dense()).abs().max()
        theirs = (eager[key].double() - right.dense()).abs().max()
        assert ours <= 2 * theirs + 1e-6, (key, ours, theirs)


@pytest.mark.parametrize("name", B.NETS)
def test_the_wrapped_model_computes_what_the_bare_model_does(name):
    case = B.hugging_face(name, None, torch.float32)
    with torch.no_grad():
        bare = forward(case.net, case.inputs)
        run = case.model.run(case.inputs, maps=capture(blocks=4, stats=("received", "entropy", "distance", "top1")))
        after = forward(case.net, case.inputs)
    for field in ("logits", "logits_per_image", "last_hidden_state"):
        if getattr(bare, field, None) is not None:
            assert torch.equal(getattr(bare, field), run.output if field == "last_hidden_state" else run.logits)
            assert torch.equal(getattr(bare, field), getattr(after, field))
            break
    else:
        raise AssertionError("nothing was compared")


@pytest.mark.parametrize(("name", "mixer"), [("gemma2", "window 4 + softcap 5"), ("gpt_oss", "sink"), ("t5", "position bias"),
                                             ("bloom", "alibi"), ("mistral", "window 4"), ("llama", "softmax")])  # fmt: skip
def test_manifest_says_what_the_softmax_is(name, mixer):
    record = B.hugging_face(name).model.manifest().layers[0]
    assert mixer in record.mixer
    assert record.route == ("recorder" if name in B.RECORDED else "attention interface")


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "bert", "bloom"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    case = B.hugging_face(name, None, dtype)
    with torch.no_grad():
        off = case.model.run(case.inputs)
        on = case.model.run(case.inputs, maps=capture(blocks=4), read=["blocks.0.attn.hook_z"])
    assert torch.equal(off.logits, on.logits)
    assert on.logits.dtype == dtype
    assert on.provenance.dtype == str(dtype).removeprefix("torch.")
    wide = B.hugging_face(name, None, torch.float32)
    with torch.no_grad():
        reference = wide.model.run(case.inputs, maps=capture()).maps
    for key in case.keys:
        assert on.maps[key].dense().dtype == torch.float32
        assert (on.maps[key].dense() - reference[key].dense()).abs().max() < 0.15


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "phi3", "opt", "bert", "vit",
                                  "t5", "bloom", "mpt"])  # fmt: skip
def test_heads_of_the_projections_are_the_heads_of_the_attention(name):
    """Head 1 of the projected q (and k), taken out, is what is missing from the map's queries (and keys)."""
    case = B.hugging_face(name)
    for site in case.model.sites():
        if site.kind not in ("q", "k"):
            continue
        key = f"{site.stack}.{site.layer}" if site.stack else site.layer
        edit = {Site(site.kind, site.layer, 1, site.stack): torch.zeros_like}
        with torch.no_grad():
            before = case.model.run(case.inputs, maps=capture(layers=key)).maps[key].scores
            after = case.model.run(case.inputs, edit=edit, maps=capture(layers=key)).maps[key].scores
        old, new = (before.q, after.q) if site.kind == "q" else (before.k, after.k)
        assert (new[:, 1] == 0).all(), str(site)
        assert old[:, 1].abs().sum() > 0
        others = [h for h in range(old.shape[1]) if h != 1]
        assert torch.equal(old[:, others], new[:, others]), str(site)


@pytest.mark.parametrize("family", ["Gemma", "Mixtral", "Qwen3Moe", "Olmo3", "Starcoder2", "SmolLM3"])
def test_further_families_are_wired_as_their_names_say(family):
    net = B.net(getattr(hf, f"{family}ForCausalLM"), getattr(hf, f"{family}Config")(**B.DECODER), dtype=torch.float64)
    model = HFModel(net)
    names = [f"blocks.0.hook_{kind}" for kind in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")]
    with torch.no_grad():
        acts = model.run(B.ids(), read=[*names, "blocks.1.hook_resid_pre"]).acts
    pre, attention, middle, mlp, post = (acts[name] for name in names)
    assert torch.allclose(middle, pre + attention)
    assert torch.allclose(post, middle + mlp)
    assert torch.equal(post, acts["blocks.1.hook_resid_pre"])


def test_a_pattern_that_is_not_all_of_the_attention_cannot_be_edited(monkeypatch):
    """Granite's sinks, for one, scale what the pattern has made of the values."""
    module = sys.modules[hf.LlamaForCausalLM.__module__]
    plain = module.eager_attention_forward

    def scaled(*args, **kwargs):
        output, weights = plain(*args, **kwargs)
        return output / 2, weights

    monkeypatch.setattr(module, "eager_attention_forward", scaled)
    model = B.hugging_face("llama", "eager").model
    with torch.no_grad(), pytest.raises(Refused, match=r"hook_pattern cannot be edited: the eager attention of Llama"):
        model.run(B.ids(), edit={"blocks.0.attn.hook_pattern": lambda p: p})


def test_cross_attention_by_any_name_is_a_stack_of_its_own():
    config = hf.NllbMoeConfig(
        vocab_size=B.V, d_model=B.D, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, num_experts=2,
        decoder_attention_heads=4, encoder_ffn_dim=B.F, decoder_ffn_dim=B.F, expert_capacity=4,
    )  # fmt: skip
    model = HFModel(B.net(hf.NllbMoeForConditionalGeneration, config))
    assert model.layers() == [f"{stack}.{i}" for stack in ("encoder", "decoder", "cross") for i in range(2)]


def test_manifest_names_chunks():
    config = hf.Llama4TextConfig(
        **B.DECODER, head_dim=8, attention_chunk_size=3, num_local_experts=2, intermediate_size_mlp=32,
        layer_types=["chunked_attention", "full_attention"],
    )  # fmt: skip
    records = HFModel(B.net(hf.Llama4ForCausalLM, config)).manifest().layers
    assert [record.mixer for record in records] == ["softmax + chunks of 3", "softmax"]
