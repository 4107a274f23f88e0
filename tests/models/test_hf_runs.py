"""What a run of a Hugging Face model leaves behind (nothing), refuses, and costs."""

import copy

import builders as B
import pytest
import torch
import transformers as hf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from workbench.captures import capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.hf import HFModel
from workbench.models.interface import Key, configs
from workbench.models.load import load
from workbench.models.protocol import Tokens
from workbench.models.recorders.registry import RECORDERS
from workbench.sites import Site


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def state(net):
    """Everything a run could have left behind in a module."""
    return (
        [config._attn_implementation_internal for config in configs(net)],
        [type(config._attn_implementation_internal) for config in configs(net)],
        {name: sorted(module.__dict__) for name, module in net.named_modules()},
        {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for name, m in net.named_modules()
        },
        {name: m.__dict__.get("forward") for name, m in net.named_modules()},
        {name: weight._version for name, weight in net.named_parameters()},
        net.config.to_json_string(),
    )


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5", "clip", "whisper", "bert", "falcon", "bloom", "mpt"])
def test_nothing_is_left_behind(name):
    case = B.hugging_face(name)
    before = state(case.net)
    sites = case.model.sites()
    case.model.run(case.inputs, read=sites, maps=capture(blocks=4))
    assert state(case.net) == before


@pytest.mark.parametrize("name", ["llama", "t5", "falcon"])
@pytest.mark.parametrize("kind", ["z", "resid_pre", "resid_post"])
def test_nothing_is_left_behind_after_an_exception(name, kind):
    case = B.hugging_face(name)
    before, plain = state(case.net), case.model.run(case.inputs).logits
    site = next(s for s in case.model.sites() if s.kind == kind)

    def explode(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        case.model.run(case.inputs, edit={site: explode}, read=case.model.sites(), maps=capture(blocks=4))
    assert state(case.net) == before
    assert torch.equal(case.model.run(case.inputs).logits, plain)


def test_a_run_inside_an_edit_works():
    case = B.hugging_face("llama")
    inner = []

    def nested(x):
        inner.append(case.model.run(case.inputs, maps=capture()))
        return x

    outer = case.model.run(case.inputs, edit={"blocks.0.attn.hook_z": nested}, maps=capture())
    assert torch.equal(inner[0].logits, outer.logits)
    assert torch.equal(inner[0].maps[1].dense(), outer.maps[1].dense())
    assert not isinstance(case.net.config._attn_implementation_internal, Key)


def test_the_key_stands_for_the_implementation_it_replaces():
    key = Key("sdpa")
    assert key == "sdpa"
    assert key in ["eager", "sdpa"]
    assert key != "eager"
    assert key not in {"sdpa": 1}
    assert Key(None) == "eager"
    assert "flash" in Key("flash_attention_2")
    assert copy.deepcopy(key) is key


def test_a_model_in_training_mode_is_refused():
    net = B.NETS["llama"]()
    model = HFModel(net)
    net.model.layers[1].train()
    with pytest.raises(WorkbenchError, match=r"call \.eval\(\)"):
        model.run(B.ids())


def test_an_unknown_attention_argument_is_refused_by_name(monkeypatch):
    case = B.hugging_face("llama")
    attention = case.net.model.layers[1].self_attn
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *a, **k: forward(*a, **k, temperature=torch.ones(1)))
    with pytest.raises(Refused, match=r"layer 1 of LlamaForCausalLM.*'temperature'"):
        case.model.run(case.inputs, maps=capture())
    assert tuple(case.model.run(case.inputs, maps=capture(layers=[0])).maps) == (0,)


def test_a_layer_that_does_not_run_is_an_error(monkeypatch):
    case = B.hugging_face("llama")
    attention = case.net.model.layers[1].self_attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, **k: (hidden_states, None))
    with pytest.raises(WorkbenchError, match=r"layer 1 .*did not run"):
        case.model.run(case.inputs, maps=capture())
    with pytest.raises(WorkbenchError, match=r"blocks\.1\.attn\.hook_z was asked for and did not run"):
        case.model.run(case.inputs, read=["blocks.1.attn.hook_z"])
    with pytest.raises(WorkbenchError, match=r"the edit of blocks\.1\.attn\.hook_z never ran"):
        case.model.run(case.inputs, edit={"blocks.1.attn.hook_z": torch.zeros_like})


