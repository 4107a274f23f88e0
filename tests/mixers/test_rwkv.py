"""RWKV's time mixing against its recurrences, token by token, and against transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.mixers import rwkv
from workbench.patterns.per_channel import PerChannelMap

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def channels(tokens: int = 9, heads: int = 5, width: int = 1, **more: tuple[int, ...]) -> dict[str, Any]:
    shape = (2, heads, tokens, width)
    return example_tensors(4, torch.float64, k=shape, v=shape, decay=(heads, width), bonus=(heads, width), **more)


def weights(k: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
    """Of one channel: k [B, N], decay and bonus numbers."""
    b, n = k.shape
    m = torch.zeros(b, n, n, dtype=torch.float64)
    for i in range(n):
        for j in range(i):
            m[:, i, j] = (k[:, j] - (i - 1 - j) * decay.exp()).exp()
        m[:, i, i] = (bonus + k[:, i]).exp()
    return m / m.sum(-1, keepdim=True)


def recurrence(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> Tensor:
    """Numerator and denominator carried from token to token, [B, N] of one channel."""
    above, below, rows = torch.zeros_like(k[:, 0]), torch.zeros_like(k[:, 0]), []
    for i in range(k.shape[1]):
        own, key = (bonus + k[:, i]).exp(), k[:, i].exp()
        rows.append((above + own * v[:, i]) / (below + own))
        fade = (-decay.exp()).exp()
        above, below = fade * above + key * v[:, i], fade * below + key
    return torch.stack(rows, 1)


def a_mean_that_fades(op: Operator) -> None:
    given = channels()
    out, found = op(**given)
    for c in range(5):
        k, v, w, u = given["k"][:, c, :, 0], given["v"][:, c, :, 0], given["decay"][c, 0], given["bonus"][c, 0]
        close(out[:, c, :, 0], recurrence(k, v, w, u))
        close(found.dense()[:, c], weights(k, w, u))
    close(found.row_sums(), torch.ones(2, 5, 9).double())


def a_mean_times_a_gate(op: Operator) -> None:
    given = channels(receptance=(2, 5, 9, 1))
    gate = 1 / (1 + (-given["receptance"]).exp())
    out, found = op(**given)
    for c in range(5):
        k, v, w, u = given["k"][:, c, :, 0], given["v"][:, c, :, 0], given["decay"][c, 0], given["bonus"][c, 0]
        close(out[:, c, :, 0], gate[:, c, :, 0] * recurrence(k, v, w, u))
        close(found.dense()[:, c], gate[:, c] * weights(k, w, u))
    ones, found = op(**{**given, "receptance": torch.full((2, 5, 9, 1), 60.0).double()})
    close(found.row_sums(), torch.ones(2, 5, 9).double())
    close(ones, out / gate)


def state_bonus_and_matrix_agree(op: Operator) -> None:
    wide, narrow = (2, 3, 9, 4), (2, 3, 9, 5)
    given = example_tensors(4, torch.float64, r=wide, k=wide, decay=wide, v=narrow, bonus=(3, 4))
    r, k, v, u = given["r"], given["k"], given["v"], given["bonus"]
    keep = (-given["decay"].exp()).exp()
    state, rows = torch.zeros(2, 3, 4, 5).double(), []
    m = torch.zeros(2, 3, 9, 9).double()
    for i in range(9):
        new = k[:, :, i, :, None] * v[:, :, i, None]
        rows.append((r[:, :, i, :, None] * (state + u[:, :, None] * new)).sum(2))
        state = keep[:, :, i, :, None] * state + new
        m[:, :, i, i] = (r[:, :, i] * u * k[:, :, i]).sum(-1)
        for j in range(i):
            m[:, :, i, j] = (r[:, :, i] * k[:, :, j] * keep[:, :, j + 1 : i].prod(2)).sum(-1)
    out, found = op(**given)
    close(out, torch.stack(rows, 2))
    close(found.dense(), m)


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "rwkv-4": a_mean_that_fades,
    "spikegpt": a_mean_times_a_gate,
    "rwkv-6": state_bonus_and_matrix_agree,
}


def test_heads_of_several_channels_hold_what_single_channels_hold() -> None:
    given = channels(heads=2, width=3, receptance=(2, 2, 9, 3))
    split = {name: x.transpose(2, 3).flatten(1, 2)[..., None] for name, x in given.items() if x.ndim == 4}
    split |= {name: given[name].view(6, 1) for name in ("decay", "bonus")}
    for op, names in ((rwkv.rwkv4_attention, ("k", "v")), (rwkv.spikegpt_attention, ("k", "v", "receptance"))):
        names = (*names, "decay", "bonus")
        out, found = op(**{name: given[name] for name in names})
        single, channel = op(**{name: split[name] for name in names})
        close(out, single[..., 0].unflatten(1, (2, 3)).transpose(2, 3))
        assert isinstance(found, PerChannelMap)
        close(found.dense(), channel.dense().unflatten(1, (2, 3)).mean(2))
        close(found.native().dense(), channel.dense())
        close(found.matvec(given["v"]), out)
        close(found.blocks(4), channel.blocks(4).unflatten(1, (2, 3)).mean(2))


def test_the_mean_is_that_of_transformers() -> None:
    theirs = pytest.importorskip("transformers.models.rwkv.modeling_rwkv")
    given = channels(tokens=80)
    k, v = (given[name][..., 0].transpose(1, 2) for name in ("k", "v"))
    wanted, _ = theirs.rwkv_linear_attention_cpu(given["decay"][:, 0], given["bonus"][:, 0], k, v)
    out, _ = rwkv.rwkv4_attention(**given)
    torch.testing.assert_close(out[..., 0].transpose(1, 2), wanted, rtol=1e-5, atol=1e-5)


def test_huge_keys_and_decays_stay_finite() -> None:
    given = channels(tokens=70)
    given |= {"k": 1e3 * given["k"], "decay": 5 * given["decay"].abs()}
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    out, found = rwkv.rwkv4_attention(**leaves)
    assert torch.isfinite(out).all()
    close(found.row_sums(), found.dense().sum(-1))
    out.square().sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in leaves.values())


def test_wrong_arguments_are_named() -> None:
    given = channels()
    with pytest.raises(WorkbenchError, match="k is floating point"):
        rwkv.rwkv4_attention(**{**given, "k": given["k"][:, :3]})
    with pytest.raises(WorkbenchError, match=r"decay is floating point \[5, 1\]"):
        rwkv.rwkv4_attention(**{**given, "decay": torch.zeros(5)})
    with pytest.raises(WorkbenchError, match="receptance is"):
        rwkv.spikegpt_attention(**given, receptance=given["k"][:, :3])
    made = rwkv._rwkv6_example(0, 5, torch.float64)
    with pytest.raises(WorkbenchError, match=r"bonus is floating point \[3, 6\]"):
        rwkv.rwkv6_attention(**{**made, "bonus": torch.zeros(6)})
    with pytest.raises(WorkbenchError, match="the 3 heads of r; got 1"):
        rwkv.rwkv6_attention(**{**made, "k": made["k"][:, :1], "v": made["v"][:, :1]})


def test_a_rate_beyond_all_numbers_forgets_and_has_gradients() -> None:
    given = channels(tokens=6)
    for rate in (100.0, 1000.0, torch.inf):
        leaves = {**given, "decay": torch.full((5, 1), rate).double()}
        leaves = {name: x.clone().requires_grad_() for name, x in leaves.items()}
        out, found = rwkv.rwkv4_attention(**leaves)
        # Only the token before and the token itself are left.
        assert not found.dense().tril(-2).any()
        close(found.dense().sum(-1), torch.ones(2, 5, 6).double())
        out.sum().backward()
        assert all(torch.isfinite(x.grad).all() for x in leaves.values())
    made = rwkv._rwkv6_example(0, 5, torch.float32)
    made["decay"] = torch.full_like(made["decay"], 200.0).requires_grad_()
    out, _ = rwkv.rwkv6_attention(**made)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(made["decay"].grad).all()
