"""Values as pixels: a grid of numbers in one PNG, from which the browser makes colours and reads the numbers back."""

from __future__ import annotations

import base64
import io
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workbench.errors import Refused, WorkbenchError

if TYPE_CHECKING:
    from PIL.Image import Image

LIMIT = 2_000_000
"""Characters of the longest picture that is sent to a browser."""
LEVELS = 65535
_NEGATIVE, _ABSENT = 128, 255


def grid(values: Any, what: str = "values") -> NDArray[np.float64]:
    """``values`` (tensor on any device, array or nested lists) as a 2-D array of float64; NaN = not there."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double()
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or 0 in array.shape:
        raise WorkbenchError(
            f"{what}: a grid [rows, columns] with at least one cell is needed, got shape {array.shape}"
        )
    if np.isinf(array).any():
        raise WorkbenchError(f"{what}: infinite values have no colour; use NaN for cells that are not there")
    return array


def largest(values: Any) -> float:
    """The largest absolute value that is there; 1.0 where there is none but zero, so that it can scale a picture."""
    array = np.abs(np.asarray(values, dtype=np.float64))
    there = array[~np.isnan(array)]
    return float(there.max()) if there.size and there.max() > 0 else 1.0


def packed(values: Any, top: float | None = None) -> str:
    """``values [rows, columns]`` as a PNG in a data URL that keeps the numbers, in three parts one above the other.

    The first two are the high and the low bytes of ``round(65535 * sqrt(|v| / top))``, so small values keep their digits; the
    third is 0 for v >= 0, 128 for v < 0 and 255 for cells that are not there (NaN). ``top`` is the largest absolute value that
    can be told, beyond it values are cut; by default the largest one there is. :func:`unpacked` inverts.

    Raises ``WorkbenchError`` for what is no grid, and ``Refused`` where the picture is longer than ``LIMIT``.
    """
    array = grid(values)
    top = largest(array) if top is None else float(top)
    if not (np.isfinite(top) and top > 0):
        raise WorkbenchError(f"top: the value of the strongest colour must be a positive number, got {top}")
    absent = np.isnan(array)
    code = np.rint(LEVELS * np.sqrt(np.minimum(np.where(absent, 0.0, np.abs(array)) / top, 1.0))).astype(np.uint16)
    kind = np.where(absent, _ABSENT, np.where((array < 0) & (code > 0), _NEGATIVE, 0))
    url = _url(_plain(np.concatenate([code >> 8, code & 255, kind]).astype(np.uint8)))
    if len(url) > LIMIT:
        raise Refused(
            f"a picture of {array.shape[0]} x {array.shape[1]} cells takes {len(url) / 1e6:.1f} MB, more than the "
            f"{LIMIT / 1e6:.0f} MB that are sent at once; take larger blocks or a smaller view"
        )
    return url


def unpacked(url: str, top: float) -> NDArray[np.float64]:
    """The values ``[rows, columns]`` of a picture made by :func:`packed` with the same ``top``; NaN = not there."""
    high, low, kind = np.split(image(url).astype(np.int64), 3)
    values = top * ((high * 256 + low) / LEVELS) ** 2
    return np.where(kind == _ABSENT, np.nan, np.where(kind == _NEGATIVE, -values, values))


def png(pixels: NDArray[np.uint8]) -> str:
    """8-bit ``pixels`` (grey ``[rows, columns]`` or RGB ``[rows, columns, 3]``) as a PNG in a data URL."""
    from PIL import Image

    return _url(Image.fromarray(np.ascontiguousarray(pixels)))


def _plain(numbers: NDArray[np.uint8]) -> Image:
    """``numbers [rows, columns]`` as a picture that is stored as it stands. Of a grey one PNG would try five predictions for each
    line, and take almost three times as long; one with a palette has none."""
    from PIL import Image

    found = Image.frombytes("P", (numbers.shape[1], numbers.shape[0]), numbers.tobytes())
    found.putpalette([level for level in range(256) for _ in range(3)])
    return found


def _url(picture: Image) -> str:
    file = io.BytesIO()
    # Quick rather than small: the page waits for it, and it goes to the next window, not over a network.
    picture.save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def image(url: str) -> NDArray[np.uint8]:
    """The pixels of a PNG in a data URL, as :func:`png` and :func:`packed` wrote them."""
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
