"""Distances between heads and between queries, where they are known."""

import math
from itertools import combinations

import pytest
import torch

from workbench.errors import UnknownName, WorkbenchError
from workbench.probes.examples import random_rows
from workbench.probes.similarity.diversity import attention_diversity, diversity_loss


def entropy(p: torch.Tensor) -> float:
    return -sum(float(x) * math.log2(float(x)) for x in p if x > 0)


def test_distances_are_those_of_literal_loops(dense) -> None:
    rows = random_rows(2, 3, 8)
    js, cosine = (attention_diversity(dense(rows), measure=measure) for measure in ("js", "cosine"))
    between_heads: dict[str, list[float]] = {"js": [], "cosine": []}
    between_queries: dict[str, list[float]] = {"js": [], "cosine": []}
    for b in range(2):
        for i in range(8):
            for g, h in combinations(range(3), 2):
                x, y = rows[b, g, i], rows[b, h, i]
                between_heads["js"].append(entropy((x + y) / 2) - (entropy(x) + entropy(y)) / 2)
                between_heads["cosine"].append(1 - float(x @ y / x.norm() / y.norm()))
        for h in range(3):
            own = rows[b, h]
            between_queries["js"].append(entropy(own.mean(0)) - sum(entropy(row) for row in own) / 8)
            pairs = [1 - float(x @ y / x.norm() / y.norm()) for x, y in combinations(own, 2)]
            between_queries["cosine"].append(sum(pairs) / len(pairs))
    for name, found in (("js", js), ("cosine", cosine)):
        assert float(found.values["heads"][0]) == pytest.approx(sum(between_heads[name]) / len(between_heads[name]))
        assert float(found.values["queries"][0]) == pytest.approx(
            sum(between_queries[name]) / len(between_queries[name])
        )


def test_equal_and_disjoint_heads(dense) -> None:
    eye = torch.eye(16)
    for measure, far in (("js", 1.0), ("cosine", 1.0)):
        apart = attention_diversity(dense(torch.stack([eye, eye.roll(1, 1)])[None]), measure=measure)
        assert float(apart.values["heads"][0]) == pytest.approx(far)
        same = attention_diversity(dense(torch.stack([eye, eye])[None]), measure=measure)
        assert float(same.values["heads"][0]) == pytest.approx(0, abs=1e-9)
        assert float(same.null["heads"][0]) > 0.7
        # 16 queries at keys of their own: log2 16 bits of information, no cosine.
        assert float(same.values["queries"][0]) == pytest.approx(4 if measure == "js" else 1)
        even = attention_diversity(dense(torch.full((1, 2, 16, 16), 1 / 16)), measure=measure)
        assert float(even.values["queries"][0]) == pytest.approx(0, abs=1e-9)
        assert float(even.null["queries"][0]) == pytest.approx(0, abs=1e-9)


def test_a_collapsed_head_lies_below_its_shuffled_self(dense) -> None:
    sink = torch.full((1, 2, 12, 12), 0.1 / 11)
    sink[..., 0] = 0.9
    for measure in ("js", "cosine"):
        found = attention_diversity(dense(sink), measure=measure)
        assert float(found.values["queries"][0]) < 0.01 < 0.3 < float(found.null["queries"][0])


def test_undefined_and_unknown(dense) -> None:
    found = attention_diversity(dense(random_rows(1, 1, 5)))
    assert bool(found.values["heads"].isnan().all())
    assert "0, heads" in found.undefined
    single = attention_diversity(dense(random_rows(1, 2, 1, keys=5)), measure="cosine")
    assert bool(single.values["queries"].isnan().all())
    assert "0, queries" in single.undefined
    with pytest.raises(UnknownName, match="cosine"):
        attention_diversity(dense(random_rows()), measure="l2")


def test_the_loss_falls_when_heads_move_apart() -> None:
    eye = torch.eye(6)
    assert float(diversity_loss(torch.stack([eye, eye])[None])) == pytest.approx(1)
    assert float(diversity_loss(torch.stack([eye, eye.roll(1, 1)])[None])) == 0
    assert float(diversity_loss(eye[None, None])) == 0
    scores = torch.randn(1, 4, 10, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.1)
    losses = []
    for _ in range(60):
        loss = diversity_loss(scores.softmax(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]
    with pytest.raises(WorkbenchError, match=r"B, H, Q, K"):
        diversity_loss(eye)
