"""Attention between spikes: queries, keys and values are 0 or 1, their products are counts, and no softmax is needed.

    M_ij = 0.125 q_i . k_j    per time step;   o = M v enters leaky integrate-and-fire neurons

The map ends where the neurons begin: their output is no linear function of the values.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.mixers.linear import causal_option, linear_product
from workbench.mixers.local import check_qkv
from workbench.patterns.linear import LinearMap


def spiking_self_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float = 0.125) -> tuple[Tensor, LinearMap]:
    """Spiking self-attention of Spikformer: q ``[B, H, Q, E]`` and k ``[B, G, K, E]`` of zeros and ones, v ``[B, G, K, V]``.

    M_ij = scale q_i . k_j, multiples of ``scale`` that are not negative, over all tokens; time steps are examples of the batch.
    The result goes through ``lif(..., threshold=0.5)``. Source: Zhou et al., arXiv:2209.15425 and 2401.02020, and their code.
    """
    check_qkv(q, k, v)
    for name, x in (("q", q), ("k", k)):
        if not bool(((x == 0) | (x == 1)).all()):
            raise WorkbenchError(
                f"{name} holds spikes, zeros and ones; got numbers from {x.min():.4g} to {x.max():.4g}"
            )
    out = linear_product(q, k, v, causal=False, scale=scale)
    return out, LinearMap(q, k, causal=False, scale=scale, sign="nonnegative", value_space="spikes V")


def lif(current: Tensor, *, tau: float = 2.0, threshold: float = 1.0) -> Tensor:
    """Spikes of leaky integrate-and-fire neurons: currents ``[T, ...]``, one time step after the other, to zeros and ones.

    The potential moves by (current - potential) / tau; at ``threshold`` the neuron fires and starts from 0 again, and no
    gradient flows through that. The gradient of firing is that of arctan(pi x) / pi + 1/2.
    """
    if not tau >= 1 or not threshold > 0:
        raise WorkbenchError(f"tau is at least 1 and threshold positive; got {tau} and {threshold}")
    potential, spikes = torch.zeros_like(current[0]), []
    for step in current:
        potential = potential + (step - potential) / tau
        above = potential - threshold
        soft = torch.atan(math.pi * above) / math.pi + 0.5
        spikes.append((above >= 0).to(soft.dtype) + (soft - soft.detach()))
        potential = potential * (1 - spikes[-1].detach())
    return torch.stack(spikes)


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    made = example_tensors(seed, dtype, q=(2, 4, tokens, 8), k=(2, 2, tokens, 8), v=(2, 2, tokens, 5))
    return {name: (x > 0).to(dtype) for name, x in made.items()}


def _prepare(made: dict[str, Any]) -> dict[str, Any]:
    """One time step of neurons that fire at a current of 1."""
    causal_option(made["mask"])
    return {name: lif(made[name][None], threshold=0.5)[0] for name in ("q", "k", "v")}


VARIANTS = (
    Variant(
        name="spiking-self-attention",
        paper="#162 Spikformer V2: Join the High Accuracy Club on ImageNet with an SNN Ticket (2024)",
        family="linear",
        priority="C",
        operator=spiking_self_attention,
        example=_example,
        reference="ZK-Zhou/spikformer imagenet/model.py",
        note="Linear in the values before the neurons that follow; a native model takes one time step and leaves those out.",
        recipe=Recipe(prepare=_prepare),
    ),
)
