"""Bridges: what is there stays and acts, and nothing of ours is left behind."""

import builders as B
import pytest
import torch
from bridges import IDS, boot, state

import workbench as wb
from workbench.errors import Refused
from workbench.models import bridge as module
from workbench.models.hf import HFModel


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def test_nothing_is_left_behind_after_an_error(monkeypatch):
    model = boot("llama")
    before, expected = state(model.bridge), model.bridge(IDS)

    def fail(x):
        raise ZeroDivisionError

    for edit in (
        "blocks.0.attn.hook_z",
        "blocks.1.hook_q_input",
        "blocks.1.attn.hook_result",
        "blocks.1.attn.hook_pattern",
    ):
        with pytest.raises(ZeroDivisionError):
            model.run(IDS, edit={edit: fail}, read=["blocks.0.hook_mlp_in"], maps=wb.capture())
        assert state(model.bridge) == before
    monkeypatch.setattr(module, "EAGER_LIMIT", 1)
    last = model.bridge.original_model.model.norm.original_component
    handle = last.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.run(IDS, maps=wb.capture())
    handle.remove()
    assert state(model.bridge) == before
    assert torch.equal(model.bridge(IDS), expected)


def test_hooks_that_were_there_stay_and_act(monkeypatch):
    model = boot("gpt2")
    plain = model.run(IDS).logits
    model.bridge.add_hook("blocks.0.attn.hook_z", lambda z, hook: z * 0, is_permanent=True)
    before, expected = state(model.bridge), model.bridge(IDS)
    run = model.run(IDS, maps=wb.capture(), read=["blocks.0.attn.hook_z"])
    assert (run.acts["blocks.0.attn.hook_z"] == 0).all()
    assert torch.equal(run.logits, expected)
    assert not torch.allclose(expected, plain)
    assert state(model.bridge) == before
    monkeypatch.setattr(module, "EAGER_LIMIT", 1)
    assert torch.equal(model.run(IDS).logits, expected)
    with pytest.raises(Refused, match=r"hooks of its own on blocks.0.attn.hook_z.*reset_hooks"):
        model.run(IDS, maps=wb.capture())
    model.bridge.reset_hooks(including_permanent=True)
    torch.testing.assert_close(model.run(IDS, maps=wb.capture()).logits, plain, rtol=1e-4, atol=1e-4)


def test_processed_weights_never_meet_the_original_ones(monkeypatch):
    model = boot("gpt2")
    plain = model.run(IDS).logits
    model.bridge.enable_compatibility_mode()
    expected = model.bridge(IDS)
    assert not torch.equal(expected, plain)
    run = model.run(IDS, maps=wb.capture(), read=["blocks.0.attn.hook_result"])
    assert torch.equal(run.logits, expected)
    out = model.run(IDS, read=["blocks.0.hook_attn_out"]).acts["blocks.0.hook_attn_out"]
    torch.testing.assert_close(
        run.acts["blocks.0.attn.hook_result"].sum(2) + model.bridge.blocks[0].attn.b_O, out, rtol=1e-4, atol=1e-5
    )
    monkeypatch.setattr(module, "EAGER_LIMIT", 1)
    assert torch.equal(model.run(IDS).logits, expected)
    with pytest.raises(Refused, match="weights were processed"):
        model.run(IDS, maps=wb.capture())


@pytest.mark.parametrize("name", ["gemma3", "phi3", "llama"])
@pytest.mark.parametrize("first", ["bridge", "capture"])
def test_booting_a_bridge_and_capturing_elsewhere_do_not_meet(name, first):
    """Bridges of some families patch classes for the whole process; our attention functions are registered for it."""
    other = B.NETS[name](dtype=torch.float32)
    plain = other(IDS).logits
    reference = HFModel(other).run(IDS, maps=wb.capture()).maps if first == "capture" else None
    model = boot(name)
    expected, cache = model.bridge.run_with_cache(IDS)
    run = HFModel(other).run(IDS, maps=wb.capture())
    assert torch.equal(run.logits, plain)
    assert torch.equal(other(IDS).logits, plain)
    for layer in range(2):
        torch.testing.assert_close(run.maps[layer].dense(), cache["pattern", layer], rtol=1e-4, atol=1e-5)
        if reference is not None:
            assert torch.equal(run.maps[layer].dense(), reference[layer].dense())
    assert torch.equal(model.bridge(IDS), expected)
    assert torch.equal(model.run(IDS, maps=wb.capture()).logits, expected)
