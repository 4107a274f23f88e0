"""Groups that are not places: each against the operation written out on reshaped or reordered tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.mixers import group_masks
from workbench.mixers.group_masks import choose_prompts

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def drawn(tokens: int = 12, keys: int = 12) -> dict[str, Any]:
    return example_tensors(6, torch.float64, q=(2, 4, tokens, 6), k=(2, 2, keys, 6), v=(2, 2, keys, 3))


def dense(given: dict[str, Any], allowed: Tensor) -> Tensor:
    s = given["q"] @ given["k"].repeat_interleave(2, 1).mT / 6**0.5
    return s.masked_fill(~allowed, -torch.inf).softmax(-1)


def agrees(found: tuple[Tensor, AttentionMap], given: dict[str, Any], allowed: Tensor) -> None:
    want = dense(given, allowed)
    torch.testing.assert_close(found[1].dense(), want)
    torch.testing.assert_close(found[0], want @ given["v"].repeat_interleave(2, 1))


def within(op: Operator) -> None:
    """The instances as examples of a batch, attended to one by one; one instance is full attention."""
    given = drawn()
    out, found = op(**given, instances=3)
    q, k, v = (given[name].unflatten(2, (3, 4)).transpose(1, 2) for name in ("q", "k", "v"))
    want = scaled_dot_product_attention(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))
    torch.testing.assert_close(out, want.transpose(1, 2).flatten(2, 3))
    at = torch.arange(12)
    agrees((out, found), given, at[:, None] // 4 == at // 4)
    agrees(op(**given, instances=1), given, torch.ones(12, 12, dtype=torch.bool))


def across(op: Operator) -> None:
    """The types as examples of a batch; one type is full attention, and within times across reaches everything."""
    given = drawn()
    out, found = op(**given, instances=3)
    q, k, v = (given[name].unflatten(2, (3, 4)).permute(0, 3, 1, 2, 4) for name in ("q", "k", "v"))
    want = scaled_dot_product_attention(q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))
    torch.testing.assert_close(out, want.permute(0, 2, 3, 1, 4).flatten(2, 3))
    at = torch.arange(12)
    agrees((out, found), given, at[:, None] % 4 == at % 4)
    agrees(op(**given, instances=12), given, torch.ones(12, 12, dtype=torch.bool))
    _, inner = group_masks.within_instance_attention(**given, instances=3)
    assert bool((found.dense() @ inner.dense() > 0).all())


def prompts_of_a_token(op: Operator) -> None:
    """Tokens see all tokens and their own prompts: no prompts chosen is attention without prompts, all chosen full attention."""
    given = drawn(6, 10)
    prompts = torch.rand(2, 6, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    allowed = torch.ones(2, 1, 6, 10, dtype=torch.bool)
    allowed[:, 0, :, 1:5] = prompts
    agrees(op(**given, prompts=prompts), given, allowed)
    agrees(op(**given, prompts=torch.ones_like(prompts)), given, torch.ones(6, 10, dtype=torch.bool))
    out, found = op(**given, prompts=torch.zeros_like(prompts))
    bare = given | {name: torch.cat([given[name][:, :, :1], given[name][:, :, 5:]], 2) for name in ("k", "v")}
    want = dense(bare, torch.ones(6, 6, dtype=torch.bool))
    torch.testing.assert_close(out, want @ bare["v"].repeat_interleave(2, 1))
    assert bool((found.dense()[..., 1:5] == 0).all())


def shuffled(op: Operator) -> None:
    """Permute, cut, attend, permute back, head by head; one segment is full attention whatever the order."""
    given = drawn()
    orders = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(s)) for s in range(4)])
    out, found = op(**given, permutation=orders, segments=3)
    k, v = (given[name].repeat_interleave(2, 1) for name in ("k", "v"))
    for h, order in enumerate(orders):
        parts = [given["q"][:, h, order], k[:, h, order], v[:, h, order]]
        mixed = scaled_dot_product_attention(*(part.unflatten(1, (3, 4)) for part in parts)).flatten(1, 2)
        torch.testing.assert_close(out[:, h], mixed[:, order.argsort()])
    segment = orders.argsort(-1) // 4
    agrees((out, found), given, segment[:, :, None] == segment[:, None])
    agrees(op(**given, permutation=orders[0], segments=1), given, torch.ones(12, 12, dtype=torch.bool))
    place = orders[0].argsort() // 3  # segments of ceil(12 / 5) tokens
    agrees(op(**given, permutation=orders[0], segments=5), given, place[:, None] == place)


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "group-pose-within-instance": within,
    "group-pose-across-instances": across,
    "tcpa-prompt-attention": prompts_of_a_token,
    "relactrl-tdsm-token-mixer": shuffled,
}


def test_prompts_are_the_nearest_of_their_pool() -> None:
    x, first, rest = (torch.randn(*s, generator=torch.Generator().manual_seed(3)) for s in ((2, 5, 8), (4, 8), (6, 8)))
    found = choose_prompts(x, first, rest, class_count=2, image_count=3, length=2)
    assert found.shape == (2, 5, 20)
    assert torch.equal(found[..., ::2], found[..., 1::2])
    for b in range(2):
        for t in range(5):
            pool, count, at = (first, 2, slice(0, 8)) if t == 0 else (rest, 3, slice(8, 20))
            near = cosine_similarity(x[b, t][None], pool).topk(count).indices
            want = torch.zeros(len(pool), dtype=torch.bool)
            want[near] = True
            assert torch.equal(found[b, t, at], want.repeat_interleave(2))
            assert int(found[b, t].sum()) == 2 * count
    with pytest.raises(WorkbenchError, match="prompts of the pool, 4"):
        choose_prompts(x, first, rest, class_count=5, image_count=3)


@pytest.mark.parametrize(
    ("operator", "options", "words"),
    [
        (group_masks.within_instance_attention, {"instances": 5}, "instances divides the 12 tokens"),
        (group_masks.across_instance_attention, {"instances": 0}, "instances is a whole number"),
        (group_masks.prompt_attention, {"prompts": torch.ones(2, 12, 3, dtype=torch.bool)}, "prompts is bool"),
        (
            group_masks.shuffled_segment_attention,
            {"permutation": torch.zeros(12).long(), "segments": 2},
            "permutation holds",
        ),
    ],
)
def test_wrong_options_are_named(operator: Operator, options: dict[str, Any], words: str) -> None:
    with pytest.raises(WorkbenchError, match=words):
        operator(**drawn(), **options)
