"""Reversed attention against the transpose of a dense softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.reversed import ReversedMap, reversed_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def mass_is_sent_along_the_transpose(op: Operator) -> None:
    given = variants()["reversed-attention"].example(2, 9, torch.float64)
    q, k, v = given["q"], given["k"].repeat_interleave(2, 1), given["v"].repeat_interleave(2, 1)
    forward = (q @ k.transpose(-1, -2) * q.shape[3] ** -0.5).softmax(-1)
    sent = given["selector"] * given["sender"][:, None]
    out, found = op(**given)
    torch.testing.assert_close(found.received(), sent)
    torch.testing.assert_close(found.dense().sum(2), sent)
    torch.testing.assert_close(out, torch.einsum("bhji,bhj,bhjc->bhic", forward, sent, v))
    open_gates = {"selector": torch.ones_like(given["selector"]), "sender": torch.ones_like(given["sender"])}
    out, found = op(**{**given, **open_gates})
    torch.testing.assert_close(out, forward.transpose(-1, -2) @ v)
    torch.testing.assert_close(found.dense(), forward.transpose(-1, -2))


IDENTITIES: dict[str, Callable[[Operator], None]] = {"reversed-attention": mass_is_sent_along_the_transpose}


def example(tokens: int = 7) -> dict[str, Any]:
    return variants()["reversed-attention"].example(0, tokens, torch.float64)


def test_the_dependency_is_the_sum_over_heads_and_columns_sum_to_what_is_sent() -> None:
    given = example()
    _, found = reversed_attention(**given)
    tree = found.dependency()
    torch.testing.assert_close(tree.dense(), found.dense().sum(1, keepdim=True))
    torch.testing.assert_close(tree.received()[:, 0], given["sender"])
    with pytest.raises(Refused, match="no distribution"):
        tree.entropy()


def test_tokens_that_may_send_to_nobody_send_nothing() -> None:
    given = example()
    seen = torch.ones(1, 1, 7, 7, dtype=torch.bool)
    seen[..., 2, :] = False
    seen[..., 4] = False
    out, found = reversed_attention(**given, mask=Mask(dense=seen))
    assert (found.dense()[..., 2] == 0).all()
    assert (out[:, :, 4] == 0).all()
    assert torch.isfinite(out).all()
    torch.testing.assert_close(found.matvec(given["v"]), out)
    torch.testing.assert_close(found.received(), found.dense().sum(2))


def test_shapes_that_do_not_fit_are_refused() -> None:
    given = example()
    for name, value, message in (
        ("sender", given["sender"][:, :3], r"sender is floating point \[2, 7\]"),
        ("selector", given["selector"][:, :2], r"selector is floating point \[2, 4, 7\]"),
        ("mask", Mask(offset=2), "as many keys as queries"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            reversed_attention(**{**given, name: value})
    _, found = reversed_attention(**given)
    with pytest.raises(WorkbenchError, match=r"sender is \[B, H, N\]"):
        ReversedMap(found.forward, found.sender[:, :1])
