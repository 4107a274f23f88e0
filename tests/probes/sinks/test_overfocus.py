"""Overfocusing: closed forms, the authors' arithmetic as an oracle, streaming, padding, and the gradient of the loss."""

import math

import pytest
import torch

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.models.protocol import Tokens
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import random_rows
from workbench.probes.sinks import overfocus as module
from workbench.probes.sinks.overfocus import overfocus, overfocus_loss
from workbench.run import Maps, Run

N = 16


def sharp(batch=2, heads=3, tokens=N, seed=0, causal=False):
    """Rows sharp enough to have entries above 2/N, with a shared favourite."""
    scores = 3 * torch.randn(
        batch, heads, tokens, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    scores[..., 1] += 4
    if causal:
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
    return scores.softmax(-1)


def literal(weights, threshold=2.0):
    """Row by row, per sequence: the loss of one layer with its threshold, and the plain cosine."""
    found = []
    for sequence in weights:
        rows = sequence.mean(0)
        mean = rows.mean(0)
        limit = threshold / rows.shape[1]
        cut, cut_mean = (torch.where(part > limit, part, 0.0) for part in (rows, mean))
        pairs = [((cut[i], cut_mean), (rows[i], mean)) for i in range(len(rows))]
        cosines = [
            [float(x @ y / (x.norm() * y.norm())) if bool(x.any()) and bool(y.any()) else 0.0 for x, y in pair]
            for pair in pairs
        ]
        found.append([sum(c[i] for c in cosines) / len(rows) for i in (0, 1)])
    return torch.tensor(found, dtype=torch.float64)


def test_closed_forms():
    same = torch.zeros(1, 2, N, N, dtype=torch.float64)
    same[..., 3] = 1.0
    table = overfocus(AttentionMap.from_dense(same), mask=Mask())
    assert [float(table.values[name]) for name in ("overfocus", "cosine", "focused")] == pytest.approx([1.0, 1.0, 1.0])
    eye = overfocus(AttentionMap.from_dense(torch.eye(N, dtype=torch.float64).expand(1, 2, N, N)), mask=Mask())
    assert float(eye.values["cosine"]) == pytest.approx(1 / math.sqrt(N))
    assert math.isnan(float(eye.values["overfocus"]))  # each key gets 1/N on average
    assert "published loss counts 0" in eye.undefined["overfocus, layer 0"]
    assert float(eye.values["focused"]) == 1.0
    even = overfocus(AttentionMap.from_dense(torch.full((1, 1, N, N), 1 / N, dtype=torch.float64)), mask=Mask())
    assert float(even.values["cosine"]) == pytest.approx(1.0)
    assert float(even.values["focused"]) == 0.0
    halves = torch.zeros(1, 1, N, N, dtype=torch.float64)
    halves[:, :, : N // 2, 0] = 1.0
    halves[:, :, N // 2 :, 1] = 1.0
    split = overfocus(AttentionMap.from_dense(halves), mask=Mask())
    assert float(split.values["overfocus"]) == pytest.approx(1 / math.sqrt(2))
    # At unrelated tokens the mean row is flat, and a row of one entry has cosine 1 / sqrt(N) with it, give or take.
    assert float(split.null["cosine"]) < 0.5


def test_it_is_the_literal_loop():
    weights = [sharp(seed=0), sharp(seed=1, heads=1)]
    table = overfocus([AttentionMap.from_dense(layer) for layer in weights], mask=Mask())
    for i, layer in enumerate(weights):
        expected = literal(layer)
        assert bool((expected > 0.1).all())
        assert float(table.values["overfocus"][i]) == pytest.approx(float(expected[:, 0].mean()))
        assert float(table.values["cosine"][i]) == pytest.approx(float(expected[:, 1].mean()))
        assert (
            float(table.low["overfocus"][i]) <= float(table.values["overfocus"][i]) <= float(table.high["overfocus"][i])
        )
    other = overfocus(AttentionMap.from_dense(weights[0]), threshold=4.0, mask=Mask())
    assert float(other.values["overfocus"]) == pytest.approx(float(literal(weights[0], 4.0)[:, 0].mean()))


def test_the_loss_is_the_metric_averaged_over_layers():
    weights = [sharp(seed=0), sharp(seed=1)]
    table = overfocus([AttentionMap.from_dense(layer) for layer in weights], mask=Mask())
    assert float(overfocus_loss(weights)) == pytest.approx(float(table.values["overfocus"].mean()))
    assert float(overfocus_loss(weights[0])) == pytest.approx(float(table.values["overfocus"][0]))
    assert float(overfocus_loss(torch.eye(N)[None, None])) == 0.0


def test_the_gradient_of_the_loss_is_right_and_lowers_it():
    scores = 3 * torch.randn(1, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores[..., 1] += 4
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: overfocus_loss(s.softmax(-1)), scores)
    before = overfocus_loss(scores.softmax(-1))
    (slope,) = torch.autograd.grad(before, scores)
    assert float(slope.norm()) > 1e-3
    with torch.no_grad():
        after = overfocus_loss((scores - 0.5 * slope).softmax(-1))
    assert float(after) < float(before.detach())


def test_training_with_the_loss_makes_attention_diverse():
    scores = torch.randn(1, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    scores[..., 2] += 3
    scores.requires_grad_()
    optimiser = torch.optim.Adam([scores], 0.1)
    first = float(overfocus_loss(scores.detach().softmax(-1)))
    for _ in range(60):
        loss = overfocus_loss(scores.softmax(-1))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert first > 0.7
    assert float(loss.detach()) < 0.6 * first


@pytest.mark.parametrize("chunk", [1, 2**7, 2**22])
def test_streaming_maps_and_any_chunk_agree(chunk, monkeypatch):
    q, k = (
        2 * torch.randn(2, 2, N, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    )
    dense = overfocus(AttentionMap.from_dense(SoftmaxMap(q, k, mask=Mask(causal=True)).dense()))
    monkeypatch.setattr(module, "_CHUNK", chunk)
    streaming = overfocus(SoftmaxMap(q, k, mask=Mask(causal=True)))
    for name in streaming.values:
        torch.testing.assert_close(streaming.values[name], dense.values[name], equal_nan=True)
    for name in streaming.null:
        torch.testing.assert_close(streaming.null[name], dense.null[name], equal_nan=True)


def test_padding_does_not_count():
    weights = sharp(batch=1, causal=True)
    padded = torch.zeros(1, 3, N + 4, N + 4, dtype=torch.float64)
    padded[:, :, 4:, 4:] = weights
    padded[:, :, :4, 0] = 1.0
    real = torch.tensor([[False] * 4 + [True] * N])
    run = Run(Tokens(torch.arange(N + 4)[None], real), maps=Maps({0: AttentionMap.from_dense(padded)}))
    alone, found = overfocus(AttentionMap.from_dense(weights)), overfocus(run, mask=Mask(causal=True))
    for name in alone.values:
        torch.testing.assert_close(found.values[name], alone.values[name])


def test_a_batch_is_the_mean_of_its_sequences():
    weights = sharp(batch=3)
    together = overfocus(AttentionMap.from_dense(weights), mask=Mask())
    apart = [overfocus(AttentionMap.from_dense(w[None]), mask=Mask()) for w in weights]
    for name in together.values:
        mean = torch.stack([table.values[name] for table in apart]).mean(0)
        torch.testing.assert_close(together.values[name], mean)
        assert apart[0].low[name].isnan().all()


def test_the_null_keeps_each_row_sharp_and_scatters_it():
    weights = torch.zeros(4, 1, 64, 64, dtype=torch.float64)
    weights[..., 5] = 0.9
    weights[..., 6] = 0.1
    table = overfocus(AttentionMap.from_dense(weights), mask=Mask())
    assert float(table.values["overfocus"]) == pytest.approx(1.0)
    assert float(table.null["cosine"]) < 0.35
    amap = AttentionMap.from_dense(random_rows(1, 1, 8))
    seen = module.visibility(amap)
    (_, _, pair), *_ = module._rows(amap, seen, torch.rand(1, 8, dtype=torch.float64))
    torch.testing.assert_close(pair[0].sort(-1).values, pair[1].sort(-1).values)
    assert bool((pair[1].triu(1) == 0).all())
    assert not pair[0].equal(pair[1])


def test_gates_scale_rows_and_raw_looks_inside():
    weights = sharp()
    gate = torch.full(weights.shape[:3], 0.1, dtype=torch.float64)
    gated = GatedMap(AttentionMap.from_dense(weights), gate)
    inside = overfocus(gated, raw=True, mask=Mask())
    plain = overfocus(AttentionMap.from_dense(weights), mask=Mask())
    torch.testing.assert_close(inside.values["overfocus"], plain.values["overfocus"])
    acting = overfocus(gated, mask=Mask())
    assert float(acting.values["focused"]) < float(plain.values["focused"])
    torch.testing.assert_close(acting.values["cosine"], plain.values["cosine"])


def test_what_cannot_be_answered_is_refused():
    signed = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(Refused, match="signed"):
        overfocus(AttentionMap.from_dense(signed))
    with pytest.raises(WorkbenchError, match="units of 1/N"):
        overfocus(AttentionMap.from_dense(random_rows()), threshold=-1.0)
    with pytest.raises(Refused, match="inside its gate"):
        overfocus(AttentionMap.from_dense(torch.eye(3).expand(1, 1, 3, 3), row_sum="gate"), raw=True)
    with pytest.raises(WorkbenchError, match=r"\[B, H, Q, N\]"):
        overfocus_loss(torch.ones(3, 3))
    assert wb.overfocus is overfocus
