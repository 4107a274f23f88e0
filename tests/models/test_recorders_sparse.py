"""Maps of sparse, low-rank, differential and Fourier mixing in Hugging Face models, against what the layers compute."""

import functools
import threading

import pytest
import torch
from full_precision import FullPrecision
from sparse_nets import SPARSE_NETS
from sparse_runs import IMAGES, TEXTS, answer, looking, made

import workbench as wb
from workbench.captures import capture
from workbench.errors import Refused, WorkbenchError
from workbench.models.hf import HFModel
from workbench.models.protocol import Tokens
from workbench.sites import Site


@pytest.mark.parametrize("name", TEXTS)
def test_map_times_values_is_the_layers_own_output_in_float64(name):
    model, ids = made(name)
    n = ids.shape[1]
    with torch.no_grad(), FullPrecision(), looking(model) as seen:
        maps = model.run(ids, maps=capture()).maps
    assert tuple(maps) == tuple(seen) == (0, 1)
    for key, found in maps.items():
        v, z = seen[key]["v"], seen[key]["z"]
        assert v.dtype == z.dtype == torch.float64
        keys = 2 * n if name == "fnet" else n
        assert found.shape == (2, z.shape[1], n, keys), "padding that the model adds is no token"
        assert torch.allclose(found.matvec(v[:, :, :keys]), z[:, :, :n], atol=1e-10, rtol=0)
        assert torch.allclose(found.dense() @ v[:, :, :keys], z[:, :, :n], atol=1e-10, rtol=0)
        assert model.manifest().layers[key].exactness == found.exactness == "exact"
        if found.row_sum == "1":
            assert torch.allclose(found.row_sums(), torch.ones(1, dtype=torch.float64))


@pytest.mark.parametrize("name", TEXTS)
def test_float32_maps_err_as_float32_does(name):
    """Relative to the largest output; at most 5e-7 is measured."""
    model, ids = made(name, torch.float32)
    with torch.no_grad(), looking(model) as seen:
        off = model.run(ids)
        seen.clear()
        on = model.run(ids, maps=capture(blocks=4, stats=("received", "distance")))
        off_again = model.run(ids)
    assert torch.equal(off.logits, on.logits)
    assert torch.equal(off.logits, off_again.logits)
    for key, found in on.maps.items():
        v, z = seen[key]["v"], seen[key]["z"][:, :, : ids.shape[1]]
        assert (found.matvec(v[:, :, : found.shape[3]]) - z).abs().max() < 2e-6 * z.abs().max()


@pytest.mark.parametrize("name", [n for n in (*TEXTS, *IMAGES, "deepseek_v32") if n not in ("fnet", "nystromformer")])
def test_half_precision_keeps_every_bit(name):
    """FNet and Nyströmformer do not run in it."""
    model, given = made(name, torch.bfloat16)
    with torch.no_grad():
        off, on = model.run(given), model.run(given, maps=capture(blocks=4))
    assert torch.equal(answer(off), answer(on))
    assert all(found.dense().isfinite().all() and found.dense().dtype == torch.float32 for found in on.maps.values())


