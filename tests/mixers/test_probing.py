"""Attentive pooling against its formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.probing import efficient_probing, gated_class_attention, low_rank_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def probed() -> dict[str, Tensor]:
    return example_tensors(2, torch.float64, queries=(3, 12), x=(2, 7, 12), v=(2, 3, 7, 4))


def queries_pool_their_channels(op: Operator) -> None:
    """Each query by itself: softmax of its products with raw tokens, over its own group of channels; a query of zeros pools the
    mean."""
    given = probed()
    given["queries"][2] = 0
    out, found = op(**given)
    for b in range(2):
        for m in range(3):
            weights = (given["x"][b] @ given["queries"][m] / math.sqrt(12)).softmax(0)
            torch.testing.assert_close(found.dense()[b, m, 0], weights)
            torch.testing.assert_close(out[b, m, 0], weights @ given["v"][b, m])
    torch.testing.assert_close(out[:, 2, 0], given["v"][:, 2].mean(1))


def factored() -> dict[str, Tensor]:
    shapes = {"x": (2, 7, 6), "v": (2, 1, 7, 5), "context": (2, 6), "left": (3, 6), "right": (3, 6)}
    return example_tensors(3, torch.float64, **shapes)


def affinities_of_rank_one(op: Operator) -> None:
    """The bilinear form x_j^T (l_h r_h^T) c, head by head; a head whose factor is zero pools the mean."""
    given = factored()
    given["right"][1] = 0
    out, found = op(**given)
    for b in range(2):
        for h in range(3):
            affinity = torch.outer(given["left"][h], given["right"][h])
            weights = (given["x"][b] @ affinity @ given["context"][b]).softmax(0)
            torch.testing.assert_close(found.dense()[b, h, 0], weights)
            torch.testing.assert_close(out[b, h, 0], weights @ given["v"][b, 0])
    torch.testing.assert_close(out[:, 1, 0], given["v"][:, 0].mean(1))


def masked() -> dict[str, Tensor]:
    given = example_tensors(4, torch.float64, q=(2, 4, 1, 6), k=(2, 2, 7, 6), v=(2, 2, 7, 6), gate=(4, 6))
    return {**given, "gate": given["gate"].sigmoid()}


def channels_masked_for_a_task(op: Operator) -> None:
    """Queries, keys and outputs are masked; an open gate is class attention, and a closed channel neither scores nor speaks."""
    given = masked()
    keys, values = (given[name].repeat_interleave(2, 1) for name in ("k", "v"))
    binary = (given["gate"] > 0.5).double()
    for gate in (given["gate"], torch.ones(4, 6, dtype=torch.float64), binary):
        m = gate[None, :, None]
        weights = ((given["q"] * m) @ (keys * m).transpose(-1, -2) / math.sqrt(6)).softmax(-1)
        out, found = op(**{**given, "gate": gate})
        torch.testing.assert_close(out, (weights @ values) * m)
        torch.testing.assert_close(found.dense(), weights * gate.mean(1)[None, :, None, None])
        torch.testing.assert_close(found.raw.dense(), weights)
    changed = {**given, "gate": binary, "q": given["q"] + (1 - binary)[:, None]}
    torch.testing.assert_close(op(**changed)[0], op(**{**given, "gate": binary})[0])


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "efficient-probing": queries_pool_their_channels,
    "low-rank-multi-head-attention": affinities_of_rank_one,
    "gated-class-attention": channels_masked_for_a_task,
}


def test_padding_gets_nothing() -> None:
    real = torch.tensor([[True] * 4 + [False] * 3])
    for operator, given in (
        (efficient_probing, probed()), (low_rank_attention, factored()), (gated_class_attention, masked()),
    ):  # fmt: skip
        out, found = operator(**given, mask=Mask(keys=real))
        assert not found.dense()[..., 4:].any()
        short = {
            name: x[:, :, :4] if name in ("k", "v") else x[:, :4] if name == "x" else x for name, x in given.items()
        }
        torch.testing.assert_close(out, operator(**short)[0])


def test_each_channel_has_its_map() -> None:
    given = masked()
    out, found = gated_class_attention(**given)
    values = given["v"].repeat_interleave(2, 1)
    torch.testing.assert_close((found.channel(2).dense() @ values)[..., 2], out[..., 2])


@pytest.mark.parametrize(
    ("operator", "given", "change", "words"),
    [
        (efficient_probing, probed(), {"queries": torch.zeros(3, 11)}, "queries is floating point"),
        (efficient_probing, probed(), {"v": torch.zeros(2, 2, 7, 4)}, "v is floating point"),
        (low_rank_attention, factored(), {"context": torch.zeros(2, 5)}, "context is floating point"),
        (low_rank_attention, factored(), {"v": torch.zeros(2, 3, 7, 5)}, "v is floating point"),
        (gated_class_attention, masked(), {"q": torch.zeros(2, 4, 2, 6).double()}, "q is floating point"),
        (gated_class_attention, masked(), {"gate": torch.zeros(6)}, "gate is floating point"),
    ],
)
def test_misfits_are_named(
    operator: Callable[..., Any], given: dict[str, Tensor], change: dict[str, Any], words: str
) -> None:
    with pytest.raises(WorkbenchError, match=words):
        operator(**{**given, **change})
