"""Linear attention with decay: what a query sees of a key fades with the tokens in between.

    lightning attention, retention   M_ij = scale (q_i . k_j) exp(-s_h (i - j))                           one rate s per head
    gated linear attention           M_ij = scale sum_r q_ir k_jr exp(a_{j+1,r} + ... + a_{i,r})          gates a per channel
    ViG                              half the sum of that and of the same thing from the last token to the first

Rates of the three lightning attentions, for head h = 0 ... H - 1 of layer l = 0 ... L - 1:

    TransNormerLLM  s = alibi_h (1 - l / (L - 1) + 1e-5),   alibi_h = 2^(-8 (h + 1) / H) for H a power of 2
    MiniMax         s = 2^(-8 (h + 1) / H) (1 - l / (L - 1 + 1e-5) + 1e-5)
    the kernel      s as given

All go chunk by chunk in time linear in the number of tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.catalogue import Learned, Parameter, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.mixers.linear import arguments, causal_option, check_linear, linear_product
from workbench.mixers.scored import check_tensor
from workbench.patterns.algebra import SumMap
from workbench.patterns.arranged import PermutedMap
from workbench.patterns.decays import channel_scan
from workbench.patterns.linear import ChannelDecayMap, LinearMap

ROTATION_BASE = 10000.0
FASTEST = 1e30
"""Rates of decay are cut here: exp(-1e30) is 0 in every type, and 0 times it is 0."""


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8 (h + 1) / H) for a power of 2; else those of the power below, then every other one of the power above."""
    power = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    return slopes if power == heads else slopes + alibi_slopes(2 * power)[::2][: heads - power]


def transnormer_slopes(heads: int, layer: int, layers: int) -> list[float]:
    """Rates of decay of TransNormerLLM: ALiBi's slopes, weaker from layer to layer, 1e-5 of them in the last."""
    _check_layer(layer, layers)
    share = 1 - layer / max(1, layers - 1) + 1e-5
    return [slope * share for slope in alibi_slopes(heads)]


def minimax_slopes(heads: int, layer: int, layers: int) -> list[float]:
    """Rates of decay of MiniMax-01, geometric for every number of heads."""
    _check_layer(layer, layers)
    share = 1 - layer / (layers - 1 + 1e-5) + 1e-5
    return [2.0 ** (-8 * (h + 1) / heads) * share for h in range(heads)]


def lightning_attention(
    q: Tensor, k: Tensor, v: Tensor, *, layer: int, layers: int, block: int = 256
) -> tuple[Tensor, LinearMap]:
    """Lightning attention of TransNormerLLM: q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]``.

    M_ij = silu(q_i) . silu(k_j) exp(-s_h (i - j)) with the rates of ``layer`` of ``layers``, no scale, no denominator. v has
    passed the SiLU that the network gives it. ``block`` is the side of the tiles and changes nothing. Source: Qin et al.,
    arXiv:2405.17381, and the authors' code; the norm and gate of the output come after.
    """
    check_linear(q, k, v, True)
    work = working_dtype(q.dtype)
    slopes = torch.tensor(transnormer_slopes(q.shape[1], layer, layers), dtype=work, device=q.device)
    q, k = functional.silu(q.to(work)), functional.silu(k.to(work))
    return tiled_product(q, k, v, slopes, block), LinearMap(q, k, -slopes, causal=True, value_space="SiLU V")


def lightning_attention_2(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, *, block: int = 256
) -> tuple[Tensor, LinearMap]:
    """Lightning Attention-2: M_ij = (q_i . k_j) exp(-s_h (i - j)) for rates ``slopes`` ``[H]``, not negative, that are given.

    Shapes as in ``lightning_attention``; q and k as they are. Inside of a block of tokens the masked product, between blocks
    the state. Source: Qin et al., arXiv:2401.04658, algorithm 1.
    """
    check_linear(q, k, v, True)
    check_tensor("slopes", slopes, (q.shape[1],))
    if bool((slopes < 0).any()):
        raise WorkbenchError(f"slopes are rates of decay, not negative; got {float(slopes.min()):.4g}")
    out = tiled_product(q, k, v, slopes, block)
    return out, LinearMap(q, k, -slopes, causal=True)


