"""Attention that each token receives: by layer and sequence, effective and inside gates, signed, padded."""

import math

import pytest
import torch

import workbench as wb
from workbench.errors import UnknownName
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.models.protocol import Tokens
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import random_rows
from workbench.probes.sinks.received import received
from workbench.run import Maps, Run

T = 7
SEEN = torch.arange(T, 0, -1)


def test_shares_of_tokens_are_those_of_every_sequence():
    layers = [random_rows(2, 3, T, seed=i) for i in range(2)]
    table = received([AttentionMap.from_dense(w) for w in layers])
    expected = torch.stack([w.sum(2) / SEEN for w in layers])
    torch.testing.assert_close(table.values["received"], expected.mean(2))
    torch.testing.assert_close(table.values["most"], expected.amax(2))
    torch.testing.assert_close(table.values["mass"], torch.stack([w.sum(2).mean(1) for w in layers]))
    assert set(table.values) == {"received", "most", "mass"}
    even = torch.tensor([sum(1 / (i + 1) for i in range(k, T)) / (T - k) for k in range(T)], dtype=torch.float64)
    torch.testing.assert_close(table.null["received"], even.expand(2, 2, T))
    assert len(table.frame()) == 2 * 2 * T
    one = received(AttentionMap.from_dense(layers[0]), heads=[1])
    torch.testing.assert_close(one.values["received"][0], expected[0][:, 1])
    torch.testing.assert_close(one.values["most"], one.values["received"])
    with pytest.raises(UnknownName, match="head"):
        received(AttentionMap.from_dense(layers[0]), heads=[3])


def test_gated_maps_are_told_with_and_without_their_gate():
    weights = random_rows(1, 2, T)
    gate = torch.rand(1, 2, T, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = received([GatedMap(AttentionMap.from_dense(weights), gate), AttentionMap.from_dense(weights)])
    torch.testing.assert_close(table.values["received"][0], ((weights * gate[..., None]).sum(2) / SEEN).mean(1))
    torch.testing.assert_close(table.values["inside"][0], (weights.sum(2) / SEEN).mean(1))
    torch.testing.assert_close(table.values["inside"][1], table.values["received"][1])
    told = received(AttentionMap.from_dense(weights * 0.5, row_sum="gate"))
    assert told.values["inside"].isnan().all()
    assert "inside its gate" in told.undefined["inside, layer 0"]


def test_signed_layers_are_told_by_absolute_weights_beside_the_signed_mean():
    weights = torch.randn(1, 2, T, T, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tril()
    table = received([AttentionMap.from_dense(weights), AttentionMap.from_dense(random_rows(1, 2, T))])
    absolute = weights.abs() / weights.abs().sum(-1, keepdim=True)
    torch.testing.assert_close(table.values["received"][0], (absolute.sum(2) / SEEN).mean(1))
    torch.testing.assert_close(table.values["signed"][0], (weights.sum(2) / SEEN).mean(1))
    assert table.values["signed"][1].isnan().all()


def test_tokens_count_from_the_first_real_one():
    q, k = (torch.randn(2, 2, T, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    real = torch.ones(2, T, dtype=torch.bool)
    real[1, :3] = False
    labels = (tuple("abcdefg"), ("<pad>",) * 3 + tuple("hijk"))
    amap = SoftmaxMap(q, k, mask=Mask(causal=True, keys=real))
    table = received(Run(Tokens(torch.arange(2 * T).reshape(2, T), real, labels), maps=Maps({0: amap})))
    alone = received(SoftmaxMap(q[1:, :, 3:], k[1:, :, 3:], mask=Mask(causal=True)))
    torch.testing.assert_close(table.values["received"][0, 1, :4], alone.values["received"][0, 0])
    assert table.values["received"][0, 1, 4:].isnan().all()
    assert table.tokens == (tuple("abcdefg"), tuple("hijk"))


def test_layers_of_other_lengths_end_in_nothing():
    table = received(
        {"encoder.0": AttentionMap.from_dense(random_rows(1, 1, 5)), "x": AttentionMap.from_dense(random_rows(1, 1, 3))}
    )
    assert table.values["received"].shape == (2, 1, 5)
    assert table.values["received"][1, 0, 3:].isnan().all()
    assert not math.isnan(float(table.values["received"][0, 0, 4]))


def test_the_bundled_model_sinks_into_its_first_token():
    run = wb.load("tiny-softmax").run("Mary and John went to the store . John gave a book to", maps=wb.capture())
    table = wb.received(run)
    first = table.values["received"][:, 0]
    assert bool((first[:, 0] > table.null["received"][:, 0, 0]).all())
    assert table.tokens[0][0] == "<bos>"
