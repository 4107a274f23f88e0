"""timm: outputs stay as they are, maps are what the modules do, and the workbench's own operators agree with timm's."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workbench.adapters.timm import capture_timm, timm_map
from workbench.errors import Refused, UnknownName
from workbench.mixers.cascaded import cascaded_group_attention
from workbench.mixers.gates import efficient_channel_attention
from workbench.mixers.vision_windows import swin_attention

TOKENS, IMAGE, LAST = (2, 16, 24), (2, 24, 8, 8), (2, 6, 8, 24)
SMALL: dict[str, Any] = {"dim": 24, "num_heads": 3}
MODULES: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...]]] = {
    "Attention": ("layers.attention", "Attention", SMALL, TOKENS),
    "Attention, norms": (
        "layers.attention", "Attention", {**SMALL, "qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm},
        TOKENS,
    ),
    "Attention, gated": ("layers.attention", "Attention", {**SMALL, "gated": True}, TOKENS),
    "AttentionRope": ("layers.attention", "AttentionRope", SMALL, TOKENS),
    "EvaAttention": ("models.eva", "EvaAttention", {**SMALL, "scale_norm": False}, TOKENS),
    "Swin": ("models.swin_transformer", "WindowAttention", {**SMALL, "window_size": 4}, TOKENS),
    "DaViT window": ("models.davit", "WindowAttention", {**SMALL, "window_size": (4, 4)}, TOKENS),
    "DaViT channel": ("models.davit", "ChannelAttention", SMALL, TOKENS),
    "DaViT channel 2": ("models.davit", "ChannelAttentionV2", SMALL, TOKENS),
    "DaViT channel 2, fixed": ("models.davit", "ChannelAttentionV2", {**SMALL, "dynamic_scale": False}, TOKENS),
    "ConViT": ("models.convit", "GPSA", SMALL, TOKENS),
    "ConViT MHSA": ("models.convit", "MHSA", SMALL, TOKENS),
    "VOLO": ("models.volo", "OutlookAttention", SMALL, LAST),
    "VOLO, stride": ("models.volo", "OutlookAttention", {**SMALL, "stride": 2}, LAST),
    "Halo": ("layers.halo_attn", "HaloAttn", {**SMALL, "block_size": 4, "halo_size": 2, "dim_head": 4}, IMAGE),
    "Halo, scaled": (
        "layers.halo_attn", "HaloAttn", {**SMALL, "block_size": 4, "halo_size": 1, "scale_pos_embed": True}, IMAGE,
    ),
    "EfficientViT": (
        "models.efficientvit_msra", "CascadedGroupAttention", {**SMALL, "key_dim": 4, "attn_ratio": 2, "resolution": 8},
        IMAGE,
    ),
    "SE": ("layers.squeeze_excite", "SEModule", {"channels": 24}, IMAGE),
    "SE, last": ("layers.squeeze_excite", "SqueezeExciteCl", {"channels": 24}, LAST),
    "eSE": ("layers.squeeze_excite", "EffectiveSEModule", {"channels": 24}, IMAGE),
    "ECA": ("layers.eca", "EcaModule", {"channels": 24}, IMAGE),
    "cECA": ("layers.eca", "CecaModule", {"channels": 24}, IMAGE),
    "CBAM channel": ("layers.cbam", "ChannelAttn", {"channels": 24}, IMAGE),
    "CBAM spatial": ("layers.cbam", "SpatialAttn", {}, IMAGE),
    "CBAM spatial, light": ("layers.cbam", "LightSpatialAttn", {}, IMAGE),
}  # fmt: skip


def module_of(path: str, name: str, options: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    module = getattr(importlib.import_module(f"timm.{path}"), name)(**options).double()
    module.eval()  # of a cascade this returns None
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def mixed(module: nn.Module, output: Tensor, before: Tensor | None, like: Tensor) -> Tensor:
    """What the map gives, as the module has it: before the projection, or the output of a gate; in the layout of ``like``."""
    name = type(module).__name__
    b, h, n, e = like.shape
    if before is None and name == "HaloAttn":
        return output.flatten(2).view(b, h, e, n).transpose(2, 3)
    if before is None:
        channels = output.flatten(1, -2).transpose(1, 2) if name == "SqueezeExciteCl" else output.flatten(2)
        return channels.view(b, h, n, e) if "Spatial" not in name else channels.transpose(1, 2).view(b, h, n, e)
    if name == "CascadedGroupAttention":
        return before.flatten(2).view(b, h, e, n).transpose(2, 3)
    if name.startswith("ChannelAttention"):
        return before.view(b, e, h, n).permute(0, 2, 3, 1)
    return before.view(b, n, h, e).transpose(1, 2)


@pytest.mark.parametrize("name", MODULES)
def test_module(timm: ModuleType, name: str) -> None:
    path, kind, options, shape = MODULES[name]
    module = module_of(path, kind, options)
    x = torch.randn(*shape, dtype=torch.float64)
    plain = module(x.clone())
    heard: list[Tensor] = []
    part = getattr(module, "norm", None) if name == "Attention, norms" else getattr(module, "proj", None)
    hook = None if part is None else part.register_forward_pre_hook(lambda _m, inputs: heard.append(inputs[0]))
    with capture_timm(module, only=("",)) as calls:
        output = module(x.clone())
    if hook is not None:
        hook.remove()
    assert torch.equal(output, plain)
    (call,) = calls
    assert call.kind == kind
    found = call.map.matvec(call.values)
    want = mixed(module, output, heard[0] if heard else None, found)
    torch.testing.assert_close(found, want, atol=1e-10, rtol=1e-10)
    out, amap = timm_map(module, x.clone())
    assert torch.equal(out, plain)
    assert amap.shape == call.map.shape
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_unfused_attention_has_the_same_map(timm: ModuleType) -> None:
    module = module_of(*MODULES["Attention"][:3])
    x = torch.randn(*TOKENS, dtype=torch.float64)
    _, fused = timm_map(module, x, is_causal=True)
    module.fused_attn = False
    _, plain = timm_map(module, x, is_causal=True)
    torch.testing.assert_close(fused.dense(), plain.dense(), atol=1e-12, rtol=0)
    assert not fused.dense().triu(1).any()
    keep = torch.rand(1, 1, 16, 16) > 0.3
    keep[..., 0] = True
    _, masked = timm_map(module, x, attn_mask=keep)
    assert not masked.dense()[~keep.expand(2, 3, -1, -1)].any()
    torch.testing.assert_close(masked.row_sums(), torch.ones(2, 3, 16, dtype=torch.float64))


@pytest.mark.parametrize("shift", [0, 2])
def test_swin_operator_is_timms_block(timm: ModuleType, shift: int) -> None:
    """Our operator on the image, timm's on rolled and masked windows."""
    from timm.models.swin_transformer import SwinTransformerBlock

    torch.manual_seed(0)
    block = SwinTransformerBlock(24, (8, 8), 3, window_size=4, shift_size=shift).double().eval()
    nn.init.normal_(block.attn.relative_position_bias_table)
    x = torch.randn(2, 8, 8, 24, dtype=torch.float64)
    with capture_timm(block, only=("attn",)) as calls:
        own = block._attn(x)
    q, k, v = block.attn.qkv(x).view(2, 64, 3, 3, 8).permute(2, 0, 3, 1, 4)
    table = block.attn.relative_position_bias_table.T
    out, _ = swin_attention(q, k, v, grid=(8, 8), window=(4, 4), shift=(shift, shift), table=table)
    ours = block.attn.proj(out.transpose(1, 2).reshape(2, 8, 8, 24))
    # timm hides pairs by -100, and not altogether
    torch.testing.assert_close(ours, own, atol=1e-10 if not shift else 1e-9, rtol=0)
    assert calls[0].map.shape == (8, 3, 16, 16)