def test_mixers_without_a_route_are_named_before_and_at_capture(monkeypatch):
    monkeypatch.delitem(RECORDERS, "MambaMixer")
    torch.manual_seed(0)
    config = hf.MambaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, state_size=4, expand=1, time_step_rank=2
    )
    model = HFModel(hf.MambaForCausalLM(config).eval())
    record = model.manifest().layers[1]
    assert (record.layer, record.mixer, record.route, record.exactness) == (1, "MambaMixer", "none", "none")
    assert "no recorder" in record.missing
    with pytest.raises(Refused, match=r"layer 0 of MambaForCausalLM: backbone\.layers\.0\.mixer \(MambaMixer\)"):
        model.run(torch.tensor([[3, 4, 5]]), maps=capture())
    assert model.run(torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, 20)


def test_hybrids_capture_their_attention_layers(monkeypatch):
    monkeypatch.delitem(RECORDERS, "Qwen3NextGatedDeltaNet")
    torch.manual_seed(0)
    config = hf.Qwen3NextConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=4,
        linear_value_head_dim=4, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8,
        shared_expert_intermediate_size=8, layer_types=["linear_attention", "full_attention"], mlp_only_layers=[0, 1],
    )  # fmt: skip
    model = HFModel(hf.Qwen3NextForCausalLM(config).eval())
    given = torch.tensor([[3, 4, 5, 6]])
    assert [record.route for record in model.manifest().layers] == ["none", "attention interface"]
    with pytest.raises(Refused, match=r"layer 0 .*layers that can be captured: \[1\]"):
        model.run(given, maps=capture())
    assert tuple(model.run(given, maps=capture(layers=[1])).maps) == (1,)


def test_eager_patterns_can_be_edited_and_fused_ones_say_who_can():
    case = B.hugging_face("llama", "eager")
    site = Site("pattern", 1)
    run = case.model.run(
        case.inputs,
        edit={site: lambda p: torch.eye(p.shape[-1]).expand_as(p)},
        read=[site, "blocks.1.attn.hook_z", "blocks.1.attn.hook_v"],
    )
    assert torch.equal(run.acts[site][0, 0], torch.eye(11, dtype=torch.float64))
    assert torch.allclose(run.acts["blocks.1.attn.hook_z"][:, :, 3], run.acts["blocks.1.attn.hook_v"][:, :, 1])
    same = case.model.run(case.inputs, edit={site: lambda p: p})
    assert torch.allclose(same.logits, case.model.run(case.inputs).logits, atol=1e-10)
    for name in ("mistral", "bloom"):
        with pytest.raises(Refused, match="attn_implementation='eager'"):
            B.hugging_face(name).model.run(case.inputs, edit={site: lambda p: p})


def test_gradients_of_an_eager_pattern():
    case = B.hugging_face("llama", "eager")
    with torch.enable_grad():
        run = case.model.run(case.inputs, read=["blocks.1.attn.hook_pattern"])
        (grad,) = torch.autograd.grad(run.logits.sum(), [run.acts["blocks.1.attn.hook_pattern"]])
    assert grad.shape == (2, 4, 11, 11)
    assert grad.abs().sum() > 0


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [
            x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if isinstance(x, torch.Tensor)
        ]
        self.numbers = max([self.numbers, *sizes])
        return out


