"""Routers and what they let through, against loops over clusters, regions and tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.routing import bilevel_routing_attention, routing_attention, sparsifiner_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def routed(tokens: int = 10, clusters: int = 3) -> dict[str, Tensor]:
    shapes = dict.fromkeys(("q", "k", "v"), (2, 2, tokens, 6))
    return example_tensors(7, torch.float64, **shapes, centroids=(2, clusters, 6))


def by_cluster(given: dict[str, Any], width: int, causal: bool) -> Tensor:
    """Dense weights of routed attention, one cluster at a time."""
    q, k = given["q"], given["q"] if given["k"] is None else given["k"]
    b, h, n, e = q.shape
    out, times = torch.zeros(b, h, n, n, dtype=q.dtype), torch.zeros(b, h, n, 1, dtype=q.dtype)
    for bi in range(b):
        for hi in range(h):
            for centre in given["centroids"][hi]:
                near_q, near_k = (F.cosine_similarity(x[bi, hi], centre[None], dim=1) for x in (q, k))
                keys = near_k.topk(width).indices.tolist()
                for i in near_q.topk(width).indices.tolist():
                    times[bi, hi, i] += 1
                    seen = [j for j in keys if j <= i or not causal]
                    if seen:
                        out[bi, hi, i, seen] += (k[bi, hi, seen] @ q[bi, hi, i] / math.sqrt(e)).softmax(0)
    return out / times.clamp(min=1)


def clusters_share_tokens(op: Operator) -> None:
    """Every token is the mean over the clusters that took it; one cluster that takes all is full attention."""
    given = routed()
    for change, causal in (({}, False), ({}, True), ({"k": None}, True)):
        call = {**given, **change}
        wanted = by_cluster(call, 4, causal)
        out, found = op(**call, width=4, mask=Mask(causal=causal))
        torch.testing.assert_close(found.dense(), wanted)
        torch.testing.assert_close(out, wanted @ given["v"])
    out, found = op(**{**given, "centroids": given["centroids"][:, :1]}, width=10)
    plain = (given["q"] @ given["k"].transpose(-1, -2) / math.sqrt(6)).softmax(-1)
    torch.testing.assert_close(found.dense(), plain)
    torch.testing.assert_close(out, plain @ given["v"])


def regions_read_their_best_regions(op: Operator) -> None:
    """Token by token from the means of a ragged grid of regions; all regions are full attention."""
    rows, columns, parts, top = 5, 4, 2, 2
    n = rows * columns
    shapes = {"q": (2, 4, n, 3), "k": (2, 2, n, 3), "v": (2, 2, n, 3)}
    given = example_tensors(3, torch.float64, **shapes)
    q, k = given["q"], given["k"].repeat_interleave(2, 1)
    region = torch.tensor([(i // columns // 3) * 2 + i % columns // 2 for i in range(n)])
    s = q @ k.transpose(-1, -2) / math.sqrt(12)
    allowed = torch.zeros(2, n, n, dtype=torch.bool)
    router = torch.zeros(2, 4, 4, dtype=torch.float64)
    for b in range(2):
        mean_q, mean_k = (torch.stack([x[b, :, region == r].mean(1).flatten() for r in range(4)]) for x in (q, k))
        scores = mean_q @ mean_k.T / math.sqrt(12)
        for r in range(4):
            chosen = scores[r].topk(top).indices
            router[b, r, chosen] = scores[r, chosen].softmax(0)
            for c in chosen.tolist():
                allowed[b] |= (region == r)[:, None] & (region == c)
    call = {**given, "grid": (rows, columns), "regions": parts}
    wanted = s.masked_fill(~allowed[:, None], -math.inf).softmax(-1)
    for options, want in (({"top": top}, wanted), ({"top": 4}, s.softmax(-1))):
        out, found = op(**call, **options)
        torch.testing.assert_close(found.dense(), want)
        torch.testing.assert_close(out, want @ given["v"].repeat_interleave(2, 1))
    torch.testing.assert_close(op(**call, top=top)[1].native().dense()[:, 0], router)


def connected() -> dict[str, Tensor]:
    shapes = {"q": (2, 4, 9, 6), "k": (2, 2, 9, 6), "v": (2, 2, 9, 5)}
    router = {"down_q": (6, 3), "down_k": (6, 3), "basis_in": (9, 4), "basis_out": (9, 4)}
    return example_tensors(5, torch.float64, **shapes, **router)


def the_best_connected_keys(op: Operator) -> None:
    """Masked softmax over the largest entries of the low-rank connectivity; a budget for all keys is full attention."""
    given = connected()
    k = given["k"].repeat_interleave(2, 1)
    s = given["q"] @ k.transpose(-1, -2) / math.sqrt(6)
    mixed = torch.einsum("bhnc,nr->bhrc", k @ given["down_k"], given["basis_in"])
    coefficients = torch.einsum("bhnc,bhrc->bhnr", given["q"] @ given["down_q"], mixed).div(2).softmax(-1)
    score = coefficients @ given["basis_out"].abs().T
    kept = torch.zeros_like(s, dtype=torch.bool).scatter(-1, score.topk(3).indices, True)
    for budget, want in ((3, s.masked_fill(~kept, -math.inf).softmax(-1)), (9, s.softmax(-1))):
        out, found = op(**given, budget=budget)
        torch.testing.assert_close(found.dense(), want)
        torch.testing.assert_close(out, want @ given["v"].repeat_interleave(2, 1))
    left, right = op(**given, budget=3)[1].native()
    torch.testing.assert_close(left @ right, score)


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "routing-transformer": clusters_share_tokens,
    "bilevel-routing": regions_read_their_best_regions,
    "sparsifiner": the_best_connected_keys,
}


def test_tokens_that_no_cluster_took_are_zero() -> None:
    given = routed()
    out, found = routing_attention(**given, width=1)
    empty = found.row_sums() == 0
    assert bool(empty.any())
    assert not out[empty].any()
    assert found.row_sum == "<=1"
    assert found.native().shape == (2, 2, 3, 10)
    hidden = Mask(keys=torch.tensor([[True] * 7 + [False] * 3]))
    assert not routing_attention(**given, width=5, mask=hidden)[1].dense()[..., 7:].any()


def test_gradients_reach_what_the_softmax_is_made_of() -> None:
    given = routed()
    leaves = {name: x.requires_grad_() for name, x in given.items() if name != "centroids"}
    out, _ = routing_attention(**given, width=4)
    for grad in torch.autograd.grad(out.square().sum(), [*leaves.values()]):
        assert bool((grad != 0).any())


def test_long_sequences_keep_a_few_weights_per_row() -> None:
    """4,096 tokens in 16 clusters of 256."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4096, 8) for _ in range(3))
    with torch.no_grad():
        out, found = routing_attention(q, k, v, torch.randn(1, 16, 8), width=256)
    assert found.weights.numel() < 4096 * 4096 / 2
    torch.testing.assert_close(found.received().sum(), found.row_sums().sum(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.matvec(v), out, rtol=1e-3, atol=1e-4)


MISTAKES: list[tuple[Callable[..., Any], dict[str, Any], dict[str, Any], str]] = [
    (routing_attention, routed(), {"width": 0}, "width is a positive"),
    (routing_attention, routed(), {"width": 3, "centroids": torch.zeros(2, 3, 5)}, "centroids is floating point"),
    (
        routing_attention,
        routed(),
        {"width": 3, **dict.fromkeys("kv", torch.zeros(2, 1, 10, 6).double())},
        "choose by head",
    ),
    (sparsifiner_attention, connected(), {"budget": 0}, "budget is a positive"),
    (sparsifiner_attention, connected(), {"budget": 2, "basis_in": torch.zeros(8, 4)}, "basis_in is floating point"),
]


@pytest.mark.parametrize(("operator", "given", "change", "words"), MISTAKES)
def test_misfits_are_named(
    operator: Callable[..., Any], given: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    with pytest.raises(WorkbenchError, match=words):
        operator(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [({"grid": (3, 3)}, "grid is"), ({"regions": 0}, "regions is a positive"), ({"top": 0}, "top is a positive")],
)
def test_a_grid_that_does_not_fit_is_named(change: dict[str, Any], words: str) -> None:
    q = torch.zeros(1, 1, 12, 4)
    with pytest.raises(WorkbenchError, match=words):
        bilevel_routing_attention(q, q, q, **{"grid": (3, 4), "regions": 2, "top": 1, **change})
