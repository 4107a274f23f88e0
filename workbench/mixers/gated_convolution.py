"""Gated convolutions of images: a depthwise convolution of the values, times a gate.

    y_c(i) = g_c(i) sum_j K_c(i - j) v_c(j)

The map of a channel is diag(gate) times a Toeplitz map; convolutions one after another are a product of maps, as the
zeros around the image come in between. Features are ``[B, H, N, E]`` over a grid of N tokens with channel c = h*E + e,
kernels ``[C, side, side]`` of odd side that correlate like ``torch.nn.Conv2d``. Biases of the convolutions add a
constant and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.attention_map import AttentionMap
from workbench.catalogue import Learned, Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.mixers.channels import (
    channel_map,
    check_odd,
    check_sides,
    check_values,
    correlate,
    correlation_map,
    planes,
    token_gate,
    tokens,
)
from workbench.mixers.gating import SOURCE, UNUSED, head_values, small
from workbench.mixers.image import Grid, grid_of
from workbench.mixers.scored import check_tensor
from workbench.patterns.algebra import HeadsMap, KeysMap, ProductMap
from workbench.patterns.jacobian import JacobianMap


def large_kernel_attention(
    gate: Tensor, v: Tensor, near: Tensor, far: Tensor, mix: Tensor, *, grid: Grid, dilation: int = 3
) -> tuple[Tensor, KeysMap]:
    """y = u * W(far(near(v))): 1x1, after depthwise 7x7 with dilation 3, after depthwise 5x5 (Guo et al.,
    arXiv:2202.09741).

    The 1x1 convolution joins channels, so that every output channel is a head and the keys are the tokens of all input
    channels, channel after channel: ``v`` ``[B, 1, C*N, 1]``, in a network the same numbers as ``gate`` u
    ``[B, C, N, 1]``. ``near`` ``[C, 5, 5]``, ``far`` ``[C, 7, 7]``, ``mix`` ``[C, C]`` (out, in). The map's parts are
    its input channels, each a gated Toeplitz map times the Toeplitz map of ``near``.
    """
    b, c, n, _ = check_values(gate)
    check_tensor("gate", gate, (b, c, n, 1))
    check_tensor("v", v, (b, 1, c * n, 1))
    sides = check_sides(grid, n, 2)
    check_odd("near", near, c, 2)
    check_odd("far", far, c, 2)
    check_tensor("mix", mix, (c, c))
    local = correlate(v.reshape(b, c, n), near, sides)
    wide = correlate(local, far, sides, dilation)
    out = gate[..., 0].to(v.dtype) * torch.einsum("oc,bcn->bon", mix.to(v.dtype), wide)
    left = gate[..., 0].detach()
    parts = []
    for source in range(c):
        outer = correlation_map(mix[:, source, None, None] * far[source], sides, dilation, left=left)
        inner = correlation_map(near[source].expand(c, -1, -1), sides, batch=b, kv_heads=1)
        parts.append(ProductMap(outer, inner))
    return out[..., None], KeysMap(*parts)


def recursive_gated_convolution(
    p: Tensor, q: Tensor, v: Tensor, points: Sequence[Tensor], kernel: Tensor, *, grid: Grid, alpha: float = 1.0
) -> tuple[Tensor, AttentionMap]:
    """p_{k+1} = f_k(q_k) * g_k(p_k) / alpha, output p_n: HorNet's product of n + 1 features of an image (Rao et al.,
    arXiv:2207.14284).

    ``p`` ``[B, C_0, N]``; ``q`` ``[B, C_0 + ... + C_{n-2}, N]`` the factors q_0 .. q_{n-2} side by side and ``v``
    ``[B, H, N, E]`` the last one, with C_{n-1} = H*E channels and half as many at each step before; ``points`` are the
    n - 1 pointwise g_1 .. g_{n-1}, ``[C_k, C_{k-1}]`` (g_0 is the identity); ``kernel``
    ``[C_0 + ... + C_{n-1}, side, side]`` the depthwise f, 7x7 in the paper. The map is that of the last factor, the
    rest held fixed.
    """
    b, h, n, e = check_values(v)
    sides = check_sides(grid, n, 2)
    if not isinstance(points, Sequence) or isinstance(points, str) or not alpha:
        raise WorkbenchError(
            f"points is a list of matrices and alpha not 0; got a {type(points).__name__} and {alpha!r}"
        )
    order = len(points) + 1
    widths = [h * e // 2 ** (order - 1 - k) for k in range(order)]
    if widths[0] << (order - 1) != h * e or order < 2:
        raise WorkbenchError(f"an order of {order} halves the {h * e} channels {order - 1} times; they do not divide")
    check_tensor("p", p, (b, widths[0], n))
    check_tensor("q", q, (b, sum(widths[:-1]), n))
    check_odd("kernel", kernel, sum(widths), 2)
    for k, point in enumerate(points):
        check_tensor(f"points[{k}]", point, (widths[k + 1], widths[k]))
    first, last = kernel.split([sum(widths[:-1]), widths[-1]])
    state = p
    for k, factor in enumerate(correlate(q, first, sides).split(widths[:-1], 1)):
        state = points[k].to(q.dtype) @ (factor * state.to(q.dtype) / alpha)
    gate = state / alpha
    out = gate.to(v.dtype) * correlate(planes(v), last, sides)
    return tokens(out, h), channel_map(correlation_map(last, sides, left=gate.detach()), e)


def efficient_modulation(
    x: Tensor, v: Tensor, enter: Tensor, kernel: Tensor, leave: Tensor, *, grid: Grid
) -> tuple[Tensor, AttentionMap]:
    """y = g(GELU(depthwise(f(x)))) * v: a convolutional context modulates a projection of the features (Ma et al.,
    arXiv:2403.19963).

    x ``[B, H, N, E]``, v ``[B, H, N, r E]`` with the features widened r times; ``enter`` f ``[D, C]``, ``kernel``
    ``[D, side, side]`` (7x7 in the paper), ``leave`` g ``[C, D]``. Every head's context is repeated r times. The
    context acts as the gate: the map is diagonal over tokens, one per channel.
    """
    b, h, n, e = check_values(x)
    check_tensor("v", v, (b, h, n, "r E"))
    if v.shape[3] % e:
        raise WorkbenchError(f"v is a whole number of times as wide as x's {e} channels a head; got {v.shape[3]}")
    sides = check_sides(grid, n, 2)
    check_tensor("enter", enter, ("D", h * e))
    check_odd("kernel", kernel, enter.shape[0], 2)
    check_tensor("leave", leave, (h * e, enter.shape[0]))
    seen = functional.gelu(correlate(enter.to(x.dtype) @ planes(x), kernel, sides))
    return token_gate(v, tokens(leave.to(x.dtype) @ seen, h).repeat(1, 1, 1, v.shape[3] // e))


def multi_order_convolution(
    x: Tensor,
    v: Tensor,
    near: Tensor,
    far: Tensor,
    farther: Tensor,
    squeeze: Tensor,
    expand: Tensor,
    *,
    grid: Grid,
    dilation: int = 2,
) -> tuple[Tensor, AttentionMap]:
    """SpaRTAN's spatial mixer: half of the channels under a 3x3 convolution, half under two 3x3 ones with dilation 2,
    each half through GELU and a squeeze-excitation gate of its own.

    GELU(z) = Phi(z) z, so that y = s Phi(K x) * (K v) with s the gate, at v = x the mixer itself. x, v ``[B, H, N, E]``
    with an even number C of channels, after the decomposition x + gamma (x - mean); ``near``, ``far``, ``farther``
    ``[C/2, 3, 3]``; ``squeeze`` ``[2, hidden, C/2]`` and ``expand`` ``[2, C/2, hidden]`` one per half. Norms count as
    folded into the kernels.
    """
    b, h, n, e = check_values(v, x=x)
    half = h * e // 2
    if h * e % 2:
        raise WorkbenchError(f"x has an even number of channels; got {h * e}")
    sides = check_sides(grid, n, 2)
    for name, weight in (("near", near), ("far", far), ("farther", farther)):
        check_odd(name, weight, half, 2)
    check_tensor("squeeze", squeeze, (2, "hidden", half))
    check_tensor("expand", expand, (2, half, squeeze.shape[1]))

    def convolved(image: Tensor) -> list[Tensor]:
        one, two = image.split(half, 1)
        twice = correlate(correlate(two, far, sides, dilation), farther, sides, dilation)
        return [correlate(one, near, sides), twice]

    gates = []
    for part, first, second in zip(convolved(planes(x)), squeeze.to(x.dtype), expand.to(x.dtype), strict=True):
        excited = torch.sigmoid(torch.relu(functional.gelu(part).mean(2) @ first.T) @ second.T)
        gates.append(excited[..., None] * torch.special.ndtr(part))
    out = torch.cat([gate * part for gate, part in zip(gates, convolved(planes(v)), strict=True)], 1)
    inner = HeadsMap(
        correlation_map(near, sides, left=gates[0].detach()),
        ProductMap(
            correlation_map(farther, sides, dilation, left=gates[1].detach()),
            correlation_map(far, sides, dilation, batch=b),
        ),
    )
    return tokens(out, h), channel_map(inner, e)


def ffnified_attention(
    v: Tensor, query_key: Tensor, attention_value: Tensor, *, grid: Grid
) -> tuple[Tensor, JacobianMap]:
    """y = depthwise(GELU(depthwise(v))): large kernels in the places of query-key and attention-value products, GELU in
    that of softmax (Yun et al., arXiv:2406.02021).

    v ``[B, H, N, E]``; ``query_key`` and ``attention_value`` ``[C, 7, 7]``. Not linear in its values: the map is the
    derivative at v, A diag(GELU'(Q v)) Q for the two Toeplitz maps Q and A.
    """
    _, h, n, e = check_values(v)
    sides = check_sides(grid, n, 2)
    check_odd("query_key", query_key, h * e, 2)
    check_odd("attention_value", attention_value, h * e, 2)

    def mixed(values: Tensor, first: Tensor, second: Tensor) -> Tensor:
        hidden = functional.gelu(correlate(planes(values), first, sides))
        return tokens(correlate(hidden, second, sides), h)

    held = query_key.detach(), attention_value.detach()
    return mixed(v, query_key, attention_value), JacobianMap(lambda values: mixed(values, *held), v)


def _gridded(count: int) -> tuple[tuple[int, ...], int]:
    grid = nearest_grid(count)
    return grid, grid[0] * grid[1]


def _lka_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    grid, n = _gridded(count)
    shapes = {"gate": (2, 3, n, 1), "v": (2, 1, 3 * n, 1), "near": (3, 5, 5), "far": (3, 7, 7), "mix": (3, 3)}
    return {**example_tensors(seed, dtype, **shapes), "grid": grid}


def _hornet_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    grid, n = _gridded(count)
    shapes = {
        "p": (2, 1, n), "q": (2, 3, n), "v": (2, 4, n, 1), "kernel": (7, 7, 7), "one": (2, 1), "two": (4, 2),
    }  # fmt: skip
    found = example_tensors(seed, dtype, **shapes)
    points = [found.pop("one"), found.pop("two")]
    return {**found, "points": points, "grid": grid, "alpha": 3.0}


def _modulation_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    grid, n = _gridded(count)
    shapes = {"x": (2, 3, n, 1), "v": (2, 3, n, 2), "enter": (2, 3), "kernel": (2, 7, 7), "leave": (3, 2)}
    return {**example_tensors(seed, dtype, **shapes), "grid": grid}


def _spartan_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    grid, n = _gridded(count)
    kernels = dict.fromkeys(("near", "far", "farther"), (2, 3, 3))
    shapes = {"x": (2, 4, n, 1), "v": (2, 4, n, 1), **kernels, "squeeze": (2, 3, 2), "expand": (2, 2, 3)}
    return {**example_tensors(seed, dtype, **shapes), "grid": grid}


def _ffnified_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    grid, n = _gridded(count)
    shapes = {"v": (2, 2, n, 1), "query_key": (2, 7, 7), "attention_value": (2, 7, 7)}
    return {**example_tensors(seed, dtype, **shapes), "grid": grid}


def _square(weight: Tensor) -> Tensor:
    """A parameter ``[H, E, side * side]`` as ``[C, side, side]``."""
    side = round(weight.shape[2] ** 0.5)
    return weight.flatten(0, 1).unflatten(1, (side, side))


def _hornet_parts(parts: dict[str, Any]) -> dict[str, Any]:
    """Order 2 of a layer with an even number of channels: p_0 and q_0 are half of the queries and keys."""
    channels = parts["v"].shape[1] * parts["v"].shape[3]
    p, q = (planes(parts[name])[:, : channels // 2] for name in ("start", "factor"))
    kernel = torch.cat([_square(parts["kernel"])[: channels // 2], _square(parts["last"])])
    point = parts["point"].flatten(2).flatten(0, 1)[:, : channels // 2]
    return {"p": p, "q": q, "v": head_values(parts), "points": [point], "kernel": kernel, "grid": grid_of(parts)}


def _modulation_parts(parts: dict[str, Any]) -> dict[str, Any]:
    joined = {name: parts[name].flatten(2).flatten(0, 1) for name in ("enter", "leave")}
    kernel = _square(parts["kernel"])
    return {"x": parts["source"], "v": head_values(parts), **joined, "kernel": kernel, "grid": grid_of(parts)}


def _spartan_parts(parts: dict[str, Any]) -> dict[str, Any]:
    """Kernels ``[C, 3 * 9]``, of which half of the channels are used; excitations ``[C, 4]`` half by half."""
    channels = parts["v"].shape[3] * parts["q"].shape[1]
    if channels % 2:
        raise WorkbenchError(f"SpaRTAN's mixer halves the channels, an even number; got {channels}")
    near, far, farther = parts["kernels"].flatten(0, 1)[: channels // 2].unflatten(1, (3, 3, 3)).unbind(1)
    squeeze, expand = (parts[name].flatten(0, 1).unflatten(0, (2, -1)) for name in ("squeeze", "expand"))
    kernels = {"near": near, "far": far, "farther": farther, "squeeze": squeeze.transpose(1, 2), "expand": expand}
    return {"x": parts["source"], "v": head_values(parts), **kernels, "grid": grid_of(parts)}


def _ffnified_parts(parts: dict[str, Any]) -> dict[str, Any]:
    kernels = {name: _square(parts[name]) for name in ("query_key", "attention_value")}
    return {"v": head_values(parts), **kernels, "grid": grid_of(parts)}


_KERNEL = Parameter("HE49", small)

VARIANTS = (
    Variant(
        name="large-kernel-attention",
        paper="#146 Visual Attention Network (2022)",
        family="convolution",
        priority="C",
        operator=large_kernel_attention,
        example=_lka_example,
        reference="Visual-Attention-Network/VAN-Classification",
        note="Keys are the tokens of each input channel, as the 1x1 convolution joins channels behind the depthwise ones.",
    ),
    Variant(
        name="recursive-gated-convolution",
        paper="#4 HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions (2022)",
        family="convolution",
        priority="C",
        operator=recursive_gated_convolution,
        example=_hornet_example,
        reference="raoyongming/HorNet gnconv",
        note="Order 3 in the example; scale 1/3 as in the released models. The native model runs order 2.",
        recipe=Recipe(
            learned={"start": Learned("HE"), "factor": Learned("HE")},
            parameters={"kernel": _KERNEL, "last": _KERNEL, "point": Parameter("HEHE", small)},
            prepare=_hornet_parts,
            ignores=UNUSED,
        ),
    ),
    Variant(
        name="efficient-modulation",
        paper="#119 Efficient Modulation for Vision Networks (2024)",
        family="convolution",
        priority="C",
        operator=efficient_modulation,
        example=_modulation_example,
        reference="ma-xu/EfficientMod models/EfficientMod.py",
        note="One context size. The reach of the convolution shows in the gate, not in the map.",
        recipe=Recipe(
            learned=SOURCE,
            parameters={"enter": Parameter("HEHE", small), "kernel": _KERNEL, "leave": Parameter("HEHE", small)},
            prepare=_modulation_parts,
            ignores=UNUSED,
        ),
    ),
    Variant(
        name="spartan-spatial-mixer",
        paper="#31 SpaRTAN: Spatial Reinforcement Token-based Aggregation Network for Visual Recognition (2025)",
        family="convolution",
        priority="C",
        operator=multi_order_convolution,
        example=_spartan_example,
        reference="henry-pay/SpaRTAN src/model/spartan.py SMixer",
        note="Later stages, where convolutions are depthwise. GELU is taken as a gate of what it lets through.",
        recipe=Recipe(
            learned=SOURCE,
            parameters={
                "kernels": Parameter("HE27", small), "squeeze": Parameter("HE4", small), "expand": Parameter("HE4", small)
            },
            prepare=_spartan_parts,
            ignores=UNUSED,
        ),
    ),
    Variant(
        name="ffnified-attention",
        paper="#39 MetaMixer Is All You Need (2024)",
        family="nonlinear",
        priority="C",
        operator=ffnified_attention,
        example=_ffnified_example,
        value_input=None,
        reference="ysj9909/FFNet models/ffnet.py Token_Mixer",
        note="Kernels after re-parameterisation, which adds a 3x3 to each 7x7.",
        recipe=Recipe(
            parameters={"query_key": _KERNEL, "attention_value": _KERNEL},
            prepare=_ffnified_parts,
            ignores=UNUSED,
        ),
    ),
)  # fmt: skip
