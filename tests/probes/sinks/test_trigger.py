"""The trigger task: who sinks when there is nothing to say, and where queries of a group look."""

import functools
import math

import pytest
import torch

import workbench as wb
from workbench.datasets.models.trigger import ReluMixer, train_trigger, trigger_loss
from workbench.datasets.trigger import BOS, TRIGGER, trigger_batch
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.models.native_net import NativeConfig
from workbench.models.protocol import Tokens
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import random_rows
from workbench.probes.sinks import use as module
from workbench.probes.sinks.use import sink_use
from workbench.run import Maps, Run


def test_the_target_is_the_mean_of_the_payloads_before_the_trigger():
    for bos in (True, False):
        rows = trigger_batch(50, torch.Generator().manual_seed(0), tokens=9, payloads=4, bos=bos)
        assert bool((rows.trigger.sum(1) == 1).all())
        assert bool((rows.ids[:, 0] == BOS).all()) == bos
        for ids, target, trigger in zip(rows.ids.tolist(), rows.target, rows.trigger, strict=True):
            at = int(trigger.int().argmax())
            assert ids[at] == TRIGGER
            before = [i - 2 for i in ids[:at] if i >= 2]
            expected = torch.tensor([before.count(p) / len(before) for p in range(4)])
            torch.testing.assert_close(target[at], expected)
            assert float(target.sum()) == pytest.approx(1.0)
        assert bool((rows.other | rows.trigger)[:, 1:].all())
        assert not rows.other[:, 0].any()
    with pytest.raises(WorkbenchError, match="at least 3 tokens"):
        trigger_batch(2, torch.Generator(), tokens=2)


@functools.cache
def used(mixer, bos=True, steps=300):
    rows = trigger_batch(256, torch.Generator().manual_seed(99), bos=bos)
    model = train_trigger(mixer, bos=bos, steps=steps)
    with torch.no_grad():
        run = model.run(rows.ids, maps=wb.capture())
    return sink_use(run, {"trigger": rows.trigger, "other": rows.other}), trigger_loss(model, rows)


def test_softmax_sinks_where_it_has_nothing_to_say_and_not_at_the_trigger():
    found, loss = used("softmax")
    assert loss < 0.01
    assert found.mean("other") > 0.85
    assert found.mean("trigger") < 0.01
    low, high = found.frame().set_index("place").loc["other", ["first_low", "first_high"]]
    assert 0.85 < low < high < 0.95
    assert found.mean("other") > 4 * float(found.uniform[0][1])


def test_an_untrained_head_does_not():
    found, loss = used("softmax", steps=0)
    assert found.mean("other") < 2 * float(found.uniform[0][1])
    assert loss > 0.9


def test_relu_and_sigmoid_attention_have_no_sink():
    for mixer in ("relu", "sigmoid-attention"):
        found, loss = used(mixer)
        assert loss < 0.6
        assert found.mean("other") < 0.05
        assert found.mean("other", "sum") < 0.1
        assert found.mean("trigger", "sum") > 0.1
    assert used("relu")[0].mean("other") < 0.005


def test_a_gate_takes_most_of_the_sink_away_though_the_softmax_inside_keeps_it():
    found, loss = used("gated-softmax")
    assert loss < 0.01
    assert found.mean("other", map="raw") > 0.9
    assert found.mean("other") < 0.4 * found.mean("other", map="raw")
    assert found.mean("trigger", "sum") > 0.85  # the gate opens where it is needed
    assert found.mean("other", "sum") < 0.3


def test_one_more_in_the_denominator_helps_only_where_there_is_no_first_token_to_use():
    found, _ = used("softmax-off-by-one", steps=600)
    assert found.mean("other") > 0.6
    assert 1 - found.mean("other", "sum") < 0.05
    alone, loss = used("softmax-off-by-one", bos=False, steps=600)
    assert loss < 0.1
    assert alone.mean("other") < 0.05
    assert 1 - alone.mean("other", "sum") > 0.4
    assert 1 - alone.mean("trigger", "sum") < 0.05


