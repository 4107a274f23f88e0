"""Spatial gates against their formulas, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.mixers.spatial_gates import efficient_local_attention, waveblock_non_local

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def given(name: str, tokens: int = 12, **changes: Any) -> dict[str, Any]:
    return {**variants()[name].example(3, tokens, torch.float64), **changes}


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def strip_gate(strip: Tensor, p: dict[str, Any]) -> Tensor:
    """Gate ``[C, L]`` of one strip of means ``[C, L]``: seven taps, group norm in two groups, sigmoid."""
    c, length = strip.shape
    mixed = torch.zeros_like(strip)
    for channel in range(c):
        for i in range(length):
            for t in range(7):
                if 0 <= i + t - 3 < length:
                    mixed[channel, i] += p["kernel"][channel, 0, t] * strip[channel, i + t - 3]
    out = []
    for group in mixed.split(3):
        centred = group - group.mean()
        out.append(centred / (centred.square().mean() + 1e-5).sqrt())
    normal = torch.cat(out) * p["weight"][:, None] + p["bias"][:, None]
    return normal.apply_(sigmoid)


def rows_and_columns_gate(op: Operator) -> None:
    p = given("efficient-local-attention")
    rows, columns = p["grid"]
    gates = []
    for image in p["x"][..., 0].reshape(2, 6, rows, columns):
        down, across = strip_gate(image.sum(2) / columns, p), strip_gate(image.sum(1) / rows, p)
        gates.append((down[:, :, None] * across[:, None]).flatten(1))
    gate = torch.stack(gates)
    out, found = op(**p)
    torch.testing.assert_close(out, gate[..., None] * p["v"])
    torch.testing.assert_close(found.dense(), torch.diag_embed(gate))
    open_wide = {**p, "weight": torch.zeros(6).double(), "bias": torch.full((6,), 1e3).double()}
    torch.testing.assert_close(op(**open_wide)[0], p["v"])


def every_subspace_has_its_softmax(op: Operator) -> None:
    p = given("ultra-lightweight-subspace-attention")
    rows, columns = p["grid"]
    gate = torch.zeros(2, 2, 12, dtype=torch.float64)
    for b in range(2):
        for h in range(2):
            seen = (p["x"][b, h] * p["scale"][h] + p["shift"][h]).clamp(min=0)
            scores = torch.zeros(12, dtype=torch.float64)
            for i in range(12):
                near = [
                    y * columns + x
                    for y in range(max(0, i // columns - 1), min(rows, i // columns + 2))
                    for x in range(max(0, i % columns - 1), min(columns, i % columns + 2))
                ]
                scores[i] = (seen[near].amax(0) * p["point"][h]).sum() + p["point_shift"][h]
            weights = scores.clamp(min=0).exp()
            gate[b, h] = 1 + weights / weights.sum()
    out, found = op(**p)
    torch.testing.assert_close(out, gate[..., None] * p["v"])
    torch.testing.assert_close(found.native(), gate)
    torch.testing.assert_close(found.row_sums().sum(2), torch.full((2, 2), 13.0).double())


def one_body_serves_all_scales(op: Operator) -> None:
    p = given("medusa")
    own = torch.einsum("bhne,he->bn", p["x"], p["head"][:6].view(2, 3))
    # A body whose decoder does nothing leaves the head's own weights.
    silent = {**p, "decoder": torch.zeros_like(p["decoder"])}
    gate = torch.sigmoid(own + p["head"][7])
    out, found = op(**silent)
    torch.testing.assert_close(out, gate[:, None, :, None] * p["v"])
    torch.testing.assert_close(found.native(), gate[:, None].expand(2, 2, 12))
    # A constant body with taps at their centres: its attention is the same number everywhere, on any grid.
    encoder, decoder = torch.zeros_like(p["encoder"]), torch.zeros_like(p["decoder"])
    encoder[:, :, 1, 1], decoder[:, :, 1, 1] = p["encoder"][:, :, 1, 1], p["decoder"][:, :, 1, 1]
    body = torch.ones_like(p["body"]) * torch.tensor([0.5, -1.0, 2.0]).double()[:, None, None]
    number = encoder[:, :, 1, 1] @ body[0, :, 0, 0]
    number = (decoder[0, :, 1, 1] * number.clamp(min=0)).sum()
    gate = torch.sigmoid(own + p["head"][6] * number + p["head"][7])
    out, found = op(**{**p, "encoder": encoder, "decoder": decoder, "body": body})
    torch.testing.assert_close(out, gate[:, None, :, None] * p["v"])
    torch.testing.assert_close(found.native(), gate[:, None].expand(2, 2, 12))


def one_convolution_gates_places(op: Operator) -> None:
    p = given("little-bit-attention")
    scores = torch.einsum("bhne,he->bn", p["x"], p["weight"].view(2, 3)) + p["bias"]
    gate = scores.clone().apply_(sigmoid)
    out, found = op(**p)
    torch.testing.assert_close(out, gate[:, None, :, None] * p["v"])
    torch.testing.assert_close(found.native(), gate[:, None].expand(2, 2, 12))


def the_wave_scales_rows_of_the_image(op: Operator) -> None:
    p = given("attentive-waveblock")
    calm = round(0.3 * p["grid"][0])
    assert (p["grid"], p["start"], calm) == ((3, 4), 1, 1)
    wave = torch.tensor([2.0] * 4 + [1.0] * 4 + [2.0] * 4, dtype=torch.float64)
    weights = torch.zeros(2, 2, 12, 12, dtype=torch.float64)
    for i in range(12):
        for j in range(12):
            weights[:, :, i, j] = ((wave[i] * p["q"][:, :, i]) * (wave[j] * p["k"][:, :, j])).sum(-1) / 12
    out, found = op(**p)
    torch.testing.assert_close(out, weights @ (wave[:, None] * p["v"]))
    torch.testing.assert_close(found.dense(), weights * wave)
    still, _ = op(**{**p, "wave": 1.0})
    torch.testing.assert_close(still, p["q"] @ p["k"].mT @ p["v"] / 12)


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "efficient-local-attention": rows_and_columns_gate,
    "ultra-lightweight-subspace-attention": every_subspace_has_its_softmax,
    "medusa": one_body_serves_all_scales,
    "little-bit-attention": one_convolution_gates_places,
    "attentive-waveblock": the_wave_scales_rows_of_the_image,
}


def test_convolution_groups_of_the_large_versions() -> None:
    """One group of all channels is a dense convolution over channels and places."""
    p = given("efficient-local-attention")
    dense = torch.randn(6, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone = torch.zeros_like(dense)
    alone[range(6), range(6)] = p["kernel"][:, 0]
    torch.testing.assert_close(
        efficient_local_attention(**{**p, "kernel": alone})[0], efficient_local_attention(**p)[0]
    )
    assert not torch.allclose(efficient_local_attention(**{**p, "kernel": dense})[0], efficient_local_attention(**p)[0])


def test_refusals() -> None:
    p = given("efficient-local-attention")
    with pytest.raises(WorkbenchError, match="groups divides the 6 channels"):
        efficient_local_attention(**{**p, "groups": 4})
    with pytest.raises(WorkbenchError, match="odd number of taps"):
        efficient_local_attention(**{**p, "kernel": p["kernel"][..., :4]})
    p = given("attentive-waveblock")
    with pytest.raises(WorkbenchError, match=r"calm rows start at 0 \.\. 2; got start=3"):
        waveblock_non_local(**{**p, "start": 3})
    with pytest.raises(WorkbenchError, match="grid is 2 positive sides with 12 cells"):
        waveblock_non_local(**{**p, "grid": (5, 2)})
    with pytest.raises(WorkbenchError, match=r"head is floating point \[8\]"):
        variants()["medusa"](**given("medusa", head=torch.ones(3)))


def test_waves_over_many_places_need_no_pairs() -> None:
    q, k, v = (torch.randn(1, 1, 40_000, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    out, found = waveblock_non_local(q, k, v, grid=(200, 200), start=3)
    torch.testing.assert_close(found.rows(39_999, 40_000) @ v, out[:, :, 39_999:], rtol=1e-3, atol=1e-3)
