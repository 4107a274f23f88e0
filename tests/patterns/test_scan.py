"""Maps of selective scans, channel by channel, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.patterns import scan as module
from workbench.patterns.scan import ScanMap

B, C, S = 2, 4, 3


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n: int, groups: int) -> tuple[Tensor, ...]:
    dt = torch.nn.functional.softplus(rand(0, B, C, n))
    return dt, -rand(1, C, S).exp(), rand(2, B, groups, n, S), rand(3, B, groups, n, S), rand(4, C)


def literal(dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None) -> Tensor:
    n = dt.shape[2]
    out = torch.zeros(B, C, n, n, dtype=torch.float64)
    for channel in range(C):
        g = channel // (C // b.shape[1])
        for i in range(n):
            for j in range(i + 1):
                decay = (a[channel] * dt[:, channel, j + 1 : i + 1].sum(-1)[:, None]).exp()
                out[:, channel, i, j] = (c[:, g, i] * decay * b[:, g, j]).sum(-1) * dt[:, channel, j]
            if d is not None:
                out[:, channel, i, i] += d[channel]
    return out


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("skip", [True, False])
def test_answers_are_those_of_the_definition(groups: int, skip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOGETHER", 200)  # one or two channels at a time
    n = 21
    dt, a, b, c, d = inputs(n, groups)
    amap = ScanMap(dt, a, b, c, d if skip else None)
    wanted = literal(dt, a, b, c, d if skip else None)
    torch.testing.assert_close(amap.dense(), wanted)
    v = rand(5, B, C, n, 2)
    torch.testing.assert_close(amap.matvec(v), wanted @ v)
    torch.testing.assert_close(amap.rmatvec(v), wanted.transpose(-1, -2) @ v)
    full = ScanMap.from_dense(wanted)
    for reduce in ("sum", "mean", "abs", "max"):
        torch.testing.assert_close(amap.blocks(4, reduce), full.blocks(4, reduce))
    torch.testing.assert_close(amap.heads([3, 1]).dense(), wanted[:, [3, 1]])


def test_errors_name_the_argument() -> None:
    dt, a, b, c, d = inputs(5, 2)
    for wrong, name in (
        ((dt[0], a, b, c, d), "dt is"),
        ((dt, a[:2], b, c, d), "a is"),
        ((dt, a, b[..., :2], c, d), "b is"),
        ((dt, a, b, c[:, :1], d), "c is"),
        ((dt, a, b, c, d[:2]), "d is"),
    ):
        with pytest.raises(WorkbenchError, match=name):
            ScanMap(*wrong)
