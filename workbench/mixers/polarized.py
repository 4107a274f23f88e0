"""Polarized self-attention: a gate over channels that sums over places last, and a gate over places that keeps all of
them.

    channels   a = sigmoid(LayerNorm(W_z (W_v x) softmax over tokens(w_q x)))
    places     a = sigmoid(softmax over channels(mean over tokens of W_q x) (W_v x))

Side by side both scale the same x and add up; in sequence the second reads what the first leaves. Features are
``[B, H, N, E]`` with C = H*E channels; ``x`` is what the gates are made of and ``v`` what they scale. Source: Liu et
al., arXiv:2107.00782.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.attention_map import AttentionMap
from workbench.catalogue import Parameter, Recipe, example_tensors
from workbench.mixers.channels import check_values, planes, token_gate, tokens
from workbench.mixers.gating import (
    SOURCE,
    UNUSED,
    channels_last,
    gate_parts,
    gate_record,
    head_values,
    plain_example,
    small,
)
from workbench.mixers.scored import check_tensor
from workbench.patterns.diagonal import DiagonalMap


def polarized_channel_attention(
    x: Tensor, v: Tensor, value: Tensor, query: Tensor, mix: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, DiagonalMap]:
    """y_c = a_c v_c, a = sigmoid(LayerNorm(W_z (W_v x) softmax over tokens(w_q x))) (Liu et al., arXiv:2107.00782).

    x, v ``[B, G, C/G, N]``; ``value`` ``[C/2, C]``, ``query`` ``[C]``, ``mix`` ``[C, C/2]``; ``weight``, ``bias``
    ``[C]`` of the layer norm. Rows and columns of the map are channels.
    """
    check_tensor("v", v, ("B", "G", "C", "N"))
    check_tensor("x", x, (*v.shape[:3], "N"))
    gate = _channels(x.flatten(1, 2), value, query, mix, weight, bias).unflatten(1, v.shape[1:3])
    return gate[..., None].to(v.dtype) * v, DiagonalMap(gate, domain="channel")


def polarized_spatial_attention(
    x: Tensor, v: Tensor, spatial_value: Tensor, spatial_query: Tensor
) -> tuple[Tensor, DiagonalMap]:
    """y_i = a_i v_i, a = sigmoid(softmax over channels(mean over tokens of W_q x) (W_v x)) (Liu et al.,
    arXiv:2107.00782).

    x, v ``[B, H, N, E]``; ``spatial_value`` and ``spatial_query`` ``[C/2, C]``. One gate for all channels.
    """
    b, h, n, _ = check_values(v, x=x)
    gate = _places(planes(x), spatial_value, spatial_query)
    return gate[:, None, :, None].to(v.dtype) * v, DiagonalMap(gate[:, None].expand(b, h, n), domain="token")


def polarized_parallel_attention(
    x: Tensor,
    v: Tensor,
    value: Tensor,
    query: Tensor,
    mix: Tensor,
    weight: Tensor,
    bias: Tensor,
    spatial_value: Tensor,
    spatial_query: Tensor,
) -> tuple[Tensor, AttentionMap]:
    """y = (a_c + a_i) v: the channel gate and the spatial gate of the same x, side by side. Arguments as in those two,
    x and v ``[B, H, N, E]``."""
    _, h, _, _ = check_values(v, x=x)
    image = planes(x)
    across = _channels(image, value, query, mix, weight, bias)
    gate = across[..., None] + _places(image, spatial_value, spatial_query)[:, None]
    return token_gate(v, tokens(gate, h))


def polarized_sequential_attention(
    x: Tensor,
    v: Tensor,
    value: Tensor,
    query: Tensor,
    mix: Tensor,
    weight: Tensor,
    bias: Tensor,
    spatial_value: Tensor,
    spatial_query: Tensor,
) -> tuple[Tensor, AttentionMap]:
    """y = a_i(a_c x) a_c v: the channel gate first, the spatial gate of what it leaves. Arguments as in those two, x
    and v ``[B, H, N, E]``."""
    _, h, _, _ = check_values(v, x=x)
    image = planes(x)
    across = _channels(image, value, query, mix, weight, bias)[..., None]
    gate = across * _places(across * image, spatial_value, spatial_query)[:, None]
    return token_gate(v, tokens(gate, h))


def _channels(image: Tensor, value: Tensor, query: Tensor, mix: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The polarized channel gate ``[B, C]`` of ``[B, C, N]``."""
    c = image.shape[1]
    check_tensor("value", value, ("half", c))
    check_tensor("query", query, (c,))
    check_tensor("mix", mix, (c, value.shape[0]))
    check_tensor("weight", weight, (c,))
    check_tensor("bias", bias, (c,))
    work = image.dtype
    places = torch.einsum("c,bcn->bn", query.to(work), image).softmax(1)
    summary = torch.einsum("oc,bcn,bn->bo", value.to(work), image, places) @ mix.to(work).T
    return torch.sigmoid(functional.layer_norm(summary, (c,), weight.to(work), bias.to(work)))


