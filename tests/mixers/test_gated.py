"""Gates on the output of softmax attention: open gates, shut gates, and what a sink's key is worth under them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.gated import elementwise_gated_attention, gated_softmax_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def drawn(**more: tuple[int, ...]) -> dict[str, Any]:
    return example_tensors(3, torch.float64, q=(2, 4, 6, 4), k=(2, 2, 6, 4), v=(2, 2, 6, 3), **more)


def plain(given: dict[str, Any]) -> Tensor:
    return scaled_dot_product_attention(given["q"], given["k"], given["v"], is_causal=True, enable_gqa=True)


def open_gates_are_plain_attention(op: Operator) -> None:
    """A gate of 1 is softmax attention; any gate is what the rows sum to, and scales the head's output."""
    given = drawn(gate=(2, 4, 6))
    gate = given["gate"].sigmoid()
    opened, _ = op(**{**given, "gate": torch.ones_like(gate)}, mask=Mask(causal=True))
    torch.testing.assert_close(opened, plain(given))
    out, found = op(**{**given, "gate": gate}, mask=Mask(causal=True))
    torch.testing.assert_close(out, plain(given) * gate[..., None])
    torch.testing.assert_close(found.row_sums(), gate)
    torch.testing.assert_close(found.dense().sum(-1), gate)


def channels_are_gated_one_by_one(op: Operator) -> None:
    """Each channel is softmax attention times its own gate; the map of that channel says the same."""
    given = drawn(gate=(2, 4, 6, 3))
    gate = given["gate"].sigmoid()
    out, found = op(**{**given, "gate": gate}, mask=Mask(causal=True))
    torch.testing.assert_close(out, plain(given) * gate)
    scores = given["q"] @ given["k"].repeat_interleave(2, 1).transpose(-1, -2) / 2
    pattern = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(found.dense(), pattern * gate.mean(-1)[..., None])
    torch.testing.assert_close(found.matvec(given["v"]), plain(given) * gate)


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "headwise-gated-attention": open_gates_are_plain_attention,
    "elementwise-gated-attention": channels_are_gated_one_by_one,
}


def test_raw_pattern_and_gate_are_kept() -> None:
    given = drawn(gate=(2, 4, 6, 3))
    _, found = elementwise_gated_attention(**given, mask=Mask(causal=True))
    torch.testing.assert_close(found.raw.dense().sum(-1), torch.ones(2, 4, 6, dtype=torch.float64))
    torch.testing.assert_close(found.channel_gate, given["gate"])
    one = found.raw.dense() * given["gate"][..., 1:2]
    torch.testing.assert_close(found.channel(1).dense(), one)


def test_a_shut_gate_empties_a_sink() -> None:
    """All queries look at key 0; what it is worth is what their gates let through."""
    given = drawn(gate=(2, 4, 6))
    given["k"][:, :, 0] = 0
    given["q"][..., 0], given["k"][:, :, 0, 0] = 9.0, 9.0
    gate = torch.full((2, 4, 6), 0.01, dtype=torch.float64)
    _, found = gated_softmax_attention(**{**given, "gate": gate}, mask=Mask(causal=True))
    assert bool((found.raw.received()[..., 0] > 5).all())
    assert bool((found.received()[..., 0] < 0.07).all())


def test_a_gate_of_another_width_is_refused() -> None:
    given = drawn(gate=(2, 4, 6, 2))
    with pytest.raises(WorkbenchError, match="gate is floating point"):
        elementwise_gated_attention(**given, mask=Mask(causal=True))
