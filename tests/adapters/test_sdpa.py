"""Calls of torch's own attention, recorded from any code that makes them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from workbench.adapters.sdpa import capture_sdpa
from workbench.errors import Refused, WorkbenchError


def drawn(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


CASES = {
    "plain": ((2, 3, 5, 4), (2, 3, 7, 4), {}),
    "causal": ((2, 3, 5, 4), (2, 3, 5, 4), {"is_causal": True}),
    "causal, more keys": ((2, 3, 5, 4), (2, 3, 7, 4), {"is_causal": True}),
    "scale": ((2, 3, 5, 4), (2, 3, 7, 4), {"scale": 0.1}),
    "groups": ((2, 4, 5, 4), (2, 2, 7, 4), {"enable_gqa": True}),
    "bool mask": ((2, 3, 5, 4), (2, 3, 7, 4), {"attn_mask": torch.ones(5, 7).tril(1).bool()}),
    "float mask": ((2, 3, 5, 4), (2, 3, 7, 4), {"attn_mask": drawn((2, 1, 5, 7))[0]}),
    "three axes": ((2, 5, 4), (2, 7, 4), {"attn_mask": drawn((2, 5, 7))[0]}),
    "five axes": ((2, 3, 2, 5, 4), (2, 3, 2, 7, 4), {"attn_mask": drawn((2, 5, 7))[0]}),
}


@pytest.mark.parametrize("name", CASES)
def test_call(name: str) -> None:
    one, other, options = CASES[name]
    q, k, v = drawn(one, other, other)
    with capture_sdpa() as calls:
        out = functional.scaled_dot_product_attention(q, k, v, **options)
    assert torch.equal(out, functional.scaled_dot_product_attention(q, k, v, **options))
    (call,) = calls
    torch.testing.assert_close(call.map().matvec(call.values), call.output, atol=1e-12, rtol=0)
    assert call.output.numel() == out.numel()


def test_calls_of_a_module_and_dropout() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, dropout=0.5, batch_first=True).double()
    with capture_sdpa() as calls:
        layer(torch.randn(2, 6, 16, dtype=torch.float64))
    with pytest.raises(Refused, match="eval"):
        calls[0].map()
    module = nn.MultiheadAttention(16, 4, batch_first=True).double()
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    with capture_sdpa() as calls:
        module(x, x, x, need_weights=False)
    _, weights = module(x, x, x, average_attn_weights=False)
    torch.testing.assert_close(calls[0].map().dense(), weights.detach(), atol=1e-12, rtol=0)
    with capture_sdpa() as calls:
        functional.scaled_dot_product_attention(x[0], x[0], x[0])
    with pytest.raises(WorkbenchError, match="three axes"):
        calls[0].map()
