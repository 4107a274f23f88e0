"""Multi-head latent attention (DeepSeek-V2): keys and values of all heads from one low-rank latent per token.

    k^h_j = [A_h c_j ; r_j],   v^h_j = C_h c_j,   q^h_i = [q^h_i ; p^h_i]            (r and p carry the rotary positions)
    s^h_ij = scale (q^h_i . A_h c_j + p^h_i . r_j),   scale = (E + R)^-1/2

The latent c_j has L numbers, r_j has R and is shared by the heads. *Expanded*, this is multi-head attention with H keys and
values per token. *Absorbed*, A moves to the query and C behind the sum, and what remains is multi-query attention over the
latents: s = scale ([A_h^T q_i ; p_i] . [c_j ; r_j]), o^h_i = C_h sum_j P^h_ij c_j. Only c and r are cached. Both forms have
the same weights P. Source: arXiv:2405.04434, section 2.1 and appendix C.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Learned, Parameter, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.scored import check_tensor
from workbench.mixers.softmax import softmax_attention
from workbench.patterns.softmax import SoftmaxMap


def latent_attention(
    q: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    up_key: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
) -> tuple[Tensor, SoftmaxMap]:
    """Latent attention in its expanded form: q ``[B, H, Q, E]``, q_rope ``[B, H, Q, R]``, latent ``[B, 1, K, L]``, k_rope
    ``[B, 1, K, R]``, up_key A ``[H, E, L]``, and the expanded values v ``[B, H, K, V]`` (``expand_values``).

    ``scale`` defaults to ``(E + R) ** -0.5``. Output ``[B, H, Q, V]``.
    """
    _check(q, q_rope, latent, k_rope, up_key)
    k = torch.einsum("bkl,hel->bhke", latent[:, 0], up_key)
    keys = torch.cat([k, k_rope.expand(-1, q.shape[1], -1, -1)], -1)
    out, found = softmax_attention(torch.cat([q, q_rope], -1), keys, v, mask=mask, scale=scale)
    found.value_space = "expanded V"
    return out, found


def absorbed_latent_attention(
    q: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    up_key: Tensor,
    v: Tensor,
    *,
    mask: Mask,
    scale: float | None = None,
) -> tuple[Tensor, SoftmaxMap]:
    """Latent attention in its absorbed form: the same weights over the latents themselves, v ``[B, 1, K, L]``.

    The output ``[B, H, Q, L]`` still has to be expanded (``expand_values``). The map holds one head of keys of L + R numbers.
    """
    _check(q, q_rope, latent, k_rope, up_key)
    queries = torch.cat([torch.einsum("bhqe,hel->bhql", q, up_key), q_rope], -1)
    scale = (q.shape[3] + q_rope.shape[3]) ** -0.5 if scale is None else scale
    out, found = softmax_attention(queries, torch.cat([latent, k_rope], -1), v, mask=mask, scale=scale)
    found.value_space = "latent V"
    return out, found


def expand_values(latent: Tensor, up_value: Tensor) -> Tensor:
    """C_h c ``[B, H, N, V]`` of latents ``[B, 1 or H, N, L]``, with up_value C ``[H, V, L]``."""
    return torch.einsum("bhnl,hvl->bhnv", latent.expand(-1, up_value.shape[0], -1, -1), up_value)


def _check(q: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up_key: Tensor) -> None:
    for name, part in (("q", q), ("q_rope", q_rope), ("latent", latent), ("k_rope", k_rope)):
        check_tensor(name, part, ("B", "heads", "tokens", "width"))
    (b, h, n, e), (m, r), width = q.shape, k_rope.shape[2:], latent.shape[3]
    wanted = {
        "q_rope": (q_rope, (b, h, n, r)),
        "latent": (latent, (b, 1, m, width)),
        "k_rope": (k_rope, (b, 1, m, r)),
        "up_key": (up_key, (h, e, width)),
    }
    for name, (part, shape) in wanted.items():
        check_tensor(name, part, shape)
        if part.dtype != q.dtype or part.device != q.device:
            want, got = f"{q.dtype} on {q.device} as q", f"{part.dtype} on {part.device}"
            raise WorkbenchError(f"{name} is {want}; got {got}")


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {
        "q": (2, 4, tokens, 6), "q_rope": (2, 4, tokens, 2), "latent": (2, 1, tokens, 3), "k_rope": (2, 1, tokens, 2),
        "up_key": (4, 6, 3), "v": (2, 4, tokens, 5),
    }  # fmt: skip
    return {**example_tensors(seed, dtype, **shapes), "mask": Mask(causal=True)}


def _prepare(given: dict[str, Any]) -> dict[str, Any]:
    """The layer's values, added up over its heads, are the latents; its keys, likewise, the shared rotary key."""
    latent, k_rope = (given[name].sum(1, keepdim=True) * given[name].shape[1] ** -0.5 for name in ("v", "k"))
    return {
        "q": given["content"],
        "q_rope": given["q"],
        "latent": latent,
        "k_rope": k_rope,
        "up_key": given["up_key"],
        "v": expand_values(latent, given["up_value"]),
        "mask": given["mask"],
    }


def _small(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * shape[-1] ** -0.5


VARIANTS = (
    Variant(
        name="multi-head-latent-attention",
        paper="DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model (2024)",
        family="softmax",
        priority="A",
        operator=latent_attention,
        example=_example,
        causal=True,
        reference="transformers DeepseekV3Attention",
        note="The normalisation of the latent and the low rank of the queries lie before this operator.",
        recipe=Recipe(
            learned={"content": Learned("HE")},
            parameters={"up_key": Parameter("HEE", _small), "up_value": Parameter("HEE", _small)},
            prepare=_prepare,
        ),
    ),
)
