import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import AttentionMap, GatedMap
from workbench.probes.examples import needles, random_maps, random_rows
from workbench.probes.retrieval.headkv import cache_budget, head_kv
from workbench.probes.tables import HeadTable

SPANS = torch.tensor([[1, 4], [5, 9]])


def by_hand(rows, b, h, lo, hi, end, window):
    return max(sum(float(rows[b, h, t, j]) for j in range(lo, hi)) for t in range(end - window, end))


def test_importance_is_the_largest_of_the_last_rows():
    rows = random_rows(2, 3, 20)
    found = head_kv(AttentionMap.from_dense(rows), SPANS, 5)
    for h in range(3):
        each = [by_hand(rows, b, h, *SPANS[b].tolist(), 20, 5) for b in range(2)]
        assert found.values["importance"][0][h] == pytest.approx(sum(each) / 2)
        chance = []
        for b in range(2):
            lo, hi = SPANS[b].tolist()
            size = hi - lo
            starts = [i for i in range(15 - size + 1) if i + size <= lo or i >= hi]
            chance.append(sum(by_hand(rows, b, h, i, i + size, 20, 5) for i in starts) / len(starts))
        assert found.null["importance"][0][h] == pytest.approx(sum(chance) / 2)


def test_only_the_window_counts_and_it_is_eight_tokens():
    rows = torch.zeros(1, 2, 20, 20)
    rows[0, 0, 11, 2] = 1.0  # one row before the last eight
    rows[0, 1, 12, 2] = 1.0
    assert head_kv(AttentionMap.from_dense(rows), SPANS[:1]).values["importance"][0].tolist() == [0, 1]


def test_padding_at_the_end_moves_the_window():
    model = wb.load("tiny-softmax")
    texts = [
        "Mary and John went to the store . John gave a book to Mary",
        "The happy student moved to the lake in the summer",
    ]
    with torch.no_grad():
        both = model.run(texts, maps=wb.capture())
        alone = [model.run(text, maps=wb.capture()) for text in texts]
    spans = torch.tensor([[1, 3], [2, 4]])
    together = head_kv(both, spans, 4)
    each = [head_kv(run, spans[b : b + 1], 4) for b, run in enumerate(alone)]
    for name in (0, 3):
        for part in ("values", "null"):
            mean = torch.stack([getattr(one, part)["importance"][name] for one in each]).mean(0)
            torch.testing.assert_close(getattr(together, part)["importance"][name], mean, atol=1e-5, rtol=1e-4)


def test_the_copying_head_is_seen_before_it_answers():
    model = wb.load("compiled-needle")
    pairs = needles(model, 96, 6)
    with torch.no_grad():
        run = model.run(pairs.clean, maps=wb.capture())
    found = head_kv(run, pairs.spans["NEEDLE"])
    best, second = found.top(n=2)
    assert best[:2] == (1, 1)
    assert best.value > 0.99
    assert second.value < 0.01
    assert best.null < 0.06


def test_without_room_elsewhere_there_is_no_null():
    found = head_kv(random_maps(1, 1, 2, 10)[0], torch.tensor([[1, 6]]), 3)
    assert found.null["importance"][0].isnan().all()
    assert "as long as it is" in found.undefined["importance null"]
    assert found.values["importance"][0].isfinite().all()


def test_gates_and_signs():
    plain = random_maps(1, 2, 2, 20)[0]
    gated = GatedMap(plain, torch.full(plain.shape[:3], 0.25, dtype=torch.float64))
    score = head_kv(plain, SPANS).values["importance"][0]
    torch.testing.assert_close(head_kv(gated, SPANS).values["importance"][0], score / 4)
    torch.testing.assert_close(head_kv(gated, SPANS, raw=True).values["importance"][0], score)
    with pytest.raises(Refused, match="signed token map"):
        head_kv(AttentionMap.from_dense(-random_rows(2, 2, 20)), SPANS)


def table(*rows, measure="importance"):
    values = {measure: {i: torch.tensor(row, dtype=torch.float64) for i, row in enumerate(rows)}}
    return HeadTable("scores", values, {measure: "score"})


def test_a_budget_follows_the_scores():
    found = cache_budget(table([3.0, 1.0], [0.0, 0.0]), 60, beta=1.5)
    # 60 - 40 = 20 for everyone, 160 shared out 3 : 1
    assert found.values["tokens"][0].tolist() == [140, 60]
    assert found.values["tokens"][1].tolist() == [20, 20]
    assert float(found.values["share"][0][0]) == pytest.approx(140 / 240)
    assert found.null["tokens"][0].tolist() == [60, 60]


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=12), st.integers(1, 500), st.floats(1.001, 4.0, allow_nan=False))
def test_no_token_is_lost(scores, budget, beta):
    found = cache_budget(table(scores), budget, beta=beta)
    tokens = found.values["tokens"][0]
    assert tokens.sum() == budget * len(scores)
    assert (tokens >= 0).all()
    assert float(found.values["share"][0].sum()) == pytest.approx(1)
    order = torch.tensor(scores, dtype=torch.float64).clamp(min=0).argsort(descending=True)
    assert (tokens[order].diff() <= 1).all()


def test_undefined_scores_deserve_the_least():
    found = cache_budget(table([float("nan"), 2.0, -1.0]), 10, beta=2)
    assert found.values["tokens"][0].tolist() == [5, 20, 5]
    even = cache_budget(table([float("nan"), 0.0]), 10)
    assert even.values["tokens"][0].tolist() == [10, 10]
    assert "shared out evenly" in even.undefined["share"]


def test_what_cannot_be_scored_is_refused():
    maps = random_maps(1, 2, 2, 20)
    with pytest.raises(WorkbenchError, match="before the last 8 tokens, from 12 on"):
        head_kv(maps, torch.tensor([[1, 4], [11, 13]]))
    with pytest.raises(WorkbenchError, match="no 30 last ones"):
        head_kv(maps, SPANS, 30)
    with pytest.raises(WorkbenchError, match="one token or more"):
        head_kv(maps, SPANS, 0)
    with pytest.raises(WorkbenchError, match="spans are"):
        head_kv(maps, SPANS[:1])
    with pytest.raises(WorkbenchError, match="budget"):
        cache_budget(table([1.0]), 0)
    with pytest.raises(WorkbenchError, match="beta"):
        cache_budget(table([1.0]), 4, beta=1.0)
    with pytest.raises(UnknownName, match="importance"):
        cache_budget(table([1.0]), 4, measure="entropy")
