"""Selective scans against the recurrence written out, and against Hugging Face's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.errors import WorkbenchError
from workbench.mixers.mamba import VARIANTS, snakes
from workbench.patterns.per_channel import PerChannelMap

Operator = Callable[..., tuple[Tensor, AttentionMap]]
RECORDS = {record.name: record for record in VARIANTS}


def loop(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, order: list[int]) -> Tensor:
    """h and y token by token along a path; x ``[B, H, N, E]``."""
    state = x.new_zeros(*x.shape[:2], x.shape[3], a.shape[2])
    out = torch.zeros_like(x)
    for t in order:
        write = dt[:, :, t, :, None] * b[:, t, None, None] * x[:, :, t, :, None]
        state = (dt[:, :, t, :, None] * a).exp() * state + write
        out[:, :, t] = (state * c[:, t, None, None]).sum(-1) + (0 if d is None else d * x[:, :, t])
    return out


def implicit(dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None) -> Tensor:
    """The map by its formula, dt ``[B, H, N, 1]``."""
    n = dt.shape[2]
    out = dt.new_zeros(*dt.shape[:2], n, n)
    for i in range(n):
        for j in range(i + 1):
            decay = (a[:, 0] * dt[:, :, j + 1 : i + 1].sum(2)).exp()
            out[:, :, i, j] = (c[:, None, i] * decay * b[:, None, j]).sum(-1) * dt[:, :, j, 0]
        if d is not None:
            out[:, :, i, i] += d[:, 0]
    return out


def example(name: str, tokens: int, seed: int = 0) -> dict[str, Any]:
    return RECORDS[name].example(seed, tokens, torch.float64)


def scan_is_the_recurrence_and_the_implicit_map(op: Operator) -> None:
    for tokens, skip in ((1, True), (11, False), (40, True)):
        given = example("mamba", tokens)
        given["d"] = given["d"] if skip else None
        out, amap = op(**given)
        torch.testing.assert_close(out, loop(**given, order=list(range(tokens))))
        torch.testing.assert_close(amap.dense(), implicit(**{k: v for k, v in given.items() if k != "x"}))


def one(given: dict[str, Any], i: int) -> dict[str, Any]:
    """The arguments of one direction."""
    return {k: v if k == "x" else v[i] if k in "ad" else v[:, i] for k, v in given.items() if k != "grid"}


def both_directions_are_two_recurrences(op: Operator) -> None:
    given = example("vision-mamba", 12)
    out, amap = op(**given)
    order = list(range(12))
    wanted = loop(**one(given, 0), order=order) + loop(**one(given, 1), order=order[::-1])
    torch.testing.assert_close(out, wanted)
    forwards, backwards = ({k: v for k, v in one(given, i).items() if k != "x"} for i in (0, 1))
    turned = {k: v.flip(2) if k == "dt" else v.flip(1) if k in "bc" else v for k, v in backwards.items()}
    torch.testing.assert_close(amap.dense(), implicit(**forwards) + implicit(**turned).flip(2, 3))


def four_paths_are_four_recurrences(op: Operator) -> None:
    for grid in ((4, 4), (3, 5), (1, 6)):
        given = {**example("lamamba-continuous-scan", grid[0] * grid[1]), "grid": grid}
        out, amap = op(**given)
        paths = [walk(grid), walk(grid)[::-1], climb(grid), climb(grid)[::-1]]
        wanted = sum(loop(**one(given, i), order=path) for i, path in enumerate(paths))
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(amap.matvec(given["x"]), wanted)


def walk(grid: tuple[int, int]) -> list[int]:
    rows = [[r * grid[1] + c for c in range(grid[1])] for r in range(grid[0])]
    return [cell for r, row in enumerate(rows) for cell in (row if r % 2 == 0 else row[::-1])]


def climb(grid: tuple[int, int]) -> list[int]:
    columns = [[r * grid[1] + c for r in reversed(range(grid[0]))] for c in range(grid[1])]
    return [cell for c, column in enumerate(columns) for cell in (column if c % 2 == 0 else column[::-1])]


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "mamba": scan_is_the_recurrence_and_the_implicit_map,
    "vision-mamba": both_directions_are_two_recurrences,
    "lamamba-continuous-scan": four_paths_are_four_recurrences,
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name: str) -> None:
    IDENTITIES[name](RECORDS[name].operator)


def test_hugging_face_computes_the_same() -> None:
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    given = example("mamba", 9)
    out, _ = RECORDS["mamba"](**given)
    x, dt = (given[name][..., 0] for name in ("x", "dt"))
    b, c = (given[name].transpose(1, 2) for name in "bc")
    found = mamba_selective_scan(
        x.float(), dt.float(), given["a"][:, 0].float(), b.float(), c.float(), given["d"][:, 0].float()
    )
    torch.testing.assert_close(found.double(), out[..., 0], atol=1e-5, rtol=1e-5)


def test_neighbours_on_a_path_are_neighbours_in_the_image() -> None:
    for grid in ((4, 6), (5, 3)):
        for path in snakes(grid):
            assert sorted(path.tolist()) == list(range(grid[0] * grid[1]))
            row, column = path // grid[1], path % grid[1]
            assert bool((row.diff().abs() + column.diff().abs() == 1).all())
    # the released table for a square of even side: four walks from three corners
    starts = [path[0].item() for path in snakes((4, 4))]
    assert starts == [0, 12, 12, 15]


def test_heads_of_several_channels_have_the_mean_of_their_maps() -> None:
    given = example("mamba", 7)
    _, single = RECORDS["mamba"](**given)
    joined = {
        "x": given["x"].view(2, 2, 2, 7).transpose(2, 3), "dt": given["dt"].view(2, 2, 2, 7).transpose(2, 3),
        "a": given["a"].view(2, 2, 3), "d": given["d"].view(2, 2), "b": given["b"], "c": given["c"],
    }  # fmt: skip
    out, amap = RECORDS["mamba"](**joined)
    assert isinstance(amap, PerChannelMap)
    torch.testing.assert_close(amap.matvec(joined["x"]), out)
    torch.testing.assert_close(amap.dense(), single.dense().view(2, 2, 2, 7, 7).mean(2))


def test_errors_name_the_argument() -> None:
    given = example("mamba", 5)
    for name, wrong in (
        ("dt", given["dt"][:, :1]),
        ("a", given["a"][:1]),
        ("b", given["b"][:, :2]),
        ("d", given["d"][:1]),
    ):
        with pytest.raises(WorkbenchError, match=f"^{name} is"):
            RECORDS["mamba"](**{**given, name: wrong})
    with pytest.raises(WorkbenchError, match="grid"):
        RECORDS["lamamba-continuous-scan"](**{**example("lamamba-continuous-scan", 6), "grid": (4, 4)})


def test_what_is_no_tensor_is_named() -> None:
    for record in ("mamba", "lamamba-continuous-scan"):
        given = example(record, 6)
        for name in ("x", "dt", "a", "b", "c"):
            with pytest.raises(WorkbenchError, match=f"^{name} is floating point"):
                RECORDS[record](**{**given, name: None})
