"""Memories that learn while they read: a small network per head is trained on (key, value) pairs, token by token.

    linear      M(x) = W1 x
    MLP         M(x) = W1 gelu(W2 x)
    residual    M(x) = x + LN(W1 gelu(W2 x))       LN without weights

At token t a learner takes the gradient of a loss of M(k_t) - v_t with respect to W and changes W; then o_t = M(q_t). The values
enter through the gradient, at which later gradients depend on them again: o is not linear in v, and its map is a derivative.
The recurrence is nonlinear in W, so that nothing but a loop over tokens computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.mixers.scored import check_tensor
from workbench.patterns.jacobian import JacobianMap

Weights = tuple[Tensor, ...]
"""(W1,) or (W1, W2), each ``[B, H, rows, columns]``."""


class After(NamedTuple):
    """What a learner made of a token: the weights after it, what else it carries on, and what the weights' change cost."""

    weights: Weights
    carried: Weights
    retention: Tensor


Loss = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(error M(k_t) - v_t ``[B, H, E]``, t) -> the loss ``[B, H]`` and its gradient ``[B, H, E]``."""
Update = Callable[[Weights, Weights, Weights, int], After]
"""(weights, carried, gradients, t) -> the next ones."""


class MemoryMap(JacobianMap):
    """The derivative of a memory's outputs by its values, and what the memory did at each token, all ``[B, H, N]``:

    ``surprise`` is the loss of token t before it was learned, ``retention`` what its update cost in the measure that keeps
    the memory close to what it was. ``native()`` is the surprise. Rows are kept once made: each costs a pass over all tokens.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], at: Tensor, surprise: Tensor, retention: Tensor) -> None:
        super().__init__(function, at)
        self.surprise, self.retention = surprise.detach(), retention.detach()
        self._made: dict[int, Tensor] = {}

    def rows(self, lo: int, hi: int) -> Tensor:
        lo, hi = self._span(lo, hi, self.shape[2], "rows")
        new = [row for row in range(lo, hi) if row not in self._made]
        if new:
            made = JacobianMap.rows(self, new[0], new[-1] + 1)
            self._made |= {row: made[:, :, row - new[0] : row - new[0] + 1] for row in new}
        none = self.at.new_zeros(*self.shape[:2], 0, self.shape[3])
        return torch.cat([none, *(self._made[row] for row in range(lo, hi))], 2)

    def native(self) -> Tensor:
        """The surprise of each token."""
        return self.surprise


class Network(NamedTuple):
    """M with its shape told: ``residual`` with x + LN(.) around the layers."""

    residual: bool

    def __call__(self, weights: Weights, x: Tensor) -> Tensor:
        """M(x) ``[B, H, E]``."""
        return self.forward(weights, x)[0]

    def forward(self, weights: Weights, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Weights]]:
        """M(x), and what turns a gradient by M(x) into gradients by the weights."""
        if len(weights) == 1:
            y = _product(weights[0], x)
            return y, lambda g: (g[..., :, None] * x[..., None, :],)
        first, second = weights
        inner = _product(second, x)
        hidden = torch.nn.functional.gelu(inner)
        y = _product(first, hidden)
        if self.residual:
            centred = y - y.mean(-1, keepdim=True)
            deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            normal = centred / deviation

        def gradients(g: Tensor) -> Weights:
            if self.residual:
                g = (g - g.mean(-1, keepdim=True) - normal * (g * normal).mean(-1, keepdim=True)) / deviation
            back = _product(first.transpose(-1, -2), g) * _gelu_slope(inner)
            return g[..., :, None] * hidden[..., None, :], back[..., :, None] * x[..., None, :]

        return (x + normal if self.residual else y), gradients


def remember(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Weights,
    network: Network,
    loss: Loss,
    update: Update,
    carried: Weights = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Learn and read token by token: outputs ``[B, H, N, E]``, surprise and retention ``[B, H, N]``."""
    outs, surprises, retentions = [], [], []
    for t in range(q.shape[2]):
        guess, gradients = network.forward(weights, k[:, :, t])
        cost, slope = loss(guess - v[:, :, t], t)
        weights, carried, kept = update(weights, carried, gradients(slope), t)
        outs.append(network(weights, q[:, :, t]))
        surprises.append(cost)
        retentions.append(kept)
    return torch.stack(outs, 2), torch.stack(surprises, 2), torch.stack(retentions, 2)


def memory_attention(
    v: Tensor, tensors: dict[str, Tensor], run: Callable[[dict[str, Tensor], Tensor], tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, MemoryMap]:
    """Output and map of ``run``, which takes tensors and values ``[B, G, N, E]`` to what ``remember`` returns.

    The output is differentiable in all of them, the map holds them detached."""
    out, surprise, retention = run(tensors, v)
    still = {name: tensor.detach() for name, tensor in tensors.items()}

    def outputs(values: Tensor) -> Tensor:
        return run(still, values)[0].to(values.dtype)

    return out.to(v.dtype), MemoryMap(outputs, v, surprise, retention)


def check_memory(q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor | None) -> torch.dtype:
    """Raise ``WorkbenchError`` naming the argument that does not fit; the type to work in."""
    check_tensor("q", q, ("B", "H", "N", "E"))
    b, h, n, e = q.shape
    check_tensor("k", k, (b, h, n, e))
    check_tensor("v", v, (b, "G", n, e))
    if h % v.shape[1]:
        raise WorkbenchError(f"v has value heads that divide the {h} heads; got {v.shape[1]}")
    check_tensor("w1", w1, (h, e, e if w2 is None else "F"))
    if w2 is not None:
        check_tensor("w2", w2, (h, w1.shape[2], e))
    return torch.promote_types(working_dtype(q.dtype), v.dtype)


def starting(w1: Tensor, w2: Tensor | None, batch: int, dtype: torch.dtype) -> Weights:
    """The weights before the first token, one copy for each example."""
    given = (w1,) if w2 is None else (w1, w2)
    return tuple(w.to(dtype).expand(batch, *w.shape) for w in given)


def square_distance(new: Weights, old: Weights) -> Tensor:
    """|W - W'|^2 / 2 over all layers, ``[B, H]``."""
    return sum_layers([(a - b).square().sum((-2, -1)) / 2 for a, b in zip(new, old, strict=True)])


def sum_layers(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0)


def at(x: Tensor, t: int) -> Tensor:
    """Token t of ``[B, H, N]`` as a factor of matrices."""
    return x[:, :, t, None, None]


def _product(w: Tensor, x: Tensor) -> Tensor:
    return (w @ x[..., None])[..., 0]


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * 2**-0.5)) + x * torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
