"""MossFormer's two parts, written out pair by pair."""

from __future__ import annotations

import cmath
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.mixers import mossformer

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def drawn(tokens: int, width: int = 6) -> dict[str, Any]:
    shapes = {"shared": (2, 2, tokens, width), "v": (2, 1, tokens, 3), "gamma": (2, 4, width), "beta": (2, 4, width)}
    return example_tensors(6, torch.float64, **shapes)


def turned(x: Tensor, place: int) -> Tensor:
    """One vector, its neighbouring channels as complex numbers."""
    width = min(32, len(x)) // 2 * 2
    out = x.clone()
    for pair in range(width // 2):
        z = complex(*x[2 * pair : 2 * pair + 2].tolist()) * cmath.exp(1j * place * 10000.0 ** (-2 * pair / width))
        out[2 * pair], out[2 * pair + 1] = z.real, z.imag
    return out


def local_pairs_and_global_products(op: Operator) -> None:
    n, chunk = 10, 4
    given = drawn(n)
    z, gamma, beta = given["shared"], given["gamma"], given["beta"]
    wanted = torch.zeros(2, 2, n, n).double()
    for b in range(2):
        for h in range(2):
            four = [[turned(gamma[h, p] * z[b, h, i] + beta[h, p], i) for i in range(n)] for p in range(4)]
            for i in range(n):
                for j in range(n):
                    near = float(four[0][i] @ four[2][j]) / chunk if i // chunk == j // chunk else 0.0
                    wanted[b, h, i, j] = max(near, 0.0) ** 2 + float(four[1][i] @ four[3][j]) / n
    out, found = op(**given, chunk=chunk)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ given["v"])
    # One chunk of everything, without the global part, is plain squared ReLU attention.
    out, found = op(**given, chunk=n, linear=False, rotary=False)
    q, k = (z * gamma[:, p, None] + beta[:, p, None] for p in (0, 2))
    plain = (q @ k.transpose(-1, -2) / n).clamp(min=0) ** 2
    torch.testing.assert_close(found.dense(), plain)
    torch.testing.assert_close(out, plain @ given["v"])
    assert found.sign == "nonnegative"


IDENTITIES: dict[str, Callable[[Operator], None]] = {"mossformer-joint-attention": local_pairs_and_global_products}


def test_long_sequences_hold_chunks_not_pairs() -> None:
    shapes = {"shared": (1, 1, 20000, 4), "v": (1, 1, 20000, 2), "gamma": (1, 4, 4), "beta": (1, 4, 4)}
    given = example_tensors(6, torch.float32, **shapes)
    out, found = mossformer.mossformer_attention(**given, chunk=64)
    assert found.blocks(2000).shape == (1, 1, 10, 10)
    torch.testing.assert_close(found.rows(19999, 20000) @ given["v"], out[:, :, 19999:], rtol=1e-3, atol=1e-4)


def test_rotations_leave_channels_beyond_the_32nd_alone() -> None:
    x = example_tensors(1, torch.float64, x=(5, 35))["x"]
    torch.testing.assert_close(mossformer.rotated(x), torch.stack([turned(x[i], i) for i in range(5)]))
    assert torch.equal(mossformer.rotated(x)[:, 32:], x[:, 32:])
    assert torch.equal(mossformer.rotated(x[:, :1]), x[:, :1])


def test_wrong_arguments_are_named() -> None:
    given = drawn(5)
    with pytest.raises(WorkbenchError, match=r"beta is floating point \[2, 4, 6\]"):
        mossformer.mossformer_attention(**{**given, "beta": given["beta"][:, :3]})
    with pytest.raises(WorkbenchError, match="chunk is a positive number of tokens; got 0"):
        mossformer.mossformer_attention(**given, chunk=0)
    with pytest.raises(WorkbenchError, match="v is"):
        mossformer.mossformer_attention(**{**given, "v": given["v"][:, :, :3]})
    with pytest.raises(WorkbenchError, match="a multiple of those of v; got 3"):
        mossformer.mossformer_attention(**{**given, "v": given["v"].expand(-1, 3, -1, -1)})
