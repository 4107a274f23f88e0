"""Selective dense attention against weighted sums of layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.mixers.selective import selective_channel_attention, selective_place_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def example(name: str, count: int = 12) -> dict[str, Any]:
    return variants()[name].example(12, count, torch.float64)


def layers_of(x: Tensor) -> list[Tensor]:
    """Three layers ``[B, N, C]``."""
    return list(x.transpose(1, 2).flatten(2).chunk(3, 1))


def checked_fusion(op: Operator, given: dict[str, Any], shares: Tensor) -> None:
    """``shares`` ``[L, B, N, C]``."""
    wanted = sum(share * layer for share, layer in zip(shares, layers_of(given["v"]), strict=True))
    out, found = op(**given)
    torch.testing.assert_close(out.transpose(1, 2).flatten(2), wanted)
    inner = found.native().dense()
    blocks = torch.cat([torch.diag_embed(share.transpose(1, 2)) for share in shares], 3)
    torch.testing.assert_close(inner, blocks)
    torch.testing.assert_close(found.row_sums(), torch.ones(2, 2, 12, dtype=torch.float64))


def channels_choose_their_layer(op: Operator) -> None:
    given = example("selective-channel-attention")
    summed = sum(layers_of(given["x"])).mean(1)
    hidden = (summed @ given["squeeze"].T).clamp(min=0)
    odds = torch.stack([(hidden @ part.T).exp() for part in given["expand"]])
    shares = (odds / odds.sum(0))[:, :, None].expand(3, 2, 12, 6)
    checked_fusion(op, given, shares)
    even = {**given, "expand": torch.zeros_like(given["expand"])}
    torch.testing.assert_close(op(**even)[0].transpose(1, 2).flatten(2), sum(layers_of(given["v"])) / 3)


def places_choose_their_layer(op: Operator) -> None:
    given = example("selective-place-attention")
    summed = sum(layers_of(given["x"]))
    summary = torch.stack([summed.mean(2), summed.amax(2)], 1).unflatten(2, given["grid"])
    odds = torch.nn.functional.conv2d(summary, given["kernel"], padding=1).flatten(2).exp()
    shares = (odds / odds.sum(1, keepdim=True)).transpose(0, 1)[..., None].expand(3, 2, 12, 6)
    checked_fusion(op, given, shares)


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "selective-channel-attention": channels_choose_their_layer,
    "selective-place-attention": places_choose_their_layer,
}


def test_one_layer_is_passed_on() -> None:
    given = example("selective-channel-attention")
    out, found = selective_channel_attention(**{**given, "expand": given["expand"][:1], "layers": 1})
    torch.testing.assert_close(out, given["v"])
    assert found.shape == (2, 2, 36, 36)


def test_shapes_that_do_not_fit_are_refused() -> None:
    given = example("selective-channel-attention")
    for name, value, message in (
        ("layers", 5, "how many feature maps the 36 places belong to; got 5"),
        ("expand", given["expand"][:2], r"expand is floating point \[3, 6, 4\]"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            selective_channel_attention(**{**given, name: value})
    given = example("selective-place-attention")
    with pytest.raises(WorkbenchError, match="odd size"):
        selective_place_attention(**{**given, "kernel": given["kernel"][..., :2, :2]})