def minimax_attention(q: Tensor, k: Tensor, v: Tensor, *, layer: int, layers: int) -> tuple[Tensor, LinearMap]:
    """Lightning attention of MiniMax-01: as ``lightning_attention`` with the rates of its public model.

    Source: MiniMax, arXiv:2501.08313, and ``MiniMaxLightningAttention`` of transformers; v has passed its SiLU, the norm and
    gate of the output come after.
    """
    check_linear(q, k, v, True)
    work = working_dtype(q.dtype)
    decay = -torch.tensor(minimax_slopes(q.shape[1], layer, layers), dtype=work, device=q.device)
    q, k = functional.silu(q.to(work)), functional.silu(k.to(work))
    return linear_product(q, k, v, decay, causal=True), LinearMap(q, k, decay, causal=True, value_space="SiLU V")


def tiled_product(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, block: int) -> Tensor:
    """sum_j (q_i . k_j) exp(-s_h (i - j)) v_j by tiles: pairs inside of a block, a state of all blocks before."""
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise WorkbenchError(f"block is a positive number of tokens; got {block!r}")
    work = torch.promote_types(working_dtype(q.dtype), v.dtype)
    b, h, n, e = q.shape
    g, width = v.shape[1], v.shape[3]
    slopes = slopes.to(work).clamp(max=FASTEST)  # as good as infinite, and 0 tokens of it are still no decay
    rows, keys, values = q.to(work).view(b, g, h // g, n, e), k.to(work)[:, :, None], v.to(work)[:, :, None]
    rate = slopes.view(g, h // g, 1)
    state = rows.new_zeros(b, g, h // g, e, width)
    parts = []
    for lo in range(0, n, block):
        size = min(n - lo, block)
        at = torch.arange(size, device=q.device, dtype=work)
        inner = (-rate[..., None] * (at[:, None] - at).clamp(min=0)).exp().tril()
        rise, fall = (-rate * (at + 1)).exp()[..., None], (-rate * (size - 1 - at)).exp()[..., None]
        here, there, what = (x[..., lo : lo + size, :] for x in (rows, keys, values))
        parts.append((here @ there.transpose(-1, -2) * inner) @ what + (here * rise) @ state)
        state = (-rate * size).exp()[..., None] * state + (there * fall).transpose(-1, -2) @ what
    return torch.cat(parts, 3).view(b, h, n, width).to(v.dtype)


def retention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, LinearMap]:
    """Retention: q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]``, E even.

    M_ij = scale (R_i q_i) . (R_j k_j) gamma_h^(i - j), gamma_h = 1 - 2^(-5 - h), with R_i the rotation of neighbouring channels
    by i times the angles 10000^(-r / (E / 2 - 1)), r = 0 ... E / 2 - 1. ``scale=None`` is ``E ** -0.5``. Source: Sun et al.,
    arXiv:2307.08621, equations 5 and 8; their normalisations of the scores cancel in the group norm that follows.
    """
    check_linear(q, k, v, True)
    e = q.shape[3]
    if e % 2:
        raise WorkbenchError(f"retention rotates pairs of channels: q has an even width; got {e}")
    work = working_dtype(q.dtype)
    gamma = 1 - 2.0 ** (-5 - torch.arange(q.shape[1], dtype=torch.float64, device=q.device))
    angles = ROTATION_BASE ** -torch.linspace(0, 1, e // 2, dtype=torch.float64, device=q.device)
    turn = torch.arange(q.shape[2], dtype=torch.float64, device=q.device)[:, None] * angles
    q, k = (_rotated(x.to(work), turn.cos().to(work), turn.sin().to(work)) for x in (q, k))
    scale, decay = e**-0.5 if scale is None else scale, gamma.log().to(work)
    out = linear_product(q, k, v, decay, causal=True, scale=scale)
    return out, LinearMap(q, k, decay, causal=True, scale=scale)


def gated_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, *, scale: float | None = None, temperature: float = 16.0
) -> tuple[Tensor, ChannelDecayMap]:
    """Gated linear attention: q, k ``[B, H, N, E]``, v ``[B, H, N, V]``, ``gate`` logits ``[B, H, N, E]``.

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T with alpha = sigmoid(gate)^(1 / temperature), o_i = scale S_i^T q_i. ``scale=None``
    is ``E ** -0.5``. Source: Yang et al., arXiv:2312.06635, section 4; norm and gate of the output come after.
    """
    _check_heads(q, k, v, gate=gate)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    parts, log = _working(q, k, v, log_gate(gate, temperature))
    out = channel_scan(*parts, log, scale=scale).to(v.dtype)
    return out, ChannelDecayMap(parts[0], parts[1], log, scale=scale)


def bidirectional_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward_gate: Tensor,
    backward_gate: Tensor,
    *,
    scale: float | None = None,
    temperature: float = 16.0,
) -> tuple[Tensor, SumMap]:
    """Gated linear attention of ViG in both directions: shapes as in ``gated_linear_attention``, gates per direction.

    M = (F + B) / 2 with F the map from the first token on, B that from the last token on: the diagonal is in both. Source: Liao
    et al., arXiv:2405.18425, and the authors' code; norms and the gated mixture with a local convolution come after.
    """
    _check_heads(q, k, v, forward_gate=forward_gate, backward_gate=backward_gate)
    half = (q.shape[3] ** -0.5 if scale is None else scale) / 2
    ahead, log = _working(q, k, v, log_gate(forward_gate, temperature))
    back, log_back = _working(*(x.flip(2) for x in (q, k, v, log_gate(backward_gate, temperature))))
    out = channel_scan(*ahead, log, scale=half) + channel_scan(*back, log_back, scale=half).flip(2)
    turned = torch.arange(q.shape[2], device=q.device).flip(0)
    late = PermutedMap(ChannelDecayMap(back[0], back[1], log_back, scale=half), turned, turned)
    return out.to(v.dtype), SumMap(ChannelDecayMap(ahead[0], ahead[1], log, scale=half), late)


def log_gate(logits: Tensor, temperature: float) -> Tensor:
    """log sigmoid(logits)^(1 / temperature), in the working type."""
    if not temperature > 0:
        raise WorkbenchError(f"temperature is positive; got {temperature}")
    return functional.logsigmoid(logits.to(working_dtype(logits.dtype))) / temperature


def _working(q: Tensor, k: Tensor, v: Tensor, log: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    work = torch.promote_types(working_dtype(q.dtype), v.dtype)
    return (q.to(work), k.to(work), v.to(work)), log.to(work)


def _check_heads(q: Tensor, k: Tensor, v: Tensor, **gates: Tensor) -> None:
    check_linear(q, k, v, True)
    if k.shape[1] != q.shape[1]:
        raise WorkbenchError(f"k and v have the {q.shape[1]} heads of q; got {k.shape[1]}")
    for name, gate in gates.items():
        check_tensor(name, gate, tuple(q.shape))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def _check_layer(layer: int, layers: int) -> None:
    for name, value in (("layer", layer), ("layers", layers)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise WorkbenchError(f"{name} is a whole number; got {value!r}")
    if not 0 <= layer < layers:
        raise WorkbenchError(f"layer counts from 0 to layers - 1; got layer={layer} of layers={layers}")


def _activated(made: dict[str, Any]) -> dict[str, Any]:
    """Values behind their SiLU; a model does not tell its layers apart, so each decays as the first of two."""
    causal_option(made["mask"])
    return {"q": made["q"], "k": made["k"], "v": functional.silu(made["v"]), "layer": 0, "layers": 2}


def _given_slopes(made: dict[str, Any]) -> dict[str, Any]:
    causal_option(made["mask"])
    return {"q": made["q"], "k": made["k"], "v": made["v"], "slopes": made["slopes"].exp()}


def _repeated(made: dict[str, Any], *names: str) -> dict[str, Any]:
    """Keys and values with a head per query head, and the gates."""
    causal_option(made["mask"])
    group = made["q"].shape[1] // made["k"].shape[1]
    k, v = (made[name].repeat_interleave(group, 1) for name in ("k", "v"))
    return {"q": made["q"], "k": k, "v": v, **{name: made[name] for name in names}}


def _gla(made: dict[str, Any]) -> dict[str, Any]:
    return _repeated(made, "gate")


def _vig(made: dict[str, Any]) -> dict[str, Any]:
    return _repeated(made, "forward_gate", "backward_gate")


def _log_slopes(shape: tuple[int, ...]) -> Tensor:
    return torch.tensor(alibi_slopes(shape[0])).log()


def _grouped(seed: int, tokens: int, dtype: torch.dtype, **more: tuple[int, ...]) -> dict[str, Tensor]:
    shapes = {"q": (2, 4, tokens, 6), "k": (2, 2, tokens, 6), "v": (2, 2, tokens, 5), **more}
    return example_tensors(seed, dtype, **shapes)


def _layer_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """6 heads, no power of 2, where the rates of the two networks differ."""
    wide, narrow = (2, 6, tokens, 6), (2, 2, tokens, 6)
    shapes = {"q": wide, "k": narrow, "v": (2, 2, tokens, 5)}
    return {**example_tensors(seed, dtype, **shapes), "layer": 3, "layers": 12}


def _slopes_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    made = _grouped(seed, tokens, dtype, slopes=(4,))
    return {**made, "slopes": made["slopes"].abs() / 4, "block": 4}


def _retention_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return _grouped(seed, tokens, dtype)


def _gla_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return example_tensors(seed, dtype, **dict.fromkeys(("q", "k", "v", "gate"), (2, 3, tokens, 5)))


def _vig_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    names = ("q", "k", "v", "forward_gate", "backward_gate")
    return example_tensors(seed, dtype, **dict.fromkeys(names, (2, 3, tokens, 5)))


VARIANTS = (
    Variant(
        name="lightning-attention",
        paper="#18 Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention (2024)",
        family="linear",
        priority="A",
        operator=lightning_attention,
        example=_layer_example,
        causal=True,
        reference="OpenNLPLab/lightning-attention examples/module/tnl_attn.py",
        note="Rates as in the authors' code; the paper's formula and fla's chunk_lightning_attn have others.",
        recipe=Recipe(prepare=_activated),
    ),
    Variant(
        name="lightning-attention-2",
        paper="#73 Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models (2024)",
        family="linear",
        priority="A",
        operator=lightning_attention_2,
        example=_slopes_example,
        causal=True,
        reference="OpenNLPLab/lightning-attention lightning_attn_func",
        note="The kernel: features and rates are the caller's. A native model learns the rates.",
        recipe=Recipe(parameters={"slopes": Parameter("H", _log_slopes)}, prepare=_given_slopes),
    ),
    Variant(
        name="minimax-lightning-attention",
        paper="MiniMax-01: Scaling Foundation Models with Lightning Attention (2025)",
        family="linear",
        priority="A",
        operator=minimax_attention,
        example=_layer_example,
        causal=True,
        reference="transformers MiniMaxLightningAttention",
        note="Differs from TransNormerLLM's in the rates alone, and there by 1e-6 where the number of heads is a power of 2.",
        recipe=Recipe(prepare=_activated),
    ),
    Variant(
        name="retention",
        paper="Retentive Network: A Successor to Transformer for Large Language Models (2023)",
        family="linear",
        priority="B",
        operator=retention,
        example=_retention_example,
        causal=True,
        reference="torchscale MultiScaleRetention",
        note="Without the paper's normalisations of the scores, which the group norm of the output removes.",
        recipe=Recipe(prepare=arguments()),
    ),
    Variant(
        name="gated-linear-attention",
        paper="Gated Linear Attention Transformers with Hardware-Efficient Training (2023)",
        family="linear",
        priority="B",
        operator=gated_linear_attention,
        example=_gla_example,
        causal=True,
        reference="fla ops.gla naive_recurrent_gla",
        note="A native model makes the gate logits by a full projection; the paper by one of rank 16.",
        recipe=Recipe(learned={"gate": Learned("HE")}, prepare=_gla),
    ),
    Variant(
        name="vig-bidirectional-gated-linear-attention",
        paper="#57 ViG: Linear-complexity Visual Sequence Learning with Gated Linear Attention (2024)",
        family="linear",
        priority="C",
        operator=bidirectional_gated_linear_attention,
        example=_vig_example,
        reference="hustvl/ViG classification/models/vig.py",
        note="The depthwise convolution before the projections and the gated mixture with it after are no part of the map.",
        recipe=Recipe(learned={"forward_gate": Learned("HE"), "backward_gate": Learned("HE")}, prepare=_vig),
    ),
)
