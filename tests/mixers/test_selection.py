"""Block selection against loops over rows, and the choices themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.selection import (
    block_mean_attention,
    dynamic_hierarchical_attention,
    moba,
    native_sparse_attention,
)

Operator = Callable[..., tuple[Tensor, AttentionMap]]
CAUSAL = Mask(causal=True)


def drawn(
    tokens: int = 11, heads: int = 4, groups: int = 2, seed: int = 3, **more: tuple[int, ...]
) -> dict[str, Tensor]:
    shapes = {"q": (2, heads, tokens, 6), "k": (2, groups, tokens, 6), "v": (2, groups, tokens, 5), **more}
    return example_tensors(seed, torch.float64, **shapes)


def over(given: dict[str, Tensor], seen: Callable[[int, int, int], set[int]]) -> Tensor:
    """Dense weights of a softmax over the keys ``seen(b, h, i)``, one row at a time."""
    q, k = given["q"], given["k"]
    b, h, n, e = q.shape
    out = torch.zeros(b, h, n, k.shape[2], dtype=q.dtype)
    for bi in range(b):
        for hi in range(h):
            for i in range(n):
                keys = sorted(seen(bi, hi, i))
                if keys:
                    logits = k[bi, hi // (h // k.shape[1])][keys] @ q[bi, hi, i] / math.sqrt(e)
                    out[bi, hi, i, keys] = logits.softmax(0)
    return out


def agrees(out: Tensor, found: AttentionMap, wanted: Tensor, v: Tensor) -> None:
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ v.repeat_interleave(wanted.shape[1] // v.shape[1], 1))


def full(given: dict[str, Tensor]) -> Tensor:
    return over(given, lambda b, h, i: set(range(i + 1)))


def ranked(scores: dict[int, float], top: int) -> list[int]:
    return sorted(scores, key=lambda j: (-scores[j], j))[:top]


def own_block_and_best_means(op: Operator) -> None:
    """MoBA row by row: the own block, then past blocks by q . mean(k); all blocks are causal attention."""
    given, side, top = drawn(), 3, 2
    q, k = given["q"], given["k"]

    def seen(b: int, h: int, i: int) -> set[int]:
        key, own = k[b, h // 2], i // side
        past = {block: float(q[b, h, i] @ key[block * side : (block + 1) * side].mean(0)) for block in range(own)}
        blocks = [own, *ranked(past, top - 1)]
        return {j for j in range(i + 1) if j // side in blocks}

    agrees(*op(**given, top=top, side=side, mask=CAUSAL), over(given, seen), given["v"])
    agrees(*op(**given, top=4, side=side, mask=CAUSAL), full(given), given["v"])


def three_branches(op: Operator) -> None:
    """NSA row by row: compressed, selected and window attention, each from its own definition, weighed by the gates."""
    given = drawn(gates=(2, 4, 11, 3))
    q, k, v, gates = given["q"], given["k"], given["v"], given["gates"]
    side, top, window = 2, 4, 3
    coarse = torch.zeros(2, 4, 11, 6, dtype=torch.float64)
    lift = torch.zeros(6, 11, dtype=torch.float64)
    for block in range(6):
        cells = list(range(block * side, min(11, (block + 1) * side)))
        lift[block, cells] = 1 / len(cells)
    for b in range(2):
        for h in range(4):
            for i in range(11):
                complete = (i + 1) // side
                if complete:
                    means = lift[:complete] @ k[b, h // 2]
                    coarse[b, h, i, :complete] = (means @ q[b, h, i] / math.sqrt(6)).softmax(0)

    def selected(b: int, h: int, i: int) -> set[int]:
        own, group = i // side, slice(h // 2 * 2, h // 2 * 2 + 2)
        forced = {0, own, max(own - 1, 0)}
        others = {c: float(coarse[b, group, i, c].mean()) for c in range((i + 1) // side) if c not in forced}
        blocks = forced | set(ranked(others, top - len(forced)))
        return {j for j in range(i + 1) if j // side in blocks}

    near = over(given, lambda b, h, i: set(range(max(0, i - window + 1), i + 1)))
    wanted = sum(
        g[..., None] * m for g, m in zip(gates.unbind(-1), (coarse @ lift, over(given, selected), near), strict=True)
    )
    assert isinstance(wanted, Tensor)
    out, found = op(**given, side=side, top=top, window=window)
    agrees(out, found, wanted, v)
    only = torch.zeros_like(gates)
    only[..., 1] = 1
    agrees(*op(**{**given, "gates": only}, side=side, top=6, window=window), full(given), v)


def chunks_share_their_score(op: Operator) -> None:
    """DHSA row by row from chunk and block representations; a budget for all keys is causal attention."""
    given = drawn()
    q, k = given["q"].mean(1), given["k"].mean(1)
    chunks = torch.tensor([[0, 0, 0, 1, 2, 2, 2, 2, 3, 3, 3], [0, 1, 1, 1, 1, 1, 2, 3, 3, 4, 4]])
    side, budget, local = 3, 5, 2

    def seen(b: int, h: int, i: int) -> set[int]:
        first = i // side * side
        last = min(first + side, 11) - 1
        block = q[b, first : last + 1].mean(0) * math.sqrt(last + 1 - first)
        scores = {}
        for j in range(last + 1):
            members = k[b, chunks[b] == chunks[b, j]]
            scores[j] = float(block @ members.mean(0)) * math.sqrt(len(members))
        forced = [j for j in range(last + 1) if j > last - local]
        others = {j: s for j, s in scores.items() if j not in forced}
        return {j for j in [*forced, *ranked(others, budget - len(forced))] if j <= i}

    call = {**given, "chunks": chunks, "side": side, "local": local, "mask": CAUSAL}
    agrees(*op(**call, budget=budget), over(given, seen), given["v"])
    agrees(*op(**call, budget=11), full(given), given["v"])


def first_own_and_best_blocks(op: Operator) -> None:
    """The released rule block row by block row; all blocks are causal attention."""
    given, side, top = drawn(), 2, 3
    q, k = given["q"], given["k"]

    def seen(b: int, h: int, i: int) -> set[int]:
        own = i // side
        mean = q[b, h, own * side : (own + 1) * side].mean(0)
        key = k[b, h // 2]
        middle = {c: float(mean @ key[c * side : (c + 1) * side].mean(0)) for c in range(1, own)}
        blocks = {0, own, *ranked(middle, top - len({0, own}))}
        return {j for j in range(i + 1) if j // side in blocks}

    agrees(*op(**given, top=top, side=side, mask=CAUSAL), over(given, seen), given["v"])
    agrees(*op(**given, top=6, side=side, mask=CAUSAL), full(given), given["v"])


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "mixture-of-block-attention": own_block_and_best_means,
    "native-sparse-attention": three_branches,
    "dynamic-hierarchical-sparse-attention": chunks_share_their_score,
    "block-mean-selection": first_own_and_best_blocks,
}


def test_moba_decodes_with_a_cache() -> None:
    given = drawn()
    whole, found = moba(**given, top=2, side=3)
    step, last = moba(**{**given, "q": given["q"][:, :, 9:]}, top=2, side=3, mask=Mask(causal=True, offset=9))
    torch.testing.assert_close(step, whole[:, :, 9:])
    torch.testing.assert_close(last.dense(), found.dense()[:, :, 9:])
    assert last.offset == 9
    assert last.row_sum == "1"


def test_nsa_decodes_with_a_cache() -> None:
    given = drawn(gates=(2, 4, 11, 3))
    whole, found = native_sparse_attention(**given, top=4, side=2, window=3)
    late = {name: given[name][:, :, 8:] for name in ("q", "gates")}
    step, last = native_sparse_attention(**{**given, **late}, top=4, side=2, window=3, offset=8)
    torch.testing.assert_close(step, whole[:, :, 8:])
    torch.testing.assert_close(last.dense(), found.dense()[:, :, 8:])


def test_padding_is_neither_averaged_nor_chosen() -> None:
    """Left padding changes nothing for the tokens after it, where blocks of the padding are whole."""
    given = drawn(9)
    padded = {name: torch.cat([torch.full_like(x[:, :, :3], 7.0), x], 2) for name, x in given.items()}
    mask = Mask(causal=True, keys=torch.tensor([[False] * 3 + [True] * 9]))
    for call in (
        lambda x, m: moba(**x, top=2, side=3, mask=m),
        lambda x, m: dynamic_hierarchical_attention(
            **x, chunks=(torch.arange(x["k"].shape[2]) // 3)[None], budget=5, side=3, mask=m
        ),
    ):
        plain, _ = call(given, CAUSAL)
        out, found = call(padded, mask)
        torch.testing.assert_close(out[:, :, 3:], plain)
        assert not found.dense()[..., :3].any()
        assert found.row_sum == "<=1"


def test_native_views_say_what_was_chosen() -> None:
    given = drawn()
    _, blocks = moba(**given, top=2, side=3)
    assert blocks.native().shape == (2, 4, 11, 4)
    assert bool(blocks.native()[:, :, 0, 1:].isneginf().all())
    assert bool((blocks.kept.sum(-1) <= 2).all())
    torch.testing.assert_close((blocks.blocks(3)[:, :, 0] > 0), blocks.kept[:, :, :3].any(2))
    gates = torch.rand(2, 4, 11, 3, dtype=torch.float64)
    _, sparse = native_sparse_attention(**given, gates=gates, top=4, side=2, window=3)
    coarse = sparse.native()
    assert coarse.domain == "block"
    torch.testing.assert_close(coarse.row_sums()[:, :, 1:], torch.ones(2, 4, 10, dtype=torch.float64))
    assert not coarse.row_sums()[:, :, 0].any()
    _, means = block_mean_attention(**given, top=3, side=2)
    assert torch.equal(means.blocks(2) > 0, means.kept)
    _, hierarchical = dynamic_hierarchical_attention(**given, chunks=torch.zeros(1, 11, dtype=torch.int64), budget=4)
    assert hierarchical.native().shape == (2, 1, 1)


def test_long_texts_are_answered_without_a_full_matrix() -> None:
    """4,000 tokens: statistics of selected blocks and the exact rows they come from."""
    given = {name: x.float() for name, x in drawn(4000, heads=1, groups=1).items()}
    with torch.no_grad():
        _, found = moba(**{name: x[:1] for name, x in given.items()}, top=3, side=256)
    received = found.received()
    torch.testing.assert_close(received.sum(), torch.tensor(4000.0), rtol=1e-4, atol=0)
    mass = found.blocks(256)
    assert mass.shape == (1, 1, 16, 16)
    torch.testing.assert_close(mass.sum(2), torch.stack([part.sum(-1) for part in received.split(256, -1)], -1))
    torch.testing.assert_close(found.rows(3999, 4000).sum(), torch.tensor(1.0))


MISTAKES: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (moba, {"top": 0, "side": 2}, "top is a positive number"),
    (moba, {"top": 1, "side": 0}, "side is a positive number of tokens"),
    (moba, {"top": 1, "side": 2, "mask": Mask()}, "mask is causal"),
    (native_sparse_attention, {"gates": torch.zeros(2, 4, 11)}, "gates is floating point"),
    (native_sparse_attention, {"gates": torch.zeros(2, 4, 11, 3), "window": -1}, "window is a positive"),
    (dynamic_hierarchical_attention, {"chunks": torch.zeros(2, 11), "budget": 3}, "chunks are int64"),
    (dynamic_hierarchical_attention, {"chunks": torch.arange(11).flip(0)[None], "budget": 3}, "not decreasing"),
    (block_mean_attention, {"top": 0}, "top"),
    (
        block_mean_attention,
        {"top": 1, "side": 11, "mask": Mask(causal=True, blocks=torch.ones(1, 1, 1, 1, dtype=torch.bool), side=11)},
        "without it",
    ),
]


@pytest.mark.parametrize(("operator", "change", "words"), MISTAKES)
def test_misfits_are_named(operator: Callable[..., Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(WorkbenchError, match=words):
        operator(**drawn(), **change)
