"""Channel attention against the formulas of its papers in their own layout, tokens first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.channel_attention import davit_channel_attention_v2, davit_window_attention, position_attention
from workbench.mixers.softmax import softmax_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def example(name: str, tokens: int = 9) -> dict[str, Any]:
    return variants()[name].example(9, tokens, torch.float64)


def tokens_first(given: dict[str, Any]) -> list[Tensor]:
    return [given[name].transpose(2, 3) for name in ("q", "k", "v")]


def the_map_of_keys_and_values_takes_queries(op: Operator) -> None:
    given = example("davit-channel-attention")
    q, k, v = tokens_first(given)
    pattern = ((k * 4**-0.5).transpose(-1, -2) @ v).softmax(-1)
    out, found = op(**given)
    torch.testing.assert_close(found.dense(), pattern)
    torch.testing.assert_close(out, pattern @ q.transpose(-1, -2))
    torch.testing.assert_close(found.row_sums(), torch.ones(2, 2, 4, dtype=torch.float64))
    assert found.domain == found.heads([1]).domain == "channel"


def the_map_of_queries_and_keys_takes_values(op: Operator) -> None:
    given = example("davit-channel-attention-v2")
    q, k, v = tokens_first(given)
    pattern = ((q * 9**-0.5).transpose(-1, -2) @ k).softmax(-1)
    out, found = op(**given)
    torch.testing.assert_close(found.dense(), pattern)
    torch.testing.assert_close(out.transpose(2, 3), (pattern @ v.transpose(-1, -2)).transpose(-1, -2))
    # Token attention of the transposed image: channels are its tokens.
    twin, _ = softmax_attention(given["q"], given["k"], given["v"], mask=Mask(), scale=9**-0.5)
    torch.testing.assert_close(out, twin)


def windows_are_filled_with_zeros(op: Operator) -> None:
    given = example("davit-window-attention", 12)  # 3 x 4 tokens, windows of 3: the second window has one column
    q, k, v = given["q"], given["k"].repeat_interleave(2, 1), given["v"].repeat_interleave(2, 1)
    wanted = torch.zeros(2, 4, 12, 12, dtype=torch.float64)
    for members, missing in (([0, 1, 2, 4, 5, 6, 8, 9, 10], 0), ([3, 7, 11], 6)):
        at = torch.tensor(members)
        odds = (q[:, :, at] @ k[:, :, at].transpose(-1, -2) * 6**-0.5).exp()
        wanted[:, :, at[:, None], at] = odds / (odds.sum(-1, keepdim=True) + missing)
    out, found = op(**given)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ v)
    whole = {name: given[name][:, :, :9] for name in ("q", "k", "v")}
    out, _ = op(**whole, grid=(3, 3), window=3)
    scores = whole["q"] @ whole["k"].repeat_interleave(2, 1).transpose(-1, -2) * 6**-0.5
    torch.testing.assert_close(out, scores.softmax(-1) @ whole["v"].repeat_interleave(2, 1))


def the_least_alike_channels_come_first(op: Operator) -> None:
    given = example("channel-attention-module")
    energy = given["x"] @ given["x"].transpose(-1, -2)
    pattern = (energy.amax(-1, keepdim=True) - energy).softmax(-1)
    out, found = op(**given)
    torch.testing.assert_close(found.dense(), pattern)
    torch.testing.assert_close(out, pattern @ given["v"])
    torch.testing.assert_close(found.row_sums(), torch.ones(2, 1, 5, dtype=torch.float64))


def plain_unscaled_attention(op: Operator) -> None:
    given = example("position-attention-module")
    pattern = torch.einsum("bhie,bhje->bhij", given["q"], given["k"]).softmax(-1)
    out, found = op(**given)
    torch.testing.assert_close(found.dense(), pattern)
    torch.testing.assert_close(out, torch.einsum("bhij,bhjc->bhic", pattern, given["v"]))


def only_positive_likeness_counts(op: Operator) -> None:
    given = example("sparse-global-self-attention")
    cosine = torch.stack(
        [
            torch.stack(
                [torch.cosine_similarity(given["q"][:, :, i], given["k"][:, :, j], dim=-1) for j in range(4)], -1
            )
            for i in range(4)
        ],
        2,
    )
    wanted = (cosine * given["temperature"][:, None, None]).clamp(min=0)
    out, found = op(**given)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ given["v"])
    assert (found.dense() == 0).any()


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "davit-channel-attention": the_map_of_keys_and_values_takes_queries,
    "davit-channel-attention-v2": the_map_of_queries_and_keys_takes_values,
    "davit-window-attention": windows_are_filled_with_zeros,
    "channel-attention-module": the_least_alike_channels_come_first,
    "position-attention-module": plain_unscaled_attention,
    "sparse-global-self-attention": only_positive_likeness_counts,
}


def test_windows_that_the_image_fills_lose_nothing() -> None:
    given = example("davit-window-attention", 9)
    _, found = davit_window_attention(**given)
    assert found.row_sum == "1"
    _, found = davit_window_attention(**{**given, "window": 2})
    assert found.row_sum == "<=1"


def test_position_attention_hides_padding() -> None:
    given = example("position-attention-module", 4)
    out, found = position_attention(**given, mask=Mask(keys=torch.zeros(1, 4, dtype=torch.bool)))
    assert (out == 0).all()
    assert (found.dense() == 0).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    given = example("davit-channel-attention-v2")
    with pytest.raises(WorkbenchError, match=r"k is floating point \[2, 2, 4, 9\]"):
        davit_channel_attention_v2(given["q"], given["k"][:, :, :2], given["v"])
    given = example("davit-window-attention", 12)
    with pytest.raises(WorkbenchError, match="at least one token a side"):
        davit_window_attention(**{**given, "window": 0})
