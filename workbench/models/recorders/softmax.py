"""Recorders of softmax attention that does not go through transformers' attention interface.

They wait for the one call in which queries meet keys (falcon: scaled dot product attention, or a matrix product when eager;
bloom: ``baddbmm``; mpt: a matrix product) and hand the tensors to the session together with the mask and the position bias that
the module was given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from workbench.errors import Refused
from workbench.models.recorders.base import Watch

_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
_BADDBMM = (torch.baddbmm, Tensor.baddbmm)


class Falcon(Watch):
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


class Bloom(Watch):
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


class Mpt(Watch):
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
