"""Superlinear attention: anchors, spans and their mixture row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench import attention_map
from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.mixers.spans import superlinear_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]
N = 19


def drawn(tokens: int = N) -> dict[str, Tensor]:
    shapes = {"q": (2, 4, tokens, 6), "k": (2, 2, tokens, 6), "v": (2, 2, tokens, 5), "search": (2, 4, tokens, 6)}
    return example_tensors(8, torch.float64, **shapes)


def row(given: dict[str, Tensor], b: int, h: int, i: int, spans: int, w: int, back: float, ahead: float) -> Tensor:
    """One row of the map from the definition, with both powers 1/2."""
    key, window = given["k"][b, h // 2], (w + 1) ** 2 - 1
    near = set(range(max(0, i - window + 1), i + 1))
    scored = []
    for t in range(w + 1, 100):
        if (anchor := i - (t * t - 1)) >= 0:
            scored.append((float(given["search"][b, h, i] @ key[anchor]), anchor))
    found = sorted(scored, reverse=True)[:spans]
    out = torch.zeros(N, dtype=torch.float64)
    gates = torch.tensor([value for value, _ in found] or [0.0], dtype=torch.float64).softmax(0)
    for gate, anchor in zip(gates, [a for _, a in found] or [-1], strict=True):
        reach = math.sqrt(i + 1)
        first, last = max(0, anchor - math.ceil(back * reach)), min(anchor + math.ceil(ahead * reach), i - window)
        keys = sorted(near | set(range(first, last + 1) if anchor >= 0 else ()))
        out[keys] += gate * (key[keys] @ given["q"][b, h, i] / math.sqrt(6)).softmax(0)
    return out


def spans_and_their_mixture(op: Operator) -> None:
    """Row by row, with and without a window; one span that reaches everywhere is causal attention."""
    given = drawn()
    values = given["v"].repeat_interleave(2, 1)
    for spans, w, back, ahead in ((2, 1, 0.5, 0.5), (3, 0, 1.0, 0.0), (2, 2, 0.3, 0.9)):
        rows = [[[row(given, b, h, i, spans, w, back, ahead) for i in range(N)] for h in range(4)] for b in range(2)]
        wanted = torch.stack([torch.stack([torch.stack(r) for r in heads]) for heads in rows])
        out, found = op(**given, spans=spans, window_index=w, backward=back, forward=ahead)
        torch.testing.assert_close(found.dense(), wanted)
        torch.testing.assert_close(out, wanted @ values)
    scores = given["q"] @ given["k"].repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(6)
    plain = scores.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -math.inf).softmax(-1)
    out, found = op(**given, spans=1, backward=100.0, forward=100.0)
    torch.testing.assert_close(found.dense(), plain)
    torch.testing.assert_close(out, plain @ values)


IDENTITIES: dict[str, Callable[[Operator], None]] = {"superlinear": spans_and_their_mixture}


def test_rows_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given = drawn()
    whole, found = superlinear_attention(**given, window_index=1)
    monkeypatch.setattr(attention_map, "CHUNK", 400)
    out, pieces = superlinear_attention(**given, window_index=1)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(pieces.dense(), found.dense())
    assert found.row_sum == "1"


def test_decoding_and_what_a_row_found() -> None:
    given = drawn()
    whole, found = superlinear_attention(**given, window_index=1, spans=2)
    late = {name: given[name][:, :, 16:] for name in ("q", "search")}
    step, last = superlinear_attention(**{**given, **late}, window_index=1, spans=2, offset=16)
    torch.testing.assert_close(step, whole[:, :, 16:])
    torch.testing.assert_close(last.dense(), found.dense()[:, :, 16:])
    assert found.native().shape == (2, 4, N, 2)
    torch.testing.assert_close(found.gate.sum(-1), torch.ones(2, 4, N, dtype=torch.float64))
    assert bool((found.first[:, :, :3] == -1).all()), "rows inside of their window have no anchor"
    assert bool((found.last <= (torch.arange(N)[:, None] - 3).clamp(min=-1)).all())


def test_gradients_reach_the_search_through_the_gate() -> None:
    given = {name: x.requires_grad_() for name, x in drawn().items()}
    out, _ = superlinear_attention(**given)
    grads = torch.autograd.grad(out.square().sum(), [*given.values()])
    assert all(bool((grad != 0).any()) for grad in grads)


def test_every_key_can_be_found() -> None:
    """Structural non-exclusion: with the shortest spans that cover the gaps, anchors and window reach all keys of a row."""
    i, power = 399, 0.55
    keys: set[int] = set(range(i - math.floor(2 ** (1 / power)) + 2, i + 1))
    anchors = [i - (math.floor(t ** (1 / power)) - 1) for t in range(2, 60)]
    reach = math.ceil(2.0 * (i + 1) ** power)
    for anchor in (a for a in anchors if a >= 0):
        keys |= set(range(max(0, anchor - reach), anchor + 1))
    assert keys == set(range(i + 1))


def test_long_texts_keep_the_weights_of_their_spans() -> None:
    torch.manual_seed(0)
    q, k, v, search = (torch.randn(1, 1, 3000, 8) for _ in range(4))
    with torch.no_grad():
        out, found = superlinear_attention(q, k, v, search, window_index=3)
    assert found.weights.shape[3] < 400
    torch.testing.assert_close(found.matvec(v), out, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.received().sum(), torch.tensor(3000.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spans": 0}, "spans is a positive"),
        ({"window_index": -1}, "window_index"),
        ({"search_power": 1.0}, "search_power is between"),
        ({"backward": 0.0}, "backward is positive"),
        ({"offset": 1}, "the last query stands at 19"),
        ({"search": torch.zeros(2, 4, N, 5)}, "search is floating point"),
    ],
)
def test_misfits_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(WorkbenchError, match=words):
        superlinear_attention(**{**drawn(), **change})
