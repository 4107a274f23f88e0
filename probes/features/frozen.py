"""A model on one prompt with attention and norms taken as they are: linear in its residual stream, but for the MLPs.

With the attention map A and the size s of each norm frozen, a norm is x -> linear(x) / s + shift and attention is

    attn_out[p] = sum_h sum_s A[h, p, s] (linear(x[s]) / s[s]) W_V[h] W_O[h] + constant

(Ameisen et al. 2025, "Circuit Tracing", local replacement model). Nothing is assumed: ``frozen_model`` compares every piece with
what the model computed, and refuses models for which the sum does not come out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from workbench.captures import capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.families import submodule
from workbench.models.hf import HFModel
from workbench.models.layers import attention_layers
from workbench.models.native import NativeModel
from workbench.models.protocol import Model, Tokens
from workbench.models.taps import Globals, places
from workbench.probes.heads.weights import Fold, folding, head_weights
from workbench.run import Run
from workbench.sites import Site

_BEFORE = ("input_layernorm", "ln_1", "self_attn_layer_norm", "norm_1", "norm1")
_KEYS = 128
"""Keys of a causal map that are multiplied at a time: queries before them are left out."""
_PATTERN_LIMIT = 2**31
"""Bytes of all attention maps of a prompt above which it is refused."""


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm with given sizes: ``linear(x) / size + shift``. ``size`` ``[T]``, ``module`` is the model's own."""

    fold: Fold
    size: Tensor
    module: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        """x ``[..., T, D]`` through the norm, with its shift."""
        return self.fold.linear(x) / self.size[:, None] + self.fold.shift

    def back(self, grad: Tensor, size: Tensor) -> Tensor:
        """Gradient ``[..., D]`` at the output as one at the input; ``size`` broadcasts against ``[..., 1]``."""
        grad = grad * self.fold.scale / size
        return grad - grad.mean(-1, keepdim=True) if self.fold.centred else grad


@dataclass(frozen=True, eq=False)
class FrozenAttention:
    """``pattern [H, T, T]`` (what multiplies the values), ``v [G, D, E]`` and ``o [H, E, D]`` with the norm's linear part in v,
    the norm before it, and ``constant [T, D]``: what biases write."""

    pattern: Tensor
    v: Tensor
    o: Tensor
    norm: FrozenNorm
    constant: Tensor
    causal: bool

    def back(self, grad: Tensor) -> Tensor:
        """Gradient ``[P, N, D]`` at the output of the first P positions as one at the stream before the norm."""
        p, n, d = grad.shape
        flat, out = grad.reshape(p * n, d), torch.zeros_like(grad)
        group = len(self.o) // len(self.v)
        for g, values in enumerate(self.v):
            summed = grad.new_zeros(p, n * values.shape[1])
            for h in range(g * group, (g + 1) * group):
                z = (flat @ self.o[h].T).view(p, -1)
                for lo in range(0, p, _KEYS):
                    first = lo if self.causal else 0
                    summed[lo : lo + _KEYS] += self.pattern[h, first:p, lo : min(lo + _KEYS, p)].T @ z[first:]
            out += (summed.view(p * n, -1) @ values.T).view(p, n, d)
        return out / self.norm.size[:p, None, None]

    def back_from(self, grad: Tensor, positions: Tensor, reach: int) -> Tensor:
        """The same of gradients ``[N, D]`` at one position each: ``[P, N, D]`` with P = ``reach``."""
        group = len(self.o) // len(self.v)
        z = torch.einsum("nd,hed->hne", grad, self.o)
        x = torch.einsum("hne,hde->nhd", z, self.v.repeat_interleave(group, 0))
        seen = self.pattern[:, positions, :reach] / self.norm.size[:reach]
        return torch.einsum("hnp,nhd->pnd", seen, x)