@pytest.mark.parametrize("name", [name for name in SPARSE_NETS if name != "fnet"])
def test_changed_values_change_the_output_by_the_map(name):
    """Queries and keys stay as they are: the output moves by M times the change, and by nothing else."""
    model, given = made(name)
    layer = model._layers[-1]
    v, z = Site("v", layer.index), Site("z", layer.index)
    with torch.no_grad(), FullPrecision():
        before = model.run(given, read=[v, z], maps=capture(layers=layer.key))
        change = torch.randn_like(before.acts[v])
        after = model.run(given, read=[z], edit={v: lambda x: x + change})
    found = before.maps[layer.key]
    assert torch.allclose(found.matvec(before.acts[v].transpose(1, 2)).transpose(1, 2), before.acts[z], atol=1e-10)
    moved = found.matvec(change.transpose(1, 2)).transpose(1, 2)
    assert torch.allclose(after.acts[z] - before.acts[z], moved, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in TEXTS if name not in ("fnet", "diffllama")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_user(name, side):
    """Padded rows are empty. Padded keys get nothing, but where the model itself gives them something."""
    model, ids = made(name)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, :3] = False
    mask = mask if side == "left" else mask.flip(1)
    if name == "nystromformer" or (side == "left" and name.startswith("reformer")):
        with pytest.raises(Refused, match="runs no padded text" if name == "nystromformer" else "pad on the right"):
            model.run(Tokens(ids, mask), maps=capture())
        return
    with torch.no_grad(), FullPrecision(), looking(model) as seen:
        on = model.run(Tokens(ids, mask), maps=capture())
        off = model.run(Tokens(ids, mask))
    assert torch.equal(on.logits, off.logits)
    for key, found in on.maps.items():
        v, z = (seen[key][part][:, :, : ids.shape[1]] for part in ("v", "z"))
        weights = found.dense()
        assert (weights[0, :, ~mask[0]] == 0).all()
        if not name.startswith("nystromformer"):
            assert (weights[0, ..., ~mask[0]] == 0).all()
        for b in range(2):
            assert torch.allclose(found.matvec(v)[b, :, mask[b]], z[b, :, mask[b]], atol=1e-10)


@pytest.mark.parametrize("name", [*SPARSE_NETS, "swin", "deepseek_v32", "albert"])
def test_nothing_is_left_behind(name):
    model, given = made(name)
    model.run(given)  # some settle on their chunks in the first run
    before = [dict(module.__dict__) for module in model.model.modules()]
    where = Site("z", model._layers[-1].index)

    def fails(x):
        raise RuntimeError("from the edit")

    with torch.no_grad():
        model.run(given, maps=capture())
        with pytest.raises(RuntimeError, match="from the edit"):
            model.run(given, edit={where: fails}, maps=capture())
    for module, held in zip(model.model.modules(), before, strict=True):
        assert module.__dict__.keys() == held.keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "fnet"])
def test_a_wanted_layer_that_does_not_report_raises(name, monkeypatch):
    model, ids = made(name)
    module = model._layers[1].module
    plain = module.forward

    @functools.wraps(plain)
    def other(*args, **kwargs):
        """The same output by a route that no recorder knows."""
        with torch._C.DisableTorchFunction(), wb.models.current.inside(None):
            return plain(*args, **kwargs)

    monkeypatch.setitem(module.__dict__, "forward", other)
    with torch.no_grad(), pytest.raises(WorkbenchError, match=r"layer 1 of .* did not run its attention"):
        model.run(ids, maps=capture())


@pytest.mark.parametrize("name", ["diffllama", "longformer", "nystromformer", "reformer", "swinv2"])
def test_a_run_inside_an_edit_of_the_values_is_a_run_of_its_own(name):
    model, given = made(name)
    v = Site("v", 1)
    inner = []

    def nested(x):
        inner.append(model.run(given, read=[v], maps=capture()))
        return 2 * x

    with torch.no_grad():
        alone = model.run(given, read=[v], maps=capture())
        outer = model.run(given, edit={v: nested}, read=[v, Site("z", 1)], maps=capture())
    assert torch.equal(answer(inner[0]), answer(alone))
    assert torch.equal(outer.acts[v], 2 * alone.acts[v])
    for key in (0, 1):
        for found in (inner[0].maps[key], outer.maps[key]):
            assert torch.equal(found.dense(), alone.maps[key].dense())


@pytest.mark.parametrize("name", ["diffllama", "longformer", "big_bird-sparse", "deepseek_v32"])  # hashes share a seed
def test_runs_of_one_net_in_threads(name):
    one, given = made(name, torch.float32)
    models, found = [one, HFModel(one.model), one], {}
    with torch.no_grad():
        expected = one.run(given, maps=capture()).maps[1].dense()
    before = [dict(module.__dict__) for module in one.model.modules()]

    def run(key, model):
        with torch.no_grad():
            found[key] = [model.run(given, maps=capture()).maps[1].dense() for _ in range(5)]

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(models)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(x, expected) for key in range(3) for x in found[key])
    for module, held in zip(one.model.modules(), before, strict=True):
        assert module.__dict__.keys() == held.keys()


# ------------------------------------------------------------------ each family
