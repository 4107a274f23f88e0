"""Mixing by networks over tokens or channels. None is linear in its values; the map is the derivative at the values.

    MLP-Mixer    y = W2 GELU(W1 v)          W1, W2 over tokens, the same for all channels
    NiNformer    y = mixer(v) * (v W)       the token network makes a gate for every number
    Activator    y = (f(v U) * (v W)) P     a gated linear unit over channels: no token sees another

Values are ``[B, H, N, E]`` with channel c = h*E + e of C = H*E. Where channels mix, the map has the diagonal of the
derivative in the channels, averaged over the head; ``matvec`` uses all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.catalogue import Parameter, Recipe, Variant, example_tensors
from workbench.errors import UnknownName, WorkbenchError
from workbench.mixers.gating import UNUSED, head_values, small
from workbench.mixers.scored import check_tensor
from workbench.patterns.jacobian import JacobianMap

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu, "silu": functional.silu, "relu": torch.relu, "sigmoid": torch.sigmoid,
}  # fmt: skip
"""Activations of a gated linear unit: GEGLU, SwiGLU, ReGLU and the plain GLU."""
LONGEST = 64
"""Tokens that the native model's token networks have weights for."""


def token_mixer(
    v: Tensor, first: Tensor, second: Tensor, first_bias: Tensor, second_bias: Tensor
) -> tuple[Tensor, JacobianMap]:
    """y = W2 GELU(W1 v + b1) + b2 over the tokens of every channel (Tolstikhin et al., arXiv:2105.01601).

    v ``[B, H, N, E]``; ``first`` ``[hidden, N]``, ``second`` ``[N, hidden]``, biases ``[hidden]`` and ``[N]``. The
    layer norm before and the residual after are not part of it. The derivative is W2 diag(GELU'(W1 v + b1)) W1; W2 W1
    is its static part.
    """
    _check_network(v, first, second, first_bias, second_bias)
    held = tuple(weight.detach() for weight in (first, second, first_bias, second_bias))
    out = _over_tokens(v, first, second, first_bias, second_bias)
    return out, JacobianMap(lambda values: _over_tokens(values, *held), v)


def network_in_network(
    v: Tensor, first: Tensor, second: Tensor, first_bias: Tensor, second_bias: Tensor, weight: Tensor
) -> tuple[Tensor, JacobianMap]:
    """y = (W2 GELU(W1 v + b1) + b2) * (v W): a mixer's token network gates a projection of the same features (Abdullah
    and Aydin, arXiv:2403.02411).

    v ``[B, H, N, E]``; token network as in ``token_mixer``; ``weight`` W ``[C, C]`` (out, in). The derivative has a
    diagonal part from the projection, and in all other places the token network's times the projection.
    """
    _check_network(v, first, second, first_bias, second_bias)
    check_tensor("weight", weight, (v.shape[1] * v.shape[3],) * 2)

    def gated(values: Tensor, projection: Tensor, *network: Tensor) -> Tensor:
        return _over_tokens(values, *network) * _over_channels(values, projection)

    network = (first, second, first_bias, second_bias)
    held = tuple(part.detach() for part in (weight, *network))
    return gated(v, weight, *network), JacobianMap(lambda values: gated(values, *held), v)


def activator(
    v: Tensor, gate: Tensor, value: Tensor, leave: Tensor, *, activation: str = "gelu"
) -> tuple[Tensor, JacobianMap]:
    """y = (f(v U) * (v W)) P: a gated linear unit in the place of attention (Abdullah and Aydin, arXiv:2405.15953).

    v ``[B, H, N, E]``; ``gate`` U and ``value`` W ``[hidden, C]``, ``leave`` P ``[C, hidden]``; f one of
    ``ACTIVATIONS``. It has no token mixing: the map is diagonal, and what it shows is how strongly each token passes.
    """
    if activation not in ACTIVATIONS:
        raise UnknownName("activation", activation, ACTIVATIONS)
    check_tensor("v", v, ("B", "H", "N", "E"))
    channels = v.shape[1] * v.shape[3]
    check_tensor("gate", gate, ("hidden", channels))
    check_tensor("value", value, tuple(gate.shape))
    check_tensor("leave", leave, (channels, gate.shape[0]))
    bend = ACTIVATIONS[activation]

    def unit(values: Tensor, first: Tensor, second: Tensor, last: Tensor) -> Tensor:
        x = values.transpose(1, 2).flatten(2)
        hidden = bend(x @ first.to(x.dtype).T) * (x @ second.to(x.dtype).T)
        return (hidden @ last.to(x.dtype).T).unflatten(2, (v.shape[1], -1)).transpose(1, 2)

    held = gate.detach(), value.detach(), leave.detach()
    return unit(v, gate, value, leave), JacobianMap(lambda values: unit(values, *held), v)


