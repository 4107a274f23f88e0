"""Maps of layers in which something else than softmax attention mixes the tokens, against what the layers compute."""

import functools
import sys
import threading
from contextlib import contextmanager

import builders as B
import pytest
import torch
from full_precision import FullPrecision

import workbench as wb
from workbench.captures import capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.hf import HFModel
from workbench.models.recorders.delta import GatedDelta
from workbench.models.recorders.registry import recorder_of
from workbench.sites import Site

FAMILIES = tuple(B.STATE_NETS)
FUNCTIONS = {
    "qwen3_next": ("torch_chunk_gated_delta_rule", "value"),
    "qwen3_5": ("torch_chunk_gated_delta_rule", "value"),
    "qwen3_5_moe": ("torch_chunk_gated_delta_rule", "value"),
    "olmo_hybrid": ("torch_chunk_gated_delta_rule", "value"),
    "kimi_linear": ("chunk_kimi_delta_attention", "value"),
    "mamba": ("mamba_selective_scan", 0),
    "falcon_mamba": ("mamba_selective_scan", 0),
    "jamba": ("mamba_selective_scan", 0),
    "mamba2": ("mamba2_chunk_scan", 0),
    "bamba": ("mamba2_chunk_scan", 0),
    "granitemoehybrid": ("mamba2_chunk_scan", 0),
    "nemotron_h": ("mamba2_chunk_scan", 0),
    "rwkv": ("rwkv_linear_attention", 3),
}
"""Families that mix in a function of their file, and which argument its values are."""


def recorded(case):
    return [layer for layer in case.model._layers if layer.route == "recorder"]


@contextmanager
def looking(name, case):
    """Values and outputs of every recorded layer as the layer itself has them, ``[B, H, N, E]`` by layer, read without us."""
    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        if name in FUNCTIONS:
            function, at = FUNCTIONS[name]
            file = sys.modules[type(recorded(case)[0].module).__module__]
            plain, order = getattr(file, function), [layer.key for layer in recorded(case)]

            @functools.wraps(plain)
            def looked(*args, **kwargs):
                output = plain(*args, **kwargs)
                v = args[at] if isinstance(at, int) and at < len(args) else args[2]
                z = output[0] if isinstance(output, tuple | list) else output
                if name in ("mamba", "falcon_mamba", "jamba"):  # the gate is applied inside
                    z = z / torch.nn.functional.silu(kwargs["z"])
                    v, z = v[..., None], z[..., None]
                elif name == "rwkv":
                    v, z = v.transpose(1, 2)[..., None], z.transpose(1, 2)[..., None]
                else:
                    v, z = v.transpose(1, 2), z.transpose(1, 2)
                seen[order[len(seen)]] = (v, z)
                return output

            patch.setattr(file, function, looked)
            yield seen
            return
        module, handles, parts = recorded(case)[0].module, [], {}
        if name == "recurrent_gemma":
            handles.append(module.register_forward_hook(lambda m, i, o: parts.update(v=i[0], z=o)))
        elif name.startswith("lfm2"):
            handles.append(module.in_proj.register_forward_hook(lambda m, i, o: parts.update(v=o.chunk(3, -1)[2])))
            handles.append(module.out_proj.register_forward_pre_hook(lambda m, i: parts.update(z=i[0])))
        else:
            handles.append(module.qkv_proj.register_forward_hook(lambda m, i, o: parts.update(v=module.act_fn(o))))
            handles.append(module.norm.register_forward_pre_hook(lambda m, i: parts.update(z=i[0])))
        yield seen
        for handle in handles:
            handle.remove()
        v, z = parts["v"], parts["z"]
        if name == "minimax":
            v, z = v.unflatten(-1, (B.H, 3, -1))[..., 2, :], z.unflatten(-1, (B.H, -1))
        else:
            v, z = v[..., None], z[..., None]
        seen[0] = (v.transpose(1, 2), z.transpose(1, 2))


