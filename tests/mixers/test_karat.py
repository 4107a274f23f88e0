"""Fourier-KArAt: rows of W Phi(S) entry by entry, and the identity probe of the operator."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.mixers.karat import fourier_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]
N, R, F = 5, 3, 2


def drawn() -> dict[str, Any]:
    shapes = {
        "q": (2, 2, N, 4), "k": (2, 1, N, 4), "v": (2, 1, N, 3),
        "cosines": (2, R, N, F), "sines": (2, R, N, F), "projection": (2, N, R),
    }  # fmt: skip
    return example_tensors(3, torch.float64, **shapes)


def rows_are_projected_functions(op: Operator) -> None:
    """Every weight as a sum of sines and cosines of its row's scores; values that are one-hot give the same numbers back."""
    given = drawn()
    a, b, w = given["cosines"], given["sines"], given["projection"]
    wanted = torch.zeros(2, 2, N, N, dtype=torch.float64)
    for at in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(N)).tolist():
        batch, head, i = at
        row = [float(given["q"][batch, head, i] @ given["k"][batch, 0, j]) / 2 for j in range(N)]
        for p in range(R):
            z = 0.0
            for j, s in enumerate(row):
                for f in (1, 2):
                    z += float(a[head, p, j, f - 1]) * math.cos(f * s) + float(b[head, p, j, f - 1]) * math.sin(f * s)
            wanted[batch, head, i] += w[head, :, p] * z
    out, found = op(**given)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ given["v"])
    probed, _ = op(**{**given, "v": torch.eye(N, dtype=torch.float64).expand(2, 1, N, N)})
    torch.testing.assert_close(probed, wanted)


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "fourier-kolmogorov-arnold-attention": rows_are_projected_functions
}


def test_the_map_has_the_rank_of_the_hidden_row() -> None:
    _, found = fourier_attention(**drawn())
    assert found.sign == "signed"
    assert torch.linalg.matrix_rank(found.dense()[0, 0]) == R
    torch.testing.assert_close(found.blocks(2), AttentionMap.from_dense(found.dense()).blocks(2))


def test_heads_may_share_their_functions() -> None:
    given = drawn()
    tables = {name: given[name][:1] for name in ("cosines", "sines", "projection")}
    out, _ = fourier_attention(**{**given, **tables})
    full, _ = fourier_attention(**{**given, **{name: x.expand(2, *x.shape[1:]) for name, x in tables.items()}})
    torch.testing.assert_close(out, full)


def test_another_number_of_keys_is_refused() -> None:
    given = drawn()
    with pytest.raises(WorkbenchError, match="cosines is floating point"):
        fourier_attention(**{**given, "k": given["k"][:, :, 1:], "v": given["v"][:, :, 1:]})
    with pytest.raises(WorkbenchError, match="projection is floating point"):
        fourier_attention(**{**given, "projection": given["projection"][..., 1:]})
