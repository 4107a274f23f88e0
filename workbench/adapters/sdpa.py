"""torch's ``scaled_dot_product_attention``, whoever calls it: what it was given, and the map of that.

    M_ij = exp(scale q_i . k_j + attn_mask_ij) / sum_j' ...,   causal masks aligned with the first key, as torch has them

While calls are recorded a wrapper stands in ``torch.nn.functional`` (for all threads). It sees eager Python code that looks the
function up there, of any library: not compiled or scripted code, nor a name that was imported from there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.patterns.softmax import SoftmaxMap


@dataclass(frozen=True)
class SdpaCall:
    """One call: tensors of more than four axes count their leading axes as examples."""

    query: Tensor
    key: Tensor
    value: Tensor
    result: Tensor
    attn_mask: Tensor | None = None
    dropout: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    layer: str = ""

    @property
    def values(self) -> Tensor:
        """What the map multiplies, ``[B, G, K, V]``."""
        return _four(self.value)

    @property
    def output(self) -> Tensor:
        """What the call returned, ``[B, H, Q, V]``."""
        return _four(self.result)

    def map(self) -> SoftmaxMap:
        """The exact map; refused with dropout, whose draw is not known."""
        if self.dropout:
            raise Refused(
                f"scaled_dot_product_attention dropped weights with p={self.dropout}: put the module in eval mode"
            )
        q, k = _four(self.query), _four(self.key)
        b, n, m = q.shape[0], q.shape[2], k.shape[2]
        mask, bias = Mask(causal=self.is_causal), None
        if self.attn_mask is not None:
            given = self.attn_mask
            if self.query.ndim > 4:
                given = given.expand(*self.query.shape[:-1], m).reshape(b, 1, n, m)
            elif self.query.ndim == 3 and given.ndim == 3:
                given = given[:, None]
            given = given[(None,) * (4 - given.ndim)]
            if given.dtype == torch.bool:
                mask = Mask(causal=self.is_causal, dense=given.expand(*given.shape[:2], n, m))
            else:
                bias = given
        return SoftmaxMap(q, k, mask=mask, scale=self.scale, bias=bias)


@contextmanager
def capture_sdpa(running: Callable[[], str] | None = None) -> Iterator[list[SdpaCall]]:
    """Record every ``scaled_dot_product_attention``: ``with capture_sdpa() as calls: model(x)``.

    ``running`` names the layer at the time of a call. Results are torch's own.
    """
    calls: list[SdpaCall] = []
    plain = functional.scaled_dot_product_attention

    @wraps(plain)
    def watched(*args: Any, **kwargs: Any) -> Tensor:
        result = plain(*args, **kwargs)
        calls.append(_call(result, "" if running is None else running(), *args, **kwargs))
        return result

    functional.scaled_dot_product_attention = watched
    try:
        yield calls
    finally:
        functional.scaled_dot_product_attention = plain


def _call(
    result: Tensor,
    layer: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> SdpaCall:
    return SdpaCall(query, key, value, result, attn_mask, dropout_p, is_causal, scale, layer)


def _four(x: Tensor) -> Tensor:
    """``[B, H, N, E]``: a missing head axis is one head, leading axes beyond four are examples of one head each."""
    if x.ndim < 3:
        raise WorkbenchError(f"attention tensors have at least three axes; got {list(x.shape)}")
    if x.ndim == 3:
        return x[:, None]
    return x if x.ndim == 4 else x.flatten(0, -3)[:, None]