def test_cascade_operator_is_timms(timm: ModuleType) -> None:
    """Without the batch norms, which are left at their start, our operator takes timm's weights as they are."""
    path, kind, options, _ = MODULES["EfficientViT"]
    torch.manual_seed(0)
    module = getattr(importlib.import_module(f"timm.{path}"), kind)(**options).double()
    module.eval()
    nn.init.normal_(module.attention_biases)
    x = torch.randn(*IMAGE, dtype=torch.float64)
    with capture_timm(module) as calls:
        module(x)
    unit = (1 + 1e-5) ** -0.5
    weights = torch.stack([part.conv.weight[..., 0, 0].T for part in module.qkvs]) * unit
    kernel = torch.stack([part.conv.weight[:, 0] for part in module.dws]) * unit
    out, amap = cascaded_group_attention(
        x.flatten(2).view(2, 3, 8, 64).transpose(2, 3), *weights.split([4, 4, 8], -1), grid=(8, 8),
        query_kernel=kernel, bias=module.attention_biases.view(3, 8, 8),
    )  # fmt: skip
    torch.testing.assert_close(out, calls[0].map.matvec(calls[0].values), atol=1e-10, rtol=0)
    torch.testing.assert_close(amap.dense(), calls[0].map.dense(), atol=1e-10, rtol=0)


