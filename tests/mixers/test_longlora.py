"""Shifted groups against the rule pair by pair and against rolling; the leak of the rolled causal mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.mixers import longlora
from workbench.mixers.longlora import future_mass

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def drawn(tokens: int = 12, groups: int = 2) -> dict[str, Any]:
    return example_tensors(3, torch.float64, q=(2, 4, tokens, 6), k=(2, groups, tokens, 6), v=(2, groups, tokens, 3))


def agrees(found: tuple[Tensor, AttentionMap], given: dict[str, Any], rule: Callable[[int, int, int], bool]) -> None:
    n, times = given["q"].shape[2], 4 // given["k"].shape[1]
    allowed = torch.tensor([[[rule(h, i, j) for j in range(n)] for i in range(n)] for h in range(4)])
    s = given["q"] @ given["k"].repeat_interleave(times, 1).mT / 6**0.5
    want = s.masked_fill(~allowed, -torch.inf).softmax(-1)
    torch.testing.assert_close(found[1].dense(), want)
    torch.testing.assert_close(found[0], want @ given["v"].repeat_interleave(times, 1))


def grouped(h: int, i: int, j: int, g: int = 4, heads: int = 2) -> bool:
    move = g // 2 if h >= 4 - heads else 0
    return j <= i and (i + move) // g == (j + move) // g


def groups_of_two_kinds(op: Operator) -> None:
    """Two kinds of groups, never ahead; a group of everything without moved heads is full causal attention."""
    for tokens in (12, 11):
        given = drawn(tokens)
        out = op(**given, group=4)
        agrees(out, given, grouped)
        assert not future_mass(out[1]).any()
        agrees(op(**given, group=24, shifted_heads=0), given, lambda h, i, j: j <= i)
        agrees(op(**given, group=4, shifted_heads=3), given, lambda h, i, j: grouped(h, i, j, heads=3))


def rolled(op: Operator) -> None:
    """Roll half of the heads, cut, attend causally, roll back; the moved heads' first tokens look at the end."""
    given = drawn(12, 4)
    out, found = op(**given, group=4)
    parts = [torch.cat([part[:, :2], part[:, 2:].roll(-2, 2)], 1).unflatten(2, (3, 4)) for part in given.values()]
    mixed = scaled_dot_product_attention(*parts, is_causal=True).flatten(2, 3)
    torch.testing.assert_close(out, torch.cat([mixed[:, :2], mixed[:, 2:].roll(2, 2)], 1))

    def rule(h: int, i: int, j: int) -> bool:
        a, b = ((x - 2) % 12 if h >= 2 else x for x in (i, j))
        return b <= a and a // 4 == b // 4

    agrees((out, found), given, rule)
    leak = future_mass(found)
    assert not leak[:, :2].any()
    assert bool((leak[:, 2:, :2] > 0.3).any())
    assert not leak[:, 2:, 2:].any()
    agrees(op(**given, group=12, shifted_heads=0), given, lambda h, i, j: j <= i)


def sinks_and_fewer_moved_heads(op: Operator) -> None:
    """Groups, and first tokens for all later ones; as many sinks as tokens are full causal attention."""
    given = drawn(11)
    out = op(**given, group=4, sinks=2)
    agrees(out, given, lambda h, i, j: j <= i and (j < 2 or grouped(h, i, j, heads=1)))
    assert not future_mass(out[1]).any()
    agrees(op(**given, group=4, sinks=11), given, lambda h, i, j: j <= i)
    two = op(**given, group=2, sinks=1, shifted_heads=2)
    agrees(two, given, lambda h, i, j: j <= i and (j < 1 or grouped(h, i, j, g=2)))


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "longlora-s2-attention": groups_of_two_kinds,
    "longlora-s2-attention-wrapped": rolled,
    "sinklora-sf-attention": sinks_and_fewer_moved_heads,
}


@pytest.mark.parametrize(
    ("operator", "options", "words"),
    [
        (longlora.shifted_sparse_attention, {"group": 3}, "group is even"),
        (longlora.shifted_sparse_attention, {"group": 4, "shifted_heads": 5}, "from 0 to 4"),
        (longlora.wrapped_sparse_attention, {"group": 4}, "has the 4 heads of q"),
        (longlora.sink_fixed_attention, {"group": 4, "sinks": 0}, "sinks is"),
    ],
)
def test_wrong_options_are_named(operator: Operator, options: dict[str, Any], words: str) -> None:
    with pytest.raises(WorkbenchError, match=words):
        operator(**drawn(), **options)


def test_long_sequences_need_no_square() -> None:
    given = example_tensors(0, torch.float32, q=(1, 4, 4096, 4), k=(1, 4, 4096, 4), v=(1, 4, 4096, 4))
    for operator in (
        longlora.shifted_sparse_attention,
        longlora.wrapped_sparse_attention,
        longlora.sink_fixed_attention,
    ):
        _, found = operator(**given, group=256)
        torch.testing.assert_close(found.received().sum(-1), torch.full((1, 4), 4096.0), rtol=1e-4, atol=0)
