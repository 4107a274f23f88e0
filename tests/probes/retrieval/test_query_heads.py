import math

import pytest
import torch

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.maps import AttentionMap, GatedMap
from workbench.probes.examples import random_maps, random_rows
from workbench.probes.retrieval.documents import Documents, document_sums, mean_row, needle_documents
from workbench.probes.retrieval.query_heads import calibrated, query_heads

RANGES = torch.tensor([[[1, 5], [5, 12], [12, 13]], [[0, 6], [6, 9], [-1, -1]]])
GOLD = torch.tensor([[False, True, False], [True, False, False]])
QUERY, EMPTY = torch.tensor([[15, 20], [16, 19]]), torch.tensor([[15, 18], [16, 17]])


def prompts(length=20, null=18):
    return Documents(
        torch.zeros(2, length, dtype=torch.long), RANGES, GOLD, QUERY, torch.zeros(2, null, dtype=torch.long), EMPTY
    )


def by_hand(asked, nothing, b, h, d):
    """s of one document by loops over its tokens."""
    lo, hi = RANGES[b, d].tolist()
    tokens = []
    for key in range(lo, hi):
        q = [float(asked[b, h, i, key]) for i in range(*QUERY[b].tolist())]
        n = [float(nothing[b, h, i, key]) for i in range(*EMPTY[b].tolist())]
        tokens.append(sum(q) / len(q) - sum(n) / len(n))
    if len(tokens) == 1:
        return tokens[0]
    mean = sum(tokens) / len(tokens)
    sd = math.sqrt(sum((x - mean) ** 2 for x in tokens) / (len(tokens) - 1))
    return sum(x for x in tokens if x >= mean - 2 * sd)


def discounted(scores, gold):
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    found = sum(gold[i] / math.log2(2 + rank) for rank, i in enumerate(order[:10]))
    return found / sum(1 / math.log2(2 + rank) for rank in range(sum(gold)))


def test_scores_are_what_loops_give():
    asked = [random_rows(2, 3, 20, seed=i) for i in range(2)]
    nothing = [random_rows(2, 3, 18, seed=9 + i) for i in range(2)]
    dense = AttentionMap.from_dense
    found = query_heads([dense(a) for a in asked], prompts(), [dense(n) for n in nothing])
    for layer in range(2):
        for h in range(3):
            s = [[by_hand(asked[layer], nothing[layer], b, h, d) for d in range(3 - b)] for b in range(2)]
            assert found.values["score"][layer][h] == pytest.approx((s[0][1] + s[1][0]) / 2)
            ranked = [discounted(s[0], [0, 1, 0]), discounted(s[1], [1, 0])]
            assert found.values["ndcg"][layer][h] == pytest.approx(sum(ranked) / 2)
            every = [sum(row) / len(row) for row in s]
            assert found.null["score"][layer][h] == pytest.approx(sum(every) / 2)
    by_chance = [(1 + 1 / math.log2(3) + 1 / 2) / 3, (1 + 1 / math.log2(3)) / 2]
    assert found.null["ndcg"][0][0] == pytest.approx(sum(by_chance) / 2)


def test_tokens_far_below_the_others_are_dropped():
    asked = torch.full((1, 1, 20), 0.02, dtype=torch.float64)
    asked[..., 4] = -0.5
    ranges = torch.tensor([[[0, 10], [10, 11]]])
    kept = calibrated(asked, torch.zeros_like(asked), ranges)
    assert kept[0, 0, 0] == pytest.approx(9 * 0.02)
    assert kept[0, 0, 1] == pytest.approx(0.02)  # one token has no deviation and stays
    asked[..., 4] = 0.7  # far above is no reason to drop
    assert calibrated(asked, torch.zeros_like(asked), ranges)[0, 0, 0] == pytest.approx(9 * 0.02 + 0.7)
    even = torch.full((1, 1, 20), 0.1, dtype=torch.float64)
    assert calibrated(even, torch.zeros_like(even), ranges)[0, 0].tolist() == pytest.approx([1.0, 0.1])


def test_what_the_empty_question_looks_at_too_is_no_evidence():
    """Head 0 looks at the gold document only when asked, head 1 always, head 2 at another."""
    asked, nothing = torch.zeros(2, 3, 20, 20), torch.zeros(2, 3, 18, 18)
    for b, gold in enumerate((1, 0)):
        lo, hi = RANGES[b, gold].tolist()
        asked[b, :2, QUERY[b, 0] :, lo:hi] = 1 / (hi - lo)
        nothing[b, 1, EMPTY[b, 0] :, lo:hi] = 1 / (hi - lo)
        lo, hi = RANGES[b, 1 - gold].tolist()
        asked[b, 2, QUERY[b, 0] :, lo:hi] = 1 / (hi - lo)
    found = query_heads(AttentionMap.from_dense(asked), prompts(), AttentionMap.from_dense(nothing))
    assert found.values["score"][0].tolist() == pytest.approx([1, 0, 0], abs=1e-6)
    assert found.values["ndcg"][0][0] == 1
    assert found.values["ndcg"][0][1] == pytest.approx(float(found.null["ndcg"][0][1]))
    assert found.values["ndcg"][0][2] < found.null["ndcg"][0][2]
    assert found.top("score", 1)[0][:2] == (0, 0)


