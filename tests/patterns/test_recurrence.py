"""Gradients of state recurrences by chunks, against those of the loop over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workbench.patterns.recurrence import Dplr, Recurrence


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop(read: Tensor, write: Tensor, step: Tensor, v: Tensor) -> Tensor:
    state = torch.zeros(*v.shape[:2], read.shape[3], v.shape[3], dtype=v.dtype)
    out = []
    for t in range(v.shape[2]):
        state = step[:, :, t] @ state + write[:, :, t, :, None] * v[:, :, t, None]
        out.append((read[:, :, t, None] @ state)[..., 0, :])
    return torch.stack(out, 2)


@pytest.mark.parametrize("kind", ["diagonal", "dplr"])
@pytest.mark.parametrize("n", [1, 16, 17, 40])
def test_output_and_gradients_are_those_of_the_loop(kind: str, n: int) -> None:
    shape = (2, 3, n, 2)
    leaves = [rand(seed, *shape) for seed in range(6)]
    read, write, x, y, v, rate = (leaf.requires_grad_() for leaf in leaves)
    decay = rate.sigmoid()
    if kind == "diagonal":
        made, step = Recurrence(read, write, diagonal=decay), torch.diag_embed(decay)
    else:
        made, step = (
            Recurrence(read, write, Dplr(decay, x, y)),
            torch.diag_embed(decay) + x[..., None] * y[..., None, :],
        )
    out, wanted = made.output(v), loop(read, write, step, v)
    torch.testing.assert_close(out, wanted)
    weights = rand(9, *wanted.shape)
    found = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True, retain_graph=True)
    expected = torch.autograd.grad((wanted * weights).sum(), leaves, allow_unused=True)
    for one, other in zip(found, expected, strict=True):
        other = torch.zeros(shape, dtype=torch.float64) if other is None else other
        torch.testing.assert_close(torch.zeros_like(other) if one is None else one, other)
