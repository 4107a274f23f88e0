"""Cascaded group attention against a loop over heads with explicit convolutions and offsets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.mixers.cascaded import cascaded_group_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def example(tokens: int = 6) -> dict[str, Any]:
    return variants()["cascaded-group-attention"].example(4, tokens, torch.float64)


def literal(given: dict[str, Any], first: Tensor | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Patterns and outputs of the heads; ``first`` is added to the values of head 0 after the patterns are known."""
    rows, columns = given["grid"]
    patterns, outputs = [], []
    out = torch.zeros_like(given["splits"][:, 0])
    for head in range(given["splits"].shape[1]):
        f = given["splits"][:, head] + out
        q, k = f @ given["query_weights"][head], f @ given["key_weights"][head]
        planes = q.transpose(1, 2).unflatten(2, (rows, columns))
        q = torch.nn.functional.conv2d(planes, given["query_kernel"][head][:, None], padding=1, groups=q.shape[2])
        scores = q.flatten(2).transpose(1, 2) @ k.transpose(1, 2) * k.shape[2] ** -0.5
        for i in range(rows * columns):
            for j in range(rows * columns):
                apart = abs(i // columns - j // columns), abs(i % columns - j % columns)
                scores[:, i, j] += given["bias"][(head, *apart)]
        patterns.append(scores.softmax(-1))
        out = patterns[-1] @ (f @ given["value_weights"][head])
        outputs.append(out)
    return patterns, outputs


def heads_feed_each_other(op: Operator) -> None:
    given = example()
    patterns, outputs = literal(given)
    own = {name: value for name, value in given.items() if name != "v"}
    out, found = op(**own)
    torch.testing.assert_close(out, torch.stack(outputs, 1))
    torch.testing.assert_close(found.dense(), torch.stack(patterns, 1))
    alone = {
        name: value[:1] if name in ("query_weights", "key_weights", "value_weights", "query_kernel", "bias") else value
        for name, value in own.items()
    }
    delta = torch.zeros_like(alone["query_kernel"])
    delta[..., 1, 1] = 1
    alone |= {"splits": own["splits"][:, :1], "query_kernel": delta, "bias": torch.zeros_like(alone["bias"])}
    out, _ = op(**alone)  # one head without convolution and offsets is plain self-attention
    x = alone["splits"][:, 0]
    q, k, v = (x @ alone[f"{name}_weights"][0] for name in ("query", "key", "value"))
    torch.testing.assert_close(out[:, 0], (q @ k.transpose(1, 2) * 5**-0.5).softmax(-1) @ v)


IDENTITIES: dict[str, Callable[[Operator], None]] = {"cascaded-group-attention": heads_feed_each_other}


def test_the_path_from_head_to_head_is_the_derivative_with_fixed_patterns() -> None:
    given = example()
    own = {name: value for name, value in given.items() if name != "v"}
    _, found = cascaded_group_attention(**own)
    patterns = found.dense()

    def outputs(values: Tensor) -> Tensor:
        """The last head's output, from the first head's values, by the cascade with these patterns."""
        out = patterns[:, 0] @ values
        for head in range(1, 3):
            out = patterns[:, head] @ ((given["splits"][:, head] + out) @ given["value_weights"][head])
        return out

    values = given["splits"][:, 0] @ given["value_weights"][0]
    torch.testing.assert_close(found.values[:, 0], values)
    change = torch.randn(values.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moved = found.path(0, 2).matvec(change[:, None])[:, 0] @ found.channels(0, 2)
    torch.testing.assert_close(outputs(values + change) - outputs(values), moved)
    torch.testing.assert_close(found.path(1, 1).dense(), patterns[:, 1:2])
    assert torch.equal(found.channels(1, 1), torch.eye(4, dtype=torch.float64))
    with pytest.raises(WorkbenchError, match="from a head to itself or a later one of 3; got 2 to 1"):
        found.path(2, 1)


def test_shapes_that_do_not_fit_are_refused() -> None:
    given = example()
    for name, value, message in (
        ("grid", (3, 3), "rows \\* columns = 6"),
        ("key_weights", given["key_weights"][..., :2], r"key_weights is floating point \[3, 4, 5\]"),
        ("bias", given["bias"][:, :1], r"bias is floating point \[3, 2, 3\]"),
        ("query_kernel", given["query_kernel"][..., :2], "kernel is "),
        ("v", given["v"][:, :2], r"v is floating point \[2, 3, 6, V\]"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            cascaded_group_attention(**{**given, name: value})
