"""Delta maps against the recurrence written out in a loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.captures import capture
from workbench.errors import Refused, WorkbenchError
from workbench.patterns.delta import DeltaMap

B, H, E = 2, 4, 5


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n: int, heads: int = H, decay: bool = True) -> dict[str, Any]:
    k = torch.nn.functional.normalize(rand(1, B, heads, n, E), dim=-1)
    log = -rand(3, B, H, n).exp() if decay else None
    return {"q": rand(0, B, heads, n, E), "k": k, "beta": rand(2, B, H, n).sigmoid(), "log_decay": log}


def literal(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float) -> Tensor:
    """M by feeding unit vectors through the recurrence."""
    n = q.shape[2]
    q, k = (x.repeat_interleave(H // x.shape[1], 1) for x in (q, k))
    v = torch.eye(n, dtype=torch.float64)
    s = torch.zeros(B, H, E, n, dtype=torch.float64)
    out = []
    for t in range(n):
        if log_decay is not None:
            s = s * log_decay[:, :, t, None, None].exp()
        kt, bt = k[:, :, t, :, None], beta[:, :, t, None, None]
        s = s - bt * kt @ (kt.transpose(-1, -2) @ s) + bt * kt * v[t]
        out.append(scale * (q[:, :, t, None] @ s)[:, :, 0])
    return torch.stack(out, 2)


@pytest.mark.parametrize("heads", [H, 2, 1])
@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("n", [1, 13, 130])
def test_answers_are_those_of_the_recurrence(n: int, decay: bool, heads: int) -> None:
    given = inputs(n, heads, decay)
    amap = DeltaMap(**given, scale=0.7, kv_heads=2)
    wanted = literal(**given, scale=0.7)
    torch.testing.assert_close(amap.dense(), wanted)
    torch.testing.assert_close(amap.rows(n // 2, n // 2 + 1), wanted[:, :, n // 2 : n // 2 + 1])
    assert amap.rows(0, 0).shape == (B, H, 0, n)
    v, y = rand(5, B, 2, n, 3), rand(6, B, H, n, 3)
    torch.testing.assert_close(amap.matvec(v), wanted @ v.repeat_interleave(2, 1))
    back = (wanted.transpose(-1, -2) @ y).unflatten(1, (2, 2)).sum(2)
    torch.testing.assert_close(amap.rmatvec(y), back)
    torch.testing.assert_close(amap.received(), wanted.sum(2))
    torch.testing.assert_close(amap.row_sums(), wanted.sum(3))
    at = torch.arange(n).double()
    torch.testing.assert_close(amap.distance(), (wanted * (at[:, None] - at)).sum(3))
    torch.testing.assert_close(amap.distance(moment=2), (wanted * (at[:, None] - at) ** 2).sum(3))
    full = DeltaMap.from_dense(wanted)
    for reduce in ("sum", "mean", "abs", "max"):
        torch.testing.assert_close(amap.blocks(7, reduce), full.blocks(7, reduce))
    torch.testing.assert_close(amap.topk(1).values, full.topk(1).values)
    torch.testing.assert_close(amap.heads([3, 0]).dense(), wanted[:, [3, 0]])


def test_the_scale_defaults_to_that_of_attention() -> None:
    given = inputs(9)
    torch.testing.assert_close(DeltaMap(**given).dense(), literal(**given, scale=E**-0.5))


def test_all_block_maps_of_a_capture_come_from_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.patterns import delta

    calls = []
    plain = delta.gated_delta_rule

    def watch(*args: Any, **options: Any) -> Any:
        calls.append(options.get("block"))
        return plain(*args, **options)

    monkeypatch.setattr(delta, "gated_delta_rule", watch)
    amap = DeltaMap(**inputs(40))
    amap.precompute(capture(blocks=8, reduce=("sum", "abs", "max")))
    amap.blocks(8, "max")
    assert calls == [8]
    assert amap.impl == "cpu"


def test_rows_of_a_long_sequence_take_memory_linear_in_it() -> None:
    n = 4096
    q, k = rand(0, 1, 1, n, 8).float(), torch.nn.functional.normalize(rand(1, 1, 1, n, 8).float(), dim=-1)
    amap = DeltaMap(q, k, rand(2, 1, 1, n).sigmoid().float(), -0.01 * rand(3, 1, 1, n).exp().float())
    row = amap.rows(n - 1, n)
    v = rand(4, 1, 1, n, 2).float()
    torch.testing.assert_close(row @ v, amap.matvec(v)[:, :, -1:], atol=1e-4, rtol=1e-4)


def test_narrow_types_are_answered_in_float32() -> None:
    given = {name: None if x is None else x.bfloat16() for name, x in inputs(20).items()}
    amap = DeltaMap(**given)
    assert amap.dense().dtype == torch.float32
    assert amap.matvec(rand(1, B, H, 20, 2).bfloat16()).dtype == torch.bfloat16


def test_errors_name_the_argument() -> None:
    given = inputs(9)
    with pytest.raises(WorkbenchError, match="log_decay"):
        DeltaMap(**{**given, "log_decay": given["beta"][:, :, :3]})
    with pytest.raises(WorkbenchError, match="k"):
        DeltaMap(**{**given, "k": given["k"][..., :2]})
    with pytest.raises(Refused, match="entropy"):
        DeltaMap(**given).entropy()
