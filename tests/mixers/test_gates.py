"""Channel gates against their formulas, one channel at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import UnknownName, WorkbenchError
from workbench.mixers.gates import eca_kernel_size, efficient_channel_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def given(name: str, tokens: int = 7, **changes: Any) -> dict[str, Any]:
    return {**variants()[name].example(3, tokens, torch.float64), **changes}


def sigmoid(value: Tensor) -> Tensor:
    return 1 / (1 + (-value).exp())


def holds(op: Operator, arguments: dict[str, Any], gate: Tensor) -> None:
    """Output, map and native map are those of a gate ``[B, channels]``."""
    v = arguments["v"]
    out, found = op(**arguments)
    apart = gate.reshape(v.shape[:3])
    torch.testing.assert_close(out, apart[..., None] * v)
    torch.testing.assert_close(found.native(), apart)
    torch.testing.assert_close(found.dense(), torch.diag_embed(apart))
    assert found.domain == "channel"


def eca_is_a_convolution_over_channels(op: Operator) -> None:
    some = given("efficient-channel-attention")
    x, kernel = some["x"], some["kernel"]
    means = [[float(x[b, c // 4, c % 4].sum()) / 7 for c in range(8)] for b in range(2)]
    gate = torch.zeros(2, 8, dtype=torch.float64)
    for b in range(2):
        for c in range(8):
            total = sum(float(kernel[t]) * means[b][c + t - 1] for t in range(3) if 0 <= c + t - 1 < 8)
            gate[b, c] = 1 / (1 + math.exp(-total))
    holds(op, some, gate)
    holds(op, {**some, "kernel": torch.full_like(kernel, 0.0)}, torch.full_like(gate, 0.5))


def each_resolution_has_its_matrices(op: Operator) -> None:
    some = given("resolution-aware-channel-attention")
    for resolution in (0, 1):
        hidden = torch.einsum("hc,bc->bh", some["squeeze"][resolution], some["x"].flatten(1, 2).sum(2) / 7).clamp(min=0)
        gate = sigmoid(torch.einsum("ch,bh->bc", some["expand"][resolution], hidden))
        holds(op, {**some, "resolution": resolution}, gate)


def contrast_is_deviation_plus_mean(op: Operator) -> None:
    some = given("contrast-aware-channel-attention")
    x = some["x"].flatten(1, 2)
    mean = x.sum(2) / 7
    contrast = mean + (((x - mean[..., None]) ** 2).sum(2) / 7) ** 0.5
    hidden = (torch.einsum("hc,bc->bh", some["squeeze"], contrast) + some["squeeze_bias"]).clamp(min=0)
    holds(op, some, sigmoid(torch.einsum("ch,bh->bc", some["expand"], hidden) + some["expand_bias"]))
    open_wide = {**some, "expand_bias": torch.full_like(some["expand_bias"], 1e3)}
    holds(op, open_wide, torch.ones(2, 8, dtype=torch.float64))


def the_sentence_chooses_channels(op: Operator) -> None:
    some = given("sentence-attention")
    image, text = some["squeeze"][:, :8], some["squeeze"][:, 8:]
    hidden = torch.einsum("hc,bc->bh", image, some["x"].flatten(1, 2).sum(2) / 7)
    hidden = (hidden + torch.einsum("hs,bs->bh", text, some["sentence"])).clamp(min=0)
    holds(op, some, sigmoid(torch.einsum("ch,bh->bc", some["expand"], hidden)))


def the_classes_choose_channels(op: Operator) -> None:
    some = given("class-semantics-attention")
    scores = some["semantics"].sum(2) / some["semantics"].shape[2]
    hidden = torch.einsum("hk,bk->bh", some["squeeze"], scores).clamp(min=0)
    holds(op, some, sigmoid(torch.einsum("ch,bh->bc", some["expand"], hidden)))


def neighbours_gate_every_token(op: Operator) -> None:
    some = given("convolutional-glu", 12)
    x, (rows, columns) = some["x"], some["grid"]
    gate = torch.zeros_like(x)
    for b in range(2):
        for c in range(3):
            for i in range(rows * columns):
                total = float(some["bias"][c])
                for dy in (-1, 0, 1):
                    for dx in (-1, 0, 1):
                        y, z = i // columns + dy, i % columns + dx
                        if 0 <= y < rows and 0 <= z < columns:
                            total += float(some["kernel"][c, dy + 1, dx + 1] * x[b, c, y * columns + z, 0])
                gate[b, c, i] = total * 0.5 * (1 + math.erf(total / math.sqrt(2)))
    out, found = op(**some)
    torch.testing.assert_close(out, gate * some["v"])
    torch.testing.assert_close(found.dense(), torch.diag_embed(gate[..., 0]))


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "efficient-channel-attention": eca_is_a_convolution_over_channels,
    "resolution-aware-channel-attention": each_resolution_has_its_matrices,
    "contrast-aware-channel-attention": contrast_is_deviation_plus_mean,
    "sentence-attention": the_sentence_chooses_channels,
    "class-semantics-attention": the_classes_choose_channels,
    "convolutional-glu": neighbours_gate_every_token,
}


def test_size_of_the_eca_kernel() -> None:
    assert [eca_kernel_size(c) for c in (2, 16, 64, 256, 512)] == [3, 3, 3, 5, 5]


def test_a_constant_channel_has_a_finite_gradient() -> None:
    some = given("contrast-aware-channel-attention", 1)
    x = some["x"].requires_grad_()
    out, _ = variants()["contrast-aware-channel-attention"](**some)
    assert torch.isfinite(torch.autograd.grad(out.sum(), x)[0]).all()


def test_wide_heads_have_a_map_per_channel() -> None:
    some = given("convolutional-glu", 12)
    wide = {name: some[name].transpose(1, 3) for name in ("x", "v")}
    out, found = variants()["convolutional-glu"](**{**some, **wide})
    narrow, _ = variants()["convolutional-glu"](**some)
    torch.testing.assert_close(out, narrow.transpose(1, 3))
    torch.testing.assert_close(found.matvec(wide["v"]), out)


def test_refusals() -> None:
    some = given("efficient-channel-attention")
    with pytest.raises(WorkbenchError, match="odd number of taps"):
        efficient_channel_attention(some["x"], some["v"], torch.ones(4, dtype=torch.float64))
    with pytest.raises(WorkbenchError, match="x is floating point"):
        efficient_channel_attention(some["x"][:, :1], some["v"], some["kernel"])
    with pytest.raises(UnknownName, match="no resolution '2'"):
        variants()["resolution-aware-channel-attention"](**given("resolution-aware-channel-attention", resolution=2))
    with pytest.raises(WorkbenchError, match="grid is 2 positive sides with 12 cells"):
        variants()["convolutional-glu"](**given("convolutional-glu", 12, grid=(3, 5)))
