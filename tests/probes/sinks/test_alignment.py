import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
from workbench.probes.sinks.alignment import received_shares, sink_alignment
from workbench.probes.sinks.levels import sink_levels
from workbench.probes.sinks.planted import planted_run, planted_stream
from workbench.run import Maps, Run
from workbench.sites import Site

READS = [f"blocks.{layer}.hook_resid_post" for layer in range(4)]


def test_the_planted_run_in_closed_form():
    """Maps weigh keys by norm: the score of a key is the mean over its queries of its norm over the sum of norms so far."""
    result = sink_alignment(planted_run())
    table = result.frame().set_index("layer")
    stream = planted_stream()
    norm = stream[8].norm(dim=-1).double()
    direction = torch.nn.functional.cosine_similarity(stream[8].double(), stream[8, :1].double(), dim=-1)
    score = [float((norm[k] / norm.cumsum(0)[k:]).mean()) for k in range(24)]
    row = table.loc[8]
    assert row["alive"] == 2  # positions 9 and 15 at the output of block 7
    assert row["alignment"] == pytest.approx(float(direction[[9, 15]].mean()), abs=1e-6)
    ordinary = [t for t in range(1, 24) if t not in (9, 15)]
    assert row["alignment_null"] == pytest.approx(float(direction[ordinary].abs().mean()), abs=1e-6)
    assert row["primary_score"] == pytest.approx(score[0], abs=1e-6)
    assert row["primary_norm"] == pytest.approx(float(norm[0]), rel=1e-6)
    assert row["sink_score"] == pytest.approx(
        score[9], abs=1e-6
    )  # position 15 is seen by fewer than half as many queries
    assert row["token_score"] == pytest.approx(sum(score[t] for t in range(1, 13) if t != 9) / 11, abs=1e-6)
    assert row["norm_score"] == pytest.approx(spearmanr(norm[1:13], score[1:13])[0])
    assert row["norm_score_null"] == pytest.approx(spearmanr([-t for t in range(1, 13)], score[1:13])[0])


def test_the_primary_sink_weakens_where_others_live():
    result = sink_alignment(planted_run())
    table = result.frame().set_index("layer")
    alone, shared = table.loc[[2, 3, 4], "primary_score"].mean(), table.loc[[7, 8, 9], "primary_score"].mean()
    assert shared < 0.9 * alone
    found = result.weakening().iloc[0]
    inside = table.loc[2:11]
    assert found["rho"] == pytest.approx(spearmanr(inside["primary_score"], inside["alive"])[0])
    assert found["rho"] < -0.8
    assert found["layers"] == 10


def test_norms_decide_the_score_only_where_they_do():
    """Shuffled norms: the correlation goes, the null does not."""
    run = planted_run()
    shuffled = {}
    for layer in range(12):
        x = run.acts[Site("resid_post", layer)]
        order = torch.randperm(24, generator=torch.Generator().manual_seed(layer))
        factor = (x.norm(dim=-1)[:, order] / x.norm(dim=-1))[..., None]
        factor[:, 0] = 1
        shuffled[Site("resid_post", layer)] = x * factor.clamp(max=1)
    other = sink_alignment(Run(run.tokens, acts=shuffled, maps=run.maps), sink_levels(run)).frame()
    true = sink_alignment(run).frame()
    assert true["norm_score"].iloc[1:].mean() > 0.7
    assert other["norm_score"].iloc[1:].mean() < 0.4
    assert other["norm_score_null"].tolist() == true["norm_score_null"].tolist()


def test_received_shares_by_hand_with_padding():
    """Rows of padding queries hold weight and do not count."""
    weights = torch.rand(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tril() + 1e-3
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, :2] = False
    weights[1, :, :, :2] = 0
    weights[1, :, :2] = 0.5
    weights = weights.tril()
    share, seen = received_shares(
        1, AttentionMap.from_dense(weights), Tokens(torch.ones(2, 6, dtype=torch.int64), mask)
    )
    for b, start in ((0, 0), (1, 2)):
        for k in range(start, 6):
            expected = sum(float(weights[b, :, q, k].mean()) for q in range(k, 6)) / (6 - k)
            assert float(share[b, k - start]) == pytest.approx(expected, rel=1e-6)
            assert bool(seen[b, k - start]) == ((6 - k) >= (6 - start) / 2)
    assert share[1, 4:].isnan().all()
    assert not seen[1, 4:].any()


