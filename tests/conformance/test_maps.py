"""The conformance suite of attention maps, over the cases of ``map_cases.py``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from map_cases import MAPS, Case, rand
from torch import Tensor

from workbench import attention_map, mods
from workbench.captures import capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.pairs import chunks as blocked
from workbench.maps import AttentionMap, DenseMap, GatedMap, SummaryMap
from workbench.patterns.softmax import SoftmaxMap


@pytest.fixture(params=["whole", "chunked"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with everything in one chunk, once with chunks of a few rows."""
    if request.param == "chunked":
        monkeypatch.setattr(blocked, "CHUNK", 150)
        monkeypatch.setattr(attention_map, "CHUNK", 200)


@pytest.fixture(params=list(MAPS))
def case(request: pytest.FixtureRequest, sizes: None) -> Case:
    return MAPS[request.param]()


def close(got: Tensor, wanted: Tensor, case: Case) -> None:
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.double(), wanted.double(), rtol=case.tolerance, atol=case.tolerance)


def distributes(case: Case) -> bool:
    """Whether rows are (sub-)distributions, which have an entropy."""
    return case.map.sign == "nonnegative" and case.map.row_sum in ("1", "<=1", "gate")


def positions(case: Case) -> tuple[Tensor, Tensor]:
    _, _, q, k = case.map.shape
    return torch.arange(q)[:, None] + case.map.offset, torch.arange(k)[None]


def test_metadata_is_stated(case: Case) -> None:
    assert tuple(case.map.shape) == tuple(case.dense.shape)
    assert case.map.domain in ("token", "block", "agent", "channel", "frequency")
    assert case.map.sign in ("nonnegative", "signed")
    assert case.map.row_sum in ("1", "<=1", "gate", "free", "columns")
    assert case.map.exactness in ("exact", "jacobian", "approximation")
    assert case.map.native() is not None
    assert type(case.map).__name__ in repr(case.map)