def _places(image: Tensor, value: Tensor, query: Tensor) -> Tensor:
    """The polarized spatial gate ``[B, N]`` of ``[B, C, N]``."""
    check_tensor("spatial_value", value, ("half", image.shape[1]))
    check_tensor("spatial_query", query, tuple(value.shape))
    work = image.dtype
    chosen = (image.mean(2) @ query.to(work).T).softmax(1)
    return torch.sigmoid(torch.einsum("bo,oc,bcn->bn", chosen, value.to(work), image))


_CHANNELS = {"value": (3, 6), "query": (6,), "mix": (6, 3), "weight": (6,), "bias": (6,)}
_PLACES = {"spatial_value": (3, 6), "spatial_query": (3, 6)}


def _channel_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    return example_tensors(seed, dtype, x=(2, 2, 3, count), v=(2, 2, 3, count), **_CHANNELS)


_CHANNEL_PARAMETERS = {
    "value_weights": Parameter("HE8", small), "query": Parameter("HE", small), "mix": Parameter("HE8", small),
    "weight": Parameter("HE", torch.ones), "bias": Parameter("HE"),
}  # fmt: skip
_PLACE_PARAMETERS = {"spatial_value": Parameter("HE8", small), "spatial_query": Parameter("HE8", small)}


def _polarized_parts(parts: dict[str, Any]) -> dict[str, Any]:
    found = gate_parts("value_weights", "query", "mix", "weight", "bias", "spatial_value", "spatial_query")(parts)
    found["value"] = found.pop("value_weights")
    return found


def _channel_parts(parts: dict[str, Any]) -> dict[str, Any]:
    v = head_values(parts).transpose(2, 3)
    names = ("value_weights", "query", "mix", "weight", "bias")
    found = gate_parts(*names)({**parts, "source": v})
    found["value"] = found.pop("value_weights")
    return {**found, "x": v, "v": v}


_PSA = "#123 Polarized Self-Attention: Towards High-quality Pixel-wise Regression (2021)"


VARIANTS = (
    gate_record(
        "polarized-channel-attention", _PSA, polarized_channel_attention, _channel_example,
        note="Layer norm before the sigmoid as in public re-implementations.",
        recipe=Recipe(
            parameters=_CHANNEL_PARAMETERS, prepare=_channel_parts, finish=channels_last, ignores=UNUSED
        ),
    ),
    gate_record(
        "polarized-spatial-attention", _PSA, polarized_spatial_attention, plain_example(2, 3, **_PLACES),
        recipe=Recipe(
            learned=SOURCE, parameters=_PLACE_PARAMETERS, prepare=gate_parts("spatial_value", "spatial_query"),
            ignores=UNUSED,
        ),
    ),
    gate_record(
        "polarized-parallel-attention", _PSA, polarized_parallel_attention,
        plain_example(6, 1, **_CHANNELS, **_PLACES),
        recipe=Recipe(
            learned=SOURCE, parameters={**_CHANNEL_PARAMETERS, **_PLACE_PARAMETERS}, prepare=_polarized_parts,
            ignores=UNUSED,
        ),
    ),
    gate_record(
        "polarized-sequential-attention", _PSA, polarized_sequential_attention,
        plain_example(6, 1, **_CHANNELS, **_PLACES),
        recipe=Recipe(
            learned=SOURCE, parameters={**_CHANNEL_PARAMETERS, **_PLACE_PARAMETERS}, prepare=_polarized_parts,
            ignores=UNUSED,
        ),
    ),
)  # fmt: skip
