"""Linear and channel-decay maps against literal sums over pairs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import UnknownName, WorkbenchError
from workbench.maps import GatedMap
from workbench.patterns.linear import ChannelDecayMap, LinearMap

B, H, G = 2, 4, 2


def drawn(n: int, m: int | None = None, r: int = 3, **more: tuple[int, ...]) -> dict[str, Tensor]:
    shapes = {"q": (B, H, n, r), "k": (B, G, n if m is None else m, r), **more}
    return example_tensors(3, torch.float64, **shapes)


def literal(
    q: Tensor,
    k: Tensor,
    a: Tensor | None,
    *,
    causal: bool,
    scale: float = 1.0,
    offset: int = 0,
    diagonal: Tensor | None = None,
) -> Tensor:
    """a is [B, H, N, R]; with a diagonal the row does not decay by its own token."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    m = q.new_zeros(*q.shape[:3], k.shape[2])
    for i in range(q.shape[2]):
        for j in range(k.shape[2]):
            if causal and j > i + offset:
                continue
            last = i + offset + (diagonal is None)
            gap = 0.0 if a is None else a[:, :, j + 1 : last].sum(2)
            m[:, :, i, j] = scale * (q[:, :, i] * k[:, :, j] * (gap.exp() if isinstance(gap, Tensor) else 1.0)).sum(-1)
            if diagonal is not None and i == j:
                m[:, :, i, j] = diagonal[:, :, i]
    return m


