"""Masks that are rules about positions: each operator against dense softmax under the rule, written pair by pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench import attention_map
from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers import windows

Operator = Callable[..., tuple[Tensor, AttentionMap]]
Rule = Callable[[int, int], bool]


def drawn(tokens: int = 11) -> dict[str, Any]:
    return example_tensors(7, torch.float64, q=(2, 4, tokens, 6), k=(2, 2, tokens, 6), v=(2, 2, tokens, 3))


def by_rule(given: dict[str, Any], rule: Rule) -> Tensor:
    """Dense weights over the pairs (i, j) for which the rule holds."""
    n, m = given["q"].shape[2], given["k"].shape[2]
    allowed = torch.tensor([[rule(i, j) for j in range(m)] for i in range(n)])
    s = given["q"] @ given["k"].repeat_interleave(2, 1).mT / 6**0.5
    return s.masked_fill(~allowed, -torch.inf).softmax(-1)


def agrees(found: tuple[Tensor, AttentionMap], given: dict[str, Any], rule: Rule) -> None:
    want = by_rule(given, rule)
    torch.testing.assert_close(found[1].dense(), want)
    torch.testing.assert_close(found[0], want @ given["v"].repeat_interleave(2, 1))


def sliding(op: Operator) -> None:
    """W keys with the query's own; W = 1 is the identity, W >= N is full causal attention."""
    given = drawn()
    out, found = op(**given, window=1)
    torch.testing.assert_close(found.dense(), torch.eye(11, dtype=torch.float64).expand(2, 4, -1, -1))
    torch.testing.assert_close(out, given["v"].repeat_interleave(2, 1))
    agrees(op(**given, window=4), given, lambda i, j: 0 <= i - j < 4)
    agrees(op(**given, window=11), given, lambda i, j: j <= i)
    agrees(op(**given, window=3, mask=Mask()), given, lambda i, j: abs(i - j) < 3)


