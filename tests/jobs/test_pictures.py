"""Pictures that jobs name by their content: what is kept, what is refused, and what a model gets."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.kinds import pictures
from workbench.jobs.kinds.pictures import keep_picture, picture_input, picture_path
from workbench.jobs.probes import Cell, resolve


def file_of(pixels: Any, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(out, form, **options)
    return out.getvalue()


def halves(height: int = 64, width: int = 64) -> Any:
    """Black on the left, white on the right."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, width // 2 :] = 255
    return pixels


def test_a_picture_is_kept_once_under_the_digest_of_its_content(tmp_path: Path) -> None:
    name = keep_picture(file_of(halves()), tmp_path)
    assert keep_picture(file_of(halves(), "BMP"), tmp_path) == name
    assert os.listdir(tmp_path) == [f"{name}.png"]
    raw = (tmp_path / f"{name}.png").read_bytes()
    assert hashlib.sha256(raw).hexdigest().startswith(name)
    assert (np.asarray(Image.open(io.BytesIO(raw))) == halves()).all()


def test_large_pictures_are_kept_small(tmp_path: Path) -> None:
    name = keep_picture(file_of(halves(900, 1800), "JPEG"), tmp_path)
    assert Image.open(tmp_path / f"{name}.png").size == (512, 256)


@pytest.mark.parametrize(
    "raw", [b"", b"not a picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", file_of(halves())[:100]]
)
def test_what_is_no_picture_is_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(WorkbenchError, match="no picture that can be read"):
        keep_picture(raw, tmp_path / "uploads")
    assert not (tmp_path / "uploads").exists()


def test_too_large_files_and_pictures_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="10,000,001 bytes"):
        keep_picture(b"x" * 10_000_001, tmp_path)
    monkeypatch.setattr(pictures, "_PIXELS", 4095)
    with pytest.raises(Refused, match="64 x 64 pixels"):
        keep_picture(file_of(halves()), tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "A" * 32, "0" * 31, "0" * 33, "", None, 5])
def test_no_other_file_can_be_named(tmp_path: Path, name: Any) -> None:
    with pytest.raises(WorkbenchError, match="32 hexadecimal digits"):
        picture_path(name, tmp_path)
    with pytest.raises(WorkbenchError, match="name of an uploaded picture" if name is not None else "got none"):
        resolve("capture").check(Job("capture", model="tiny-vit", args={"picture": name}))


def test_a_picture_that_is_gone_or_was_changed_is_said(tmp_path: Path) -> None:
    name = keep_picture(file_of(halves()), tmp_path)
    model = wb.load("tiny-vit")
    (tmp_path / f"{name}.png").write_bytes(file_of(halves(32, 32)))
    with pytest.raises(WorkbenchError, match="was changed"):
        picture_input(name, tmp_path, model, (32, 32))
    with pytest.raises(WorkbenchError, match="upload it again"):
        picture_path("0" * 32, tmp_path)


def test_a_model_of_one_channel_gets_the_brightness(tmp_path: Path) -> None:
    name = keep_picture(file_of(halves()), tmp_path)
    found = picture_input(name, tmp_path, wb.load("tiny-vit"), (32, 32))
    assert found.shape == (1, 1, 32, 32)
    assert found[..., :15].max() == 0
    assert found[..., 17:].min() == 1


def test_the_middle_part_of_the_models_shape_is_taken(tmp_path: Path) -> None:
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, 64:128] = 255
    name = keep_picture(file_of(pixels), tmp_path)
    assert picture_input(name, tmp_path, wb.load("tiny-vit"), (32, 32)).min() > 0.9


class Colour:
    """Stands for a model that reads images of three channels."""

    name = "colour"
    net = None
    model = torch.nn.Identity()


def test_three_channels_are_normalised_as_the_models_folder_says(tmp_path: Path) -> None:
    name = keep_picture(file_of(np.full((8, 8, 3), (255, 0, 51))), tmp_path)
    even = picture_input(name, tmp_path, Colour(), (4, 4))
    assert even[0, :, 0, 0].tolist() == pytest.approx([1, -1, -0.6])
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0, 0, 0.2], "image_std": [0.5, 1, 0.1]})
    )
    own = picture_input(name, tmp_path, Colour(), (4, 4), str(tmp_path))
    assert own[0, :, 0, 0].tolist() == pytest.approx([2, 0, 0], abs=1e-6)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": "bright"}')
    with pytest.raises(WorkbenchError, match="is damaged"):
        picture_input(name, tmp_path, Colour(), (4, 4), str(tmp_path))


def test_capture_reads_the_picture_of_its_store(tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    name = keep_picture(file_of(halves()), uploads)
    job = Job("capture", model="tiny-vit", args={"picture": name})
    probe, model = resolve("capture"), wb.load("tiny-vit")
    probe.check(job)
    found = probe.call(Cell(job, lambda: model, tmp_path / "scratch", uploads))
    assert torch.equal(found.saved.run.tokens.inputs["pixel_values"], picture_input(name, uploads, model, (32, 32)))
    assert found.saved.about["logit_difference"] == 0
    with pytest.raises(WorkbenchError, match="no store"):
        probe.call(Cell(job, lambda: model, tmp_path / "other"))
