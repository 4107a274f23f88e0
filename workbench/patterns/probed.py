"""The map of any operator that is linear in its values, found by running it: fused kernels, modules of other packages.

A column of the map is what the operator makes of a value that is 1 at one key and 0 elsewhere; every value channel carries a
column of its own, so one run gives as many columns as the operator takes channels. A sum over a block of keys is what it makes
of a value that is 1 on the block. A row is the gradient of one output with respect to the values, a column sum the gradient of
the sum of all outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap, block_cells
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.maps import state_metadata
from workbench.mods import Mod

BACKWARD = 3
"""Runs that a run with its gradient costs, roughly."""


class ProbedMap(AttentionMap):
    """The map of ``operator``, which takes values ``[B, G, K, width]`` to outputs ``[B, H, Q, width]``.

    ``values`` are values as the operator takes them: they tell B, G, K, type and device, and ``width`` unless it is given. All
    probes have exactly that width, so a kernel that wants the width of its queries gets it. Everything else that the operator
    depends on (queries, keys, masks, gates) must stay as it is between calls.

    At construction the operator runs four times; one that is not linear in its values, adds a bias, mixes channels or draws
    random numbers raises. Sign and row sum are ``"signed"`` and ``"free"`` unless told; a stated row sum of 1 is checked.
    Numbers have the operator's own rounding. Rows and column sums need its gradient; without one they come from columns.
    """

    def __init__(
        self,
        operator: Callable[[Tensor], Tensor],
        values: Tensor,
        *,
        width: int | None = None,
        offset: int = 0,
        **metadata: str,
    ) -> None:
        if values.ndim != 4 or 0 in values.shape or not values.is_floating_point():
            raise WorkbenchError(f"values are floating point [B, G, K, E]; got {values.dtype} {list(values.shape)}")
        self.width = values.shape[3] if width is None else width
        if self.width < 1:
            raise WorkbenchError(f"a probe is at least one channel wide; got width={width}")
        self._operator = operator
        self._like = values.new_empty(values.shape[:3])
        b, g, k = self._like.shape
        shape, self.differentiable = self._check(values.detach())
        super().__init__((b, *shape, k), kv_heads=g, offset=offset)
        if shape[0] % g:
            raise WorkbenchError(f"the operator made {shape[0]} heads from {g} value heads: no whole number for each")
        self.sign, self.row_sum = "signed", "free"
        state_metadata(self, metadata)
        if self.row_sum in ("1", "<=1"):
            low, high = float(self.row_sums().min()), float(self.row_sums().max())
            if high > 1.02 or (self.row_sum == "1" and low < 0.98):
                raise WorkbenchError(f"row_sum={self.row_sum!r}, but rows sum to {low:.4g} .. {high:.4g}")

    # ------------------------------------------------------------------- probes

    def columns(self, lo: int, hi: int) -> Tensor:
        """Columns ``[lo, hi)`` of the map, ``[B, H, Q, hi - lo]``: the identity probe."""
        lo, hi = self._span(lo, hi, self.shape[3], "columns")
        keys = torch.arange(self.shape[3], device=self._like.device)
        parts = [
            self._forward((keys[:, None] == keys[a:b]).expand(*self._like.shape, -1)) for a, b in self._groups(lo, hi)
        ]
        return torch.cat([self._like.new_empty(*self.shape[:3], 0, dtype=self._work), *parts], 3)

    def block_columns(self, size: int) -> Tensor:
        """Mass of every row on each block of keys, ``[B, H, Q, ceil(K / size)]``: the block probe. Signed sums if the map is
        signed."""
        if size < 1:
            raise WorkbenchError(f"a block has at least one token; got size={size}")
        which = torch.arange(self.shape[3], device=self._like.device) // size
        blocks = torch.arange(-(-self.shape[3] // size), device=self._like.device)
        parts = [
            self._forward((which[:, None] == blocks[a:b]).expand(*self._like.shape, -1))
            for a, b in self._groups(0, len(blocks))
        ]
        return torch.cat(parts, 3)

    def adjoint_by_head(self, y: Tensor) -> Tensor:
        """Mᵀ y of every head by itself for y ``[B, H, Q, C]``: ``[B, H, K, C]``. Heads that share values take channels of their
        own."""
        b, h, q, c = y.shape
        g = self.kv_heads
        apart = torch.eye(h // g, dtype=y.dtype, device=y.device)
        spread = torch.einsum("bgmqc,mn->bgmqcn", y.reshape(b, g, h // g, q, c), apart).reshape(b, h, q, -1)
        return self._adjoint(spread).unflatten(3, (c, h // g)).permute(0, 1, 4, 2, 3).reshape(b, h, -1, c)

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self._tile(lo, hi, 0, self.shape[3])

    # ------------------------------------------------------------------ answers

    def matvec(self, v: Tensor) -> Tensor:
        self._check_values(v)
        return self._forward(v).to(v.dtype)

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        if not self.differentiable:
            return super().rmatvec(y)
        return self._adjoint(y).to(y.dtype)

    def row_sums(self) -> Tensor:
        return self._remember(("row_sums",), lambda: self._forward(self._like.new_ones(*self._like.shape, 1))[..., 0])

    def _received(self) -> Tensor:
        if self.differentiable:
            return self.adjoint_by_head(self._like.new_ones(*self.shape[:3], 1))[..., 0]
        return torch.cat([self.columns(a, b).sum(2) for a, b in self._groups(0, self.shape[3])], 2)

    def _mass(self, mod: Mod | Tensor) -> Tensor:
        if not isinstance(mod, Tensor):
            return super()._mass(mod)
        weights = mod.to(self._work)[:, None, :, None].expand(*self._like.shape, 1)
        return self._forward(weights)[..., 0]

    def _blocks(self, size: int, reduce: str) -> Tensor:
        if reduce == "max" or (reduce == "abs" and self.sign == "signed"):
            return super()._blocks(size, reduce)
        q, k = self.shape[2:]
        pieces = -(-q // size)
        masses = torch.nn.functional.pad(self.block_columns(size), (0, 0, 0, pieces * size - q))
        blocks = masses.unflatten(2, (pieces, size)).sum(3)
        return blocks / block_cells(q, k, size, blocks) if reduce == "mean" else blocks

    def _tile(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        """By columns or by rows, whichever takes fewer runs."""
        if q_lo == q_hi or k_lo == k_hi:
            return self._like.new_empty(*self.shape[:2], q_hi - q_lo, k_hi - k_lo, dtype=self._work)
        group = self.shape[1] // self.kv_heads
        by_columns = -(-(k_hi - k_lo) // self.width)
        by_rows = -(-(q_hi - q_lo) * group // self.width) * BACKWARD
        if by_columns <= by_rows or not self.differentiable:
            parts = [self.columns(a, b)[:, :, q_lo:q_hi] for a, b in self._groups(k_lo, k_hi)]
            return torch.cat(parts, 3)
        wanted = torch.arange(q_lo, q_hi, device=self._like.device)
        chosen = torch.arange(self.shape[2], device=self._like.device)[:, None] == wanted
        found = self.adjoint_by_head(chosen.to(self._like.dtype).expand(*self.shape[:3], -1))
        return found.transpose(2, 3)[..., k_lo:k_hi]

    # ------------------------------------------------------------------- running

    @property
    def _work(self) -> torch.dtype:
        return working_dtype(self._like.dtype)

    def _groups(self, lo: int, hi: int) -> Iterator[tuple[int, int]]:
        for start in range(lo, hi, self.width):
            yield start, min(hi, start + self.width)

    def _filled(self, part: Tensor) -> Tensor:
        """Some channels in the operator's own type, zeros up to its width."""
        return torch.nn.functional.pad(part.to(self._like.dtype), (0, self.width - part.shape[3]))

    def _forward(self, v: Tensor) -> Tensor:
        """The operator's output for any number of channels, ``[B, H, Q, C]``."""
        with torch.no_grad():
            runs = []
            for lo, hi in self._groups(0, v.shape[3]):
                runs.append(self._operator(self._filled(v[..., lo:hi]))[..., : hi - lo].to(self._work))
            return torch.cat(runs, 3)

    def _adjoint(self, y: Tensor) -> Tensor:
        """The gradient of sum(y * output) with respect to the values, ``[B, G, K, C]``."""
        runs = []
        for lo, hi in self._groups(0, y.shape[3]):
            with torch.enable_grad():
                v = self._like.new_zeros(*self._like.shape, self.width).requires_grad_()
                (found,) = torch.autograd.grad(self._operator(v), v, self._filled(y[..., lo:hi]))
            runs.append(found[..., : hi - lo].to(self._work))
        return torch.cat(runs, 3)

    def _check(self, values: Tensor) -> tuple[tuple[int, int], bool]:
        """Heads and queries of the output, and whether it has a gradient; raises unless the operator is linear."""
        extra = -(-self.width // values.shape[3])
        x = values.repeat(1, 1, 1, extra)[..., : self.width].contiguous()
        y = x.roll(1, 2).roll(1, 3)
        with torch.no_grad():
            first, second = self._operator(x), self._operator(y)
        wanted = f"[B, H, Q, {self.width}] with B = {values.shape[0]}"
        if first.ndim != 4 or first.shape[0] != values.shape[0] or first.shape[3] != self.width:
            raise WorkbenchError(f"the operator makes outputs {wanted}; got {list(first.shape)}")
        with torch.enable_grad():
            both = self._operator((2 * x - 0.5 * y).requires_grad_())
        differentiable, both = both.requires_grad, both.detach()
        eps = torch.finfo(values.dtype).eps
        work = self._work
        size = max(float(part.to(work).abs().max()) for part in (first, second, both)) or 1.0
        tolerance = max(16 * eps, eps**0.5) * size
        sums = 2 * first.to(work) - 0.5 * second.to(work)
        if not _close(both.to(work), sums, tolerance):
            raise WorkbenchError("the operator is not linear in its values (or adds a bias, or draws random numbers)")
        with torch.no_grad():
            rolled = self._operator(x.roll(1, 3))
        if not _close(rolled.to(work), first.to(work).roll(1, 3), tolerance):
            raise WorkbenchError("the operator mixes value channels: a map has one weight for all channels of a head")
        return (first.shape[1], first.shape[2]), differentiable


def _close(got: Tensor, wanted: Tensor, tolerance: float) -> bool:
    return bool(((got - wanted).abs() <= tolerance).all())


class ProbedSoftmaxMap(ProbedMap):
    """The probed map of plain softmax attention over known queries and keys.

    q ``[B, H, Q, E]`` and k ``[B, G, K, E]`` are what the operator makes its scores of, ``lse`` ``[B, H, Q]`` the natural
    logarithms of its denominators. Values may be as wide as ``width``, by default as the keys. The entropy takes the runs of one
    value instead of all rows: H_i = lse_i - scale q_i . (P k)_i.
    """

    def __init__(
        self,
        operator: Callable[[Tensor], Tensor],
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        *,
        scale: float | None = None,
        width: int | None = None,
        offset: int = 0,
        row_sum: str = "1",
    ) -> None:
        super().__init__(operator, k, width=width, offset=offset, sign="nonnegative", row_sum=row_sum)
        if tuple(lse.shape) != self.shape[:3] or tuple(q.shape[:3]) != self.shape[:3]:
            raise WorkbenchError(
                f"q is [B, H, Q, E] and lse [B, H, Q] = {list(self.shape[:3])}; got {list(q.shape)} and {list(lse.shape)}"
            )
        self.q, self.k, self.lse = q.detach(), k.detach(), lse.detach()
        self.scale = q.shape[3] ** -0.5 if scale is None else scale

    def _entropy(self) -> Tensor:
        mean_key = self._forward(self.k)
        found = self.lse - self.scale * (self.q.to(mean_key.dtype) * mean_key).sum(-1)
        return found.masked_fill(self.lse.isneginf(), 0.0).to(self._work)

    def position(self) -> Tensor:
        """Mean attended position sum_j P_ij j, ``[B, H, Q]``. Positions run as two bytes, which every type holds exactly."""
        keys = torch.arange(self.shape[3], device=self._like.device)
        found = self._forward(torch.stack([keys // 256, keys % 256], 1).expand(*self._like.shape, -1))
        return 256 * found[..., 0] + found[..., 1]
