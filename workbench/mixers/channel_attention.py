"""Attention between channels: tokens are the features, channels attend to channels. And the token attention it goes along with.

Layouts are channels first: ``[B, H, C, N]``, so that a map ``[B, H, C, C]`` mixes the rows of its values.

    DaViT        M = softmax(C^-1/2 K V^T),   o = M Q       the first release applies the map to the queries
    DaViT V2     M = softmax(N^-1/2 Q K^T),   o = M V
    CAM          M = softmax(-X X^T),         o = M X       least alike first: the released code subtracts from the row's maximum
    SparseGSA    M = relu(t Q' K'^T),         o = M V       Q' = Q / |Q| along tokens; no normaliser

DaViT's spatial half is softmax attention inside windows without any bias; windows beyond the edge are filled up with zeros that
take part in the softmax. PAM, beside CAM, is unscaled softmax attention of tokens with narrow queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.attention_map import AttentionMap
from workbench.catalogue import Learned, Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.mixers.image import Grid, check_grid, grid_of, spread, windows
from workbench.mixers.local import grouped_softmax
from workbench.mixers.scored import check_tensor, weighted
from workbench.mixers.softmax import softmax_attention
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.sparse import SparseMap


class ChannelSoftmaxMap(SoftmaxMap):
    """Softmax attention whose rows and columns are channels."""

    domain = "channel"

    def heads(self, indices: Sequence[int]) -> SoftmaxMap:
        found = super().heads(indices)
        found.domain = self.domain
        return found


def davit_channel_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
) -> tuple[Tensor, ChannelSoftmaxMap]:
    """Channel attention of the first DaViT release: q, k, v ``[B, H, C, N]``, the map of k and v is applied to q.

    ``scale=None`` is ``C ** -0.5``. Source: Ding et al., DaViT, arXiv:2204.03645, and its code.
    """
    _check(q, k, v)
    return _between_channels(k, v, q, q.shape[2] ** -0.5 if scale is None else scale)


def davit_channel_attention_v2(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
) -> tuple[Tensor, ChannelSoftmaxMap]:
    """Channel attention of DaViT's second version, as in Florence-2: q, k, v ``[B, H, C, N]``, the map of q and k is applied
    to v. ``scale=None`` is ``N ** -0.5``."""
    _check(q, k, v)
    return _between_channels(q, k, v, q.shape[3] ** -0.5 if scale is None else scale)


def davit_window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, grid: Grid, window: int = 7, scale: float | None = None
) -> tuple[Tensor, SparseMap]:
    """The spatial half of DaViT: attention inside windows, q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]``.

    What a window has beyond the edge of the image are keys and values of zeros, which take their share of the softmax, so rows
    of such windows sum to less than 1.
    """
    check_tensor("q", q, ("B", "H", "N", "E"))
    table = windows(check_grid(grid, q.shape[2]), window, q.device)[None, None]
    return grouped_softmax(q, k, v, table, table, scale=scale, zero_padding=True)


def channel_similarity_attention(x: Tensor, v: Tensor) -> tuple[Tensor, ChannelSoftmaxMap]:
    """CAM: channels attend to the channels least like them, x and v ``[B, H, C, N]``, in the network the same tensor.

    The released code takes the softmax of the row's maximum minus the products; the paper writes that of the products. Residual
    and its learned factor follow outside. Source: Sinha and Dolz, arXiv:1906.02849, after Fu et al., arXiv:1809.02983.
    """
    check_tensor("x", x, ("B", "H", "C", "N"))
    check_tensor("v", v, tuple(x.shape))
    return _between_channels(x, x, v, -1.0)


def position_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Mask = Mask()) -> tuple[Tensor, SoftmaxMap]:
    """PAM: unscaled softmax attention of tokens, q, k ``[B, H, N, E]`` an eighth as wide as v ``[B, H, N, V]``.

    Residual and its learned factor follow outside. Source: Sinha and Dolz, arXiv:1906.02849, after Fu et al., arXiv:1809.02983.
    """
    return softmax_attention(q, k, v, mask=mask, scale=1.0)


def sparse_global_attention(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> tuple[Tensor, AttentionMap]:
    """SparseGSA: q, k, v ``[B, H, C, N]``, ``temperature`` ``[H]``; only positive likeness counts, and nothing is normalised.

    Source: Li et al., DLGSANet, arXiv:2301.02031.
    """
    _check(q, k, v)
    check_tensor("temperature", temperature, (q.shape[1],))
    work = working_dtype(q.dtype)
    unit_q, unit_k = (functional.normalize(x.to(work), dim=-1) for x in (q, k))
    weights = functional.relu(unit_q @ unit_k.transpose(-1, -2) * temperature.to(work)[:, None, None])
    found = AttentionMap.from_dense(weights.detach(), offset=0, domain="channel", sign="nonnegative", row_sum="free")
    return weighted(weights, v), found


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_tensor("q", q, ("B", "H", "C", "N"))
    check_tensor("k", k, tuple(q.shape))
    check_tensor("v", v, tuple(q.shape))


def _between_channels(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, ChannelSoftmaxMap]:
    out, found = softmax_attention(q, k, v, mask=Mask(), scale=scale)
    return out, ChannelSoftmaxMap(q, k, found.lse, mask=Mask(), scale=scale)


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shape = (2, 2, 4, tokens)
    return example_tensors(seed, dtype, q=shape, k=shape, v=shape)


def _sparse_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_example(seed, tokens, dtype), **example_tensors(seed + 1000, dtype, temperature=(2,))}


def _window_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(tokens)
    n = grid[0] * grid[1]
    return {**example_tensors(seed, dtype, q=(2, 4, n, 6), k=(2, 2, n, 6), v=(2, 2, n, 5)), "grid": grid, "window": 3}


def _similarity_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    found = example_tensors(seed, dtype, x=(2, 1, 5, tokens))
    return {**found, "v": found["x"].clone()}


def _position_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return example_tensors(seed, dtype, q=(2, 1, tokens, 2), k=(2, 1, tokens, 2), v=(2, 1, tokens, 16))


def _channels_first(parts: dict[str, Any]) -> dict[str, Any]:
    heads = parts["q"].shape[1]
    return {name: spread(parts[name], heads).transpose(2, 3) for name in ("q", "k", "v")}


def _channels_last(out: Tensor) -> Tensor:
    return out.transpose(2, 3)


def _prepare_sparse(parts: dict[str, Any]) -> dict[str, Any]:
    return {**_channels_first(parts), "temperature": parts["temperature"]}


def _prepare_similarity(parts: dict[str, Any]) -> dict[str, Any]:
    own = spread(parts["v"], parts["q"].shape[1]).transpose(2, 3)
    return {"x": own, "v": own}


def _prepare_window(parts: dict[str, Any]) -> dict[str, Any]:
    return {**{name: parts[name] for name in ("q", "k", "v")}, "grid": grid_of(parts)}


def _prepare_position(parts: dict[str, Any]) -> dict[str, Any]:
    return {"q": parts["narrow_q"], "k": parts["narrow_k"], "v": spread(parts["v"], parts["q"].shape[1])}


_DAVIT = "#20 DaViT: Dual Attention Vision Transformers (2022)"
_GUIDED = "#10 Multi-scale self-guided attention for medical image segmentation (2019)"
_DLGSANET = (
    "#127 DLGSANet: Lightweight Dynamic Local and Global Self-Attention Networks for Image Super-Resolution (2023)"
)
_IN_MODELS = Recipe(prepare=_channels_first, finish=_channels_last)

VARIANTS = (
    Variant(
        name="davit-channel-attention",
        paper=_DAVIT,
        family="channel",
        priority="C",
        operator=davit_channel_attention,
        example=_example,
        value_input="q",
        reference="timm davit.py ChannelAttention",
        recipe=_IN_MODELS,
    ),
    Variant(
        name="davit-channel-attention-v2",
        paper=_DAVIT,
        family="channel",
        priority="C",
        operator=davit_channel_attention_v2,
        example=_example,
        reference="timm davit.py ChannelAttentionV2",
        recipe=_IN_MODELS,
    ),
    Variant(
        name="davit-window-attention",
        paper=_DAVIT,
        family="softmax",
        priority="C",
        operator=davit_window_attention,
        example=_window_example,
        reference="timm davit.py SpatialBlock",
        note="Keys of the padding are zero, as they are where projections have no bias.",
        recipe=Recipe(prepare=_prepare_window),
    ),
    Variant(
        name="channel-attention-module",
        paper=_GUIDED,
        family="channel",
        priority="C",
        operator=channel_similarity_attention,
        example=_similarity_example,
        reference="sinAshish/Multi-Scale-Attention src/models/attention.py CAM_Module",
        recipe=Recipe(prepare=_prepare_similarity, finish=_channels_last, ignores=("q", "k")),
    ),
    Variant(
        name="position-attention-module",
        paper=_GUIDED,
        family="softmax",
        priority="C",
        operator=position_attention,
        example=_position_example,
        reference="sinAshish/Multi-Scale-Attention src/models/attention.py PAM_Module",
        recipe=Recipe(
            learned={"narrow_q": Learned("H2"), "narrow_k": Learned("H2")},
            prepare=_prepare_position,
            ignores=("q", "k"),
        ),
    ),
    Variant(
        name="sparse-global-self-attention",
        paper=_DLGSANET,
        family="channel",
        priority="C",
        operator=sparse_global_attention,
        example=_sparse_example,
        reference="NeonLeexiang/DLGSANet basicsr/archs/dlgsanet_arch.py SparseAttention",
        recipe=Recipe(
            parameters={"temperature": Parameter("H", torch.ones)}, prepare=_prepare_sparse, finish=_channels_last
        ),
    ),
)
