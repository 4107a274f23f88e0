"""Convolution maps against the sum written out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.errors import WorkbenchError
from workbench.patterns import toeplitz
from workbench.patterns.toeplitz import ToeplitzMap

B, H = 2, 3


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def literal(
    kernel: Tensor, queries: tuple[int, ...], keys: tuple[int, ...], first: Any, options: dict[str, Any]
) -> Tensor:
    """left_i kernel[i - j - first] right_j, pair by pair."""
    offset, circular = options.get("offset", 0), options.get("circular", False)
    left, right = options.get("left"), options.get("right")
    rows, columns = (list(itertools.product(*map(range, sides))) for sides in (queries, keys))
    out = torch.zeros(B, H, len(rows), len(columns), dtype=torch.float64)
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        tap = [x + offset - y - f for x, y, f in zip(row, column, first, strict=True)]
        tap = [t % n for t, n in zip(tap, keys, strict=True)] if circular else tap
        if all(0 <= t < n for t, n in zip(tap, kernel.shape[2:], strict=True)):
            out[:, :, i, j] = kernel[(..., *tap)]
    out = out if left is None else out * left[..., None]
    return out if right is None else out * right[:, :, None]


CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    # taps, queries, keys, first, options
    "causal": ((4,), (11,), (11,), (0,), {}),
    "causal, as long as the text": ((11,), (11,), (11,), (0,), {}),
    "causal, long": ((40,), (37,), (37,), (0,), {}),
    "longer than the text": ((9,), (5,), (5,), (-4,), {}),
    "decoding": ((6,), (3,), (10,), (0,), {"offset": 7}),
    "decoding, long": ((50,), (3,), (45,), (0,), {"offset": 42}),
    "centred": ((5,), (11,), (11,), (-2,), {}),
    "rectangular": ((7,), (6,), (9,), (-3,), {}),
    "out of reach": ((3,), (4,), (5,), (20,), {}),
    "gates": ((5,), (11,), (11,), (-2,), {"left": rand(1, B, H, 11), "right": rand(2, B, H, 11)}),
    "circular": ((11,), (11,), (11,), (0,), {"circular": True}),
    "circular, short": ((4,), (9,), (9,), (-2,), {"circular": True, "left": rand(1, B, H, 9)}),
    "grid": ((3, 3), (4, 5), (4, 5), (-1, -1), {}),
    "grid, large": ((7, 5), (4, 5), (4, 5), (-3, -2), {"right": rand(2, B, H, 20)}),
    "circular grid": ((4, 5), (4, 5), (4, 5), (0, -3), {"circular": True}),
    "volume": ((2, 3, 2), (2, 4, 3), (2, 4, 3), (0, -1, -1), {}),
    "one token": ((3,), (1,), (1,), (-1,), {}),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[ToeplitzMap, Tensor]:
    taps, queries, keys, first, options = CASES[request.param]
    kernel = rand(0, B if "circular" in request.param else 1, H, *taps)
    found = ToeplitzMap(
        kernel, queries=queries, keys=keys, first=first, left=options.get("left"), right=options.get("right"),
        circular=options.get("circular", False), offset=options.get("offset", 0),
    ) if kernel.shape[0] == B or options.get("left") is not None or options.get("right") is not None else ToeplitzMap(
        kernel.expand(B, *kernel.shape[1:]), queries=queries, keys=keys, first=first, offset=options.get("offset", 0)
    )  # fmt: skip
    return found, literal(kernel, queries, keys, first, options)


def test_every_answer_is_that_of_the_numbers(case: tuple[ToeplitzMap, Tensor]) -> None:
    found, dense = case
    wanted = AttentionMap.from_dense(dense, offset=found.offset)
    _, _, q, k = found.shape
    v, y = rand(5, B, H, k, 2), rand(6, B, H, q, 2)
    pairs = [
        (found.dense(), dense),
        (found.rows(0, q // 2), dense[:, :, : q // 2]),
        (found.tile(slice(q // 2, q), slice(1, k)), dense[:, :, q // 2 :, 1:]),
        (found.matvec(v), dense @ v),
        (found.rmatvec(y), dense.mT @ y),
        (found.row_sums(), dense.sum(-1)),
        (found.received(), dense.sum(2)),
        (found.distance(), wanted.distance()),
        (found.distance(2), wanted.distance(2)),
        (found.distance(moment=2), wanted.distance(moment=2)),
        *((found.blocks(3, kind), wanted.blocks(3, kind)) for kind in ("sum", "mean", "max", "abs")),
    ]
    for got, right in pairs:
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-10)


def test_shifts_and_transforms_agree(case: tuple[ToeplitzMap, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    found, dense = case
    v = rand(5, B, H, found.shape[3], 2)
    for taps in (0, 10_000):
        monkeypatch.setattr(toeplitz, "TAPS", taps)
        torch.testing.assert_close(found.matvec(v), dense @ v, rtol=1e-10, atol=1e-10)


def test_grouped_values() -> None:
    found = ToeplitzMap(rand(0, B, 4, 3), queries=6, keys=6, kv_heads=2)
    v, y = rand(1, B, 2, 6, 3), rand(2, B, 4, 6, 3)
    dense = found.dense()
    torch.testing.assert_close(found.matvec(v), dense @ v.repeat_interleave(2, 1))
    torch.testing.assert_close(found.rmatvec(y), (dense.mT @ y).view(B, 2, 2, 6, 3).sum(2))
    torch.testing.assert_close(found.heads([3, 0]).dense(), dense[:, [3, 0]])


def test_the_sign_is_read_off() -> None:
    positive, negative = torch.ones(1, 2, 3), -torch.ones(1, 2, 5)
    assert ToeplitzMap(positive, queries=5, keys=5).sign == "nonnegative"
    assert ToeplitzMap(positive, queries=5, keys=5, left=negative).sign == "signed"
    assert ToeplitzMap(positive, queries=5, keys=5, row_sum="<=1").row_sum == "<=1"


def test_narrow_types_are_answered_in_float32() -> None:
    found = ToeplitzMap(rand(0, 1, 2, 3).bfloat16(), queries=5, keys=5)
    assert found.dense().dtype == torch.float32
    assert found.matvec(torch.ones(1, 2, 5, 1, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kernel", "options", "message"),
    [
        (torch.ones(2, 3), {}, "a kernel is floating point"),
        (torch.ones(1, 2, 3, dtype=torch.long), {}, "a kernel is floating point"),
        (torch.ones(1, 2, 3), {"queries": (2, 3)}, "one positive number per axis"),
        (torch.ones(1, 2, 3), {"first": (0, 0)}, "one displacement per axis"),
        (torch.ones(1, 2, 7), {"circular": True}, "circular kernel"),
        (torch.ones(1, 2, 3), {"circular": True, "offset": 2}, "offset"),
        (torch.ones(1, 2, 3), {"left": torch.ones(1, 2, 4)}, "left is"),
        (torch.ones(1, 2, 3), {"kv_heads": 3}, "do not share"),
        (torch.ones(1, 2, 3), {"sign": "positive"}, "no map sign"),
        (torch.ones(1, 2, 3), {"color": "red"}, "no map metadata"),
    ],
)
def test_refusals(kernel: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        ToeplitzMap(kernel, **{"queries": 5, "keys": 5, **options})
