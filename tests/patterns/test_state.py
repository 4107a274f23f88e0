"""State maps against the recurrence, one token after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.captures import capture
from workbench.errors import WorkbenchError
from workbench.patterns.state import StateMap, dplr

B, H, S = 2, 4, 3


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(n: int, kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[StateMap, Tensor]:
    """The map and its transitions as matrices ``[B, H, N, S, S]``."""
    read, write = rand(0, B, H, n, S), rand(1, B, H, n, S)
    decay = rand(2, B, H, n, S).sigmoid()
    if kind == "diagonal":
        made = StateMap(read.to(dtype), write.to(dtype), diagonal=decay.to(dtype), **options)
        return made, torch.diag_embed(decay)
    if kind == "zero":
        return StateMap(read, write, diagonal=torch.zeros_like(decay)), torch.zeros(B, H, n, S, S).double()
    x, y = 0.5 * rand(3, B, H, n, S), 0.5 * rand(4, B, H, n, S)
    step = dplr(decay.to(dtype), x.to(dtype), y.to(dtype))
    return StateMap(read.to(dtype), write.to(dtype), step, **options), torch.diag_embed(decay) + x[..., None] * y[
        ..., None, :
    ]


def literal(amap: StateMap, steps: Tensor) -> Tensor:
    """M by its definition, cell by cell."""
    n = amap.shape[3]
    read, write = amap.read.double(), amap.write.double()
    out = torch.zeros(B, H, n, n, dtype=torch.float64)
    for j in range(n):
        left = write[:, :, j]
        for i in range(j, n):
            if i > j:
                left = (steps[:, :, i] @ left[..., None])[..., 0]
            out[:, :, i, j] = (read[:, :, i] * left).sum(-1)
    return out


KINDS = ("diagonal", "dplr", "zero")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 5, 64, 65, 150, 200])
def test_rows_products_and_blocks_are_those_of_the_recurrence(kind: str, n: int) -> None:
    amap, steps = case(n, kind)
    wanted = literal(amap, steps)
    torch.testing.assert_close(amap.dense(), wanted)
    for lo, hi in ((0, n), (n // 2, n // 2 + 1), (n // 3, n), (n, n)):
        torch.testing.assert_close(amap.rows(lo, hi), wanted[:, :, lo:hi])
    v = rand(5, B, H, n, 2)
    torch.testing.assert_close(amap.matvec(v), wanted @ v)
    torch.testing.assert_close(amap.rmatvec(v), wanted.transpose(-1, -2) @ v)
    torch.testing.assert_close(amap.received(), wanted.sum(2))
    torch.testing.assert_close(amap.row_sums(), wanted.sum(3))
    at = torch.arange(n).double()
    apart = (at[:, None] - at).abs()
    torch.testing.assert_close(amap.distance(), (wanted * apart).sum(3))
    torch.testing.assert_close(amap.distance(7), (wanted * apart.clamp(max=7)).sum(3))
    torch.testing.assert_close(amap.distance(moment=2), (wanted * apart**2).sum(3))
    torch.testing.assert_close(amap.mass(at.flip(0)), (wanted * at.flip(0)).sum(3))
    full = StateMap.from_dense(wanted)
    for size in (1, 7, 64, 100, 300):
        for reduce in ("sum", "mean", "abs", "max"):
            torch.testing.assert_close(amap.blocks(size, reduce), full.blocks(size, reduce))


@pytest.mark.parametrize("kind", ["diagonal", "dplr"])
def test_grouped_values_and_chosen_heads(kind: str) -> None:
    amap, steps = case(70, kind, kv_heads=2)
    wanted = literal(amap, steps)
    v, y = rand(5, B, 2, 70, 3), rand(6, B, H, 70, 3)
    torch.testing.assert_close(amap.matvec(v), wanted @ v.repeat_interleave(2, 1))
    back = (wanted.transpose(-1, -2) @ y).unflatten(1, (2, 2)).sum(2)
    torch.testing.assert_close(amap.rmatvec(y), back)
    torch.testing.assert_close(amap.received(), wanted.sum(2))
    torch.testing.assert_close(amap.heads([3, 1]).dense(), wanted[:, [3, 1]])


@pytest.mark.parametrize("kind", ["diagonal", "dplr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_are_answered_in_float32(kind: str, dtype: torch.dtype) -> None:
    amap, _ = case(70, kind, dtype)
    exact, _ = case(70, kind)
    assert amap.dense().dtype == torch.float32
    loose = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.2, "rtol": 0.2}
    torch.testing.assert_close(amap.dense().double(), exact.dense(), **loose)
    assert amap.matvec(rand(5, B, H, 70, 2)).dtype == torch.float64
    assert amap.distance().dtype == torch.float32


def test_strong_decay_neither_overflows_nor_loses_what_comes_after_it() -> None:
    n = 300
    decay = torch.full((B, H, n, S), 1e-30, dtype=torch.float32)
    amap = StateMap(rand(0, B, H, n, S).float(), rand(1, B, H, n, S).float(), diagonal=decay)
    found = amap.dense()
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found.diagonal(dim1=-2, dim2=-1), (amap.read * amap.write).sum(-1))


def test_block_sums_need_one_row_per_block(monkeypatch: pytest.MonkeyPatch) -> None:
    amap, _ = case(500, "dplr")

    def no_rows(lo: int, hi: int) -> Tensor:
        raise AssertionError("rows were made")

    monkeypatch.setattr(amap, "rows", no_rows)
    amap.precompute(capture(blocks=64, reduce=("sum", "mean"), stats=("received", "distance")))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: StateMap(rand(0, 1, 2, 3), rand(0, 1, 2, 3), diagonal=rand(0, 1, 2, 3)), "read is floating point"),
        (lambda: StateMap(rand(0, 1, 2, 3, 4), rand(0, 1, 2, 3, 5), diagonal=rand(0, 1, 2, 3, 4)), "write"),
        (lambda: StateMap(rand(0, 1, 2, 3, 4), rand(0, 1, 2, 3, 4)), "step or by diagonal; got none"),
        (lambda: StateMap(rand(0, 1, 2, 3, 4), rand(0, 1, 2, 3, 4), diagonal=rand(0, 1, 1, 3, 4)), "diagonal"),
        (lambda: dplr(rand(0, 1, 2, 3, 4), rand(0, 1, 2, 3, 4), rand(0, 1, 2, 3, 1)), "decay, x and y"),
        (lambda: case(5, "dplr")[0].matvec(rand(0, B, 1, 5, 2)), "values"),
        (lambda: case(5, "dplr", kv_heads=3), "kv_heads"),
    ],
)
def test_errors_name_the_argument(make: Callable[[], object], names: str) -> None:
    with pytest.raises(WorkbenchError, match=names):
        make()
