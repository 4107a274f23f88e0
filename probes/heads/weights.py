"""What does a head read and write, as matrices with the norms around it folded in?

With row vectors x of the residual stream, a head scores keys by x_q W_Q W_K^T x_k^T and moves x_k W_V W_O. A norm before it
divides x by its size, takes away its mean (LayerNorm) and multiplies by learned scales w; the last two are linear, so that
W <- C diag(w) W with C = I - 11^T/D (C = I for RMSNorm) reads the stream itself, up to one positive factor per token, which is
left out. A norm or scale between W_O and the stream is folded into W_O, norms on queries and keys into W_Q and W_K, the last
norm into W_U. Biases add terms that depend on one token alone; they and rotary positions are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.families import split_heads, submodule
from workbench.models.hf import HFModel
from workbench.models.layers import attention_layers
from workbench.models.native import NativeModel
from workbench.models.protocol import Model
from workbench.models.taps import Globals, Place, places

PER = ("query", "kv", "kv-max")
"""One number per query head; per group of query heads that share keys and values, their mean; or their largest."""
_BEFORE = ("input_layernorm", "ln_1", "self_attn_layer_norm", "norm_1", "layernorm_before", "norm1", "layer_norm1", "norm",
           "operator_norm", "temporal_pre_norm")  # fmt: skip


@dataclass(frozen=True)
class HeadWeights:
    """One layer: ``q [H, D, E]``, ``k [G, D, E]``, ``v [G, D, F]``, ``o [H, F, D]``, norms folded in. Query head h reads keys
    and values of group h // (H / G)."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor

    @property
    def groups(self) -> Tensor:
        """The group of each query head, ``[H]``."""
        return torch.arange(len(self.q)) // (len(self.q) // len(self.k))


@dataclass(frozen=True)
class Unembedding:
    """``matrix`` W_U ``[D, V]`` with the last norm folded in and the mean over the vocabulary taken out, so that a logit is
    relative to the mean logit; ``logits`` makes the model's own logits of a residual stream ``[..., D]``; ``size`` the divisor
    of the last norm for such a stream, ``[...]``."""

    matrix: Tensor
    logits: Callable[[Tensor], Tensor]
    size: Callable[[Tensor], Tensor]


def head_weights(model: Model, layer: int) -> HeadWeights:
    """The weights of a layer's heads with the norms around them folded in, detached.

    Serves native models, and Hugging Face models of one stack whose queries, keys and values are plain projections, separate
    or fused. Anything else raises ``Refused`` and says what is missing.
    """
    if isinstance(model, NativeModel):
        return _native(model, layer)
    if isinstance(model, HFModel):
        return _hugging_face(model, layer)
    raise Refused(f"weights of heads are known for native and Hugging Face models; got a {type(model).__name__}")


def weight_layers(model: Model) -> tuple[dict[int, HeadWeights], dict[str, str]]:
    """The weights of every layer that has them, and why others have none; refused if no layer has."""
    found, missing = {}, {}
    for layer in range(model.shape.layers):
        try:
            found[layer] = head_weights(model, layer)
        except Refused as error:
            missing[str(layer)] = str(error)
    if not found:
        raise Refused(next(iter(missing.values()), f"{model.name} has no attention layers"))
    return found, missing


def unembedding(model: Model) -> Unembedding:
    """W_U with the last norm; refused where hidden states of single tokens do not become logits through one norm and W_U."""
    if not model.shape.causal or model.shape.vocab is None:
        raise Refused(f"{model.name} does not predict next tokens: it has no W_U that heads write to")
    norm: nn.Module | None
    bias = None
    if isinstance(model, NativeModel):
        norm = model.net.ln_final
    elif isinstance(model, HFModel):
        norm = Globals(model.model, attention_layers(model.model)).modules.get(("final_norm", ""))
        bias = getattr(model.model.get_output_embeddings(), "bias", None)
    else:
        raise Refused(f"W_U is known for native and Hugging Face models; got a {type(model).__name__}")
    if norm is None:
        raise Refused(f"{model.name}: the norm before its W_U is not known")
    last, raw = norm, _weight(model, "W_U")
    fold = folding(last, len(raw))
    matrix = fold.into(raw)

    @torch.no_grad()
    def logits(x: Tensor) -> Tensor:
        found = last(x) @ raw
        return found if bias is None else found + bias

    @torch.no_grad()
    def size(x: Tensor) -> Tensor:
        plain = fold.linear(x)
        return plain.norm(dim=-1) / (last(x) - fold.shift).norm(dim=-1).clamp(min=1e-30)

    return Unembedding(matrix - matrix.mean(1, keepdim=True), logits, size)


