"""The native model: what can be read and edited, and what is refused."""

from dataclasses import replace

import pytest
import torch
from natives import DATA, VARIANTS, make, words

import workbench as wb
from workbench.errors import WorkbenchError
from workbench.models.native import NativeModel
from workbench.models.protocol import Tokens


def editable(model: NativeModel) -> list[wb.Site]:
    """All sites but the statistics of the attention map."""
    return [s for s in model.sites() if s.kind not in ("lse", "received", "entropy", "block_mass", "block_max")]


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
    for site in editable(model):
        found = model.run(DATA, read=[site]).acts[site]
        again = model.run(DATA, edit={site: found})
        torch.testing.assert_close(again.logits, plain.logits, rtol=1e-12, atol=1e-12, msg=str(site))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_site_acts_on_the_output(name: str) -> None:
    model = make(VARIANTS[name])
    plain = model.run(DATA)
    for site in editable(model):
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
