"""Calls whose kernels ``compile_ahead.py`` compiles."""

import torch

from workbench.kernels.mask import Mask
from workbench.kernels.scores import Relative
from workbench.kernels.sigmoid_attention import REDUCTIONS, STATS, sigmoid_attention


def everything() -> None:
    """Forward and backward: bfloat16 of a large model, float32 at its widest and of an odd width with every mask option."""
    _both(torch.bfloat16, 32, 8, 128, 128, 256, Mask(causal=True), None)
    some = torch.ones(1, 100, dtype=torch.bool)
    blocks = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    dense = some[:, None, None].expand(1, 1, 100, 100)
    mask = Mask(True, 40, 2, some.long(), some, dense, 0, some, blocks, 32)
    _both(torch.float32, 4, 2, 200, 256, 100, mask, Relative(torch.zeros(4, 199), -99))


def _both(dtype: torch.dtype, h: int, g: int, e: int, w: int, n: int, mask: Mask, bias: Relative | None) -> None:
    q, k, v = (
        torch.zeros(1, heads, n, wide, dtype=dtype, requires_grad=True) for heads, wide in ((h, e), (g, e), (g, w))
    )
    found = sigmoid_attention(q, k, v, mask=mask, bias=bias, block=64, reduce=REDUCTIONS, stats=STATS, impl="triton")
    assert found.received is not None
    assert found.row_sums is not None
    total = found.output.float().sum() + found.blocks["sum"].sum() + found.received.sum() + found.row_sums.sum()
    total.backward()