def test_eca_operator_is_timms(timm: ModuleType) -> None:
    module = module_of(*MODULES["ECA"][:3])
    x = torch.randn(*IMAGE, dtype=torch.float64)
    values = x.flatten(2)[:, None]
    out, amap = efficient_channel_attention(values, values, module.conv.weight[0, 0])
    torch.testing.assert_close(out.view_as(x), module(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(amap.native(), timm_map(module, x)[1].native(), atol=1e-12, rtol=0)


def test_whole_models(timm: ModuleType) -> None:
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval()
    images = torch.randn(1, 3, 32, 32)
    plain = vit(images)
    with capture_timm(vit) as calls:
        assert torch.equal(vit(images), plain)
    assert [call.name for call in calls] == ["blocks.0.attn", "blocks.1.attn"]
    assert calls[0].map.shape == (1, 3, 5, 5)
    with capture_timm(vit, only=("blocks.1.attn",)) as calls:
        vit(images).sum().backward()
    assert [call.name for call in calls] == ["blocks.1.attn"]
    assert vit.patch_embed.proj.weight.grad is not None
    with pytest.raises(UnknownName, match=r"blocks\.7"), capture_timm(vit, only=("blocks.7.attn",)):
        pass


def test_what_is_not_known_is_refused(timm: ModuleType) -> None:
    from timm.layers import Mlp
    from timm.layers.cbam import CbamModule

    with pytest.raises(UnknownName, match=r"timm\.models\.volo\.OutlookAttention"):
        timm_map(Mlp(8), torch.zeros(1, 2, 8))
    with pytest.raises(UnknownName, match="Linear"):
        timm_map(nn.Linear(2, 2), torch.zeros(1, 2))
    cbam = CbamModule(24).eval()
    with capture_timm(cbam) as calls:
        cbam(torch.randn(2, 24, 4, 4))
    assert [call.kind for call in calls] == ["ChannelAttn", "SpatialAttn"]
    module = module_of("layers.attention", "Attention", {**SMALL, "attn_drop": 0.5}).train()
    with pytest.raises(Refused, match="eval"):
        timm_map(module, torch.zeros(*TOKENS, dtype=torch.float64))
    assert not module._forward_hooks
    halo = module_of("layers.halo_attn", "HaloAttn", {**SMALL, "block_size": 4, "stride": 2})
    with pytest.raises(Refused, match="stride"):
        timm_map(halo, torch.zeros(*IMAGE, dtype=torch.float64))
    volo = module_of("models.volo", "OutlookAttention", {**SMALL, "stride": 3, "padding": 0})
    with pytest.raises(Refused, match="padding=0"):
        timm_map(volo, torch.zeros(2, 6, 6, 24, dtype=torch.float64))
