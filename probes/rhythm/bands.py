"""Where the rows of a map stand in the text, and sums along its columns a fixed distance below the diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.maps import AttentionMap

_ROWS = 512


def first_key(prompt: int, keys: int) -> int:
    """The first key that counts, with a prompt of ``prompt`` tokens left out."""
    if isinstance(prompt, bool) or not isinstance(prompt, int) or not 0 <= prompt < keys:
        raise WorkbenchError(
            f"prompt is a number of tokens, from 0 and fewer than the {keys} of the text; got {prompt!r}"
        )
    return prompt


def band_sums(amap: AttentionMap, near: int, far: int, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sum over the queries t with ``near <= t - s <= far`` of the weight on key s, ``[B, H, K]`` in float64, and how
    many such queries there are, ``[B, 1, K]``. Queries that are not ``real`` ``[B, Q]`` do not count. Work and memory
    are those of the band, not of the map."""
    b, h, queries, keys = amap.shape
    counted = torch.ones(b, queries, dtype=torch.bool) if real is None else real
    total = torch.zeros(b, h, keys, dtype=torch.float64)
    count = torch.zeros(b, 1, keys, dtype=torch.float64)
    for lo in range(0, queries, _ROWS):
        hi = min(queries, lo + _ROWS)
        left, right = max(0, lo + amap.offset - far), min(keys, hi - 1 + amap.offset - near + 1)
        if left >= right:
            continue
        apart = torch.arange(lo, hi)[:, None] + amap.offset - torch.arange(left, right)
        inside = (apart >= near) & (apart <= far) & counted[:, None, lo:hi, None]
        part = amap.tile(slice(lo, hi), slice(left, right)).detach().cpu().double()
        total[..., left:right] += part.masked_fill(~inside, 0.0).sum(2)
        count[..., left:right] += inside.sum(2)
    return total, count
