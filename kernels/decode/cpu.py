"""The three sparse maps of ``sparse_decode`` in plain torch, on any device, without an N x F or N x k x D tensor.

Decoding a row and summing a feature are the same: a bag of rows of a table, each with a weight. torch's embedding_bag adds
the rows of a bag in order and gives whole bags to threads, so its sums do not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.sparse_decode import accumulation

CHUNK = 2**20
"""Gathered elements that ``dots`` holds at a time."""


def decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = accumulation(values, weight)
    held = indices >= 0
    starts = torch.nn.functional.pad(held.sum(1).cumsum(0), (1, 0))
    out = _bags(weight.to(dtype), indices[held], values[held].to(dtype), starts)
    return (out if bias is None else out.add_(bias.to(dtype))).to(weight.dtype)


def dots(rows: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    dtype = accumulation(rows, weight)
    out = rows.new_empty(indices.shape, dtype=dtype)
    step = max(1, CHUNK // (indices.shape[1] * weight.shape[1]))
    for lo in range(0, len(rows), step):
        index = indices[lo : lo + step]
        gathered = weight[index.clamp(min=0)].to(dtype)
        found = torch.bmm(gathered, rows[lo : lo + step, :, None].to(dtype)).squeeze(2)
        out[lo : lo + step] = found.masked_fill_(index < 0, 0.0)
    return out


def feature_sums(values: Tensor, indices: Tensor, rows: Tensor, features: int) -> tuple[Tensor, Tensor]:
    dtype = accumulation(values, rows)
    row, value, starts = by_feature(values, indices, features)
    row, value, starts = row[starts[0] :], value[starts[0] :].to(dtype), starts - starts[0]
    sums = _bags(rows.to(dtype), row, value, starts)
    each = torch.arange(len(value), device=value.device)
    totals = _bags(value[:, None], each, torch.ones_like(value), starts) if len(value) else sums.new_zeros(features, 1)
    return sums.to(rows.dtype), totals.squeeze(1)


def by_feature(values: Tensor, indices: Tensor, features: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs sorted by feature, in the order of rows within one: their rows, their values, and where each feature's pairs
    start ``[F + 1]``. Empty places come before the first start."""
    ordered, order = indices.flatten().sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(features + 1, device=indices.device))
    return order // indices.shape[1], values.flatten()[order], starts


def _bags(table: Tensor, rows: Tensor, weights: Tensor, starts: Tensor) -> Tensor:
    """``out[b] = sum of weights[i] * table[rows[i]]`` over i from ``starts[b]`` to ``starts[b + 1]``."""
    if not len(rows):
        return table.new_zeros(len(starts) - 1, table.shape[1])
    return torch.nn.functional.embedding_bag(
        rows, table.contiguous(), starts, mode="sum", per_sample_weights=weights, include_last_offset=True
    )
