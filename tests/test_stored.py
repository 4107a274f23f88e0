"""Maps on disk answer as those in memory do, bit for bit, and hold no memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import NETS, L, bridged, hugging_face, ids, native
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import workbench as wb
from workbench import mods, stored
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Relative
from workbench.maps import AttentionMap, GatedMap, SummaryMap
from workbench.models.hf import HFModel
from workbench.patterns import softmax
from workbench.patterns.explicit import ExplicitMap
from workbench.patterns.softmax import SoftmaxMap

B, H, G, E = 2, 4, 2, 6


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(seed: int, *shape: int) -> Tensor:
    return rand(seed, *shape) > -1


def masks(q: int, k: int, offset: int) -> dict[str, Mask]:
    documents = (torch.arange(k) // 5)[None].expand(B, k)
    return {
        "causal": Mask(True, offset=offset),
        "window": Mask(True, 4, prefix=2, offset=offset),
        "both sides": Mask(window=3, offset=offset),
        "documents": Mask(True, documents=documents, offset=offset),
        "padding": Mask(True, keys=seen(1, B, k), queries=seen(2, 1, q), offset=offset),
        "dense": Mask(dense=seen(3, 1, H, q, k), offset=offset),
        "blocks": Mask(blocks=seen(4, B, 1, -(-q // 3), -(-k // 3)), side=3, offset=offset),
    }


def biases(q: int, k: int, offset: int) -> dict[str, Any]:
    return {
        "none": None,
        "rows": rand(5, 1, H, q, k),
        "keys": rand(6, H, 1, k),
        "relative": Relative(rand(7, H, q + k + offset), -(offset + q - 1)),
    }


REQUEST = wb.capture(
    blocks=4, reduce=("sum", "mean", "max"), stats=("received", "entropy", "distance", "distance2", "top1"), window=3,
    topk=3, mass={"sink": mods.sink()},
)  # fmt: skip


def same(found: AttentionMap, want: AttentionMap) -> None:
    """Every answer equal bit for bit, those that were computed before and those that are computed now."""
    assert (found.shape, found.offset, found.kv_heads) == (want.shape, want.offset, want.kv_heads)
    assert (found.sign, found.row_sum, found.exactness) == (want.sign, want.row_sum, want.exactness)
    for name in ("sum", "mean", "max"):
        assert torch.equal(found.blocks(4, name), want.blocks(4, name))
    for call in (
        lambda m: m.received(), lambda m: m.entropy(), lambda m: m.distance(), lambda m: m.distance(3),
        lambda m: m.distance(moment=2), lambda m: m.mass("sink"), lambda m: m.topk(3).values, lambda m: m.topk(3).indices,
        lambda m: m.topk(1).indices,
    ):  # fmt: skip
        assert torch.equal(call(found), call(want))
    if isinstance(getattr(want, "raw", want), SummaryMap):
        assert isinstance(getattr(found, "raw", found), SummaryMap)
        return
    _, _, q, k = want.shape
    for call in (
        lambda m: m.tile(slice(q // 2, q), slice(0, k - 1)), lambda m: m.dense(), lambda m: m.blocks(5, "max"),
        lambda m: m.mass(mods.previous()), lambda m: m.mass(torch.arange(k)), lambda m: m.topk(2).indices,
        lambda m: m.heads([3, 1]).dense(), lambda m: m.matvec(torch.ones(B, want.kv_heads, k, 1)),
    ):  # fmt: skip
        assert torch.equal(call(found), call(want))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_stored_maps_answer_bit_for_bit(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    q, before = data.draw(st.integers(2, 13)), data.draw(st.sampled_from([0, 5]))
    k, dtype = q + before, data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    name, kind = data.draw(st.sampled_from(sorted(masks(3, 3, 0)))), data.draw(st.sampled_from(sorted(biases(3, 3, 0))))
    keep, gated = data.draw(st.booleans()), data.draw(st.booleans())
    options: dict[str, Any] = {
        "mask": masks(q, k, before)[name],
        "bias": biases(q, k, before)[kind],
        "scale": data.draw(st.sampled_from([None, 0.3])),
        "softcap": data.draw(st.sampled_from([None, 2.5])),
        "sink": data.draw(st.sampled_from([None, rand(8, H)])),
    }
    amap: Any = SoftmaxMap(rand(9, B, H, q, E).to(dtype), rand(10, B, G, k, E).to(dtype), **options)
    amap = GatedMap(amap, rand(11, B, H, q).sigmoid()) if gated else amap
    request = wb.capture(
        blocks=4,
        reduce=REQUEST.reduce,
        stats=REQUEST.stats,
        window=3,
        topk=min(3, k),
        mass=dict(REQUEST.mass),
        keep=keep,
    )
    amap = amap.precompute(request)
    folder = tmp_path_factory.mktemp("maps") / "run"
    stored.prepare(folder)
    if k < 3:
        return
    same(stored.add(folder, "encoder.0", amap), amap)
    stored.add(folder, 3, amap)
    found = wb.open_maps(folder)
    assert list(found) == ["encoder.0", 3]
    assert found[3].impl == amap.impl == "cpu"
    same(found[3], amap)
    for part in ("lse", "mask"):
        assert hasattr(getattr(found[3], "raw", found[3]), part)
    assert torch.equal(getattr(found[3], "raw", found[3]).lse, getattr(amap, "raw", amap).lse)


def test_explicit_and_dense_maps_are_stored_with_weights_and_lse(tmp_path: Path) -> None:
    weights = rand(1, B, H, 5, 9).softmax(-1)
    explicit: Any = ExplicitMap(weights, rand(2, B, H, 5), offset=4, kv_heads=2)
    dense = AttentionMap.from_dense(rand(3, B, H, 5, 9), offset=2, exactness="jacobian", value_space="of this test")
    stored.prepare(tmp_path / "maps")
    masked = AttentionMap.from_dense(rand(5, B, H, 5, 9), mask=Mask(keys=torch.ones(1, 9, dtype=torch.bool)))
    for layer, amap in enumerate((explicit, dense, GatedMap(dense, rand(4, B, H, 5)), masked)):
        stored.add(tmp_path / "maps", layer, amap)
    found = wb.open_maps(tmp_path / "maps")
    assert [type(m).__name__ for m in found.values()] == ["ExplicitMap", "DenseMap", "GatedMap", "DenseMap"]
    kept: Any = found[3]
    assert kept.mask.offset == 4
    assert torch.equal(kept.mask.keys, masked.mask.keys)
    assert torch.equal(found[0].lse, explicit.lse)
    assert torch.equal(found[0].dense(), weights)
    assert (found[1].exactness, found[1].value_space, found[1].offset, found[1].sign) == (
        "jacobian", "of this test", 2, "signed",
    )  # fmt: skip
    assert torch.equal(found[2].dense(), GatedMap(dense, rand(4, B, H, 5)).dense())
    assert found[0].kv_heads == 2


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "t5", "native-gated", "bridge", "generate"])
def test_runs_store_what_they_would_keep(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "bridge":
        case = bridged("llama")
    elif name == "native-gated":
        case = native(mixer="gated-softmax")
    else:
        case = hugging_face("mistral" if name == "generate" else name, dtype=torch.float32)

    def run(request: wb.Capture) -> Any:
        with torch.no_grad():
            if name == "generate":
                return wb.generate(case.model, ids(), 6, request, eos_token_id=None)
            return case.model.run(case.inputs, maps=request)

    calls, plain = [], softmax.attention_stats

    def watch(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return plain(*args, **options)

    options = dict(blocks=4, stats=("received", "entropy"), topk=2)
    memory = run(wb.capture(**options))
    monkeypatch.setattr(softmax, "attention_stats", watch)
    disk = run(wb.capture(**options, store=tmp_path / "maps"))
    assert len(calls) == (0 if name == "bridge" else len(disk.maps)), "storing needs no pass of its own"
    opened = wb.open_maps(tmp_path / "maps")
    assert set(opened) == set(memory.maps)
    assert tuple(disk.maps) == tuple(memory.maps)
    assert disk.provenance.kernel == memory.provenance.kernel
    for key, want in memory.maps.items():
        for found in (disk.maps[key], opened[key]):
            assert torch.equal(found.received(), want.received())
            assert torch.equal(found.blocks(4), want.blocks(4))
            assert torch.equal(found.topk(2).indices, want.topk(2).indices)
            torch.testing.assert_close(found.dense(), want.dense(), rtol=1e-6, atol=1e-6)
            assert type(found) is type(want)
    with pytest.raises(wb.WorkbenchError, match=f"holds maps of {len(opened)} layers already"):
        run(wb.capture(**options, store=tmp_path / "maps"))


def anonymous(maps: Any, folder: Path) -> tuple[int, int]:
    """Bytes of the tensors of maps that lie in memory, and in files of the folder."""
    regions = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *rest = line.split(maxsplit=5)
        if len(rest) == 5 and rest[4].startswith(str(folder)):
            regions.append(tuple(int(end, 16) for end in span.split("-")))
    memory = disk = 0

    def look(value: Any) -> None:
        nonlocal memory, disk
        if isinstance(value, Tensor):
            if any(lo <= value.data_ptr() < hi for lo, hi in regions):
                disk += value.nbytes
            else:
                memory += value.untyped_storage().nbytes()
        elif isinstance(value, dict | tuple | list):
            for part in value.values() if isinstance(value, dict) else value:
                look(part)
        elif isinstance(value, AttentionMap | Mask) or type(value).__name__ == "Scores":
            look(vars(value))

    look(list(maps.values()))
    return memory, disk


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    config = NETS["llama"]().config
    model = HFModel(NETS["llama"](dtype=torch.bfloat16), name="llama")
    tokens, real = ids(2, 60), torch.ones(2, 60, dtype=torch.bool)
    real[0, :9] = False
    options = dict(blocks=4, stats=("received", "entropy"))
    run = model.run(wb.Tokens(tokens, real), maps=wb.capture(**options, store=tmp_path / "maps"))
    memory, disk = anonymous(run.maps, tmp_path)
    width = config.hidden_size // config.num_attention_heads
    assert memory == 0
    assert disk > L * 2 * 60 * width * (config.num_attention_heads + config.num_key_value_heads) * 2
    assert anonymous(wb.open_maps(tmp_path / "maps"), tmp_path) == (memory, disk)
    run.maps[0].distance()
    assert anonymous(run.maps, tmp_path)[0] == 2 * 4 * 60 * 4, "answers of now are kept in memory"
    kept = model.run(wb.Tokens(tokens, real), maps=wb.capture(**options)).maps
    assert anonymous(kept, tmp_path)[0] > 0
    assert anonymous(kept, tmp_path)[1] == 0


def test_another_process_reads_the_maps_without_the_model(tmp_path: Path) -> None:
    case = hugging_face("llama")
    run = case.model.run(case.inputs, maps=wb.capture(layers=1, store=tmp_path / "maps"))
    shown = "print(wb.open_maps(sys.argv[1])[1].tile(slice(9, 10), slice(0, 4))[0, 0].tolist())"
    code = f"import sys, workbench as wb; {shown}"
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "maps")], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(out) == run.maps[1].tile(slice(9, 10), slice(0, 4))[0, 0].tolist()


def test_a_bias_that_is_a_function_is_refused_and_its_statistics_are_not(tmp_path: Path) -> None:
    amap = SoftmaxMap(rand(1, 1, 2, 5, 4), rand(2, 1, 2, 5, 4), mask=Mask(), bias=lambda lo, hi: rand(3, hi - lo, 5))
    stored.prepare(tmp_path / "maps")
    with pytest.raises(
        wb.WorkbenchError, match="layer 7: the bias of its scores is a function, which cannot be stored"
    ):
        stored.add(tmp_path / "maps", 7, amap)
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == ["maps.json"]
    small = amap.precompute(wb.capture(stats=("received",), keep=False))
    assert torch.equal(stored.add(tmp_path / "maps", 7, small).received(), amap.received())
    with pytest.raises(wb.WorkbenchError, match=r"keep=False and answers only received\(\)"):
        wb.open_maps(tmp_path / "maps")[7].rows(0, 1)


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    model, tokens = hugging_face("llama").model, ids()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    (tmp_path / "file").write_text("")
    for name, said in (("other", "is not empty and holds no maps"), ("file", "cannot write maps to .*file")):
        with pytest.raises(wb.WorkbenchError, match=said):
            model.run(tokens, maps=wb.capture(store=tmp_path / name))
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    stored.prepare(tmp_path / "maps")
    with pytest.raises(wb.WorkbenchError, match="no attention layer '9'"):
        model.run(tokens, maps=wb.capture(layers=9, store=tmp_path / "unmade"))
    assert not (tmp_path / "unmade").exists()
    model.run(tokens, maps=wb.capture(store=tmp_path / "maps"))
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == [
        "layer-0.safetensors", "layer-1.safetensors", "maps.json",
    ]  # fmt: skip
    for folder, said in ((tmp_path / "nowhere", "holds no maps"), (tmp_path / "other", "it has no maps.json")):
        with pytest.raises(wb.WorkbenchError, match=said):
            wb.open_maps(folder)


def test_a_write_that_fails_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "_save", full)
    with pytest.raises(wb.WorkbenchError, match="cannot write maps to .*maps: No space left on device"):
        hugging_face("llama").model.run(ids(), maps=wb.capture(store=tmp_path / "maps"))
    assert [p.name for p in (tmp_path / "maps").iterdir()] == ["maps.json"]
    monkeypatch.undo()
    hugging_face("llama").model.run(ids(), maps=wb.capture(store=tmp_path / "maps"))
    assert len(wb.open_maps(tmp_path / "maps")) == L


def test_damaged_folders_name_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "maps"
    hugging_face("llama").model.run(ids(), maps=wb.capture(store=folder))
    layer, index = (folder / "layer-1.safetensors").read_bytes(), (folder / stored.INDEX).read_text()

    def refused(said: str) -> None:
        with pytest.raises(wb.WorkbenchError, match=said) as caught:
            wb.open_maps(folder)
        assert "\n" not in str(caught.value)

    (folder / "layer-1.safetensors").write_bytes(layer[:-5])
    refused("layer-1.safetensors is damaged or not there")
    (folder / "layer-1.safetensors").unlink()
    refused("layer-1.safetensors is damaged or not there")
    (folder / "layer-1.safetensors").write_bytes(layer)
    for text, said in (
        (index[:-9], "maps.json is damaged"),
        (index.replace('"format": 1', '"format": 9'), "in format 9; this version reads"),
        (index.replace("attention-workbench maps", "other"), "is 'other' in format 1"),
        (index.replace("SoftmaxMap", "OtherMap"), "describes a OtherMap"),
    ):
        (folder / stored.INDEX).write_text(text)
        refused(said)
    (folder / stored.INDEX).write_text(index)
    assert len(wb.open_maps(folder)) == L
