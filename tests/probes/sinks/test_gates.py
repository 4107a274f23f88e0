"""Gates at the sink, and learned sinks: planted gates, closed forms, nulls, padding, models."""

import math

import builders as B
import pytest
import torch

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet
from workbench.models.protocol import Tokens
from workbench.patterns.per_channel import ChannelGatedMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import random_rows
from workbench.probes.sinks.gates import gates, learned_sinks
from workbench.run import Maps, Run

T = 40


def planted():
    """Head 0 closes its gate where it looks at the first token, head 1 opens it there, head 2's gate knows nothing of it."""
    weights = random_rows(3, 3, T)
    a = weights[..., 0]
    noise = torch.rand(3, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return weights, torch.stack([1 - a[:, 0], a[:, 1], noise], 1)


def numbers(table, measure):
    return table.values[measure][0].tolist()


def test_a_gate_that_closes_at_the_sink_is_told_from_one_that_opens():
    weights, gate = planted()
    table = gates(GatedMap(AttentionMap.from_dense(weights), gate))
    r = numbers(table, "correlation")
    assert r[:2] == pytest.approx([-1.0, 1.0])
    assert abs(r[2]) < 0.2
    null = table.null["correlation"][0]
    assert bool((null < 0.4).all())
    assert bool((null > 0.05).all())
    at, off, mean = (numbers(table, name) for name in ("gate_at_sink", "gate_elsewhere", "gate"))
    assert at[0] < mean[0] < off[0]
    assert at[1] > mean[1] > off[1]
    effective, by_chance = table.values["effective"][0], table.null["effective"][0]
    assert effective[0] < by_chance[0]
    assert effective[1] > by_chance[1]


def test_measures_are_those_of_a_literal_loop():
    weights, gate = planted()
    table = gates(GatedMap(AttentionMap.from_dense(weights), gate))
    for head in range(3):
        each = {name: [] for name in ("correlation", "raw", "effective", "gate", "gate_at_sink", "gate_elsewhere")}
        for b in range(3):
            a = [float(weights[b, head, i, 0]) for i in range(1, T)]
            g = [float(gate[b, head, i]) for i in range(1, T)]
            each["correlation"].append(float(torch.corrcoef(torch.tensor([a, g], dtype=torch.float64))[0, 1]))
            each["raw"].append(sum(a) / len(a))
            each["gate"].append(sum(g) / len(g))
            each["effective"].append(sum(x * y for x, y in zip(a, g, strict=True)) / len(a))
            each["gate_at_sink"].append(sum(x * y for x, y in zip(a, g, strict=True)) / sum(a))
            each["gate_elsewhere"].append(sum((1 - x) * y for x, y in zip(a, g, strict=True)) / sum(1 - x for x in a))
        for name, values in each.items():
            assert float(table.values[name][0][head]) == pytest.approx(sum(values) / 3), name
            assert min(values) - 1e-9 <= float(table.low[name][0][head]) <= float(table.high[name][0][head])
            assert float(table.high[name][0][head]) <= max(values) + 1e-9
        mean = sum(x * y for x, y in zip(each["raw"], each["gate"], strict=True)) / 3
        assert float(table.null["effective"][0][head]) == pytest.approx(mean)


def test_a_constant_gate_has_no_correlation():
    table = gates(
        GatedMap(AttentionMap.from_dense(random_rows(1, 2, T)), torch.full((1, 2, T), 0.3, dtype=torch.float64))
    )
    assert table.values["correlation"][0].isnan().all()
    assert numbers(table, "gate_at_sink") == pytest.approx([0.3, 0.3])
    torch.testing.assert_close(table.values["effective"][0], table.null["effective"][0])


def test_padding_and_streaming_change_nothing():
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(2, 2, 12, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    gate = torch.rand(2, 2, 12, dtype=torch.float64, generator=generator)
    real = torch.ones(2, 12, dtype=torch.bool)
    real[1, :5] = False
    padded = Run(
        Tokens(torch.arange(24).reshape(2, 12), real),
        maps=Maps({0: GatedMap(SoftmaxMap(q, k, mask=Mask(causal=True, keys=real)), gate)}),
    )
    whole = gates(GatedMap(SoftmaxMap(q[:1], k[:1], mask=Mask(causal=True)), gate[:1]))
    rest = SoftmaxMap(q[1:, :, 5:], k[1:, :, 5:], mask=Mask(causal=True))
    alone = gates(GatedMap(AttentionMap.from_dense(rest.dense()), gate[1:, :, 5:]))
    found = gates(padded)
    for name in found.values:
        mean = (whole.values[name][0] + alone.values[name][0]) / 2
        torch.testing.assert_close(found.values[name][0], mean)


def test_the_null_of_the_correlation_covers_a_gate_that_knows_nothing():
    over = 0
    for seed in range(20):
        gate = torch.rand(1, 4, T, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        table = gates(GatedMap(AttentionMap.from_dense(random_rows(1, 4, T, seed=100 + seed)), gate), draws=100)
        over += int((table.values["correlation"][0].abs() > table.null["correlation"][0]).sum())
    assert 0 <= over <= 10  # 80 heads at 5%


def test_gates_of_channels_and_mixed_layers():
    weights = AttentionMap.from_dense(random_rows(1, 2, T))
    gate = torch.rand(1, 2, T, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = gates({"a": weights, "b": ChannelGatedMap(weights, gate)})
    assert list(table.values["raw"]) == ["b"]
    assert "does not know a gate" in table.undefined["layer a"]
    torch.testing.assert_close(table.values["gate"]["b"], gate.mean(-1)[0, :, 1:].mean(-1))
    with pytest.raises(Refused, match="no layer of this source is gated"):
        gates(weights)
    with pytest.raises(Refused, match="signed"):
        gates(GatedMap(AttentionMap.from_dense(torch.randn(1, 1, 4, 4)), torch.ones(1, 1, 4)))
    with pytest.raises(WorkbenchError, match="at least 20"):
        gates(weights, draws=3)


def test_the_bundled_gates_close_a_little_where_heads_look_at_the_first_token():
    from workbench.datasets.corpus import filler_text

    with torch.no_grad():
        run = wb.load("tiny-gated").run([filler_text(seed, 63) for seed in range(8)], maps=wb.capture(), logits=None)
    table = wb.gates(run, draws=50).frame()
    sinking = table[table["raw"] > 0.3]
    assert len(sinking) >= 5
    assert (sinking["correlation"] < -sinking["correlation_null"]).mean() > 0.7
    assert (sinking["effective"] < 0.3 * sinking["raw"]).all()


def test_learned_sinks_take_what_the_rows_lack():
    logits = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    q, k = (torch.randn(2, 3, 10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    amap = SoftmaxMap(q, k, mask=Mask(causal=True), sink=logits)
    table = learned_sinks(amap)
    missing = 1 - amap.dense().sum(-1)
    torch.testing.assert_close(table.values["share"][0], missing.mean((0, 2)))
    torch.testing.assert_close(table.values["logit"][0], logits)
    dense = learned_sinks(AttentionMap.from_dense(amap.dense()))
    torch.testing.assert_close(dense.values["share"][0], table.values["share"][0])
    assert dense.values["logit"][0].isnan().all()
    assert dense.null["share"][0].isnan().all()
    assert "does not know its sink logits" in dense.undefined["logit, layer 0"]
    assert bool((table.low["share"][0] <= table.values["share"][0]).all())


def test_scores_of_zero_give_the_null_of_a_learned_sink():
    logits = torch.tensor([0.0, 2.0], dtype=torch.float64)
    flat = torch.zeros(1, 2, 10, 4, dtype=torch.float64)
    table = learned_sinks(SoftmaxMap(flat, flat, mask=Mask(causal=True), sink=logits))
    expected = [sum(math.exp(z) / (math.exp(z) + i) for i in range(1, 11)) / 10 for z in (0.0, 2.0)]
    assert table.null["share"][0].tolist() == pytest.approx(expected)
    assert table.values["share"][0].tolist() == pytest.approx(expected)


def model(mixer):
    torch.manual_seed(0)
    return NativeModel(
        NativeNet(NativeConfig(layers=2, heads=2, width=16, head_width=8, vocab=30, mixer=mixer)).double().eval()
    )


@pytest.mark.parametrize("mixer", ["sink-logits", "softmax-off-by-one"])
def test_learned_sinks_of_native_variants(mixer):
    made = model(mixer)
    if mixer == "sink-logits":
        for i, block in enumerate(made.net.blocks):
            block.attn.mixer.sink.data = torch.tensor([1.0 + i, -1.0], dtype=torch.float64)
    with torch.no_grad():
        run = made.run(torch.arange(20).reshape(2, 10), maps=wb.capture())
    table = learned_sinks(run)
    assert table.layers == (0, 1)
    for layer, amap in run.maps.items():
        torch.testing.assert_close(table.values["share"][layer], (1 - amap.row_sums()).mean((0, 2)))
        expected = [1.0 + layer, -1.0] if mixer == "sink-logits" else [0.0, 0.0]
        assert table.values["logit"][layer].tolist() == expected
    if mixer == "sink-logits":
        assert float(table.values["share"][0][0]) > float(table.values["share"][0][1])


def test_learned_sinks_of_gpt_oss_are_its_parameters():
    case = B.hugging_face("gpt_oss")
    with torch.no_grad():
        run = case.model.run(case.inputs, maps=wb.capture())
    table = wb.learned_sinks(run)
    for layer, block in enumerate(case.net.model.layers):
        torch.testing.assert_close(table.values["logit"][layer], block.self_attn.sinks.detach().double())
        torch.testing.assert_close(table.values["share"][layer], (1 - run.maps[layer].dense().sum(-1)).mean((0, 2)))
    assert bool((table.null["share"][0] > 0).all())


def test_layers_without_a_learned_sink_are_named_or_refused():
    plain = AttentionMap.from_dense(random_rows(1, 2, 8))
    q = torch.randn(1, 2, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = learned_sinks([plain, SoftmaxMap(q, q, mask=Mask(causal=True), sink=torch.zeros(2, dtype=torch.float64))])
    assert table.layers == (1,)
    assert "no weight is left" in table.undefined["layer 0"]
    with pytest.raises(Refused, match="learned sink"):
        learned_sinks(plain)
