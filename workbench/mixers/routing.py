"""Routing: tokens, regions or connections are chosen by a router before the softmax.

    Routing Transformer   every cluster c takes the ``width`` queries and the ``width`` keys nearest to its centroid (cosine);
                          softmax inside of clusters; a token's output is the mean over the clusters that took it, zero if none
    BiFormer              regions have mean queries and keys; each region reads the tokens of its ``top`` best regions
    Sparsifiner           connectivity C = softmax(q' k'^T B_in) |B_out|^T of rank n; each token reads the ``budget`` keys with
                          the largest C

Routers are not differentiated; gradients reach what the softmax is made of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from workbench.attention_map import AttentionMap
from workbench.catalogue import Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.mixers.chosen import RoutedSparseMap, best, check_side, chosen_keys
from workbench.mixers.image import check_grid
from workbench.mixers.local import grouped_softmax, local_softmax
from workbench.mixers.scored import check_tensor, checked, masked_softmax, plain_scores, visible
from workbench.patterns.sparse import SparseMap


def routing_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    centroids: Tensor,
    *,
    width: int,
    mask: Mask = Mask(),
    scale: float | None = None,
) -> tuple[Tensor, RoutedSparseMap]:
    """Attention inside of k-means clusters: q ``[B, H, N, E]``, v ``[B, H, N, V]``, centroids ``[H, C, E]``.

    Each cluster takes the ``width`` queries and the ``width`` keys with the largest cosine to its centroid. Where k
    ``[B, H, N, E]`` is None the keys are the queries, as in the paper's decoder: a routed token then always sees itself. A
    causal mask holds inside of clusters; which tokens they take still depends on later ones. The map has
    ``width`` weights per row and cluster; rows that no cluster took are zero, and so is the part of a cluster in which a row
    sees nothing. ``map.native()`` ``[B, H, C, N]`` are the cosines of the keys.

    Source: Roy et al., arXiv:2003.05997, algorithm 1; the mean over clusters as in lucidrains/routing-transformer. Centroids
    follow the mean of their tokens (decay 0.999) outside of this function.
    """
    keys = q if k is None else k
    b, h, n, m = checked(q, keys, v, mask)
    if keys.shape[1] != h:
        raise WorkbenchError(f"k has the {h} heads of q, as clusters choose by head; got {keys.shape[1]}")
    check_tensor("centroids", centroids, (h, "C", q.shape[3]))
    check_side("width", width)
    work = working_dtype(q.dtype)
    middle = F.normalize(centroids.detach().to(work), dim=-1)
    near_q, near_k = (middle @ F.normalize(x.detach().to(work), dim=-1).transpose(-1, -2) for x in (q, keys))
    taken_q, taken_k = (
        near.sort(dim=-1, descending=True, stable=True).indices[..., :width].sort(-1).values
        for near in (near_q, near_k)
    )
    inner_q, inner_k, inner_v = _rows(q, taken_q), _rows(keys, taken_k), _rows(v, taken_k)
    allowed = _pairs(mask, taken_q, taken_k, n, m)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    weights, _ = masked_softmax(inner_q.to(work) * factor @ inner_k.to(work).transpose(-1, -2), allowed)
    times = torch.zeros(b, h, n, dtype=work, device=q.device)
    flat = taken_q.flatten(2)
    times.scatter_add_(2, flat, torch.ones_like(flat, dtype=work))
    share = 1 / times.gather(2, flat)
    parts = (weights.to(v.dtype) @ inner_v).flatten(2, 3) * share[..., None].to(v.dtype)
    index = flat[..., None].expand(-1, -1, -1, v.shape[3])
    out = torch.zeros_like(parts[:, :, :1]).expand(-1, -1, n, -1).scatter_add(2, index, parts)
    shared = weights.detach() * share.view(*taken_q.shape, 1)
    return out, RoutedSparseMap(_by_token(taken_q, taken_k, shared, n, m, mask.offset), near_k)


def _rows(x: Tensor, at: Tensor) -> Tensor:
    """Tokens of clusters: x ``[B, H, N, E]`` at ``[B, H, C, W]`` to ``[B, H, C, W, E]``."""
    index = at.flatten(2)[..., None].expand(-1, -1, -1, x.shape[3])
    return x.gather(2, index).view(*at.shape, x.shape[3])


def _pairs(mask: Mask, queries: Tensor, keys: Tensor, n: int, m: int) -> Tensor:
    """What the mask allows inside of clusters, bool ``[B, H, C, W, W']``."""
    b, h = queries.shape[:2]
    table = visible(mask, n, m, queries.device).expand(b, h, n, m)
    cells = queries[..., None] * m + keys[..., None, :]
    return table.reshape(b, h, n * m).gather(2, cells.flatten(2)).view(cells.shape)


def _by_token(queries: Tensor, keys: Tensor, weights: Tensor, n: int, m: int, offset: int) -> SparseMap:
    """The weights of clusters ``[B, H, C, W, W']`` as rows of tokens: a row's clusters stand side by side."""
    b, h, clusters, width = queries.shape
    order = queries.flatten(2).sort(dim=-1, stable=True)
    places = torch.arange(clusters * width, device=queries.device).expand_as(order.values)
    rank = places - torch.searchsorted(order.values, order.values)
    most = int(rank.max()) + 1
    table = queries.new_full((b, h, n * most), -1).scatter_(2, order.values * most + rank, order.indices)
    slot = table.view(b, h, n, most)
    found = weights.flatten(2, 3).gather(
        2, slot.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, weights.shape[4])
    )
    listed = _rows(keys.to(weights.dtype), slot.clamp(min=0) // width).long()
    listed = listed.masked_fill((slot < 0)[..., None], -1)
    return SparseMap(listed.flatten(3), found.view(b, h, n, -1), m, offset=offset, row_sum="<=1")


def bilevel_routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: tuple[int, int],
    regions: int = 7,
    top: int = 4,
    scale: float | None = None,
) -> tuple[Tensor, RoutedSparseMap]:
    """BiFormer: q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]`` of an image of ``grid`` rows and columns, row by row.

    The image is cut into ``regions`` x ``regions`` windows (those at the ends may be smaller). A region's mean query times all
    regions' mean keys, over all heads together, ranks them; its tokens read those of the ``top`` best regions, the same for all
    heads. ``scale`` is ``(H E) ** -0.5`` by default, as released. ``map.native()`` is the router as a map over regions: softmax
    of the chosen scores.

    Source: Zhu et al., BiFormer, arXiv:2303.08810, section 3.2; the depth-wise convolution of v beside it is left out.
    """
    b, h, n, _ = checked(q, k, v, Mask())
    rows, columns = check_grid(grid, n)
    check_side("regions", regions)
    tall, wide = -(-rows // regions), -(-columns // regions)
    across = -(-columns // wide)
    place = torch.arange(n, device=q.device)
    region = place // columns // tall * across + place % columns // wide
    members = chosen_keys(F.one_hot(region).bool().T)
    count = len(members)
    factor = (h * q.shape[3]) ** -0.5 if scale is None else scale
    mean_q, mean_k = (_region_means(x.detach(), members) for x in (q, k.repeat_interleave(h // k.shape[1], 1)))
    scores = factor * mean_q @ mean_k.transpose(1, 2)
    kept = best(scores, top, torch.ones_like(scores, dtype=torch.bool))
    listed = members[chosen_keys(kept)].flatten(2)
    out, found = grouped_softmax(q, k, v, members[None, None], listed[:, None], scale=factor)
    router = masked_softmax(scores, kept)[0][:, None]
    assert router.shape == (b, 1, count, count)
    return out, RoutedSparseMap(found, AttentionMap.from_dense(router, offset=0, domain="block"))


def _region_means(x: Tensor, members: Tensor) -> Tensor:
    """``[B, H, N, E]`` to ``[B, regions, H E]``, means over the tokens ``members`` ``[regions, L]`` (-1 for none)."""
    real = (members >= 0)[..., None].to(x)
    total = (x[:, :, members.clamp(min=0)] * real).sum(3) / real.sum(1)
    return total.transpose(1, 2).flatten(2).to(working_dtype(x.dtype))


def sparsifiner_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    down_q: Tensor,
    down_k: Tensor,
    basis_in: Tensor,
    basis_out: Tensor,
    *,
    budget: int,
    scale: float | None = None,
    coefficient_scale: float | None = None,
) -> tuple[Tensor, RoutedSparseMap]:
    """Sparsifiner: q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]``; each token reads its ``budget`` best keys.

    The connectivity of a head is ``softmax(s (q down_q) (k down_k)^T basis_in) |basis_out|^T`` with ``down_q``, ``down_k``
    ``[E, c]`` and ``basis_in``, ``basis_out`` ``[N, n]``; s is ``H ** -0.5`` by default, as released. ``map.native()`` is the
    pair of its factors ``[B, H, N, n]`` and ``[n, N]``.

    Source: Wei et al., Sparsifiner, and its code; thresholds of the basis (zero there by default) are left out.
    """
    _, h, n, m = checked(q, k, v, Mask())
    width = q.shape[3]
    check_tensor("down_q", down_q, (width, "c"))
    check_tensor("down_k", down_k, (width, down_q.shape[1]))
    check_tensor("basis_in", basis_in, (m, "n"))
    check_tensor("basis_out", basis_out, (m, basis_in.shape[1]))
    work = working_dtype(q.dtype)
    with torch.no_grad():
        small = k.to(work) @ down_k.to(work)
        low_k = (small.transpose(-1, -2) @ basis_in.to(work)).transpose(-1, -2)
        factor = h**-0.5 if coefficient_scale is None else coefficient_scale
        coefficients = plain_scores(q.to(work) @ down_q.to(work), low_k, factor).softmax(-1)
        basis = basis_out.to(work).abs().T
        connected = coefficients @ basis
        kept = best(connected, budget, torch.ones_like(connected, dtype=torch.bool), name="budget")
        listed = chosen_keys(kept, min(budget, m))
    assert listed.shape[2] == n
    out, found = local_softmax(q, k, v, listed, scale=scale)
    return out, RoutedSparseMap(found, (coefficients, basis))


# ---------------------------------------------------------------------------- records


def _routing_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 3, tokens, 8), "k": (2, 3, tokens, 8), "v": (2, 3, tokens, 6), "centroids": (3, 4, 8)}
    return {**example_tensors(seed, dtype, **shapes), "width": -(-tokens // 3)}


def _biformer_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    rows, columns = nearest_grid(tokens)
    shapes = {name: (2, heads, rows * columns, 8) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    return {**example_tensors(seed, dtype, **shapes), "grid": (rows, columns), "regions": 2, "top": 2}


def _sparsifiner_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 6)}
    router = {"down_q": (8, 4), "down_k": (8, 4), "basis_in": (tokens, 5), "basis_out": (tokens, 5)}
    return {**example_tensors(seed, dtype, **shapes, **router), "budget": max(1, tokens // 4)}


def _normal(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape)


def prepare_routing(given: dict[str, Any]) -> dict[str, Any]:
    """Four clusters that take half of the tokens each."""
    heads = {name: given[name].repeat_interleave(given["q"].shape[1] // given[name].shape[1], 1) for name in ("k", "v")}
    return {"q": given["q"], **heads, "centroids": given["centroids"], "width": -(-given["q"].shape[2] // 2)}


def prepare_biformer(given: dict[str, Any]) -> dict[str, Any]:
    """At most 7 x 7 regions, about the root of the sides; each reads a quarter of them, at least one."""
    grid = given["grid"]
    regions = max(1, min(7, round(min(grid) ** 0.5)))
    top = max(1, regions * regions // 4)
    return {**{name: given[name] for name in ("q", "k", "v")}, "grid": grid, "regions": regions, "top": top}


def prepare_sparsifiner(given: dict[str, Any]) -> dict[str, Any]:
    """A basis of 8 vectors, learned for 64 tokens and interpolated to the image; a quarter of the keys is read."""
    n = given["k"].shape[2]
    tables = {name: _resized(given[name].view(1, 8, 64), n)[0].T for name in ("basis_in", "basis_out")}
    return {**{name: given[name] for name in ("q", "k", "v", "down_q", "down_k")}, **tables, "budget": -(-n // 4)}


def _resized(table: Tensor, tokens: int) -> Tensor:
    return F.interpolate(table, size=tokens, mode="linear", align_corners=True)


VARIANTS = (
    Variant(
        name="routing-transformer",
        paper="#25 Efficient Content-Based Sparse Attention with Routing Transformers (2020)",
        family="routing",
        priority="C",
        operator=routing_attention,
        example=_routing_example,
        reference="lucidrains/routing-transformer",
        note="clusters rank all tokens: with a causal mask the choice still looks at later ones; no memory keys, which the "
        "reference adds",
        recipe=Recipe(parameters={"centroids": Parameter("H4E", _normal)}, prepare=prepare_routing),
    ),
    Variant(
        name="bilevel-routing",
        paper="#34 BiFormer: Vision Transformer with Bi-Level Routing Attention (2023)",
        family="routing",
        priority="C",
        operator=bilevel_routing_attention,
        example=_biformer_example,
        reference="rayleizhu/BiFormer ops/bra_legacy.py",
        note="images that regions do not divide have smaller regions at the ends, where the reference pads with zeros",
        recipe=Recipe(prepare=prepare_biformer),
    ),
    Variant(
        name="sparsifiner",
        paper="#5 Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers (2023)",
        family="routing",
        priority="C",
        operator=sparsifiner_attention,
        example=_sparsifiner_example,
        reference="lim142857/Sparsifiner src/models/sparsifiner.py",
        note="patches only: the reference leaves the row of the class token whole",
        recipe=Recipe(
            parameters={
                "down_q": Parameter("E8", _normal),
                "down_k": Parameter("E8", _normal),
                "basis_in": Parameter("512", _normal),
                "basis_out": Parameter("512", _normal),
            },
            prepare=prepare_sparsifiner,
        ),
    ),
)
