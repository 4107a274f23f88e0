"""The page of images: weights of a patch in both directions, windows, rollout, erasure, and pictures of one's own."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import open_page, python_of, settled
from PIL import Image

import workbench as wb
from workbench.apps.work_vision import (
    erasure,
    grid_from,
    head_panels,
    head_table,
    order_of,
    pixels_of,
    reads_images,
    rectangles,
    table_of,
    weights_of,
    windows_of,
)
from workbench.datasets.patches import planted_images
from workbench.errors import Refused, UnknownName
from workbench.jobs.job import Job
from workbench.jobs.kinds.pictures import keep_picture
from workbench.jobs.probes import Cell
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet
from workbench.probes.vision.grid import Grid


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def run() -> Any:
    return wb.load("tiny-vit").run(planted_images(1).images, maps=wb.capture())


GRID = Grid(8, 8, (4, 4), tokens=64)


def windowed(mixer: str) -> Any:
    """The map of one layer of a random model of 8 x 8 patches."""
    torch.manual_seed(0)
    sizes = {"layers": 1, "heads": 4, "width": 32, "head_width": 8, "vocab": 6, "mlp_width": 16, "channels": 1}
    net = NativeNet(NativeConfig(**sizes, mixer=mixer, positions="learned", causal=False, grid=(8, 8)))
    return NativeModel(net.eval(), name=mixer).run(planted_images(1).images, maps=wb.capture()).maps[0]


# ---- weights


def test_weights_are_rows_and_columns_of_the_map(run: Any) -> None:
    whole = run.maps[1].dense()[0].double()
    assert torch.allclose(weights_of(run.maps[1], [2], 5), whole[2, 5], atol=1e-6)
    assert torch.allclose(weights_of(run.maps[1], [2], 5, "to"), whole[2, :, 5], atol=1e-6)
    assert torch.allclose(weights_of(run.maps[1], [0, 1], 5), whole[:2, 5].mean(0), atol=1e-6)
    with pytest.raises(UnknownName, match="from, to"):
        weights_of(run.maps[1], [0], 5, "back")


def test_maps_that_join_no_tokens_are_refused() -> None:
    with pytest.raises(Refused, match="channel map"):
        weights_of(windowed("davit-channel-attention"), [0], 0)


def test_tokens_that_are_no_patches_come_first() -> None:
    grid = Grid(2, 2, start=2, cls=0, others=(1,), tokens=6)
    order, names = order_of(grid, 6)
    assert order == [0, 1, 2, 3, 4, 5]
    assert names == ["class token", "token 1"]
    back = order_of(Grid(2, 2, tokens=5, start=0, others=(4,)), 5)
    assert back == ([4, 0, 1, 2, 3], ["token 4"])
    table = table_of(torch.arange(5.0), *back, Grid(2, 2, tokens=5, start=0, others=(4,)))
    assert table["weight"].tolist() == [4, 0, 1, 2, 3]
    assert table["name"].tolist()[:2] == ["token 4", "row 0, column 0"]
    assert table["row"].isna().tolist() == [True, False, False, False, False]


def test_a_grid_comes_back_from_json() -> None:
    grid = Grid(2, 2, (4, 4), start=1, cls=0, tokens=5)
    assert grid_from(json.loads(json.dumps(vars(grid)))) == grid
    assert grid_from(None) is None


def test_pixels_span_all_greys(run: Any) -> None:
    pixels = pixels_of(run)
    assert (pixels.shape, pixels.dtype) == ((32, 32), np.uint8)
    assert (pixels.min(), pixels.max()) == (0, 255)
    text = wb.load("tiny-softmax").run("the cat", maps=wb.capture())
    with pytest.raises(Refused, match="no image"):
        pixels_of(text)


def test_table_and_panels_of_all_heads(run: Any) -> None:
    frame = head_table(run.maps[1], GRID, 19)
    assert len(frame) == 4 * 64
    whole = run.maps[1].dense()[0, 3, 19].double()
    assert frame[frame["head"] == 3]["weight"].tolist() == pytest.approx(whole.tolist())
    assert [ax.get_title().split(",")[0] for ax in head_panels(frame, GRID).axes] == [f"head {i}" for i in range(4)]


def test_models_of_images_are_told_by_their_config(tmp_path: Path) -> None:
    assert reads_images("tiny-vit")
    assert not reads_images("tiny-softmax")
    (tmp_path / "config.json").write_text('{"model_type": "vit", "patch_size": 16, "image_size": 224}')
    (tmp_path / "model.safetensors").touch()
    assert reads_images(str(tmp_path))


# ---- windows


def test_rectangles_cover_a_mask_without_overlap() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 1]]).bool()
    found = rectangles(mask)
    covered = torch.zeros(3, 3, dtype=torch.int64)
    for r0, c0, r1, c1 in found:
        covered[r0:r1, c0:c1] += 1
    assert torch.equal(covered, mask.long())
    assert rectangles(torch.ones(2, 3).bool()) == [(0, 0, 2, 3)]
    assert rectangles(torch.zeros(2, 2).bool()) == []


def test_full_attention_has_no_windows(run: Any) -> None:
    assert windows_of(run.maps[0], GRID, 0) == []


def test_shifted_windows_are_all_drawn() -> None:
    amap = windowed("swin-attention")
    found = windows_of(amap, GRID, 0)
    assert len(found) == 9
    for query in (0, 27, 63):
        seen = GRID.image(amap.dense()[0, 0, query] > 0)
        (window,) = [box for box in found if box[0] <= query // 8 < box[2] and box[1] <= query % 8 < box[3]]
        assert rectangles(seen) == [window]


def test_of_neighbourhoods_the_querys_own_is_drawn() -> None:
    amap = windowed("neighborhood-attention")
    assert windows_of(amap, GRID, 27) == [(2, 2, 5, 5)]
    assert windows_of(amap, GRID, 0) == [(0, 0, 3, 3)]


def test_windows_that_are_no_rectangle_are_drawn_in_parts() -> None:
    found = windows_of(windowed("maxvit-grid-attention"), GRID, 0)
    assert len(found) == 16
    assert {(r1 - r0, c1 - c0) for r0, c0, r1, c1 in found} == {(1, 1)}


# ---- erasure


def test_erasure_takes_the_weights_of_the_chosen_head_or_patch(run: Any) -> None:
    model = wb.load("tiny-vit")
    cell = Cell(Job("x", model="tiny-vit"), lambda: model)
    found = erasure(model, cell, 0, 1, head=3, image=0)
    weight = wb.class_maps(run, wb.grid_of(model)).weight[1][:, 3]
    again = wb.erasure_curve(model, planted_images(1).images, weight, wb.grid_of(model))
    assert torch.equal(found.ranked, again.ranked)
    assert not torch.equal(erasure(model, cell, 0, 1, head=3, image=0, query=0).ranked, found.ranked)
    with pytest.raises(UnknownName, match="head"):
        erasure(model, cell, 0, 1, head=4, image=0)


# ---- the page


def data_of(page: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(page.get("bidi_component")[0].proto.json)["data"]
    return found


def test_the_page_shows_a_planted_image(store: Path, run: Any) -> None:
    page = open_page("vision", store)
    data = data_of(page)
    planted = planted_images(1).planted[0].flatten()
    assert (data["grid"], data["direction"], data["title"]) == ([8, 8], "from", "tiny-vit, layer 1, head 0")
    assert bool(planted[data["query"]])
    assert data["weights"] == pytest.approx(run.maps[1].dense()[0, 0, data["query"]].tolist(), abs=1e-6)
    assert data["tile"]
    assert page.get("image")


def test_query_head_and_direction_stand_in_the_address(store: Path, run: Any) -> None:
    page = open_page("vision", store, query="5", head="2", layer="0", direction="to")
    data = data_of(page)
    assert (data["query"], data["direction"], data["title"]) == (5, "to", "tiny-vit, layer 0, head 2")
    assert data["weights"] == pytest.approx(run.maps[0].dense()[0, 2, :, 5].tolist(), abs=1e-6)
    page.selectbox(key="head").set_value("mean")
    page = settled(page.run())
    assert page.query_params["head"] == "mean"
    assert data_of(page)["weights"] == pytest.approx(run.maps[0].dense()[0, :, :, 5].mean(0).tolist(), abs=1e-6)


def test_rollout_is_an_option(store: Path, run: Any) -> None:
    page = open_page("vision", store, way="rollout", query="7")
    assert data_of(page)["weights"] == pytest.approx(wb.rollout(run)[0, 7].tolist(), abs=1e-6)
    assert data_of(page)["title"] == "tiny-vit, rollout"


@pytest.mark.parametrize("below", ["heads", "class", "distance", "erasure"])
def test_each_part_below_has_a_figure_and_code_that_runs(store: Path, below: str) -> None:
    page = open_page("vision", store, below=below)
    assert page.get("image")
    found = python_of(page)
    assert len(found) == 2
    for code in found:
        exec(code, {})


def test_an_uploaded_picture_is_looked_at(store: Path) -> None:
    page = open_page("vision", store, source="upload")
    assert any("Choose a picture" in one.value for one in page.info)
    out = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), (255, 0, 0), np.uint8)).save(out, "PNG")
    name = keep_picture(out.getvalue(), store / "app" / "uploads")
    page = open_page("vision", store, source="upload", picture=name)
    assert data_of(page)["query"] == 36  # the middle
    assert page.query_params["picture"] == name


def test_pictures_that_are_none_are_said(store: Path) -> None:
    page = open_page("vision", store, source="upload", picture="../../secret")
    assert any("no picture in the address" in one.value for one in page.warning)
    page = open_page("vision", store, source="upload", picture="0" * 32)
    assert any("upload it again" in one.value for one in page.error)
