"""The log-sum-exp that torch's fused attention computes anyway, kept for the map of the same call.

``scaled_dot_product_attention`` returns the output alone. The flash kernels behind it compute the log of every row's denominator
too, and operators that call the very same kernels return it: the output is the same to the last bit, and the statistics need one
pass over q k^T instead of two.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

_FLASH = 1
"""Torch's number of the flash kernels among those that ``scaled_dot_product_attention`` chooses from."""


class Denominators(TorchFunctionMode):
    """Lets every call through; ``lse`` ``[B, H, Q]`` is that of the one fused attention without an explicit mask, else None."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: list[Tensor | None] = []

    @property
    def lse(self) -> Tensor | None:
        return self._seen[0] if len(self._seen) == 1 else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **kwargs)
        output, lse = _attention(*args, **kwargs)
        self._seen.append(lse)
        return output


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Torch's own attention, with the log-sum-exp of its rows where a flash kernel computes it exactly enough."""
    options: dict[str, Any] = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if (
        attn_mask is None
        and dropout_p == 0.0
        and not torch.is_grad_enabled()
        and _exact(query)
        and torch._fused_sdp_choice(query, key, value, **options, enable_gqa=enable_gqa) == _FLASH
    ):
        if query.is_cuda:
            found = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)
        else:
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, 0.0, is_causal, scale=scale
            )
        if tuple(found[1].shape) == tuple(query.shape[:3]):
            return found[0], found[1]
        return found[0], None
    return scaled_dot_product_attention(query, key, value, **options, enable_gqa=enable_gqa), None


def _exact(query: Tensor) -> bool:
    """Whether the flash kernel of this device gives a log-sum-exp to build statistics on. On CPUs that of bfloat16 and float16 is
    rounded; on CUDA head widths that are no multiple of 8 are padded first, and units are checked once per process."""
    if query.ndim != 4:
        return False
    if query.is_cuda:
        return query.shape[3] % 8 == 0 and _natural_on_cuda()
    return query.dtype in (torch.float32, torch.float64)


@cache
def _natural_on_cuda() -> bool:
    from workbench.kernels.selfcheck import lse_selfcheck

    return lse_selfcheck()["flash (cuda)"].status == "ok"
