"""Calls whose kernels ``compile_ahead.py`` compiles: shapes of real models, on CPU tensors that are never computed with."""

import torch
from torch import Tensor

from workbench.kernels.flash_attention import flash_attention
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Scores
from workbench.kernels.softmax_backward import softmax_backward


def _inputs(
    dtype: torch.dtype, width: int, values: int, heads: int = 32, groups: int = 8, n: int = 256
) -> list[Tensor]:
    shapes = ((heads, width), (groups, width), (groups, values))
    return [torch.zeros(1, h, n, e, dtype=dtype) for h, e in shapes]


def forward() -> None:
    """Without a map and with blocks smaller than, unlike and larger than a tile; options; block-sparse; other widths."""
    q, k, v = _inputs(torch.bfloat16, 128, 128)
    blocks = torch.ones(1, 32, 4, 4, dtype=torch.bool)
    for block in (None, 64, 100, 512):
        flash_attention(q, k, v, block=block, impl="triton")
    flash_attention(q, k, v, mask=Mask(causal=True, window=64), softcap=30.0, sink=torch.zeros(32), impl="triton")
    flash_attention(q, k, v, mask=Mask(causal=True, blocks=blocks, side=64), block=64, reduce="sum", impl="triton")
    flash_attention(*_inputs(torch.float32, 80, 80), block=64, impl="triton")
    flash_attention(*_inputs(torch.float16, 256, 256, 4, 4), block=128, impl="triton")


def backward() -> None:
    """Of the output alone; with block sums; block-sparse; at another width."""
    blocks = torch.ones(1, 32, 4, 4, dtype=torch.bool)
    cases = (
        (torch.bfloat16, 128, Mask(causal=True), None),
        (torch.bfloat16, 128, Mask(causal=True), 64),
        (torch.bfloat16, 128, Mask(blocks=blocks, side=64), None),
        (torch.float32, 80, Mask(causal=True), None),
    )
    for dtype, width, mask, block in cases:
        q, k, v = _inputs(dtype, width, width)
        sums = None if block is None else torch.zeros(1, 32, 4, 4)
        softmax_backward(
            Scores(q, k, mask), torch.zeros(1, 32, 256), out=q, d_out=q, v=v, d_blocks=sums, block=block, impl="triton"
        )
