"""What does an attention layer read and write, as matrices, biases and norms?

With row vectors x of the residual stream, ``norm(x) = L(x) / size(x) + shift`` where L is linear (``folding``): one number per
token is all that is not linear in it. Queries, keys and values are ``norm(x) W + b``, the layer writes ``z W_O + b_O``, through a
second norm in blocks that have one behind the attention.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import Refused, WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.models.families import Wiring, split_heads, submodule
from workbench.models.hf import HFModel
from workbench.models.layers import attention_layers
from workbench.models.native import NativeModel
from workbench.models.protocol import Model
from workbench.models.taps import Globals, Place, places
from workbench.probes.heads.weights import Fold, folding

_BEFORE = ("input_layernorm", "ln_1", "self_attn_layer_norm", "norm_1")
_PLAIN = 1e-3


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm as ``L(x) / size(x) + shift``. ``module`` is None where there is none."""

    module: nn.Module | None
    fold: Fold

    @classmethod
    def of(cls, module: nn.Module | None, width: int, like: Tensor) -> Norm:
        """The norm ``module`` (none if None), on the device of ``like``. One narrower than float32 is copied to float32: its own
        rounding would hide what it does."""
        if module is not None and any(working_dtype(p.dtype) != p.dtype for p in module.parameters()):
            module = copy.deepcopy(module).float()
        fold, work = folding(module, width), working_dtype(like.dtype)
        scale, shift = (part.to(like.device, work) for part in (fold.scale, fold.shift))
        return cls(module, Fold(scale, fold.centred, shift))

    @torch.no_grad()
    def sizes(self, x: Tensor, where: str) -> Tensor:
        """``1 / size`` of x ``[..., D]``, ``[...]``; refused where the module is no norm of this form."""
        if self.module is None:
            return torch.ones_like(x[..., 0])
        weight = next(self.module.parameters(), x)
        out = self.module(x[None].to(weight.dtype))[0].to(x) - self.fold.shift
        plain = self.fold.linear(x)
        inverse = (plain * out).sum(-1) / plain.square().sum(-1).clamp(min=torch.finfo(x.dtype).tiny)
        rest = (out - plain * inverse[..., None]).norm(dim=-1)
        if bool((rest > _PLAIN * out.norm(dim=-1) + 1e-12).any()):
            raise Refused(f"{where}: {type(self.module).__name__} is no linear function divided by a size of its input")
        return inverse

    def back(self, direction: Tensor) -> Tensor:
        """L^T: a direction ``[..., D]`` that reads the normed vector, as one that reads the vector itself, times its size."""
        out = direction * self.fold.scale
        return out - out.mean(-1, keepdim=True) if self.fold.centred else out


