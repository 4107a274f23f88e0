"""Linear attention against recurrences and sums written out, and the places where one mechanism becomes another."""

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
from workbench.mixers import linear
from workbench.patterns.algebra import ProductMap

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def drawn(tokens: int, heads: int = 4, groups: int = 2, width: int = 4, **more: tuple[int, ...]) -> dict[str, Any]:
    shapes = {"q": (2, heads, tokens, width), "k": (2, groups, tokens, width), "v": (2, groups, tokens, 3), **more}
    return example_tensors(5, torch.float64, **shapes)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def elu_one(x: float) -> float:
    return x + 1 if x > 0 else math.exp(x)


def feature(x: Tensor) -> Tensor:
    return torch.tensor([elu_one(value) for value in x.flatten().tolist()], dtype=torch.float64).view(x.shape)


def recurrence(q: Tensor, k: Tensor, v: Tensor, normalised: bool) -> Tensor:
    """One token after the other, with the state S = sum phi(k) v^T and z = sum phi(k)."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            state, total = torch.zeros(q.shape[3], v.shape[3]).double(), torch.zeros(q.shape[3]).double()
            for i in range(q.shape[2]):
                key = feature(k[b, h // group, i])
                state, total = state + key[:, None] * v[b, h // group, i], total + key
                out[b, h, i] = feature(q[b, h, i]) @ state / (feature(q[b, h, i]) @ total if normalised else 1.0)
    return out


def chunks(q: Tensor, k: Tensor, v: Tensor, normalised: bool, size: int = 4) -> Tensor:
    """Pairs inside of a chunk, a state for what came before; ones beside the values give the denominator."""
    q, k = feature(q), feature(k).repeat_interleave(2, 1)
    v = torch.cat([v.repeat_interleave(2, 1), torch.ones(2, 4, v.shape[2], 1).double()], -1)
    state, parts = torch.zeros(2, 4, 4, 4).double(), []
    for lo in range(0, q.shape[2], size):
        a, b, c = (x[:, :, lo : lo + size] for x in (q, k, v))
        parts.append((a @ b.transpose(-1, -2)).tril() @ c + a @ state)
        state = state + b.transpose(-1, -2) @ c
    out = torch.cat(parts, 2)
    return out[..., :-1] / out[..., -1:] if normalised else out[..., :-1]


def recurrent_chunked_and_matrix_agree(op: Operator) -> None:
    given = drawn(11)
    q, k, v = given["q"], given["k"], given["v"]
    out, found = op(**given, causal=True)
    close(out, recurrence(q, k, v, True))
    close(out, chunks(q, k, v, True))
    raw = (feature(q) @ feature(k).repeat_interleave(2, 1).transpose(-1, -2)).tril()
    close(found.dense(), raw / raw.sum(-1, keepdim=True))
    out, found = op(q=q[:, :, :5], k=k, v=v, causal=False)
    raw = feature(q[:, :, :5]) @ feature(k).repeat_interleave(2, 1).transpose(-1, -2)
    close(found.dense(), raw / raw.sum(-1, keepdim=True))
    close(out, found.dense() @ v.repeat_interleave(2, 1))


def the_same_without_a_denominator(op: Operator) -> None:
    given = drawn(11)
    q, k, v = given["q"], given["k"], given["v"]
    out, found = op(**given, causal=True)
    close(out, recurrence(q, k, v, False))
    close(out, chunks(q, k, v, False))
    close(found.dense(), (feature(q) @ feature(k).repeat_interleave(2, 1).transpose(-1, -2)).tril())


def orthonormal_cues_retrieve_their_association(op: Operator) -> None:
    """No interference between as many associations as there are dimensions; half a cue gives half the response."""
    n = 6
    cues, _ = torch.linalg.qr(drawn(n, width=n)["q"][:1, :1])
    v = drawn(n)["v"][:1, :1]
    out, found = op(q=torch.cat([cues, 0.5 * cues[:, :, :1]], 2), k=cues, v=v, causal=False)
    close(out[:, :, :n], v)
    close(out[:, :, n], 0.5 * v[:, :, 0])
    close(found.dense()[0, 0, :n], torch.eye(n).double())
    given = drawn(5)
    q, k = given["q"], given["k"]
    out, found = op(**given, causal=True)
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(x) for x in (2, 4, 5, 5))).tolist():
        want = q[b, h, i] @ k[b, h // 2, j] if j <= i else torch.zeros(()).double()
        close(found.dense()[b, h, i, j], want)
    close(out, found.dense() @ given["v"].repeat_interleave(2, 1))


def an_idle_convolution_is_plain_linear_attention(op: Operator) -> None:
    given = drawn(12)
    q, k, v = given["q"], given["k"], given["v"]
    t = torch.tensor([0.3, 1.0, 2.0, 0.5]).double()
    raw = q.clamp(min=0) @ k.clamp(min=0).repeat_interleave(2, 1).transpose(-1, -2)
    delta = torch.zeros(4, 3, 3).double()
    delta[:, 1, 1] = 1.0
    for kernel in (None, delta):
        out, found = op(**given, temperature=t, concentration=kernel, grid=(3, 4), floor=1e-9)
        seen = raw.sum(-1, keepdim=True) > 0
        plain = torch.where(seen, raw / raw.sum(-1, keepdim=True).clamp(min=1e-9), 0.0)
        close(found.dense(), t[:, None, None] * plain)
        close(out, t[:, None, None] * plain @ v.repeat_interleave(2, 1))
        close(found.row_sums(), (t[:, None, None] * seen).squeeze(-1).expand(2, 4, 12))
    out, found = op(**given, temperature=t, grid=(3, 4))
    close(found.dense(), t[:, None, None] * raw / raw.sum(-1, keepdim=True).clamp(min=100.0))
    kernel = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1)).double()
    plain, inner = op(**given, temperature=t, grid=(3, 4), floor=2.0)
    out, found = op(**given, temperature=t, concentration=kernel, grid=(3, 4), floor=2.0)
    for h in range(4):
        for i in range(12):
            total, row = torch.zeros(2, 3).double(), torch.zeros(2, 12).double()
            for dy in range(-1, 2):
                for dx in range(-2, 3):
                    y, x = i // 4 + dy, i % 4 + dx
                    if 0 <= y < 3 and 0 <= x < 4:
                        total = total + kernel[h, dy + 1, dx + 2] * plain[:, h, 4 * y + x]
                        row = row + kernel[h, dy + 1, dx + 2] * inner.dense()[:, h, 4 * y + x]
            close(out[:, h, i], total)
            close(found.dense()[:, h, i], row)
    assert isinstance(found, ProductMap)


def rotated_in_the_numerator_alone(op: Operator) -> None:
    """Without rotations and with open gates rows sum to 1 but for the 1e-6; with them, each pair by complex numbers."""
    n, e, grid = 6, 4, (2, 3)
    shape = (2, 2, n, e)
    given = drawn(n, heads=2, groups=2, v=shape, gate=shape)
    open_gate = torch.ones(shape).double()
    _, found = op(**{**given, "gate": open_gate}, grid=grid, base=None)
    phi_q, phi_k = feature(given["q"]), feature(given["k"])
    z = (phi_q * phi_k.mean(2, keepdim=True)).sum(-1)
    close(found.row_sums(), z / (z + 1e-6))
    out, found = op(**given, grid=grid)
    raw = torch.zeros(2, 2, n, n).double()
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(x) for x in (2, 2, n, n))).tolist():
        for pair in range(e // 2):
            place = h * e // 2 + pair
            speed = 10000.0 ** -((place % 2) / 2)
            turn = (i // 3 - j // 3) if place < 2 else (i % 3 - j % 3)
            one = complex(*phi_q[b, h, i, 2 * pair : 2 * pair + 2].tolist())
            two = complex(*phi_k[b, h, j, 2 * pair : 2 * pair + 2].tolist())
            raw[b, h, i, j] += (one * cmath.exp(1j * turn * speed) * two.conjugate()).real / n
    raw = raw / (z + 1e-6)[..., None]
    close(found.native().raw.dense(), raw)
    close(found.dense(), raw * given["gate"].mean(-1)[..., None])
    close(out, given["gate"] * (raw @ given["v"]))


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "linear-attention": recurrent_chunked_and_matrix_agree,
    "unnormalised-linear-attention": the_same_without_a_denominator,
    "pavlovian-linear-attention": orthonormal_cues_retrieve_their_association,
    "l2vit-linear-attention": an_idle_convolution_is_plain_linear_attention,
    "dual-gated-linear-attention": rotated_in_the_numerator_alone,
}


def test_a_row_without_mass_is_zero() -> None:
    given = drawn(4)
    out, found = linear.linear_attention(given["q"] - 1e4, given["k"], given["v"])
    assert not out.any()
    assert not found.dense().any()
    assert found.row_sum == "<=1"
    q = given["q"].clone().requires_grad_()
    linear.l2vit_attention(-q.abs(), given["k"], given["v"], torch.ones(4).double(), grid=(2, 2), floor=0.0)[
        0
    ].sum().backward()
    assert torch.isfinite(q.grad).all()


def test_long_sequences_need_no_pairs() -> None:
    made = example_tensors(0, torch.float32, q=(1, 1, 40000, 4), k=(1, 1, 40000, 4), v=(1, 1, 40000, 2))
    for causal in (True, False):
        out, found = linear.linear_attention(**made, causal=causal)
        assert out.shape == (1, 1, 40000, 2)
        assert found.blocks(2048).shape == (1, 1, 20, 20)
        torch.testing.assert_close(found.blocks(2048).sum(), torch.tensor(40000.0), rtol=1e-4, atol=0)
        torch.testing.assert_close(found.received().sum(), torch.tensor(40000.0), rtol=1e-4, atol=0)
        torch.testing.assert_close(found.rows(39998, 40000) @ made["v"], out[:, :, 39998:], rtol=1e-3, atol=1e-4)


def test_wrong_arguments_are_named() -> None:
    given = drawn(6)
    q, k, v = given["q"], given["k"], given["v"]
    with pytest.raises(WorkbenchError, match="v is"):
        linear.linear_attention(q, k, v[:, :, :4])
    with pytest.raises(WorkbenchError, match="a key for every query; got 3 queries and 6 keys"):
        linear.linear_attention(q[:, :, :3], k, v)
    with pytest.raises(WorkbenchError, match="temperature is"):
        linear.l2vit_attention(q, k, v, torch.ones(3), grid=(2, 3))
    with pytest.raises(WorkbenchError, match=r"grid is \(rows, columns\) with rows \* columns = 6"):
        linear.l2vit_attention(q, k, v, torch.ones(4), grid=(2, 2))
    with pytest.raises(WorkbenchError, match="odd S"):
        linear.l2vit_attention(q, k, v, torch.ones(4), torch.ones(4, 2, 2), grid=(2, 3))
    with pytest.raises(WorkbenchError, match="multiple of 4 channels"):
        linear.rotate_grid(q[:, :1, :, :3], (2, 3), 10.0)
    with pytest.raises(WorkbenchError, match="the 4 heads of q"):
        linear.dual_gated_linear_attention(q, k, v, q, grid=(2, 3))
    with pytest.raises(WorkbenchError, match=r"gate is floating point \[2, 4, 6, 3\]"):
        linear.dual_gated_linear_attention(q, q, q[..., :3], q, grid=(2, 3))
    with pytest.raises(WorkbenchError, match="got mask.window"):
        linear.causal_option(Mask(causal=True, window=3))
    with pytest.raises(WorkbenchError, match="got mask.keys"):
        linear.causal_option(Mask(keys=torch.ones(1, 3, dtype=torch.bool)))
