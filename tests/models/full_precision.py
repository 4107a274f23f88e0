"""Models that compute parts of themselves in float32, made to compute all of it in float64."""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class FullPrecision(TorchFunctionMode):
    """These families do their mixing in float32 whatever the type of the model; in float64 the casts are left out."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        wide = len(args) > 0 and isinstance(args[0], Tensor) and args[0].dtype == torch.float64
        if wide and func is torch.nn.functional.softmax:
            kwargs.pop("dtype", None)
        if wide and func is Tensor.float:
            return args[0]
        if wide and func in (Tensor.to, Tensor.type) and len(args) > 1 and args[1] == torch.float32:
            return args[0].contiguous() if "memory_format" in kwargs else args[0]
        if func in (torch.zeros, torch.zeros_like) and kwargs.get("dtype") == torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
