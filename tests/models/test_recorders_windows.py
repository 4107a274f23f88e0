"""What is particular to the families of Hugging Face that attend in windows of an image."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from sparse_runs import IMAGES, made

from workbench.captures import capture
from workbench.errors import Refused
from workbench.patterns.windows import WindowsMap
from workbench.sites import Site


@contextmanager
def whole_image(model, index):
    """Input of the attention and what it adds, over the image in its own order, ``[B, N, C]``."""
    layer = model._layers[index]
    block, parts = model.model.get_submodule(layer.block), {}
    with ExitStack() as undo:

        def after(part, hook):
            undo.callback(part.register_forward_hook(hook).remove)

        undo.callback(block.register_forward_pre_hook(lambda m, i: parts.update(normed=i[0], entry=i[0])).remove)
        if type(block).__name__ in ("Swinv2Layer", "Swin2SRLayer"):  # norm behind the attention
            after(block.layernorm_before, lambda m, i, o: parts.update(added=i[0]))
        else:
            after(block.layernorm_before, lambda m, i, o: parts.update(normed=o))
            after(block.layernorm_after, lambda m, i, o: parts.update(added=i[0] - parts["entry"]))
        yield parts


def projections(layer, model):
    if hasattr(layer.module, "v_proj"):
        return layer.module.v_proj, layer.module.o_proj
    return layer.module.value, model.model.get_submodule(layer.block).attention.output.dense


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_windows_are_put_together_over_the_image(name, index):
    """Layers 1 and 3 are shifted where the image is larger than a window."""
    model, given = made(name)
    layer = model._layers[index]
    value, out = projections(layer, model)
    with torch.no_grad(), whole_image(model, index) as parts:
        run = model.run(given, maps=capture(), read=[Site("v", index), Site("z", index)])
        off = model.run(given)
        found = run.maps[layer.key]
        v = value(parts["normed"]).unflatten(-1, (found.shape[1], -1))
    with torch.no_grad():
        z = found.matvec(v.transpose(1, 2)).transpose(1, 2)
        assert torch.allclose(out(z.flatten(-2)), parts["added"], atol=1e-10)
    assert torch.equal(run.acts[Site("v", index)], v)
    assert torch.allclose(run.acts[Site("z", index)], z, atol=1e-10)
    assert torch.equal(run.output, off.output)
    assert isinstance(found, WindowsMap)
    assert found.native().shape[0] == 2 * found.shape[2] // 16
    assert torch.allclose(found.dense().sum(-1), torch.ones(1, dtype=torch.float64))
    side = 16 if index < 2 or name == "swin2sr" else 8
    far = (found.dense() > 1e-9).nonzero()[:, 2:]
    rows, columns = far // side, far % side
    assert max(int((p[:, 0] - p[:, 1]).abs().max()) for p in (rows, columns)) == 3


@pytest.mark.parametrize("name", [name for name in IMAGES if name != "swin2sr"])  # that pads the pixels
def test_images_that_are_no_whole_windows_are_padded_with_tokens(name):
    model, _ = made(name)
    pixels = torch.randn(2, 3, 28, 20, generator=torch.Generator().manual_seed(3)).double()
    layer = model._layers[1]
    value, out = projections(layer, model)
    with torch.no_grad(), whole_image(model, 1) as parts:
        found = model.run({"pixel_values": pixels}, maps=capture()).maps[1]
        normed = torch.nn.functional.pad(parts["normed"].unflatten(1, (14, 10)), (0, 0, 0, 2, 0, 2))
        v = value(normed.flatten(1, 2)).unflatten(-1, (found.shape[1], -1)).transpose(1, 2)
    assert found.shape == (2, 2, 16 * 12, 16 * 12)
    with torch.no_grad():
        z = out(found.matvec(v).transpose(1, 2).flatten(-2)).unflatten(1, (16, 12))[:, :14, :10]
        assert torch.allclose(z.flatten(1, 2), parts["added"], atol=1e-10)


def test_patterns_of_windows_are_edited_over_the_image():
    model, given = made("swin")
    model.model.set_attn_implementation("eager")
    pattern, z = Site("pattern", 1), Site("z", 1)
    with torch.no_grad():
        before = model.run(given, read=[pattern, z], maps=capture())
        after = model.run(given, edit={pattern: lambda p: p / 2}, read=[z], maps=capture())
        with pytest.raises(Refused, match="other windows"):
            model.run(given, edit={pattern: torch.ones_like})
    assert torch.allclose(before.acts[pattern], before.maps[1].dense())
    assert torch.allclose(after.acts[z], before.acts[z] / 2)
    assert torch.allclose(after.maps[1].dense(), before.maps[1].dense() / 2)
