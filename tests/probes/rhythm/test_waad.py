"""WAAD, FAI, spans and receivers against closed forms, planted patterns and literal loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.models.protocol import Tokens
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import random_rows
from workbench.probes.rhythm.bands import band_sums
from workbench.probes.rhythm.receivers import receiver_heads
from workbench.probes.rhythm.spans import global_heads, head_spans, local_heads
from workbench.probes.rhythm.waad import fai, waad
from workbench.run import Maps, Run


def uniform(length):
    rows = torch.ones(length, length, dtype=torch.float64).tril()
    return (rows / rows.sum(-1, keepdim=True))[None, None]


def loop_waad(rows, window, first=0):
    length = rows.shape[-1]
    found = [
        sum(float(rows[t, s]) * min(t - s, window) for s in range(first, t + 1)) if t >= first else math.nan
        for t in range(length)
    ]
    return torch.tensor(found, dtype=torch.float64)


def loop_fai(rows, near, far, first=0):
    """The published clipping, N the last position."""
    last = rows.shape[-1] - 1
    found = []
    for s in range(last + 1):
        later = range(s + near, min(last, s + far) + 1)
        known = len(later) and s >= first
        found.append(sum(float(rows[t, s]) for t in later) / len(later) if known else math.nan)
    return torch.tensor(found, dtype=torch.float64)


def test_uniform_attention_in_closed_form():
    want = torch.tensor([sum(min(d, 10) for d in range(t + 1)) / (t + 1) for t in range(40)], dtype=torch.float64)
    torch.testing.assert_close(waad(AttentionMap.from_dense(uniform(40)))[0, 0], want)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 6), st.integers(0, 9), st.integers(0, 99))
def test_both_are_what_a_loop_says(length, window, near, width, seed):
    rows = random_rows(2, 2, length, seed=seed)
    amap = AttentionMap.from_dense(rows)
    first = min(seed % 5, length - 1)
    for b in range(2):
        for h in range(2):
            w, f = waad(amap, window, prompt=first), fai(amap, (near, near + width), prompt=first)
            torch.testing.assert_close(w[b, h], loop_waad(rows[b, h], window, first), equal_nan=True)
            torch.testing.assert_close(f[b, h], loop_fai(rows[b, h], near, near + width, first), equal_nan=True)


def test_sawtooth_heads_peak_where_chunks_start():
    """A head that reads back to the start of its chunk: the distance falls to 0 at every start."""
    chunk, length = 6, 48
    rows = torch.zeros(length, length, dtype=torch.float64)
    rows[torch.arange(length), torch.arange(length) // chunk * chunk] = 1
    found = waad(AttentionMap.from_dense(rows[None, None]))[0, 0]
    torch.testing.assert_close(found, (torch.arange(length) % chunk).double())
    delta = (found[:-1] - found[1:]).abs()
    peaks = (delta == delta.max()).nonzero()[:, 0] + 1
    assert peaks.tolist() == list(range(chunk, length, chunk))


def test_a_planted_anchor_has_the_largest_influence():
    rows = random_rows(1, 1, 80, seed=3)
    rows[..., 31:, :] *= 0.5
    rows[..., 31:, 30] += 0.5
    found = fai(AttentionMap.from_dense(rows))[0, 0]
    assert int(found.nan_to_num(-1).argmax()) == 30
    assert float(found[30]) > 0.5


def test_the_last_tokens_have_no_influence_yet():
    found = fai(AttentionMap.from_dense(uniform(30)))[0, 0]
    assert found[:20].isfinite().all()
    assert found[20:].isnan().all()


def test_a_map_that_knows_queries_and_keys_alone_answers_by_the_band(monkeypatch):
    """Only the tiles on the band are asked for: nothing of size Q x K."""
    n, g = 1200, torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, n, 8, generator=g, dtype=torch.float64) for _ in range(2))
    amap = SoftmaxMap(q, k, mask=Mask(causal=True))
    asked = []
    tile = SoftmaxMap._tile

    def counted(self, *span):
        asked.append((span[1] - span[0]) * (span[3] - span[2]))
        return tile(self, *span)

    monkeypatch.setattr(SoftmaxMap, "_tile", counted)
    found = fai(amap)[0, 1]
    assert sum(asked) < n * 700
    torch.testing.assert_close(found, loop_fai(amap.dense()[0, 1], 10, 50), equal_nan=True, atol=1e-7, rtol=0)


def test_rows_of_a_generation_stand_where_they_are():
    rows = random_rows(1, 1, 20, seed=1)
    whole, late = AttentionMap.from_dense(rows), AttentionMap.from_dense(rows[:, :, 12:])
    assert late.offset == 12
    torch.testing.assert_close(waad(late), waad(whole)[..., 12:])
    total, count = band_sums(late, 1, 3)
    assert count[0, 0].tolist() == [sum(12 <= s + d < 20 for d in (1, 2, 3)) for s in range(20)]
    assert float(total[0, 0, 5]) == 0


def test_spans_of_planted_heads_and_who_is_local():
    n = 30
    rows = torch.zeros(1, 4, n, n, dtype=torch.float64)
    for head, back in enumerate((0, 2, 5, 11)):
        rows[0, head, torch.arange(n), (torch.arange(n) - back).clamp(min=0)] = 1
    found = head_spans(AttentionMap.from_dense(rows), prompt=0)
    want = [sum(min(t, back) for t in range(n)) / n for back in (0, 2, 5, 11)]
    assert found.frame()["span"].tolist() == pytest.approx(want)
    even = sum(sum(t - s for s in range(t + 1)) / (t + 1) for t in range(n)) / n
    assert found.frame()["span_null"].tolist() == pytest.approx([even] * 4)
    assert [head.head for head in local_heads(found)] == [0]
    assert [head.head for head in global_heads(found)] == [3]
    assert [head.head for head in global_heads(found, 0.5)] == [3, 2]


def test_padding_and_prompt_do_not_count():
    rows = random_rows(2, 2, 12, seed=5)
    rows[1, :, :, :3] = 0
    rows[1, :, :3] = 0
    rows[1] /= rows[1].sum(-1, keepdim=True).clamp(min=1e-9)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, :3] = False
    run = Run(Tokens(torch.zeros(2, 12, dtype=torch.long), mask), maps=Maps({0: AttentionMap.from_dense(rows)}))
    both = head_spans(run).values["span"][0]
    alone = [head_spans(AttentionMap.from_dense(rows[:1])), head_spans(AttentionMap.from_dense(rows[1:, :, 3:, 3:]))]
    torch.testing.assert_close(both, torch.stack([one.values["span"][0] for one in alone]).mean(0))
    loop = [loop_waad(rows[0, h], 99, 4)[4:].mean() for h in range(2)]
    torch.testing.assert_close(
        head_spans(AttentionMap.from_dense(rows[:1]), prompt=4).values["span"][0], torch.stack(loop)
    )


def test_gates_shrink_what_a_head_reads_unless_raw():
    rows = random_rows(1, 2, 10)
    amap = GatedMap(AttentionMap.from_dense(rows), torch.full((1, 2, 10), 0.5, dtype=torch.float64))
    inside, acting = (head_spans(amap, raw=raw).values["span"][0] for raw in (True, False))
    torch.testing.assert_close(acting, inside / 2)


def test_a_head_that_returns_to_few_tokens_is_a_receiver():
    n = 60
    rows = random_rows(1, 2, n, seed=2)
    for anchor in (7, 20):
        rows[0, 1, anchor + 1 :] *= 0.5
        rows[0, 1, anchor + 1 :, anchor] += 0.5
    found = receiver_heads(AttentionMap.from_dense(rows)).frame()
    assert found["kurtosis"][1] > 10
    assert found["kurtosis"][1] > 3 * found["kurtosis"][0]
    assert found["kurtosis_null"][1] < found["kurtosis"][1] / 3


def test_column_means_and_kurtosis_are_what_a_loop_says():
    from scipy.stats import kurtosis

    n, near, least, first = 24, 3, 5, 2
    rows = random_rows(1, 1, n, seed=9)[0, 0]
    means = []
    for s in range(first, n):
        later = [float(rows[t, s]) for t in range(s + near, n)]
        if len(later) >= least:
            means.append(sum(later) / len(later))
    found = receiver_heads(AttentionMap.from_dense(rows[None, None]), prompt=first, near=near, least=least)
    assert float(found.values["kurtosis"][0][0]) == pytest.approx(float(kurtosis(means)))


def test_sentences_are_columns():
    from scipy.stats import kurtosis

    rows = random_rows(1, 1, 24, seed=4)[0, 0]
    numbers = torch.arange(24) // 3
    means = []
    for column in range(8):
        later = [t for t in range(24) if t // 3 - column >= 2]
        if len(later) >= 4:
            means.append(sum(float(rows[t, 3 * column : 3 * column + 3].sum()) for t in later) / len(later))
    amap = AttentionMap.from_dense(rows[None, None])
    found = receiver_heads(amap, near=2, least=4, sentences=numbers)
    assert float(found.values["kurtosis"][0][0]) == pytest.approx(float(kurtosis(means)))
    with pytest.raises(WorkbenchError, match="in the order of the text"):
        receiver_heads(amap, sentences=numbers.flip(0))


def test_short_texts_have_no_receivers():
    found = receiver_heads(AttentionMap.from_dense(uniform(6)))
    assert found.frame()["kurtosis"].isna().all()
    assert "fewer than four columns" in found.undefined["0"]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: waad(m, 0), "at least 1; got 0"),
        (lambda m: fai(m, (5, 2)), "0 <= near <= far"),
        (lambda m: waad(m, prompt=12), "fewer than the 12"),
        (lambda m: receiver_heads(m, near=-1), "near is 0 or more"),
        (lambda m: local_heads(head_spans(m), 0.7), r"in \(0, 0.5\]"),
    ],
)
def test_wrong_arguments_are_named(call, said):
    with pytest.raises(WorkbenchError, match=said):
        call(AttentionMap.from_dense(uniform(12)))


def test_signed_maps_are_refused():
    amap = AttentionMap.from_dense(torch.randn(1, 1, 6, 6).tril(), sign="signed")
    for call in (waad, fai, head_spans, receiver_heads):
        with pytest.raises(Refused, match="cancel"):
            call(amap)
