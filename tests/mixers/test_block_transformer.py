"""The block transformer against its two decoders written out token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.mixers.block_transformer import block_transformer_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def drawn(tokens: int, block: int) -> dict[str, Any]:
    count = -(-tokens // block)
    shapes = {
        "q": (2, 4, tokens, 6), "k": (2, 2, tokens, 6), "v": (2, 2, tokens, 3),
        "block_q": (2, 4, count, 6), "block_k": (2, 2, count, 6), "prefix_k": (2, 2, count, 6),
    }  # fmt: skip
    return {**example_tensors(8, torch.float64, **shapes), "block": block}


def by_tokens(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Weights of tokens on tokens ``[B, H, N, N]``, and of tokens on the prefix ``[B, H, N]``."""
    q, n, size = given["q"], given["q"].shape[2], given["block"]
    out, column = q.new_zeros(2, 4, n, n), q.new_zeros(2, 4, n)
    for b in range(2):
        for h in range(4):
            k, block_k, prefix_k = (given[name][b, h // 2] for name in ("k", "block_k", "prefix_k"))
            for i in range(n):
                t = i // size
                own = list(range(t * size, i + 1))
                logits = [q[b, h, i] @ k[j] / 6**0.5 for j in own]
                if t > 0:
                    logits.append(q[b, h, i] @ prefix_k[t - 1] / 6**0.5)
                p = torch.stack(logits).softmax(0)
                out[b, h, i, own] = p[: len(own)]
                if t > 0:
                    column[b, h, i] = p[-1]
                    blocks = (block_k[:t] @ given["block_q"][b, h, t - 1] / 6**0.5).softmax(0)
                    for u in range(t):
                        out[b, h, i, u * size : (u + 1) * size] += p[-1] * blocks[u] / size
    return out, column


def two_decoders(op: Operator) -> None:
    """Local tokens and a prefix; blocks of one token leave a token itself and its prefix; one block is causal attention."""
    for tokens, size in ((10, 4), (5, 1), (6, 6)):
        given = drawn(tokens, size)
        out, found = op(**given)
        want, column = by_tokens(given)
        torch.testing.assert_close(found.dense(), want)
        torch.testing.assert_close(out, want @ given["v"].repeat_interleave(2, 1))
        torch.testing.assert_close(found.row_sums(), torch.ones(2, 4, tokens, dtype=torch.float64))
        _, through = found.native()
        prefix, to_tokens = through.native()
        torch.testing.assert_close(prefix.row_sums(), column)
        torch.testing.assert_close(to_tokens.left.row_sums(), torch.ones(2, 4, -(-tokens // size), dtype=torch.float64))
        assert not torch.triu(to_tokens.left.dense(), 1).any()


IDENTITIES: dict[str, Callable[[Operator], None]] = {"block-transformer": two_decoders}


@pytest.mark.parametrize("name", ["block_q", "block_k", "prefix_k"])
def test_a_wrong_number_of_blocks_is_named(name: str) -> None:
    given = drawn(10, 4)
    given[name] = given[name][:, :, :2]
    with pytest.raises(WorkbenchError, match=f"^{name} is"):
        block_transformer_attention(**given)


def test_long_sequences_need_no_square() -> None:
    tokens = 2048
    shapes = {
        "q": (1, 1, tokens, 4), "k": (1, 1, tokens, 4), "v": (1, 1, tokens, 4),
        "block_q": (1, 1, tokens // 32, 4), "block_k": (1, 1, tokens // 32, 4), "prefix_k": (1, 1, tokens // 32, 4),
    }  # fmt: skip
    given = example_tensors(0, torch.float32, **shapes)
    out, found = block_transformer_attention(**given, block=32)
    torch.testing.assert_close(found.matvec(given["v"]), out, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.received().sum(-1), torch.full((1, 1), float(tokens)), rtol=1e-4, atol=0)
