"""The encoder of a TopK sparse autoencoder: the k largest pre-activations of each row, without ever holding all of them.

    pre = (x - centre) weight + bias          x [N, D], weight [D, F], bias [F], centre [D]
    values_n1 >= values_n2 >= ... >= values_nk, the k largest pre_nf of row n and their features

(Makhzani and Frey 2013, arXiv 1312.5663; Gao et al. 2024, arXiv 2406.04093.) Of equal pre-activations the smaller feature comes
first. ``positive`` applies a ReLU: what is not above 0 is not selected. Places that stay empty, because too few
pre-activations are positive or not excluded, come last and hold the value 0 and the index -1.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.kernels.forms import choose
from workbench.kernels.scores import working_dtype
from workbench.kernels.sparse_decode import FLOATS, check_vector, describe

LARGEST = 1024
"""Largest k of the Triton form, whose programs hold k candidates per row in registers."""


@dataclass(frozen=True, eq=False)
class TopKCode:
    """``values`` ``[N, k]`` in descending order and ``indices`` ``[N, k]`` int64, their features; 0 and -1 where a place is
    empty. Values are float32, float64 for float64 inputs. ``impl`` names the form that ran."""

    values: Tensor
    indices: Tensor
    impl: str


def topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    k: int,
    centre: Tensor | None = None,
    positive: bool = True,
    excluded: Tensor | None = None,
    impl: str | None = None,
) -> TopKCode:
    """The k largest entries of each row of ``(x - centre) @ weight + bias``.

    x ``[N, D]``, weight ``[D, F]`` of x's dtype, bias ``[F]``, centre ``[D]``, k from 1 to F. ``x - centre`` is rounded to x's
    dtype, as in a module of that dtype; all else is accumulated in float32 (float64 for float64). ``excluded`` ``[F]`` bool
    hides features, as AuxK does with living ones; the cost is that of the features left, whose weights are copied. A
    pre-activation of -inf is never selected, NaN counts as the largest.

    Gradients flow from values to x, weight, bias and centre through the selected entries, and are deterministic; where two
    entries change places values have a kink. A weight that is the transpose of a contiguous ``[F, D]`` saves its backward
    pass on GPUs a copy. ``impl`` is the form, see ``kernels/forms.py``. Raises ``ValueError`` naming the argument at fault.
    """
    for name, tensor, axes in (("x", x, "[N, D]"), ("weight", weight, "[D, F]")):
        if not isinstance(tensor, Tensor) or tensor.ndim != 2 or tensor.dtype not in FLOATS or 0 in tensor.shape:
            raise ValueError(f"{name} is a tensor {axes} of floats, not empty; got {describe(tensor)}")
    d, f = weight.shape
    if x.shape[1] != d or x.dtype != weight.dtype:
        raise ValueError(f"weight is [D, F] with D = {x.shape[1]} in x's dtype {x.dtype}; got {describe(weight)}")
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= f:
        raise ValueError(f"k is a whole number from 1 to F = {f}; got {k!r}")
    check_vector("bias", bias, f, "F")
    check_vector("centre", centre, d, "D")
    if excluded is not None and (
        not isinstance(excluded, Tensor) or excluded.dtype != torch.bool or tuple(excluded.shape) != (f,)
    ):
        raise ValueError(f"excluded is bool [F] = [{f}], True hides; got {describe(excluded)}")
    for name, other in (("weight", weight), ("bias", bias), ("centre", centre), ("excluded", excluded)):
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} is on x's device {x.device}; got {other.device}")
    form = choose(impl, x, weight, bias, unsupported=f"k = {k} is over {LARGEST}" if k > LARGEST else "")
    if centre is not None:
        x = x - centre.to(x.dtype)
    values, indices = torch.ops.workbench.topk_encode(x, weight, bias, k, bool(positive), excluded, form)
    return TopKCode(values, indices, form)


def _encode(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, positive: bool, excluded: Tensor | None, impl: str
) -> list[Tensor]:
    form: Any = importlib.import_module(f"workbench.kernels.encode.{impl}")
    if impl == "reference":
        return list(form.encode(x, weight, bias, k, positive, excluded))
    if excluded is None:
        return list(form.encode(x, weight, bias, k, positive))
    kept = (~excluded).nonzero().squeeze(1)
    values = x.new_zeros((x.shape[0], k), dtype=working_dtype(x.dtype))
    indices = torch.full_like(values, -1, dtype=torch.int64)
    few = min(k, len(kept))
    if few:
        some = None if bias is None else bias[kept]
        values[:, :few], found = form.encode(x, weight.index_select(1, kept), some, few, positive)
        indices[:, :few] = kept[found.clamp(min=0)].masked_fill(found < 0, -1)
    return [values, indices]


_encode_op = torch.library.custom_op(
    "workbench::topk_encode",
    _encode,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, int k, bool positive, Tensor? excluded, str impl) -> Tensor[]",
)
"""``[values, indices]``. The gradient to indices is none: they are integers."""


@_encode_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, positive: bool, excluded: Tensor | None, impl: str
) -> list[Tensor]:
    shape = (x.shape[0], k)
    return [x.new_empty(shape, dtype=working_dtype(x.dtype)), x.new_empty(shape, dtype=torch.int64)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, weight, bias, _, _, _, ctx.impl = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    x, weight, indices = ctx.saved_tensors
    grad, need = grads[0], ctx.needs_input_grad
    to_x = to_weight = to_bias = None
    if grad is not None and need[0]:
        to_x = torch.ops.workbench.sparse_decode(grad, indices, weight.t(), None, ctx.impl)
    if grad is not None and (need[1] or need[2]):
        sums, totals = torch.ops.workbench.feature_sums(grad, indices, x, weight.shape[1], ctx.impl)
        to_weight = sums.t() if need[1] else None
        to_bias = totals.to(ctx.bias_dtype) if need[2] else None
    return to_x, to_weight, to_bias, None, None, None, None


_encode_op.register_autograd(_backward, setup_context=_keep)