def test_rows_tiles_and_dense_agree(case: Case) -> None:
    _, _, q, k = case.map.shape
    close(case.map.tile(slice(0, q // 2), slice(k // 3, k)), case.dense[:, :, : q // 2, k // 3 :], case)
    close(case.map.tile(slice(q - 1, None), slice(-2, None)), case.dense[:, :, q - 1 :, -2:], case)
    close(case.map.rows(q // 2, q), case.dense[:, :, q // 2 :], case)
    assert case.map.rows(q, q).shape[2] == 0
    close(case.map.dense(), case.dense, case)
    close(case.map.tile(slice(0, q // 2), slice(k // 3, k)), case.map.rows(0, q // 2)[..., k // 3 :], case)
    with pytest.raises(Refused, match=r"use blocks\(size\)"):
        case.map.dense(limit=case.dense.numel() - 1)
    with pytest.raises(WorkbenchError, match="outside of this map"):
        case.map.rows(0, q + 1)
    with pytest.raises(WorkbenchError, match="without a step"):
        case.map.tile(slice(0, q, 2), slice(0, k))


def test_the_map_times_the_values_is_the_operators_output(case: Case) -> None:
    out = case.map.matvec(case.v)
    assert out.dtype == case.v.dtype
    torch.testing.assert_close(out.double(), case.out.double(), rtol=case.rounding, atol=case.rounding)
    with pytest.raises(WorkbenchError, match="matvec takes values"):
        case.map.matvec(case.v[:, :, :-1] if case.v.shape[2] > 1 else case.v[0])


def test_rmatvec_is_the_adjoint_of_matvec(case: Case) -> None:
    b, h, q, _ = case.map.shape
    v, y = case.v.double(), rand(8, b, h, q, 3)
    back = case.map.rmatvec(y)
    assert back.shape == v.shape
    left, right = (case.map.matvec(v) * y).sum(), (v * back).sum()
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)
    with pytest.raises(WorkbenchError, match="rmatvec takes"):
        case.map.rmatvec(y[..., 0])


@pytest.mark.parametrize("size", [1, 4, 5, 64])
def test_blocks_are_pooled_cells(case: Case, size: int) -> None:
    _, _, q, k = case.map.shape
    pools: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": lambda c: c.sum((-2, -1)),
        "mean": lambda c: c.mean((-2, -1)),
        "max": lambda c: c.amax((-2, -1)),
        "abs": lambda c: c.abs().sum((-2, -1)),
    }
    for name, pool in pools.items():
        got = case.map.blocks(size, name)
        assert got.shape[2:] == (-(-q // size), -(-k // size))
        for i in range(got.shape[2]):
            for j in range(got.shape[3]):
                cell = case.dense[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size]
                close(got[:, :, i, j], pool(cell), case)
    close(case.map.blocks(size).sum((-2, -1)), case.dense.sum((-2, -1)), case)
    with pytest.raises(UnknownName, match="no block reduction 'median'; known: sum, mean, max, abs"):
        case.map.blocks(size, "median")
    with pytest.raises(WorkbenchError, match="at least one token"):
        case.map.blocks(0)


def test_received_is_the_column_sum(case: Case) -> None:
    close(case.map.received(), case.dense.sum(2), case)


def test_entropy_is_that_of_the_rows_or_refused(case: Case) -> None:
    if not distributes(case):
        with pytest.raises(Refused, match="no distribution"):
            case.map.entropy()
        return
    plain = torch.where(case.dense > 0, -case.dense * case.dense.clamp(min=1e-300).log(), 0.0).sum(-1)
    close(case.map.entropy(), plain, case)


@pytest.mark.parametrize("window", [None, 3])
def test_distance_is_the_weighted_gap(case: Case, window: int | None) -> None:
    q, k = positions(case)
    far = (q - k).abs() if window is None else (q - k).abs().clamp(max=window)
    scaled = Case(case.map, case.dense, case.v, case.out, case.tolerance * case.dense.shape[3])
    close(case.map.distance(window), (case.dense * far).sum(-1), scaled)
    with pytest.raises(WorkbenchError, match="one token or more"):
        case.map.distance(0)
    for bad in (dict(moment=3), dict(moment=2, window=4)):
        with pytest.raises(WorkbenchError, match="moment 1, or 2 without a window"):
            case.map.distance(**bad)


def test_second_moment_of_the_distance(case: Case) -> None:
    q, k = positions(case)
    scaled = Case(case.map, case.dense, case.v, case.out, case.tolerance * case.dense.shape[3] ** 2)
    close(case.map.distance(moment=2), (case.dense * (q - k).square()).sum(-1), scaled)
    assert case.map.distance(moment=2) is case.map.distance(moment=2)


def test_topk_finds_the_largest_weights(case: Case) -> None:
    keys = case.map.shape[3]
    for count in {1, min(3, keys)}:
        got = case.map.topk(count)
        close(got.values, case.dense.topk(count, -1).values, case)
        nothing = (got.values == 0) & (case.map.sign == "nonnegative")
        assert torch.equal(got.indices == -1, nothing)
        at = case.dense.gather(-1, got.indices.clamp(min=0))
        close(torch.where(nothing, 0.0, at), case.dense.topk(count, -1).values, case)
    with pytest.raises(WorkbenchError, match="topk wants"):
        case.map.topk(keys + 1)


def test_mass_is_the_sum_under_a_mod(case: Case) -> None:
    b, _, q, k = case.map.shape
    i, j = positions(case)
    ids = torch.randint(0, 3, (b, int(max(i.max(), j.max())) + 1), generator=torch.Generator().manual_seed(3))
    wanted = {
        mods.sink(2): (j < 2) & (i >= 2),
        mods.previous(): i - j == 1,
        mods.window(3): (i - j >= 0) & (i - j < 3),
        mods.full(): torch.ones(q, k),
        mods.same_token(ids): ((ids[:, i[:, 0], None] == ids[:, None, j[0]]) & (j < i))[:, None],
    }
    for mod, weight in wanted.items():
        close(case.map.mass(mod), (case.dense * weight).sum(-1), case)
    for bad in (lambda b, h, q, k: True, lambda b, h, q, k: torch.ones(7, 1, 1, 1)):
        with pytest.raises(WorkbenchError, match="broadcasts to"):
            case.map.mass(bad)


def test_mass_is_the_sum_over_weighted_keys(case: Case) -> None:
    b, _, _, k = case.map.shape
    own = rand(6, b, k)
    for weights in (own, own[0], own[:1], own[0] > 0, (own > 0).long()):
        table = weights.double() if weights.ndim == 2 else weights.double()[None]
        close(case.map.mass(weights), (case.dense * table[:, None, None]).sum(-1), case)
    for bad in (rand(6, k + 1), rand(6, b + 1, k), rand(6, 1, 1, k)):
        with pytest.raises(WorkbenchError, match=r"weights of keys are \[K\]"):
            case.map.mass(bad)
    with pytest.raises(WorkbenchError, match="got a int"):
        case.map.mass(3)


def test_named_masses_are_remembered_and_others_are_not(case: Case) -> None:
    k = case.map.shape[3]
    weights = rand(6, k)
    request = capture(mass={"sink": mods.sink(2), "set": weights}, window=3, topk=min(2, k), stats=("distance2",))
    with pytest.raises(UnknownName, match="no named mass of this map 'sink'; known: none"):
        case.map.mass("sink")
    kept = case.map.precompute(request)
    small = case.map.precompute(dataclasses.replace(request, keep=False))
    for amap in (kept, small):
        close(amap.mass("sink"), case.map.mass(mods.sink(2)), case)
        close(amap.mass("set"), (case.dense * weights).sum(-1), case)
        assert amap.distance(3) is kept.distance(3)
        assert torch.equal(amap.topk(min(2, k)).indices, case.map.topk(min(2, k)).indices)
        assert amap.distance(moment=2) is kept.distance(moment=2)
    assert case.map.mass(weights) is not case.map.mass(weights)
    with pytest.raises(UnknownName, match="known: sink, set; nearest: sink"):
        small.mass("sinks")
    with pytest.raises(Refused, match=r"distance\(3\).*mass\('sink'\)"):
        small.mass(weights)
    changed = case.map.precompute(capture(mass={"sink": mods.full()}))
    close(changed.mass("sink"), case.dense.sum(-1), case)
    if k < 50:
        with pytest.raises(WorkbenchError, match="topk wants"):
            case.map.precompute(capture(topk=50))


def test_the_declared_row_sums_and_sign_hold(case: Case) -> None:
    sums = case.dense.sum(-1)
    close(case.map.row_sums(), sums, case)
    if case.map.row_sum == "1":
        assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
    if case.map.row_sum == "<=1":
        assert (sums <= 1 + 1e-5).all()
    if case.map.sign == "nonnegative":
        assert (case.dense >= 0).all()
    else:
        assert (case.dense < 0).any()


def test_nothing_is_nan_and_empty_rows_are_zero(case: Case) -> None:
    found = [
        case.map.dense(),
        case.map.received(),
        case.map.distance(),
        case.map.blocks(5, "max"),
        case.map.topk().values,
    ]
    if distributes(case):
        found.append(case.map.entropy())
    assert all(torch.isfinite(value).all() for value in found)
    empty = case.dense.abs().sum(-1) == 0
    assert (case.map.dense()[empty] == 0).all()
    assert (case.map.distance()[empty] == 0).all()


def test_heads_are_a_map_of_those_heads(case: Case) -> None:
    some = case.map.heads([3, 0])
    assert some.shape[1] == 2
    chosen = Case(some, case.dense[:, [3, 0]], case.v, case.out, case.tolerance)
    close(some.dense(), chosen.dense, chosen)
    close(some.received(), chosen.dense.sum(2), chosen)
    with pytest.raises(UnknownName, match="no head '4'"):
        case.map.heads([4])


def test_precompute_remembers_and_a_summary_answers_nothing_else(case: Case) -> None:
    stats = ("received", "distance", "top1") + (("entropy",) if distributes(case) else ())
    request = capture(blocks=5, reduce=("sum", "max"), stats=stats)
    kept = case.map.precompute(request)
    assert kept is case.map
    small = case.map.precompute(capture(blocks=5, reduce=("sum", "max"), stats=stats, keep=False))
    assert isinstance(small.raw if isinstance(small, GatedMap) else small, SummaryMap)
    assert (small.sign, small.row_sum, small.offset) == (case.map.sign, case.map.row_sum, case.map.offset)
    close(small.received(), case.dense.sum(2), case)
    close(small.blocks(5, "sum"), kept.blocks(5, "sum"), case)
    close(small.topk(1).values, kept.topk(1).values, case)
    b, h, q, k = case.map.shape
    if q * k > 1:
        assert [t.shape for t in tensors(small) if t.numel() > b * h * max(q, k)] == []
    for refused in (small.dense, lambda: small.blocks(4), lambda: small.mass(mods.sink()), lambda: small.topk(2)):
        if case.map.shape[3] > 1:
            with pytest.raises(Refused, match=r"keep=False and answers only .*blocks\(5, 'sum'\)"):
                refused()


def tensors(amap: AttentionMap) -> list[Tensor]:
    """Every tensor that a map holds, masks apart."""
    found: list[Tensor] = []
    for value in vars(amap).values():
        for part in value.values() if isinstance(value, dict) else [value]:
            for one in part if isinstance(part, tuple) else [part]:
                if isinstance(one, Tensor):
                    found.append(one)
                elif isinstance(one, AttentionMap):
                    found += tensors(one)
                assert not isinstance(one, SoftmaxMap | DenseMap) or not isinstance(amap, SummaryMap)
    return found
