"""Which form of an operation runs: ``reference``, ``cpu`` or ``triton``. A named form runs or raises; nothing falls back."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

IMPLS = ("reference", "cpu", "triton")
"""``reference``: plain torch, dense, float64-able, the oracle. ``cpu``: blocked plain torch, on any device, no Q x K memory.
``triton``: fused kernels on CUDA tensors; on CPU tensors only in Triton's interpreter (``TRITON_INTERPRET=1``), for tests."""

_INSTALLED = importlib.util.find_spec("triton") is not None


def choose(impl: str | None, *tensors: Tensor | None, unsupported: str = "") -> str:
    """The form that will run on these tensors.

    ``unsupported`` says what in this call the Triton form does not do, empty if it does everything. None takes ``triton`` on
    CUDA tensors where it can run, else ``cpu``. Raises ``ValueError`` on an unknown name and ``RuntimeError`` where the named
    form cannot run, with the form that can.
    """
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"impl: no form {impl!r}; known: {', '.join(IMPLS)}")
    if impl in ("reference", "cpu"):
        return impl
    given = [tensor for tensor in tensors if tensor is not None]
    why = unsupported or why_not_triton(given)
    if impl == "triton" and why:
        raise RuntimeError(f"impl='triton' cannot run here: {why}; use impl='cpu' (any device) or impl='reference'")
    return "triton" if impl == "triton" or (not why and given[0].is_cuda) else "cpu"


def why_not_triton(tensors: list[Tensor]) -> str:
    """Why Triton kernels cannot run on these tensors, empty if they can."""
    if not _INSTALLED:
        return "the package triton is not installed"
    devices = sorted({str(tensor.device) for tensor in tensors})
    if len(devices) > 1:
        return f"the tensors are on several devices ({', '.join(devices)})"
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "the tensors are float64, and the kernels accumulate in float32"
    if not tensors[0].is_cuda and not interpreted():
        return f"the tensors are on {devices[0]}, and the kernels run on CUDA (elsewhere only with TRITON_INTERPRET=1)"
    return ""


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
