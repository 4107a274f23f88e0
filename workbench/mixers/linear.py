"""Linear attention without decay: what multiplies the values is a product of features of the query and of the key.

    o_i = sum_j M_ij v_j,   M_ij = phi(q_i) . phi(k_j) / n_i                                over all j, or over j <= i if causal

    linear attention          phi = elu + 1,   n_i = sum_j phi(q_i) . phi(k_j)
    unnormalised              phi = elu + 1,   n_i = 1
    Pavlovian reading         phi(x) = x,      n_i = 1
    L2ViT                     phi = relu,      n_i = max(sum_j phi(q_i) . phi(k_j), 100) / temperature, then a convolution
    dual-gated                phi = elu + 1, rotated in the numerator only, n_i = N (phi(q_i) . mean_j phi(k_j) + 1e-6)

Products are taken from the right, sum_j phi(k_j) v_j^T first, in time linear in N; maps are low rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.attention_map import AttentionMap
from workbench.catalogue import Learned, Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.kernels.linear_attention import linear_attention as recurrent
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.mixers.image import check_grid
from workbench.mixers.local import check_qkv
from workbench.mixers.scored import check_tensor
from workbench.patterns.algebra import ProductMap
from workbench.patterns.linear import LinearMap
from workbench.patterns.per_channel import ChannelGatedMap
from workbench.patterns.toeplitz import ToeplitzMap


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, positive everywhere: x + 1 above 0 and exp(x) below."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def linear_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    causal: bool,
    scale: float = 1.0,
    norm: Tensor | None = None,
) -> Tensor:
    """sum_j scale (q_i . k_j) exp(a_{j+1} + ... + a_i) v_j / norm_i, ``[B, H, Q, V]`` of v's dtype, differentiable.

    q ``[B, H, Q, R]``, k ``[B, G, K, R]``, v ``[B, G, K, V]``; ``log_decay`` a as in ``kernels/linear_attention.py``, causal
    products only; ``norm`` ``[B, H, Q]``, rows where it is 0 are 0.
    """
    work = torch.promote_types(working_dtype(q.dtype), v.dtype)
    b, h, n, r = q.shape
    g, width = v.shape[1], v.shape[3]
    if causal:
        out = recurrent(q.to(work), k.to(work), v.to(work), log_decay, scale=scale).output
    else:
        states = k.to(work).transpose(-1, -2) @ v.to(work) * scale
        out = (q.to(work).reshape(b, g, h // g * n, r) @ states).view(b, h, n, width)
    if norm is not None:
        empty = (norm == 0)[..., None]
        out = (out / norm.to(work)[..., None].masked_fill(empty, 1.0)).masked_fill(empty, 0.0)
    return out.to(v.dtype)


def check_linear(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """Raise ``WorkbenchError`` unless q, k and v fit together, with a key for every query if ``causal``."""
    check_qkv(q, k, v)
    if causal and q.shape[2] != k.shape[2]:
        raise WorkbenchError(
            f"causal linear attention has a key for every query; got {q.shape[2]} queries and {k.shape[2]} keys"
        )


def key_mass(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """sum_j q_i . k_j ``[B, H, Q]``, over j <= i if ``causal``."""
    b, h, n, r = q.shape
    sums = k.cumsum(2) if causal else k.sum(2, keepdim=True)
    return (q.view(b, k.shape[1], -1, n, r) * sums[:, :, None]).sum(-1).view(b, h, n)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> tuple[Tensor, LinearMap]:
    """Normalised linear attention with phi = elu + 1: q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]``.

    M_ij = phi(q_i) . phi(k_j) / sum_j' phi(q_i) . phi(k_j'). Source: Katharopoulos et al., Transformers are RNNs,
    arXiv:2006.16236, equations 5 and 7.
    """
    check_linear(q, k, v, causal)
    work = working_dtype(q.dtype)
    q, k = elu_plus_one(q.to(work)), elu_plus_one(k.to(work))
    norm = key_mass(q, k, causal)
    out = linear_product(q, k, v, causal=causal, norm=norm)
    row_sum = "1" if bool((norm > 0).all()) else "<=1"
    return out, LinearMap(q, k, causal=causal, norm=norm, sign="nonnegative", row_sum=row_sum)


def unnormalised_linear_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> tuple[Tensor, LinearMap]:
    """Linear attention with phi = elu + 1 and no denominator, which a norm of the output replaces in the network.

    M_ij = phi(q_i) . phi(k_j); shapes as in ``linear_attention``. Source: Qin et al., The Devil in Linear Transformer,
    arXiv:2210.10340 (NormAttention, without the norm that follows).
    """
    check_linear(q, k, v, causal)
    work = working_dtype(q.dtype)
    q, k = elu_plus_one(q.to(work)), elu_plus_one(k.to(work))
    return linear_product(q, k, v, causal=causal), LinearMap(q, k, causal=causal, sign="nonnegative")


def pavlovian_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> tuple[Tensor, LinearMap]:
    """Attention as an associative memory: keys (conditional stimuli) and values (unconditional ones) are bound by a Hebbian rule,
    S = sum_j k_j v_j^T, and a query (test stimulus) reads S^T q_i.

    M_ij = q_i . k_j, neither features nor scale nor denominator; shapes as in ``linear_attention``. With orthonormal keys every
    association is retrieved without interference.
    """
    check_linear(q, k, v, causal)
    return linear_product(q, k, v, causal=causal), LinearMap(q, k, causal=causal)


def l2vit_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    concentration: Tensor | None = None,
    *,
    grid: tuple[int, int],
    floor: float = 100.0,
) -> tuple[Tensor, AttentionMap]:
    """Global linear attention of L2ViT with its local concentration: q ``[B, H, N, E]``, k, v ``[B, G, N, E]`` of a ``grid``.

    M_ij = t_h relu(q_i) . relu(k_j) / max(sum_j' relu(q_i) . relu(k_j'), floor) with ``temperature`` t ``[H]``. With
    ``concentration`` ``[H, S, S]`` (odd S) the outputs of each head are convolved over the grid, zeros around it, which
    concentrates the map: C M with C the convolution. Source: the paper of the record, and its author's code.
    """
    check_qkv(q, k, v)
    h, n = q.shape[1:3]
    check_tensor("temperature", temperature, (h,))
    grid = check_grid(grid, n)
    work = working_dtype(q.dtype)
    q, k = q.to(work).relu(), k.to(work).relu()
    norm = key_mass(q, k, False).clamp(min=floor)
    q = q * temperature.to(work)[:, None, None]
    out = linear_product(q, k, v, causal=False, norm=norm)
    sign = "nonnegative" if bool((temperature >= 0).all()) else "signed"
    found = LinearMap(q, k, causal=False, norm=norm, sign=sign)
    if concentration is None:
        return out, found
    check_tensor("concentration", concentration, (h, "S", "S"))
    rows, columns = concentration.shape[1:]
    if not rows % 2 or not columns % 2:
        raise WorkbenchError(f"concentration is [H, S, S] with odd S; got {list(concentration.shape)}")
    b, _, _, e = out.shape
    image = out.to(work).permute(0, 3, 1, 2).reshape(b * e, h, *grid)
    kernel = concentration.to(work)
    image = functional.conv2d(image, kernel[:, None], padding=(rows // 2, columns // 2), groups=h)
    taps = kernel.flip(1, 2).expand(b, -1, -1, -1)
    spread = ToeplitzMap(taps, queries=grid, keys=grid, first=(-(rows // 2), -(columns // 2)))
    return image.reshape(b, e, h, n).permute(0, 2, 3, 1).to(v.dtype), ProductMap(spread, found)


def dual_gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *, grid: tuple[int, int], base: float | None = 10000.0
) -> tuple[Tensor, ChannelGatedMap]:
    """Dual-gated linear attention of HER-Seg: q, k, v, gate ``[B, H, N, E]`` of a ``grid``, E times H divisible by 4.

    M_ij = g_ic (R_i phi(q_i)) . (R_j phi(k_j)) / (N z_i), z_i = phi(q_i) . mean_j phi(k_j) + 1e-6, phi = elu + 1: the rotations
    R by row and column, whose frequencies run over the channels of all heads, are in the numerator alone. v has passed the
    first gate (a bottleneck with SiLU), ``gate`` g is the second, SiLU of a projection. ``base=None`` leaves the rotations out.
    Source: Xu et al., arXiv:2504.06205, and their code (LGViT), without its depthwise convolution of v, which is added before
    the gate.
    """
    check_qkv(q, k, v)
    b, h, n, _ = q.shape
    if k.shape[1] != h:
        raise WorkbenchError(f"k and v have the {h} heads of q, over which the rotations run; got {k.shape[1]}")
    check_tensor("gate", gate, (b, h, n, v.shape[3]))
    grid = check_grid(grid, n)
    work = working_dtype(q.dtype)
    q, k = elu_plus_one(q.to(work)), elu_plus_one(k.to(work))
    norm = key_mass(q, k, False) / n + 1e-6
    if base is not None:
        q, k = (rotate_grid(x, grid, base) for x in (q, k))
    out = linear_product(q, k, v, causal=False, scale=1 / n, norm=norm)
    sign = "nonnegative" if base is None else "signed"
    raw = LinearMap(q, k, causal=False, scale=1 / n, norm=norm, sign=sign, value_space="filtered V")
    return out * gate.to(out.dtype), ChannelGatedMap(raw, gate)


def rotate_grid(x: Tensor, grid: tuple[int, int], base: float) -> Tensor:
    """Rotary positions on a grid over the channels of all heads: x ``[B, H, N, E]``.

    Pairs of neighbouring channels turn by the row times a frequency in the first half of the H E channels, by the column in the
    second; the frequencies are ``base ** (-r / (H E / 4))`` for r = 0 ... in both.
    """
    b, h, n, e = x.shape
    if h * e % 4:
        raise WorkbenchError(f"rotations on a grid need a multiple of 4 channels over all heads; got {h} times {e}")
    quarter = h * e // 4
    speeds = base ** (-torch.arange(quarter, dtype=torch.float64, device=x.device) / quarter)
    places = torch.arange(n, device=x.device)
    angles = torch.cat([(places // grid[1])[:, None] * speeds, (places % grid[1])[:, None] * speeds], -1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x.transpose(1, 2).reshape(b, n, h * e // 2, 2).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return turned.reshape(b, n, h, e).transpose(1, 2)


def causal_option(mask: Mask) -> bool:
    """Whether a mask is causal; raises where it hides anything else, which a state cannot follow."""
    plain = Mask(causal=mask.causal)
    for name, part, wanted in zip(mask.__dataclass_fields__, mask.parts(), plain.parts(), strict=True):
        if part is not wanted and part != wanted:
            raise WorkbenchError(f"linear attention follows no mask but the causal one; got mask.{name}")
    return mask.causal


def arguments(*names: str, **options: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A ``Recipe.prepare`` of mixers that are causal or not by themselves: q, k, v and ``names`` as they are, and ``options``."""

    def prepare(made: dict[str, Any]) -> dict[str, Any]:
        causal_option(made["mask"])
        return {name: made[name] for name in ("q", "k", "v", *names)} | options

    return prepare


