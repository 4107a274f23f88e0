"""The maps of all variants side by side, for one input: what each mechanism does with the same tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import Variant, variants
from workbench.kernels.mask import Mask
from workbench.models.native_config import NativeConfig
from workbench.models.native_variants import VariantMixer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 6
"""The input is SIDE x SIDE tokens: a text of 36 or an image of 6 rows."""
_WIDTH, _HEADS = 24, 2
_NARROW = (8, 1)
"""Width and heads of operators whose map is a derivative, which costs a backward pass per channel."""


def common_input(width: int = _WIDTH) -> Tensor:
    """The input ``[1, 36, width]``: 18 tokens drawn at random, and the same 18 once more, so that content shows as a
    second diagonal. As an image its lower half repeats the upper one."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(1, SIDE * SIDE // 2, width, generator=generator, dtype=torch.float64)
    return torch.cat([half, half], 1)


def map_of(variant: Variant) -> tuple[AttentionMap, bool]:
    """The map of a variant on the common input, with one projection for queries and keys; True. Variants that take
    other inputs show their own example; False."""
    if variant.recipe is None:
        return variant(**variant.example(0, SIDE * SIDE, torch.float64))[1], False
    width, heads = _NARROW if variant.family == "nonlinear" else (_WIDTH, _HEADS)
    config = NativeConfig(
        layers=1, heads=heads, width=width, head_width=width, vocab=1, mixer=variant.name, positions="none",
        causal=variant.causal, grid=(SIDE, SIDE),
    )  # fmt: skip
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        mixer = VariantMixer(config).double()
        for parameter in mixer.parameters():
            if not parameter.any():  # learned biases and gates that start at zero show nothing
                parameter.normal_(std=0.7)
        x = common_input(width)
        q = x[:, None].expand(-1, heads, -1, -1)
        v = torch.randn(1, heads, SIDE * SIDE, width, dtype=torch.float64)
        return mixer(x, 0.6 * q, q, v, Mask(causal=variant.causal))[1], True


def figure(family: str, columns: int = 6) -> Figure:
    """The first head of every variant of a family; blue is positive, red negative, the strongest weight of a map
    darkest."""
    from matplotlib.figure import Figure

    chosen = [v for v in variants() if v.family == family]
    rows = math.ceil(len(chosen) / columns)
    fig = Figure(figsize=(2.1 * columns, 2.45 * rows), layout="constrained")
    axes = list(fig.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.set_axis_off()
    for ax, variant in zip(axes, chosen, strict=False):
        amap, common = map_of(variant)
        weights = amap.heads([0]).dense()[0, 0]
        top = float(weights.abs().max()) or 1.0
        shown = weights.sign() * (weights.abs() / top).sqrt()
        ax.imshow(shown.numpy(), cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
        ax.set_title(_wrapped(variant.name) + ("" if common else " *"), fontsize=7)
        ax.set_axis_on()
        ax.set_xticks([])
        ax.set_yticks([])
    return fig


def _wrapped(name: str, width: int = 26) -> str:
    if len(name) <= width:
        return name
    cut = name.rfind("-", 0, width)
    return f"{name[: cut + 1]}\n{name[cut + 1 :]}" if cut > 0 else name
