"""Fixed affinities, convolved projections, pooled keys and graphs against loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import UnknownName, WorkbenchError
from workbench.mixers.hybrids import local_affinity

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def given(name: str, tokens: int = 12, **changes: Any) -> dict[str, Any]:
    return {**variants()[name].example(3, tokens, torch.float64), **changes}


def affinity(table: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Matrices ``[C, N, N]``, pair by pair."""
    cells = list(itertools.product(*map(range, grid)))
    out = torch.zeros(len(table), len(cells), len(cells), dtype=torch.float64)
    for (i, here), (j, there) in itertools.product(enumerate(cells), enumerate(cells)):
        step = [b - a + side // 2 for a, b, side in zip(here, there, table.shape[1:], strict=True)]
        if all(0 <= s < side for s, side in zip(step, table.shape[1:], strict=True)):
            out[:, i, j] = table[(slice(None), *step)]
    return out


def offsets_alone_decide(op: Operator) -> None:
    p = given("uniformer-local-affinity")
    assert len(p["grid"]) == 3
    wanted = affinity(p["table"], p["grid"])
    out, found = op(**p)
    torch.testing.assert_close(found.dense(), wanted.expand(2, -1, -1, -1))
    torch.testing.assert_close(out, wanted @ p["v"])
    _, other = op(**{**p, "v": p["v"] + 1})
    torch.testing.assert_close(other.dense(), wanted.expand(2, -1, -1, -1))
    plane = p["table"][..., 2]
    torch.testing.assert_close(op(**{**p, "table": plane, "grid": (3, 4)})[0], affinity(plane, (3, 4)) @ p["v"])


def one_kernel_makes_every_query(op: Operator) -> None:
    p = given("shared-convolution-attention")
    features = []
    for kernel in (p["query"], p["key"]):
        made = torch.zeros(2, 2, 12, 2, 2, dtype=torch.float64)
        for y, x, a, b in itertools.product(range(2), range(2), range(3), range(3)):
            made[..., y, x] += kernel[:, a, b][:, None] * p["x"][:, None, :, y + a, x + b]
        features.append(made.flatten(3))
    weights = (features[0] @ features[1].mT / 2).softmax(-1)
    out, found = op(**p)
    torch.testing.assert_close(found.dense(), weights)
    torch.testing.assert_close(out, weights @ p["v"])
    # A kernel that reads one pixel, kept at full size: plain attention of the embeddings.
    pixel = torch.zeros(2, 3, 3, dtype=torch.float64)
    pixel[:, 1, 1] = 1.0
    flat = p["x"].flatten(2)[:, None].expand(-1, 2, -1, -1)
    plain = (flat @ flat.mT / 4).softmax(-1)
    torch.testing.assert_close(op(**{**p, "query": pixel, "key": pixel, "padding": "same"})[1].dense(), plain)


def pooled_keys_and_merged_branches(op: Operator) -> None:
    p = given("fmvit-lightweight-attention")
    rows, columns = p["grid"]
    blocks = [
        [y * columns + x for y in range(a, min(rows, a + 2)) for x in range(b, min(columns, b + 2))]
        for a in range(0, rows, 2)
        for b in range(0, columns, 2)
    ]
    averaging = torch.zeros(len(blocks), 12, dtype=torch.float64)
    for m, block in enumerate(blocks):
        averaging[m, block] = 1 / len(block)
    q, k = p["q"].sum(0), p["k"].sum(0)
    left = (q @ (averaging @ k).mT / 2).softmax(-1)
    out, found = op(**p)
    torch.testing.assert_close(found.dense(), left @ averaging)
    torch.testing.assert_close(out, left @ averaging @ p["v"])
    assert found.row_sum == "1"
    # One window per token and one branch: plain attention.
    merged = {"q": q[None], "k": k[None], "pool": 1}
    torch.testing.assert_close(op(**{**p, **merged})[1].dense(), (q @ k.mT / 2).softmax(-1))


def softmax_over_edges(op: Operator) -> None:
    p = given("graph-attention")
    weights = torch.zeros(2, 2, 12, 12, dtype=torch.float64)
    for b, h, i in itertools.product(range(2), range(2), range(12)):
        edges = [int(j) for j in p["neighbours"][i] if j >= 0]
        scores = torch.stack([p["target"][h] @ p["x"][b, h, i] + p["source"][h] @ p["x"][b, h, j] for j in edges])
        weights[b, h, i, edges] = torch.where(scores > 0, scores, 0.2 * scores).softmax(0)
    out, found = op(**p)
    torch.testing.assert_close(found.dense(), weights)
    torch.testing.assert_close(out, weights @ p["v"])
    # Scores that agree give the mean over the neighbours.
    _, found = op(**{**p, "source": torch.zeros_like(p["source"])})
    degree = (p["neighbours"] >= 0).sum(1, keepdim=True)
    torch.testing.assert_close(found.dense(), (weights > 0) / degree.double())


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "uniformer-local-affinity": offsets_alone_decide,
    "shared-convolution-attention": one_kernel_makes_every_query,
    "fmvit-lightweight-attention": pooled_keys_and_merged_branches,
    "graph-attention": softmax_over_edges,
}


def test_a_node_without_edges_gives_zeros() -> None:
    p = given("graph-attention")
    p["neighbours"][3] = -1
    out, found = variants()["graph-attention"](**p)
    assert not out[:, :, 3].any()
    assert not found.dense()[:, :, 3].any()
    assert found.row_sum == "<=1"


def test_affinities_of_wide_heads() -> None:
    p = given("uniformer-local-affinity")
    narrow, channels = local_affinity(**p)
    out, found = local_affinity(**{**p, "v": p["v"].transpose(1, 3)})
    torch.testing.assert_close(out, narrow.transpose(1, 3))
    torch.testing.assert_close(found.native().dense(), channels.dense())


def test_refusals() -> None:
    p = given("shared-convolution-attention")
    shared = variants()["shared-convolution-attention"]
    with pytest.raises(UnknownName, match="no padding 'full'; known: valid, same"):
        shared(**{**p, "padding": "full"})
    with pytest.raises(WorkbenchError, match="kernels fit into embeddings"):
        shared(**{**p, "query": torch.ones(2, 5, 5), "key": torch.ones(2, 5, 5)})
    with pytest.raises(WorkbenchError, match="has odd sides"):
        shared(**{**p, "query": torch.ones(2, 2, 2), "key": torch.ones(2, 2, 2), "padding": "same"})
    with pytest.raises(WorkbenchError, match="G dividing 2 heads"):
        shared(**{**p, "v": torch.ones(2, 3, 12, 5)})
    with pytest.raises(WorkbenchError, match="at least one token a side"):
        variants()["fmvit-lightweight-attention"](**given("fmvit-lightweight-attention", pool=0))
    with pytest.raises(WorkbenchError, match=r"neighbours are int64 \[N, S\]"):
        variants()["graph-attention"](**given("graph-attention", neighbours=torch.full((12, 2), 12)))
    with pytest.raises(WorkbenchError, match="table has an odd number of taps"):
        local_affinity(**given("uniformer-local-affinity", table=torch.ones(3, 4, 4, 4)))
