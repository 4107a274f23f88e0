"""Shares of signed and of unnormalised maps."""

import pytest
import torch

from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.models.protocol import Tokens
from workbench.probes.examples import random_rows
from workbench.probes.sinks.scores import sinks
from workbench.run import Maps, Run

T = 6


def signed_rows(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tril()


def test_a_share_of_a_signed_map_is_one_of_absolute_weights():
    weights = signed_rows(2, 3, T, T)
    result = sinks(AttentionMap.from_dense(weights))
    absolute = weights.abs() / weights.abs().sum(-1, keepdim=True)
    plain = sinks(AttentionMap.from_dense(absolute))
    torch.testing.assert_close(result.share[0], plain.share[0])
    torch.testing.assert_close(result.uniform[0], plain.uniform[0])
    assert result.f_attn == pytest.approx(plain.f_attn)
    assert result.sink_score == pytest.approx(plain.sink_score)
    seen = torch.arange(T, 0, -1)
    torch.testing.assert_close(result.signed[0], (weights.sum(2) / seen).mean(0))
    assert "signed" in result.frame()
    assert "signed" not in plain.frame()
    flipped = sinks(AttentionMap.from_dense(-weights))
    torch.testing.assert_close(flipped.share[0], result.share[0])
    torch.testing.assert_close(flipped.signed[0], -result.signed[0])


def test_a_gate_scales_the_shares_of_a_signed_map():
    weights, gate = signed_rows(1, 2, T, T), signed_rows(1, 2, T, T, seed=1)[:, :, -1]
    absolute = weights.abs() / weights.abs().sum(-1, keepdim=True)
    result = sinks(GatedMap(AttentionMap.from_dense(weights), gate))
    expected = sinks(AttentionMap.from_dense(absolute * gate.abs()[..., None]), mask=Mask(causal=True))
    torch.testing.assert_close(result.share[0], expected.share[0])
    inside = sinks(GatedMap(AttentionMap.from_dense(weights), gate), raw=True)
    torch.testing.assert_close(inside.share[0], sinks(AttentionMap.from_dense(absolute)).share[0])
    even = torch.ones(1, 2, T, T, dtype=torch.float64).tril() * torch.tensor([1.0, -2.0])[None, :, None, None]
    spread = sinks(GatedMap(AttentionMap.from_dense(even), gate))
    torch.testing.assert_close(spread.share[0], spread.uniform[0])


def test_signed_rows_of_padding_do_not_count():
    weights = signed_rows(1, 2, T, T)
    real = torch.tensor([[False, False, True, True, True, True]])
    ids = torch.arange(T)[None]
    padded = sinks(Run(Tokens(ids, real), maps=Maps({0: AttentionMap.from_dense(weights)})), mask=Mask(causal=True))
    alone = sinks(AttentionMap.from_dense(weights[:, :, 2:, 2:]))
    torch.testing.assert_close(padded.share[0][:, :4], alone.share[0])
    assert padded.share[0][:, 4:].isnan().all()
    assert padded.f_attn == pytest.approx(alone.f_attn)


def test_unnormalised_weights_count_as_they_are_or_relative_to_their_row():
    weights = torch.rand(1, 2, T, T, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).tril() * 0.2
    amap = AttentionMap.from_dense(weights, row_sum="free")
    seen = torch.arange(T, 0, -1)
    torch.testing.assert_close(sinks(amap).share[0], weights[0].sum(1) / seen)
    normal = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(sinks(amap, relative=True).share[0], normal[0].sum(1) / seen)
    even = torch.ones(1, 1, T, T, dtype=torch.float64).tril() * torch.arange(1.0, T + 1, dtype=torch.float64)[:, None]
    spread = sinks(AttentionMap.from_dense(even, row_sum="free"))
    torch.testing.assert_close(spread.share[0], spread.uniform[0])
    # Of weights that sum to 1 it changes nothing.
    rows = AttentionMap.from_dense(random_rows(1, 2, T))
    torch.testing.assert_close(sinks(rows, relative=True).share[0], sinks(rows).share[0])
