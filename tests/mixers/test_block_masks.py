"""Block rules, written pair by pair, against the operators; reach, coverage, and the relevance of segments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers import block_masks
from workbench.mixers.block_masks import bigbird_blocks, power_blocks, s2_blocks, segment_relevance

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def drawn(tokens: int = 13) -> dict[str, Any]:
    return example_tensors(9, torch.float64, q=(2, 4, tokens, 6), k=(2, 2, tokens, 6), v=(2, 2, tokens, 3))


def dense(given: dict[str, Any], allowed: Tensor) -> Tensor:
    s = given["q"] @ given["k"].repeat_interleave(2, 1).mT / 6**0.5
    return s.masked_fill(~allowed, -torch.inf).softmax(-1)


def agrees(found: tuple[Tensor, AttentionMap], given: dict[str, Any], rule: Callable[[int, int, int], bool]) -> None:
    n = given["q"].shape[2]
    allowed = torch.tensor([[[rule(h, i, j) for j in range(n)] for i in range(n)] for h in range(4)])
    want = dense(given, allowed)
    torch.testing.assert_close(found[1].dense(), want)
    torch.testing.assert_close(found[0], want @ given["v"].repeat_interleave(2, 1))


def sharded_heads(op: Operator) -> None:
    """The rule of the shards; a stride of 1 is full causal attention."""
    given = drawn()

    def rule(h: int, i: int, j: int) -> bool:
        return j <= i and (i // 2 - j // 2 < 2 or (j // 2 + h + 1) % 3 == 0)

    agrees(op(**given, side=2, local_blocks=2, stride=3), given, rule)
    agrees(op(**given, side=2, local_blocks=1, stride=1), given, lambda h, i, j: j <= i)


def powers_of_two(op: Operator) -> None:
    """The rule of the distances; local blocks for all are full causal attention."""
    given = drawn()

    def rule(h: int, i: int, j: int) -> bool:
        return j <= i and (i // 2 - j // 2 in (0, 1, 2, 4) or j < 2)

    agrees(op(**given, side=2), given, rule)
    agrees(op(**given, side=2, local_blocks=7, sink_blocks=0), given, lambda h, i, j: j <= i)
    alone = op(**given, side=2, sink_blocks=0)
    agrees(alone, given, lambda h, i, j: j <= i and i // 2 - j // 2 in (0, 1, 2, 4))


def near_ends_and_random(op: Operator) -> None:
    """Neighbours and both ends are seen whatever is drawn; as many drawn as there are is full attention."""
    given = drawn()
    blocks = bigbird_blocks(4, 7, 1, 3)[0]
    agrees(op(**given, side=2, random_blocks=1, seed=3), given, lambda h, i, j: bool(blocks[h, i // 2, j // 2]))
    agrees(op(**given, side=2, random_blocks=7), given, lambda h, i, j: True)
    none = op(**given, side=2, random_blocks=0)
    agrees(none, given, lambda h, i, j: abs(i // 2 - j // 2) <= 1 or {i // 2, j // 2} & {0, 6} != set())


def arrow(op: Operator) -> None:
    """Documents see the instruction and themselves, the query everything, nobody the future."""
    given = drawn()
    segment = [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4]

    def rule(h: int, i: int, j: int) -> bool:
        return j <= i and (segment[j] in (0, segment[i]) or segment[i] == 4)

    out = op(**given, segments=torch.tensor([segment]))
    agrees(out, given, rule)
    torch.testing.assert_close(out[1].row_sums(), torch.ones(2, 4, 13, dtype=torch.float64))
    agrees(op(**given, segments=torch.zeros(1, 13, dtype=torch.int64)), given, lambda h, i, j: j <= i)


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "s2-attention": sharded_heads,
    "power-attention": powers_of_two,
    "bigbird-attention": near_ends_and_random,
    "blockrank-attention": arrow,
}


@pytest.mark.parametrize(("heads", "stride"), [(4, 4), (8, 8), (4, 3), (8, 2)])
def test_the_shards_of_as_many_heads_as_the_stride_hold_every_block(heads: int, stride: int) -> None:
    blocks = s2_blocks(heads, 24, 1, stride)[0]
    assert torch.equal(blocks.any(0), torch.ones(24, 24, dtype=torch.bool).tril())
    assert bool((blocks[:, -1].sum(1) <= 24 // stride + 1).all())


def test_powers_of_two_reach_everything_in_log_many_layers() -> None:
    blocks = power_blocks(32, 1, 0)[0, 0].double()
    reach = torch.linalg.matrix_power(blocks, 5) > 0
    assert torch.equal(reach, torch.ones(32, 32, dtype=torch.bool).tril())
    assert not torch.equal(torch.linalg.matrix_power(blocks, 3) > 0, reach)
    assert int(blocks[31].sum()) == 6


def test_random_blocks_are_new_and_repeatable() -> None:
    none, two, again, other = (bigbird_blocks(3, 12, r, s)[0] for r, s in ((0, 0), (2, 0), (2, 0), (2, 1)))
    assert torch.equal(two, again)
    assert not torch.equal(two, other)
    assert torch.equal((two & ~none)[:, 1:-1].sum(-1), torch.full((3, 10), 2))


def test_the_relevance_of_a_document_is_its_mass_from_the_query() -> None:
    given = drawn()
    segments = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3], [0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]])
    _, found = block_masks.blockrank_attention(**given, segments=segments)
    rows = torch.arange(13) >= 11
    got = segment_relevance(found, segments, rows)
    assert got.shape == (2, 4, 4)
    weights = found.dense()[:, :, 11:].mean(2)
    for b in range(2):
        for s in range(4):
            torch.testing.assert_close(got[b, :, s], weights[b][:, segments[b] == s].sum(-1))
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 4, dtype=torch.float64))


def test_a_step_of_decoding_at_a_block_is_the_rows_of_the_whole() -> None:
    given = drawn()
    for operator, options in (
        (block_masks.s2_attention, {"side": 4, "local_blocks": 1, "stride": 2}),
        (block_masks.power_attention, {"side": 4}),
    ):
        out, found = operator(**{**given, "q": given["q"][:, :, 8:]}, **options, mask=Mask(causal=True, offset=8))
        want, whole = operator(**given, **options)
        torch.testing.assert_close(out, want[:, :, 8:])
        torch.testing.assert_close(found.dense(), whole.dense()[:, :, 8:])


@pytest.mark.parametrize(
    ("operator", "options", "words"),
    [
        (block_masks.s2_attention, {"side": 0, "local_blocks": 1, "stride": 2}, "side is"),
        (block_masks.s2_attention, {"side": 2, "local_blocks": 1, "stride": 0}, "stride is"),
        (
            block_masks.power_attention,
            {"side": 4, "mask": Mask(causal=True, offset=2)},
            "mask.offset starts a block of 4",
        ),
        (block_masks.blockrank_attention, {"segments": torch.ones(1, 13, dtype=torch.int64)}, "start at 0"),
        (block_masks.blockrank_attention, {"segments": torch.zeros(13, dtype=torch.int64)}, "segments are int"),
        (
            block_masks.blockrank_attention,
            {"segments": torch.zeros(1, 13, dtype=torch.int64), "mask": Mask()},
            "BlockRank is causal",
        ),
    ],
)
def test_wrong_options_are_named(operator: Operator, options: dict[str, Any], words: str) -> None:
    with pytest.raises(WorkbenchError, match=words):
        operator(**drawn(), **options)
