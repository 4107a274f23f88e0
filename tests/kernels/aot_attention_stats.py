"""Calls of ``attention_stats`` to compile ahead of time: ``compile_ahead.py 90 aot_attention_stats:calls``."""

import torch

from workbench.kernels.attention_stats import attention_stats
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Relative


def calls() -> None:
    q, k = torch.zeros(1, 32, 256, 128, dtype=torch.bfloat16), torch.zeros(1, 8, 256, 128, dtype=torch.bfloat16)
    lse = torch.zeros(1, 32, 256)
    most = ("received", "entropy", "distance", "windowed", "distance2", "top1")
    attention_stats(q, k, lse, block=64, reduce=("sum", "max"), stats=("received", "entropy"), impl="triton")
    attention_stats(q, k, block=100, reduce=("sum", "max"), stats=most, window=128, topk=8, impl="triton")
    everything = Mask(
        causal=True, window=64, prefix=4, keys=torch.ones(1, 256, dtype=torch.bool),
        documents=torch.zeros(1, 256, dtype=torch.int64), queries=torch.ones(1, 256, dtype=torch.bool),
        blocks=torch.ones(1, 1, 4, 4, dtype=torch.bool), side=64,
    )  # fmt: skip
    masses = {"first": torch.arange(256) < 4, "near": lambda b, h, q, k: q - k < 4}
    bias = Relative(torch.zeros(32, 259), -255)
    attention_stats(
        q, k, lse, mask=everything, softcap=30.0, sink=torch.zeros(32), bias=bias, mass=masses, block=512, impl="triton"
    )
    for width, dtype in ((80, torch.float32), (256, torch.float32), (256, torch.bfloat16), (16, torch.float16)):
        q, k = torch.zeros(1, 4, 100, width, dtype=dtype), torch.zeros(1, 2, 100, width, dtype=dtype)
        attention_stats(q, k, mask=Mask(), block=64, reduce=("sum", "max"), stats=most, window=9, impl="triton")
