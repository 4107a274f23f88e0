"""Attention between objects, points and images, where the geometry or another image enters the scores.

    BVR     s_ij = scale q_i . k_j + MLP_h(sinusoids(y_j - x_i)),      one softmax for each kind of key points, outputs added
    OAT     s_ij = scale (q_i + e(x_i)) . (k_j + e(y_j)),              e(x) sinusoids of both coordinates
    SCCA    own window:             scale q_i . k_j
            aligned support window: cos(q_i, k_j) / tau                one softmax over both

x and y are points of the plane. BVR's key points are sampled: of each kind the ``keep`` with the largest score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.catalogue import Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.mixers.chosen import RoutedSparseMap, best, check_side, chosen_keys
from workbench.mixers.grid_groups import whole_numbers
from workbench.mixers.image import check_grid
from workbench.mixers.relative import sinusoids
from workbench.mixers.scored import check_tensor, checked, masked_softmax
from workbench.mixers.softmax import softmax_attention
from workbench.patterns.algebra import KeysMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.sparse import SparseMap


def places(points: Tensor, width: int, base: float = 10000.0) -> Tensor:
    """Sinusoids ``[..., width]`` of points ``[..., 2]``: half of the width for each coordinate."""
    return torch.cat([sinusoids(points[..., axis], width // 2, base) for axis in (0, 1)], -1)


def bridging_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_at: Tensor,
    key_at: Tensor,
    inner: Tensor,
    outer: Tensor,
    *,
    kinds: Sequence[int],
    points: Tensor | None = None,
    keep: int | None = None,
    scale: float | None = None,
) -> tuple[Tensor, KeysMap]:
    """Bridging visual representations: anchors q ``[B, H, Q, E]`` read key points k ``[B, G, K, E]``, v ``[B, G, K, V]``.

    ``kinds`` are the numbers of key points of each kind, side by side (corners, then centres); each kind has a softmax of its
    own and the outputs are added, so rows sum to the number of kinds. ``query_at`` ``[B, Q, 2]`` and ``key_at`` ``[B, K, 2]`` are
    positions; the sinusoids ``[F]`` of their differences pass ``inner`` ``[F, D]``, a ReLU and ``outer`` ``[D, H]``, shared by
    the kinds. With ``keep``, only the points with the largest ``points`` ``[B, K]`` of each kind are read.

    Source: Chi et al., RelationNet++, arXiv:2010.15831, section 3, and its code (microsoft/RelationNet2).
    """
    b, h, n, m = checked(q, k, v, Mask())
    check_tensor("query_at", query_at, (b, n, 2))
    check_tensor("key_at", key_at, (b, m, 2))
    check_tensor("inner", inner, ("F", "D"))
    check_tensor("outer", outer, (inner.shape[1], h))
    if inner.shape[0] % 4:
        raise WorkbenchError(
            f"inner takes sines and cosines of two coordinates, F a multiple of 4; got {inner.shape[0]}"
        )
    if not whole_numbers(kinds) or sum(kinds) != m:
        raise WorkbenchError(f"kinds are numbers of key points that sum to {m}; got {kinds!r}")
    sizes = list(kinds)
    if (points is None) != (keep is None):
        raise WorkbenchError("points and keep go together: scores of key points, and how many of each kind are read")
    away = key_at[:, None] - query_at[:, :, None]
    work = working_dtype(q.dtype)
    geometry = (places(away, inner.shape[0]).to(work) @ inner.to(work)).relu() @ outer.to(work)
    outs, maps = [], []
    scored = torch.zeros(b, m) if points is None else points
    check_tensor("points", scored, (b, m))
    parts = zip(*(x.split(sizes, axis) for x, axis in ((k, 2), (v, 2), (geometry, 2), (scored, 1))), strict=True)
    for keys, values, bias, score in parts:
        read = None if keep is None else best(score, keep, torch.ones_like(score, dtype=torch.bool), name="keep")
        each = softmax_attention(q, keys, values, mask=Mask(keys=read), scale=scale, bias=bias.permute(0, 3, 1, 2))
        each[1].row_sum = "1"
        outs.append(each[0])
        maps.append(each[1])
    return torch.stack(outs).sum(0), KeysMap(*maps, row_sum="1" if len(sizes) == 1 else "free")


def object_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fixations: Tensor,
    objects: Tensor,
    *,
    base: float = 10000.0,
    mask: Mask = Mask(),
    scale: float | None = None,
) -> tuple[Tensor, SoftmaxMap]:
    """Object-level attention of a scanpath decoder: steps q ``[B, H, Q, E]`` over the objects of an image, k ``[B, G, K, E]`` and
    v ``[B, G, K, V]``, E a multiple of 4.

    The sinusoids of where the gaze was (``fixations`` ``[B, Q, 2]``) and of the objects (``objects`` ``[B, K, 2]``) are added to
    queries and keys, so that two near points have a large product. ``mask.keys`` hides padding, as images have different numbers
    of objects. Source: Fang et al., OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction.
    """
    b, _, n, m = checked(q, k, v, mask)
    width = q.shape[3]
    if width % 4:
        raise WorkbenchError(f"q has sines and cosines of two coordinates added, E a multiple of 4; got {width}")
    check_tensor("fixations", fixations, (b, n, 2))
    check_tensor("objects", objects, (b, m, 2))
    placed_q, placed_k = (x + places(at, width, base)[:, None].to(x.dtype) for x, at in ((q, fixations), (k, objects)))
    return softmax_attention(placed_q, placed_k, v, mask=mask, scale=scale)


class CalibratedMap(RoutedSparseMap):
    """Weights over the own window and the aligned support window.

    ``alignment`` ``[B, W, W]`` (also ``native()``) is the similarity of each query window with each support window, in 0 .. 1 and
    0 where that holds no foreground; ``aligned`` ``[B, W]`` the window chosen."""

    def __init__(self, executed: SparseMap, alignment: Tensor, aligned: Tensor) -> None:
        super().__init__(executed, alignment)
        self.alignment, self.aligned = self.router, aligned


def self_calibrated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Tensor,
    support: Tensor,
    foreground: Tensor,
    *,
    grid: tuple[int, int],
    window: int = 8,
    temperature: float = 1.0,
    scale: float | None = None,
) -> tuple[Tensor, CalibratedMap]:
    """Self-calibrated cross-attention: every window of a query image attends to itself and to the support window most like it.

    q ``[B, H, N, E]`` of an image of ``grid`` rows and columns; k ``[B, G, 2 N, E]`` and v ``[B, G, 2 N, V]`` of the query image,
    then of the support image. Windows have ``window`` x ``window`` tokens (those at the ends may be smaller) and are aligned by
    the cosine of the means of ``features`` and of the ``foreground`` (``[B, N]``, 0 .. 1) of ``support``, both ``[B, N, D]``.
    ``temperature`` divides the cosines of the cross part.

    Source: Xu et al., Self-Calibrated Cross Attention Network for Few-Shot Segmentation, arXiv:2308.09294, and its code, which
    divides by 1.
    """
    check_tensor("q", q, ("B", "H", "N", "E"))
    b, h, n, e = q.shape
    check_tensor("k", k, (b, "G", 2 * n, e))
    check_tensor("v", v, (*k.shape[:3], "V"))
    if h % k.shape[1]:
        raise WorkbenchError(f"k: its {k.shape[1]} heads must divide the {h} heads of q")
    check_tensor("features", features, (b, n, "D"))
    check_tensor("support", support, (b, n, features.shape[2]))
    check_tensor("foreground", foreground, (b, n))
    check_side("window", window)
    grid = check_grid(grid, n)
    if not temperature > 0:
        raise WorkbenchError(f"temperature is positive; got {temperature}")
    at = torch.arange(n, device=q.device)
    number = at // grid[1] // window * -(-grid[1] // window) + at % grid[1] // window
    members = chosen_keys(F.one_hot(number).bool().T)
    alignment = _alignment(features.detach(), support.detach(), foreground.detach(), members)
    aligned = alignment.max(2).indices
    own, other = members.expand(b, -1, -1), members[aligned]
    work, groups = working_dtype(q.dtype), k.shape[1]
    rows = _at(q.to(work), own).unflatten(1, (groups, -1))
    factor = e**-0.5 if scale is None else scale
    near, far = _at(k.to(work)[:, :, :n], own)[:, :, None], _at(k.to(work)[:, :, n:], other)[:, :, None]
    cosine = F.normalize(rows, dim=-1) @ F.normalize(far, dim=-1).transpose(-1, -2) / temperature
    scores = torch.cat([factor * rows @ near.transpose(-1, -2), cosine], -1).flatten(1, 2)
    keys = torch.cat([own, (other + n).masked_fill(other < 0, -1)], 2)
    weights = masked_softmax(scores, (keys >= 0)[:, None, :, None])[0]
    values = torch.cat([_at(v[:, :, :n], own), _at(v[:, :, n:], other)], 3)[:, :, None]
    out = (weights.to(v.dtype).unflatten(1, (groups, -1)) @ values).flatten(1, 2)
    slot = (members == at[:, None, None]).flatten(1).int().argmax(1)
    listed = keys[:, number][:, None]
    found = SparseMap(listed, weights.detach().flatten(2, 3)[:, :, slot], 2 * n, kv_heads=groups)
    return out.flatten(2, 3)[:, :, slot], CalibratedMap(found, alignment, aligned)


def _at(x: Tensor, index: Tensor) -> Tensor:
    """Tokens of windows: x ``[B, G, N, E]`` at ``[B, W, L]`` (-1: any) to ``[B, G, W, L, E]``."""
    flat = index.clamp(min=0).flatten(1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, flat).unflatten(2, index.shape[1:])


def _alignment(features: Tensor, support: Tensor, foreground: Tensor, members: Tensor) -> Tensor:
    real = (members >= 0).to(features)
    spots = members.clamp(min=0)
    inside = foreground.to(features)[:, spots] * real
    ours = (features[:, spots] * real[..., None]).sum(2)
    theirs = (support.to(features)[:, spots] * inside[..., None]).sum(2)
    similar = (F.normalize(ours, dim=-1) @ F.normalize(theirs, dim=-1).transpose(1, 2) + 1) / 2
    return similar * (inside.sum(2) > 0)[:, None]


# ---------------------------------------------------------------------------- records


def _bridging_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, 5, 8), "k": (2, 4, tokens, 8), "v": (2, 4, tokens, 6), "points": (2, tokens)}
    geometry = {"query_at": (2, 5, 2), "key_at": (2, tokens, 2), "inner": (8, 6), "outer": (6, 4)}
    given = example_tensors(seed, dtype, **shapes, **geometry)
    corners = -(-tokens // 2)
    kinds = (corners, tokens - corners) if tokens > 1 else (1,)
    return {**given, "kinds": kinds, "keep": -(-tokens // 3)}


def _object_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, 5, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 6)}
    return example_tensors(seed, dtype, **shapes, fixations=(2, 5, 2), objects=(2, tokens, 2))


def _calibrated_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(tokens)
    n = grid[0] * grid[1]
    shapes = {"q": (2, 4, n, 8), "k": (2, 2, 2 * n, 8), "v": (2, 2, 2 * n, 6)}
    images = {"features": (2, n, 5), "support": (2, n, 5), "foreground": (2, n)}
    given = example_tensors(seed, dtype, **shapes, **images)
    return {**given, "foreground": given["foreground"].sigmoid(), "grid": grid, "window": 2}


VARIANTS = (
    Variant(
        name="bridging-visual-representations",
        paper="#2 RelationNet++: Bridging Visual Representations for Object Detection via Transformer Decoder (2020)",
        family="weighted softmax",
        priority="C",
        operator=bridging_attention,
        example=_bridging_example,
        reference="microsoft/RelationNet2 bvr_transformer",
        note="the reference reads the location embedding from a grid of precomputed differences; here it is computed exactly",
    ),
    Variant(
        name="object-level-attention",
        paper="#13 OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction (2024)",
        family="softmax",
        priority="C",
        operator=object_attention,
        example=_object_example,
        reference="the paper's abstract",
        note="the positional encoding is taken from general knowledge: sinusoids of both coordinates",
    ),
    Variant(
        name="self-calibrated-cross-attention",
        paper="#128 Self-Calibrated Cross Attention Network for Few-Shot Segmentation (2023)",
        family="routing",
        priority="C",
        operator=self_calibrated_attention,
        example=_calibrated_example,
        reference="Sam1224/SCCAN model/swin_sccan.py",
        note="windows that are not shifted; the reference shifts them in every other block",
    ),
)
