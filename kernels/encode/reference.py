"""``topk_encode`` as a dense product and a full stable sort: the oracle of the faster forms. N x F memory."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.scores import working_dtype


def encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, positive: bool, excluded: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(x.dtype)
    pre = x.to(dtype) @ weight.to(dtype)
    if bias is not None:
        pre = pre + bias.to(dtype)
    if excluded is not None:
        pre = torch.where(excluded, float("-inf"), pre)
    values, indices = pre.sort(dim=1, descending=True, stable=True)
    values, indices = values[:, :k], indices[:, :k]
    empty = (values <= 0) if positive else torch.isneginf(values)
    return torch.where(empty, 0.0, values), torch.where(empty, -1, indices)
