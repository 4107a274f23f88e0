"""Calls of the sparse coder in realistic sizes, for ``compile_ahead.py``: forward and backward."""

import torch

from workbench.kernels.sparse_decode import sparse_decode
from workbench.kernels.topk_encode import topk_encode


def sparse_coder() -> None:
    cases = [(torch.bfloat16, 4096, 8192, 64), (torch.float32, 512, 4096, 128), (torch.float16, 1000, 3001, 17)]
    for dtype, d, f, k in cases:
        x = torch.zeros(256, d, dtype=dtype, requires_grad=True)
        weight = torch.zeros(f, d, dtype=dtype, requires_grad=True)
        bias = torch.zeros(f, dtype=dtype, requires_grad=True)
        topk_encode(x, weight.T, bias, k=k, positive=dtype != torch.float16, impl="triton")
        values = torch.zeros(256, k, requires_grad=True)
        indices = torch.arange(256 * k).view(256, k) % f
        torch.autograd.grad(sparse_decode(values, indices, weight, x[0], impl="triton").sum(), (values, weight))
    # The longest code takes the most registers and shared memory.
    topk_encode(torch.zeros(64, 512).bfloat16(), torch.zeros(512, 2048).bfloat16(), k=1024, impl="triton")