@pytest.mark.parametrize("raw", [False, True])
def test_texts_of_a_batch_are_as_they_are_alone(raw):
    model = wb.load("tiny-gated")
    texts = ["Mary and John went to the store . John gave a book to", "the cat sat on the mat ."]
    with torch.no_grad():
        both = model.run(texts, read=READS, maps=wb.capture(stats=("received",)))
        alone = [model.run(text, read=READS, maps=wb.capture(stats=("received",))) for text in texts]
    found = sink_alignment(both, raw=raw)
    for s, run in enumerate(alone):
        single = sink_alignment(run, raw=raw)
        length = run.tokens.ids.shape[1]
        for name in ("score", "norm", "cosine"):
            torch.testing.assert_close(
                found.tokens.values[name][:, s, :length], single.tokens.values[name][:, 0], atol=1e-4, rtol=1e-4
            )
    mean = sum(sink_alignment(run, raw=raw).frame()["primary_score"] for run in alone) / 2
    assert found.frame()["primary_score"].tolist() == pytest.approx(mean.tolist(), abs=1e-5)
    effective = sink_alignment(both).frame()["primary_score"]
    assert ((effective < sink_alignment(both, raw=True).frame()["primary_score"]) & (effective > 0)).all()


def test_dense_and_fused_maps_agree():
    model = wb.load("tiny-softmax")
    with torch.no_grad():
        run = model.run("Mary and John went to the store .", read=READS, maps=wb.capture(stats=("received",)))
    dense = Maps({layer: AttentionMap.from_dense(amap.dense()) for layer, amap in run.maps.items()})
    a, b = sink_alignment(run), sink_alignment(Run(run.tokens, acts=run.acts, maps=dense))
    torch.testing.assert_close(a.tokens.values["score"], b.tokens.values["score"], atol=1e-6, rtol=1e-5, equal_nan=True)


def test_undefined_and_refused():
    model = wb.load("tiny-softmax")
    with torch.no_grad():
        run = model.run("Mary and John went", read=READS, maps=wb.capture())
        other = model.run("Mary and John went to", read=READS)
    result = sink_alignment(run)
    assert "no other sink" in result.table.undefined["sink_score"]
    assert math.isnan(result.weakening()["rho"][0])
    with pytest.raises(WorkbenchError, match="captured no attention"):
        sink_alignment(other)
    with pytest.raises(WorkbenchError, match="streams"):
        sink_alignment(run, sink_levels(other))
    with pytest.raises(WorkbenchError, match="reads a Run"):
        sink_alignment(torch.zeros(3))
    channels = AttentionMap.from_dense(torch.rand(1, 2, 5, 5).tril(), domain="channel")
    with pytest.raises(Refused, match="channel"):
        sink_alignment(Run(run.tokens, acts=run.acts, maps=Maps({1: channels})))
    short = AttentionMap.from_dense(torch.rand(1, 2, 4, 4).tril())
    with pytest.raises(WorkbenchError, match="run the text whole"):
        sink_alignment(Run(Tokens(torch.ones(1, 5).long(), run.tokens.mask), acts=run.acts, maps=Maps({1: short})))


def test_signed_maps_count_by_absolute_weights():
    run = planted_run()
    flipped = {}
    for layer, amap in run.maps.items():
        signs = torch.where(
            torch.rand(24, 24, generator=torch.Generator().manual_seed(layer)) < 0.5, -1.0, 1.0
        ).double()
        flipped[layer] = AttentionMap.from_dense(amap.dense() * signs)
    found = sink_alignment(Run(run.tokens, acts=run.acts, maps=Maps(flipped)))
    torch.testing.assert_close(found.tokens.values["score"], sink_alignment(run).tokens.values["score"])


def test_padding_on_the_left_changes_nothing():
    run = planted_run()
    acts = {site: torch.nn.functional.pad(run.acts[site], (0, 0, 3, 0), value=7.0) for site in run.acts}
    maps = {}
    for layer, amap in run.maps.items():
        weights = torch.nn.functional.pad(amap.dense(), (3, 0, 3, 0))
        weights[..., :3, 0] = 1.0
        maps[layer] = AttentionMap.from_dense(weights)
    mask = torch.ones(1, 27, dtype=torch.bool)
    mask[:, :3] = False
    padded = Run(Tokens(torch.ones(1, 27, dtype=torch.int64), mask), acts=acts, maps=Maps(maps))
    a, b = sink_alignment(padded).frame(), sink_alignment(run).frame()
    np.testing.assert_allclose(a.to_numpy(dtype=float), b.to_numpy(dtype=float), atol=1e-9, equal_nan=True)


def test_it_is_drawn_and_kept(tmp_path):
    result = sink_alignment(planted_run())
    assert result.plot().has_data()
    saved = wb.load_result(result.save(tmp_path / "alignment"))
    assert len(saved.frame()) == 11
    assert len(result.tokens.frame()) == 11 * 24
