"""timm: the maps of its attention modules, while the modules themselves run unchanged.

Hooks listen to the parts of a module (projections, norms, gates), and the map is made of what they said:

    Attention, MHSA, WindowAttention (Swin, DaViT)   softmax maps over tokens, or over the tokens of each window
    HaloAttn, OutlookAttention, GPSA                 the operators of this workbench
    CascadedGroupAttention                           softmax of each head on its own values
    ChannelAttention, ChannelAttentionV2 (DaViT)     softmax between channels
    SEModule, EcaModule, ChannelAttn, ...            diagonal: a gate per channel; SpatialAttn a gate per token

Any other module of timm that calls ``scaled_dot_product_attention`` once is read from that call. Values are ``[B, H, N, E]``,
before the output projection. Checked with timm 1.0.31.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.adapters.sdpa import SdpaCall, capture_sdpa
from workbench.attention_map import AttentionMap
from workbench.errors import Refused, UnknownName
from workbench.kernels.mask import Mask
from workbench.mixers.channel_attention import davit_channel_attention, davit_channel_attention_v2
from workbench.mixers.convit import gated_positional_attention
from workbench.mixers.halo import halo_attention
from workbench.mixers.outlook import outlook_attention
from workbench.patterns.diagonal import DiagonalMap
from workbench.patterns.per_channel import ChannelGatedMap
from workbench.patterns.softmax import SoftmaxMap

Made = tuple[AttentionMap, Tensor]
"""A map and the values that it multiplies."""


@dataclass(frozen=True)
class TimmCall:
    """One run of an attention module: ``name`` in the model, ``kind`` its type, ``output`` what it returned, unchanged;
    ``output`` is a function of ``map.matvec(values)`` (output projection, norm), or that itself for gates."""

    name: str
    kind: str
    output: Any
    map: AttentionMap
    values: Tensor


@dataclass(frozen=True)
class _Run:
    """What a module was called with and what its parts returned."""

    module: Any
    given: dict[str, Any]
    heard: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.heard[name]

    @property
    def x(self) -> Tensor:
        return self.given["x"]


def timm_map(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, AttentionMap]:
    """What ``module(*args, **kwargs)`` returns, unchanged, and the map of this attention module of timm."""
    with capture_timm(module, only=("",)) as calls:
        result = module(*args, **kwargs)
    return result, calls[0].map


@contextmanager
def capture_timm(model: nn.Module, *, only: tuple[str, ...] | None = None) -> Iterator[list[TimmCall]]:
    """Record the attention modules of a timm model as they run: ``with capture_timm(model) as calls: model(images)``.

    ``only`` keeps the modules of these names (of ``model.named_modules()``; ``""`` is the model itself). A model in which
    nothing is recorded is refused, with the list of known types. Gradients and outputs are those of the plain model.
    """
    modules = dict(model.named_modules())
    for name in only or ():
        if name not in modules:
            raise UnknownName("module of this model", name, modules)
    calls: list[TimmCall] = []
    stack: list[str] = []
    handles: list[Any] = []
    with capture_sdpa(lambda: stack[-1] if stack else "") as fused:
        try:
            for name, module in modules.items():
                if type(module).__module__.startswith("timm."):
                    handles += _listen(name, module, only is None or name in only, stack, calls, fused)
            yield calls
        finally:
            for handle in handles:
                handle.remove()
    if not calls:
        raise UnknownName("attention module of timm", type(model).__name__, SUPPORTED)


def _listen(
    name: str, module: nn.Module, wanted: bool, stack: list[str], calls: list[TimmCall], fused: list[SdpaCall]
) -> list[Any]:
    """Hooks that name the running module, collect what its parts return, and make the map when it is over."""
    build = _builder(module) if wanted else None
    frames: list[tuple[int, dict[str, Tensor]]] = []

    def enter(*_: Any) -> None:
        stack.append(name)
        frames.append((len(fused), {}))

    def leave(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        stack.pop()
        since, heard = frames.pop()
        if output is None or not wanted:  # None: the module raised
            return
        own = [call for call in fused[since:] if call.layer == name]
        with torch.no_grad():
            if build is not None:
                dropped = getattr(module, "attn_drop", None)
                if module.training and isinstance(dropped, nn.Dropout) and dropped.p:
                    raise Refused(f"{type(module).__name__} drops weights while training: put the model in eval mode")
                given = inspect.signature(module.forward).bind(*args, **kwargs)
                given.apply_defaults()
                found, values = build(_Run(module, dict(given.arguments), heard))
            elif len(own) == 1:
                found, values = own[0].map(), own[0].values
            else:
                return
        calls.append(TimmCall(name, type(module).__name__, output, found, values))

    handles: list[Any] = [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, with_kwargs=True, always_call=True),
    ]
    if build is not None:
        for part, child in module.named_modules():
            if part:

                def hear(_m: nn.Module, _i: Any, out: Any, part: str = part) -> None:
                    frames[-1][1][part] = out

                handles.append(child.register_forward_hook(hear))
    return handles


def _builder(module: nn.Module) -> Callable[[_Run], Made] | None:
    """How to read a module: by its class, or the one that it inherits ``forward`` from."""
    own = getattr(type(module), "forward", None)
    for kind in type(module).__mro__:
        found = BUILDERS.get(f"{kind.__module__}.{kind.__qualname__}")
        if found is not None and own is getattr(kind, "forward", None):
            return found
    return None


def _parts(projected: Tensor, heads: int, parts: int = 3) -> tuple[Tensor, ...]:
    """A joint projection ``[B, N, parts * H * E]`` as ``[B, H, N, E]`` each."""
    b, n, _ = projected.shape
    return projected.reshape(b, n, parts, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _attention(run: _Run) -> Made:
    module, x = run.module, run.x
    v = _parts(run["qkv"], module.num_heads)[2]
    result = v.new_empty(0)
    call = SdpaCall(
        run["q_norm"],
        run["k_norm"],
        v,
        result,
        run.given.get("attn_mask"),
        0.0,
        bool(run.given.get("is_causal")),
        module.scale,
    )
    found: AttentionMap = call.map()
    if getattr(module, "gate", None) is not None:
        if not isinstance(module.norm, nn.Identity):
            raise Refused(
                "Attention with scale_norm and gate: the norm between them mixes channels, so no map holds both"
            )
        gate = run["gate"].sigmoid().view(*x.shape[:2], module.num_heads, -1).transpose(1, 2)
        found = ChannelGatedMap(found, gate)
    return found, v


def _plain(run: _Run) -> Made:
    q, k, v = _parts(run["qkv"], run.module.num_heads)
    return SoftmaxMap(q, k, mask=Mask(), scale=run.module.scale), v


def _swin(run: _Run) -> Made:
    """Windows are examples; the module's own mask adds -100 to what a shift keeps apart."""
    q, k, v = _parts(run["qkv"], run.module.num_heads)
    bias = run.module._get_rel_pos_bias()
    mask = run.given.get("mask")
    if mask is not None:
        bias = bias + mask.repeat(len(q) // len(mask), 1, 1)[:, None]
    return SoftmaxMap(q, k, mask=Mask(), scale=run.module.scale, bias=bias), v


def _halo(run: _Run) -> Made:
    module = run.module
    if module.block_stride != 1 or not isinstance(module.pool, nn.Identity):
        raise Refused("HaloAttn with a stride has fewer queries than tokens: only stride 1 is mapped")
    b, _, rows, columns = run.x.shape
    q = run["q"].view(b, module.num_heads, module.dim_head_qk, -1).transpose(2, 3)
    kv = run["kv"].view(b, module.num_heads, module.dim_head_qk + module.dim_head_v, -1).transpose(2, 3)
    k, v = kv.split([module.dim_head_qk, module.dim_head_v], -1)
    place, factor = module.pos_embed, module.scale if module.scale_pos_embed else 1.0
    _, found = halo_attention(
        q, k, v, grid=(rows, columns), block=module.block_size, halo=module.halo_size, scale=module.scale,
        row_table=place.height_rel * factor, column_table=place.width_rel * factor,
    )  # fmt: skip
    return found, v


def _gpsa(run: _Run) -> Made:
    module, n = run.module, run.x.shape[1]
    side = math.isqrt(n)  # the module takes square images alone
    q, k = _parts(run["qk"], module.num_heads, 2)
    v = _parts(run["v"], module.num_heads, 1)[0]
    _, found = gated_positional_attention(
        q, k, v, module.pos_proj.weight, module.gating_param, grid=(side, side), scale=module.scale
    )
    return found, v


def _outlook(run: _Run) -> Made:
    module = run.module
    if module.padding != module.kernel_size // 2 or module.kernel_size % 2 == 0:
        raise Refused(f"OutlookAttention is mapped with odd windows centred on tokens; got padding={module.padding}")
    b, rows, columns, _ = run.x.shape
    v = _parts(run["v"].flatten(1, 2), module.num_heads, 1)[0]
    logits = _parts(run["attn"].reshape(b, -1, module.num_heads * module.kernel_size**4), module.num_heads, 1)[0]
    options = {"size": module.kernel_size, "stride": module.stride, "scale": module.scale}
    _, found = outlook_attention(logits, v, grid=(rows, columns), **options)
    return found, v


def _cascaded(run: _Run) -> Made:
    module = run.module
    widths = [module.key_dim, module.key_dim, module.val_dim]
    heads = range(module.num_heads)
    held = [run[f"qkvs.{head}"].flatten(2).split(widths, 1) for head in heads]
    q = torch.stack([run[f"dws.{head}"].flatten(2) for head in heads], 1).transpose(2, 3)
    k, v = (torch.stack([parts[i] for parts in held], 1).transpose(2, 3) for i in (1, 2))
    bias = module.attention_biases[:, module.attention_bias_idxs]
    found = SoftmaxMap(q, k, mask=Mask(), scale=module.scale, bias=bias)
    found.value_space = "each head's own V"
    return found, v


def _channels(run: _Run) -> Made:
    q, k, v = (x.transpose(2, 3) for x in _parts(run["qkv"], run.module.num_heads))
    return davit_channel_attention(q, k, v, scale=run.module.scale)[1], q


def _channels_v2(run: _Run) -> Made:
    module = run.module
    q, k, v = (x.transpose(2, 3) for x in _parts(run["qkv"], module.groups))
    scale = None if module.dynamic_scale else module.head_dim**-0.5
    return davit_channel_attention_v2(q, k, v, scale=scale)[1], v


def _channel_gate(run: _Run) -> Made:
    gate = run["gate"].flatten(1)[:, None]
    return DiagonalMap(gate, value_space="features"), run.x.flatten(2)[:, None]


def _channel_gate_last(run: _Run) -> Made:
    gate = run["gate"].flatten(1)[:, None]
    return DiagonalMap(gate, value_space="features"), run.x.flatten(1, -2).transpose(1, 2)[:, None]


def _token_gate(run: _Run) -> Made:
    gate = run["gate"].flatten(1)[:, None]
    return DiagonalMap(gate, domain="token", value_space="features"), run.x.flatten(2).transpose(1, 2)[:, None]


BUILDERS: dict[str, Callable[[_Run], Made]] = {
    "timm.layers.attention.Attention": _attention,
    "timm.models.convit.MHSA": _plain,
    "timm.models.convit.GPSA": _gpsa,
    "timm.models.swin_transformer.WindowAttention": _swin,
    "timm.models.davit.WindowAttention": _plain,
    "timm.models.davit.ChannelAttention": _channels,
    "timm.models.davit.ChannelAttentionV2": _channels_v2,
    "timm.layers.halo_attn.HaloAttn": _halo,
    "timm.models.volo.OutlookAttention": _outlook,
    "timm.models.efficientvit_msra.CascadedGroupAttention": _cascaded,
    "timm.layers.squeeze_excite.SEModule": _channel_gate,
    "timm.layers.squeeze_excite.EffectiveSEModule": _channel_gate,
    "timm.layers.squeeze_excite.SqueezeExciteCl": _channel_gate_last,
    "timm.layers.eca.EcaModule": _channel_gate,
    "timm.layers.eca.CecaModule": _channel_gate,
    "timm.layers.cbam.ChannelAttn": _channel_gate,
    "timm.layers.cbam.SpatialAttn": _token_gate,
    "timm.layers.cbam.LightSpatialAttn": _token_gate,
}
SUPPORTED = [*BUILDERS, "any module of timm with one call of scaled_dot_product_attention"]