@pytest.mark.parametrize("name", FAMILIES)
def test_map_times_values_is_the_mixers_own_output_in_float64(name):
    case = B.hugging_face(name)
    with torch.no_grad(), FullPrecision(), looking(name, case) as seen:
        maps = case.model.run(case.inputs, maps=capture()).maps
    assert tuple(maps) == case.keys
    assert set(seen) == {layer.key for layer in recorded(case)}
    for key, (v, z) in seen.items():
        found = maps[key]
        assert v.dtype == z.dtype == torch.float64
        assert found.shape == (*z.shape[:3], z.shape[2])
        assert torch.allclose(found.matvec(v), z, atol=1e-10, rtol=0)
        weights = found.dense()
        assert (weights.triu(1) == 0).all()
        assert torch.allclose(weights @ v.repeat_interleave(weights.shape[1] // v.shape[1], 1), z, atol=1e-10, rtol=0)
        below = weights.tril(-1)
        assert below.abs().amax((0, 2, 3)).min() > 0, "a head of the test model mixes nothing"


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_maps_err_as_float32_does(name):
    """Relative to the largest output; 6e-8 to 2e-6 are measured."""
    case = B.hugging_face(name, None, torch.float32)
    with torch.no_grad(), looking(name, case) as seen:
        run = case.model.run(case.inputs, maps=capture())
    for key, (v, z) in seen.items():
        assert z.dtype == torch.float32
        assert (run.maps[key].matvec(v) - z).abs().max() < 5e-6 * z.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision(name):
    case = B.hugging_face(name, None, torch.bfloat16)
    with torch.no_grad(), looking(name, case) as seen:
        off = case.model.run(case.inputs)
        seen.clear()
        on = case.model.run(case.inputs, maps=capture(blocks=4))
    assert torch.equal(off.logits, on.logits)
    for key, (v, z) in seen.items():
        z = z.float().nan_to_num(posinf=0, neginf=0)
        assert on.maps[key].dense().dtype in (torch.float32, torch.float64)
        if name not in (
            "mamba",
            "falcon_mamba",
            "jamba",
        ):  # what comes out before their gate cannot be told in so few digits
            assert (on.maps[key].matvec(v.float()) - z).abs().max() < 0.02 * z.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_changed_values_change_the_output_by_the_map(name):
    """Queries, keys and gates stay as they are: the output moves by M times the change, and by nothing else."""
    case = B.hugging_face(name)
    layer = recorded(case)[-1]
    v, z = Site("v", layer.index), Site("z", layer.index)
    if z not in case.model.sites():
        with pytest.raises(UnknownName, match="hook_v"):
            case.model.run(case.inputs, read=[z])
        return
    with torch.no_grad(), FullPrecision():
        before = case.model.run(case.inputs, read=[v, z], maps=capture(layers=layer.key))
        change = torch.randn_like(before.acts[v])
        after = case.model.run(case.inputs, read=[z], edit={v: lambda x: x + change})
    moved = before.maps[layer.key].matvec(change.transpose(1, 2)).transpose(1, 2)
    assert torch.allclose(after.acts[z] - before.acts[z], moved, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["qwen3_next", "kimi_linear", "mamba", "mamba2", "minimax", "rwkv", "recurrent_gemma", "lfm2"]
)
def test_texts_longer_than_a_chunk(name):
    net = B.STATE_NETS[name](None, torch.float32)
    if hasattr(net.config, "max_position_embeddings"):
        net.config.max_position_embeddings = 256
    model, ids = HFModel(net), B.ids(1, 131)
    case = B.Case(model, ids, (), net)
    with torch.no_grad(), looking(name, case) as seen:
        maps = model.run(ids, maps=capture(), logits=None).maps
    for key, (v, z) in seen.items():
        assert (maps[key].matvec(v) - z).abs().max() < 2e-5 * z.abs().max()
        assert (maps[key].rows(97, 99)[..., 99:] == 0).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_manifest_numbers_the_layers_by_their_blocks(name):
    case = B.hugging_face(name)
    records = {record.layer: record for record in case.model.manifest().layers}
    for layer in recorded(case):
        record = records[layer.key]
        assert record.layer == layer.index == int(layer.block.rsplit(".", 1)[1])
        assert record.mixer == recorder_of(layer.module).mixer
        assert (record.route, record.exactness) == ("recorder", "exact")
        assert "decoding from a cache" in record.missing
    assert all(record.exactness == "exact" for record in records.values())


@pytest.mark.parametrize("name", ["qwen3_next", "mamba", "minimax", "recurrent_gemma", "rwkv", "lfm2"])
def test_nothing_is_left_behind(name):
    case = B.hugging_face(name)
    files = {sys.modules[type(layer.module).__module__] for layer in recorded(case)}
    functions = [
        (file, f, getattr(file, f))
        for file in files
        for f in recorder_of(recorded(case)[0].module).functions
        if hasattr(file, f)
    ]
    before = [dict(module.__dict__) for module in case.net.modules()]

    def fails(x):
        raise RuntimeError("from the edit")

    with torch.no_grad():
        case.model.run(case.inputs, maps=capture())
        for site in (Site("resid_post", recorded(case)[-1].index), Site("v", recorded(case)[-1].index)):
            with pytest.raises(RuntimeError, match="from the edit"):
                case.model.run(case.inputs, edit={site: fails}, maps=capture())
    assert all(getattr(file, f) is plain for file, f, plain in functions)
    for module, held in zip(case.net.modules(), before, strict=True):
        assert "forward" not in module.__dict__
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert module.__dict__.keys() == held.keys()


def test_a_model_that_an_edit_runs_is_not_recorded():
    """It shares the replaced function with the run that the edit belongs to."""
    case, other = B.hugging_face("qwen3_next"), B.STATE_NETS["qwen3_next"]()
    found = []

    def edit(v):
        found.append(other(B.ids(1, 20)).logits)
        return v

    with torch.no_grad():
        plain = case.model.run(case.inputs, maps=capture())
        run = case.model.run(case.inputs, edit={"blocks.0.attn.hook_v": edit}, maps=capture())
        assert torch.equal(run.logits, plain.logits)
        assert torch.equal(run.maps[0].dense(), plain.maps[0].dense())
        assert torch.equal(found[0], other(B.ids(1, 20)).logits)


def test_a_wanted_layer_that_does_not_report_raises(monkeypatch):
    case = B.hugging_face("qwen3_next")
    module = recorded(case)[0].module
    monkeypatch.setattr(module, "forward", lambda hidden_states, **_: hidden_states)
    with torch.no_grad(), pytest.raises(WorkbenchError, match="layer 0 of Qwen3NextForCausalLM.*did not run"):
        case.model.run(case.inputs, maps=capture())


def test_a_function_kept_by_the_module_itself_is_recorded(monkeypatch):
    """As in older versions of transformers, where the file's function is not what the forward calls."""
    case = B.hugging_face("qwen3_next")
    module = recorded(case)[0].module
    file = sys.modules[type(module).__module__]
    with torch.no_grad():
        expected = case.model.run(case.inputs, maps=capture()).maps[0].dense()
    plain = file.torch_chunk_gated_delta_rule
    monkeypatch.setitem(module.__dict__, "chunk_gated_delta_rule", plain)
    monkeypatch.setattr(file, "torch_chunk_gated_delta_rule", lambda *a, **k: module.chunk_gated_delta_rule(*a, **k))
    monkeypatch.setattr(GatedDelta, "functions", ("chunk_gated_delta_rule",))
    with torch.no_grad():
        assert torch.equal(case.model.run(case.inputs, maps=capture()).maps[0].dense(), expected)
    assert module.chunk_gated_delta_rule is plain


def test_a_version_without_the_function_has_no_route(monkeypatch):
    case = B.hugging_face("mamba2")
    monkeypatch.delattr(sys.modules[type(recorded(case)[0].module).__module__], "mamba2_chunk_scan")
    monkeypatch.delattr(sys.modules[type(recorded(case)[0].module).__module__], "mamba2_selective_state_update")
    records = HFModel(case.net).manifest().layers
    assert [record.route for record in records] == ["none", "none"]
    assert "in this version of transformers" in records[0].missing


def test_runs_in_threads_share_the_replaced_function():
    one, two = (HFModel(B.STATE_NETS["qwen3_next"](None, torch.float32)) for _ in range(2))
    file = sys.modules[type(one._layers[0].module).__module__]
    plain, found, ids = file.torch_chunk_gated_delta_rule, {}, B.ids()

    def run(model, key):
        with torch.no_grad():
            found[key] = [model.run(ids, maps=capture()).maps[0].dense() for _ in range(5)]

    threads = [threading.Thread(target=run, args=(m, key)) for m, key in ((one, 0), (two, 1), (one, 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(x, found[0][0]) for key in range(3) for x in found[key])
    assert file.torch_chunk_gated_delta_rule is plain


def test_layers_with_states_build_no_scores(monkeypatch):
    """Memory of eager attention is not asked for where there is none."""
    monkeypatch.setattr("workbench.models.inputs.free_memory", lambda device: 0)
    case = B.hugging_face("mamba2")
    with torch.no_grad():
        assert case.model.run(case.inputs, maps=capture()).provenance.attention == "none"
        with pytest.raises(Refused, match="eager attention"):
            B.hugging_face("jamba", "eager").model.run(case.inputs)


def test_what_cannot_be_captured_is_refused_with_a_reason():
    case = B.hugging_face("qwen3_next")
    with torch.no_grad():
        with pytest.raises(Refused, match="does not build the pattern"):
            case.model.run(case.inputs, edit={"blocks.0.attn.hook_pattern": lambda p: p})
        with pytest.raises(UnknownName, match="blocks.0.attn.hook_q"):
            case.model.run(case.inputs, read=["blocks.0.attn.hook_q"])
        with pytest.raises(Refused, match="no distribution"):
            case.model.run(case.inputs, maps=capture(layers=[0], stats=("entropy",)))
        with pytest.raises(Refused, match="layer 0 .*steps cannot be captured"):
            wb.generate(case.model, case.inputs, steps=2, maps=capture())
    with pytest.raises(Refused, match="compiled"):
        HFModel(torch.compile(B.STATE_NETS["mamba2"]())).run(B.ids(), maps=capture())
    training = HFModel(B.STATE_NETS["mamba"]().train())
    with pytest.raises(WorkbenchError, match="training mode"):
        training.run(B.ids(), maps=capture())
