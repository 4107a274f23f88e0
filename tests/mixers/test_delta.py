"""Delta rules against the recurrences written out, against Hugging Face's, and beside TransformerLens's effective attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from workbench.attention_map import AttentionMap
from workbench.errors import WorkbenchError
from workbench.mixers.delta import EPS, VARIANTS

Operator = Callable[..., tuple[Tensor, AttentionMap]]
RECORDS = {record.name: record for record in VARIANTS}


def example(name: str, tokens: int) -> dict[str, Any]:
    return RECORDS[name].example(0, tokens, torch.float64)


def shared(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + EPS).sqrt()


def loop(read: Tensor, write: Tensor, steps: Tensor, v: Tensor) -> Tensor:
    """S_t = A_t S_{t-1} + b_t v_t^T, o_t = c_t^T S_t with A as matrices ``[B, H, N, S, S]``."""
    state = torch.zeros(*v.shape[:2], read.shape[3], v.shape[3], dtype=v.dtype)
    out = []
    for t in range(v.shape[2]):
        state = steps[:, :, t] @ state + write[:, :, t, :, None] * v[:, :, t, None]
        out.append((read[:, :, t, None] @ state)[..., 0, :])
    return torch.stack(out, 2)


def parts(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, h: int) -> tuple[Tensor, Tensor, Tensor]:
    """What reads, what writes, and the transitions of a (gated) delta rule."""
    q, k = shared(unit(q), h) * q.shape[3] ** -0.5, shared(unit(k), h)
    erase = torch.eye(k.shape[3], dtype=k.dtype) - beta[..., None, None] * k[..., :, None] * k[..., None, :]
    if log_decay is not None and log_decay.ndim == 3:
        erase = log_decay.exp()[..., None, None] * erase
    elif log_decay is not None:
        erase = erase @ torch.diag_embed(log_decay.exp())
    return q, beta[..., None] * k, erase


def agree(op: Operator, given: dict[str, Any], read: Tensor, write: Tensor, steps: Tensor) -> None:
    """Output by the loop, map by feeding the loop unit vectors."""
    h, n = read.shape[1:3]
    out, amap = op(**given)
    torch.testing.assert_close(out, loop(read, write, steps, shared(given["v"], h)))
    units = torch.eye(n, dtype=torch.float64).expand(*read.shape[:2], n, n)
    torch.testing.assert_close(amap.dense(), loop(read, write, steps, units))


def delta_net_is_its_recurrence_and_its_row_transporter(op: Operator) -> None:
    for tokens in (1, 11, 70):
        given = example("deltanet", tokens)
        read, write, steps = parts(given["q"], given["k"], given["beta"], None, 4)
        agree(op, given, read, write, steps)
    k, beta = shared(unit(given["k"]), 4), given["beta"]
    r, row = read[:, :, -1], torch.zeros(2, 4, tokens, dtype=torch.float64)
    for t in reversed(range(tokens)):
        held = (r * k[:, :, t]).sum(-1)
        row[:, :, t] = beta[:, :, t] * held
        r = r - row[:, :, t, None] * k[:, :, t]
    torch.testing.assert_close(op(**given)[1].rows(tokens - 1, tokens)[:, :, 0], row)


def gated_delta_net_is_its_recurrence_and_the_implicit_form(op: Operator) -> None:
    for tokens in (1, 11, 70):
        given = example("gated-deltanet", tokens)
        agree(op, given, *parts(given["q"], given["k"], given["beta"], given["log_decay"], 4))
    q, k = (shared(unit(given[name]), 4) for name in "qk")
    log, beta = given["log_decay"].cumsum(-1), given["beta"]
    gamma = (log[..., :, None] - log[..., None, :]).exp().tril()
    system = torch.eye(tokens, dtype=torch.float64) + beta[..., None] * (gamma * (k @ k.transpose(-1, -2))).tril(-1)
    wanted = 5**-0.5 * (gamma * (q @ k.transpose(-1, -2))) @ torch.linalg.inv(system) * beta[..., None, :]
    torch.testing.assert_close(op(**given)[1].dense(), wanted)


def kimi_delta_attention_is_its_recurrence(op: Operator) -> None:
    for tokens in (1, 11, 40):
        given = example("kimi-delta-attention", tokens)
        agree(op, given, *parts(given["q"], given["k"], given["beta"], given["log_decay"], 4))
    # one decay for all channels: the gated delta rule
    same = {**given, "log_decay": given["log_decay"][..., :1].expand_as(given["q"])}
    agree(op, same, *parts(given["q"], given["k"], given["beta"], given["log_decay"][..., 0], 4))


def rwkv7_is_its_recurrence(op: Operator) -> None:
    for tokens in (1, 11, 40):
        given = example("rwkv-7", tokens)
        kappa = unit(given["kappa"])
        steps = torch.diag_embed(given["log_decay"].exp()) - (given["rate"] * kappa)[..., None] * kappa[..., None, :]
        agree(op, given, given["r"], given["k"], steps)
    # kappa = k, the same decay and rate for all channels: a gated delta rule
    alpha, beta = given["log_decay"][..., :1], given["rate"][..., 0]
    k = unit(given["k"])
    same = {
        **given, "r": unit(given["r"]) * 5**-0.5, "kappa": given["k"], "k": beta[..., None] * k,
        "rate": (alpha.exp() * beta[..., None]).expand_as(k), "log_decay": alpha.expand_as(k),
    }  # fmt: skip
    read, write, steps = parts(given["r"], given["k"], beta, alpha[..., 0], 4)
    out, amap = op(**same)
    torch.testing.assert_close(out, loop(read, write, steps, given["v"]), atol=1e-5, rtol=1e-5)  # two roots with 1e-6
    torch.testing.assert_close(amap.matvec(given["v"]), out)


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "deltanet": delta_net_is_its_recurrence_and_its_row_transporter,
    "gated-deltanet": gated_delta_net_is_its_recurrence_and_the_implicit_form,
    "kimi-delta-attention": kimi_delta_attention_is_its_recurrence,
    "rwkv-7": rwkv7_is_its_recurrence,
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities(name: str) -> None:
    IDENTITIES[name](RECORDS[name].operator)


def test_hugging_face_computes_the_same() -> None:
    from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    for name, function in (
        ("gated-deltanet", torch_recurrent_gated_delta_rule),
        ("kimi-delta-attention", recurrent_kimi_delta_attention),
    ):
        given = example(name, 19)
        out, _ = RECORDS[name](**given)
        heads = {"query": given["q"], "key": given["k"], "value": shared(given["v"], 4)}
        heads |= {"g": given["log_decay"], "beta": given["beta"]}
        turned = {key: part.transpose(1, 2).float() for key, part in heads.items()}
        found, _ = function(**turned, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=True)
        torch.testing.assert_close(found.transpose(1, 2).double(), out, atol=1e-5, rtol=1e-4)


def test_transformer_lens_leaves_out_the_erasure_the_norm_and_the_scale() -> None:
    """Its effective attention of a gated delta net is that of gated linear attention on keys as they come. Ours is exact."""
    bridges = pytest.importorskip("transformer_lens.model_bridge.generalized_components.gated_delta_net")
    n, e = 96, 16
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, e, generator=generator, dtype=torch.float64) for _ in range(3))
    beta = torch.rand(1, 2, n, generator=generator, dtype=torch.float64)
    log_decay = -0.1 * torch.rand(1, 2, n, generator=generator, dtype=torch.float64)
    wanted = loop(*parts(q, k, beta, log_decay, 2), v)

    def error(m: Tensor) -> float:
        return float((m.double() @ v - wanted).norm() / wanted.norm())

    def theirs(q: Tensor, k: Tensor) -> Tensor:
        hooks = {"hook_q": q, "hook_k": k, "hook_beta": beta, "hook_log_decay": log_decay}
        cache = {f"blocks.0.linear_attn.{name}": part.transpose(1, 2) for name, part in hooks.items()}
        bridge = bridges.GatedDeltaNetBridge("blocks.0.linear_attn")
        return bridge.compute_effective_attention(cache, 0)

    _, ours = RECORDS["gated-deltanet"](q=q, k=k, v=v, beta=beta, log_decay=log_decay)
    assert error(ours.dense()) < 1e-12
    assert error(theirs(q, k)) > 20
    assert error(theirs(normalize(q, dim=-1) * e**-0.5, normalize(k, dim=-1))) > 0.15


def test_a_head_may_share_queries_keys_and_values() -> None:
    given = example("gated-deltanet", 9)
    out, amap = RECORDS["gated-deltanet"](**given)
    spread = {name: shared(given[name], 4) for name in ("q", "k", "v")}
    full, whole = RECORDS["gated-deltanet"](**{**given, **spread})
    torch.testing.assert_close(out, full)
    assert (amap.kv_heads, whole.kv_heads) == (2, 4)


def test_errors_name_the_argument() -> None:
    given = example("gated-deltanet", 5)
    for name, wrong in (
        ("beta", given["beta"][..., 0]),
        ("log_decay", given["log_decay"][:, :1]),
        ("k", given["k"][..., :2]),
    ):
        with pytest.raises(WorkbenchError, match=name):
            RECORDS["gated-deltanet"](**{**given, name: wrong})
    given = example("rwkv-7", 5)
    for name, wrong in (("rate", given["rate"][..., 0]), ("v", given["v"][:, :3]), ("kappa", given["kappa"][..., :2])):
        with pytest.raises(WorkbenchError, match=f"^{name} "):
            RECORDS["rwkv-7"](**{**given, name: wrong})


def test_what_is_no_tensor_is_named() -> None:
    for record, names in (("gated-deltanet", ("q", "k", "v", "beta")), ("rwkv-7", ("r", "k", "v", "kappa", "rate"))):
        given = example(record, 5)
        for name in names:
            with pytest.raises(WorkbenchError, match=f"^{name} is floating point"):
                RECORDS[record](**{**given, name: None})


def test_decays_of_any_strength() -> None:
    """Nothing, exp(-200), and everything forgotten, with writing strengths from 0 to 2, against the recurrence."""
    for record in ("gated-deltanet", "kimi-delta-attention"):
        given = example(record, 130)
        weak = torch.full_like(given["log_decay"], -0.01)
        strong = given["log_decay"] < -1.0
        for number in (0.0, -200.0, -torch.inf):
            for strength in (0.0, 1.0, 2.0):
                given["beta"] = torch.full_like(given["beta"], strength)
                given["log_decay"] = weak.masked_fill(strong, number)
                agree(
                    RECORDS[record].operator,
                    given,
                    *parts(given["q"], given["k"], given["beta"], given["log_decay"], 4),
                )
