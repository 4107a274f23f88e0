"""RCMHA: filters that do nothing leave Transformer-XL; others against torch's grouped convolution."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.rcmha import convolved, rcmha_attention
from workbench.mixers.relative import transformer_xl_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]
FILTERS = ("q_filter", "k_filter", "v_filter")


def drawn(tokens: int = 6) -> dict[str, Any]:
    shapes = {
        "q": (2, 4, tokens, 4), "k": (2, 2, tokens, 4), "v": (2, 2, tokens, 3), "relative": (4, tokens, 4),
        "q_filter": (4, 4, 3), "k_filter": (2, 4, 3), "v_filter": (2, 3, 3),
        "content_bias": (4, 4), "position_bias": (4, 4),
    }  # fmt: skip
    return example_tensors(8, torch.float64, **shapes)


def by_torch(x: Tensor, taps: Tensor, ahead: int = 0) -> Tensor:
    """Depth-wise ``conv1d`` over the tokens, channel by channel."""
    b, h, n, e = x.shape
    width = taps.shape[2]
    flat = pad(x.transpose(2, 3).reshape(b, h * e, n), (width - 1 - ahead, ahead))
    return conv1d(flat, taps.flip(-1).reshape(h * e, 1, width), groups=h * e).view(b, h, e, n).transpose(2, 3)


def scores_of(given: dict[str, Any], q: Tensor, k: Tensor) -> Tensor:
    n = q.shape[2]
    scores = torch.full((2, 4, n, n), -torch.inf, dtype=torch.float64)
    keys = k.repeat_interleave(2, 1)
    for i in range(n):
        for j in range(i + 1):
            content = ((q[:, :, i] + given["content_bias"]) * keys[:, :, j]).sum(-1)
            place = ((q[:, :, i] + given["position_bias"]) * given["relative"][:, n - 1 + j - i]).sum(-1)
            scores[:, :, i, j] = (content + place) / 2
    return scores


def single_taps_leave_transformer_xl(op: Operator) -> None:
    """Filters of one tap at the token itself do nothing; random ones are torch's depth-wise convolution of q, k and v."""
    given = drawn()
    none = {name: torch.eye(3, dtype=torch.float64)[0].expand_as(given[name]) for name in FILTERS}
    out, found = op(**{**given, **none}, mask=Mask(causal=True))
    pattern = scores_of(given, given["q"], given["k"]).softmax(-1)
    torch.testing.assert_close(found.dense(), pattern)
    torch.testing.assert_close(out, pattern @ given["v"].repeat_interleave(2, 1))
    out, found = op(**given, mask=Mask(causal=True))
    q, k, v = (by_torch(given[name], given[f"{name}_filter"]) for name in ("q", "k", "v"))
    pattern = scores_of(given, q, k).softmax(-1)
    torch.testing.assert_close(out, pattern @ v.repeat_interleave(2, 1))
    torch.testing.assert_close(found.native().dense(), pattern)


IDENTITIES: dict[str, Callable[[Operator], None]] = {"rcmha": single_taps_leave_transformer_xl}


def test_the_map_is_the_pattern_times_the_band_of_each_channel() -> None:
    given = drawn()
    _, found = rcmha_attention(**given, mask=Mask(causal=True))
    inner = found.native()
    assert (inner.value_space, found.value_space) == ("post-conv V", "raw V")
    total = torch.zeros(2, 4, 6, 6, dtype=torch.float64)
    for c in range(3):
        band = torch.zeros(2, 6, 6, dtype=torch.float64)
        for i in range(6):
            for t in range(min(3, i + 1)):
                band[:, i, i - t] = given["v_filter"][:, c, t]
        wanted = inner.dense() @ band.repeat_interleave(2, 0)
        torch.testing.assert_close(found.channel(c).dense(), wanted)
        total += wanted / 3
    torch.testing.assert_close(found.dense(), total)
    torch.testing.assert_close(found.received(), total.sum(2))
    torch.testing.assert_close(found.row_sums(), total.sum(3))
    with pytest.raises(Refused, match="no distribution"):
        found.entropy()
    with pytest.raises(WorkbenchError, match="channel 3 of 3"):
        found.channel(3)


def test_two_sided_filters() -> None:
    given = drawn()
    torch.testing.assert_close(convolved(given["v"], given["v_filter"], 1), by_torch(given["v"], given["v_filter"], 1))
    out, found = rcmha_attention(**given, mask=Mask(), first=-3)
    torch.testing.assert_close(found.matvec(given["v"]), out)
    values = (found.rmatvec(out) * given["v"]).sum()
    torch.testing.assert_close(values, (out * out).sum())


def test_filters_over_one_token() -> None:
    given = drawn(1)
    out, found = rcmha_attention(**given, mask=Mask(causal=True))
    torch.testing.assert_close(out, (given["v"] * given["v_filter"][:, None, :, 0]).repeat_interleave(2, 1))
    torch.testing.assert_close(found.matvec(given["v"]), out)


def test_the_values_alone_convolved_is_a_product_with_transformer_xl() -> None:
    given = drawn()
    none = {name: torch.eye(3, dtype=torch.float64)[0].expand_as(given[name]) for name in FILTERS[:2]}
    out, _ = rcmha_attention(**{**given, **none}, mask=Mask(causal=True))
    names = ("q", "k", "relative", "content_bias", "position_bias")
    wanted, _ = transformer_xl_attention(
        **{name: given[name] for name in names}, v=by_torch(given["v"], given["v_filter"]), mask=Mask(causal=True)
    )
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"q_filter": torch.zeros(4, 4, 2)}, "q_filter is floating point"),
        ({"v_filter": torch.zeros(4, 3, 3)}, "v_filter is floating point"),
        ({"mask": Mask(causal=True, offset=1)}, "mask.offset"),
        ({name: torch.zeros(4 if name == "q_filter" else 2, 4 if name != "v_filter" else 3, 2) for name in FILTERS}
         | {"mask": Mask()}, "odd number of taps"),
    ],
)  # fmt: skip
def test_wrong_filters_are_named(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(WorkbenchError, match=told):
        rcmha_attention(**{**drawn(), "mask": Mask(causal=True), **changed})