def _either(made: dict[str, Any]) -> dict[str, Any]:
    """Arguments of mixers that may be causal."""
    return {name: made[name] for name in ("q", "k", "v")} | {"causal": causal_option(made["mask"])}


def _l2vit(made: dict[str, Any]) -> dict[str, Any]:
    return {
        "q": made["q"], "k": made["k"], "v": made["v"], "grid": made["grid"],
        "temperature": made["temperature"] * made["q"].shape[3] ** -0.5,
        "concentration": made["concentration"].unflatten(-1, (7, 7)),
    }  # fmt: skip


def _delta(shape: tuple[int, ...]) -> Tensor:
    """Kernels that leave an image as it is."""
    kernel = torch.zeros(shape)
    kernel[..., shape[-1] // 2] = 1.0
    return kernel


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 6), "k": (2, 2, tokens, 6), "v": (2, 2, tokens, 5)}
    return {**example_tensors(seed, dtype, **shapes), "causal": True}


def _l2vit_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(tokens)
    n = grid[0] * grid[1]
    shapes = {"q": (2, 4, n, 6), "k": (2, 2, n, 6), "v": (2, 2, n, 5), "temperature": (4,), "concentration": (4, 3, 3)}
    made = example_tensors(seed, dtype, **shapes)
    return {**made, "temperature": made["temperature"].abs(), "grid": grid}


