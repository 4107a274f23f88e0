"""Maps of operators that are not linear in their values: derivatives at the input that was there.

    M_ij = mean over channels c of  d o_ic / d v_jc

For an operator that is linear in its values this is the pattern itself. ``matvec`` and ``rmatvec`` use the whole derivative,
J v and J^T y, not only its diagonal in the channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.errors import WorkbenchError
from workbench.maps import state_metadata

_AT_ONCE = 2**21
"""Numbers that a backward pass over several rows is asked for at a time."""


class JacobianMap(AttentionMap):
    """The derivative of ``function`` (values ``[B, G, K, E]`` to outputs ``[B, H, Q, E]``) at the values ``at``.

    ``function`` is plain torch, differentiable, and treats batch entries apart. A row costs one backward pass per channel, all
    at once; ``strength(lo, hi)`` is the Frobenius norm of the E x E blocks, which sees what mixes channels too.
    """

    channelwise = True

    def __init__(self, function: Callable[[Tensor], Tensor], at: Tensor, **metadata: str) -> None:
        if at.ndim != 4 or not at.is_floating_point():
            raise WorkbenchError(f"values are floating point [B, G, K, E]; got {at.dtype} {list(at.shape)}")
        self.at = at.detach()
        self._function = function
        with torch.no_grad():
            out = function(self.at)
        if out.ndim != 4 or out.shape[0] != at.shape[0] or out.shape[3] != at.shape[3] or out.shape[1] % at.shape[1]:
            raise WorkbenchError(
                f"the function takes [B, G, K, E] to [B, H, Q, E] with G dividing H; got {list(at.shape)} to {list(out.shape)}"
            )
        super().__init__((at.shape[0], out.shape[1], out.shape[2], at.shape[2]), kv_heads=at.shape[1])
        state_metadata(self, {"sign": "signed", "row_sum": "free", "exactness": "jacobian", **metadata})

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self._derivatives(lo, hi, lambda blocks: blocks.diagonal(0, -3, -1).mean(-1))

    def strength(self, lo: int, hi: int) -> Tensor:
        """Frobenius norms of d o_i / d v_j, ``[B, H, hi - lo, K]``."""
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self._derivatives(lo, hi, lambda blocks: blocks.square().sum((-3, -1)).sqrt())

    def matvec(self, v: Tensor) -> Tensor:
        """J v: the change of the output along ``v``."""
        self._check_values(v)
        return torch.func.jvp(self._function, (self.at,), (v.to(self.at.dtype),))[1].to(v.dtype)

    def rmatvec(self, y: Tensor) -> Tensor:
        """J^T y."""
        self._check_outputs(y)
        return self._backward(y.to(self.at.dtype)[None])[0].to(y.dtype)

    def native(self) -> Any:
        """The function of the values itself."""
        return self._function

    def _backward(self, outputs: Tensor) -> Tensor:
        """J^T of several outputs ``[M, B, H, Q, E]`` at once: ``[M, B, G, K, E]``."""
        return torch.func.vmap(self._pull())(outputs)[0]

    def _pull(self) -> Callable[[Tensor], tuple[Tensor]]:
        """The backward pass at the values: outputs to values, J^T."""
        found: Any = torch.func.vjp(self._function, self.at)
        return found[1]

    def _derivatives(self, lo: int, hi: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """``reduce`` of the blocks d o_i / d v_j, laid out as ``[B, E out, K, E in]``, per head and row: one forward pass, and a
        backward pass for a few rows' channels at a time."""
        b, h, q, k = self.shape
        width, group = self.at.shape[3], h // self.kv_heads
        made = self.at.new_zeros(b, h, hi - lo, k)
        wanted = [(head, row) for row in range(lo, hi) for head in range(h)]
        step = max(1, _AT_ONCE // (width * b * max(h * q, self.kv_heads * k) * width))
        pull = self._pull()
        for first in range(0, len(wanted), step):
            some = wanted[first : first + step]
            ask = self.at.new_zeros(len(some), width, *self.shape[:3], width)
            for i, (head, row) in enumerate(some):
                ask[i, range(width), :, head, row, range(width)] = 1.0
            back = torch.func.vmap(pull)(ask.flatten(0, 1))[0].view(len(some), width, b, self.kv_heads, k, width)
            for i, (head, row) in enumerate(some):
                made[:, head, row - lo] = reduce(back[i, :, :, head // group].permute(1, 0, 2, 3))
        return made
