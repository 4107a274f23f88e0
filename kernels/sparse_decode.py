"""Linear maps with sparse inputs, as sparse autoencoders have them: a row holds k values and the features they belong to.

    decode        out_n = sum_j values_nj weight_f(nj) + bias            f(nj) = indices_nj, weight [F, D]
    dots          dot_nj = rows_n . weight_f(nj)                         the gradient of decode to its values
    feature_sums  sum_f = sum over the (n, j) with f(nj) = f of values_nj rows_n,  total_f = the same sum of values_nj
                                                                         the gradient of decode to its weight

Each is linear in two arguments and its gradients are the other two, so all of them can be differentiated any number of times.
Index -1 marks an empty place: it adds nothing, and its value gets the gradient 0. A feature may stand several times in a row;
the values add. Sums over features run over the pairs sorted by feature (stable), one feature after another and never with
atomics: they are the same bit for bit from run to run, whatever the number of threads (Gao et al. 2024, arXiv 2406.04093,
section D, describe the same sparse kernels with atomics).
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from workbench.kernels.forms import choose
from workbench.kernels.scores import working_dtype

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def sparse_decode(
    values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str | None = None
) -> Tensor:
    """``sum_j values[n, j] * weight[indices[n, j]] + bias``: values ``[N, k]``, indices ``[N, k]`` int64 from -1 (empty) to
    F - 1, weight ``[F, D]``, bias ``[D]``, result ``[N, D]`` in weight's dtype.

    Accumulated in float32, in float64 if values or weight are float64. Gradients flow to values, weight and bias; they are
    deterministic. ``impl`` is the form, see ``kernels/forms.py``. Raises ``ValueError`` naming the argument at fault; under
    ``torch.compile``, where values cannot be looked at, indices outside the range are skipped by the Triton form.
    """
    for name, tensor, axes in (("values", values, "[N, k]"), ("weight", weight, "[F, D]")):
        if not isinstance(tensor, Tensor) or tensor.ndim != 2 or tensor.dtype not in FLOATS or 0 in tensor.shape:
            raise ValueError(f"{name} is a tensor {axes} of floats, not empty; got {describe(tensor)}")
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.shape != values.shape:
        raise ValueError(f"indices is int64 [N, k] = {list(values.shape)} like values; got {describe(indices)}")
    check_vector("bias", bias, weight.shape[1], "D")
    for name, other in (("indices", indices), ("weight", weight), ("bias", bias)):
        if other is not None and other.device != values.device:
            raise ValueError(f"{name} is on the device of values, {values.device}; got {other.device}")
    if not torch.compiler.is_compiling():
        fits = (indices >= -1) & (indices < weight.shape[0])
        said = f"indices are from -1 (empty) to F - 1 = {weight.shape[0] - 1}"
        if indices.is_cuda:
            torch._assert_async(fits.all(), said)  # a check on the device: training does not wait for it
        elif not bool(fits.all()):
            raise ValueError(f"{said}; got {int(indices.min())} to {int(indices.max())}")
    form = choose(impl, values, weight, bias)
    return torch.ops.workbench.sparse_decode(values, indices, weight, bias, form)


def describe(given: Any) -> str:
    return f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else type(given).__name__


def check_vector(name: str, vector: Tensor | None, length: int, axis: str) -> None:
    """Raise ``ValueError`` unless ``vector`` is None or ``[length]`` floats."""
    if vector is None:
        return
    if not isinstance(vector, Tensor) or tuple(vector.shape) != (length,) or vector.dtype not in FLOATS:
        raise ValueError(f"{name} is floats [{axis}] = [{length}]; got {describe(vector)}")


def _form(impl: str) -> Any:
    return importlib.import_module(f"workbench.kernels.decode.{impl}")


def _decode(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    return _form(impl).decode(values, indices, weight, bias)


def _dots(rows: Tensor, indices: Tensor, weight: Tensor, impl: str) -> Tensor:
    return _form(impl).dots(rows, indices, weight)


def _feature_sums(values: Tensor, indices: Tensor, rows: Tensor, features: int, impl: str) -> list[Tensor]:
    return list(_form(impl).feature_sums(values, indices, rows, features))


_decode_op = torch.library.custom_op(
    "workbench::sparse_decode",
    _decode,
    mutates_args=(),
    schema="(Tensor values, Tensor indices, Tensor weight, Tensor? bias, str impl) -> Tensor",
)
_dots_op = torch.library.custom_op(
    "workbench::sparse_dots",
    _dots,
    mutates_args=(),
    schema="(Tensor rows, Tensor indices, Tensor weight, str impl) -> Tensor",
)
"""``[N, k]`` in the accumulation type."""
_sums_op = torch.library.custom_op(
    "workbench::feature_sums",
    _feature_sums,
    mutates_args=(),
    schema="(Tensor values, Tensor indices, Tensor rows, SymInt features, str impl) -> Tensor[]",
)
"""``sums [F, D]`` in the dtype of rows and ``totals [F]`` in the accumulation type."""


def accumulation(*tensors: Tensor) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return working_dtype(dtype)


@_decode_op.register_fake
def _(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    return weight.new_empty((values.shape[0], weight.shape[1]))


@_dots_op.register_fake
def _(rows: Tensor, indices: Tensor, weight: Tensor, impl: str) -> Tensor:
    return rows.new_empty(indices.shape, dtype=accumulation(rows, weight))


@_sums_op.register_fake
def _(values: Tensor, indices: Tensor, rows: Tensor, features: int, impl: str) -> list[Tensor]:
    sums = rows.new_empty((features, rows.shape[1]))
    return [sums, rows.new_empty((features,), dtype=accumulation(values, rows))]


def _keep_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, weight, bias, ctx.impl = inputs
    ctx.save_for_backward(values, indices, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, weight = ctx.saved_tensors
    ops, need = torch.ops.workbench, ctx.needs_input_grad
    to_values = ops.sparse_dots(grad, indices, weight, ctx.impl).to(values.dtype) if need[0] else None
    to_weight = ops.feature_sums(values, indices, grad, weight.shape[0], ctx.impl)[0] if need[2] else None
    to_bias = grad.sum(0, dtype=accumulation(grad)).to(ctx.bias_dtype) if ctx.bias_dtype and need[3] else None
    return to_values, None, to_weight, to_bias, None


def _keep_dots(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, indices, weight, ctx.impl = inputs
    ctx.save_for_backward(rows, indices, weight)


def _dots_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, indices, weight = ctx.saved_tensors
    ops, need = torch.ops.workbench, ctx.needs_input_grad
    to_rows = ops.sparse_decode(grad, indices, weight, None, ctx.impl).to(rows.dtype) if need[0] else None
    to_weight = ops.feature_sums(grad, indices, rows, weight.shape[0], ctx.impl)[0] if need[2] else None
    return to_rows, None, None if to_weight is None else to_weight.to(weight.dtype), None


def _keep_sums(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    values, indices, rows, _, ctx.impl = inputs
    ctx.save_for_backward(values, indices, rows)


def _sums_backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    values, indices, rows = ctx.saved_tensors
    ops, need = torch.ops.workbench, ctx.needs_input_grad
    to_sums, to_totals = grads
    to_values = torch.zeros_like(values) if need[0] else None
    to_rows = torch.zeros_like(rows) if need[2] else None
    if to_sums is not None:
        if to_values is not None:
            to_values = to_values + ops.sparse_dots(rows, indices, to_sums, ctx.impl).to(values.dtype)
        if need[2]:
            to_rows = ops.sparse_decode(values, indices, to_sums, None, ctx.impl).to(rows.dtype)
    if to_totals is not None and to_values is not None:
        each = to_totals[indices.clamp(min=0)].masked_fill(indices < 0, 0.0)
        to_values = to_values + each.to(values.dtype)
    return to_values, None, to_rows, None, None


_decode_op.register_autograd(_decode_backward, setup_context=_keep_decode)
_dots_op.register_autograd(_dots_backward, setup_context=_keep_dots)
_sums_op.register_autograd(_sums_backward, setup_context=_keep_sums)
