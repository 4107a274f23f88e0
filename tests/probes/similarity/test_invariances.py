"""Every analysis of this group: padding, batches and chunks leave the numbers alone, and shuffles are what they say."""

import contextlib
import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.probes.examples import bundled_run, random_rows
from workbench.probes.similarity.aligned import aligned, aligned_layers, even, shuffled
from workbench.probes.similarity.diversity import attention_diversity
from workbench.probes.similarity.head_sharing import head_sharing
from workbench.probes.similarity.patterns import head_patterns
from workbench.probes.similarity.rank import rank_collapse
from workbench.probes.similarity.redundancy import head_redundancy
from workbench.probes.similarity.sharing import sharing
from workbench.probes.similarity.stability import map_stability, row_stability
from workbench.probes.similarity.temporal import temporal_bands, temporal_disparity

ANSWERS = {
    "sharing": lambda s: sharing(s, skip=0),
    "sharing, js": lambda s: sharing(s, skip=0, measure="js"),
    "sharing, blocks": lambda s: sharing(s, skip=0, size=4),
    "sharing, blocks, js": lambda s: sharing(s, skip=0, size=4, measure="js"),
    "heads of the layer before": head_sharing,
    "redundancy": head_redundancy,
    "rank": rank_collapse,
    "rank of blocks": lambda s: rank_collapse(s, size=4),
    "diversity, js": attention_diversity,
    "diversity, cosine": lambda s: attention_diversity(s, measure="cosine"),
    "patterns": lambda s: head_patterns(s, side=5),
    "rows": row_stability,
    "bands": lambda s: temporal_bands(s, 1),
    "disparity": lambda s: temporal_disparity(s, 1),
}
MODULES = ("aligned", "sharing", "head_sharing", "stability", "temporal")


def numbers(table):
    return table.select_dtypes("number").to_numpy(dtype=float)


def without_intervals(result):
    table = result.frame()
    return table[[c for c in table.columns if not c.endswith(("_low", "_high")) and c not in ("low", "high")]]


@pytest.mark.parametrize("name", ANSWERS)
def test_a_padded_batch_is_the_mean_of_its_sequences_alone(name, padded, alone):
    answer = ANSWERS[name]
    whole = without_intervals(answer(padded))
    parts = [without_intervals(answer(run)) for run in alone]
    if name == "patterns":
        order = whole.sort_values(["sequence", "layer", "head"], kind="stable")
        rows = np.concatenate([numbers(part.drop(columns="sequence")) for part in parts])
        np.testing.assert_allclose(numbers(order.drop(columns="sequence")), rows, atol=1e-12)
        return
    measures = [c for c in whole.columns if c not in ("layer", "head", "other", "partner", "shared")]
    mean = np.mean([part[measures].to_numpy(float) for part in parts], axis=0)
    if "nearest" in measures:  # the nearest head is chosen over the batch
        measures = [c for c in measures if not c.startswith("nearest")]
        mean = np.mean([part[measures].to_numpy(float) for part in parts], axis=0)
    np.testing.assert_allclose(whole[measures].to_numpy(float), mean, atol=1e-9)


@pytest.mark.parametrize("name", ANSWERS)
def test_chunks_do_not_matter(name, padded, monkeypatch):
    whole = numbers(ANSWERS[name](padded).frame())
    for module in MODULES:
        monkeypatch.setattr(importlib.import_module(f"workbench.probes.similarity.{module}"), "CHUNK", 1)
    np.testing.assert_allclose(numbers(ANSWERS[name](padded).frame()), whole, atol=1e-9)


def test_steps_of_a_padded_batch_are_those_of_its_sequences(padded, alone):
    def answer(run):
        return map_stability({0: run.maps[0]}, {0: run.maps[1]}).frame()[["cosine", "change", "cosine_null"]].to_numpy()

    np.testing.assert_allclose(answer(padded), np.mean([answer(run) for run in alone], axis=0), atol=1e-9)


