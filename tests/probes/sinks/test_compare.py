"""Twins side by side: F-Attn, sink score and largest activations, on effective and raw maps, with intervals."""

import math

import pytest
import torch

import workbench as wb
from workbench.errors import UnknownName, WorkbenchError
from workbench.maps import AttentionMap, GatedMap
from workbench.models.protocol import Tokens
from workbench.probes.bootstrap import interval
from workbench.probes.examples import random_rows
from workbench.probes.sinks.compare import compare_sinks
from workbench.probes.sinks.scores import sinks
from workbench.results import load_result
from workbench.run import Activations, Maps, Provenance, Run
from workbench.sites import Site

B, H, T = 4, 2, 6
WEIGHTS = random_rows(B, H, T)
GATE = torch.full((B, H, T), 0.25, dtype=torch.float64)


def run_of(maps, ids=None, mask=None, **options):
    first = next(iter(maps.values()))
    ids = torch.arange(first.shape[0] * first.shape[2]).reshape(first.shape[0], -1) if ids is None else ids
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    return Run(Tokens(ids, mask), maps=Maps(maps), provenance=Provenance("toy"), **options)


def streams(seed=0, peak=0.0):
    stream = torch.randn(B, T, 8, generator=torch.Generator().manual_seed(seed))
    stream[:, 0, 3] += peak
    return Activations({Site("resid_post", 0): stream, Site("z", 0): torch.full((B, T, H, 4), 1e6)})


@pytest.fixture
def twins():
    a = run_of({0: AttentionMap.from_dense(WEIGHTS)}, acts=streams(peak=-50.0))
    b = run_of({0: GatedMap(AttentionMap.from_dense(WEIGHTS), GATE)}, acts=streams(seed=1))
    return compare_sinks(a, b, ("softmax", "gated"))


def test_twins_are_compared_sequence_by_sequence(twins):
    table = twins.frame()
    assert table["model"].tolist() == ["softmax", "gated", "gated", *["gated - softmax"] * 2]
    assert table["map"].tolist() == ["both", "effective", "raw", "effective", "raw"]
    f = table["f_attn"].to_numpy()
    assert f[1] == pytest.approx(f[0] / 4)
    assert f[2] == pytest.approx(f[0])
    assert f[3] == pytest.approx(f[1] - f[0])
    assert f[4] == pytest.approx(0.0)
    assert table["mean_gate"].tolist()[1:3] == [0.25, 0.25]
    assert twins.paired
    assert twins.sequences == (B, B)
    low, high = twins.difference("f_attn")
    alone = sinks(AttentionMap.from_dense(WEIGHTS)).per_sequence("f_attn")
    assert -0.75 * alone.max() <= low < high <= -0.75 * alone.min()
    # The same sequences are drawn for both, so that a constant ratio has no spread.
    assert twins.ratio() == pytest.approx((4.0, 4.0, 4.0))
    assert twins.ratio(map="raw") == pytest.approx((1.0, 1.0, 1.0))


def test_largest_activations_have_an_interval_over_sequences(twins):
    table = twins.frame()
    stream = streams(peak=-50.0)[Site("resid_post", 0)].abs().double()
    each = stream.flatten(1).amax(1)
    assert table["largest"][0] == pytest.approx(float(each.mean()))
    low, high = interval(each)
    assert (table["largest_low"][0], table["largest_high"][0]) == pytest.approx((float(low), float(high)))
    assert table["largest_of_all"][0] == float(stream.max()) == twins.results[0][0].largest
    assert table["largest_later"][0] == pytest.approx(float(stream[:, 1:].flatten(1).amax(1).mean()))
    assert table["largest"][0] > 40 > table["largest_later"][0]
    assert table["largest"][3] == pytest.approx(table["largest"][1] - table["largest"][0])
    assert table["largest_high"][3] < 0
    assert table["largest"][1] == table["largest"][2]


def test_padding_has_no_activations():
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[0, :2] = False
    maps = {0: AttentionMap.from_dense(WEIGHTS)}
    result = sinks(run_of(maps, torch.arange(B * T).reshape(B, T), mask, acts=streams(peak=-50.0)))
    stream = streams()[Site("resid_post", 0)].abs().double()
    assert result.activations[0] == stream[0, 2:].max()
    assert result.later[0] == stream[0, 3:].max()
    assert result.activations[1] > 40
    assert sinks(run_of(maps)).largest is None
    assert math.isnan(sinks(run_of(maps)).mean("largest"))
    one = run_of(
        {0: AttentionMap.from_dense(WEIGHTS[:, :, :1, :1])},
        acts=Activations({Site("resid_pre", 0): torch.ones(B, 1, 3)}),
    )
    assert sinks(one).later.isnan().all()


