"""The map of the gated delta rule.

    S_t = a_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        o_t = scale q_t^T S_t
    M = scale tril(Gamma * Q K^T) (I + diag(beta) stril(Gamma * K K^T))^{-1} diag(beta)

``kernels/gated_delta_rule.py`` makes rows, blocks and products with values by chunks; nothing here is N x N but ``dense``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.captures import Capture
from workbench.errors import WorkbenchError
from workbench.kernels.gated_delta_rule import delta_rows, gated_delta_rule
from workbench.maps import head_index
from workbench.patterns.transported import TransportedMap


class DeltaMap(TransportedMap):
    """q, k ``[B, heads, N, E]`` as they enter the rule (normalised where the model does), ``beta`` and ``log_decay``
    ``[B, H, N]`` (None: no decay). q and k may have fewer heads, which divide H: head h reads head ``h // (H / heads)``.

    ``kv_heads`` is the number of value heads, H unless told. ``impl`` names the form of the kernel that ran last.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        beta: Tensor,
        log_decay: Tensor | None = None,
        *,
        scale: float | None = None,
        kv_heads: int | None = None,
    ) -> None:
        self.q, self.k, self.beta = q.detach(), k.detach(), beta.detach()
        self.log_decay = None if log_decay is None else log_decay.detach()
        self.scale = scale
        self.impl = ""
        try:
            # The first row costs one chunk, and the kernel checks all arguments for it.
            delta_rows(self.q, self.k, self.beta, self.log_decay, lo=0, hi=1, scale=scale)
        except ValueError as error:
            raise WorkbenchError(str(error)) from None
        b, h, n = beta.shape
        super().__init__((b, h, n), q.dtype, q.device, kv_heads)

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        if lo == hi:
            return torch.zeros(*self.shape[:2], 0, self.shape[3], dtype=self.dtype, device=self.device)
        return delta_rows(self.q, self.k, self.beta, self.log_decay, lo=lo, hi=hi, scale=self.scale)

    def parts(self) -> dict[str, Any] | None:
        return {
            "q": self.q,
            "k": self.k,
            "beta": self.beta,
            "log_decay": self.log_decay,
            "scale": self.scale,
            "kv_heads": self.kv_heads,
        }

    def heads(self, indices: Sequence[int]) -> DeltaMap:
        h = self.shape[1]
        chosen = head_index(indices, h)
        q, k = (x[:, [head // (h // x.shape[1]) for head in chosen]] for x in (self.q, self.k))
        log = None if self.log_decay is None else self.log_decay[:, chosen]
        return DeltaMap(q, k, self.beta[:, chosen], log, scale=self.scale)

    def _apply(self, v: Tensor) -> Tensor:
        with torch.no_grad():
            return self._run(v)

    def _adjoint(self, y: Tensor) -> Tensor:
        with torch.enable_grad():
            v = torch.zeros_like(y, requires_grad=True)
            (found,) = torch.autograd.grad(self._run(v), v, y)
        return found

    def _run(self, v: Tensor) -> Tensor:
        q, k = self.q.to(v.dtype), self.k.to(v.dtype)
        return gated_delta_rule(q, k, v, self.beta, self.log_decay, scale=self.scale).output

    def _blocks(self, size: int, reduce: str) -> Tensor:
        self._pool(size, (reduce,))
        return self._memo.pop(("blocks", size, reduce))

    def _pool(self, size: int, names: tuple[str, ...]) -> None:
        """Block maps do not depend on values: one channel of zeros runs along."""
        v = self.q.new_zeros(self.shape[0], 1, self.shape[2], 1)
        with torch.no_grad():
            found = gated_delta_rule(
                self.q, self.k, v, self.beta, self.log_decay, scale=self.scale, block=size, reduce=names
            )
        self.impl = found.impl
        for name, blocks in found.blocks.items():
            self._memo["blocks", size, name] = blocks

    def _precompute(self, request: Capture) -> None:
        if request.blocks is not None:
            names = tuple(name for name in request.reduce if ("blocks", request.blocks, name) not in self._memo)
            if names:
                self._pool(request.blocks, names)
        super()._precompute(request)