@torch.no_grad()
def embedding(model: Model, kind: str = "direct", chunk: int = 1024) -> Tensor:
    """Rows ``[V, D]`` that stand for the tokens in the stream: W_E (``direct``), or what the first MLP makes of it with
    attention silenced (``effective``), which McDougall et al. (arXiv 2310.04625) use where W_E and W_U are tied."""
    if kind not in ("direct", "effective"):
        raise UnknownName("embedding", kind, ("direct", "effective"))
    table = _weight(model, "W_E")
    if kind == "direct":
        return table
    out = []
    for ids in torch.arange(len(table))[:, None].split(chunk):
        run = model.run(ids, ["blocks.0.hook_mlp_out"], {"blocks.0.hook_attn_out": torch.zeros_like}, logits=None)
        out.append(run.acts["blocks.0.hook_mlp_out"][:, 0])
    return torch.cat(out)


def positions(model: Model, count: int) -> Tensor | None:
    """The first learned positions ``[P, D]`` of native models and GPT-2, None where there are none or they are not known."""
    if isinstance(model, NativeModel):
        return None if model.net.W_pos is None else model.net.W_pos.detach()[:count]
    table = submodule(model.model, "transformer.wpe") if isinstance(model, HFModel) else None
    return table.weight.detach()[:count] if isinstance(table, nn.Embedding) else None


def grouped(values: Tensor, groups: int, per: str) -> Tensor:
    """``[..., H]`` as ``[..., G]``: the mean (``kv``) or largest (``kv-max``) within each group; unchanged for ``query``."""
    if per not in PER:
        raise UnknownName("grouping of heads", per, PER)
    if per == "query":
        return values
    parts = values.unflatten(-1, (groups, -1))
    return parts.mean(-1) if per == "kv" else parts.amax(-1)


@dataclass(frozen=True)
class Fold:
    """The linear part of a norm: ``scale`` ``[D]``, whether it takes the mean away, and what it adds."""

    scale: Tensor
    centred: bool
    shift: Tensor

    def linear(self, x: Tensor) -> Tensor:
        """x ``[..., D]`` through the norm, but for the division and the shift."""
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x * self.scale

    def into(self, weight: Tensor) -> Tensor:
        """``[..., D, E]`` that reads the normed vector, as one that reads the vector itself."""
        weight = weight * self.scale[:, None]
        return weight - weight.mean(-2, keepdim=True) if self.centred else weight


@torch.no_grad()
def folding(norm: nn.Module | None, width: int) -> Fold:
    """The linear part of a norm of any make, found by asking it.

    A vector of mean 0 and mean square 1 passes the division unchanged: norm(x) = w x + b and norm(-x) = -w x + b. A norm that
    takes the mean away gives b for constant vectors.
    """
    if norm is None:
        return Fold(torch.ones(width), False, torch.zeros(width))
    like = next(iter(norm.parameters()), torch.zeros(()))
    signs = torch.ones(width, dtype=like.dtype, device=like.device)
    signs[1::2] = -1
    if width % 2:
        signs[-1] = 0
    x = signs / signs.square().mean().sqrt()
    x = torch.stack([x, x.roll(1)])
    up, down = norm(x[:, None])[:, 0], norm(-x[:, None])[:, 0]
    slope = (up - down) / 2 / torch.where(x == 0, 1.0, x)
    scale = torch.where(x[0] == 0, slope[1], slope[0])
    shift = (up[0] + down[0]) / 2
    one = norm(torch.ones_like(x[:1, None]))[0, 0]
    centred = bool(((one - shift).abs() <= 1e-3 * scale.abs() + 1e-6).all()) and bool(scale.any())
    return Fold(scale, centred, shift)