@dataclass(frozen=True, eq=False)
class FrozenMLP:
    """What the MLP of a layer reads and writes: the ``norm`` before it, the stream ``mid [T, D]``, ``written [T, D]``."""

    norm: FrozenNorm
    mid: Tensor
    written: Tensor


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """``embedded [T, D]``: the stream before the first layer. ``mlps[l]`` is None in layers without MLP. ``unembed [D, V]``;
    ``logits [T, V]`` are the model's own, ``offset [V]`` what its head adds. ``dtype`` is what the model computes in."""

    model: Model
    tokens: Tokens
    embedded: Tensor
    attention: tuple[FrozenAttention, ...]
    mlps: tuple[FrozenMLP | None, ...]
    final: FrozenNorm
    unembed: Tensor
    offset: Tensor
    logits: Tensor
    dtype: torch.dtype
    provenance: Any

    @property
    def layers(self) -> int:
        return len(self.attention)

    @property
    def length(self) -> int:
        return len(self.embedded)

    @property
    def causal(self) -> bool:
        return all(layer.causal for layer in self.attention)

    @property
    def labels(self) -> tuple[str, ...]:
        """The text of each token, or its number."""
        if self.tokens.labels:
            return self.tokens.labels[0]
        return tuple(str(i) for i in self.tokens.ids[0].tolist())

    def token(self, token: int) -> str:
        """The text of a token of the vocabulary, or its number."""
        tokenizer = self.model.tokenizer
        return str(token) if tokenizer is None else str(tokenizer.convert_ids_to_tokens([token])[0])


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference up to which a sum counts as the model's own: rounding, also of norms that work in float32."""
    return min(0.1, max(1e-5, 4096 * torch.finfo(dtype).eps))


@torch.no_grad()
def frozen_model(model: Model, prompt: Any) -> FrozenModel:
    """Run one prompt (text, token ids ``[T]``, or ``Tokens`` of one text) and keep what freezing takes.

    Refused: several texts, padding, models whose blocks are not ``x + attention(norm(x))``, then ``x + mlp(norm(x))``, and
    attention that is no map times values; the message says which piece does not come out.
    """
    if not isinstance(model, NativeModel | HFModel):
        raise Refused(f"attention can be frozen in native and Hugging Face models; got a {type(model).__name__}")
    if not model.shape.causal and not isinstance(model, NativeModel):
        raise Refused(f"{model.name} does not predict next tokens")
    before, between, last = _norms(model)
    layers = range(model.shape.layers)
    with_mlp = [layer for layer in layers if between[layer] is not None]
    reads = [Site(kind, layer) for kind in ("resid_pre", "v", "z", "attn_out") for layer in layers]
    reads += [Site(kind, layer) for kind in ("resid_mid", "mlp_out") for layer in with_mlp]
    reads += [Site("resid_post", layers[-1]), Site("final_norm")]
    try:
        run = model.run(prompt, read=reads, maps=capture())
    except UnknownName as error:
        raise Refused(f"{model.name} cannot be frozen: {error}") from None
    if len(run.tokens.ids) != 1 or not bool(run.tokens.mask.all()) or not run.tokens.ids.shape[1]:
        raise WorkbenchError(
            f"an attribution graph is of one text without padding; got ids {list(run.tokens.ids.shape)}"
        )
    if run.logits is None or run.logits.ndim != 3:
        raise Refused(f"{model.name} has no logits of tokens")
    dtype = torch.promote_types(run.logits.dtype, torch.float32)
    check = _Check(model.name, tolerance(run.logits.dtype))

    def at(kind: str, layer: int | None = None) -> Tensor:
        return run.acts[Site(kind, layer)][0].to(dtype)

    size = sum(run.maps[layer].shape[1] * run.maps[layer].shape[2] ** 2 for layer in layers) * (dtype.itemsize)
    if size > _PATTERN_LIMIT:
        raise Refused(
            f"the attention maps of {run.tokens.ids.shape[1]:,} tokens take {size / 2**30:.1f} GiB, the limit is "
            f"{_PATTERN_LIMIT / 2**30:.0f} GiB; give a shorter prompt"
        )
    attention: list[FrozenAttention] = []
    mlps: list[FrozenMLP | None] = []
    for layer in layers:
        x = at("resid_pre", layer)
        attention.append(_attention(model, run, layer, _frozen(before[layer], x), x, at, check))
        stream, inner = x + at("attn_out", layer), between[layer]
        if inner is None:
            mlps.append(None)
        else:
            mid = at("resid_mid", layer)
            check(mid, stream, f"layer {layer}: the stream after attention")
            mlps.append(FrozenMLP(_frozen(inner, mid), mid, at("mlp_out", layer)))
            stream = mid + at("mlp_out", layer)
        after = at("resid_pre", layer + 1) if layer + 1 < len(layers) else at("resid_post", layer)
        check(after, stream, f"layer {layer}: the stream after the block")
    end = at("resid_post", layers[-1])
    final = _frozen(last, end)
    check(at("final_norm"), final(end), "the last norm")
    unembed = model.weight("W_U").detach().to(dtype)
    bias = getattr(model.model.get_output_embeddings(), "bias", None) if isinstance(model, HFModel) else None
    offset = unembed.new_zeros(unembed.shape[1]) if bias is None else bias.detach().to(dtype)
    logits = run.logits[0].to(dtype)
    check(logits, at("final_norm") @ unembed + offset, "the logits")
    return FrozenModel(
        model, run.tokens, at("resid_pre", 0), tuple(attention), tuple(mlps), final, unembed, offset, logits, run.logits.dtype,
        run.provenance,
    )  # fmt: skip