def test_the_gate_is_taken_off_or_counted():
    rows, gate = random_rows(2, 3, 10), torch.rand(2, 3, 10, dtype=torch.float64)
    plain = AttentionMap.from_dense(rows)
    gated = GatedMap(plain, gate)
    for answer in (head_redundancy, rank_collapse, row_stability, attention_diversity, temporal_bands):
        inside, bare = answer(gated, raw=True), answer(plain)
        np.testing.assert_allclose(numbers(inside.frame()), numbers(bare.frame()), atol=1e-12)
    assert not torch.allclose(rank_collapse(gated).values["residual"][0], rank_collapse(plain).values["residual"][0])
    told = AttentionMap.from_dense(rows * gate[..., None], row_sum="gate")
    with pytest.raises(Refused, match="raw=False"):
        head_redundancy(told, raw=True)
    run = bundled_run("tiny-gated")
    assert not np.allclose(numbers(head_redundancy(run, raw=True).frame()), numbers(head_redundancy(run).frame()))


def test_signed_maps_have_cosines_and_no_divergence():
    weights = torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    maps = [AttentionMap.from_dense(weights), AttentionMap.from_dense(-weights)]
    assert float(sharing(maps).similarity[0, 1]) == pytest.approx(-1)
    assert head_sharing(maps).values["same"][1].tolist() == pytest.approx([-1, -1])
    with pytest.raises(Refused, match="cosine"):
        sharing(maps, measure="js")
    with pytest.raises(Refused, match="cosine"):
        attention_diversity(maps)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 5), st.integers(2, 12), st.booleans())
def test_shuffled_rows_hold_the_same_weights_at_visible_keys(seed, n, causal):
    rows = random_rows(2, 3, n, seed=seed, causal=causal)
    layer = aligned(0, AttentionMap.from_dense(rows), None)
    seen = layer.visible(0, n)
    mixed = shuffled(rows, seen, 0, seed)
    torch.testing.assert_close(mixed.sort(-1).values, rows.sort(-1).values)
    assert bool((mixed[~seen.expand_as(mixed)] == 0).all())
    torch.testing.assert_close(shuffled(rows[:, :, 1:], seen[:, :, 1:], 1, seed), mixed[:, :, 1:])


def test_shuffles_are_even_on_average_and_differ_between_rows_and_heads():
    rows = random_rows(1, 2, 6)
    layer = aligned(0, AttentionMap.from_dense(rows), None)
    seen = layer.visible(0, 6)
    draws = torch.stack([shuffled(rows, seen, 0, seed) for seed in range(4000)])
    spread = even(rows, seen)
    # Standard error of the mean of 4,000 shuffles is at most .5 / sqrt(4000) = .008.
    assert float((draws.mean(0) - spread).abs().max()) < 0.032
    flat = torch.arange(1.0, 31.0).double().expand(1, 2, 40, 30)
    orders = shuffled(flat, torch.ones(1, 1, 40, 30).bool(), 0).flatten(0, 2)
    assert len(orders.unique(dim=0)) == 80


def test_block_sums_of_padded_sequences_start_at_the_first_token(padded, alone):
    whole = aligned_layers(padded)[0].block_sums(4)
    for b, run in enumerate(alone):
        own = aligned_layers(run)[0].block_sums(4)[0]
        torch.testing.assert_close(whole[b, :, : own.shape[1], : own.shape[2]], own)
        torch.testing.assert_close(own, run.maps[0].blocks(4)[0].double())


def test_keys_before_the_queries_are_seen_by_all(dense):
    rows = random_rows(1, 2, 4, keys=9)
    layer = aligned(0, dense(rows), None)
    assert layer.visible(0, 4).sum(-1).flatten().tolist() == [6, 7, 8, 9]
    assert aligned(0, dense(rows), None, mask=Mask()).visible(0, 4).sum(-1).unique().tolist() == [9]


@pytest.mark.slow
def test_every_family_of_maps_is_answered_or_refused():
    """A variant per class of maps; only errors that say why may come."""
    found = {}
    for variant in wb.variants():
        with contextlib.suppress(WorkbenchError):
            amap = variant.operator(**variant.example(0, 12, torch.float64))[1]
            found.setdefault((type(amap), amap.sign), amap)
    answers = {
        **ANSWERS,
        "sharing": lambda m: sharing([m, m], skip=0),
        "rank bounds": lambda m: rank_collapse(m, rank=3),
        "heads of the layer before": lambda m: head_sharing([m, m]),
        "steps": lambda m: map_stability(m, m),
        "disparity": lambda m: temporal_disparity([m, m], 0),
    }
    answered = 0
    for amap in found.values():
        for name, answer in answers.items():
            with contextlib.suppress(WorkbenchError):
                table = answer(amap).frame()
                assert len(table), name
                answered += 1
    assert len(found) > 30
    assert answered > 0.6 * len(found) * len(answers)
