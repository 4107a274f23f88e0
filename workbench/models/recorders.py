"""Recorders: capture for families that compute attention in their own forward instead of asking the interface.

For one run the forward of each wanted attention module is replaced, on the instance, by one that calls the original under
a ``TorchFunctionMode``. The mode sees the one call in which queries meet keys (falcon: scaled dot product attention, or a
matrix product when eager; bloom: ``baddbmm``; mpt: a matrix product), passes it on, and hands the tensors to the
session together with the mask and the position bias that the module was given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from workbench.errors import Refused
from workbench.models.current import current
from workbench.models.layers import AttentionLayer
from workbench.models.session import Session

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
_BADDBMM = (torch.baddbmm, Tensor.baddbmm)


@contextmanager
def recording(layers: Sequence[AttentionLayer], session: Session) -> Iterator[None]:
    """Record the attention of ``layers`` for the length of a run; the modules are as before on exit."""
    undo: list[tuple[nn.Module, Any]] = []
    try:
        for layer in layers:
            recorder = _RECORDERS[_family(layer.module)]
            undo.append((layer.module, layer.module.__dict__.get("forward")))
            layer.module.__dict__["forward"] = _watched(layer, session, recorder, layer.module.forward)
        yield
    finally:
        for module, before in reversed(undo):
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before


def _family(module: nn.Module) -> str:
    return next(cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _RECORDERS)


def _watched(
    layer: AttentionLayer, session: Session, recorder: type[_Watch], forward: Callable[..., Any]
) -> Callable[..., Any]:
    signature = inspect.signature(forward)

    def watched(*args: Any, **kwargs: Any) -> Any:
        if current() is not session:
            return forward(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        watch = recorder(layer, session, bound.arguments)
        with watch:
            return forward(*args, **kwargs)

    return watched


class _Watch(TorchFunctionMode):
    """Lets every call through unchanged but for edits, and reports the one in which queries meet keys."""

    def __init__(self, layer: AttentionLayer, session: Session, given: dict[str, Any]) -> None:
        super().__init__()
        self.layer, self.session, self.given = layer, session, given
        self.module: Any = layer.module
        self.met = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.pass_on(func, args, kwargs or {})
        return func(*args, **kwargs)

    def pass_on(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments to go on with, after a look at them."""
        raise NotImplementedError

    def report(self, q: Tensor, k: Tensor, mask: Any, *, base: str, scale: float, bias: Tensor | None) -> None:
        self.met = True
        if not self.session.wants_map(self.layer):
            return
        found, extra = self.session.masks.resolve(self.layer, mask, q, k, base, {"is_causal": True})
        bias = extra if bias is None else bias if extra is None else bias + extra
        self.session.on_map(self.layer, q, k, found, scale=scale, bias=bias)


class _Falcon(_Watch):
    def pass_on(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        width, alibi = self.module.head_dim, self.given.get("alibi")
        if func is scaled_dot_product_attention and not self.met:
            q, k, v = self.session.on_inputs(self.layer, q=args[0], k=args[1], v=args[2])
            self.report(q, k, kwargs.get("attn_mask"), base="sdpa", scale=width**-0.5, bias=None)
            return (q, k, v, *args[3:]), kwargs
        if func in _PRODUCTS and args[0].ndim == 4 and not self.met:
            q, k = self.session.on_inputs(self.layer, q=args[0], k=args[1].transpose(-1, -2))
            # Transformers adds alibi to the mask and, in this branch, a second time to the scores.
            bias = None if alibi is None else alibi.view(q.shape[0], q.shape[1], 1, -1) * self.module.inv_norm_factor
            self.report(q, k, self.given["attention_mask"], base="eager", scale=width**-0.5, bias=bias)
            return (q, k.transpose(-1, -2)), kwargs
        if func in _PRODUCTS and args[0].ndim == 4:
            return (args[0], *self.session.on_inputs(self.layer, v=args[1])), kwargs
        return args, kwargs


class _Bloom(_Watch):
    def pass_on(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if func not in _BADDBMM or self.met:
            return args, kwargs
        heads = self.module.num_heads
        q = kwargs["batch1"].unflatten(0, (-1, heads))
        k = kwargs["batch2"].transpose(-1, -2).unflatten(0, (-1, heads))
        bias = args[0].unflatten(0, (-1, heads)) * kwargs["beta"]
        self.report(q, k, self.given.get("attention_mask"), base="eager", scale=kwargs["alpha"], bias=bias)
        return args, kwargs


class _Mpt(_Watch):
    def pass_on(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if func not in _PRODUCTS or args[0].ndim != 4 or self.met:
            return args, kwargs
        q, k = args[0], args[1].transpose(-1, -2)
        bias, mask = self.given.get("position_bias"), self.given.get("attention_mask")
        if bias is not None:
            bias = bias[None, :, max(0, bias.shape[1] - q.shape[2]) :, max(0, bias.shape[2] - k.shape[2]) :]
        if mask is not None:
            if mask.dtype != torch.bool:
                raise Refused(f"layer {self.layer.key} of {self.session.family}: its mask is {mask.dtype}, not bool")
            mask = self.session.masks.inverse(mask)
        self.report(q, k, mask, base="eager", scale=self.module.softmax_scale, bias=bias)
        return args, kwargs


_RECORDERS: dict[str, type[_Watch]] = {"FalconAttention": _Falcon, "BloomAttention": _Bloom, "MptAttention": _Mpt}
