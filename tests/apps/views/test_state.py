"""The page of linear and state-space layers: decay and state norms against what the maps' own weights say, and what is shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import open_page, python_of, settled

import workbench as wb
from workbench.apps.work_state import (
    LONGEST,
    decay_profile,
    half_life,
    softmax_like,
    state_norms,
    state_variants,
    state_view,
    view_from,
    viewed,
)
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.patterns.delta import DeltaMap
from workbench.patterns.linear import ChannelDecayMap, LinearMap
from workbench.patterns.selective import SelectiveScanMap
from workbench.patterns.state import StateMap, dplr
from workbench.results import load_result


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- decay


def test_profile_is_the_mean_of_each_diagonal() -> None:
    weights = drawn(1, 2, 5, 5).tril()
    found = decay_profile(wb.AttentionMap.from_dense(weights))
    for distance in range(5):
        expected = weights[0].diagonal(-distance, 1, 2).abs().mean(1)
        assert torch.allclose(found[:, distance], expected)


def test_profile_of_a_map_that_looks_ahead_counts_both_sides() -> None:
    weights = drawn(1, 1, 4, 4)
    found = decay_profile(wb.AttentionMap.from_dense(weights))
    sides = torch.cat([weights[0, 0].diagonal(-1), weights[0, 0].diagonal(1)]).abs().mean()
    assert float(found[0, 1]) == pytest.approx(float(sides))


def test_queries_are_sampled_evenly() -> None:
    weights = torch.ones(1, 1, 64, 64, dtype=torch.float64).tril()
    weights[0, 0, 63] = 3
    found = decay_profile(wb.AttentionMap.from_dense(weights), queries=2)  # the first and the last
    assert float(found[0, 0]) == 2
    assert float(found[0, 63]) == 3


def test_half_life_of_an_exponential_is_exact() -> None:
    far = torch.arange(20, dtype=torch.float64)
    fit = half_life(0.3 * 0.5 ** (far / 4))
    assert fit is not None
    assert fit.half_life == pytest.approx(4)
    assert fit.level == pytest.approx(0.3)
    assert fit.r2 == pytest.approx(1)
    own = half_life(
        torch.cat([torch.tensor([7.0]).double(), 0.3 * 0.5 ** (far[1:] / 4)])
    )  # the weight on itself is another matter
    assert own is not None
    assert own.half_life == pytest.approx(4)


def test_a_profile_that_rises_or_is_too_short_has_no_half_life() -> None:
    rising = half_life(torch.arange(1.0, 9.0).double())
    assert rising is not None
    assert rising.half_life is None
    assert half_life(torch.tensor([1.0, 0.5, 0.0]).double()) is None
    noise = half_life(drawn(200).abs())
    assert noise is not None
    assert noise.r2 < 0.1


# ---- state norms: the same map with unit reads gives every number that the state holds


def held(make: Any, width: int) -> torch.Tensor:
    """Norms from weights: row t of the map that reads component r holds component r of everything written until t."""
    rows = [make(torch.eye(width, dtype=torch.float64)[r]).dense() for r in range(width)]
    return torch.stack(rows).square().sum((0, -1)).sqrt()


def reads(unit: torch.Tensor, heads: int = 2, tokens: int = 7) -> torch.Tensor:
    return unit.expand(1, heads, tokens, len(unit)).contiguous()


K, A = drawn(1, 2, 7, 3, seed=1), -drawn(1, 2, 7, 3, seed=2).abs()
BETA = drawn(1, 2, 7, seed=3).sigmoid()
UNIT = K / K.norm(dim=-1, keepdim=True)
MAKERS = {
    "linear": lambda q: LinearMap(q, K, causal=True),
    "decay per head": lambda q: LinearMap(q, K, torch.tensor([-0.1, -1.0]).double(), causal=True),
    "decay per token": lambda q: LinearMap(q, K, A[..., 0], causal=True),
    "decay per channel": lambda q: ChannelDecayMap(q, K, A),
    "delta": lambda q: DeltaMap(q, UNIT, BETA, scale=1.0),
    "gated delta": lambda q: DeltaMap(q, UNIT, BETA, A[..., 0], scale=1.0),
    "diagonal state": lambda q: StateMap(q, K, diagonal=A.exp()),
    "diagonal plus low rank": lambda q: StateMap(q, K, dplr(A.exp(), -BETA[..., None] * UNIT, UNIT)),
}


@pytest.mark.parametrize("name", MAKERS)
def test_state_norm_is_that_of_all_that_can_be_read(name: str) -> None:
    make = MAKERS[name]
    found = state_norms(make(reads(torch.ones(3, dtype=torch.float64))))
    assert torch.allclose(found, held(lambda unit: make(reads(unit)), 3), atol=1e-9), name


def test_state_norm_of_a_selective_scan_leaves_its_skip_out() -> None:
    step, a, write = drawn(1, 2, 7, seed=4).exp(), -drawn(2, 3, seed=5).exp(), drawn(1, 7, 3, seed=6)

    def scan(read: torch.Tensor, skip: torch.Tensor | None = None) -> SelectiveScanMap:
        return SelectiveScanMap(step, a, write, read.expand(1, 7, 3).contiguous(), skip)

    found = state_norms(scan(torch.ones(3, dtype=torch.float64), torch.ones(2, dtype=torch.float64)))
    assert torch.allclose(found, held(scan, 3), atol=1e-9)


def test_maps_without_a_known_state_are_refused() -> None:
    for amap in (
        wb.AttentionMap.from_dense(drawn(1, 1, 3, 3)),
        LinearMap(drawn(1, 2, 7, 3), K, causal=False),
        wb.variants()["vision-mamba"](**wb.variants()["vision-mamba"].example(0, 16, torch.float64))[1],
    ):
        with pytest.raises(Refused, match="no state that is carried from token to token"):
            state_norms(amap)


# ---- the view


@pytest.mark.parametrize("name", state_variants())
def test_every_variant_has_a_view(name: str) -> None:
    view = state_view(name, 0, 16)
    assert view.error is not None
    assert view.error < 1e-9 * max(1.0, float(view.weights.abs().max()))
    assert (view.norms is None) == bool(view.stateless)
    assert len(view.frame()) == len(view.profile)


def test_a_view_comes_back_from_its_folder(tmp_path: Path) -> None:
    view = state_view("deltanet", 0, 16)
    back = view_from(load_result(view.save(tmp_path / "view")))
    assert back.frame().equals(view.frame())
    assert back.decay().equals(view.decay())
    assert torch.equal(back.states().pipe(lambda table: torch.tensor(table["norm"].to_numpy())), view.norms.flatten())
    bare = state_view("rwkv-4", 0, 16)
    again = view_from(load_result(bare.save(tmp_path / "bare")))
    with pytest.raises(Refused, match="no state"):
        again.states()


def test_negative_share_counts_weight() -> None:
    view = viewed(wb.AttentionMap.from_dense(torch.tensor([[[[1.0, 0.0], [-3.0, 4.0]]]])), "x")
    assert float(view.negative[0]) == pytest.approx(3 / 8)


def test_long_maps_keep_no_weights_of_all_pairs() -> None:
    n = LONGEST + 1
    view = viewed(LinearMap(drawn(1, 1, n, 2), drawn(1, 1, n, 2), torch.tensor([-0.5]).double(), causal=True), "long")
    assert view.weights.numel() == 0
    assert view.frame()["half_life"][0] == pytest.approx(math.log(2) / 0.5, rel=0.1)


def test_mistakes_are_said() -> None:
    with pytest.raises(UnknownName, match="retention"):
        state_view("multi-head-attention", 0)
    with pytest.raises(WorkbenchError, match="from 4 to 1024; got 2"):
        state_view("retention", 0, 2)
    with pytest.raises(Refused, match="one sequence of tokens"):
        viewed(wb.AttentionMap.from_dense(drawn(1, 1, 3, 4)), "x")


def test_softmax_is_told_from_what_decays() -> None:
    def map_of(name: str) -> wb.AttentionMap:
        record = wb.variants()[name]
        return record(**record.example(0, 16, torch.float32))[1]

    assert softmax_like(map_of("multi-head-attention"))
    assert softmax_like(map_of("headwise-gated-attention"))
    for name in ("linear-attention", "rwkv-4", "mamba", "deltanet", "retention"):
        assert not softmax_like(map_of(name)), name


# ---- the page


def test_the_page_shows_a_variant(store: Path) -> None:
    page = open_page("state", store, variant="retention", tokens="32")
    view = state_view("retention", 0, 32)
    said = " ".join(one.value for one in page.text)
    assert "The map is exact" in said
    assert "Weights can be negative" in said
    table = next(one.value for one in page.dataframe if "half_life" in one.value.columns)
    assert table["half_life"].tolist() == pytest.approx(view.frame()["half_life"].tolist())
    assert any("Retentive Network" in one.value for one in page.caption)
    data = json.loads(page.get("bidi_component")[0].proto.json)["data"]
    assert (data["queries"], data["signed"], data["exact"]) == (32, True, True)


def test_another_head_and_part_stand_in_the_address(store: Path) -> None:
    page = open_page("state", store, variant="retention", tokens="32", view="8-24-0-16")
    page.selectbox(key="head").set_value(2)
    page = settled(page.run())
    data = json.loads(page.get("bidi_component")[0].proto.json)["data"]
    assert data["view"] == [8, 24, 0, 16]
    assert data["title"] == "retention, head 2"
    assert page.query_params["head"] == "2"


def test_a_layer_without_a_known_state_says_so(store: Path) -> None:
    page = open_page("state", store, variant="rwkv-4", tokens="32")
    assert any("no state that is carried" in one.value for one in page.info)
    assert any("No weight is negative; rows add up to 1." in one.value for one in page.text)


def test_a_captured_run_of_softmax_says_where_to_look(store: Path) -> None:
    page = open_page("state", store, source="run")
    assert any("softmax attention, whose rows are shares" in one.value for one in page.info)


def test_a_captured_layer_of_a_linear_model_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import build

    import workbench.apps.screen.place as place
    from workbench.apps.screen.need import job
    from workbench.jobs.kinds.capture import capture
    from workbench.jobs.probes import Cell
    from workbench.jobs.worker import _parquet

    folder = tmp_path / "models" / "linear"
    model = build("linear", "retention")
    model.save(folder)
    monkeypatch.setattr(place, "_given", lambda: (tmp_path / "store", (tmp_path / "models",)))
    wanted = job("capture", str(folder), text="the cat sat on the mat and the dog sat on the rug")
    found = capture(Cell(wanted, lambda: model, tmp_path / "scratch"))
    cells = place.cells()
    cells.open_for_writing()
    with cells.new_cell(wanted) as part:
        found.saved.save(part / "saved")
        cells.finish(wanted, part, _parquet(found.table), {})
    page = open_page("state", tmp_path / "store", source="run", run=wanted.key)
    assert any("The map is exact" in one.value for one in page.text)
    assert page.get("bidi_component")
    for code in python_of(page):
        exec(code, {})


def test_values_that_are_none_are_said(store: Path) -> None:
    open_page("state", store, variant="retention", tokens="32")
    page = open_page("state", store, variant="retention", tokens="32", view="0-99-0-4", head="9")
    said = " ".join(one.value for one in page.warning)
    assert "0\\-99\\-0\\-4" in said
    assert "'9'" in said


def test_its_python_runs(store: Path) -> None:
    page = open_page("state", store, variant="retention", tokens="32")
    found = python_of(page)
    assert len(found) == 4
    for code in found:
        exec(code, {})
