"""Time mixing of RWKV: a fading sum over the past, in which the token itself counts by a bonus of its own.

    RWKV-4   M_ij = exp(k_j - (i - 1 - j) exp(w)) / n_i for j < i,  M_ii = exp(u + k_i) / n_i,  rows sum to 1   per channel
    SpikeGPT the same times sigmoid(r_i)                                                                        per channel
    RWKV-6   M_ij = sum_r r_ir k_jr exp(-exp(w_{j+1,r}) - ... - exp(w_{i-1,r})) for j < i,  M_ii = sum_r r_ir u_r k_ir

All go chunk by chunk in linear time; keys of any size and any decay stay finite.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import Learned, Parameter, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.maps import GatedMap
from workbench.mixers.linear import causal_option, check_linear
from workbench.mixers.scored import check_tensor
from workbench.patterns.decays import channel_scan
from workbench.patterns.linear import ChannelDecayMap
from workbench.patterns.per_channel import PerChannelMap
from workbench.patterns.prefix import PrefixSoftmaxMap, prefix_softmax

FASTEST = 60.0
"""Logarithms of rates are cut here: exp(-exp(60)) is 0 in every type."""


def rwkv4_attention(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> tuple[Tensor, AttentionMap]:
    """RWKV-4's weighted mean of the past, in every channel for itself: k, v ``[B, H, N, E]``, decay w and bonus u ``[H, E]``.

    The past fades by exp(-exp(w)) per token. With E = 1 every channel is a head with a map of its own, ``[B, C, N, N]``; with
    E > 1 the map is a ``PerChannelMap``. The receptance that scales the result is left out, so that rows sum to 1. Source: Peng
    et al., arXiv:2305.13048.
    """
    out, found = _weighted_mean(k, v, decay, bonus)
    return _joined(out, v), _by_heads(found, v.shape[3])


def spikegpt_attention(
    k: Tensor, v: Tensor, receptance: Tensor, decay: Tensor, bonus: Tensor
) -> tuple[Tensor, AttentionMap]:
    """What SpikeGPT's token mixing sends into its spiking neurons: RWKV-4's mean times sigmoid(receptance).

    ``receptance`` ``[B, H, N, E]``; the rest as in ``rwkv4_attention``. The network projects the result and lets leaky
    integrate-and-fire neurons run over the tokens (``lif`` of ``mixers/spiking.py``); from there on nothing is linear in the
    values. Source: Zhu et al., arXiv:2302.13939.
    """
    mean, found = _weighted_mean(k, v, decay, bonus)
    check_tensor("receptance", receptance, tuple(v.shape))
    gate = torch.sigmoid(receptance.to(mean.dtype)).transpose(2, 3).flatten(1, 2)
    return _joined(mean * gate[..., None], v), _by_heads(GatedMap(found, gate), v.shape[3])


def rwkv6_attention(r: Tensor, k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> tuple[Tensor, ChannelDecayMap]:
    """RWKV-6: receptance r, k, decay w ``[B, H, N, R]``, v ``[B, H, N, E]``, bonus u ``[H, R]``.

    o_i = r_i^T (S_{i-1} + diag(u) k_i v_i^T), S_i = diag(exp(-exp(w_i))) S_{i-1} + k_i v_i^T; no scale. Source: Peng et al.,
    arXiv:2404.05892; norm and gate of the output come after.
    """
    check_tensor("r", r, ("B", "H", "N", "R"))
    check_linear(r, k, v, True)
    b, h, n, width = r.shape
    if k.shape[1] != h:
        raise WorkbenchError(f"k and v have the {h} heads of r; got {k.shape[1]}")
    check_tensor("decay", decay, (b, h, n, width))
    check_tensor("bonus", bonus, (h, width))
    work = torch.promote_types(working_dtype(r.dtype), v.dtype)
    r, k, log = r.to(work), k.to(work), -_rate(decay.to(work))
    own = (r * bonus.to(work)[:, None] * k).sum(-1)
    out = channel_scan(r, k, v.to(work), log, diagonal=own).to(v.dtype)
    return out, ChannelDecayMap(r, k, log, diagonal=own)


def _weighted_mean(k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor) -> tuple[Tensor, PrefixSoftmaxMap]:
    """The mean of every channel, ``[B, H E, N, 1]`` in the working type, and its map."""
    check_tensor("v", v, ("B", "H", "N", "E"))
    check_tensor("k", k, tuple(v.shape))
    for name, part in (("decay", decay), ("bonus", bonus)):
        check_tensor(name, part, (v.shape[1], v.shape[3]))
    work = torch.promote_types(working_dtype(k.dtype), v.dtype)
    scores = k.to(work).transpose(2, 3).flatten(1, 2)
    values = v.to(work).transpose(2, 3).flatten(1, 2)[..., None]
    rate, own = _rate(decay.to(work)).flatten(), bonus.to(work).flatten()
    out, _ = prefix_softmax(scores, values, rate, own)
    return out, PrefixSoftmaxMap(scores, rate, own)


def _rate(decay: Tensor) -> Tensor:
    """exp(decay), cut where nothing of the past is left anyway, so that it and its gradient stay finite."""
    return decay.clamp(max=FASTEST).exp()


def _joined(out: Tensor, v: Tensor) -> Tensor:
    return out[..., 0].unflatten(1, (v.shape[1], -1)).transpose(2, 3).to(v.dtype)


def _by_heads(found: AttentionMap, width: int) -> AttentionMap:
    return found if width == 1 else PerChannelMap(found, width)


def _per_head(made: dict[str, Any]) -> dict[str, Any]:
    """Keys and values with a head per query head, and the learned arguments that both versions have."""
    causal_option(made["mask"])
    group = made["bonus"].shape[0] // made["k"].shape[1]
    k, v = (made[name].repeat_interleave(group, 1) for name in ("k", "v"))
    return {"k": k, "v": v, "decay": made["decay"], "bonus": made["bonus"]}


def _spikegpt(made: dict[str, Any]) -> dict[str, Any]:
    return _per_head(made) | {"receptance": made["q"]}


def _rwkv6(made: dict[str, Any]) -> dict[str, Any]:
    return _per_head(made) | {"r": made["q"]}


def _speeds(shape: tuple[int, ...]) -> Tensor:
    """log rates from -5 to 3 over the channels, as RWKV-4 starts in its first layer."""
    channels = torch.Size(shape).numel()
    return (-5 + 8 * torch.linspace(0, 1, channels) ** 0.7).view(shape)


def _first(shape: tuple[int, ...]) -> Tensor:
    """log 0.3 and half a step around it, from channel to channel, as RWKV-4 starts."""
    at = torch.arange(torch.Size(shape).numel())
    return (torch.tensor(0.3).log() + 0.5 * ((at + 1) % 3 - 1)).view(shape)


def _channels(seed: int, tokens: int, dtype: torch.dtype, *more: str) -> dict[str, Any]:
    shapes = {**dict.fromkeys(("k", "v", *more), (2, 6, tokens, 1)), "decay": (6, 1), "bonus": (6, 1)}
    return example_tensors(seed, dtype, **shapes)


def _rwkv4_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return _channels(seed, tokens, dtype)


def _spikegpt_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return _channels(seed, tokens, dtype, "receptance")


def _rwkv6_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    wide, narrow = (2, 3, tokens, 6), (2, 3, tokens, 5)
    return example_tensors(seed, dtype, r=wide, k=wide, decay=wide, v=narrow, bonus=(3, 6))


VARIANTS = (
    Variant(
        name="rwkv-4",
        paper="RWKV: Reinventing RNNs for the Transformer Era (2023)",
        family="linear",
        priority="B",
        operator=rwkv4_attention,
        example=_rwkv4_example,
        causal=True,
        reference="transformers rwkv_linear_attention_cpu; fla ops.rwkv4",
        note="Without the receptance, which scales what comes out, and without the mixing of neighbouring tokens before.",
        recipe=Recipe(
            parameters={"decay": Parameter("HE", _speeds), "bonus": Parameter("HE", _first)},
            prepare=_per_head,
            ignores=("q",),
        ),
    ),
    Variant(
        name="spikegpt",
        paper="#134 SpikeGPT: Generative Pre-trained Language Model with Spiking Neural Networks (2023)",
        family="linear",
        priority="B",
        operator=spikegpt_attention,
        example=_spikegpt_example,
        causal=True,
        reference="ridgerchu/SpikeGPT src/model.py",
        note="The map is that before the output projection and the spiking neurons, which a native model does not have either.",
        recipe=Recipe(
            parameters={"decay": Parameter("HE", _speeds), "bonus": Parameter("HE", _first)},
            prepare=_spikegpt,
        ),
    ),
    Variant(
        name="rwkv-6",
        paper="Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence (2024)",
        family="linear",
        priority="B",
        operator=rwkv6_attention,
        example=_rwkv6_example,
        causal=True,
        reference="fla ops.rwkv6 naive_recurrent_rwkv6 with scale=1",
        note="Without the mixing of neighbouring tokens before; a native model makes the decay by a full projection.",
        recipe=Recipe(
            learned={"decay": Learned("HE", bias=-2.0)},
            parameters={"bonus": Parameter("HE", torch.ones)},
            prepare=_rwkv6,
        ),
    ),
)