def test_layers_and_heads_are_compared_too(twins):
    layers, heads = twins.layers(), twins.heads()
    assert layers["map"].tolist() == ["effective", "raw"]
    assert layers["first"][0] == pytest.approx(twins.frame()["f_attn"][0])
    assert len(heads) == 2 * H
    assert heads["map"].tolist() == ["effective", "effective", "raw", "raw"]
    paid = WEIGHTS[..., 0].mean(2)
    for row in heads.to_dict("records"):
        each = paid[:, row["head"]]
        part = 0.25 if row["map"] == "effective" else 1.0
        assert row["first"] == pytest.approx(float(each.mean()))
        assert row["second"] == pytest.approx(part * float(each.mean()))
        assert row["difference"] == pytest.approx((part - 1) * float(each.mean()))
        assert row["first_low"] <= row["first"] <= row["first_high"]
        low, high = interval((part - 1) * each)
        assert (row["difference_low"], row["difference_high"]) == pytest.approx((float(low), float(high)))
    assert abs(heads["difference"][0]) >= abs(heads["difference"][1])


def test_models_of_unlike_shapes_are_compared_where_they_can_be():
    deep = {i: AttentionMap.from_dense(random_rows(B, 3, T, seed=i)) for i in range(2)}
    compared = compare_sinks(run_of({0: AttentionMap.from_dense(WEIGHTS)}), run_of(deep))
    assert len(compared.heads()) == H
    layers = compared.layers()
    assert math.isnan(layers["first"][1])
    assert not math.isnan(layers["second"][1])
    with pytest.raises(WorkbenchError, match="no layer in common"):
        compare_sinks(run_of({"x": deep[0]}), run_of({0: deep[0]})).heads()


def test_one_sequence_has_no_interval():
    run = run_of({0: AttentionMap.from_dense(WEIGHTS[:1])})
    compared = compare_sinks(run, run)
    assert all(math.isnan(x) for x in compared.difference())
    assert all(math.isnan(x) for x in compared.ratio()[1:])
    assert compared.ratio()[0] == 1.0
    assert math.isnan(compared.frame()["f_attn_low"][0])
    assert math.isnan(compared.heads()["difference_low"][0])


def test_other_texts_are_resampled_on_their_own():
    a, b = (run_of({0: AttentionMap.from_dense(WEIGHTS)}, ids) for ids in (None, torch.zeros(B, T, dtype=torch.long)))
    assert compare_sinks(a, a).difference() == (0.0, 0.0)
    other = compare_sinks(a, b)
    assert not other.paired
    low, high = other.difference()
    assert low < 0 < high


def test_what_cannot_be_compared_is_refused(twins):
    run = run_of({0: AttentionMap.from_dense(WEIGHTS)})
    with pytest.raises(WorkbenchError, match="two labels"):
        compare_sinks(run, run, ("one",))
    with pytest.raises(WorkbenchError, match="two runs"):
        compare_sinks(run, run.maps[0])
    with pytest.raises(UnknownName, match="largest"):
        twins.difference("large")
    with pytest.raises(UnknownName, match="raw"):
        twins.difference("f_attn", "inner")


def test_a_comparison_is_drawn_and_saved(twins, tmp_path):
    ax = twins.plot()
    assert [text.get_text() for text in ax.get_legend().get_texts()][2] == "gated, attention inside the gate"
    saved = load_result(twins.save(tmp_path / "twins"))
    assert len(saved.frame()) == len(twins.frame())


def test_the_bundled_twins_show_the_order_of_the_published_effect():
    """The gate takes F-Attn of what acts to less than a tenth; the softmax inside it keeps its sink, unlike the published."""
    from workbench.datasets.corpus import filler_text

    texts = [filler_text(seed, 63) for seed in range(8)]
    runs = []
    for name in ("tiny-softmax", "tiny-gated"):
        model = wb.load(name)
        read = [f"blocks.{layer}.hook_resid_post" for layer in range(model.shape.layers)]
        with torch.no_grad():
            runs.append(model.run(texts, read=read, maps=wb.capture(stats=("received",)), logits=None))
    compared = wb.compare_sinks(*runs, ("tiny-softmax", "tiny-gated"))
    ratio, low, high = compared.ratio()
    assert 10 < low < ratio < high < 25
    assert 0.8 < compared.ratio(map="raw")[0] < 1.5
    assert compared.difference("sink_score")[1] < -0.2
    assert compared.frame()["largest"].notna().all()