def _dual_gated_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(tokens)
    shape = (2, 2, grid[0] * grid[1], 6)
    made = example_tensors(seed, dtype, q=shape, k=shape, v=shape, gate=shape)
    return {**made, "gate": functional.silu(made["gate"]), "grid": grid}


VARIANTS = (
    Variant(
        name="linear-attention",
        paper="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention (2020)",
        family="linear",
        priority="B",
        operator=linear_attention,
        example=_example,
        causal=True,
        reference="fla ops.linear_attn",
        note="Without the 1e-6 that public code adds to the denominator.",
        recipe=Recipe(prepare=_either),
    ),
    Variant(
        name="unnormalised-linear-attention",
        paper="The Devil in Linear Transformer (2022)",
        family="linear",
        priority="B",
        operator=unnormalised_linear_attention,
        example=_example,
        causal=True,
        reference="fla ops.linear_attn with normalize=False",
        note="The norm of the output that follows is no part of the map; the choice elu + 1 is from general knowledge.",
        recipe=Recipe(prepare=_either),
    ),
    Variant(
        name="pavlovian-linear-attention",
        paper="#97 Understanding Transformers through the Lens of Pavlovian Conditioning (2025)",
        family="linear",
        priority="B",
        operator=pavlovian_attention,
        example=_example,
        causal=True,
        reference="the abstract: linear attention as a Hebbian memory",
        note="The paper's error and capacity bounds are statements about this map, not part of it.",
        recipe=Recipe(prepare=_either),
    ),
    Variant(
        name="l2vit-linear-attention",
        paper="#12 The Linear Attention Resurrection in Vision Transformer (2025)",
        family="linear",
        priority="C",
        operator=l2vit_attention,
        example=_l2vit_example,
        reference="ChuanyangZheng/L2ViT classification/models/l2vit.py",
        note="In the network the concentration is a branch of its own after the residual: two depthwise 7 x 7 convolutions with "
        "GELU and batch norm in between. Here it is one linear convolution of each head.",
        recipe=Recipe(
            parameters={"temperature": Parameter("H", torch.ones), "concentration": Parameter("H49", _delta)},
            prepare=_l2vit,
        ),
    ),
    Variant(
        name="dual-gated-linear-attention",
        paper="#64 HER-Seg: Holistically Efficient Segmentation for High-Resolution Medical Images (2025)",
        family="linear",
        priority="C",
        operator=dual_gated_linear_attention,
        example=_dual_gated_example,
        reference="xq141839/HER-Seg SAM/LGViT.py",
        note="The depthwise convolution of v that is added before the second gate is left out.",
        recipe=Recipe(learned={"gate": Learned("HE", functional.silu)}, prepare=arguments("gate", "grid")),
    ),
)