@dataclass(frozen=True, eq=False)
class Projection:
    """``W [H or G, D, E]`` and ``b [H or G, E]`` of what is read from the normed stream; ``norm``, on queries or keys, works
    per head or on all heads together (``joint``)."""

    weight: Tensor
    bias: Tensor
    norm: Norm | None = None
    joint: bool = False


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One block: ``before`` the norm in front of the attention, ``q k v`` its projections, ``o`` W_O ``[H, E, D]`` and ``o_bias``
    ``[D]``, ``after`` the norm behind W_O, ``mlp`` the norm in front of the MLP. ``module`` is the attention module."""

    before: Norm
    v: Projection
    o: Tensor
    o_bias: Tensor
    after: Norm
    mlp: Norm
    q: Projection | None
    k: Projection | None
    module: nn.Module


def layer_weights(model: Model, layer: int) -> LayerWeights:
    """The weights of a layer, detached. Serves native models and Hugging Face models of one stack whose values are a plain
    projection of the normed stream; others are refused with what is missing."""
    if isinstance(model, NativeModel):
        return _native(model, layer)
    if isinstance(model, HFModel):
        return _hugging_face(model, layer)
    raise Refused(
        f"weights of attention layers are known for native and Hugging Face models; got a {type(model).__name__}"
    )


def last_norm(model: Model, like: Tensor) -> Norm:
    """The norm in front of W_U."""
    if isinstance(model, NativeModel):
        return Norm.of(model.net.ln_final, model.shape.width, like)
    if isinstance(model, HFModel):
        found = Globals(model.model, attention_layers(model.model)).modules.get(("final_norm", ""))
        if found is not None:
            return Norm.of(found, model.shape.width, like)
    raise Refused(f"{model.name}: the norm before its W_U is not known")


def place_of(model: HFModel, layer: int) -> Place:
    """Where a layer of a model of one stack lies."""
    found = places(model.model, attention_layers(model.model))
    if any(place.layer.stack for place in found):
        raise Refused(
            f"{model.family} has several stacks of layers; attributions through attention are for models of one"
        )
    for place in found:
        if place.layer.key == layer:
            return place
    raise WorkbenchError(f"{model.name} has attention layers {[place.layer.key for place in found]}; got {layer}")


def _native(model: NativeModel, layer: int) -> LayerWeights:
    if not 0 <= layer < model.shape.layers:
        raise WorkbenchError(f"{model.name} has layers 0 to {model.shape.layers - 1}; got {layer}")
    blocks: Any = model.net.blocks
    block, width = blocks[layer], model.shape.width
    attn = block.attn
    if attn.W_V is None:
        raise Refused(f"{model.name}: mixer {model.net.config.mixer!r} has no W_V, so that no head moves values")

    def made(name: str) -> Projection | None:
        weight, bias = getattr(attn, f"W_{name}"), getattr(attn, f"b_{name}")
        if weight is None:
            return None
        return Projection(
            weight.detach(), weight.new_zeros(len(weight), weight.shape[2]) if bias is None else bias.detach()
        )

    v, o = made("V"), attn.W_O.detach()
    assert v is not None
    none = Norm.of(None, width, o)
    mlp = none if block.mlp is None else Norm.of(block.ln2, width, o)
    return LayerWeights(Norm.of(block.ln1, width, o), v, o, o.new_zeros(width), none, mlp, made("Q"), made("K"), attn)


def _hugging_face(model: HFModel, layer: int) -> LayerWeights:
    place = place_of(model, layer)
    wiring, block, module = place.wiring, place.block, place.layer.module
    what = f"{model.family}, layer {layer} ({type(module).__name__})"
    if wiring is None or not wiring.out:
        raise Refused(f"{what}: where its projections lie is not known")
    if wiring.end:
        raise Refused(f"{what}: its norms stand behind the sum of the stream, which is then no sum of components")
    if not wiring.mid or "resid_mid" not in place.kinds:
        raise Refused(
            f"{what}: the stream between its attention and its MLP is not served, so that they are not told apart"
        )
    o = model.weight("W_O", layer).detach()
    width = o.shape[-1]
    out: Any = block.get_submodule(wiring.out)
    o_bias = o.new_zeros(width) if out.bias is None else out.bias.detach()
    before = next((n for name in _BEFORE if (n := getattr(block, name, None)) is not None), None)
    after = submodule(block, wiring.attn_out) if wiring.attn_out != wiring.out else None
    middle = submodule(block, wiring.mid)
    if "norm" not in type(middle).__name__.lower():
        middle = None
    q, k, v = _projections(place, wiring, what, o)
    return LayerWeights(
        Norm.of(before, width, o), v, o, o_bias, Norm.of(after, width, o), Norm.of(middle, width, o), q, k, module
    )


def _projections(place: Place, wiring: Wiring, what: str, like: Tensor) -> list[Projection]:
    block, module = place.block, place.layer.module
    if wiring.fused and submodule(block, wiring.fused) is not None:
        fused = _linear(block, wiring.fused)
        weights, biases = (split_heads(wiring, part, place.heads, place.kv_heads, place.width) for part in fused)
        found = [(weights[name].transpose(0, 1), biases[name]) for name in "qkv"]
    elif all(submodule(block, path) is not None for path in (wiring.q, wiring.k, wiring.v)):
        found = []
        sizes = (place.heads, place.kv_heads, place.kv_heads)
        for path, count in zip((wiring.q, wiring.k, wiring.v), sizes, strict=True):
            weight, bias = _linear(block, path)
            found.append((weight.unflatten(1, (count, -1)).transpose(0, 1), bias.unflatten(0, (count, -1))))
    else:
        raise Refused(f"{what}: its queries, keys and values are no plain projections of the stream")
    made = []
    for name, (weight, bias) in zip("qkv", found, strict=True):
        norm, joint = getattr(module, f"{name}_norm", None), False
        fitted = None
        if isinstance(norm, nn.Module):
            size = next((p.numel() for p in norm.parameters()), weight.shape[-1])
            if size not in (weight.shape[-1], bias.numel()):
                raise Refused(f"{what}: its {name}_norm works neither on one head nor on all of them")
            joint = size != weight.shape[-1]
            fitted = Norm.of(norm, size, like)
        made.append(Projection(weight, bias, fitted, joint))
    if made[2].norm is not None:
        raise Refused(f"{what}: its values pass a norm of their own")
    return made


def _linear(block: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """Weight ``[inputs, outputs]`` and bias ``[outputs]`` of a projection."""
    module: Any = submodule(block, path)
    weight: Tensor = module.weight.detach()
    weight = weight if type(module).__name__ == "Conv1D" else weight.T
    bias = getattr(module, "bias", None)
    return weight, weight.new_zeros(weight.shape[1]) if bias is None else bias.detach()
