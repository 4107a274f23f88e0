"""Calls for ``compile_ahead.py``: every kernel of the gated delta rule in shapes that models have. Nothing runs."""

import torch

from workbench.kernels.gated_delta_rule import delta_rows, gated_delta_rule


def kernels() -> None:
    """bfloat16 with 32 value heads on 8 key heads of width 128, all kernels; float32 with an odd width, the output alone."""
    q, beta = torch.zeros(1, 8, 128, 128, dtype=torch.bfloat16), torch.zeros(1, 32, 128)
    v = torch.zeros(1, 32, 128, 128, dtype=torch.bfloat16)
    gated_delta_rule(q, q, v, beta, beta, block=64, reduce="sum", impl="triton")
    delta_rows(q, q, beta, beta, lo=10, hi=100, impl="triton")
    v.requires_grad_()
    found = gated_delta_rule(q, q, v, beta, beta, block=64, reduce=("sum", "abs", "max"), impl="triton")
    found.output.sum().backward()
    q, v = torch.zeros(1, 8, 128, 80), torch.zeros(1, 32, 128, 96)
    gated_delta_rule(q, q, v, beta, impl="triton")
