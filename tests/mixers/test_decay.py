"""Decaying linear attention: recurrences token by token, chunks and matrices give one thing; rates as published."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers import decay

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def drawn(tokens: int = 9, heads: int = 4, groups: int = 2, width: int = 4, **more: tuple[int, ...]) -> dict[str, Any]:
    shapes = {"q": (2, heads, tokens, width), "k": (2, groups, tokens, width), "v": (2, groups, tokens, 3), **more}
    return example_tensors(5, torch.float64, **shapes)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def recurrence(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, scale: float = 1.0) -> Tensor:
    """S = diag(keep_t) S + k v^T and o = scale S^T q, token by token; ``keep`` is [B, H, N, R]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    state, rows = torch.zeros(*q.shape[:2], q.shape[3], v.shape[3], dtype=torch.float64), []
    for t in range(q.shape[2]):
        state = keep[:, :, t, :, None] * state + k[:, :, t, :, None] * v[:, :, t, None]
        rows.append(scale * (q[:, :, t, :, None] * state).sum(2))
    return torch.stack(rows, 2)


def matrix(q: Tensor, k: Tensor, keep: Tensor, scale: float = 1.0) -> Tensor:
    """Pair by pair, with the product of what was kept in between."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    m = torch.zeros(*q.shape[:3], q.shape[2], dtype=torch.float64)
    for i in range(q.shape[2]):
        for j in range(i + 1):
            m[:, :, i, j] = scale * (q[:, :, i] * k[:, :, j] * keep[:, :, j + 1 : i + 1].prod(2)).sum(-1)
    return m


def constant(lam: list[float], tokens: int = 9, width: int = 4) -> Tensor:
    return torch.tensor(lam, dtype=torch.float64)[None, :, None, None].expand(2, -1, tokens, width)


def chunked_recurrent_and_matrix_agree(op: Operator) -> None:
    given = drawn()
    for layer, layers in ((0, 4), (2, 4), (3, 4), (0, 1)):
        share = 1 - (layer / (layers - 1) if layers > 1 else 0) + 1e-5
        lam = constant([math.exp(-(2 ** (-8 * (h + 1) / 4)) * share) for h in range(4)])
        q, k = silu(given["q"]), silu(given["k"])
        for block in (1, 4, 256):
            out, found = op(**given, layer=layer, layers=layers, block=block)
            close(out, recurrence(q, k, given["v"], lam))
            close(found.dense(), matrix(q, k, lam))


def given_rates_and_tiles(op: Operator) -> None:
    given, rates = drawn(), torch.tensor([0.0, 0.1, 2.0, 40.0]).double()
    lam = constant((-rates).exp().tolist())
    for block in (1, 4, 9, 64):
        out, found = op(**given, slopes=rates, block=block)
        close(out, recurrence(given["q"], given["k"], given["v"], lam))
        close(found.dense(), matrix(given["q"], given["k"], lam))


def the_rates_of_the_public_model(op: Operator) -> None:
    given = drawn(heads=6, groups=3)
    for layer in (0, 5, 79):
        base, share = 1 / (2 ** (8 / 6)), 1 - layer / (80 - 1 + 1e-5) + 1e-5
        lam = constant([math.exp(-(base ** (h + 1)) * share) for h in range(6)])
        out, found = op(**given, layer=layer, layers=80)
        q, k = silu(given["q"]), silu(given["k"])
        close(out, recurrence(q, k, given["v"], lam))
        close(found.dense(), matrix(q, k, lam))


def retention_turns_and_fades(op: Operator) -> None:
    """The parallel form with complex rotations, the recurrent one and chunks."""
    given = drawn()
    q, k, v = given["q"], given["k"], given["v"]
    m = torch.zeros(2, 4, 9, 9).double()
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(x) for x in (2, 4, 9, 9))).tolist():
        for pair in range(2):
            angle = 10000.0 ** -(pair / 1)
            one, two = (
                complex(*x.tolist())
                for x in (q[b, h, i, 2 * pair : 2 * pair + 2], k[b, h // 2, j, 2 * pair : 2 * pair + 2])
            )
            fade = (1 - 2.0 ** (-5 - h)) ** (i - j) if j <= i else 0.0
            m[b, h, i, j] += fade * (one * cmath.exp(1j * (i - j) * angle) * two.conjugate()).real / 2
    out, found = op(**given)
    close(found.dense(), m)
    close(out, m @ v.repeat_interleave(2, 1))
    close(op(**given, scale=1.0)[0], 2 * out)
    first, second = op(q=q[:, :, :5], k=k[:, :, :5], v=v[:, :, :5]), out[:, :, :5]
    close(first[0], second)


def gates_of_one_are_linear_attention(op: Operator) -> None:
    """Recurrence and matrix for any gates; without decay sum_j (q . k) v; closed gates leave the own token."""
    shape = (2, 3, 9, 4)
    given = drawn(heads=3, groups=3, gate=shape)
    q, k, v = given["q"], given["k"], given["v"]
    keep = (1 / (1 + (-given["gate"]).exp())) ** (1 / 16)
    out, found = op(**given)
    close(out, recurrence(q, k, v, keep, 0.5))
    close(found.dense(), matrix(q, k, keep, 0.5))
    closed, found = op(**{**given, "gate": torch.full(shape, -2e4).double()}, temperature=1.0, scale=1.0)
    close(closed, (q * k).sum(-1, keepdim=True) * v)
    close(found.dense(), torch.diag_embed((q * k).sum(-1)))
    still, found = op(**{**given, "gate": torch.full(shape, 60.0).double()}, scale=1.0)
    close(found.dense(), (q @ k.transpose(-1, -2)).tril())
    close(still, found.dense() @ v)


def both_directions_count_the_diagonal(op: Operator) -> None:
    shape = (2, 3, 9, 4)
    given = drawn(heads=3, groups=3, forward_gate=shape, backward_gate=shape)
    q, k, v = given["q"], given["k"], given["v"]
    ahead, back = ((1 / (1 + (-given[f"{name}_gate"]).exp())) ** (1 / 16) for name in ("forward", "backward"))
    turned = [x.flip(2) for x in (q, k, v, back)]
    out, found = op(**given)
    close(out, (recurrence(q, k, v, ahead, 0.5) + recurrence(*turned, 0.5).flip(2)) / 2)
    close(found.dense(), (matrix(q, k, ahead, 0.5) + matrix(*turned[:2], turned[3], 0.5).flip(2, 3)) / 2)
    no_decay = {"forward_gate": torch.full(shape, 60.0).double(), "backward_gate": torch.full(shape, 60.0).double()}
    _, found = op(**{**given, **no_decay}, scale=1.0)
    pairs = q @ k.transpose(-1, -2)
    close(found.dense(), (pairs + torch.diag_embed(pairs.diagonal(0, -2, -1))) / 2)


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "lightning-attention": chunked_recurrent_and_matrix_agree,
    "lightning-attention-2": given_rates_and_tiles,
    "minimax-lightning-attention": the_rates_of_the_public_model,
    "retention": retention_turns_and_fades,
    "gated-linear-attention": gates_of_one_are_linear_attention,
    "vig-bidirectional-gated-linear-attention": both_directions_count_the_diagonal,
}


def test_slopes_of_numbers_of_heads_that_are_no_power_of_two() -> None:
    """12 heads: the 8 slopes of 8, then every other one of the first 8 of 16."""
    wanted = [2.0**-h for h in range(1, 9)] + [2.0 ** (-(h + 1) / 2) for h in (0, 2, 4, 6)]
    assert decay.alibi_slopes(12) == pytest.approx(wanted)
    assert decay.alibi_slopes(1) == [2.0**-8]
    assert decay.minimax_slopes(12, 0, 4) == pytest.approx([2 ** (-8 * (h + 1) / 12) * (1 + 1e-5) for h in range(12)])
    assert decay.transnormer_slopes(8, 3, 4) == pytest.approx([1e-5 * 2.0**-h for h in range(1, 9)])
    assert decay.transnormer_slopes(8, 2, 4) == pytest.approx(decay.minimax_slopes(8, 2, 4), rel=1e-5)


def test_the_rates_are_those_of_transformers() -> None:
    minimax = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    config = minimax.MiniMaxConfig(hidden_size=48, num_attention_heads=6, num_hidden_layers=5, head_dim=8)
    for layer in range(5):
        rates = minimax.MiniMaxLightningAttention(config, layer).get_slope_rate().flatten()
        torch.testing.assert_close(rates, torch.tensor(decay.minimax_slopes(6, layer, 5)), rtol=1e-5, atol=1e-9)


def test_long_gated_sequences_need_no_pairs() -> None:
    made = example_tensors(0, torch.float32, **dict.fromkeys(("q", "k", "v", "gate"), (1, 1, 20000, 4)))
    out, found = decay.gated_linear_attention(**made)
    assert found.blocks(1000).shape == (1, 1, 20, 20)
    torch.testing.assert_close(found.blocks(1000).sum(), found.received().sum(), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found.rows(19998, 20000) @ made["v"], out[:, :, 19998:], rtol=1e-3, atol=1e-3)


def test_strong_gates_neither_overflow_nor_lose_gradients() -> None:
    given = drawn(40, heads=3, groups=3, gate=(2, 3, 40, 4))
    gate = (1e4 * given["gate"]).requires_grad_()
    out, found = decay.gated_linear_attention(given["q"], given["k"], given["v"], gate, temperature=1.0)
    assert torch.isfinite(out).all()
    assert torch.isfinite(found.dense()).all()
    out.sum().backward()
    assert torch.isfinite(gate.grad).all()


def test_wrong_arguments_are_named() -> None:
    given = drawn()
    q, k, v = given["q"], given["k"], given["v"]
    with pytest.raises(WorkbenchError, match="layer counts from 0"):
        decay.lightning_attention(q, k, v, layer=4, layers=4)
    with pytest.raises(WorkbenchError, match="not negative; got -1"):
        decay.lightning_attention_2(q, k, v, -torch.ones(4))
    with pytest.raises(WorkbenchError, match=r"slopes is floating point \[4\]"):
        decay.lightning_attention_2(q, k, v, torch.ones(3))
    with pytest.raises(WorkbenchError, match="block is a positive number"):
        decay.lightning_attention_2(q, k, v, torch.ones(4), block=0)
    with pytest.raises(WorkbenchError, match="an even width; got 3"):
        decay.retention(q[..., :3], k[..., :3], v)
    with pytest.raises(WorkbenchError, match="the 4 heads of q; got 2"):
        decay.gated_linear_attention(q, k, v, q)
    with pytest.raises(WorkbenchError, match="gate is floating point"):
        decay.gated_linear_attention(q, q, q, k)
    with pytest.raises(WorkbenchError, match="temperature is positive"):
        decay.gated_linear_attention(q, q, q, q, temperature=0.0)
    with pytest.raises(WorkbenchError, match="a key for every query"):
        decay.minimax_attention(q[:, :, :3], k, v, layer=0, layers=2)
    with pytest.raises(WorkbenchError, match="got mask.window"):
        decay._activated({**given, "mask": Mask(causal=True, window=2)})


def test_an_infinite_rate_leaves_each_token_to_itself() -> None:
    given = drawn()
    out, found = decay.lightning_attention_2(**given, slopes=torch.full((4,), math.inf).double(), block=4)
    own = (given["q"] * given["k"].repeat_interleave(2, 1)).sum(-1)
    close(out, own[..., None] * given["v"].repeat_interleave(2, 1))
    close(found.dense(), torch.diag_embed(own))


def test_layers_are_whole_numbers() -> None:
    for layer, layers in ((0.5, 4), (None, 4), (0, "4")):
        with pytest.raises(WorkbenchError, match="layers? is a whole number"):
            decay.lightning_attention(**drawn(), layer=layer, layers=layers)


def test_block_sums_in_both_directions_follow_the_numbers() -> None:
    shape = (2, 3, 37, 4)
    made = drawn(37, heads=3, groups=3, forward_gate=shape, backward_gate=shape)
    _, found = decay.bidirectional_gated_linear_attention(**made)
    dense = found.dense()
    for name, part in (("sum", dense), ("abs", dense.abs())):
        pooled = torch.stack([rows.sum(2) for rows in part.split(8, 2)], 2)
        pooled = torch.stack([columns.sum(3) for columns in pooled.split(8, 3)], 3)
        close(found.blocks(8, name), pooled)
