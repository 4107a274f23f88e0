"""Preplan tokens, anchors, their couplings, and exchanging them."""

import math

import pytest
import torch

import workbench as wb
from workbench.datasets.corpus import filler_text
from workbench.errors import Refused, WorkbenchError
from workbench.maps import AttentionMap
from workbench.probes.examples import random_maps, random_rows
from workbench.probes.rhythm.perturbation import _jaccard, perturbation
from workbench.probes.rhythm.rhythm import couplings, rhythm

N, CHUNK = 64, 8


def planted():
    """Ten heads: three read back to the start of their chunk, three look at the starts of chunks, four are uniform."""
    rows = torch.ones(N, N, dtype=torch.float64).tril()
    rows = (rows / rows.sum(-1, keepdim=True)).expand(1, 10, N, N).clone()
    t = torch.arange(N)
    rows[:, :3] = 0
    rows[:, :3, t, t // CHUNK * CHUNK] = 1
    starts = (t % CHUNK == 0).double()
    far = rows[0, 9] * 0 + starts * torch.ones(N, N, dtype=torch.float64).tril()
    weight = far * (1 + (t[:, None] - t)).clamp(min=0)
    rows[:, 7:] = weight / weight.sum(-1, keepdim=True)
    return AttentionMap.from_dense(rows)


def test_chunks_are_found_with_their_anchors():
    found = rhythm(planted(), clip=(1, 50), top=1 / CHUNK)
    assert {h for _, h in found.local} == {0, 1, 2}
    assert {h for _, h in found.over} == {7, 8, 9}
    last_of_chunk = [s - 1 for s in range(CHUNK, N, CHUNK)]  # Delta_t is large where the next token starts one
    assert set(found.preplan()) >= set(last_of_chunk)
    assert set(found.anchors()) <= set(range(0, N, CHUNK))


def test_anchors_that_follow_preplan_tokens_are_coupled_and_shifted_ones_are_not():
    found = couplings(rhythm(planted(), clip=(1, 50), top=1 / CHUNK), (0, 1))
    table = found.frame()
    assert table["coupled"][1] > 0.8
    assert table["coupled"][0] < 0.2
    assert table["chance"][1] < 0.5
    assert table["z"][1] > 1.5


def test_the_prompt_takes_no_part():
    maps = random_maps(2, tokens=40, heads=4)
    found = rhythm(maps, prompt=15)
    assert found.values["waad"][:, :15].isnan().all()
    assert found.values["fai"][:, :15].isnan().all()
    assert found.values["waad"][:, 15:].isfinite().all()
    assert min(found.preplan() + found.anchors()) >= 15
    sunk = [AttentionMap.from_dense(_with_sink(random_rows(1, 4, 40, seed=i))) for i in range(2)]
    with_sink = rhythm(sunk, prompt=0)
    assert int(with_sink.values["fai"][0].nan_to_num(-1).argmax()) == 0  # what the prompt is left out for
    assert int(rhythm(sunk, prompt=1).values["fai"][0].nan_to_num(-1).argmax()) != 0


def _with_sink(rows):
    rows = rows * 0.3
    rows[..., 0] += 0.7
    return rows


def test_top_parts_are_counted():
    found = rhythm(random_maps(2, tokens=41, heads=4), top=0.4)
    assert len(found.preplan()) == round(0.4 * 40)  # the last token has no next one
    assert len(found.anchors()) == round(0.4 * 31)  # the last ten have no query ten tokens later


def test_a_batch_is_its_texts():
    rows = [random_rows(2, 4, 30, seed=i) for i in range(2)]
    both = rhythm([AttentionMap.from_dense(r) for r in rows])
    one = wb.load("tiny-softmax")
    texts = [filler_text(i, 60) for i in range(2)]
    assert both.frame()["sequence"].nunique() == 2
    with torch.no_grad():
        run = one.run(texts[0], maps=wb.capture())
    found = rhythm(run, prompt=5)
    assert "entropy" in found.values
    want = torch.distributions.Categorical(logits=run.logits[0, 9]).entropy()
    assert float(found.values["entropy"][0, 10]) == pytest.approx(float(want), rel=1e-4)
    assert found.frame()["token"][5] == run.tokens.labels[0][5]


def test_couplings_without_anchors_are_undefined():
    found = couplings(rhythm(random_maps(1, tokens=8, heads=4)))
    assert found.frame()["coupled"].isna().all()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: rhythm(random_maps(), top=0), "in \\(0, 1\\]"),
        (lambda: rhythm([AttentionMap.from_dense(random_rows(1, 2, 4, keys=9))]), "every token a query and a key"),
        (lambda: couplings(rhythm(random_maps(1, tokens=20)), ()), "windows are distances"),
        (lambda: perturbation(wb.load("tiny-softmax"), "the", steps=10, ahead=20), "steps is larger than ahead"),
    ],
)
def test_wrong_arguments_are_named(call, said):
    with pytest.raises(WorkbenchError, match=said):
        call()


def test_exchanging_anchors_changes_what_follows():
    found = perturbation(
        wb.load("tiny-softmax"), [filler_text(0, 40), filler_text(1, 40)], steps=70, exchanges=3, ahead=16
    )
    anchors, others = found.mean("largest"), found.mean("smallest")
    assert anchors[0] < others[0] - 0.1
    assert len(found.frame()) == 12
    assert math.isfinite(anchors[1])


def test_a_short_response_is_refused():
    with pytest.raises(Refused, match="ask for more steps"):
        perturbation(wb.load("tiny-softmax"), "The clever lawyer", steps=14, exchanges=4, ahead=12)


def test_jaccard_index():
    assert _jaccard(torch.tensor([1, 2, 2, 3]), torch.tensor([3, 4])) == pytest.approx(1 / 4)
    assert _jaccard(torch.tensor([]), torch.tensor([])) == 1.0
