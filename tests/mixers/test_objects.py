"""Objects, points and aligned windows: scores one by one from their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.objects import bridging_attention, object_attention, self_calibrated_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def waves(point: Tensor, width: int) -> Tensor:
    """Sines, then cosines, of the first coordinate; then of the second."""
    rates = [10000 ** (-2 * r / (width // 2)) for r in range(width // 4)]
    parts = [[f(float(x) * rate) for f in (math.sin, math.cos) for rate in rates] for x in point]
    return torch.tensor([*parts[0], *parts[1]], dtype=torch.float64)


def agrees(out: Tensor, found: AttentionMap, wanted: Tensor, v: Tensor) -> None:
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ v.repeat_interleave(wanted.shape[1] // v.shape[1], 1))


def bridged() -> dict[str, Tensor]:
    shapes = {"q": (2, 2, 3, 6), "k": (2, 2, 7, 6), "v": (2, 2, 7, 5), "points": (2, 7)}
    geometry = {"query_at": (2, 3, 2), "key_at": (2, 7, 2), "inner": (8, 4), "outer": (4, 2)}
    return example_tensors(1, torch.float64, **shapes, **geometry)


def points_of_two_kinds(op: Operator) -> None:
    """Appearance and geometry, one softmax per kind over its best points; without geometry and with one kind it is
    cross-attention."""
    given = bridged()
    s = given["q"] @ given["k"].transpose(-1, -2) / math.sqrt(6)
    full = s.clone()
    for b, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(7)).tolist():
        wave = waves(given["key_at"][b, j] - given["query_at"][b, i], 8)
        full[b, :, i, j] += (wave @ given["inner"]).relu() @ given["outer"]
    wanted = torch.zeros_like(full)
    for b in range(2):
        for kind in (range(4), range(4, 7)):
            keys = sorted(sorted(kind, key=lambda j: -float(given["points"][b, j]))[:2])
            wanted[b, :, :, keys] = full[b][:, :, keys].softmax(-1)
    agrees(*op(**given, kinds=(4, 3), keep=2), wanted, given["v"])
    call = {**given, "outer": torch.zeros_like(given["outer"]), "points": None}
    agrees(*op(**call, kinds=(7,)), s.softmax(-1), given["v"])


def looked_at() -> dict[str, Tensor]:
    shapes = {"q": (2, 4, 3, 8), "k": (2, 2, 6, 8), "v": (2, 2, 6, 5)}
    return example_tensors(2, torch.float64, **shapes, fixations=(2, 3, 2), objects=(2, 6, 2))


def objects_and_their_places(op: Operator) -> None:
    """Queries and keys with their places; without features a weight depends on the distances alone, by cosines."""
    given = looked_at()
    q, k = given["q"].clone(), given["k"].repeat_interleave(2, 1)
    for b in range(2):
        q[b] += torch.stack([waves(x, 8) for x in given["fixations"][b]])
        k[b] += torch.stack([waves(x, 8) for x in given["objects"][b]])
    agrees(*op(**given), (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1), given["v"])
    away = given["fixations"][:, :, None] - given["objects"][:, None]
    close = sum((away[..., axis] * rate).cos() for axis in (0, 1) for rate in (1.0, 0.01))
    assert isinstance(close, Tensor)
    wanted = (close / math.sqrt(8)).softmax(-1)[:, None].expand(-1, 4, -1, -1)
    blank = {name: torch.zeros_like(given[name]) for name in ("q", "k")}
    agrees(*op(**{**given, **blank}), wanted, given["v"])


GRID, N = (3, 4), 12


def paired() -> dict[str, Tensor]:
    shapes = {"q": (2, 4, N, 6), "k": (2, 2, 2 * N, 6), "v": (2, 2, 2 * N, 5)}
    images = {"features": (2, N, 3), "support": (2, N, 3), "foreground": (2, N)}
    given = example_tensors(3, torch.float64, **shapes, **images)
    foreground = given["foreground"].sigmoid()
    foreground[:, [0, 1, 4, 5]] = 0  # the first window of the support is background
    return {**given, "foreground": foreground}


def own_and_aligned_window(op: Operator) -> None:
    """Windows of a ragged grid, each with the support window of the nearest masked mean: scaled products inside, cosines across,
    one softmax."""
    given = paired()
    windows = [[r * 4 + c for r in rows for c in columns] for rows in ((0, 1), (2,)) for columns in ((0, 1), (2, 3))]
    wanted = torch.zeros(2, 4, N, 2 * N, dtype=torch.float64)
    keys = given["k"].repeat_interleave(2, 1)
    for b in range(2):
        for w, own in enumerate(windows):
            mean = given["features"][b, own].mean(0)
            similar = []
            for other in windows:
                share = given["foreground"][b, other]
                masked = (given["support"][b, other] * share[:, None]).sum(0)
                similar.append(float((F.cosine_similarity(mean, masked, dim=0) + 1) / 2) if share.any() else 0.0)
            nearest = windows[max(range(4), key=similar.__getitem__)]
            across = [j + N for j in nearest]
            for h in range(4):
                q = given["q"][b, h, own]
                inside = q @ keys[b, h, own].T / math.sqrt(6)
                cosine = F.cosine_similarity(q[:, None], keys[b, h, across][None], dim=-1) / 0.5
                rows = torch.cat([inside, cosine], 1).softmax(1)
                for i, row in zip(own, rows, strict=True):
                    wanted[b, h, i, own + across] = row
            torch.testing.assert_close(
                op(**given, grid=GRID, window=2, temperature=0.5)[1].native()[b, w], torch.tensor(similar).double()
            )
    agrees(*op(**given, grid=GRID, window=2, temperature=0.5), wanted, given["v"])


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "bridging-visual-representations": points_of_two_kinds,
    "object-level-attention": objects_and_their_places,
    "self-calibrated-cross-attention": own_and_aligned_window,
}


def test_kinds_of_points_are_maps_of_their_own() -> None:
    given = bridged()
    _, found = bridging_attention(**given, kinds=(4, 3), keep=2)
    corners, centres = found.native()
    assert (corners.shape[3], centres.shape[3]) == (4, 3)
    torch.testing.assert_close(found.row_sums(), torch.full((2, 2, 3), 2.0, dtype=torch.float64))
    leaves = {name: x.requires_grad_() for name, x in given.items() if name != "points"}
    out, _ = bridging_attention(**given, kinds=(4, 3), keep=2)
    assert all(bool((g != 0).any()) for g in torch.autograd.grad(out.square().sum(), [*leaves.values()]))


def test_objects_that_are_not_there_get_nothing() -> None:
    given = looked_at()
    _, found = object_attention(**given, mask=Mask(keys=torch.arange(6)[None] < 4))
    assert not found.dense()[..., 4:].any()


def test_background_windows_are_never_aligned() -> None:
    _, found = self_calibrated_attention(**paired(), grid=GRID, window=2)
    assert not (found.aligned == 0).any()
    assert not found.alignment[:, :, 0].any()
    assert found.row_sum == "1"
    whole, _ = self_calibrated_attention(**paired(), grid=GRID, window=4)
    assert whole.shape == (2, 4, N, 5)


@pytest.mark.parametrize(
    ("operator", "given", "change", "words"),
    [
        (bridging_attention, bridged(), {"kinds": (4, 4), "keep": 1}, "kinds are numbers"),
        (bridging_attention, bridged(), {"kinds": (7,)}, "points and keep go together"),
        (bridging_attention, bridged(), {"kinds": (7,), "keep": 0}, "keep is a positive"),
        (bridging_attention, bridged(), {"kinds": (7,), "keep": 1, "inner": torch.zeros(6, 4)}, "multiple of 4"),
        (object_attention, looked_at(), {"fixations": torch.zeros(2, 3, 3)}, "fixations is floating point"),
        (object_attention, {**looked_at(), **dict.fromkeys("qk", torch.zeros(2, 2, 6, 6))}, {}, "multiple of 4"),
        (self_calibrated_attention, paired(), {"grid": (3, 3)}, "grid is"),
        (self_calibrated_attention, paired(), {"grid": GRID, "window": 0}, "window is a positive"),
        (self_calibrated_attention, paired(), {"grid": GRID, "temperature": 0.0}, "temperature is positive"),
        (self_calibrated_attention, paired(), {"grid": GRID, "foreground": torch.zeros(2, 3)}, "foreground is"),
    ],
)
def test_misfits_are_named(
    operator: Callable[..., Any], given: dict[str, Tensor], change: dict[str, Any], words: str
) -> None:
    with pytest.raises(WorkbenchError, match=words):
        operator(**{**given, **change})
