"""Maps of every family that is made of tensors come back from disk bit for bit; those that hold functions are refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import hugging_face
from torch import Tensor

import workbench as wb
from workbench import stored
from workbench.attention_map import METADATA, AttentionMap
from workbench.kernels.mask import Mask
from workbench.maps import DenseMap, GatedMap
from workbench.mixers.chosen import RoutedMap, RoutedSparseMap
from workbench.patterns.algebra import HeadsMap, KeysMap, ProductMap, QueriesMap, SumMap
from workbench.patterns.arranged import BatchMap, LastRowsMap, PermutedMap, SomeHeadsMap
from workbench.patterns.delta import DeltaMap
from workbench.patterns.diagonal import DiagonalMap
from workbench.patterns.fourier import FourierMap
from workbench.patterns.lazy import LazyMap
from workbench.patterns.linear import ChannelDecayMap, LinearMap
from workbench.patterns.per_channel import ChannelGatedMap, PerChannelMap
from workbench.patterns.prefix import PrefixSoftmaxMap
from workbench.patterns.selective import SelectiveScanMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.sparse import SparseMap
from workbench.patterns.state import StateMap, dplr
from workbench.patterns.toeplitz import ToeplitzMap
from workbench.patterns.union import UnionMap
from workbench.patterns.windows import WindowsMap

B, H, G, N, R = 2, 4, 2, 12, 3


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def fading(*shape: int) -> Tensor:
    return -rand(*shape, seed=9).abs()


def dense(*shape: int, seed: int = 0, **told: Any) -> AttentionMap:
    return AttentionMap.from_dense(rand(*shape, seed=seed).softmax(-1), **{"offset": 0, **told})


def linear(**told: Any) -> LinearMap:
    return LinearMap(rand(B, H, N, R), rand(B, G, N, R, seed=1), fading(B, H, N), causal=True, scale=0.5, **told)


def sparse(**told: Any) -> SparseMap:
    at = torch.arange(N)[:, None] - torch.arange(R)
    return SparseMap(at.clamp(min=-1)[None, None], rand(B, H, N, R), N, kv_heads=G, **told)


def softmax(*shape: int, mask: Mask | None = None, lse: Tensor | None = None) -> SoftmaxMap:
    return SoftmaxMap(rand(*shape), rand(*shape, seed=1), lse, mask=mask or Mask())


def union() -> UnionMap:
    scores = rand(B, H, N, R) @ rand(B, H, N, R, seed=1).mT * R**-0.5
    lse = scores.masked_fill(torch.ones(N, N).triu(1).bool(), -torch.inf).logsumexp(-1)
    near, causal = Mask(True, 4), torch.ones(N, N).tril().bool()
    far = Mask(dense=(causal & ~causal.triu(-3))[None, None])
    return UnionMap(softmax(B, H, N, R, mask=near, lse=lse), softmax(B, H, N, R, mask=far, lse=lse))


def turned() -> ProductMap:
    """With an offset that was set afterwards."""
    found = ProductMap(LastRowsMap(PermutedMap(dense(B, H, N, N), torch.arange(N).flip(0), None), 3), sparse())
    found.offset = 0
    return found


ORDER = torch.tensor([3, 1, 0, 2, 7, 11, 10, 4, 5, 6, 8, 9])
CASES: dict[str, Callable[[], AttentionMap]] = {
    "SparseMap": lambda: sparse(value_space="pooled V"),
    "SparseMap with an offset": lambda: SparseMap(
        torch.tensor([[0, 2], [1, 1]]).expand(1, 1, 2, 2), rand(B, H, 2, 2).float().abs(), 5, offset=3
    ),
    "LinearMap": lambda: linear(value_space="post-conv V"),
    "LinearMap with a norm": lambda: LinearMap(
        rand(B, H, N, R).bfloat16(), rand(B, G, 5, R).bfloat16(), causal=False, norm=rand(B, H, N), kv_heads=4
    ),
    "ChannelDecayMap": lambda: ChannelDecayMap(
        rand(B, H, N, R), rand(B, H, N, R, seed=1), fading(B, H, N, R), scale=0.3, diagonal=rand(B, H, N), kv_heads=G
    ),
    "DeltaMap": lambda: DeltaMap(
        rand(B, G, N, R), rand(B, G, N, R, seed=1) / 3, rand(B, H, N).sigmoid(), fading(B, H, N), kv_heads=G
    ),
    "SelectiveScanMap": lambda: SelectiveScanMap(
        rand(B, H, N).exp(), fading(H, R), rand(B, N, R), rand(B, N, R, seed=1), rand(H), real=rand(B, N) > -1,
        value_space="post-conv V",
    ),
    "PrefixSoftmaxMap": lambda: PrefixSoftmaxMap(rand(B, H, N), -fading(H), rand(H), kv_heads=G),
    "ToeplitzMap": lambda: ToeplitzMap(
        rand(1, H, R), queries=N, keys=N, left=rand(B, H, N), right=rand(B, H, N, seed=1), kv_heads=G
    ),
    "ToeplitzMap of a circular grid": lambda: ToeplitzMap(
        rand(B, H, 3, 4), queries=(3, 4), keys=(3, 4), first=(-1, -1), circular=True
    ),
    "DiagonalMap": lambda: DiagonalMap(rand(B, H, N), domain="token", value_space="V of this test"),
    "SumMap": lambda: SumMap(sparse(), linear(), row_sum="free"),
    "ProductMap": turned,
    "HeadsMap": lambda: HeadsMap(dense(B, 1, N, N), linear(value_space="V of the second")),
    "KeysMap": lambda: KeysMap(dense(B, H, N, 3), dense(B, H, N, 5), row_sum="free"),
    "QueriesMap": lambda: QueriesMap(dense(B, H, 3, N), dense(B, H, 5, N, seed=1)),
    "PermutedMap": lambda: PermutedMap(dense(B, H, N, N), ORDER, ORDER.expand(1, H, N)),
    "LastRowsMap": lambda: LastRowsMap(linear(), 5),
    "BatchMap": lambda: BatchMap(
        [dense(1, H, 3, 3), dense(1, H, 5, 5)], [torch.arange(3), torch.tensor([1, 2, 4, 6, 7])], 8
    ),
    "SomeHeadsMap": lambda: SomeHeadsMap(linear(), [2, 0]),
    "WindowsMap": lambda: WindowsMap(softmax(B * 3, H, 4, R), ORDER),
    "FourierMap": lambda: FourierMap(B, H, N, scale=0.25, dtype=torch.float64),
    "StateMap": lambda: StateMap(
        rand(B, H, N, R), rand(B, H, N, R, seed=1),
        dplr(fading(B, H, N, R).exp(), rand(B, H, N, R, seed=2) / 3, rand(B, H, N, R, seed=3) / 3), kv_heads=G,
    ),
    "StateMap with a diagonal": lambda: StateMap(
        rand(B, H, N, R), rand(B, H, N, R, seed=1), diagonal=fading(B, H, N, R).exp()
    ),
    "PerChannelMap": lambda: PerChannelMap(
        ChannelDecayMap(rand(B, H, N, R), rand(B, H, N, R, seed=1), fading(B, H, N, R)), 2, kv_heads=1
    ),
    "UnionMap": union,
    "GatedMap of a gated sum": lambda: GatedMap(GatedMap(SumMap(sparse(), linear()), rand(B, H, N)), rand(B, H, N)),
    "ChannelGatedMap of a delta rule": lambda: ChannelGatedMap(CASES["DeltaMap"](), rand(B, H, N, 2)),
}  # fmt: skip


def answers(amap: AttentionMap, name: str) -> list[Tensor]:
    values = rand(amap.shape[0], amap.kv_heads, amap.shape[3], 1 if name == "SelectiveScanMap" else 2)
    found = [amap.dense(), amap.received(), amap.row_sums(), amap.matvec(values), amap.distance(), amap.topk(2).indices]
    return found + [amap.blocks(4, reduce) for reduce in ("sum", "mean", "max", "abs")]


def kept(folder: Path, amap: AttentionMap) -> AttentionMap:
    """The map as it is read from a new folder."""
    stored.prepare(folder)
    stored.add(folder, 0, amap)
    return wb.open_maps(folder)[0]


@pytest.mark.parametrize("name", CASES)
def test_every_family_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    amap = CASES[name]()
    found = kept(tmp_path / "maps", amap)
    assert type(found) is type(amap)
    assert type(amap).__name__ == name.split()[0]
    for attribute in (*METADATA, "shape", "kv_heads", "offset", "channelwise"):
        assert getattr(found, attribute) == getattr(amap, attribute), attribute
    for one, other in zip(answers(found, name), answers(amap, name), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    again = kept(tmp_path / "again", amap)
    assert set(again._memo) == set(amap._memo)
    assert all(map(torch.equal, answers(again, name), answers(amap, name)))


def test_every_class_that_can_be_stored_has_a_case() -> None:
    assert {name.split()[0] for name in CASES} >= set(stored._FAMILIES)


def test_metadata_of_softmax_and_gated_maps_comes_back(tmp_path: Path) -> None:
    amap = softmax(B, H, N, R, mask=Mask(True))
    amap.value_space, amap.row_sum = "latent V", "<=1"
    gated = GatedMap(amap, rand(B, H, N).sigmoid())
    gated.row_sum = "free"
    found: Any = kept(tmp_path / "maps", gated)
    assert (found.row_sum, found.value_space) == ("free", "latent V")
    assert (found.raw.row_sum, found.raw.value_space) == ("<=1", "latent V")


def test_a_summary_of_a_channelwise_map_stays_one(tmp_path: Path) -> None:
    small = CASES["PerChannelMap"]().precompute(wb.capture(stats=("received",), keep=False))
    found = kept(tmp_path / "maps", small)
    assert found.channelwise
    assert torch.equal(found.received(), CASES["PerChannelMap"]().received())


class Marked(SumMap):
    """A sum that holds more than its parts."""


class Named(SumMap):
    """A sum that is stored without its name."""

    stored_as = "SumMap"


class Numbers(DenseMap):
    """Numbers that hold more."""


@pytest.mark.parametrize(
    "amap",
    [
        LazyMap((B, H, N, N), lambda lo, hi: rand(B, H, hi - lo, N)),
        SumMap(LazyMap((B, H, N, N), lambda lo, hi: rand(B, H, hi - lo, N)), dense(B, H, N, N)),
        StateMap(rand(B, H, N, R), rand(B, H, N, R), lambda rows, t: rows),
        RoutedSparseMap(sparse(), rand(3)),
        Marked(sparse(), linear()),
        type("SumMap", (Marked,), {})(sparse(), linear()),
        Numbers(rand(B, H, N, N)),
    ],
    ids=["closure", "closure inside", "step", "routed", "subclass", "subclass of the same name", "numbers"],
)
def test_maps_that_would_come_back_as_less_are_refused(amap: AttentionMap, tmp_path: Path) -> None:
    folder = tmp_path / "maps"
    stored.prepare(folder)
    with pytest.raises(wb.WorkbenchError, match=r"layer 7: a \w+ cannot be stored; leave the layer out with") as caught:
        stored.add(folder, 7, amap)
    assert "\n" not in str(caught.value)
    assert [p.name for p in folder.iterdir()] == ["maps.json"]


def test_maps_that_say_so_are_stored_as_another_class(tmp_path: Path) -> None:
    named, routed = Named(sparse(), linear()), RoutedMap(softmax(B, H, N, R), rand(3), rand(N) > 0)
    found = kept(tmp_path / "sum", named)
    assert type(found) is SumMap
    assert torch.equal(found.dense(), named.dense())
    one = kept(tmp_path / "routed", routed)
    assert (type(one), one.row_sum) == (SoftmaxMap, "<=1")


@pytest.mark.parametrize("other", ["os.system", "TransportedMap", "LazyMap", "Recurrence"])
def test_classes_that_are_not_listed_are_refused(other: str, tmp_path: Path) -> None:
    kept(tmp_path, sparse())
    index = tmp_path / stored.INDEX
    index.write_text(index.read_text().replace("SparseMap", other))
    said = f"layer-0.safetensors is damaged or not there: .*describes a {other}, which this version does not know"
    with pytest.raises(wb.WorkbenchError, match=said) as caught:
        wb.open_maps(tmp_path)
    assert "\n" not in str(caught.value)


def test_parts_that_do_not_fit_the_class_name_the_file(tmp_path: Path) -> None:
    kept(tmp_path, sparse())
    index = tmp_path / stored.INDEX
    for old, new in (("SparseMap", "SumMap"), ('"indices"', '"places"'), ('"is": "tensor"', '"is": "map"')):
        text = index.read_text()
        index.write_text(text.replace(old, new))
        with pytest.raises(wb.WorkbenchError, match="layer-0.safetensors is damaged or not there: ") as caught:
            wb.open_maps(tmp_path)
        assert "\n" not in str(caught.value)
        index.write_text(text)


def test_records_without_what_was_added_later_still_read(tmp_path: Path) -> None:
    amap = GatedMap(dense(B, H, N, N), rand(B, H, N).sigmoid())
    kept(tmp_path, amap)
    index = json.loads((tmp_path / stored.INDEX).read_text())
    for told in (index["layers"][0]["map"], index["layers"][0]["map"]["raw"]):
        del told["channelwise"]
    del index["layers"][0]["map"]["offset"]
    (tmp_path / stored.INDEX).write_text(json.dumps(index))
    assert torch.equal(wb.open_maps(tmp_path)[0].dense(), amap.dense())


def held(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple | list | dict):
        return [one for part in (value.values() if isinstance(value, dict) else value) for one in held(part)]
    return held(vars(value)) if hasattr(value, "__dict__") and not isinstance(value, type) else []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
@pytest.mark.parametrize("name", CASES)
def test_tensors_stay_on_disk(name: str, tmp_path: Path) -> None:
    found = kept(tmp_path / "maps", CASES[name]())
    spans = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line
    ]
    mapped = [range(int(lo, 16), int(hi, 16)) for lo, hi in spans]
    memory = [one for one in held(found) if one.data_ptr() and not any(one.data_ptr() in span for span in mapped)]
    # Which keys are in which window is made when it is read, for all heads at once, and so is the mean of gates.
    made = {"WindowsMap": [(1, 1, N, 4), (N,)], "ChannelGatedMap of a delta rule": [(B, H, N)]}.get(name, [])
    assert sorted(tuple(one.shape) for one in memory) == sorted(made)


@pytest.mark.parametrize("name", ["qwen3_next", "mamba", "mamba2", "minimax", "rwkv", "lfm2", "kimi_linear"])
def test_runs_of_state_nets_store_every_layer(name: str, tmp_path: Path) -> None:
    case = hugging_face(name)
    options: dict[str, Any] = dict(blocks=4, stats=("received",))
    with torch.no_grad():
        memory = case.model.run(case.inputs, maps=wb.capture(**options)).maps
        disk = case.model.run(case.inputs, maps=wb.capture(**options, store=tmp_path / "maps")).maps
    opened = wb.open_maps(tmp_path / "maps")
    assert tuple(opened) == tuple(disk) == tuple(memory)
    for key, want in memory.items():
        for found in (disk[key], opened[key]):
            assert type(found) is type(want)
            assert (found.value_space, found.row_sum, found.sign) == (want.value_space, want.row_sum, want.sign)
            assert torch.equal(found.received(), want.received())
            assert torch.equal(found.blocks(4), want.blocks(4))
            torch.testing.assert_close(found.dense(), want.dense(), rtol=1e-12, atol=1e-12)
        assert torch.equal(opened[key].dense(), disk[key].dense())
