"""The weights of a model's attention layer as a Lorsa has them: a start for training, and the layer itself.

Softcap, sink logits, scale and window come from the map that the model's own run gives. Rotary angles come from the model's
tables, in the order of its dimensions that reproduces that map; a layer whose map is not reproduced is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from workbench.captures import capture
from workbench.coders.lorsa import Lorsa
from workbench.coders.query_key import QueryKey, QueryKeyWeights
from workbench.errors import Refused, UnknownName
from workbench.maps import GatedMap
from workbench.models.families import split_heads, submodule
from workbench.models.hf import HFModel
from workbench.models.layers import attention_layers
from workbench.models.native import NativeModel
from workbench.models.protocol import Model
from workbench.models.taps import Place, places
from workbench.patterns.softmax import SoftmaxMap
from workbench.sites import Site

_TOKENS = 40
_ERROR = 2e-3


@dataclass(frozen=True)
class LayerWeights:
    """One attention layer: queries and keys, ``v [H, D, E]`` and ``b_v [H, E]`` (those of grouped heads repeated),
    ``o [H, E, D]`` and ``b_o [D]``; biases are None where there are none."""

    query_key: QueryKeyWeights
    v: Tensor
    b_v: Tensor | None
    o: Tensor
    b_o: Tensor | None
    gated: bool = False
    """Whether head outputs pass a gate, which rank-1 heads of the layer's input do not have."""


def sites_of(layer: int) -> tuple[str, str]:
    """What a Lorsa of this layer reads and writes."""
    return str(Site("attn_norm", layer)), str(Site("attn_out", layer))


@torch.no_grad()
def layer_weights(model: Model, layer: int) -> LayerWeights:
    """The weights of a layer, checked against its own map on random tokens; refuses what does not reproduce it."""
    if not isinstance(model, NativeModel | HFModel):
        raise Refused(
            f"a Lorsa starts from a native or Hugging Face model; got a {type(model).__name__}: load the model inside it"
        )
    vocab = model.shape.vocab
    if vocab is None or (isinstance(model, NativeModel) and model.net.config.grid is not None):
        raise Refused(f"{model.name} does not read tokens")
    if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < model.shape.layers:
        raise UnknownName("attention layer", layer, range(model.shape.layers))
    length = _TOKENS if model.shape.context is None else min(_TOKENS, model.shape.context)
    ids = torch.randint(vocab, (1, length), generator=torch.Generator().manual_seed(0))
    read, _ = sites_of(layer)
    run = model.run(ids, read=[read], maps=capture(layers=[layer]), logits=None)
    found = run.maps[layer]
    gated = isinstance(found, GatedMap)
    raw = found.raw if isinstance(found, GatedMap) else found
    if not isinstance(raw, SoftmaxMap) or raw.scores.bias is not None:
        what = "a bias on its scores" if isinstance(raw, SoftmaxMap) else f"the map {type(raw).__name__}"
        raise Refused(
            f"layer {layer} of {model.name} has {what}; a Lorsa has softmax patterns of queries and keys alone"
        )
    base = _native(model, layer) if isinstance(model, NativeModel) else _hugging_face(model, layer)
    scores = raw.scores
    plain = replace(
        base.query_key, scale=scores.scale, softcap=scores.softcap, sink=scores.sink, window=scores.mask.window,
        causal=scores.mask.causal,
    )  # fmt: skip
    truth, x = raw.rows(0, length), run.acts[read].to(plain.q.dtype)
    errors = {}
    for rates, adjacent, scale in _rotaries(model, plain):
        candidate = replace(plain, rates=rates, adjacent=adjacent, rotary_scale=scale)
        made = QueryKey(candidate).attention(x).rows(0, length)
        errors[adjacent, scale] = error = float((made - truth).abs().max())
        if error < _ERROR:
            return replace(base, query_key=candidate, gated=gated)
    raise Refused(
        f"the patterns of layer {layer} of {model.name} are not reproduced by its projections and rotary positions (largest "
        f"error {min(errors.values()):.2g}); it does something to queries and keys that a Lorsa does not have"
    )


