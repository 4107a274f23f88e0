"""How far back does a token look, and how much is it looked at later?

Windowed average attention distance and future attention influence (Li et al., arXiv 2510.13554, section 3), of one map:

    WAAD_t = sum_s A[t, s] min(t - s, W),                                  W = 10
    FAI_s  = mean of A[t, s] over the t with s + c <= t <= min(N, s + C),  [c, C] = [10, 50]

WAAD is small while a head reads on within a phrase and jumps where a new one starts; FAI is large at tokens that later
ones come back to. Both are per head here; ``rhythm`` averages WAAD over local and FAI over global heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench import mods
from workbench.errors import WorkbenchError
from workbench.maps import AttentionMap
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.padding import padding
from workbench.probes.rhythm.bands import band_sums, first_key
from workbench.probes.sources import need_shares, one_map

NO_DISTANCE = "have no mean distance: rows of channels are no tokens, and signed weights cancel"


def waad(amap: AttentionMap, window: int = 10, *, prompt: int = 0) -> Tensor:
    """Windowed average attention distance of every query, ``[B, H, Q]`` in tokens, float64.

    ``window`` is the largest distance that counts. ``prompt``: the first so many keys are left out, and queries that
    stand on them are NaN, as is padding that the map's own mask names. Weight that is missing from a row (a gate, a
    learned sink) counts as distance 0. Distances to later keys count by their size. Refused for signed and channel maps.
    """
    need_shares(0, one_map(amap), NO_DISTANCE)
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise WorkbenchError(f"window is the largest distance that counts, at least 1; got {window!r}")
    first = first_key(prompt, amap.shape[3])
    known = mods.both(mods.distance(window), mods.span(first, amap.shape[3]))
    found = (amap.mass(known) if first else amap.distance(window)).detach().cpu().double()
    real = padding(0, amap, None).queries
    found = found if real is None else found.masked_fill(~real[:, None], float("nan"))
    return found.masked_fill(torch.arange(amap.shape[2]) + amap.offset < first, float("nan"))


def fai(amap: AttentionMap, clip: tuple[int, int] = (10, 50), *, prompt: int = 0, real: Tensor | None = None) -> Tensor:
    """Future attention influence of every key, ``[B, H, K]``: mean weight it gets from the queries ``clip[0]`` to
    ``clip[1]`` tokens later, float64.

    NaN for keys that no query stands so far behind (the last ones), and for padding and the ``prompt``. Padding queries
    do not count: ``real`` ``[B, Q]`` is False on them, by default where the map's own mask says so. Takes the band
    below the diagonal alone, so that its cost grows with the text, not with its square. Refused for signed and channel
    maps.
    """
    need_shares(0, one_map(amap), NO_DISTANCE)
    near, far = _clip(clip)
    first = first_key(prompt, amap.shape[3])
    pad = padding(0, amap, None)
    total, count = band_sums(amap, near, far, pad.queries if real is None else real)
    found = total / count
    found = found if pad.keys is None else found.masked_fill(~pad.keys[:, None], float("nan"))
    return found.masked_fill(torch.arange(amap.shape[3]) < first, float("nan"))


def _clip(clip: tuple[int, int]) -> tuple[int, int]:
    if len(tuple(clip)) != 2 or not all(isinstance(x, int) for x in clip) or not 0 <= clip[0] <= clip[1]:
        raise WorkbenchError(
            f"clip is the nearest and the farthest distance that count, 0 <= near <= far; got {clip!r}"
        )
    return int(clip[0]), int(clip[1])


ANALYSES = (
    Analysis(
        name="waad",
        question="How far back does each token look, up to a window?",
        function=waad,
        example=lambda: {"amap": random_maps(1, tokens=24)[0]},
        paper="Li et al. 2025 (arXiv 2510.13554), section 3",
        source="maps",
        null="even attention, mean of min(t - s, W) over s <= t",
        cause="workbench.probes.rhythm.perturbation.perturbation",
    ),
    Analysis(
        name="fai",
        question="How much do later tokens look back at each token?",
        function=fai,
        example=lambda: {"amap": random_maps(1, tokens=24)[0]},
        paper="Li et al. 2025 (arXiv 2510.13554), section 3",
        source="maps",
        null="even attention, mean of 1 / (t + 1) over the later tokens",
        cause="workbench.probes.rhythm.perturbation.perturbation",
    ),
)
