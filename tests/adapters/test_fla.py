"""flash-linear-attention: maps of its layers and operations against what the library itself computes."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workbench.adapters.fla import fla_calls, fla_map, from_fla, mamba2_scan, op_map
from workbench.errors import Refused, UnknownName, WorkbenchError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore")
SIZES = {"hidden_size": 64, "num_heads": 2}
LAYERS: dict[str, dict[str, Any]] = {
    "LinearAttention": {**SIZES, "mode": "chunk"},
    "MultiScaleRetention": {**SIZES, "expand_k": 1, "expand_v": 1},
    "GatedLinearAttention": {**SIZES, "expand_k": 1, "expand_v": 1},
    "DeltaNet": SIZES,
    "GatedDeltaNet": {**SIZES, "head_dim": 32, "expand_v": 1},
    "KimiDeltaAttention": {**SIZES, "head_dim": 32},
    "RWKV6Attention": SIZES,
    "RWKV7Attention": {"hidden_size": 64, "head_dim": 32, "layer_idx": 0, "num_hidden_layers": 2},
}


def layer_of(fla: ModuleType, name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = getattr(importlib.import_module("fla.layers"), name)(**options).to(DEVICE).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            if not parameter.any():  # RWKV-7 starts with zeros where it mixes
                parameter.normal_(std=0.1)
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_layer(fla: ModuleType, name: str) -> None:
    layer = layer_of(fla, name, **LAYERS[name])
    x = torch.randn(2, 9, 64, device=DEVICE)
    with torch.no_grad():
        own = layer(x)[0]
        with fla_calls(nn.Sequential(nn.Identity(), layer)) as calls:
            result, amap = fla_map(layer, x)
    torch.testing.assert_close(result[0], own, atol=0, rtol=0)
    assert [call.layer for call in calls] == ["1"]
    call = calls[0]
    assert amap.shape == (2, 2, 9, 9)
    assert call.output.abs().max() > 1e-4
    torch.testing.assert_close(amap.matvec(call.values), call.output, atol=2e-5, rtol=2e-4)


def test_layers_are_left_as_they_were(fla: ModuleType) -> None:
    layer = layer_of(fla, "DeltaNet", **SIZES)
    module = importlib.import_module("fla.layers.delta_net")
    before = module.chunk_delta_rule, module.fused_recurrent_delta_rule
    with fla_calls(layer):
        assert module.chunk_delta_rule is not before[0]
        with pytest.raises(AttributeError):
            layer(None)
    assert (module.chunk_delta_rule, module.fused_recurrent_delta_rule) == before
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_mamba2(fla: ModuleType) -> None:
    options = {"hidden_size": 64, "num_heads": 4, "head_dim": 32, "state_size": 16, "expand": 2, "n_groups": 1}
    layer = layer_of(fla, "Mamba2", **options)
    x = torch.randn(2, 13, 64, device=DEVICE)
    seen: dict[str, Tensor] = {}
    layer.in_proj.register_forward_hook(lambda _m, _i, out: seen.update(projected=out))
    layer.norm.register_forward_pre_hook(lambda _m, inputs: seen.update(scanned=inputs[0]))
    with torch.no_grad():
        own = layer(x)[0]
        result, amap = fla_map(layer, x)
        assert torch.equal(result[0], own)
        values, _ = mamba2_scan(layer, seen["projected"])
    scanned = seen["scanned"].unflatten(-1, (4, 32)).transpose(1, 2)
    torch.testing.assert_close(amap.matvec(values), scanned, atol=1e-5, rtol=1e-4)
    with pytest.raises(Refused, match="n_groups=2"):
        fla_map(layer_of(fla, "Mamba2", **(options | {"n_groups": 2})), x)
    with pytest.raises(WorkbenchError, match="no mask"):
        fla_map(layer, x, torch.ones(2, 13))


def tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def qkv(heads: int = 3, tokens: int = 11, **more: tuple[int, ...]) -> dict[str, Tensor]:
    wide, narrow = (2, tokens, heads, 8), (2, tokens, heads, 6)
    return tensors(q=wide, k=wide, v=narrow, **more)


def naive(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"fla.ops.{module}"), name)


HEAD, CHANNEL = (2, 11, 3), (2, 11, 3, 8)


def test_naive_linear_attention(fla: ModuleType) -> None:
    given = {name: x.abs() for name, x in qkv().items()}
    call = naive("linear_attn.naive", "naive_recurrent_linear_attn")
    for normalize in (False, True):
        out, amap = from_fla("chunk_linear_attn", **given, normalize=normalize)
        torch.testing.assert_close(out, call(**given, normalize=normalize)[0], atol=1e-5, rtol=1e-5)
        assert amap.row_sum == ("1" if normalize else "free")
    torch.testing.assert_close(from_fla("chunk_linear_attn", **given)[0], out)
    torch.testing.assert_close(
        from_fla("fused_recurrent_linear_attn", **given)[0], call(**given)[0], atol=1e-5, rtol=1e-5
    )


def test_naive_retention_and_lightning(fla: ModuleType) -> None:
    given = qkv()
    heads_first = [x.transpose(1, 2) for x in given.values()]
    want = naive("retention.naive", "naive_retention")(*heads_first).transpose(1, 2)
    torch.testing.assert_close(from_fla("chunk_retention", **given)[0], want, atol=1e-5, rtol=1e-5)
    rates = -8 / 3 * (1 - 2 / 5) * torch.arange(3.0)
    want = naive("simple_gla.naive", "naive_recurrent_simple_gla")(**given, g=rates.expand(HEAD).contiguous())[0]
    out, _ = from_fla("chunk_lightning_attn", **given, layer_idx=2, num_layers=5)
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)


def test_naive_gates(fla: ModuleType) -> None:
    given = qkv(g=HEAD)
    given["g"] = nn.functional.logsigmoid(given["g"])
    want = naive("simple_gla.naive", "naive_recurrent_simple_gla")(**given)[0]
    torch.testing.assert_close(from_fla("chunk_simple_gla", **given)[0], want, atol=1e-5, rtol=1e-5)
    given["g"] = nn.functional.logsigmoid(torch.randn(CHANNEL))
    want = naive("gla.naive", "naive_recurrent_gla")(given["q"], given["k"], given["v"], given["g"])[0]
    torch.testing.assert_close(from_fla("chunk_gla", **given)[0], want, atol=1e-5, rtol=1e-5)
    rwkv = {"r": given["q"], "k": given["k"], "v": given["v"], "w": given["g"], "u": torch.randn(3, 8)}
    first = {name: rwkv[name].transpose(1, 2) for name in ("r", "k", "v", "w")}
    call = naive("rwkv6.recurrent_naive", "naive_recurrent_rwkv6")
    want = call(first["r"], first["k"], first["v"], first["w"], rwkv["u"])[0].transpose(1, 2)
    torch.testing.assert_close(from_fla("chunk_rwkv6", **rwkv)[0], want, atol=1e-5, rtol=1e-5)


def test_naive_delta_rules(fla: ModuleType) -> None:
    given = qkv(beta=HEAD, g=HEAD)
    given |= {"beta": given["beta"].sigmoid(), "k": nn.functional.normalize(given["k"], dim=-1), "g": -given["g"].abs()}
    want = naive("gated_delta_rule.naive", "naive_recurrent_gated_delta_rule")(**given)[0]
    torch.testing.assert_close(from_fla("chunk_gated_delta_rule", **given)[0], want, atol=1e-5, rtol=1e-5)
    rule = {name: given[name] for name in ("q", "k", "v", "beta")}
    want = naive("delta_rule.naive", "delta_rule_recurrence")(*(x.transpose(1, 2) for x in rule.values()))[0].transpose(
        1, 2
    )
    torch.testing.assert_close(from_fla("chunk_delta_rule", **rule)[0], want, atol=1e-5, rtol=1e-5)
    given["g"] = -torch.randn(CHANNEL).abs()
    want = naive("kda.naive", "naive_recurrent_kda")(**given)[0]
    torch.testing.assert_close(from_fla("chunk_kda", **given)[0], want, atol=1e-5, rtol=1e-5)


def test_naive_delta_rules_with_more_value_heads(fla: ModuleType) -> None:
    given = tensors(q=(2, 11, 2, 8), k=(2, 11, 2, 8), v=(2, 11, 4, 6), beta=(2, 11, 4), g=(2, 11, 4, 8))
    given |= {"beta": given["beta"].sigmoid(), "k": nn.functional.normalize(given["k"], dim=-1), "g": -given["g"].abs()}
    want = naive("kda.naive", "naive_recurrent_kda")(**given)[0]
    out, amap = from_fla("chunk_kda", **given)
    assert amap.shape[1] == 4
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    per_head = {**given, "g": given["g"][..., 0]}
    same = {**given, "g": given["g"][..., :1].expand_as(given["g"])}
    torch.testing.assert_close(
        from_fla("chunk_gated_delta_rule", **per_head)[0], from_fla("chunk_kda", **same)[0], atol=1e-5, rtol=1e-5
    )


def test_naive_low_rank_transitions(fla: ModuleType) -> None:
    given = qkv(a=CHANNEL, b=CHANNEL, gk=CHANNEL)
    given |= {"a": given["a"] / 8, "b": given["b"] / 8, "gk": -given["gk"].abs()}
    first = {name: x.transpose(1, 2) for name, x in given.items()}
    order = [first[name] for name in ("q", "k", "v", "a", "b", "gk")]
    want = naive("generalized_delta_rule.dplr.naive", "dplr_recurrence")(*order)[0].transpose(1, 2)
    torch.testing.assert_close(from_fla("chunk_dplr_delta_rule", **given)[0], want, atol=1e-5, rtol=1e-5)
    rwkv = {"r": given["q"], "w": given["gk"], **{name: given[name] for name in ("k", "v", "a", "b")}}
    torch.testing.assert_close(from_fla("chunk_rwkv7", **rwkv)[0], want * 8**0.5, atol=1e-5, rtol=1e-5)
    want = naive("generalized_delta_rule.iplr.naive", "iplr_recurrence")(*order[:5])[0].transpose(1, 2)
    given.pop("gk")
    torch.testing.assert_close(from_fla("chunk_iplr_delta_rule", **given)[0], want, atol=1e-5, rtol=1e-5)


def test_gates_made_in_the_kernel(fla: ModuleType) -> None:
    given = qkv(g=CHANNEL, beta=HEAD)
    extra = {"A_log": torch.randn(3), "dt_bias": torch.randn(24), "use_gate_in_kernel": True}
    log = naive("kda.gate", "naive_kda_gate")(given["g"], extra["A_log"], extra["dt_bias"])
    flags = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "allow_neg_eigval": True}
    out, _ = from_fla("chunk_kda", **given, **extra, **flags)
    units = {name: nn.functional.normalize(given[name], dim=-1) for name in ("q", "k")}
    want, _ = from_fla("chunk_kda", **{**given, **units, "g": log, "beta": 2 * given["beta"].sigmoid()})
    torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
    bounded = naive("kda.gate", "naive_kda_lowerbound_gate")(
        given["g"], extra["A_log"], extra["dt_bias"], lower_bound=-5.0
    )
    out, _ = from_fla("chunk_kda", **given, **extra, lower_bound=-5.0)
    torch.testing.assert_close(out, from_fla("chunk_kda", **{**given, "g": bounded})[0], atol=1e-5, rtol=1e-5)


def test_an_operation_itself(fla: ModuleType) -> None:
    given = {name: x.to(DEVICE) for name, x in qkv(g=HEAD).items()}
    given["g"] = nn.functional.logsigmoid(given["g"])
    call = importlib.import_module("fla.ops.simple_gla").fused_recurrent_simple_gla
    result, amap = fla_map(call, given["q"], given["k"], given["v"], given["g"])
    torch.testing.assert_close(amap.matvec(given["v"].transpose(1, 2)), result[0].transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_what_is_not_known_is_refused(fla: ModuleType) -> None:
    given = qkv(beta=HEAD)
    with pytest.raises(UnknownName, match="chunk_mesa_net"):
        from_fla("chunk_mesa_net", **given)
    with pytest.raises(Refused, match="initial_state"):
        op_map("chunk_delta_rule", {**given, "initial_state": torch.zeros(1)})
    with pytest.raises(Refused, match="reverse"):
        op_map("fused_recurrent_linear_attn", {**given, "reverse": True})
    with pytest.raises(WorkbenchError, match="needs the argument 'q'"):
        op_map("chunk_delta_rule", {"v": given["v"]})
    with pytest.raises(WorkbenchError, match="v as a tensor"):
        op_map("chunk_delta_rule", {})
    with pytest.raises(Refused, match="one per channel"):
        op_map("fused_recurrent_delta_rule", {**given, "beta": given["v"]})
    with pytest.raises(WorkbenchError, match="Identity called none"):
        fla_map(nn.Identity(), torch.zeros(1))
    with pytest.raises(UnknownName, match="softmax"):
        fla_map(torch.softmax, torch.zeros(1), 0)


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fla", None)
    with pytest.raises(WorkbenchError, match=r"attention-workbench\[fla\]"):
        fla_map(nn.Identity(), torch.zeros(1))
