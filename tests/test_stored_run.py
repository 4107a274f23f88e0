"""Runs on disk: what comes back, and what half-written folders say."""

from __future__ import annotations

import json

import pytest
import torch

import workbench as wb
from workbench.errors import WorkbenchError
from workbench.stored_run import about_run

_FIELDS = ("format", "about", "labels", "provenance")


@pytest.fixture(scope="module")
def run():
    with torch.no_grad():
        return wb.load("tiny-gated").run("Mary gave the ring to John", maps=wb.capture(blocks=4, reduce=("sum", "max")))


def test_tokens_maps_and_provenance_come_back(run, tmp_path):
    wb.StoredRun(run, {"text": "Mary"}, blocks=2).save(tmp_path / "run")
    back = wb.open_run(tmp_path / "run")
    assert back.tokens.labels == run.tokens.labels
    assert torch.equal(back.tokens.ids, run.tokens.ids)
    assert back.provenance == run.provenance
    assert about_run(tmp_path / "run") == {"text": "Mary"}
    for layer, amap in run.maps.items():
        assert torch.equal(back.maps[layer].dense(), amap.dense())
        assert torch.equal(back.maps[layer].raw.dense(), amap.raw.dense())
        kept = {key for key in back.maps[layer].raw._memo if key[0] == "blocks"}
        assert kept >= {("blocks", 2, "sum"), ("blocks", 2, "max")}
    assert wb.sinks(back).frame().equals(wb.sinks(run).frame())


def test_inputs_of_images_come_back(tmp_path):
    images = wb.planted_images(1).images
    with torch.no_grad():
        run = wb.load("tiny-vit").run(images, maps=wb.capture())
    wb.StoredRun(run).save(tmp_path / "run")
    assert torch.equal(wb.open_run(tmp_path / "run").tokens.inputs["pixel_values"], images)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: (p / "run.json").unlink(), "holds no run: it has no run.json"),
        (lambda p: (p / "run.json").write_text("{"), "run.json is damaged"),
        (lambda p: (p / "run.json").write_text(json.dumps(dict.fromkeys(_FIELDS, 9))), "has format 9"),
        (lambda p: (p / "tokens.safetensors").write_bytes(b"x"), "is damaged"),
        (lambda p: (p / "maps" / "maps.json").unlink(), "holds no maps"),
        (lambda p: (p / "maps" / "layer-1.safetensors").unlink(), "damaged or not there"),
    ],
)  # fmt: skip
def test_half_written_runs_are_named(run, tmp_path, spoil, said):
    wb.StoredRun(run).save(tmp_path / "run")
    spoil(tmp_path / "run")
    with pytest.raises(WorkbenchError, match=said):
        wb.open_run(tmp_path / "run")


def test_an_existing_folder_is_not_written_over(run, tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(WorkbenchError, match="exists already"):
        wb.StoredRun(run).save(tmp_path / "run")