def chunked(op: Operator) -> None:
    """No weight leaves a chunk; one chunk is full causal attention."""
    given = drawn()
    agrees(op(**given, chunk=4), given, lambda i, j: j <= i and i // 4 == j // 4)
    agrees(op(**given, chunk=11), given, lambda i, j: j <= i)
    documents = torch.tensor([[0] * 6 + [1] * 5])
    cut = op(**given, chunk=4, mask=Mask(causal=True, documents=documents))
    agrees(cut, given, lambda i, j: j <= i and i // 4 == j // 4 and (i < 6) == (j < 6))


def prefix(op: Operator) -> None:
    """An empty prefix is causal attention, a prefix of everything bidirectional."""
    given = drawn()
    for length in (0, 4, 11):
        agrees(op(**given, prefix=length), given, lambda i, j, p=length: j <= i or j < p)


def packed_documents(op: Operator) -> None:
    """Each document gets what it gets alone."""
    given = drawn()
    out, found = op(**given, documents=torch.tensor([[0] * 4 + [3] * 7]))
    agrees((out, found), given, lambda i, j: j <= i and (i < 4) == (j < 4))
    alone = {name: part[:, :, 4:] for name, part in given.items()}
    want = by_rule(alone, lambda i, j: j <= i)
    torch.testing.assert_close(found.dense()[:, :, 4:, 4:], want)


def dilated(op: Operator) -> None:
    """Every d-th token; d = 1 is the sliding window."""
    given = drawn()
    agrees(op(**given, window=3, dilation=4), given, lambda i, j: 0 <= i - j < 12 and (i - j) % 4 == 0)
    agrees(op(**given, window=3, dilation=1), given, lambda i, j: 0 <= i - j < 3)
    both = op(**given, window=2, dilation=3, causal=False)
    agrees(both, given, lambda i, j: abs(i - j) in (0, 3))


def sinks_and_window(op: Operator) -> None:
    """First tokens stay visible, and only to tokens after them; enough of either is full causal attention."""
    given = drawn()
    agrees(op(**given, window=3, sinks=2), given, lambda i, j: j <= i and (j < 2 or i - j < 3))
    for options in ({"window": 11, "sinks": 1}, {"window": 1, "sinks": 11}):
        agrees(op(**given, **options), given, lambda i, j: j <= i)


def local_and_global(op: Operator) -> None:
    """w / 2 tokens a side, global rows and columns; global rows of their own projections."""
    given = drawn()
    agrees(op(**given, window=4, global_tokens=2), given, lambda i, j: abs(i - j) <= 2 or j < 2 or i < 2)
    agrees(op(**given, window=4, global_tokens=0), given, lambda i, j: abs(i - j) <= 2)
    more = example_tensors(8, torch.float64, q_global=(2, 4, 11, 6), k_global=(2, 2, 11, 6))
    out, found = op(**given, **more, window=4, global_tokens=2)
    want = by_rule(given, lambda i, j: abs(i - j) <= 2 or j < 2)
    rows = {"q": more["q_global"], "k": more["k_global"]}
    want[:, :, :2] = by_rule(rows, lambda i, j: True)[:, :, :2]
    torch.testing.assert_close(found.dense(), want)
    torch.testing.assert_close(out, want @ given["v"].repeat_interleave(2, 1))


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "sliding-window-attention": sliding,
    "chunked-attention": chunked,
    "prefix-lm-attention": prefix,
    "document-attention": packed_documents,
    "dilated-window-attention": dilated,
    "streaming-llm-attention": sinks_and_window,
    "longformer-attention": local_and_global,
}


def test_a_step_of_decoding_is_the_last_row() -> None:
    given = drawn()
    step = {"q": given["q"][:, :, 10:], "k": given["k"], "v": given["v"], "mask": Mask(causal=True, offset=10)}
    for operator, options in (
        (windows.sliding_window_attention, {"window": 3}),
        (windows.chunked_attention, {"chunk": 4}),
        (windows.streaming_attention, {"window": 3, "sinks": 2}),
    ):
        out, found = operator(**step, **options)
        want, whole = operator(**given, **options)
        torch.testing.assert_close(out, want[:, :, 10:])
        torch.testing.assert_close(found.dense(), whole.dense()[:, :, 10:])
        torch.testing.assert_close(found.distance(), whole.distance()[:, :, 10:])


def test_long_sequences_need_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Summaries of 6,000 tokens, with dense maps refused: each row's mass is in its blocks."""
    monkeypatch.setattr(attention_map, "DENSE_LIMIT", 2**20)
    given = example_tensors(0, torch.float32, q=(1, 1, 6000, 4), k=(1, 1, 6000, 4), v=(1, 1, 6000, 4))
    for operator, options in (
        (windows.streaming_attention, {"window": 256, "sinks": 4}),
        (windows.longformer_attention, {"window": 256, "global_tokens": 3}),
        (windows.dilated_window_attention, {"window": 64, "dilation": 8}),
    ):
        _, found = operator(**given, **options)
        torch.testing.assert_close(found.received().sum(-1), torch.full((1, 1), 6000.0), rtol=1e-4, atol=0)
        if operator is not windows.dilated_window_attention:
            torch.testing.assert_close(found.blocks(100).sum(-1), torch.full((1, 1, 60), 100.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("operator", "options", "words"),
    [
        (windows.sliding_window_attention, {"window": 0}, "window is a whole number of at least 1; got 0"),
        (windows.chunked_attention, {"chunk": 2.5}, "chunk is a whole number"),
        (windows.prefix_lm_attention, {"prefix": -1}, "prefix is a number of tokens"),
        (windows.document_attention, {"documents": torch.zeros(1, 11)}, "documents are int"),
        (windows.dilated_window_attention, {"window": 2, "dilation": 0}, "dilation is"),
        (windows.streaming_attention, {"window": 2, "mask": Mask()}, "is causal"),
        (windows.longformer_attention, {"window": 2, "global_tokens": 12}, "from 0 to 11"),
        (windows.longformer_attention, {"window": 2, "global_tokens": 1, "q_global": torch.zeros(1)}, "q_global is"),
    ],
)
def test_wrong_options_are_named(operator: Operator, options: dict[str, Any], words: str) -> None:
    with pytest.raises(WorkbenchError, match=words):
        operator(**drawn(), **options)