def _weight(model: Model, name: str) -> Tensor:
    if not isinstance(model, NativeModel | HFModel):
        raise Refused(f"{name} is known for native and Hugging Face models; got a {type(model).__name__}")
    return model.weight(name).detach()


def _native(model: NativeModel, layer: int) -> HeadWeights:
    if not 0 <= layer < model.shape.layers:
        raise WorkbenchError(f"{model.name} has layers 0 to {model.shape.layers - 1}; got {layer}")
    blocks: Any = model.net.blocks
    block = blocks[layer]
    parts = [getattr(block.attn, f"W_{name}") for name in "QKVO"]
    absent = [f"W_{name}" for name, weight in zip("QKVO", parts, strict=True) if weight is None]
    if absent:
        raise Refused(f"{model.name}: mixer {model.net.config.mixer!r} has no {', '.join(absent)}")
    q, k, v, o = (weight.detach() for weight in parts)
    fold = folding(block.ln1, model.shape.width)
    return HeadWeights(fold.into(q), fold.into(k), fold.into(v), o)


def _hugging_face(model: HFModel, layer: int) -> HeadWeights:
    place = _place(model, layer)
    wiring, module = place.wiring, place.layer.module
    what = f"{model.family}, layer {layer} ({type(module).__name__})"
    if wiring is None or not wiring.out:
        raise Refused(f"{what}: where its projections lie is not known")
    if wiring.fused and submodule(place.block, wiring.fused) is not None:
        parts = split_heads(wiring, _matrix(place.block, wiring.fused), place.heads, place.kv_heads, place.width)
        q, k, v = (parts[name].transpose(0, 1) for name in "qkv")
    elif all(submodule(place.block, path) is not None for path in (wiring.q, wiring.k, wiring.v)):
        sizes = (place.heads, place.kv_heads, place.kv_heads)
        q, k, v = (
            _matrix(place.block, path).unflatten(1, (count, -1)).transpose(0, 1)
            for path, count in zip((wiring.q, wiring.k, wiring.v), sizes, strict=True)
        )
    else:
        raise Refused(f"{what}: its queries, keys and values are no plain projections of the stream")
    before = None
    if not wiring.end:
        before = next((n for name in _BEFORE if (n := getattr(place.block, name, None)) is not None), None)
    fold = folding(before, q.shape[1])
    q, k, v = fold.into(q), fold.into(k), fold.into(v)
    q, k = (_rescaled(x, getattr(module, f"{name}_norm", None)) for name, x in (("q", q), ("k", k)))
    o = model.weight("W_O", layer).detach()
    if wiring.attn_out and wiring.attn_out != wiring.out:
        after = folding(submodule(place.block, wiring.attn_out), o.shape[-1])
        o = after.linear(o)
    return HeadWeights(q, k, v, o)


def _place(model: HFModel, layer: int) -> Place:
    found = places(model.model, attention_layers(model.model))
    if any(place.layer.stack for place in found):
        raise Refused(f"{model.family} has several stacks of layers; circuits of weights are for models of one")
    for place in found:
        if place.layer.key == layer:
            return place
    raise UnknownName("attention layer", layer, [place.layer.key for place in found])


def _matrix(block: nn.Module, path: str) -> Tensor:
    """The weight of a projection as ``[inputs, outputs]``."""
    module: Any = submodule(block, path)
    weight: Tensor = module.weight.detach()
    return weight if type(module).__name__ == "Conv1D" else weight.T


def _rescaled(weight: Tensor, norm: Any) -> Tensor:
    """``[H, D, E]`` with the scales of a norm on queries or keys, per head or over all heads."""
    scale = getattr(norm, "weight", None)
    if scale is None or scale.numel() not in (weight.shape[-1], weight.shape[0] * weight.shape[-1]):
        return weight
    linear = folding(norm, scale.numel()).scale
    return weight * (linear if linear.numel() == weight.shape[-1] else linear.view(len(weight), 1, -1))
