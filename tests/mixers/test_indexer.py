"""DeepSeek sparse attention: the indexer's ranking token by token, and the softmax over what it ranks highest."""

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
from workbench.mixers.indexer import deepseek_sparse_attention, indexed_keys, indexer_map

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def drawn(tokens: int = 9) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 6), "k": (2, 2, tokens, 6), "v": (2, 2, tokens, 5)}
    index = {"index_q": (2, 3, tokens, 4), "index_k": (2, tokens, 4), "index_weights": (2, 3, tokens)}
    return example_tensors(1, torch.float64, **shapes, **index)


def score(given: dict[str, Tensor], b: int, i: int, j: int) -> float:
    heads = range(given["index_q"].shape[1])
    hits = [max(0.0, float(given["index_q"][b, h, i] @ given["index_k"][b, j])) / 2 for h in heads]
    return sum(float(given["index_weights"][b, h, i]) * hit for h, hit in zip(heads, hits, strict=True))


def the_best_tokens_of_the_indexer(op: Operator) -> None:
    """Row by row: rank the past by the indexer's formula, softmax over the best; with room for all it is causal attention."""
    given = drawn()
    q, k, v = given["q"], given["k"], given["v"]
    for top in (3, 9):
        wanted = torch.zeros(2, 4, 9, 9, dtype=torch.float64)
        for b in range(2):
            for i in range(9):
                order = sorted(range(i + 1), key=lambda j: -score(given, b, i, j))
                keys = sorted(order[:top])
                for h in range(4):
                    wanted[b, h, i, keys] = (k[b, h // 2, keys] @ q[b, h, i] / math.sqrt(6)).softmax(0)
        out, found = op(**given, top=top, mask=Mask(causal=True))
        torch.testing.assert_close(found.dense(), wanted)
        torch.testing.assert_close(out, wanted @ v.repeat_interleave(2, 1))


IDENTITIES: dict[str, Callable[[Operator], None]] = {"deepseek-sparse-attention": the_best_tokens_of_the_indexer}


def test_the_native_view_is_the_indexer() -> None:
    given = drawn()
    _, found = deepseek_sparse_attention(**given, top=3)
    indexer = found.native()
    assert indexer.shape == (2, 1, 9, 9)
    dense = indexer.dense()
    for at in ((0, 8, 2), (1, 5, 5), (1, 3, 0)):
        assert float(dense[at[0], 0, at[1], at[2]]) == pytest.approx(score(given, *at))
    assert not dense.triu(1).any()
    assert found.indices.shape == (2, 1, 9, 3)
    assert bool((found.indices[:, :, 0] == torch.tensor([0, -1, -1])).all())


def test_decoding_with_a_cache_and_padding() -> None:
    given = drawn()
    whole, found = deepseek_sparse_attention(**given, top=3)
    late = {name: given[name][:, :, 6:] for name in ("q", "index_q", "index_weights")}
    step, last = deepseek_sparse_attention(**{**given, **late}, top=3, mask=Mask(causal=True, offset=6))
    torch.testing.assert_close(step, whole[:, :, 6:])
    torch.testing.assert_close(last.dense(), found.dense()[:, :, 6:])
    real = torch.ones(1, 9, dtype=torch.bool)
    real[:, :2] = False
    _, padded = deepseek_sparse_attention(**given, top=3, mask=Mask(causal=True, keys=real))
    assert not padded.dense()[..., :2].any()
    assert not padded.row_sums()[:, :, :2].any()
    torch.testing.assert_close(padded.row_sums()[:, :, 2:], torch.ones(2, 4, 7, dtype=torch.float64))


def test_rows_in_chunks_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench import attention_map

    given = drawn()
    mask = Mask(causal=True)
    indexer = indexer_map(given["index_q"], given["index_k"], given["index_weights"], mask=mask)
    whole = indexed_keys(indexer, 4, mask)
    monkeypatch.setattr(attention_map, "CHUNK", 40)
    assert torch.equal(indexed_keys(indexer, 4, mask), whole)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top": 0}, "top is a positive"),
        ({"mask": Mask(dense=torch.ones(1, 4, 9, 9, dtype=torch.bool))}, "a mask per head"),
        ({"index_q": torch.zeros(2, 3, 8, 4, dtype=torch.float64)}, "index_weights is floating point"),
        ({"index_k": torch.zeros(2, 9, 5, dtype=torch.float64)}, "index_k is floating point"),
        ({"index_k": torch.zeros(2, 8, 4, dtype=torch.float64)}, "index_k is floating point"),
        ({"v": torch.zeros(2, 2, 8, 5, dtype=torch.float64)}, "v is floating point"),
    ],
)
def test_misfits_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(WorkbenchError, match=words):
        deepseek_sparse_attention(**{**drawn(), "top": 3, **change})
