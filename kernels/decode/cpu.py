"""The three sparse maps of ``sparse_decode`` in plain torch, on any device, without an N x F or N x k x D tensor.

Decoding a row and summing a feature are the same: a bag of rows of a table, each with a weight. torch's embedding_bag adds
the rows of a bag in order and gives whole bags to threads, so its sums do not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.sparse_decode import accumulation

_SUM = 0
"""torch's number for ``mode="sum"`` of embedding_bag."""


def decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = accumulation(values, weight)
    held = indices >= 0
    starts = torch.nn.functional.pad(held.sum(1).cumsum(0), (1, 0))
    out = _bags(weight.to(dtype), indices[held], values[held].to(dtype), starts)
    return (out if bias is None else out.add_(bias.to(dtype))).to(weight.dtype)


def dots(rows: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    dtype = accumulation(rows, weight)
    n, k = indices.shape
    if not n:
        return rows.new_zeros(indices.shape, dtype=dtype)
    starts = torch.arange(0, n * k, k, device=rows.device)
    bag = torch.arange(n, device=rows.device).repeat_interleave(k)
    table, places = weight.to(dtype).contiguous(), indices.clamp(min=0).flatten()
    # The gradient of embedding_bag to its weights is this product, and gathers no [N, k, D].
    found = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows.to(dtype).contiguous(), table, places, starts, bag, _SUM, -1
    )
    return found.view(n, k).masked_fill_(indices < 0, 0.0)


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
