"""The three sparse maps of ``sparse_decode`` as dense matrix products: the oracle of the faster forms. N x F memory.

With the code c_nf = sum_j values_nj [indices_nj = f]:  decode = c weight,  dots_nj = (rows weight^T)_n,f(nj),
feature sums = c^T rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.sparse_decode import accumulation


def chosen(indices: Tensor, features: int, like: Tensor) -> Tensor:
    """``[N, k, F]``: 1 where place (n, j) holds feature f."""
    return (indices[..., None] == torch.arange(features, device=indices.device)).to(like.dtype)


def dense_code(values: Tensor, indices: Tensor, features: int) -> Tensor:
    return torch.einsum("nk,nkf->nf", values, chosen(indices, features, values))


def decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = accumulation(values, weight)
    out = dense_code(values.to(dtype), indices, weight.shape[0]) @ weight.to(dtype)
    return (out if bias is None else out + bias.to(dtype)).to(weight.dtype)


def dots(rows: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    dtype = accumulation(rows, weight)
    every = rows.to(dtype) @ weight.to(dtype).T
    return torch.einsum("nf,nkf->nk", every, chosen(indices, weight.shape[0], every))


def feature_sums(values: Tensor, indices: Tensor, rows: Tensor, features: int) -> tuple[Tensor, Tensor]:
    dtype = accumulation(values, rows)
    code = dense_code(values.to(dtype), indices, features)
    return (code.T @ rows.to(dtype)).to(rows.dtype), code.sum(0)
