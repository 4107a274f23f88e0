"""Calls whose kernels ``compile_ahead.py`` compiles."""

import torch

from workbench.kernels.linear_attention import REDUCTIONS, linear_attention


def everything() -> None:
    """Forward and backward: bfloat16 of a large model, float32 at its widest and of an odd width, without decay."""
    _both(torch.bfloat16, 32, 8, 128, 128, 256, torch.zeros(32))
    _both(torch.float32, 4, 2, 200, 256, 100, None)


def _both(dtype: torch.dtype, h: int, g: int, e: int, w: int, n: int, decay: torch.Tensor | None) -> None:
    q, k, v = (
        torch.zeros(1, heads, n, wide, dtype=dtype, requires_grad=True) for heads, wide in ((h, e), (g, e), (g, w))
    )
    state = torch.zeros(1, h, e, w, requires_grad=True)
    found = linear_attention(q, k, v, decay, state=state, block=64, reduce=REDUCTIONS, impl="triton")
    assert found.state is not None
    (found.output.float().sum() + found.state.sum()).backward()
