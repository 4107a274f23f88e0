"""Native models with every self-attention variant of the catalogue as mixer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import workbench as wb
from workbench.attention_map import AttentionMap
from workbench.catalogue import Variant, variants
from workbench.errors import UnknownName, WorkbenchError
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet
from workbench.models.native_variants import runnable

BASE = NativeConfig(layers=2, heads=4, width=16, head_width=8, vocab=23, mlp_width=24, context=64, positions="none")
IDS = torch.tensor([[3, 9, 4, 4, 17, 22, 1, 6, 5], [5, 2, 2, 8, 11, 0, 19, 7, 3]])
CAUSAL = runnable(causal=True)
STEPS = {record.name: record.recipe is not None and record.recipe.steps for record in variants()}
IMAGES = [name for name in runnable(causal=False) if name not in CAUSAL]


def model(mixer: str, **changes: object) -> NativeModel:
    torch.manual_seed(0)
    net = NativeNet(replace(BASE, mixer=mixer, **changes))
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if ".mixer.b_" in name:
                weight += 0.3 * torch.randn(weight.shape)
    return NativeModel(net.double().eval(), name=mixer)


def vision(mixer: str, grid: tuple[int, int] = (3, 4)) -> NativeModel:
    return model(mixer, grid=grid, patch=2, causal=False, positions="learned", vocab=5)


def pictures(grid: tuple[int, int] = (3, 4)) -> Tensor:
    rows, columns = grid
    return torch.randn(2, 3, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Watched:
    """A variant that remembers what it was called with and what it returned."""

    def __init__(self, variant: Variant) -> None:
        self.variant, self.name = variant, variant.name

    def __call__(self, **arguments: Any) -> tuple[Tensor, AttentionMap]:
        self.arguments, self.result = arguments, self.variant(**arguments)
        return self.result


def multiplies(m: NativeModel, inputs: Any) -> None:
    """The first layer's z is its map times the values that its operator was given."""
    mixer = m.net.blocks[0].attn.mixer
    mixer.variant = watched = Watched(mixer.variant)
    run = m.run(inputs, read=["blocks.0.attn.hook_z"], maps=wb.capture())
    mixer.variant = watched.variant
    out, _ = watched.result
    z = out if mixer.recipe.finish is None else mixer.recipe.finish(out)
    torch.testing.assert_close(z.transpose(1, 2), run.acts["blocks.0.attn.hook_z"], rtol=0, atol=0)
    if watched.variant.value_input is not None:
        given = watched.arguments.get(watched.variant.value_input)
        values = watched.result[1].values if given is None else given  # values that the operator makes itself
        torch.testing.assert_close(run.maps[0].matvec(values), out, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mixer", CAUSAL)
def test_a_causal_mixer_runs_in_a_model(mixer: str) -> None:
    m = model(mixer)
    plain = m.run(IDS)
    run = m.run(IDS, read=["blocks.0.attn.hook_z"], maps=wb.capture(blocks=4))
    assert torch.equal(plain.logits, run.logits), "capture changed the output"
    assert set(run.maps) == {0, 1}
    multiplies(m, IDS)
    changed = IDS.clone()
    changed[:, 6:] = (changed[:, 6:] + 5) % 23
    other = m.run(changed)
    torch.testing.assert_close(other.logits[:, :6], plain.logits[:, :6], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(other.logits[:, 6:], plain.logits[:, 6:])


@pytest.mark.parametrize("mixer", [name for name in CAUSAL if not STEPS[name]])
def test_a_cache_is_refused_where_the_length_of_the_text_counts(mixer: str) -> None:
    m = model(mixer)
    with pytest.raises(WorkbenchError, match="depends on the length of the whole text"):
        m.run(IDS, cache=True)


@pytest.mark.parametrize("mixer", [name for name in CAUSAL if STEPS[name]])
def test_a_step_with_a_cache_and_a_padded_batch_give_the_same(mixer: str) -> None:
    m = model(mixer)
    whole = m.run(IDS, maps=wb.capture())
    first = m.run(IDS[:, :6], cache=True)
    then = m.run(IDS[:, 6:], cache=first.cache, maps=wb.capture())
    torch.testing.assert_close(then.logits, whole.logits[:, 6:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(then.maps[1].dense(), whole.maps[1].dense()[:, :, 6:], rtol=1e-9, atol=1e-9)
    assert then.maps[1].offset == 6
    padded = torch.cat([IDS[:, :5], torch.zeros(2, 4, dtype=torch.int64)], 1)
    mask = torch.ones_like(padded)
    mask[0, 5:] = 0
    padded[1] = IDS[1]
    mixed = m.run({"input_ids": padded, "attention_mask": mask}, maps=wb.capture())
    short = m.run(IDS[:1, :5], maps=wb.capture())
    torch.testing.assert_close(mixed.logits[0, :5], short.logits[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mixed.logits[1], whole.logits[1], rtol=1e-9, atol=1e-9)
    found = mixed.maps[1].dense()
    torch.testing.assert_close(found[0, :, :5, :5], short.maps[1].dense()[0], rtol=1e-9, atol=1e-9)
    assert not found[0, :, 5:].any()
    assert not found[0, :, :, 5:].any()


@pytest.mark.parametrize("mixer", CAUSAL)
def test_patching_and_gradients_reach_through(mixer: str) -> None:
    m = model(mixer)
    clean = m.run(IDS, read=["blocks.0.attn.hook_v", "blocks.0.hook_resid_pre"])
    other = m.run(IDS.flip(0), read=["blocks.0.hook_resid_pre", "blocks.0.attn.hook_v"])
    site = "blocks.0.hook_resid_pre"
    patched = m.run(IDS, edit={site: other.acts[site]})
    torch.testing.assert_close(patched.logits, other.logits, rtol=1e-9, atol=1e-9)
    values = "blocks.0.attn.hook_v"
    assert not torch.allclose(m.run(IDS, edit={values: other.acts[values]}).logits, clean.logits)
    with torch.enable_grad():
        run = m.run(IDS, read=[site], edit={site: lambda x: x.detach().requires_grad_()})
        grad = torch.autograd.grad(run.logits.square().sum(), run.acts[site])[0]
    assert torch.isfinite(grad).all()
    assert bool((grad != 0).any())


@pytest.mark.parametrize("mixer", IMAGES)
def test_a_vision_mixer_runs_in_a_model_of_images(mixer: str) -> None:
    m = vision(mixer)
    plain = m.run(pictures())
    run = m.run({"pixel_values": pictures()}, read=["blocks.0.attn.hook_z"], maps=wb.capture(blocks=4))
    assert plain.logits.shape == (2, 5)
    assert torch.equal(plain.logits, run.logits)
    assert plain.output.shape == (2, 12, 16)
    multiplies(m, pictures())
    values = "blocks.0.attn.hook_v"
    assert not torch.allclose(m.run(pictures(), edit={values: lambda v: 1.5 * v}).logits, plain.logits)


@pytest.mark.parametrize("mixer", [*CAUSAL, *IMAGES])
def test_queries_keys_and_values_matter_where_they_have_hook_points(mixer: str) -> None:
    """What a mixer has no use for is named in ``Recipe.ignores`` and cannot be read or edited."""
    m, inputs = (model(mixer), IDS) if mixer in CAUSAL else (vision(mixer), pictures())
    plain = m.run(inputs).logits
    for kind in ("q", "k", "v"):
        site = f"blocks.0.attn.hook_{kind}"
        noise = lambda x: x + torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)  # noqa: E731
        if kind in m.net.blocks[0].attn.mixer.ignores:
            with pytest.raises(UnknownName):
                m.run(inputs, edit={site: noise})
        else:
            assert not torch.equal(m.run(inputs, edit={site: noise}).logits, plain), kind


@pytest.mark.parametrize("mixer", CAUSAL)
def test_key_heads_can_be_shared(mixer: str) -> None:
    run = model(mixer, kv_heads=2).run(IDS, maps=wb.capture())
    assert torch.isfinite(run.logits).all()
    assert run.maps[0].dense().shape[2:] == (9, 9)


def test_a_causal_mixer_sees_images_too() -> None:
    m = vision(CAUSAL[0])
    assert m.run(pictures()).logits.shape == (2, 5)
    for bad in (pictures()[0], pictures()[:, :2], pictures((4, 4)), IDS, {"input_ids": IDS}, "a text"):
        with pytest.raises(WorkbenchError, match="images"):
            m.run(bad)
    with pytest.raises(WorkbenchError, match="keeps no key-value cache"):
        m.run(pictures(), cache=True)


def test_the_manifest_says_what_is_a_derivative() -> None:
    assert {record.exactness for record in model("yaad").manifest().layers} == {"jacobian"}
    assert {record.exactness for record in model("gated-deltanet").manifest().layers} == {"exact"}


def test_what_cannot_be_a_mixer_is_refused() -> None:
    with pytest.raises(UnknownName, match="no mixer 'sofmax'; known: softmax, gated-softmax"):
        replace(BASE, mixer="sofmax")
    ahead = next(v.name for v in variants() if v.recipe is not None and not v.causal)
    with pytest.raises(WorkbenchError, match=f"{ahead} looks ahead: a native model runs it with causal=False"):
        replace(BASE, mixer=ahead)
    with pytest.raises(WorkbenchError, match="scale belongs to the softmax mixers"):
        NativeNet(replace(BASE, mixer=CAUSAL[0], scale=0.1))
    with pytest.raises(WorkbenchError, match="an image is a grid of rows and columns"):
        replace(BASE, grid=(3, 0))


def test_a_model_with_a_variant_is_saved_and_loaded(tmp_path) -> None:
    m = model(CAUSAL[-1])
    again = NativeModel.load(m.save(tmp_path, dtype=torch.float64))
    assert torch.equal(again.run(IDS).logits, m.run(IDS).logits)
    seen = vision(CAUSAL[0])
    again = NativeModel.load(seen.save(tmp_path / "images", dtype=torch.float64))
    assert torch.equal(again.run(pictures()).logits, seen.run(pictures()).logits)
