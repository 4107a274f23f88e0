"""Calls for ``compile_ahead.py``: every kernel of the gated delta rule in shapes that models have. Nothing runs."""

import torch

from workbench.kernels.gated_delta_rule import delta_rows, gated_delta_rule


def kernels() -> None:
    """bfloat16 with 32 value heads on 8 key heads of width 128; float32 with the widest heads; an odd width in float16."""
    for dtype, e, v, tokens, block in (
        (torch.bfloat16, 128, 128, 512, 128),
        (torch.float32, 256, 256, 64, 16),
        (torch.float16, 80, 96, 100, 100),
    ):
        q = torch.zeros(1, 8, tokens, e, dtype=dtype, requires_grad=True)
        values = torch.zeros(1, 32, tokens, v, dtype=dtype)
        beta = torch.zeros(1, 32, tokens)
        state = torch.zeros(1, 32, e, v)
        maps = {"block": block, "reduce": ("sum", "abs", "max")}
        gated_delta_rule(q, q, values, beta, None, block=block, reduce="sum", impl="triton")
        found = gated_delta_rule(q, q, values, beta, beta, state=state, **maps, impl="triton")
        delta_rows(q, q, beta, beta, lo=10, hi=40, impl="triton")
        found.output.sum().backward()