def _check_network(v: Tensor, first: Tensor, second: Tensor, first_bias: Tensor, second_bias: Tensor) -> None:
    check_tensor("v", v, ("B", "H", "N", "E"))
    check_tensor("first", first, ("hidden", v.shape[2]))
    check_tensor("second", second, (v.shape[2], first.shape[0]))
    check_tensor("first_bias", first_bias, (first.shape[0],))
    check_tensor("second_bias", second_bias, (v.shape[2],))


def _over_tokens(v: Tensor, first: Tensor, second: Tensor, first_bias: Tensor, second_bias: Tensor) -> Tensor:
    work = v.dtype
    hidden = functional.gelu(first.to(work) @ v + first_bias.to(work)[:, None])
    return second.to(work) @ hidden + second_bias.to(work)[:, None]


def _over_channels(v: Tensor, weight: Tensor) -> Tensor:
    x = v.transpose(1, 2).flatten(2) @ weight.to(v.dtype).T
    return x.unflatten(2, (v.shape[1], -1)).transpose(1, 2)


def _network_shapes(count: int) -> dict[str, tuple[int, ...]]:
    return {
        "v": (2, 2, count, 2), "first": (7, count), "second": (count, 7), "first_bias": (7,), "second_bias": (count,),
    }  # fmt: skip


def _mixer_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    return example_tensors(seed, dtype, **_network_shapes(count))


def _ninformer_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    return example_tensors(seed, dtype, **_network_shapes(count), weight=(4, 4))


def _activator_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    return example_tensors(seed, dtype, v=(2, 2, count, 2), gate=(6, 4), value=(6, 4), leave=(4, 6))


def _network_parts(parts: dict[str, Any]) -> dict[str, Any]:
    v = head_values(parts)
    n = v.shape[2]
    if n > LONGEST:
        raise WorkbenchError(f"the token network of a native model has weights for {LONGEST} tokens; got {n}")
    first, second = (parts[name].flatten(0, 1)[:, :n] for name in ("first", "second"))
    bias = {"first_bias": parts["first_bias"].flatten(), "second_bias": parts["second_bias"][:n]}
    return {"v": v, "first": first, "second": second.T, **bias}


def _ninformer_parts(parts: dict[str, Any]) -> dict[str, Any]:
    return {**_network_parts(parts), "weight": parts["weight"].flatten(2).flatten(0, 1)}


def _activator_parts(parts: dict[str, Any]) -> dict[str, Any]:
    gate, value, leave = (parts[name].flatten(2).flatten(0, 1) for name in ("gate", "value", "leave"))
    return {"v": head_values(parts), "gate": gate, "value": value, "leave": leave}


_NETWORK = {
    "first": Parameter(f"HE{LONGEST}", small), "second": Parameter(f"HE{LONGEST}", small),
    "first_bias": Parameter("HE"), "second_bias": Parameter(f"{LONGEST}"),
}  # fmt: skip

VARIANTS = (
    Variant(
        name="mlp-mixer",
        paper="MLP-Mixer: An all-MLP Architecture for Vision (2021)",
        family="nonlinear",
        priority="C",
        operator=token_mixer,
        example=_mixer_example,
        value_input=None,
        reference="timm models/mlp_mixer.py MixerBlock",
        recipe=Recipe(parameters=_NETWORK, prepare=_network_parts, ignores=UNUSED),
    ),
    Variant(
        name="ninformer",
        paper="#60 NiNformer: A Network in Network Transformer with Token Mixing Generated Gating Function (2024)",
        family="nonlinear",
        priority="C",
        operator=network_in_network,
        example=_ninformer_example,
        value_input=None,
        note="From the abstract and the formula; norms and residuals inside of the inner mixer are left out.",
        recipe=Recipe(
            parameters={**_NETWORK, "weight": Parameter("HEHE", small)}, prepare=_ninformer_parts, ignores=UNUSED
        ),
    ),
    Variant(
        name="activator",
        paper="#56 Activator: GLU Activations as The Core Functions of a Vision Transformer (2024)",
        family="nonlinear",
        priority="C",
        operator=activator,
        example=_activator_example,
        value_input=None,
        note="No token mixing: the map is diagonal.",
        recipe=Recipe(
            parameters={name: Parameter("HEHE", small) for name in ("gate", "value", "leave")},
            prepare=_activator_parts,
            ignores=UNUSED,
        ),
    ),
)  # fmt: skip