@dataclass(frozen=True)
class _Check:
    name: str
    tolerance: float

    def __call__(self, found: Tensor, computed: Tensor, what: str) -> None:
        worst, size = float((found - computed).abs().max()), float(found.abs().max())
        if not worst <= self.tolerance * max(size, 1e-30):
            raise Refused(
                f"{self.name} cannot be frozen: {what} is not what its parts add up to (differs by {worst:.2g} of {size:.2g}); "
                "attribution graphs are for blocks x + attention(norm(x)), x + mlp(norm(x))"
            )


def _attention(
    model: Model, run: Run, layer: int, norm: FrozenNorm, x: Tensor, at: Any, check: _Check
) -> FrozenAttention:
    weights = head_weights(model, layer)
    v, o = weights.v.to(x), weights.o.to(x)
    pattern = run.maps[layer].dense()[0].to(x)
    values, z, out = at("v", layer), at("z", layer), at("attn_out", layer)
    linear = torch.einsum("td,gde->tge", x / norm.size[:, None], v)
    # What is left must be a bias: the same at every position.
    bias = values - linear
    check(values, linear + bias.mean(0), f"layer {layer}: values as a projection of the stream")
    group = len(o) // len(v)
    check(z, _mixed(pattern, values, group), f"layer {layer}: the map times the values")
    mixed = torch.einsum("the,hed->td", _mixed(pattern, linear, group), o)
    written = torch.einsum("the,hed->td", z, o)
    added = (out - written).mean(0)
    check(out, written + added, f"layer {layer}: attention's output as a projection of z")
    constant = torch.einsum("the,hed->td", _mixed(pattern, bias.mean(0).expand_as(values), group), o) + added
    check(out, mixed + constant, f"layer {layer}: attention's output")
    causal = not bool(pattern.triu(1).any())
    return FrozenAttention(pattern, v, o, norm, constant, causal)


def _mixed(pattern: Tensor, values: Tensor, group: int) -> Tensor:
    """``[H, T, T]`` times ``[T, G, E]`` as ``[T, H, E]``."""
    return torch.einsum("hqk,khe->qhe", pattern, values.repeat_interleave(group, 1))


def _frozen(norm: nn.Module, x: Tensor) -> FrozenNorm:
    like = next(iter(norm.parameters()), x)
    fold = folding(norm, x.shape[-1])
    fold = Fold(fold.scale.to(x), fold.centred, fold.shift.to(x))
    plain = fold.linear(x)
    tiny = torch.finfo(x.dtype).tiny
    size = plain.norm(dim=-1) / (norm(x[None].to(like.dtype))[0].to(x) - fold.shift).norm(dim=-1).clamp(min=tiny)
    return FrozenNorm(fold, size.clamp(min=tiny), norm)


def _norms(model: NativeModel | HFModel) -> tuple[list[nn.Module], list[nn.Module | None], nn.Module]:
    """The norm before attention and before the MLP (None where there is no MLP) of each layer, and the last one."""
    if isinstance(model, NativeModel):
        if model.net.config.grid is not None:
            raise Refused(f"{model.name} reads images; attribution graphs are of tokens")
        blocks: Any = model.net.blocks
        return [b.ln1 for b in blocks], [None if b.mlp is None else b.ln2 for b in blocks], model.net.ln_final
    layers = attention_layers(model.model)
    before: list[nn.Module] = []
    between: list[nn.Module | None] = []
    for place in places(model.model, layers):
        name = f"{model.family}, layer {place.layer.key} ({type(place.block).__name__})"
        if place.wiring is None or place.wiring.end or place.layer.stack:
            raise Refused(f"{name} cannot be frozen: where its norms and MLP lie is not known")
        first = next((n for key in _BEFORE if (n := getattr(place.block, key, None)) is not None), None)
        second = submodule(place.block, place.wiring.mid)
        if first is None or second is None or "mlp_out" not in place.kinds:
            raise Refused(f"{name} cannot be frozen: its norms before attention and MLP are not known")
        before.append(first)
        between.append(second)
    final = Globals(model.model, layers).modules.get(("final_norm", ""))
    if final is None:
        raise Refused(f"{model.family}: the norm before its W_U is not known")
    return before, between, final
