"""Titans' layouts against attention and memory written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.mixers.titans import example_rates
from workbench.mixers.titans_layouts import VARIANTS, memory_as_context, retrieved

Operator = Callable[..., tuple[Tensor, AttentionMap]]
RECORDS = {record.name: record for record in VARIANTS}


def example(name: str, tokens: int) -> dict[str, Any]:
    return RECORDS[name].example(0, tokens, torch.float64)


def softmax(q: Tensor, k: Tensor, seen: Callable[[int, int], bool]) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    table = torch.tensor([[seen(i, j) for j in range(k.shape[2])] for i in range(q.shape[2])])
    scores = q @ k.transpose(-1, -2) * q.shape[3] ** -0.5
    return scores.masked_fill(~table, float("-inf")).softmax(-1)


def memory(q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor) -> Tensor:
    """Momentum descent of a matrix, token by token."""
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    state = torch.zeros(*q.shape[:2], k.shape[3], v.shape[3], dtype=q.dtype)
    momentum, out = torch.zeros_like(state), []
    for t in range(q.shape[2]):
        error = (k[:, :, t, None] @ state)[..., 0, :] - v[:, :, t]
        slope = k[:, :, t, :, None] * error[..., None, :]
        momentum = eta[:, :, t, None, None] * momentum - theta[:, :, t, None, None] * slope
        state = (1 - alpha[:, :, t, None, None]) * state + momentum
        out.append((q[:, :, t, None] @ state)[..., 0, :])
    return torch.stack(out, 2)


def context_is_persistent_retrieved_and_the_segment_so_far(op: Operator) -> None:
    for tokens, segment in ((13, 5), (4, 9), (6, 2)):
        given = {**example("titans-memory-as-context", tokens), "segment": segment}

        def seen(i: int, j: int, n: int = tokens, c: int = segment) -> bool:
            if j < 3:
                return True
            other = (j - 3) % n
            return i // c == other // c and (j - 3 < n or other <= i)

        wanted = softmax(given["q"], given["k"], seen)
        out, amap = op(**given)
        torch.testing.assert_close(amap.dense(), wanted)
        torch.testing.assert_close(out, wanted @ given["v"])
        sums = amap.row_sums()
        torch.testing.assert_close(sums, torch.ones_like(sums))
    plain = {"q": given["q"], "k": given["k"][:, :, 3:], "v": given["v"][:, :, 3:], "segment": 2, "persistent": 0}
    wanted = softmax(plain["q"], plain["k"], lambda i, j: i // 2 == j % 6 // 2 and (j < 6 or j - 6 <= i))
    torch.testing.assert_close(op(**plain)[1].dense(), wanted)


def gate_is_the_memory_on_windowed_attention(op: Operator) -> None:
    for persistent in (0, 1, 3):
        given = {**example("titans-memory-as-gate", 13), "persistent": persistent}
        weights = softmax(given["q"], given["k"], lambda i, j, p=persistent: j < p or 0 <= i - j < 4)
        held = memory(*(given[name] for name in ("memory_q", "memory_k", "memory_v", "theta", "eta", "alpha")))
        wanted = held.sigmoid() * (weights @ given["v"].repeat_interleave(2, 1))
        out, amap = op(**given)
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(amap.dense(), held.sigmoid().mean(-1, keepdim=True) * weights)


def layer_is_windowed_attention_on_the_memory(op: Operator) -> None:
    given = example("titans-memory-as-layer", 13)
    arguments = [given[name] for name in ("q", "k", "v", "theta", "eta", "alpha")]
    weights = softmax(given["attention_q"], given["attention_k"], lambda i, j: j < 1 or 0 <= i - j < 4)
    out, amap = op(**given)
    torch.testing.assert_close(out, weights @ memory(*arguments))
    units = torch.eye(13, dtype=torch.float64).expand(2, 4, 13, 13)
    arguments[2] = units
    torch.testing.assert_close(amap.dense(), weights @ memory(*arguments))
    # a window of one token: the memory alone
    alone, _ = op(**{**given, "window": 1, "persistent": 0})
    arguments[2] = given["v"]
    torch.testing.assert_close(alone, memory(*arguments))


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "titans-memory-as-context": context_is_persistent_retrieved_and_the_segment_so_far,
    "titans-memory-as-gate": gate_is_the_memory_on_windowed_attention,
    "titans-memory-as-layer": layer_is_windowed_attention_on_the_memory,
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name: str) -> None:
    IDENTITIES[name](RECORDS[name].operator)


def test_segments_retrieve_from_the_outputs_of_those_before_them() -> None:
    heads = (2, 2, 7, 4)
    given = example_tensors(3, torch.float64, q=heads, k=heads, v=heads, persistent_k=(2, 3, 4), persistent_v=(2, 3, 4))
    rates = example_rates(4, torch.float64, heads[:3])
    found = retrieved(**given, **rates, segment=3)
    assert bool((found[:, :, :3] == 0).all())

    first = {name: given[f"persistent_{name}"].expand(2, 2, 3, 4) for name in "kv"}
    joined = {name: torch.cat([first[name], found, given[name]], 2) for name in "kv"}
    y, _ = memory_as_context(given["q"], **joined, persistent=3, segment=3)
    keys = y / y.norm(dim=-1, keepdim=True)
    for lo in (3, 6):
        state = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
        momentum = torch.zeros_like(state)
        for t in range(lo):
            theta, eta, alpha = (rates[name][:, :, t, None, None] for name in ("theta", "eta", "alpha"))
            error = (keys[:, :, t, None] @ state)[..., 0, :] - y[:, :, t]
            momentum = eta * momentum - theta * keys[:, :, t, :, None] * error[..., None, :]
            state = (1 - alpha) * state + momentum
        torch.testing.assert_close(found[:, :, lo : lo + 3], given["q"][:, :, lo : lo + 3] @ state)


def test_errors_name_the_argument() -> None:
    given = example("titans-memory-as-context", 7)
    for name, wrong in (("segment", 0), ("persistent", -1), ("k", given["k"][:, :, :5])):
        with pytest.raises(WorkbenchError, match=f"^{name} is"):
            RECORDS["titans-memory-as-context"](**{**given, name: wrong})
    given = example("titans-memory-as-gate", 7)
    with pytest.raises(WorkbenchError, match="window"):
        RECORDS["titans-memory-as-gate"](**{**given, "window": 0})
    with pytest.raises(WorkbenchError, match="memory_v"):
        RECORDS["titans-memory-as-gate"](**{**given, "memory_v": given["memory_v"][..., :2]})
