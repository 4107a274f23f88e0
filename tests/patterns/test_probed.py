"""Maps found by running an operator, against the weights it used."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workbench import attention_map
from workbench.attention_map import AttentionMap
from workbench.errors import WorkbenchError
from workbench.patterns.probed import ProbedMap

B, H, G, N, E = 2, 4, 2, 13, 5


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Q, K, V = rand(0, B, H, N, E), rand(1, B, G, N, E), rand(2, B, G, N, E)
WEIGHTS = (
    (Q @ K.repeat_interleave(2, 1).mT * E**-0.5).masked_fill(~torch.ones(N, N).tril().bool(), -torch.inf).softmax(-1)
)


def fused(v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(Q.to(v), K.to(v), v, is_causal=True, enable_gqa=True)


def without_gradient(v: Tensor) -> Tensor:
    return fused(v.detach())


@pytest.mark.parametrize("operator", [fused, without_gradient])
@pytest.mark.parametrize("width", [None, 1, 3, 16])
@pytest.mark.parametrize("chunk", [200, 2**21])
def test_every_answer_is_that_of_the_weights(
    operator: Callable[[Tensor], Tensor], width: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_map, "CHUNK", chunk)
    found = ProbedMap(operator, V, width=width, sign="nonnegative", row_sum="1")
    assert found.differentiable == (operator is fused)
    wanted = AttentionMap.from_dense(WEIGHTS, kv_heads=G)
    v, y = rand(5, B, G, N, 7), rand(6, B, H, N, 7)
    pairs = [
        (found.dense(), WEIGHTS),
        (found.rows(3, 4), WEIGHTS[:, :, 3:4]),
        (found.rows(3, 3), WEIGHTS[:, :, 3:3]),
        (found.tile(slice(2, 5), slice(1, 2)), WEIGHTS[:, :, 2:5, 1:2]),
        (found.columns(4, 9), WEIGHTS[..., 4:9]),
        (found.matvec(v), wanted.matvec(v)),
        (found.rmatvec(y), wanted.rmatvec(y)),
        (found.received(), WEIGHTS.sum(2)),
        (found.row_sums(), WEIGHTS.sum(3)),
        (found.mass(torch.arange(N)), wanted.mass(torch.arange(N))),
        (found.entropy(), wanted.entropy()),
        (found.distance(), wanted.distance()),
        (found.block_columns(4), F.pad(WEIGHTS, (0, 3)).unflatten(3, (4, 4)).sum(-1)),
        *((found.blocks(4, kind), wanted.blocks(4, kind)) for kind in ("sum", "mean", "max", "abs")),
    ]
    for got, right in pairs:
        torch.testing.assert_close(got, right.to(got.dtype), rtol=1e-10, atol=1e-10)


def test_signed_operators_and_rectangles() -> None:
    weights = rand(3, B, H, 6, N)
    found = ProbedMap(lambda v: weights.float() @ v, rand(4, B, H, N, 3).float())
    assert (found.shape, found.sign, found.row_sum) == ((B, H, 6, N), "signed", "free")
    for kind in ("sum", "mean", "max", "abs"):
        torch.testing.assert_close(found.blocks(4, kind), AttentionMap.from_dense(weights.float()).blocks(4, kind))


def test_a_kernel_sees_only_its_own_width() -> None:
    seen = []

    def watched(v: Tensor) -> Tensor:
        seen.append(v.shape[3])
        return fused(v)

    found = ProbedMap(watched, V)
    found.dense(), found.blocks(2), found.received()
    assert set(seen) == {E}


def test_bfloat16_answers_in_float32() -> None:
    found = ProbedMap(fused, V.bfloat16())
    assert found.dense().dtype == torch.float32
    torch.testing.assert_close(found.dense(), WEIGHTS.float(), rtol=0.05, atol=0.01)


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (lambda v: v + 1, "not linear"),
        (lambda v: v * v, "not linear"),
        (lambda v: F.dropout(v, 0.5), "not linear"),
        (lambda v: v.cumsum(-1), "mixes value channels"),
        (lambda v: v.flatten(2), "makes outputs"),
        (lambda v: v.repeat(1, 2, 1, 1)[:, :3], "no whole number"),
    ],
)
def test_operators_that_have_no_map(operator: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        ProbedMap(operator, V)


def test_a_stated_row_sum_is_checked() -> None:
    with pytest.raises(WorkbenchError, match="rows sum to"):
        ProbedMap(lambda v: 2 * v, V, row_sum="1")
    with pytest.raises(WorkbenchError, match="values are floating point"):
        ProbedMap(fused, V[0])
    with pytest.raises(WorkbenchError, match="one channel"):
        ProbedMap(fused, V, width=0)
