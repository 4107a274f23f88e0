"""Histogram self-attention against loops over ranks, bins and places."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import UnknownName, WorkbenchError
from workbench.mixers.histogram import histogram_attention, histogram_bin_attention, histogram_self_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def literal(q: Tensor, k: Tensor, x: Tensor, temperature: Tensor, bins: int, layout: str) -> tuple[Tensor, Tensor]:
    """Weights between bins ``[B, H, C*F, C*F]`` and between pixels ``[B, H, C*N, C*N]``."""
    b, h, c, n = q.shape
    length = math.ceil(n / bins)
    between = torch.zeros(b, h, c * bins, c * bins, dtype=torch.float64)
    pixels = torch.zeros(b, h, c * n, c * n, dtype=torch.float64)
    for bi in range(b):
        for hi in range(h):
            placed: dict[tuple[int, int], dict[int, int]] = {(ci, f): {} for ci in range(c) for f in range(bins)}
            for ci in range(c):
                for r, pixel in enumerate(sorted(range(n), key=lambda p, ci=ci: float(x[bi, hi, ci, p]))):
                    f, e = divmod(r, length) if layout == "bins" else (r % bins, r // bins)
                    placed[ci, f][e] = pixel
            rows = {}
            for (ci, f), seen in placed.items():
                vectors = [torch.zeros(length, dtype=torch.float64) for _ in range(2)]
                for e, pixel in seen.items():
                    vectors[0][e], vectors[1][e] = q[bi, hi, ci, pixel], k[bi, hi, ci, pixel]
                rows[ci, f] = [vector / max(float(vector.norm()), 1e-12) for vector in vectors]
            for (ci, f), (query, _) in rows.items():
                odds = {
                    key: math.exp(float(temperature[hi]) * float(query @ vector)) for key, (_, vector) in rows.items()
                }
                for (cj, g), odd in odds.items():
                    weight = odd / (1 + sum(odds.values()))
                    between[bi, hi, ci * bins + f, cj * bins + g] = weight
                    for e, pixel in placed[ci, f].items():
                        if e in placed[cj, g]:
                            pixels[bi, hi, ci * n + pixel, cj * n + placed[cj, g][e]] = weight
    return between, pixels


def branch(layout: str) -> Callable[[Operator], None]:
    def sorted_bins_attend(op: Operator) -> None:
        given = example("histogram-bin-attention", 7)
        between, pixels = literal(*(given[name] for name in ("q", "k", "x", "temperature", "bins")), layout)
        out, found = op(**given)
        torch.testing.assert_close(found.dense(), pixels)
        torch.testing.assert_close(found.native().dense(), between)
        torch.testing.assert_close(out, pixels @ given["v"])
        whole = example("histogram-bin-attention", 8)  # no padding: the row misses only what the extra key took
        _, found = op(**whole)
        logits = (found.native().dense() / (1 - found.native().row_sums()[..., None])).log()
        torch.testing.assert_close(found.native().row_sums(), 1 - 1 / (1 + logits.exp().sum(-1)))
        torch.testing.assert_close(found.row_sums().sum(2), 4 * found.native().row_sums().sum(2))

    return sorted_bins_attend


def product_of_both_branches(op: Operator) -> None:
    given = example("histogram-self-attention", 7)
    shared = [given[name] for name in ("x", "temperature", "bins")]
    _, first = literal(given["q"], given["k"], *shared, "bins")
    _, second = literal(given["q_frequency"], given["k_frequency"], *shared, "frequency")
    gate = second @ given["x"].flatten(2)[..., None]
    out, found = op(**given)
    torch.testing.assert_close(out, (first @ given["v"]) * gate)
    torch.testing.assert_close(found.dense(), first * gate)
    torch.testing.assert_close(found.raw.dense(), first)


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "histogram-bin-attention": branch("bins"),
    "histogram-frequency-attention": branch("frequency"),
    "histogram-self-attention": product_of_both_branches,
}


def example(name: str, tokens: int) -> dict[str, Any]:
    return variants()[name].example(1, tokens, torch.float64)


def test_one_bin_per_pixel_of_one_channel_attends_to_single_intensities() -> None:
    given = example("histogram-bin-attention", 4)
    one = {name: given[name][:, :, :1] for name in ("q", "k", "x")}
    out, found = histogram_bin_attention(
        **one, v=one["x"].flatten(2)[..., None], temperature=given["temperature"], bins=4
    )
    assert (found.dense() > 0).all()
    assert out.shape == (2, 2, 4, 1)
    chosen = found.heads([1])
    torch.testing.assert_close(chosen.native().dense(), found.native().dense()[:, 1:])


def test_without_padding_both_layouts_see_a_pixel_of_every_bin() -> None:
    given = example("histogram-bin-attention", 8)
    for layout in ("bins", "frequency"):
        _, found = histogram_attention(**given, layout=layout)
        assert ((found.dense() > 0).sum(-1) == 6).all()


def test_shapes_and_names_that_do_not_fit_are_refused() -> None:
    given = example("histogram-self-attention", 6)
    for name, value, message in (
        ("v", given["v"][..., 0], r"v is floating point \[2, 2, 18, 1\]"),
        ("x", given["x"][..., :4], r"x is floating point \[2, 2, 3, 6\]"),
        ("bins", 0, "positive number of bins"),
        ("temperature", given["temperature"][:1], r"temperature is floating point \[2\]"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            histogram_self_attention(**{**given, name: value})
    with pytest.raises(UnknownName, match="no histogram layout 'bin'; known: bins, frequency"):
        histogram_attention(**example("histogram-bin-attention", 6), layout="bin")
