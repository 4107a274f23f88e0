"""NAtS-L: where its two parts meet, and where only one is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.errors import WorkbenchError
from workbench.mixers.natsl import VARIANTS

Operator = Callable[..., tuple[Tensor, AttentionMap]]
RECORD = VARIANTS[0]


def example(tokens: int) -> dict[str, Any]:
    return RECORD.example(0, tokens, torch.float64)


def literal(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Softmax over soft tokens, and the delta rule over the others, token by token; both as maps."""
    q, k = given["q"], given["k"].repeat_interleave(2, 1)
    b, h, n, e = q.shape
    soft = given["scores"][..., 1] > given["scores"][..., 0]
    p, m = q.new_zeros(b, h, n, n), q.new_zeros(b, h, n, n)
    for at in range(b):
        for head in range(h):
            state = q.new_zeros(e, n)
            for i in range(n):
                kept = [j for j in range(i + 1) if soft[at, j // given["chunk"]]]
                if kept:
                    p[at, head, i, kept] = (k[at, head, kept] @ q[at, head, i] * e**-0.5).softmax(0)
                unit_q, unit_k = (x[at, head, i] / (x[at, head, i].square().sum() + 1e-6).sqrt() for x in (q, k))
                if not soft[at, i // given["chunk"]]:
                    state = state * given["log_decay"][at, head, i].exp()
                    write = torch.eye(n, dtype=q.dtype)[i] - unit_k @ state
                    state = state + given["beta"][at, head, i] * unit_k[:, None] * write
                m[at, head, i] = e**-0.5 * unit_q @ state
    return p, m


def parts_are_softmax_and_delta_rule(op: Operator) -> None:
    given = example(13)
    p, m = literal(given)
    out, amap = op(**given)
    torch.testing.assert_close(amap.dense(), p + m)
    torch.testing.assert_close(out, (p + m) @ given["v"].repeat_interleave(2, 1))
    given["scores"] = torch.eye(2, dtype=torch.float64)[torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 1, 0]])]
    torch.testing.assert_close(op(**given)[1].dense(), sum(literal(given)))
    for column in (0, 1):  # all chunks linear: the gated delta rule; all soft: causal softmax attention
        given["scores"] = torch.eye(2, dtype=torch.float64)[column].expand(2, 5, 2)
        p, m = literal(given)
        assert bool(((m if column else p) == 0).all())
        torch.testing.assert_close(op(**given)[1].dense(), p + m)
    sums = op(**given)[1].row_sums()
    torch.testing.assert_close(sums, torch.ones_like(sums))


IDENTITIES: dict[str, Callable[[Operator], None]] = {"nats-l": parts_are_softmax_and_delta_rule}


def test_identity() -> None:
    IDENTITIES["nats-l"](RECORD.operator)


def test_the_map_tells_which_tokens_went_where() -> None:
    given = example(13)
    _, amap = RECORD(**given)
    soft = given["scores"][..., 1] > given["scores"][..., 0]
    assert torch.equal(amap.assignment, soft)
    assert torch.equal(amap.soft, soft.repeat_interleave(3, 1)[:, :13])
    p, m = literal(given)
    softmax, linear = amap.native()
    torch.testing.assert_close(softmax.dense(), p)
    torch.testing.assert_close(linear.dense(), m)


def test_errors_name_the_argument() -> None:
    given = example(7)
    for name, wrong in (("scores", given["scores"][:, :1]), ("chunk", 0), ("beta", given["beta"][..., :2])):
        with pytest.raises(WorkbenchError, match=f"^{name} is"):
            RECORD(**{**given, name: wrong})