def test_capture_never_makes_a_pattern():
    """Block maps of all layers at N tokens: no tensor of one head's N x N numbers or more beside the model's own."""
    n, heads = 2048, 8
    config = hf.LlamaConfig(
        vocab_size=16, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=4, max_position_embeddings=n,
    )  # fmt: skip
    torch.manual_seed(0)
    model = HFModel(hf.LlamaForCausalLM(config).eval())
    given = torch.randint(0, 16, (1, n))
    with Largest() as plain:
        model.run(given, logits=None)
    with Largest() as captured:
        run = model.run(given, maps=capture(blocks=64, stats=("received", "entropy")), logits=None)
    assert plain.numbers < heads * n * n // 4
    assert captured.numbers < heads * n * n // 4
    assert run.maps[1].blocks(64).shape == (1, heads, n // 64, n // 64)
    assert run.provenance.kernel


def test_too_many_logits_are_refused_with_the_number():
    config = hf.LlamaConfig(
        vocab_size=200_000, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=40_000,
    )  # fmt: skip
    model = HFModel(hf.LlamaForCausalLM(config).eval())
    with pytest.raises(Refused, match=r'25\.6 GB.*logits="last"'):
        model.run(torch.zeros(1, 32_000, dtype=torch.int64))


def test_unasked_logits_are_never_computed():
    case = B.hugging_face("llama")
    widths = []
    handle = case.net.lm_head.register_forward_hook(lambda m, i, o: widths.append(o.shape[1]))
    for which in ("all", "last", None):
        case.model.run(case.inputs, logits=which)
    handle.remove()
    assert widths == [11, 1, 0]


def test_inputs_are_checked():
    case = B.hugging_face("llama")
    with pytest.raises(WorkbenchError, match="no tokenizer"):
        case.model.run("text")
    with pytest.raises(WorkbenchError, match="takes no input 'pixel_values'"):
        case.model.run({"pixel_values": torch.zeros(1)})
    with pytest.raises(WorkbenchError, match="token ids"):
        case.model.run(torch.zeros(1, 3))
    with pytest.raises(WorkbenchError, match="nothing but padding"):
        case.model.run(Tokens(case.inputs, torch.arange(2)[:, None].expand(2, 11) == 0))
    with pytest.raises(WorkbenchError, match="batch of 1"):
        case.model.run(case.inputs[:1], cache=case.model.run(case.inputs, cache=True).cache)
    with pytest.raises(UnknownName, match="W_O"):
        case.model.weight("W_Q", 0)


def test_pixels_can_be_given_as_they_are():
    case = B.hugging_face("vit")
    pixels = case.inputs["pixel_values"]
    assert torch.equal(case.model.run(pixels).logits, case.model.run(case.inputs).logits)


def test_two_stack_models_start_decoding_by_themselves():
    case = B.hugging_face("t5")
    given = case.inputs["input_ids"]
    start = torch.zeros(2, 1, dtype=torch.int64)
    expected = case.net(input_ids=given, decoder_input_ids=start).logits
    run = case.model.run(given, maps=capture())
    assert torch.equal(run.logits, expected)
    assert run.maps["cross.0"].shape == (2, 4, 1, 9)


def test_an_edit_that_would_miss_the_cache_is_refused():
    case = B.hugging_face("llama")
    with pytest.raises(Refused, match="cache"):
        case.model.run(case.inputs, edit={"blocks.0.attn.hook_rot_k": torch.zeros_like}, cache=True)
    run = case.model.run(case.inputs[:, :5], edit={"blocks.0.attn.hook_k": torch.zeros_like}, cache=True)
    assert (run.cache.layers[0].keys == 0).all()


def test_left_padding_and_cache_together():
    case = B.hugging_face("gpt2")
    ids = case.inputs[:1]
    padded = Tokens(
        torch.cat([torch.zeros(1, 2, dtype=torch.int64), ids[:, :6]], 1), torch.tensor([[False] * 2 + [True] * 6])
    )
    first = case.model.run(padded, cache=True)
    second = case.model.run(ids[:, 6:], cache=first.cache, maps=capture())
    whole = case.model.run(ids, maps=capture())
    assert torch.allclose(second.logits, whole.logits[:, 6:], atol=1e-10)
    assert (second.maps[0].dense()[..., :2] == 0).all()
    assert torch.allclose(second.maps[0].dense()[..., 2:], whole.maps[0].dense()[:, :, 6:], atol=1e-10)


def test_the_last_hidden_state_comes_with_every_run():
    for name in ("llama", "gpt2", "vit", "bloom"):
        case = B.hugging_face(name)
        run = case.model.run(case.inputs, read=["ln_final.hook_normalized"])
        assert torch.equal(run.output, run.acts["ln_final.hook_normalized"])
    case = B.hugging_face("llama")
    run = case.model.run(case.inputs, logits=None)
    assert torch.equal(run.output @ case.model.weight("W_U"), case.model.run(case.inputs).logits)


def test_the_last_logits_of_two_stacks_are_the_decoders():
    case = B.hugging_face("t5")
    ids = case.inputs["input_ids"]
    given = {**case.inputs, "attention_mask": torch.arange(9).expand(2, 9) < 6, "decoder_input_ids": ids}
    whole, last = case.model.run(given).logits, case.model.run(given, logits="last").logits
    assert torch.allclose(whole[:, -1:], last)


def test_an_edited_pattern_is_the_map():
    case = B.hugging_face("gpt2", "eager")
    run = case.model.run(case.inputs, edit={"blocks.0.attn.hook_pattern[2]": torch.zeros_like}, maps=capture(blocks=4))
    assert (run.maps[0].dense()[:, 2] == 0).all()
    assert (run.maps[0].dense()[:, 1].sum(-1) > 0.99).all()


def test_eager_runs_that_do_not_fit_are_refused(monkeypatch):
    from workbench.models import inputs

    monkeypatch.setattr(inputs, "free_memory", lambda device: 10_000)
    with pytest.raises(Refused, match=r"11 x 11 positions.*attn_implementation='sdpa'"):
        B.hugging_face("llama", "eager").model.run(B.ids())
    B.hugging_face("llama").model.run(B.ids())


def test_inputs_nobody_understands_are_refused():
    case = B.hugging_face("llama")
    for thing in ([[1, 2], [3]], {"input_ids": [1, 2]}, object()):
        with pytest.raises(WorkbenchError, match="cannot run a|is a tensor"):
            case.model.run(thing)
    assert torch.equal(case.model.run(case.inputs.tolist()).logits, case.model.run(case.inputs).logits)


def test_layers_that_run_again_are_not_mixed_up(monkeypatch):
    case = B.hugging_face("llama")
    attention = case.net.model.layers[1].self_attn
    once = attention.forward

    def twice(*args, **kwargs):
        once(*args, **kwargs)
        return once(*args, **kwargs)

    monkeypatch.setattr(attention, "forward", twice)
    with torch.no_grad(), pytest.raises(Refused, match=r"layer 1 of LlamaForCausalLM.* ran twice"):
        case.model.run(case.inputs, maps=capture())


def test_attention_that_is_two_calls_is_no_map_and_the_manifest_says_so(monkeypatch):
    monkeypatch.delitem(RECORDERS, "DiffLlamaAttention")
    torch.manual_seed(0)
    config = hf.DiffLlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )  # fmt: skip
    model = HFModel(hf.DiffLlamaForCausalLM(config).eval())
    assert model.run(torch.tensor([[3, 4]])).logits.shape == (1, 2, 20)
    frame = model.manifest().frame()
    assert frame.route.tolist() == ["none"] * 2
    assert frame.missing.str.contains("calls its attention function twice").all()
    with pytest.raises(Refused, match=r"layer 0 of DiffLlamaForCausalLM: .*self_attn .*twice"):
        model.run(torch.tensor([[3, 4]]), maps=capture())


