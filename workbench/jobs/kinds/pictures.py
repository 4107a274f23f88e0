"""Pictures that a job names by their content: kept once as small PNGs, read as what a model of images takes."""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import Refused, WorkbenchError
from workbench.jobs.kinds.above import above

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.models.protocol import Model

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
LARGEST = 10_000_000
"""Bytes of the largest file that is taken."""
_PIXELS = 40_000_000
_SIDE = 512
_NAME = re.compile(r"[0-9a-f]{32}")


def keep_picture(raw: bytes, folder: Path) -> str:
    """Write a picture file's pixels (RGB, at most 512 pixels a side) into ``folder``; returns the name that tells its content.

    Refuses what is no picture of ``FORMATS``, too large a file, and too many pixels (before they are decoded)."""
    from PIL import Image, ImageOps

    if len(raw) > LARGEST:
        raise Refused(f"the picture has {len(raw):,} bytes; at most {LARGEST:,} are taken")
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as opened:
            if opened.width * opened.height > _PIXELS:
                raise Refused(f"the picture has {opened.width} x {opened.height} pixels; at most {_PIXELS:,} are taken")
            upright = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, WorkbenchError):
            raise
        raise WorkbenchError(f"this is no picture that can be read ({', '.join(FORMATS)})") from None
    upright.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    upright.save(file, "PNG")
    name = _name(file.getvalue())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{name}.part"
        part.write_bytes(file.getvalue())
        part.rename(folder / f"{name}.png")
    except OSError as error:
        raise WorkbenchError(f"cannot write {folder}: {error.strerror or error}") from error
    return name


def is_picture_name(name: Any) -> bool:
    """Whether ``name`` has the form of a name that ``keep_picture`` gives: no path can."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def picture_path(name: str, folder: Path) -> Path:
    """Where the picture stands. Refuses a name of another form, and one that is not there."""
    if not is_picture_name(name):
        raise WorkbenchError(f"a picture is named by the 32 hexadecimal digits of its content; got {name!r}")
    path = folder / f"{name}.png"
    if not path.is_file():
        raise WorkbenchError(f"there is no picture {name} in {folder}; upload it again")
    return path


def picture_input(name: str, folder: Path, model: Model, size: tuple[int, int], source: str = "") -> Tensor:
    """The picture as the model's input, ``[1, C, height, width]`` in float32: its middle part of the shape of ``size``, resized.

    A model of one channel gets the brightness, 0 ... 1, as it is; one with a ``preprocessor_config.json`` in its folder
    ``source`` that file's mean and deviation; others 0.5 and 0.5. Refuses a file whose content is not what its name says.
    """
    import torch
    from PIL import Image, ImageOps

    raw = picture_path(name, folder).read_bytes()
    if _name(raw) != name:
        raise WorkbenchError(f"picture {name} in {folder} was changed after it was kept; upload it again")
    height, width = size
    channels = _channels(model)
    with Image.open(io.BytesIO(raw), formats=FORMATS) as opened:
        fitted = ImageOps.fit(opened.convert("L" if channels == 1 else "RGB"), (width, height))
        values = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    pixels = values.view(height, width, channels).permute(2, 0, 1)[None].float() / 255
    if channels == 1:
        return pixels
    mean, deviation = (torch.tensor(part)[:, None, None] for part in _normal(source))
    return (pixels - mean) / deviation


def made_input(number: int, seed: int, model: Model, size: tuple[int, int], source: str = "") -> Tensor:
    """Made image ``number`` with a planted shape as the model's input, ``[1, C, height, width]`` in float32: as it is for a model
    of its size and one channel; else stretched, and its channels normalised as those of a picture are."""
    import torch

    image = above("datasets.patches").planted_images(number + 1, seed=seed).images[number:]
    if tuple(image.shape[2:]) != tuple(size):
        image = torch.nn.functional.interpolate(image, size, mode="nearest")
    if _channels(model) == 1:
        return image
    mean, deviation = (torch.tensor(part)[:, None, None] for part in _normal(source))
    return (image.expand(-1, 3, -1, -1) - mean) / deviation


def _channels(model: Any) -> int:
    inner = getattr(model, "net", None) or getattr(model, "model", None)
    config = getattr(inner, "config", None)
    own = getattr(config, "vision_config", None) or config
    found = getattr(own, "channels", None) or getattr(own, "num_channels", None) or 3
    if found not in (1, 3):
        raise Refused(f"{model.name} reads images of {found} channels; a picture has 1 or 3")
    return int(found)


def _normal(source: str) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel that the model's folder names."""
    path = Path(source) / "preprocessor_config.json"
    even = [0.5, 0.5, 0.5]
    if not source or not path.is_file():
        return even, even
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        mean, deviation = (list(map(float, said.get(key, even))) for key in ("image_mean", "image_std"))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise WorkbenchError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if len(mean) != 3 or len(deviation) != 3 or min(deviation) <= 0:
        raise WorkbenchError(f"{path} names no mean and deviation of three channels")
    return mean, deviation


def _name(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:32]
