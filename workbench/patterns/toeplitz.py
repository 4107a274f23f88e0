"""Maps of convolutions: weights that depend on the displacement of query and key, times a gate on either side.

Along one axis M_ij = left_i kernel[i - j - first] right_j; along a grid of two or three axes the displacement has one part per
axis and tokens are numbered row by row. Kernel, gates and every answer but rows take memory linear in the number of tokens:
products go by shifts where the kernel has few taps, by FFT otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from workbench import attention_map
from workbench.attention_map import METADATA, AttentionMap, block_cells
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.maps import head_index, state_metadata

TAPS = 32
"""Kernels with at most so many taps are applied shift by shift."""

Sides = int | Sequence[int]


class ToeplitzMap(AttentionMap):
    """M_ij = left_i kernel[i - j - first] right_j, zero where the kernel has no such tap.

    ``kernel`` ``[B or 1, H, L]``, or ``[B or 1, H, L1, L2]`` and so on for grids; ``queries``, ``keys`` and ``first`` are
    then one number per axis (a single ``first`` serves all axes). A causal convolution has ``first=0``, a centred one of odd
    length ``first=-(L // 2)``. With ``circular`` displacements count modulo the number of keys, which is that of the queries.
    ``left`` ``[B, H, Q]`` and ``right`` ``[B, H, K]`` are gates. Along one axis query i stands at i + ``offset``.

    Sign and causality follow from the numbers; ``row_sum`` is ``"free"`` unless told. Tensors are detached; types narrower than
    float32 are answered in float32.
    """

    def __init__(
        self,
        kernel: Tensor,
        *,
        queries: Sides,
        keys: Sides,
        first: Sides = 0,
        circular: bool = False,
        left: Tensor | None = None,
        right: Tensor | None = None,
        kv_heads: int | None = None,
        offset: int = 0,
        **metadata: str,
    ) -> None:
        if kernel.ndim < 3 or 0 in kernel.shape or not kernel.is_floating_point():
            raise WorkbenchError(
                f"a kernel is floating point [B, H, L], one more axis per axis of the grid; got {kernel.dtype} "
                f"{list(kernel.shape)}"
            )
        axes = kernel.ndim - 2
        self.queries, self.keys = _sides(queries, axes, "queries"), _sides(keys, axes, "keys")
        self.first = (first,) * axes if isinstance(first, int) else tuple(first)
        if len(self.first) != axes:
            raise WorkbenchError(f"first is one displacement per axis, {axes} here; got {self.first}")
        if circular and (
            self.queries != self.keys or any(m > n for m, n in zip(kernel.shape[2:], self.keys, strict=True))
        ):
            raise WorkbenchError(
                f"a circular kernel {list(kernel.shape[2:])} fits in as many queries as keys; got queries {self.queries}, "
                f"keys {self.keys}"
            )
        if offset and (axes > 1 or circular):
            raise WorkbenchError(f"an offset needs one axis that does not wrap around; got offset={offset}")
        given = [gate for gate in (left, right) if gate is not None]
        b = max([kernel.shape[0], *(gate.shape[0] for gate in given)])
        h, q, k = kernel.shape[1], math.prod(self.queries), math.prod(self.keys)
        super().__init__((b, h, q, k), kv_heads=kv_heads, offset=offset)
        for name, gate, length in (("left", left, q), ("right", right, k)):
            if gate is not None and tuple(gate.shape) != (b, h, length):
                raise WorkbenchError(f"{name} is [B, H, tokens] = {[b, h, length]}; got {list(gate.shape)}")
        if kernel.shape[0] not in (1, b):
            raise WorkbenchError(f"a kernel [B or 1, H, L] for {b} examples; got {list(kernel.shape)}")
        if h % self.kv_heads:
            raise WorkbenchError(f"{h} heads do not share {self.kv_heads} value heads")
        self.kernel, self.circular = kernel.detach(), circular
        self.left = None if left is None else left.detach()
        self.right = None if right is None else right.detach()
        signed = any(bool((part < 0).any()) for part in (self.kernel, *given))
        self.sign, self.row_sum = "signed" if signed else "nonnegative", "free"
        state_metadata(self, metadata)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the answers."""
        found = self.kernel.dtype
        for gate in (self.left, self.right):
            found = found if gate is None else torch.promote_types(found, gate.dtype)
        return working_dtype(found)

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        return self._tile(lo, hi, 0, self.shape[3])

    def row_sums(self) -> Tensor:
        return self._remember(("row_sums",), lambda: self._forward(self._ones(self.shape[3]))[..., 0])

    def matvec(self, v: Tensor) -> Tensor:
        self._check_values(v)
        return self._forward(v.repeat_interleave(self.shape[1] // self.kv_heads, 1)).to(v.dtype)

    def rmatvec(self, y: Tensor) -> Tensor:
        self._check_outputs(y)
        return self._backward(y).unflatten(1, (self.kv_heads, -1)).sum(2).to(y.dtype)

    def parts(self) -> dict[str, Any] | None:
        return {
            "kernel": self.kernel,
            "queries": self.queries,
            "keys": self.keys,
            "first": self.first,
            "circular": self.circular,
            "left": self.left,
            "right": self.right,
            "kv_heads": self.kv_heads,
            "offset": self.offset,
        }

    def heads(self, indices: Sequence[int]) -> ToeplitzMap:
        chosen = head_index(indices, self.shape[1])
        gates = [None if gate is None else gate[:, chosen] for gate in (self.left, self.right)]
        return self._like(self.kernel[:, chosen], *gates)

    # ------------------------------------------------------------------ answers

    def _tile(self, q_lo: int, q_hi: int, k_lo: int, k_hi: int) -> Tensor:
        taps = self.kernel.shape[2:]
        device = self.kernel.device
        rows = _coordinates(torch.arange(q_lo, q_hi, device=device), self.queries)
        columns = _coordinates(torch.arange(k_lo, k_hi, device=device), self.keys)
        place, inside = (
            torch.zeros((), dtype=torch.long, device=device),
            torch.ones((), dtype=torch.bool, device=device),
        )
        for axis, length in enumerate(taps):
            tap = rows[axis][:, None] + self.offset - columns[axis] - self.first[axis]
            if self.circular:
                tap = tap % self.keys[axis]
            inside = inside & (tap >= 0) & (tap < length)
            place = place * length + tap.clamp(0, length - 1)
        found = self.kernel.flatten(2).to(self.dtype)[:, :, place].masked_fill(~inside, 0.0)
        if self.left is not None:
            found = found * self.left[:, :, q_lo:q_hi, None].to(self.dtype)
        if self.right is not None:
            found = found * self.right[:, :, None, k_lo:k_hi].to(self.dtype)
        return found.expand(self.shape[0], -1, -1, -1)

    def _received(self) -> Tensor:
        return self._backward(self._ones(self.shape[2]))[..., 0]

    def _distance(self, window: int | None) -> Tensor:
        return self._weighted(window, 1) if self._even else super()._distance(window)

    def _distance2(self) -> Tensor:
        return self._weighted(None, 2) if self._even else super()._distance2()

    @property
    def _even(self) -> bool:
        """Whether a tap spans the same number of tokens everywhere."""
        return not self.circular and self.queries[1:] == self.keys[1:]

    def _weighted(self, window: int | None, power: int) -> Tensor:
        """Row sums of the map with every tap times the distance it spans."""
        far = torch.zeros((), dtype=self.dtype, device=self.kernel.device)
        for axis, length in enumerate(self.kernel.shape[2:]):
            step = math.prod(self.keys[axis + 1 :])
            tap = torch.arange(length, device=far.device, dtype=self.dtype) + self.first[axis]
            far = far[..., None] + step * tap
        far = far.abs() if window is None else far.abs().clamp(max=window)
        return self._like(self.kernel.to(self.dtype) * far**power, self.left, self.right).row_sums()

    def _blocks(self, size: int, reduce: str) -> Tensor:
        """Sums over the columns of every key block by products with block indicators; maxima need the rows."""
        if reduce == "max":
            return super()._blocks(size, reduce)
        if reduce == "abs" and self.sign == "signed":
            gates = [None if gate is None else gate.abs() for gate in (self.left, self.right)]
            return self._like(self.kernel.abs(), *gates).blocks(size)
        b, h, q, k = self.shape
        nq, nk = -(-q // size), -(-k // size)
        out = torch.zeros(b, h, nq, nk, dtype=self.dtype, device=self.kernel.device)
        which = torch.arange(k, device=out.device) // size
        step = max(1, attention_map.CHUNK // (b * h * max(q, k)))
        for lo in range(0, nk, step):
            blocks = torch.arange(lo, min(nk, lo + step), device=out.device)
            part = self._forward((which[:, None] == blocks).to(self.dtype).expand(b, h, -1, -1))
            part = torch.nn.functional.pad(part, (0, 0, 0, nq * size - q)).unflatten(2, (nq, size))
            out[..., lo : lo + step] = part.sum(3)
        return out / block_cells(q, k, size, out) if reduce == "mean" else out

    def _like(self, kernel: Tensor, left: Tensor | None, right: Tensor | None) -> ToeplitzMap:
        """A map of the same geometry with other numbers, every head with a value head of its own."""
        told = {name: getattr(self, name) for name in METADATA if name != "sign"}
        return ToeplitzMap(
            kernel, queries=self.queries, keys=self.keys, first=self.first, circular=self.circular,
            left=left, right=right, offset=self.offset, **told,
        )  # fmt: skip

    # ----------------------------------------------------------------- products

    def _ones(self, length: int) -> Tensor:
        return torch.ones(*self.shape[:2], length, 1, dtype=self.dtype, device=self.kernel.device)

    def _forward(self, v: Tensor) -> Tensor:
        """M v for ``[B, H, K, E]``, one value head per head."""
        work = torch.promote_types(self.dtype, v.dtype)
        v = v.to(work) if self.right is None else v.to(work) * self.right[..., None].to(work)
        out = self._apply(self.kernel.to(work), [n - self.offset for n in self.first], v, self.keys, self.queries)
        return out if self.left is None else out * self.left[..., None].to(work)

    def _backward(self, y: Tensor) -> Tensor:
        """Mᵀ y for ``[B, H, Q, E]``: the kernel read backwards."""
        work = torch.promote_types(self.dtype, y.dtype)
        y = y.to(work) if self.left is None else y.to(work) * self.left[..., None].to(work)
        axes = range(2, self.kernel.ndim)
        last = [1 - n - m + self.offset for n, m in zip(self.kernel.shape[2:], self.first, strict=True)]
        out = self._apply(self.kernel.to(work).flip(*axes), last, y, self.queries, self.keys)
        return out if self.right is None else out * self.right[..., None].to(work)

    def _apply(
        self, kernel: Tensor, first: Sequence[int], v: Tensor, sides: tuple[int, ...], wanted: tuple[int, ...]
    ) -> Tensor:
        """sum_j kernel[i - j - first] v_j on the grid ``wanted`` from values on the grid ``sides``."""
        taps = kernel.shape[2:]
        grid = v.transpose(2, 3).unflatten(3, sides)  # [B, H, E, *sides]
        kernel = kernel[:, :, None]
        if not self.circular and math.prod(taps) <= TAPS:
            for axis, (length, start, side) in enumerate(zip(taps, first, wanted, strict=True)):
                grid = _take(grid, 3 + axis, 1 - length - start, side + length - 1)
            out = torch.zeros(*grid.shape[:3], *wanted, dtype=grid.dtype, device=grid.device)
            for weight, tap in zip(kernel.flatten(3).unbind(3), _taps(taps), strict=True):
                seen = grid
                for axis, (length, place, side) in enumerate(zip(taps, tap, wanted, strict=True)):
                    seen = seen.narrow(3 + axis, length - 1 - place, side)
                out += weight.view(*weight.shape, *(1,) * len(taps)) * seen
        else:
            lengths = sides if self.circular else [n + m - 1 for n, m in zip(sides, taps, strict=True)]
            axes = tuple(range(3, grid.ndim))
            spectrum = torch.fft.rfftn(grid, s=tuple(lengths), dim=axes) * torch.fft.rfftn(
                kernel, s=tuple(lengths), dim=axes
            )
            out = torch.fft.irfftn(spectrum, s=tuple(lengths), dim=axes)
            for axis, (start, side) in enumerate(zip(first, wanted, strict=True)):
                out = out.roll(start, 3 + axis) if self.circular else _take(out, 3 + axis, -start, side)
        return out.flatten(3).transpose(2, 3)


def _sides(sides: Sides, axes: int, name: str) -> tuple[int, ...]:
    found = (sides,) if isinstance(sides, int) else tuple(sides)
    if len(found) != axes or any(side < 1 for side in found):
        raise WorkbenchError(f"{name} is one positive number per axis of the kernel, {axes} here; got {sides}")
    return found


def _coordinates(tokens: Tensor, sides: tuple[int, ...]) -> list[Tensor]:
    """The position of every token along each axis of a grid that is numbered row by row."""
    found = []
    for side in reversed(sides):
        found.append(tokens % side)
        tokens = tokens // side
    return found[::-1]


def _taps(lengths: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(tap) for tap in torch.cartesian_prod(*map(torch.arange, lengths)).view(-1, len(lengths)).tolist()]


def _take(values: Tensor, axis: int, start: int, length: int) -> Tensor:
    """``length`` entries along an axis from ``start`` on, zero outside of it."""
    place = torch.arange(start, start + length, device=values.device)
    side = values.shape[axis]
    found = values.index_select(axis, place.clamp(0, side - 1))
    outside = ((place < 0) | (place >= side)).view(-1, *(1,) * (values.ndim - axis - 1))
    return found.masked_fill(outside, 0.0)
