"""HyperZ.Z.W against sums over pairs of cells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.patterns.per_channel import PerChannelMap

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def given(name: str, tokens: int = 12, **changes: Any) -> dict[str, Any]:
    return {**variants()[name].example(3, tokens, torch.float64), **changes}


def context(p: dict[str, Any]) -> Tensor:
    """W * z ``[B, C, rows, columns]``, the network run once per cell."""
    rows, columns = p["grid"]
    z = p["z"][..., 0].reshape(2, 3, rows, columns)
    out = torch.zeros_like(z)
    for y in range(rows):
        for x in range(columns):
            place = [2 * y / (rows - 1) - 1, 2 * x / (columns - 1) - 1, 1.0]
            inner = (p["enter"] @ torch.tensor(place, dtype=torch.float64)).sin()
            out[:, :, y, x] = (p["leave"] @ (p["hidden"] @ inner).sin()) * z[:, :, y, x]
    return out


def context_is_a_centred_kernel(op: Operator) -> None:
    p = given("hyper-zzw")
    rows, columns = p["grid"]
    kernel = context(p)
    wanted = torch.zeros(2, 3, 12, 12, dtype=torch.float64)
    for i in range(12):
        for j in range(12):
            y, x = i // columns - j // columns + rows // 2, i % columns - j % columns + columns // 2
            if 0 <= y < rows and 0 <= x < columns:
                wanted[:, :, i, j] = kernel[:, :, y, x]
    out, found = op(**p)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ p["v"])
    # Where z is zero but for the middle, only the middle's weight is left.
    middle = torch.zeros_like(p["z"])
    middle[:, :, (rows // 2) * columns + columns // 2] = 1.0
    alone = context({**p, "z": middle})[:, :, rows // 2, columns // 2]
    torch.testing.assert_close(op(**{**p, "z": middle})[0], alone[:, :, None, None] * p["v"])


def planes_multiply(op: Operator) -> None:
    p = given("hyper-zzw-product", 16)
    kernel = context(p)
    wanted = torch.zeros(2, 3, 16, 16, dtype=torch.float64)
    for a in range(4):
        for x in range(4):
            for b in range(4):
                wanted[:, :, 4 * a + x, 4 * b + x] = kernel[:, :, a, b]
    out, found = op(**p)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, (kernel @ p["v"].reshape(2, 3, 4, 4)).reshape(2, 3, 16, 1))


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "hyper-zzw": context_is_a_centred_kernel,
    "hyper-zzw-product": planes_multiply,
}


@pytest.mark.parametrize("name", ["hyper-zzw", "hyper-zzw-product"])
def test_wide_heads_are_channels_side_by_side(name: str) -> None:
    p = given(name)
    narrow, channels = variants()[name](**p)
    wide = {key: p[key].transpose(1, 3) for key in ("z", "v")}
    out, found = variants()[name](**{**p, **wide})
    assert isinstance(found, PerChannelMap)
    torch.testing.assert_close(out, narrow.transpose(1, 3))
    torch.testing.assert_close(found.native().dense(), channels.dense())


def test_refusals() -> None:
    p = given("hyper-zzw")
    with pytest.raises(WorkbenchError, match="planes multiply as square matrices"):
        variants()["hyper-zzw-product"](**p)
    with pytest.raises(WorkbenchError, match=r"leave is floating point \[3, width\]"):
        variants()["hyper-zzw"](**{**p, "leave": p["leave"][:2]})
    with pytest.raises(WorkbenchError, match=r"enter is floating point \[width, 3\]"):
        variants()["hyper-zzw"](**{**p, "enter": p["enter"][:, :2]})


def test_half_precision_is_transformed_in_the_working_type() -> None:
    p = variants()["hyper-zzw"].example(3, 12, torch.bfloat16)
    out, _ = variants()["hyper-zzw"](**p)
    wanted, _ = variants()["hyper-zzw"](**{k: x.double() if isinstance(x, Tensor) else x for k, x in p.items()})
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=3e-2 * float(wanted.abs().max()))