@torch.no_grad()
def started(model: Model, layer: int, features: int, k: int, seed: int) -> Lorsa:
    """See ``Lorsa.from_model``."""
    weights = layer_weights(model, layer)
    lorsa = Lorsa(weights.query_key, features, k, width_out=weights.o.shape[2], seed=seed)
    heads, width, each = weights.v.shape[0], weights.v.shape[2], features // weights.v.shape[0]
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(heads, width, -(-each // 2), generator=generator).to(weights.v)
    half /= half.norm(dim=1, keepdim=True)
    ways = torch.stack([half, -half], -1).flatten(2)[..., :each]  # [H, E, F / H]
    lorsa.W_V.copy_((weights.v @ ways).transpose(0, 1).flatten(1))
    if weights.b_v is not None:
        lorsa.b_V.copy_((weights.b_v[:, None] @ ways).flatten())
    lorsa.W_O.copy_((ways.transpose(1, 2) @ weights.o).flatten(0, 1))
    if weights.b_o is not None:
        lorsa.b_O.copy_(weights.b_o)
    lorsa.normalise()
    lorsa.about = about(model, layer, "from the model's heads")
    return lorsa


@torch.no_grad()
def exact(model: Model, layer: int) -> Lorsa:
    """See ``Lorsa.exact``."""
    weights = layer_weights(model, layer)
    if weights.gated:
        raise Refused(
            f"layer {layer} of {model.name} has an output gate; rank-1 heads cannot reproduce it, only learn to come near"
        )
    heads, width, inner = weights.v.shape
    values = weights.v.double()
    if weights.b_v is not None:
        values = torch.cat([values, weights.b_v.double()[:, None]], 1)
    left, size, right = torch.linalg.svd(values @ weights.o.double(), full_matrices=False)
    rank = min(inner, size.shape[1])
    reads = (left[..., :rank] * size[:, None, :rank]).to(weights.v)  # [H, D or D + 1, R]
    writes = right[:, :rank].to(weights.v)  # [H, R, D']
    reads, writes = torch.cat([reads, -reads], 2), torch.cat([writes, -writes], 1)
    features = heads * 2 * rank
    lorsa = Lorsa(weights.query_key, features, features, width_out=weights.o.shape[2])
    lorsa.W_V.copy_(reads[:, :width].transpose(0, 1).flatten(1))
    if weights.b_v is not None:
        lorsa.b_V.copy_(reads[:, width].flatten())
    lorsa.W_O.copy_(writes.flatten(0, 1))
    if weights.b_o is not None:
        lorsa.b_O.copy_(weights.b_o)
    lorsa.about = about(model, layer, "singular vectors of the model's heads")
    _check_output(model, layer, lorsa)
    return lorsa


def about(model: Model, layer: int, start: str) -> dict[str, Any]:
    read, write = sites_of(layer)
    revision = str(getattr(model, "revision", ""))
    return {"model": model.name, "revision": revision, "reads": [read], "writes": [write], "start": start}


def _check_output(model: Model, layer: int, lorsa: Lorsa) -> None:
    assert model.shape.vocab is not None
    length = _TOKENS if model.shape.context is None else min(_TOKENS, model.shape.context)
    ids = torch.randint(model.shape.vocab, (1, length), generator=torch.Generator().manual_seed(1))
    read, write = sites_of(layer)
    run = model.run(ids, read=[read, write], logits=None)
    wanted, x = run.acts[write].double(), run.acts[read].to(lorsa.W_V.dtype)
    # Heads may cancel, or write nothing on these tokens: then rounding is all there is.
    size = wanted.norm() + 1e-2 * lorsa.pre(x).double().norm() + 1e-6 * x.norm() * lorsa.W_V.norm()
    error = float((lorsa(x).double() - wanted).norm() / size.clamp(min=1e-30))
    if not error < _ERROR:
        raise Refused(
            f"rank-1 heads of layer {layer} of {model.name} do not give its output (relative error {error:.2g}): something "
            "follows its output matrix, such as a norm; Lorsa.from_model starts one to train"
        )


def _native(model: NativeModel, layer: int) -> LayerWeights:
    blocks: Any = model.net.blocks
    attention = blocks[layer].attn
    parts = {name: getattr(attention, f"W_{name}") for name in "QKVO"}
    absent = [f"W_{name}" for name, weight in parts.items() if weight is None]
    if absent:
        raise Refused(f"{model.name}: mixer {model.net.config.mixer!r} has no {', '.join(absent)}")
    heads = model.shape.heads

    def repeated(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.detach().repeat_interleave(heads // len(part), 0)

    q, k, v = (repeated(parts[name]) for name in "QKV")
    assert isinstance(q, Tensor)
    assert isinstance(k, Tensor)
    assert isinstance(v, Tensor)
    biases = {name: repeated(getattr(attention, f"b_{name}", None)) for name in "QKV"}
    query_key = QueryKeyWeights(q, k, biases["Q"], biases["K"])
    return LayerWeights(query_key, v, biases["V"], parts["O"].detach(), None)


def _hugging_face(model: HFModel, layer: int) -> LayerWeights:
    place = _place(model, layer)
    wiring, module = place.wiring, place.layer.module
    what = f"{model.family}, layer {layer} ({type(module).__name__})"
    if wiring is None or not wiring.out:
        raise Refused(f"{what}: where its projections lie is not known")
    heads, groups, width = place.heads, place.kv_heads, place.width
    if wiring.fused and submodule(place.block, wiring.fused) is not None:
        weight, bias = _linear(place.block, wiring.fused)
        split = split_heads(wiring, weight, heads, groups, width)
        added = None if bias is None else split_heads(wiring, bias[None], heads, groups, width)
        parts = {n: (split[n].transpose(0, 1), None if added is None else added[n][0]) for n in "qkv"}
    elif all(submodule(place.block, path) is not None for path in (wiring.q, wiring.k, wiring.v)):
        parts = {}
        for name, path, count in (("q", wiring.q, heads), ("k", wiring.k, groups), ("v", wiring.v, groups)):
            weight, bias = _linear(place.block, path)
            split_bias = None if bias is None else bias.unflatten(0, (count, -1))
            parts[name] = weight.unflatten(1, (count, -1)).transpose(0, 1), split_bias
    else:
        raise Refused(f"{what}: its queries, keys and values are no plain projections of the stream")
    repeated = {
        name: tuple(None if part is None else part.detach().repeat_interleave(heads // len(part), 0) for part in pair)
        for name, pair in parts.items()
    }
    (q, b_q), (k, b_k), (v, b_v) = (repeated[name] for name in "qkv")
    assert isinstance(q, Tensor)
    assert isinstance(k, Tensor)
    assert isinstance(v, Tensor)
    q_norm, eps = _norm_scale(module, "q_norm", width, what)
    k_norm, _ = _norm_scale(module, "k_norm", width, what)
    query_key = QueryKeyWeights(q, k, b_q, b_k, q_norm=q_norm, k_norm=k_norm, eps=eps)
    _, b_o = _linear(place.block, wiring.out)
    return LayerWeights(query_key, v, b_v, model.weight("W_O", layer).detach(), b_o)


def _place(model: HFModel, layer: int) -> Place:
    found = places(model.model, attention_layers(model.model))
    if any(place.layer.stack for place in found):
        raise Refused(f"{model.family} has several stacks of layers; a Lorsa is for models of one")
    for place in found:
        if place.layer.key == layer:
            return place
    raise UnknownName("attention layer", layer, [place.layer.key for place in found])


def _linear(block: nn.Module, path: str) -> tuple[Tensor, Tensor | None]:
    """Weight ``[inputs, outputs]`` and bias of a projection."""
    module: Any = submodule(block, path)
    weight: Tensor = module.weight.detach()
    bias: Tensor | None = None if getattr(module, "bias", None) is None else module.bias.detach()
    return (weight if type(module).__name__ == "Conv1D" else weight.T), bias


def _norm_scale(module: nn.Module, name: str, width: int, what: str) -> tuple[Tensor | None, float]:
    """Scales ``[E]`` of an RMS norm on queries or keys, however they are stored, and its epsilon."""
    norm: Any = getattr(module, name, None)
    if norm is None:
        return None, 1e-6
    weight = getattr(norm, "weight", None)
    if weight is None or weight.numel() != width:
        raise Refused(f"{what}: its {name} is no norm with one scale per dimension of a head")
    eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))
    return norm(torch.ones_like(weight)) * (1 + eps) ** 0.5, eps


def _rotaries(model: Model, weights: QueryKeyWeights) -> Iterator[tuple[Tensor | None, bool, float]]:
    """Angles per position ``[M]``, order of the dimensions, and factor: what the model may have, the likeliest first."""
    if isinstance(model, NativeModel):
        config = model.net.config
        if config.positions != "rotary":
            yield None, False, 1.0
            return
        half = config.head_width // 2
        yield config.theta ** (-torch.arange(half, dtype=torch.float64) / half), False, 1.0
        return
    assert isinstance(model, HFModel)
    tables = []
    for module in model.model.modules():
        for name, table in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and not name.startswith("original"):
                kind = name.removesuffix("inv_freq")
                tables.append((table.detach().double(), float(getattr(module, f"{kind}attention_scaling", 1.0))))
    for adjacent in (False, True):
        for table, scale in tables:
            if 2 * len(table) <= weights.q.shape[2]:
                yield table, adjacent, scale
    yield None, False, 1.0
