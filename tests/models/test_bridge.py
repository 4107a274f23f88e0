"""TransformerLens bridges: exactly the bridge where it fits, the model inside where it is long, nothing left behind."""

import builders as B
import pytest
import random_nets
import torch
from bridges import IDS, boot, state
from transformer_lens.model_bridge import TransformerBridge

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models import bridge as module
from workbench.models.bridge import BridgeModel
from workbench.models.protocol import Tokens

FAMILIES = ("gpt2", "llama", "qwen2", "gemma2", "gemma3", "mistral", "phi3", "opt", "bert", "gpt_oss")
OUTSIDE = ("opt", "bert")
"""Families whose bridge leaves attention to the Hugging Face module and only shows what came out."""


@pytest.fixture(scope="module")
def booted():
    made: dict[str, BridgeModel] = {}
    return lambda name: made.setdefault(name, None) or made.__setitem__(name, boot(name)) or made[name]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def long(monkeypatch):
    """Let every run count as too long for the bridge's own attention."""
    monkeypatch.setattr(module, "EAGER_LIMIT", 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_short_run_is_the_bridge_bit_for_bit(name, booted):
    model = booted(name)
    assert isinstance(model, BridgeModel)
    before = state(model.bridge)
    expected, cache = model.bridge.run_with_cache(IDS)
    off = model.run(IDS)
    on = model.run(IDS, read=["blocks.1.attn.hook_z"], maps=wb.capture(blocks=4, stats=("received", "top1")))
    assert torch.equal(off.logits, expected)
    assert torch.equal(on.logits, expected)
    assert torch.equal(on.acts["blocks.1.attn.hook_z"], cache["blocks.1.attn.hook_z"])
    for layer in range(2) if name not in OUTSIDE else ():
        pattern = cache["pattern", layer]
        assert torch.equal(on.maps[layer].dense(), pattern)
        torch.testing.assert_close(on.maps[layer].received(), pattern.sum(2))
    assert off.provenance.attention == "bridge"
    assert state(model.bridge) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_a_long_run_is_the_model_inside_bit_for_bit(name, booted, long):
    model = booted(name)
    twin = B.NETS[name](dtype=torch.float32)
    before, expected = state(model.bridge), model.bridge(IDS)
    off, on = model.run(IDS), model.run(IDS, read=["blocks.0.attn.hook_lse"], maps=wb.capture(blocks=4))
    assert torch.equal(off.logits, on.logits)
    assert torch.equal(off.logits, twin(IDS).logits)
    assert on.provenance.attention == off.provenance.attention == twin.config._attn_implementation
    torch.testing.assert_close(off.logits, expected, rtol=1e-4, atol=1e-4)
    patterns = B.NETS[name]("eager", dtype=torch.float32)(IDS, output_attentions=True).attentions
    for layer in range(2):
        torch.testing.assert_close(on.maps[layer].dense(), patterns[layer], rtol=1e-4, atol=1e-5)
    assert state(model.bridge) == before
    assert torch.equal(model.bridge(IDS), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_statistics_of_both_ways_agree(name, booted, monkeypatch):
    model = booted(name)
    read = [
        f"blocks.1.attn.hook_{kind}" for kind in ("lse", "entropy", "received", "block_mass", "block_max", "pattern")
    ]
    request = wb.capture(blocks=3)
    short = model.run(IDS, read=read, maps=request)
    monkeypatch.setattr(module, "EAGER_LIMIT", 1)
    through = model.run(IDS, read=read, maps=request)
    assert (short.provenance.attention, through.provenance.attention)[0] == "bridge" != through.provenance.attention
    for site in read:
        torch.testing.assert_close(short.acts[site], through.acts[site], rtol=1e-3, atol=1e-4)


def test_a_long_run_never_builds_the_pattern(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.seen = max([self.seen, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out

    net = random_nets.decoder("LlamaForCausalLM", "LlamaConfig", max_position_embeddings=4096)(dtype=torch.float32)
    net.config.architectures = ["LlamaForCausalLM"]
    model = wb.load(TransformerBridge.boot_transformers("llama", hf_model=net, tokenizer=B.tokenizer()))
    monkeypatch.setattr(module, "EAGER_LIMIT", 2**20)
    tokens = 2048
    with Largest() as seen:
        run = model.run(B.ids(1, tokens), maps=wb.capture(blocks=64, stats="received"), logits="last")
    assert run.maps[1].blocks(64).shape == (1, 4, 32, 32)
    assert seen.seen < tokens * tokens * 4 / 2


def test_maps_follow_edits_of_the_same_run(booted):
    model = booted("llama")

    def uniform(s):
        return torch.where(s > -1e30, 0.0, s)

    run = model.run(
        IDS,
        read=["blocks.0.attn.hook_pattern", "blocks.1.hook_resid_pre", "blocks.0.attn.hook_lse"],
        edit={"blocks.0.attn.hook_attn_scores": uniform},
        maps=wb.capture(),
    )
    flat = run.maps[0].dense()[0, 0]
    torch.testing.assert_close(flat, torch.ones(11, 11).tril() / torch.arange(1, 12)[:, None])
    assert torch.equal(run.acts["blocks.0.attn.hook_pattern"], run.maps[0].dense())
    torch.testing.assert_close(run.acts["blocks.0.attn.hook_lse"][0, 0], torch.arange(1, 12).float().log())
    plain = model.run(IDS, maps=wb.capture())
    assert not torch.allclose(run.logits, plain.logits)
    assert not torch.allclose(run.maps[1].dense(), plain.maps[1].dense())
    half = model.run(IDS, edit={"blocks.1.attn.hook_pattern[2]": lambda p: p / 2}, maps=wb.capture(layers=1))
    torch.testing.assert_close(half.maps[1].dense()[:, 2], plain.maps[1].dense()[:, 2] / 2)
    assert torch.equal(half.maps[1].dense()[:, [0, 1, 3]], plain.maps[1].dense()[:, [0, 1, 3]])


def test_lse_is_the_logarithm_of_the_denominator(booted):
    model = booted("llama")
    run = model.run(IDS, read=["blocks.1.attn.hook_rot_q", "blocks.1.attn.hook_rot_k", "blocks.1.attn.hook_lse"])
    q = run.acts["blocks.1.attn.hook_rot_q"].transpose(1, 2).double()
    k = run.acts["blocks.1.attn.hook_rot_k"].transpose(1, 2).double().repeat_interleave(2, 1)
    scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(torch.ones(11, 11).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(run.acts["blocks.1.attn.hook_lse"].double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_every_hook_of_the_bridge_can_be_read_by_its_name(name, booted):
    model = booted(name)
    names = [n for n in model.hooks() if "_input" not in n and "hook_result" not in n and "mlp_in" not in n]
    expected, cache = model.bridge.run_with_cache(IDS)
    assert {"blocks.0.attn.q.hook_in", "blocks.1.ln2.hook_scale", "unembed.hook_out", "embed.hook_in"} <= set(names)
    assert set(cache) <= set(model.hooks())
    run = model.run(IDS, read=names)
    assert torch.equal(run.logits, expected)
    for hook in set(names) & set(cache):
        assert torch.equal(run.acts[hook], cache[hook]), hook


def test_any_hook_can_be_edited_by_its_name(booted):
    model = booted("gpt2")
    plain = model.run(IDS).logits
    zero = model.run(IDS, edit={"blocks.0.mlp.out.hook_in": torch.tensor(0.0)}, read=["blocks.0.mlp.hook_post"])
    assert (zero.acts["blocks.0.mlp.hook_post"] == 0).all()
    assert not torch.allclose(zero.logits, plain)
    # two names of one point: both edits act, and reads come after both
    twice = {"blocks.0.attn.hook_z": lambda z: z + 1, "blocks.0.attn.o.hook_in": lambda z: z * 2}
    before = model.run(IDS, read=["blocks.0.attn.hook_z"]).acts["blocks.0.attn.hook_z"]
    run = model.run(IDS, edit=twice, read=["blocks.0.attn.hook_z", "blocks.0.attn.o.hook_in"])
    torch.testing.assert_close(run.acts["blocks.0.attn.hook_z"], (before + 1) * 2)
    assert torch.equal(run.acts["blocks.0.attn.hook_z"], run.acts["blocks.0.attn.o.hook_in"])
    assert torch.equal(model.run(IDS).logits, plain)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_split_inputs_and_results_are_those_of_the_bridge(name, booted):
    """Without gradients they are computed beside the run; with gradients the bridge's own points show them."""
    model = booted(name)
    read = [f"blocks.1.hook_{kind}" for kind in ("q_input", "k_input", "v_input", "mlp_in")] + [
        "blocks.1.attn.hook_result"
    ]
    before = state(model.bridge)
    beside = model.run(IDS, read=read)
    with torch.enable_grad():
        shown = model.run(IDS, read=read)
        grads = torch.autograd.grad(shown.logits[:, -1].logsumexp(-1).sum(), [shown.acts[site] for site in read])
    assert all(g.abs().sum() > 0 for g in grads)
    assert state(model.bridge) == before
    assert torch.equal(beside.logits, model.bridge(IDS))
    for site in read:
        torch.testing.assert_close(beside.acts[site], shown.acts[site].detach(), rtol=1e-5, atol=1e-5)
    out = model.run(IDS, read=["blocks.1.attn.hook_out"]).acts["blocks.1.attn.hook_out"]
    bias = 0 if model.bridge.blocks[1].attn.o.bias is None else model.bridge.blocks[1].attn.o.bias
    torch.testing.assert_close(beside.acts["blocks.1.attn.hook_result"].sum(2) + bias, out, rtol=1e-4, atol=1e-5)
    ramp = torch.linspace(-1, 1, 32)
    edited = model.run(
        IDS,
        edit={"blocks.1.hook_q_input[1]": lambda x: x * ramp},
        read=["blocks.1.hook_q_input", "blocks.1.attn.hook_q"],
    )
    plain = model.run(IDS, read=["blocks.1.attn.hook_q"])
    torch.testing.assert_close(edited.acts["blocks.1.hook_q_input"][:, :, 1], beside.acts[read[0]][:, :, 1] * ramp)
    same = (
        torch.isclose(edited.acts["blocks.1.attn.hook_q"], plain.acts["blocks.1.attn.hook_q"], atol=1e-4)
        .all(-1)
        .all(0)
        .all(0)
    )
    assert same.tolist() == [True, False, True, True]


def test_weights_are_those_that_the_bridge_computes_with(booted):
    model = booted("gpt2")
    run = model.run(IDS, read=["ln_final.hook_out", "hook_embed", "blocks.1.attn.hook_z", "blocks.1.attn.hook_result"])
    assert model.weight("W_O", 1).shape == (4, 8, 32)
    torch.testing.assert_close(run.acts["ln_final.hook_out"] @ model.weight("W_U"), run.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run.acts["hook_embed"], model.weight("W_E")[IDS])
    assert booted("llama").weight("W_K", 0).shape == (2, 32, 8)
    for name, layer in (("W_O", 9), ("W_O", None), ("W_X", 0), ("W_U", 0)):
        with pytest.raises(UnknownName, match="known: "):
            model.weight(name, layer)


def test_texts_are_tokenized_as_the_bridge_does(booted):
    model = booted("llama")
    texts = ["w5 w9 w4 w7 w30", "w8 w8"]
    tokens = model.tokens(texts)
    for i, text in enumerate(texts):
        assert torch.equal(tokens.ids[i][tokens.mask[i]], model.bridge.to_tokens(text)[0])
    assert tokens.labels[1][:3] == ("<bos>", "w8", "w8")
    assert tokens.mask.sum(1).tolist() == [6, 3]
    together = model.run(texts, maps=wb.capture())
    alone = model.run(texts[1], maps=wb.capture())
    torch.testing.assert_close(together.logits[1][tokens.mask[1]], alone.logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.maps[1].dense()[1, :, :3, :3], alone.maps[1].dense()[0], rtol=1e-4, atol=1e-5)
    assert together.maps[1].row_sum == "<=1"
    torch.testing.assert_close(model.run(texts, logits="last").logits[1, 0], alone.logits[0, -1], rtol=1e-4, atol=1e-5)
    for given, message in (
        ("", "is empty"),
        ([], "no prompt"),
        (["w5", 3], "prompt 1 is a int"),
        ("w5 " * 70, "7 more than"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            model.tokens(given)


def test_a_cache_goes_from_one_way_to_the_other(booted, monkeypatch):
    model = booted("llama")
    whole = model.run(IDS, maps=wb.capture())
    ids, mask = torch.cat([torch.zeros(2, 2, dtype=torch.int64), IDS], 1), torch.ones(2, 13, dtype=torch.bool)
    mask[:, :2] = False
    start = model.run(Tokens(ids[:, :8], mask[:, :8]), cache=True)
    short = model.run(ids[:, 8:], cache=start.cache, maps=wb.capture())
    monkeypatch.setattr(module, "EAGER_LIMIT", 1)
    through = model.run(ids[:, 8:], cache=start.cache, maps=wb.capture())
    assert (short.provenance.attention, through.provenance.attention) == ("bridge", "sdpa")
    for run in (short, through):
        torch.testing.assert_close(run.logits, whole.logits[:, 6:], rtol=1e-4, atol=1e-4)
        assert run.maps[1].offset == 8
        torch.testing.assert_close(run.maps[1].dense()[..., 2:], whole.maps[1].dense()[:, :, 6:], rtol=1e-4, atol=1e-5)
        assert (run.maps[1].dense()[..., :2] == 0).all()
    assert start.cache.get_seq_length() == 8


@pytest.mark.parametrize("name", OUTSIDE)
def test_attention_that_a_bridge_leaves_to_the_module_inside(name, booted):
    """Its pattern comes from that module; what would change nothing is refused."""
    model = booted(name)
    eager = B.NETS[name]("eager", dtype=torch.float32)(IDS, output_attentions=True).attentions
    read = ["blocks.0.attn.hook_pattern[1]", "blocks.1.attn.hook_lse", "blocks.1.attn.hook_z"]
    run = model.run(IDS, read=read, maps=wb.capture())
    torch.testing.assert_close(run.acts[read[0]], eager[0][:, 1], rtol=1e-4, atol=1e-5)
    for layer in range(2):
        torch.testing.assert_close(run.maps[layer].dense(), eager[layer], rtol=1e-4, atol=1e-5)
    assert torch.equal(run.logits, model.bridge(IDS))
    assert model.manifest().frame().route.tolist() == ["attention interface"] * 2
    for kind in ("pattern", "attn_scores"):
        with pytest.raises(Refused, match="shows what came out; edit z"):
            model.run(IDS, edit={f"blocks.0.attn.hook_{kind}": lambda x: x * 0.5})
    with pytest.raises(Refused, match="edit z"):
        model.run(IDS, read=["blocks.0.attn.hook_attn_scores"])
    double = {"blocks.0.attn.hook_z": lambda z: z * 2}
    edited = model.run(IDS, edit=double, maps=wb.capture())
    assert not torch.allclose(edited.logits, run.logits)
    assert torch.equal(edited.maps[0].dense(), run.maps[0].dense())
    assert not torch.allclose(edited.maps[1].dense(), run.maps[1].dense())


def test_what_cannot_be_done_is_refused_in_words(booted, long):
    with pytest.raises(Refused, match="reads and edits need the bridge's own attention; ask for maps alone"):
        booted("llama").run(IDS, read=["blocks.0.attn.hook_z"], maps=wb.capture())
    with pytest.raises(WorkbenchError, match="edited twice"):
        booted("llama").run(IDS, edit={"blocks.0.attn.hook_z": torch.zeros_like, wb.Site("z", 0): torch.zeros_like})
    with pytest.raises(UnknownName, match=r"blocks.0-1.attn.q.hook_in.*heads 0-3, kv heads 0-1"):
        booted("llama").run(IDS, read=["blocks.0.attn.hook_quirk"])
    with pytest.raises(WorkbenchError, match="did not fire"):
        booted("llama").run(IDS, read=["hook_pos_embed"])
    with pytest.raises(WorkbenchError, match=r"gave \[1\]"):
        booted("llama").run(IDS, edit={"blocks.0.attn.q.hook_in": torch.zeros(1)})
    model = boot("gpt2")
    model.bridge.train()
    with pytest.raises(WorkbenchError, match=r"training mode; call .eval\(\)"):
        model.run(IDS)
    net = B.NETS["t5"](dtype=torch.float32)
    net.config.architectures = ["T5ForConditionalGeneration"]
    bridge = TransformerBridge.boot_transformers("t5", hf_model=net, tokenizer=B.tokenizer())
    with pytest.raises(Refused, match="before it is bridged"):
        wb.load(bridge)


def test_manifest_and_sites(booted):
    model = booted("gemma2")
    frame = model.manifest().frame()
    assert frame.route.tolist() == ["bridge"] * 2
    assert frame.mixer.tolist() == ["softmax + window 4 + softcap 5", "softmax + softcap 5"]
    listed = {str(site) for site in model.sites()}
    assert {"blocks.1.attn.hook_result", "blocks.0.hook_q_input", "blocks.0.attn.hook_rot_k", "hook_embed"} <= listed
    assert "hook_pos_embed" not in listed
    assert "blocks.0.attn.hook_result" not in {str(site) for site in booted("opt").sites()}
    assert repr(model).startswith("BridgeModel(")
