"""Calls whose kernels ``compile_ahead.py`` compiles: shapes of real models, on CPU tensors that are never computed with."""

import torch
from torch import Tensor

from workbench.kernels.flash_attention import flash_attention
from workbench.kernels.mask import Mask


def _inputs(
    dtype: torch.dtype, width: int, values: int, heads: int = 32, groups: int = 8, n: int = 256
) -> list[Tensor]:
    shapes = ((heads, width), (groups, width), (groups, values))
    return [torch.zeros(1, h, n, e, dtype=dtype, requires_grad=True) for h, e in shapes]


def forward() -> None:
    """Without a map and with blocks smaller than, unlike and larger than a tile; options; block-sparse; other widths."""
    q, k, v = _inputs(torch.bfloat16, 128, 128)
    blocks = torch.ones(1, 32, 4, 4, dtype=torch.bool)
    with torch.no_grad():
        for block in (None, 64, 100, 512):
            flash_attention(q, k, v, block=block, impl="triton")
        flash_attention(q, k, v, mask=Mask(causal=True, window=64), softcap=30.0, sink=torch.zeros(32), impl="triton")
        flash_attention(q, k, v, mask=Mask(causal=True, blocks=blocks, side=64), block=64, reduce="sum", impl="triton")
        flash_attention(*_inputs(torch.float32, 80, 80), block=64, impl="triton")
        flash_attention(*_inputs(torch.float16, 256, 256, 4, 4), block=128, impl="triton")


def backward() -> None:
    """Output alone; with block sums; block-sparse; at other widths."""
    blocks = torch.ones(1, 32, 4, 4, dtype=torch.bool)
    for mask, block in ((Mask(causal=True), None), (Mask(causal=True), 64), (Mask(blocks=blocks, side=64), None)):
        q, k, v = _inputs(torch.bfloat16, 128, 128)
        found = flash_attention(q, k, v, mask=mask, block=block, reduce="sum", impl="triton")
        (found.output.sum() + sum(m.sum() for m in found.blocks.values())).backward()
    flash_attention(*_inputs(torch.float32, 80, 80), impl="triton").output.sum().backward()
    flash_attention(*_inputs(torch.float16, 256, 256, 4, 4), impl="triton").output.sum().backward()