def test_keep_false_lets_queries_and_keys_go():
    case = B.hugging_face("llama")
    kept = case.model.run(case.inputs, maps=capture(blocks=4, stats=("received",))).maps[1]
    summary = case.model.run(case.inputs, maps=capture(blocks=4, stats=("received",), keep=False)).maps[1]
    assert torch.equal(summary.blocks(4), kept.blocks(4))
    assert torch.equal(summary.received(), kept.received())
    with pytest.raises(Refused, match="keep=False"):
        summary.dense()


def test_compiled_models_give_maps_and_refuse_what_hooks_do():
    net = B.NETS["llama"]()
    plain = HFModel(net).run(B.ids(), maps=capture())
    for block in net.model.layers:
        block.compile(backend="eager")
    model = HFModel(net)
    for _ in range(2):
        run = model.run(B.ids(), maps=capture())
        assert torch.equal(run.logits, model.run(B.ids()).logits)
        assert torch.equal(run.maps[1].dense(), plain.maps[1].dense())
    with pytest.raises(Refused, match="is compiled, and hooks do not reach"):
        model.run(B.ids(), read=["blocks.0.hook_resid_pre"])
    with pytest.raises(WorkbenchError, match="its ._orig_mod"):
        load(torch.compile(net, backend="eager"))
