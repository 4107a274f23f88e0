import math

import pytest
import torch

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.probes.examples import random_maps, random_rows
from workbench.probes.retrieval.block_rank import block_rank, block_relevance, contrastive_loss
from workbench.probes.retrieval.documents import Documents, needle_documents

RANGES = torch.tensor([[[1, 5], [5, 12], [12, 13]], [[0, 6], [6, 9], [-1, -1]]])
GOLD = torch.tensor([[False, True, False], [True, False, False]])
QUERY = torch.tensor([[15, 20], [16, 19]])


def prompts():
    return Documents(torch.zeros(2, 20, dtype=torch.long), RANGES, GOLD, QUERY)


def by_hand(rows, b, last):
    """Relevance of every document of one example, by loops over heads, question tokens and keys."""
    there = [r for r in RANGES[b].tolist() if r[0] >= 0]
    total, count = [0.0] * len(there), 0
    for h in range(rows.shape[1]):
        for q in range(int(QUERY[b, 1]) - last, int(QUERY[b, 1])):
            mass = [sum(float(rows[b, h, q, k]) for k in range(lo, hi)) for lo, hi in there]
            total = [t + m / sum(mass) for t, m in zip(total, mass, strict=True)]
            count += 1
    return [t / count for t in total]


@pytest.mark.parametrize("last", [1, 2, 3])
def test_relevance_is_what_loops_give(last):
    rows = [random_rows(2, 3, 20, seed=i) for i in range(2)]
    found = block_relevance([AttentionMap.from_dense(r) for r in rows], prompts(), (0, 1), last)
    for b in range(2):
        expected = torch.tensor([by_hand(r, b, last) for r in rows], dtype=torch.float64).mean(0)
        torch.testing.assert_close(found[b, : 3 - b], expected)
    assert found[1, 2].isnan()
    assert found.nansum(-1).tolist() == pytest.approx([1, 1])


def test_across_is_the_mass_on_other_documents():
    rows = random_rows(2, 3, 20)
    found = block_rank(AttentionMap.from_dense(rows), prompts())
    total, even = [], []
    for b in range(2):
        owner = {k: d for d, (lo, hi) in enumerate(RANGES[b].tolist()) for k in range(lo, hi) if lo >= 0}
        masses, shares = [], []
        for q in owner:
            others = [k for k in owner if owner[k] != owner[q] and k <= q]
            if others:
                masses.append(rows[b, :, q, others].sum(-1).mean())
                shares.append(len(others) / (q + 1))
        total.append(torch.stack(masses).mean())
        even.append(sum(shares) / len(shares))
    assert found.values["across"][0] == pytest.approx(float(torch.stack(total).mean()))
    assert found.null["across"][0] == pytest.approx(sum(even) / 2)


def test_a_planted_layer_ranks_and_the_others_do_not():
    rows = torch.zeros(2, 2, 20, 20, dtype=torch.float64)
    rows[..., 0] = 1.0
    planted = rows.clone()
    for b, d in ((0, 1), (1, 0)):
        planted[b, :, 17:, 0] = 0.0
        planted[b, :, 17:, int(RANGES[b, d, 0])] = 1.0
    uniform = random_rows(2, 2, 20) * 0 + 1 / 20
    maps = [AttentionMap.from_dense(part) for part in (uniform, planted)]
    found = block_rank(maps, prompts(), (0, 1))
    assert found.layers == (0, 1, "together")
    assert found.values["ndcg"][1] == 1
    assert found.values["relevance"][1] == 1
    part = (7 / 12 + 6 / 9) / 2
    assert found.values["relevance"][0] == pytest.approx(part)
    assert found.null["relevance"].tolist() == pytest.approx([part] * 3)
    by_chance = ((1 + 1 / math.log2(3) + 1 / 2) / 3 + (1 + 1 / math.log2(3)) / 2) / 2
    assert found.null["ndcg"][0] == pytest.approx(by_chance)


def test_without_mass_on_documents_there_is_no_ranking():
    rows = torch.zeros(2, 2, 20, 20, dtype=torch.float64)
    rows[..., 14] = 1.0
    found = block_rank(AttentionMap.from_dense(rows.tril()), prompts())
    assert found.values["ndcg"].isnan().all()
    assert found.values["relevance"].isnan().all()
    assert "no attention to any document" in found.undefined["ndcg"]


def test_the_middle_third_is_the_default():
    assert block_rank(random_maps(9, 2, 2, 20), prompts()).layers == (3, 4, 5, "together")
    assert block_rank(random_maps(2, 2, 2, 20), prompts()).layers == (0, 1, "together")
    assert block_rank(random_maps(1, 2, 2, 20), prompts()).layers == (0, "together")


def test_the_loss_is_that_of_infonce_and_falls_when_it_is_followed():
    gold = torch.tensor([[True, False, False], [True, True, False]])
    even = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    assert float(contrastive_loss(even, gold)) == pytest.approx((math.log(3) + math.log(3 / 2)) / 2)
    scores = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.3, 0.6]], dtype=torch.float64, requires_grad=True)
    hand = [
        -math.log(math.exp(4) / (math.exp(4) + math.exp(10) + math.exp(6))),
        -math.log((math.exp(2) + math.exp(6)) / (math.exp(2) + math.exp(6) + math.exp(12))),
    ]
    loss = contrastive_loss(scores, gold)
    assert float(loss.detach()) == pytest.approx(sum(hand) / 2)
    loss.backward()
    assert float(contrastive_loss(scores.detach() - 0.01 * scores.grad, gold)) < float(loss.detach())
    absent = torch.tensor([[0.9, 0.1, float("nan")]], dtype=torch.float64)
    assert float(contrastive_loss(absent, gold[:1], 1.0)) == pytest.approx(math.log(1 + math.exp(-0.8)))
    for options in ({"temperature": 0.0}, {"gold": ~gold}):
        with pytest.raises(WorkbenchError):
            contrastive_loss(
                **{"relevance": even, "gold": gold} | options | ({"gold": gold & False} if "gold" in options else {})
            )


def test_the_trained_model_ranks_in_the_layer_that_retrieves():
    model = wb.load("tiny-softmax")
    docs = needle_documents(model, 96, 12)
    with torch.no_grad():
        run = model.run(docs.ids, maps=wb.capture())
    found = block_rank(run, docs, range(4))
    assert found.values["ndcg"][1] == 1
    assert found.values["ndcg"].argmax() == 1
    assert found.low["relevance"][1] > 4 * found.null["relevance"][1]
    assert (block_relevance(run, docs, [1]).nan_to_num(-1).argmax(1) == docs.gold.int().argmax(1)).all()


def test_what_cannot_be_ranked_is_refused():
    maps = random_maps(2, 2, 2, 20)
    with pytest.raises(UnknownName, match="captured layer"):
        block_rank(maps, prompts(), (5,))
    with pytest.raises(WorkbenchError, match="names no layer"):
        block_rank(maps, prompts(), ())
    with pytest.raises(WorkbenchError, match="at least 1"):
        block_rank(maps, prompts(), last=0)
    with pytest.raises(Refused, match="signed token map"):
        block_rank(AttentionMap.from_dense(-random_rows(2, 2, 20)), prompts())
    with pytest.raises(WorkbenchError, match="leaves the map's 6 queries"):
        block_rank(AttentionMap.from_dense(random_rows(2, 2, 6, keys=20), offset=0), prompts())
