"""The native model: its forward against plain torch, its requests, its files."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import workbench as wb
from workbench.errors import UnknownName, WorkbenchError
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet
from workbench.models.protocol import Tokens

CONFIG = NativeConfig(layers=2, heads=4, kv_heads=2, width=16, head_width=6, vocab=23, mlp_width=24, context=64)
VARIANTS = {
    "grouped": CONFIG,
    "gated": replace(CONFIG, mixer="gated-softmax"),
    "biased": replace(CONFIG, bias=True),
    "learned": replace(CONFIG, positions="learned", kv_heads=None, tied=True, activation="relu"),
    "bare": replace(CONFIG, positions="none", norm="none", mlp_width=0),
    "both ways": replace(CONFIG, causal=False),
}
DATA = torch.tensor([[3, 9, 4, 4, 17, 22, 1], [5, 2, 2, 8, 11, 0, 19]])


def make(config: NativeConfig = CONFIG, dtype: torch.dtype = torch.float64, tokenizer=None) -> NativeModel:
    torch.manual_seed(0)
    net = NativeNet(config)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name.endswith(("W_gate", "b_gate", "b_in", "b_out", "b_Q", "b_K", "b_V", "ln1.w")):
                weight.normal_()
    return NativeModel(net.to(dtype).eval(), tokenizer, name="tiny")


def words(side: str = "right") -> PreTrainedTokenizerFast:
    vocab = {
        "<pad>": 0,
        "<bos>": 1,
        "<unk>": 2,
        **{w: i + 3 for i, w in enumerate(["a", "b", "c", "d", "e", "f", "g"])},
    }
    plain = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>", padding_side=side
    )


def by_hand(net: NativeNet, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and effective patterns with nothing but matrix products, one head at a time."""
    c = net.config
    time = len(ids)
    x = net.W_E[ids]
    if net.W_pos is not None:
        x = x + net.W_pos[:time]

    def norm(layer, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * layer.w if c.norm == "rms" else x

    def turn(x):
        if c.positions != "rotary":
            return x
        half = c.head_width // 2
        out = torch.empty_like(x)
        for t in range(time):
            for i in range(half):
                angle = torch.tensor(t * c.theta ** (-i / half), dtype=x.dtype)
                out[t, i] = x[t, i] * angle.cos() - x[t, i + half] * angle.sin()
                out[t, i + half] = x[t, i + half] * angle.cos() + x[t, i] * angle.sin()
        return out

    patterns = []
    for block in net.blocks:
        normed, attn = norm(block.ln1, x), block.attn
        out, maps = torch.zeros_like(x), []
        for h in range(c.heads):
            g = h // (c.heads // (c.kv_heads or c.heads))
            b_q, b_k, b_v = (attn.b_Q[h], attn.b_K[g], attn.b_V[g]) if c.bias else (0, 0, 0)
            q, k = turn(normed @ attn.W_Q[h] + b_q), turn(normed @ attn.W_K[g] + b_k)
            v = normed @ attn.W_V[g] + b_v
            s = q @ k.T / c.head_width**0.5
            if c.causal:
                s = s.masked_fill(torch.ones(time, time).triu(1).bool(), float("-inf"))
            p = s.softmax(-1)
            if c.mixer == "gated-softmax":
                p = p * torch.sigmoid(normed @ attn.mixer.W_gate[:, h] + attn.mixer.b_gate[h])[:, None]
            maps.append(p)
            out = out + p @ v @ attn.W_O[h]
        x = x + out
        patterns.append(torch.stack(maps))
        if block.mlp is not None:
            m = block.mlp
            x = x + m.act(norm(block.ln2, x) @ m.W_in + m.b_in) @ m.W_out + m.b_out
    return norm(net.ln_final, x) @ net.unembed, patterns


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_and_maps_equal_plain_matrix_products(name: str) -> None:
    model = make(VARIANTS[name])
    run = model.run(DATA, maps=wb.capture())
    for b, ids in enumerate(DATA):
        logits, patterns = by_hand(model.net, ids)
        torch.testing.assert_close(run.logits[b], logits, rtol=1e-9, atol=1e-9)
        for layer, pattern in enumerate(patterns):
            torch.testing.assert_close(run.maps[layer].dense()[b], pattern, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_capture_leaves_logits_bit_identical(name: str, dtype: torch.dtype) -> None:
    model = make(VARIANTS[name], dtype)
    plain = model.run(DATA)
    seen = model.run(DATA, maps=wb.capture(blocks=3, stats=("received", "entropy", "distance", "top1")))
    assert torch.equal(plain.logits, seen.logits)
    assert torch.equal(plain.logits, model.net(DATA))
    assert plain.logits.dtype == dtype
    assert seen.provenance.dtype == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("explicit", [False, True])
def test_padding_changes_nothing_for_real_tokens(name: str, side: str, explicit: bool) -> None:
    model = make(VARIANTS[name])
    short, pad = 4, 3
    real = slice(pad, pad + short) if side == "left" else slice(0, short)
    ids, mask = torch.full((2, 7), 13), torch.ones(2, 7, dtype=torch.bool)
    ids[1, real], mask[1] = DATA[1, :short], False
    mask[1, real] = True
    ids[0] = DATA[0]
    read = [f"blocks.1.attn.hook_{kind}" for kind in ("z", "lse", "pattern", "attn_scores")]
    edit = {f"blocks.{layer}.attn.hook_attn_scores": lambda s: s for layer in range(2 if explicit else 0)}
    together = model.run(Tokens(ids, mask), read=read, edit=edit, maps=wb.capture())
    alone = model.run(DATA[1:, :short], read=read, maps=wb.capture())
    first = model.run(DATA[:1], maps=wb.capture())
    torch.testing.assert_close(together.logits[1, real], alone.logits[0])
    torch.testing.assert_close(together.logits[:1], first.logits)
    torch.testing.assert_close(together.maps[0].dense()[:1], first.maps[0].dense())
    padded = together.maps[1].dense()[1]
    torch.testing.assert_close(padded[:, real, real], alone.maps[1].dense()[0])
    assert (padded[:, ~mask[1]] == 0).all()
    assert (padded[:, :, ~mask[1]] == 0).all()
    torch.testing.assert_close(together.acts["blocks.1.attn.hook_z"][1, real], alone.acts["blocks.1.attn.hook_z"][0])
    assert (together.acts["blocks.1.attn.hook_z"][1, ~mask[1]] == 0).all()
    torch.testing.assert_close(
        together.acts["blocks.1.attn.hook_lse"][1][:, real], alone.acts["blocks.1.attn.hook_lse"][0]
    )
    last = model.run(Tokens(ids, mask), logits="last").logits
    torch.testing.assert_close(last[:, 0], torch.stack([first.logits[0, -1], alone.logits[0, -1]]))


@pytest.mark.parametrize("name", ["grouped", "gated", "learned", "bare"])
@pytest.mark.parametrize("steps", [[3, 1, 1, 2], [6, 1]])
def test_decoding_with_a_cache_equals_the_full_run(name: str, steps: list[int]) -> None:
    model = make(VARIANTS[name])
    full = model.run(DATA, maps=wb.capture())
    at, cache, logits = 0, True, []
    for step in steps:
        part = model.run(DATA[:, at : at + step], maps=wb.capture(), cache=cache)
        rows = part.maps[1].dense()
        torch.testing.assert_close(rows, full.maps[1].dense()[:, :, at : at + step, : at + step])
        assert part.maps[1].offset == at
        cache, at = part.cache, at + step
        logits.append(part.logits)
    torch.testing.assert_close(torch.cat(logits, 1), full.logits)
    assert cache.length == 7


def test_a_cache_is_not_changed_by_continuing_from_it() -> None:
    model = make()
    start = model.run(DATA[:, :4], cache=True).cache
    one, two = (model.run(DATA[:, 4:6], cache=start) for _ in range(2))
    assert torch.equal(one.logits, two.logits)
    assert start.length == 4
    assert one.cache.length == 6
    assert model.run(DATA).cache is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoding_after_a_padded_prompt(side: str) -> None:
    model = make()
    ids, mask = DATA[:, :5].clone(), torch.ones(2, 5, dtype=torch.bool)
    hidden = slice(0, 2) if side == "left" else slice(3, 5)
    mask[1, hidden] = False
    start = model.run(Tokens(ids, mask), cache=True).cache
    step = model.run(DATA[:, 5:], cache=start, maps=wb.capture())
    kept = torch.cat([ids[1, mask[1]], DATA[1, 5:]])[None]
    torch.testing.assert_close(step.logits[1], model.run(kept).logits[0, -2:])
    torch.testing.assert_close(step.logits[0], model.run(DATA[:1]).logits[0, -2:])
    assert (step.maps[0].dense()[1][:, :, hidden] == 0).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_site_that_is_listed_is_read_and_leaves_the_output(name: str) -> None:
    model = make(VARIANTS[name])
    sites = model.sites()
    run = model.run(DATA, read=sites, maps=wb.capture(blocks=2))
    assert set(run.acts) == set(sites)
    torch.testing.assert_close(run.logits, model.run(DATA).logits, rtol=1e-12, atol=1e-12)
    cheap = [s for s in sites if s.kind not in ("attn_scores", "q_input", "k_input", "v_input", "result")]
    assert torch.equal(model.run(DATA, read=cheap, maps=wb.capture(blocks=2)).logits, model.run(DATA).logits)


@pytest.mark.parametrize("name", VARIANTS)
def test_writing_back_what_was_read_changes_nothing(name: str) -> None:
    model = make(VARIANTS[name])
    plain = model.run(DATA)
    for site in model.sites():
        if site.kind in ("lse", "received", "entropy", "block_mass", "block_max"):
            continue
        found = model.run(DATA, read=[site]).acts[site]
        again = model.run(DATA, edit={site: found})
        torch.testing.assert_close(again.logits, plain.logits, rtol=1e-12, atol=1e-12, msg=str(site))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_site_acts_on_the_output(name: str) -> None:
    model = make(VARIANTS[name])
    plain = model.run(DATA)
    for site in model.sites():
        if site.kind in ("lse", "received", "entropy", "block_mass", "block_max"):
            continue
        one = (
            replace(site, head=1) if site.kind in ("z", "q", "k", "v", "result", "pattern", "gate", "k_input") else site
        )
        if site.kind == "final_norm" or (site.layer == 1 and one.head is not None and "k" in site.kind):
            continue
        edited = model.run(DATA, edit={one: lambda x: x * 0.5 + 0.25 * x.flip(0)}, read=[one])
        assert not torch.allclose(edited.logits, plain.logits), site
        assert not torch.equal(edited.acts[one], model.run(DATA, read=[one]).acts[one]), site


def test_edits_of_single_heads_touch_no_other_head() -> None:
    model = make()
    plain = model.run(DATA, read=["blocks.0.attn.hook_z", "blocks.0.attn.hook_pattern"])
    edited = model.run(
        DATA,
        edit={"blocks.0.attn.hook_z[2]": torch.tensor(0.0)},
        read=["blocks.0.attn.hook_z", "blocks.0.attn.hook_z[2]"],
    )
    z = edited.acts["blocks.0.attn.hook_z"]
    assert (z[:, :, 2] == 0).all()
    assert (edited.acts["blocks.0.attn.hook_z[2]"] == 0).all()
    keep = [0, 1, 3]
    assert torch.equal(z[:, :, keep], plain.acts["blocks.0.attn.hook_z"][:, :, keep])
    out = model.run(DATA, read=["blocks.0.hook_attn_out"]).acts["blocks.0.hook_attn_out"]
    missing = torch.einsum("bte,ed->btd", plain.acts["blocks.0.attn.hook_z[2]"], model.weight("W_O", 0)[2])
    got = model.run(DATA, edit={"blocks.0.attn.hook_z[2]": torch.tensor(0.0)}, read=["blocks.0.hook_attn_out"]).acts[
        "blocks.0.hook_attn_out"
    ]
    torch.testing.assert_close(got, out - missing)
    assert not torch.equal(edited.logits, plain.logits)
    flat = model.run(
        DATA, edit={"blocks.0.attn.hook_pattern[1]": lambda p: torch.ones_like(p) / 7}, maps=wb.capture(),
        read=["blocks.0.attn.hook_pattern"],
    )  # fmt: skip
    assert (flat.maps[0].dense()[:, 1] == 1 / 7).all()
    assert torch.equal(flat.acts["blocks.0.attn.hook_pattern"], flat.maps[0].dense())
    others = [0, 2, 3]
    torch.testing.assert_close(flat.maps[0].dense()[:, others], plain.acts["blocks.0.attn.hook_pattern"][:, others])


def test_an_edit_may_write_into_its_argument_without_touching_other_reads() -> None:
    model = make()

    def zero(x: torch.Tensor) -> torch.Tensor:
        x[:] = 0
        return x

    before = model.run(DATA, read=["blocks.0.hook_resid_post"]).acts["blocks.0.hook_resid_post"]
    run = model.run(DATA, read=["blocks.0.hook_resid_post"], edit={"blocks.1.hook_resid_pre": zero})
    assert torch.equal(run.acts["blocks.0.hook_resid_post"], before)
    torch.testing.assert_close(run.logits[:, 0], run.logits[:1, 0].expand(2, -1))


def test_split_inputs_route_one_head_alone() -> None:
    model = make()
    change = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sites = [f"blocks.1.attn.hook_{kind}" for kind in "qkv"]
    plain = model.run(DATA, read=sites).acts
    for kind, count in (("q", 4), ("k", 2), ("v", 2)):
        edited = model.run(DATA, read=sites, edit={f"blocks.1.hook_{kind}_input[1]": lambda x: x + change}).acts
        for other in "qkv":
            same = torch.isclose(
                edited[f"blocks.1.attn.hook_{other}"], plain[f"blocks.1.attn.hook_{other}"], atol=1e-12, rtol=0
            )
            heads = same.all(-1).all(0).all(0)
            expected = [not (other == kind and h == 1) for h in range(count if other == kind else len(heads))]
            assert heads.tolist() == expected, (kind, other)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_flow_through_reads_and_edits(name: str) -> None:
    model = make(VARIANTS[name])
    read = ["blocks.0.attn.hook_z", "blocks.0.hook_resid_pre", "blocks.1.hook_v_input"]
    run = model.run(DATA, read=read)
    loss = run.logits[:, -1].logsumexp(-1).sum()
    grads = torch.autograd.grad(loss, [run.acts[r] for r in read])
    assert all(g.abs().sum() > 0 for g in grads)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    whole = torch.tensor(1.0, dtype=torch.float64)

    def at(value: torch.Tensor) -> torch.Tensor:
        edited = model.run(DATA, edit={"blocks.0.attn.hook_z[1]": lambda z: z * value})
        return edited.logits[:, -1].logsumexp(-1).sum()

    slope = torch.autograd.grad(at(scale), scale)[0]
    step = 1e-5
    torch.testing.assert_close(slope, (at(whole + step) - at(whole - step)).detach() / (2 * step), rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        assert not model.run(DATA, read=read).acts[read[0]].requires_grad


def test_padding_gives_no_nan_gradients() -> None:
    model = make()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False
    for edit in ({}, {"blocks.0.attn.hook_attn_scores": lambda s: s}):
        model.net.zero_grad()
        run = model.run(Tokens(DATA, mask), edit=edit)
        run.logits[mask].sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.net.parameters())


def test_hooks_are_gone_afterwards_and_others_stay() -> None:
    model = make()
    plain = model.run(DATA).logits
    seen = []
    point = model.net.hook_dict["blocks.0.attn.hook_z"]
    point.add_hook(lambda tensor, hook: seen.append(hook.name))
    model.run(
        DATA,
        read=["blocks.0.attn.hook_z", "blocks.0.attn.hook_result"],
        edit={"blocks.0.attn.hook_z": torch.tensor(0.0)},
    )
    assert seen == ["blocks.0.attn.hook_z"]
    with pytest.raises(ZeroDivisionError):
        model.run(DATA, edit={"blocks.0.attn.hook_z": lambda z: 1 / 0, "blocks.0.hook_q_input": lambda x: x})
    with pytest.raises(WorkbenchError, match="must return the new tensor"):
        model.run(DATA, edit={"blocks.1.attn.hook_attn_scores": lambda s: None})
    counts = {name: len(p.fwd_hooks) + len(p._forward_hooks) for name, p in model.net.hook_dict.items()}
    assert {name for name, count in counts.items() if count} == {"blocks.0.attn.hook_z"}
    assert counts["blocks.0.attn.hook_z"] == 2
    assert torch.equal(model.run(DATA).logits, plain)


BAD = [
    ({"read": ["blocks.0.attn.hook_zz"]}, "blocks.<layer>.attn.hook_z"),
    ({"read": ["blocks.2.attn.hook_z"]}, r"blocks.0-1.attn.hook_z.*heads 0-3"),
    ({"read": ["blocks.0.attn.hook_z[4]"]}, "heads 0-3"),
    ({"read": ["blocks.0.attn.hook_k[2]"]}, "no site"),
    ({"read": ["encoder.blocks.0.attn.hook_z"]}, "no site"),
    ({"read": ["blocks.0.attn.hook_gate"]}, "no site"),
    ({"read": ["blocks.0.attn.hook_block_mass"]}, "capture\\(blocks="),
    ({"edit": {"blocks.0.attn.hook_lse": torch.tensor(0.0)}}, "cannot be edited"),
    ({"edit": {"blocks.0.attn.hook_z": torch.zeros(2, 7, 4)}}, r"\[2, 7, 4\].*\[2, 7, 4, 6\]"),
    ({"edit": {"blocks.0.attn.hook_z": lambda z: z, wb.Site("z", 0): lambda z: z}}, "edited twice"),
    ({"maps": wb.capture(layers=[5])}, "known: 0, 1"),
    ({"logits": "first"}, "known: all, last"),
    ({"cache": object()}, "Run.cache of a native model; got object"),
]


@pytest.mark.parametrize(("request_", "message"), BAD)
def test_bad_requests_say_what_is_possible(request_: dict, message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        make().run(DATA, **request_)


def test_bad_inputs_say_what_is_wrong() -> None:
    model = make(tokenizer=words())
    for given, message in (
        ("", "the prompt is empty"),
        (["a b", " "], "prompt 1 is empty"),
        ([], "no prompt"),
        (torch.zeros(1, 0, dtype=torch.int64), "no tokens"),
        (torch.zeros(0, 3, dtype=torch.int64), "empty batch"),
        (torch.zeros(1, 65, dtype=torch.int64), "65 tokens, 1 more than the model's context of 64"),
        (torch.tensor([[3, 23]]), r"\[0, 23\).*3 to 23"),
        (torch.tensor([[3, -1]]), "-1 to 3"),
        (torch.zeros(1, 3), "integers"),
        ({"input_ids": DATA, "pixel_values": DATA}, "pixel_values"),
        ({"attention_mask": DATA}, "input_ids"),
        ({"input_ids": DATA, "attention_mask": torch.zeros_like(DATA)}, "nothing but padding"),
        (Tokens(DATA, DATA >= 0, (), {"extra": DATA}), "extra"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            model.run(given)
    cache = model.run(DATA, cache=True).cache
    with pytest.raises(WorkbenchError, match="65 tokens"):
        model.run(torch.zeros(2, 58, dtype=torch.int64), cache=cache)
    with pytest.raises(WorkbenchError, match="batch of 2; the new tokens are 1"):
        model.run(DATA[:1], cache=cache)
    with pytest.raises(WorkbenchError, match="no tokenizer"):
        make().run("a b")
    model.net.train()
    with pytest.raises(WorkbenchError, match=r"training mode; call .net.eval\(\)"):
        model.run(DATA)


def test_texts_are_padded_on_the_side_of_the_tokenizer() -> None:
    for side in ("left", "right"):
        model = make(tokenizer=words(side))
        run = model.run(["a b c d", "e f"])
        alone = model.run("e f")
        real = slice(2, 4) if side == "left" else slice(0, 2)
        assert run.tokens.mask[1].tolist() == [side == "right"] * 2 + [side == "left"] * 2
        assert run.tokens.labels[1][real] == ("e", "f")
        torch.testing.assert_close(run.logits[1, real], alone.logits[0])
        assert torch.equal(
            model.run({"input_ids": run.tokens.ids, "attention_mask": run.tokens.mask.long()}).logits, run.logits
        )
        one = model.run({"input_ids": run.tokens.ids[0], "attention_mask": torch.ones(4)})
        torch.testing.assert_close(one.logits[0], run.logits[0])


def test_logits_requests() -> None:
    model = make()
    full = model.run(DATA)
    torch.testing.assert_close(model.run(DATA, logits="last").logits, full.logits[:, -1:])
    none = model.run(DATA, logits=None)
    assert none.logits is None
    assert torch.equal(none.output, full.output)
    assert (
        model.run(DATA, logits=None, read=["ln_final.hook_normalized"])
        .acts["ln_final.hook_normalized"]
        .equal(none.output)
    )


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_loaded_again_is_the_same_model(name: str, dtype: torch.dtype, tmp_path) -> None:
    model = make(VARIANTS[name], dtype, words())
    state = torch.get_rng_state()
    again = NativeModel.load(model.save(tmp_path / "saved", dtype))
    assert torch.equal(torch.get_rng_state(), state)
    assert again.name == "saved"
    assert len(again.revision) == 12
    assert again.shape == model.shape
    assert not again.net.training
    assert torch.equal(again.run("a b c").logits, model.run("a b c").logits)
    assert again.tokens("a b").labels == (("a", "b"),)
    half = NativeModel.load(model.save(tmp_path / "half", torch.float16))
    assert half.net.W_E.dtype == torch.float32
    torch.testing.assert_close(half.run(DATA).logits, model.run(DATA).logits.float(), rtol=0, atol=0.05)


def test_weights_have_names() -> None:
    model = make(VARIANTS["gated"])
    assert model.weight("W_O", 1).shape == (4, 6, 16)
    assert model.weight("W_K", 0).shape == (2, 16, 6)
    assert model.weight("W_U").shape == (16, 23)
    assert model.weight("W_gate", 1).shape == (16, 4)
    assert torch.equal(make(VARIANTS["learned"]).weight("W_U"), make(VARIANTS["learned"]).weight("W_E").T)
    with pytest.raises(UnknownName, match="W_O"):
        model.weight("W_OO", 0)


def test_folders_that_are_no_model(tmp_path) -> None:
    model = make(tokenizer=words())
    with pytest.raises(WorkbenchError, match=r"no config.json"):
        NativeModel.load(tmp_path)

    def broken(name: str) -> WorkbenchError:
        with pytest.raises(WorkbenchError) as caught:
            NativeModel.load(tmp_path / name)
        assert len(str(caught.value).splitlines()) == 1
        return caught.value

    for i, (change, message) in enumerate(
        (
            ({"heads": 0}, "heads is a whole number"),
            ({"layers": "2"}, "layers is a whole number"),
            ({"kv_heads": 3}, "multiple of kv_heads"),
            ({"head_width": 5}, "even head width"),
            ({"mixer": "mamba"}, "known: softmax"),
            ({"colour": 1}, "colour"),
            ({"width": 32}, "size mismatch"),
        )
    ):
        folder = model.save(tmp_path / f"config{i}")
        written = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**written, **change}))
        assert message in str(broken(f"config{i}")), change
    for i, text in enumerate(("{", "[1, 2]", '{"layers": 2}', "")):
        folder = model.save(tmp_path / f"json{i}")
        (folder / "config.json").write_text(text)
        assert "config.json does not describe a native model" in str(broken(f"json{i}"))
    folder = model.save(tmp_path / "cut")
    weights = (folder / "model.safetensors").read_bytes()
    for name, content in (("cut", weights[:-100]), ("junk", b"not a tensor file"), ("empty", b"")):
        other = model.save(tmp_path / name)
        (other / "model.safetensors").write_bytes(content)
        assert "cannot read" in str(broken(name))
    other = model.save(tmp_path / "missing")
    save_file({"W_E": torch.zeros(23, 16)}, other / "model.safetensors")
    assert "blocks.0" in str(broken("missing"))
    (model.save(tmp_path / "tokens") / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in str(broken("tokens"))
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkbenchError, match="cannot write"):
        model.save(tmp_path / "file")


def test_provenance_and_manifest() -> None:
    model = make(VARIANTS["gated"])
    run = model.run(DATA, maps=wb.capture(layers=1))
    assert list(run.maps) == [1]
    assert run.provenance.attention == "native gated-softmax"
    assert run.provenance.model == "tiny"
    frame = model.manifest().frame()
    assert frame.mixer.tolist() == ["gated-softmax"] * 2
    assert set(frame.exactness) == {"exact"}
    assert "blocks.1.attn.hook_gate" in model.manifest().sites
