"""Dynamic kernels against loops over pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.mixers.contmix import context_mixing, dynamic_local_attention, moved_windows

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def example(name: str, tokens: int = 30) -> dict[str, Any]:
    return variants()[name].example(6, tokens, torch.float64)


def literal(given: dict[str, Any]) -> Tensor:
    """Kernels put into place, ``[B, 2H, N, N]``."""
    b, h, n, e = given["q"].shape
    rows, columns = given["grid"]
    out = torch.zeros(b, 2 * h, n, n, dtype=torch.float64)
    likeness = given["q"] @ given["context"].transpose(-1, -2) * (2 * e) ** -0.5
    logits = likeness @ given["projection"] + given["projection_bias"]
    start = 0
    for half, (size, table) in enumerate(((given["small"], "small_bias"), (given["large"], "large_bias"))):
        part = logits[..., start : start + size**2]
        start += size**2
        for i in range(n):
            r, c = divmod(i, columns)
            top, left = (min(max(p - size // 2, 0), length - size) for p, length in ((r, rows), (c, columns)))
            places = [(top + s, left + t) for s in range(size) for t in range(size)]
            added = torch.stack([given[table][:, u - r + size - 1, d - c + size - 1] for u, d in places], -1)
            weights = (part[:, :, i] + added).softmax(-1)
            for tap, (u, d) in enumerate(places):
                out[:, half * h : (half + 1) * h, i, u * columns + d] = weights[..., tap]
    return out


def kernels_from_a_context(op: Operator) -> None:
    given = example("context-mixing-dynamic-convolution")
    wanted = literal(given)
    out, found = op(**given)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ given["v"])
    none = {
        name: torch.zeros_like(given[name]) for name in ("projection", "projection_bias", "small_bias", "large_bias")
    }
    out, _ = op(**{**given, **none})  # a constant kernel is a box filter
    image = given["v"].transpose(2, 3).unflatten(3, given["grid"])
    box = out.transpose(2, 3).unflatten(3, given["grid"])
    torch.testing.assert_close(box[:, 0, :, 2, 3], image[:, 0, :, 1:4, 2:5].mean((-2, -1)))
    torch.testing.assert_close(box[:, 3, :, 0, 0], image[:, 3, :, :5, :5].mean((-2, -1)))
    one = torch.full_like(given["projection_bias"], -1e4)
    one[1] = 0  # the small kernel's second place: the token above
    out, _ = op(**{**given, **none, "projection_bias": one})
    shifted = out.transpose(2, 3).unflatten(3, given["grid"])
    torch.testing.assert_close(shifted[:, :2, :, 1:-1, 1:-1], image[:, :2, :, :-2, 1:-1])


def kernels_are_written_by_a_network(op: Operator) -> None:
    given = example("dynamic-local-self-attention", 12)
    rows, columns = given["grid"]
    planes = (given["x"] @ given["reduction"]).transpose(1, 2).unflatten(2, (rows, columns))
    mixed = torch.nn.functional.conv2d(planes, given["kernel"][:, None], padding=1, groups=2).flatten(2).transpose(1, 2)
    kernels = (mixed @ given["expansion"]).view(2, 12, 3, 3, 3)
    wanted = torch.zeros(2, 3, 12, 12, dtype=torch.float64)
    for i in range(12):
        for s in range(3):
            for t in range(3):
                u, d = i // columns + s - 1, i % columns + t - 1
                if 0 <= u < rows and 0 <= d < columns:
                    wanted[:, :, i, u * columns + d] = kernels[:, i, :, s, t]
    out, found = op(**given)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ given["v"])
    assert (found.dense() < 0).any()


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "context-mixing-dynamic-convolution": kernels_from_a_context,
    "dynamic-local-self-attention": kernels_are_written_by_a_network,
}


def test_windows_move_inside_and_are_cut_where_the_image_is_smaller() -> None:
    at, relative = moved_windows((1, 7), 5)
    assert at.view(7, 5, 5)[:, 0].tolist() == [[max(0, min(2, i - 2)) + t for t in range(5)] for i in range(7)]
    assert (at.view(7, 5, 5)[:, 1:] == -1).all()
    assert relative.view(7, 5, 5)[0, 0].tolist() == [4 * 9 + 4 + t for t in range(5)]
    assert relative.view(7, 5, 5)[6, 0].tolist() == [4 * 9 + t for t in range(5)]


def test_rows_of_small_images_are_distributions_too() -> None:
    for tokens in (1, 6):
        given = example("context-mixing-dynamic-convolution", tokens)
        _, found = context_mixing(**given)
        torch.testing.assert_close(found.row_sums(), torch.ones(2, 4, found.shape[2], dtype=torch.float64))


def test_shapes_that_do_not_fit_are_refused() -> None:
    given = example("context-mixing-dynamic-convolution", 12)
    for name, value, message in (
        ("v", given["v"][:, :3], r"v is floating point \[2, 4, 12, V\]"),
        ("projection", given["projection"][:, :9], r"projection is floating point \[6, 34\]"),
        ("large_bias", given["small_bias"], r"large_bias is floating point \[2, 9, 9\]"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            context_mixing(**{**given, name: value})
    given = example("dynamic-local-self-attention", 12)
    with pytest.raises(WorkbenchError, match=r"expansion is floating point \[2, 27\]"):
        dynamic_local_attention(**{**given, "expansion": given["expansion"][:, :9]})
    with pytest.raises(WorkbenchError, match="odd"):
        dynamic_local_attention(
            **{**given, "kernel": given["kernel"][:, :2, :2], "expansion": given["expansion"][:, :12]}
        )