def check(found: AttentionMap, dense: Tensor) -> None:
    """Every answer against the literal map."""
    b, h, n, m = dense.shape
    close = lambda x, y: torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)  # noqa: E731
    close(found.dense(), dense)
    for lo, hi in ((0, n), (n // 3, n), (n - 1, n), (n // 2, n // 2), (0, 1)):
        close(found.rows(lo, hi), dense[:, :, lo:hi])
        for left, right in ((0, m), (m // 3, m), (0, m // 3), (m - 1, m), (m // 2, m // 2)):
            close(found.tile(slice(lo, hi), slice(left, right)), dense[:, :, lo:hi, left:right])
    close(found.received(), dense.sum(2))
    close(found.row_sums(), dense.sum(3))
    v, y = (example_tensors(5, torch.float64, x=(b, x, y, 2))["x"] for x, y in ((found.kv_heads, m), (h, n)))
    close(found.matvec(v), dense @ v.repeat_interleave(h // found.kv_heads, 1))
    close(found.rmatvec(y), (dense.transpose(-1, -2) @ y).unflatten(1, (found.kv_heads, -1)).sum(2))
    weights = torch.arange(m, dtype=torch.float64)
    close(found.mass(weights), dense @ weights)
    close(found.mass(lambda b, h, q, k: k < 2), dense[..., :2].sum(-1))
    plain = AttentionMap.from_dense(dense)
    for size in (1, 4, 7, 200):
        for name in ("sum", "mean", "abs", "max"):
            close(found.blocks(size, name), plain.blocks(size, name))
    close(found.heads([3, 1]).dense(), dense[:, [3, 1]])
    gate = torch.linspace(0, 1, n, dtype=torch.float64).expand(b, h, n)
    gated = GatedMap(found, gate)
    close(gated.received(), (gate[..., None] * dense).sum(2))
    close(gated.blocks(4), GatedMap(AttentionMap.from_dense(dense, offset=found.offset), gate).blocks(4))


@pytest.mark.parametrize("n", [1, 2, 13, 70])
@pytest.mark.parametrize("decay", ["none", "head", "token", "strong", "forgets"])
def test_causal_maps_with_decay(n: int, decay: str) -> None:
    made = drawn(n, a=(B, H, n), norm=(B, H, n))
    log = {
        "none": None,
        "head": -torch.linspace(0, 2, H, dtype=torch.float64),
        "token": -made["a"].abs(),
        "strong": -300 * made["a"].abs(),
        "forgets": -made["a"].abs().masked_fill(made["a"] > 0.7, math.inf),
    }[decay]
    full = None if log is None else (log[:, None] if log.ndim == 1 else log)[..., None].expand(B, H, n, 3)
    dense = literal(made["q"], made["k"], full, causal=True, scale=0.3)
    check(LinearMap(made["q"], made["k"], log, causal=True, scale=0.3), dense)
    norm = made["norm"].clone()
    norm[:, :, n // 2] = 0
    dense = torch.where((norm == 0)[..., None], 0.0, dense / norm[..., None])
    check(LinearMap(made["q"], made["k"], log, causal=True, scale=0.3, norm=norm), dense)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 11), (12, 12)])
def test_maps_without_a_mask_are_low_rank(n: int, m: int) -> None:
    made = drawn(n, m, norm=(B, H, n))
    dense = literal(made["q"], made["k"], None, causal=False, scale=2.0)
    check(LinearMap(made["q"], made["k"], causal=False, scale=2.0), dense)
    q, k = made["q"].abs(), made["k"].abs()
    dense = literal(q, k, None, causal=False)
    found = LinearMap(q, k, causal=False, norm=dense.sum(-1), sign="nonnegative", row_sum="1")
    check(found, dense / dense.sum(-1, keepdim=True))
    torch.testing.assert_close(found.entropy(), torch.special.entr(found.dense()).sum(-1))


def test_rows_of_a_decoder_and_value_heads_of_their_own() -> None:
    made = drawn(3, 10, a=(B, H, 10))
    log = -made["a"].abs()
    full = log[..., None].expand(B, H, 10, 3)
    dense = literal(made["q"], made["k"], full, causal=True, offset=7)
    check(LinearMap(made["q"], made["k"], log, causal=True, offset=7), dense)
    made = drawn(9, a=(B, H, 9))
    dense = literal(made["q"], made["k"], None, causal=True)
    check(LinearMap(made["q"], made["k"], causal=True, kv_heads=H), dense)


@pytest.mark.parametrize(
    ("n", "decay"), [(150, "weak"), *((n, d) for n in (1, 2, 17, 70) for d in ("weak", "strong", "forgets"))]
)
@pytest.mark.parametrize("bonus", [False, True])
def test_channel_decay(n: int, decay: str, bonus: bool) -> None:
    made = drawn(n, k=(B, H, n, 3), a=(B, H, n, 3), diagonal=(B, H, n))
    size = made["a"].abs() * {"weak": 0.1, "strong": 300.0, "forgets": 1.0}[decay]
    log = -(size.masked_fill(made["a"] > 0.7, math.inf) if decay == "forgets" else size)
    diagonal = made["diagonal"] if bonus else None
    dense = literal(made["q"], made["k"], log, causal=True, scale=0.3, diagonal=diagonal)
    check(ChannelDecayMap(made["q"], made["k"], log, scale=0.3, diagonal=diagonal), dense)


def test_digits_survive_a_long_past_that_is_forgotten() -> None:
    """The last pair is 1 whatever came before: differences of running sums would lose it."""
    n = 3000
    q = torch.ones(1, 1, n, 2)
    log = torch.full((1, 1, n), -90.0)
    log[..., -3:] = -1e-3
    wanted = torch.exp(torch.tensor([-3e-3, -2e-3, -1e-3, 0.0]))
    for found in (LinearMap(q, q, log, causal=True), ChannelDecayMap(q, q, log[..., None].expand_as(q).contiguous())):
        torch.testing.assert_close(found.rows(n - 1, n)[0, 0, 0, -4:], 2 * wanted, rtol=1e-6, atol=0)
        seen = found.matvec(torch.ones(1, 1, n, 1))[0, 0, -1, 0]
        torch.testing.assert_close(seen, 2 * wanted.sum(), rtol=1e-6, atol=0)


def test_bfloat16_is_answered_in_float32() -> None:
    made = {name: x.bfloat16() for name, x in drawn(20, k=(B, H, 20, 3), v=(B, H, 20, 2)).items()}
    q, k, v = made["q"], made["k"], made["v"]
    for found in (LinearMap(q, k, causal=True), ChannelDecayMap(q, k, -k.abs())):
        assert found.dense().dtype == torch.float32
        assert found.received().dtype == torch.float32
        assert found.matvec(v).dtype == torch.bfloat16
        torch.testing.assert_close(found.matvec(v.float()), found.dense() @ v.float(), rtol=1e-5, atol=1e-5)


def test_wrong_arguments_are_named() -> None:
    q = torch.randn(1, 2, 5, 3)
    with pytest.raises(WorkbenchError, match="log_decay is the log of a factor"):
        LinearMap(q, q, torch.ones(2), causal=True)
    with pytest.raises(WorkbenchError, match=r"log_decay is floating point \[2\] or \[1, 2, 5\]"):
        LinearMap(q, q, -torch.ones(3), causal=True)
    with pytest.raises(WorkbenchError, match="log_decay is for causal maps"):
        LinearMap(q, q, -torch.ones(2), causal=False)
    with pytest.raises(WorkbenchError, match=r"norm is floating point \[B, H, Q\]"):
        LinearMap(q, q, causal=True, norm=torch.ones(1, 2, 4))
    with pytest.raises(WorkbenchError, match="k is"):
        LinearMap(q, q[..., :2], causal=True)
    with pytest.raises(UnknownName, match="map sign"):
        LinearMap(q, q, causal=True, sign="positive")
    with pytest.raises(WorkbenchError, match="diagonal is"):
        ChannelDecayMap(q, q, -q.abs(), diagonal=torch.ones(1, 2, 4))
    with pytest.raises(WorkbenchError, match="heads and tokens"):
        ChannelDecayMap(q, q[:, :1], -q.abs())