def test_training_is_repeatable_and_leaves_the_global_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = train_trigger("relu", steps=3)
    assert torch.rand(1).equal(expected)
    again = train_trigger("relu", steps=3)
    ids = trigger_batch(2, torch.Generator().manual_seed(0)).ids
    with torch.no_grad():
        assert first.run(ids).logits.equal(again.run(ids).logits)


def test_relu_attention_is_its_formula():
    mixer = ReluMixer(NativeConfig(layers=1, heads=1, width=4, head_width=4, vocab=4))
    q, k, v = (torch.randn(2, 1, 5, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    z, amap = mixer(None, q, k, v, Mask(causal=True))
    for i in range(5):
        expected = sum(max(0.0, float(q[0, 0, i] @ k[0, 0, j]) / 2) * v[0, 0, j] for j in range(i + 1)) / (i + 1)
        torch.testing.assert_close(z[0, 0, i], expected)
    torch.testing.assert_close(amap.matvec(v), z)


def test_use_is_that_of_a_literal_loop(monkeypatch):
    weights, gate = (
        random_rows(2, 2, 8),
        torch.rand(2, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    )
    group = torch.rand(2, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    found = sink_use(
        GatedMap(AttentionMap.from_dense(weights), gate), {"some": group, "none": torch.zeros(8, dtype=torch.bool)}
    )
    for kind, factor in (("effective", gate), ("raw", torch.ones_like(gate))):
        got = found.weight[kind][0]
        assert got[:, :, 1].isnan().all()
        for b in range(2):
            at = [i for i in range(1, 8) if group[b, i]]
            for h in range(2):
                first = sum(float(factor[b, h, i] * weights[b, h, i, 0]) for i in at) / len(at)
                itself = sum(float(factor[b, h, i] * weights[b, h, i, i]) for i in at) / len(at)
                total = sum(float(factor[b, h, i]) for i in at) / len(at)
                expected = torch.tensor([first, itself, total - first - itself, total], dtype=torch.float64)
                torch.testing.assert_close(got[b, h, 0], expected)
    monkeypatch.setattr(module, "_CHUNK", 1)
    chunked = sink_use(AttentionMap.from_dense(weights), {"some": group})
    torch.testing.assert_close(chunked.weight["effective"][0][:, :, 0], found.weight["raw"][0][:, :, 0])
    even = sink_use(AttentionMap.from_dense(weights)).uniform[0]
    assert float(even) == pytest.approx(sum(1 / (i + 1) for i in range(1, 8)) / 7)


def test_padding_does_not_count():
    q, k = (torch.randn(1, 2, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    real = torch.tensor([[False] * 3 + [True] * 6])
    amap = SoftmaxMap(q, k, mask=Mask(causal=True, keys=real))
    padded = sink_use(Run(Tokens(torch.arange(9)[None], real), maps=Maps({0: amap})))
    alone = sink_use(SoftmaxMap(q[:, :, 3:], k[:, :, 3:], mask=Mask(causal=True)))
    torch.testing.assert_close(padded.weight["effective"][0], alone.weight["effective"][0])
    torch.testing.assert_close(padded.uniform[0], alone.uniform[0])


def test_what_cannot_be_answered_is_refused():
    amap = AttentionMap.from_dense(random_rows(1, 1, 5))
    with pytest.raises(Refused, match="signed"):
        sink_use(AttentionMap.from_dense(torch.randn(1, 1, 4, 4)))
    with pytest.raises(Refused, match="among its keys"):
        sink_use({"cross.0": amap})
    with pytest.raises(WorkbenchError, match="bool"):
        sink_use(amap, {"x": torch.ones(1, 5)})
    with pytest.raises(WorkbenchError, match="no 'last'"):
        sink_use(amap).mean("all", "last")
    assert not math.isnan(sink_use(amap).mean("all"))