def test_one_example_at_a_time_gives_the_same():
    p = prompts()
    asked, nothing = random_maps(1, 2, 3, 20), random_maps(1, 2, 3, 18, seed=5)
    together = query_heads(asked, p, nothing).values["score"][0]
    alone = []
    for b in range(2):
        one = Documents(
            p.ids[:1], RANGES[b : b + 1], GOLD[b : b + 1], QUERY[b : b + 1], p.null_ids[:1], EMPTY[b : b + 1]
        )
        rows = [AttentionMap.from_dense(m[0].dense()[b : b + 1]) for m in (asked, nothing)]
        alone.append(query_heads(rows[0], one, rows[1]))
    torch.testing.assert_close(together, torch.stack([one.values["score"][0] for one in alone]).mean(0))
    assert alone[0].low["score"][0].isnan().all()


def test_gates_count_as_they_act_unless_raw_is_asked():
    asked, nothing = random_maps(1, 2, 2, 20)[0], random_maps(1, 2, 2, 18, seed=5)[0]
    half = [GatedMap(m, torch.full(m.shape[:3], 0.5, dtype=torch.float64)) for m in (asked, nothing)]
    plain = query_heads(asked, prompts(), nothing).values["score"][0]
    torch.testing.assert_close(query_heads(half[0], prompts(), half[1]).values["score"][0], plain / 2)
    torch.testing.assert_close(query_heads(half[0], prompts(), half[1], raw=True).values["score"][0], plain)


def test_a_map_that_continues_a_cache_is_asked_by_absolute_positions():
    rows = random_rows(2, 2, 20)
    whole, tail = AttentionMap.from_dense(rows), AttentionMap.from_dense(rows[:, :, 14:], offset=14)
    torch.testing.assert_close(mean_row(tail, QUERY), mean_row(whole, QUERY))
    with pytest.raises(WorkbenchError, match="leave the map's queries 14-20"):
        mean_row(tail, torch.tensor([[13, 15], [16, 19]]))


def test_long_questions_are_read_in_chunks(monkeypatch):
    from workbench.probes.retrieval import documents

    amap = random_maps(1, 2, 2, 20)[0]
    whole = mean_row(amap, QUERY)
    monkeypatch.setattr(documents, "_CHUNK", 1)
    torch.testing.assert_close(mean_row(amap, QUERY), whole)
    torch.testing.assert_close(document_sums(whole, RANGES)[0, :, 1], whole[0, :, 5:12].sum(-1))
    assert document_sums(whole, RANGES)[1, :, 2].isnan().all()


@pytest.mark.parametrize("name", ["compiled-needle", "tiny-softmax"])
def test_the_head_that_answers_finds_the_document(name):
    model = wb.load(name)
    docs = needle_documents(model, 96, 12)
    with torch.no_grad():
        asked, nothing = (model.run(ids, maps=wb.capture()) for ids in (docs.ids, docs.null_ids))
    found = query_heads(asked, docs, nothing)
    best = found.top("score", 1)[0]
    assert best.layer == 1
    assert best.value > 9 * best.null
    assert found.values["ndcg"][1][best.head] == 1
    if name == "compiled-needle":
        assert best.head == 1
        assert best.value > 3 * found.top("score", 2)[1].value


def test_documents_of_the_needle_task():
    model = wb.load("tiny-softmax")
    docs = needle_documents(model, 96, 4)
    texts = [model.tokenizer.convert_ids_to_tokens(row.tolist()) for row in docs.ids]
    for b, words in enumerate(texts):
        ranges = docs.documents[b][docs.there[b]].tolist()
        assert ranges[0][0] == 1
        assert all(words[hi - 1] == "." for _, hi in ranges)
        assert [hi for _, hi in ranges[:-1]] == [lo for lo, _ in ranges[1:]]
        gold = ranges[docs.gold[b].nonzero()[0, 0]]
        assert "holds" in words[slice(*gold)]
        assert words[docs.query[b, 0]] == "Question"
        assert "<unk>" in model.tokenizer.convert_ids_to_tokens(docs.null_ids[b].tolist())
    assert docs.gold.sum(1).tolist() == [1] * 4


def test_what_cannot_be_scored_is_refused():
    maps = random_maps(1, 2, 2, 20)
    nothing = random_maps(1, 2, 2, 18)
    p = prompts()
    with pytest.raises(WorkbenchError, match="subtract an empty question"):
        query_heads(maps, Documents(p.ids, RANGES, GOLD, QUERY), nothing)
    with pytest.raises(WorkbenchError, match="same layers"):
        query_heads(maps, p, [*nothing, *nothing])
    with pytest.raises(WorkbenchError, match="run the model on prompts.null_ids"):
        query_heads(maps, p, maps)
    with pytest.raises(Refused, match="signed token map"):
        query_heads(AttentionMap.from_dense(-random_rows(2, 2, 20)), p, nothing)
    with pytest.raises(WorkbenchError, match="gold is bool"):
        Documents(p.ids, RANGES, GOLD.long(), QUERY)
    with pytest.raises(WorkbenchError, match="nothing to rank"):
        Documents(p.ids, RANGES, torch.zeros_like(GOLD), QUERY)
    with pytest.raises(WorkbenchError, match="not gold"):
        Documents(p.ids, RANGES, torch.tensor([[False, True, False], [True, False, True]]), QUERY)
    with pytest.raises(WorkbenchError, match="query is a range"):
        Documents(p.ids, RANGES, GOLD, torch.tensor([[3, 3], [1, 2]]))
    with pytest.raises(WorkbenchError, match="ranges \\[B, n, 2\\]"):
        Documents(p.ids, RANGES[0], GOLD, QUERY)
