"""Calls to compile ahead of time with ``compile_ahead.py``; ``tests/benchmarks`` must be on the path."""

import torch
from seer_pooling import seer_max_pool

SHAPES = [(64, 128, torch.bfloat16), (32, 16, torch.float16), (64, 64, torch.float32)]


def pooling() -> None:
    for block, width, dtype in SHAPES:
        q = torch.zeros(1, 32, 2048, width, dtype=dtype)
        seer_max_pool(q, q, q, block)
