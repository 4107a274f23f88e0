"""Attention that borrows from convolutions and graphs: fixed affinities, convolved projections, pooled keys, edges.

UniFormer, shallow     y_ic = sum_j a_c(i - j) v_jc           a learned table of offsets, no similarity
ConvShareViT           softmax of q, k that one convolution makes of every token's embedding, taken as an image
FMViT                  softmax(q k_pooled) over average-pooled keys and values, projections summed over branches
graph attention        softmax over the edges of a graph of leaky additive scores
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.attention_map import AttentionMap
from workbench.catalogue import Learned, Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.mixers.channels import (
    channel_map,
    check_odd,
    check_sides,
    check_values,
    correlate,
    correlation_map,
    planes,
    tokens,
)
from workbench.mixers.gating import UNUSED, head_values, small
from workbench.mixers.image import Grid, grid_of, taps, windows
from workbench.mixers.local import masked_softmax
from workbench.mixers.scored import check_tensor
from workbench.mixers.softmax import softmax_attention
from workbench.patterns.algebra import ProductMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.sparse import SparseMap

PADDINGS = ("valid", "same")


def local_affinity(v: Tensor, table: Tensor, *, grid: tuple[int, ...]) -> tuple[Tensor, AttentionMap]:
    """y_ic = sum_j a_c(i - j) v_jc over the neighbours in a window: UniFormer's relation aggregator in shallow layers
    (Li et al., arXiv:2201.09450).

    v ``[B, H, N, E]`` over a ``grid`` of an image or a video; ``table`` ``[C, side, side]`` or
    ``[C, side, side, side]`` of odd sides, 5 in the paper: the affinity of every channel c = h*E + e by offset. It does
    not look at the input; there is no softmax.
    """
    _, h, n, e = check_values(v)
    sides = check_sides(grid, n)
    check_odd("table", table, h * e, len(sides))
    out = correlate(planes(v), table, sides)
    return tokens(out, h), channel_map(correlation_map(table, sides, batch=v.shape[0]), e)


def shared_convolution_attention(
    x: Tensor, v: Tensor, query: Tensor, key: Tensor, *, padding: str = "valid", scale: float | None = None
) -> tuple[Tensor, SoftmaxMap]:
    """Softmax attention whose queries and keys are convolutions of each token's embedding, one kernel per head for all
    tokens.

    x ``[B, N, rows, columns]``: token embeddings laid out as images, as an optical 4f system sees them; ``query`` and
    ``key`` ``[H, a, b]``; v ``[B, G, N, V]``. Without padding (``"valid"``) a query is the
    ``(rows - a + 1) (columns - b + 1)`` numbers that a kernel finds; with ``"same"`` it is as large as the embedding,
    odd kernels only.
    """
    if padding not in PADDINGS:
        raise UnknownName("padding", padding, PADDINGS)
    check_tensor("x", x, ("B", "N", "rows", "columns"))
    check_tensor("query", query, ("H", "a", "b"))
    check_tensor("key", key, tuple(query.shape))
    heads, *kernel = query.shape
    if any(side > length for side, length in zip(kernel, x.shape[2:], strict=True)):
        raise WorkbenchError(f"kernels fit into embeddings of {list(x.shape[2:])}; got {kernel}")
    if padding == "same" and any(side % 2 == 0 for side in kernel):
        raise WorkbenchError(f"a kernel that keeps the size has odd sides; got {kernel}")

    def convolved(weight: Tensor) -> Tensor:
        images = functional.conv2d(x.flatten(0, 1)[:, None], weight.to(x.dtype)[:, None], padding=padding)
        return images.flatten(2).unflatten(0, x.shape[:2]).transpose(1, 2)

    if v.ndim == 4 and heads % v.shape[1] == 0:
        keys = convolved(key)
        return softmax_attention(
            convolved(query), keys, v.repeat_interleave(heads // v.shape[1], 1), mask=Mask(), scale=scale
        )
    raise WorkbenchError(f"v is [B, G, N, width] with G dividing {heads} heads; got {list(v.shape)}")


def lightweight_attention(
    q: Tensor, k: Tensor, v: Tensor, *, grid: Grid, pool: int = 2, scale: float | None = None
) -> tuple[Tensor, ProductMap]:
    """M = softmax(scale q k_p^T) A: FMViT's attention over keys and values averaged in ``pool`` x ``pool`` windows,
    with projections that training keeps in several branches (Tan et al., arXiv:2311.05707).

    q, k ``[R, B, H, N, E]``: R branches of the projection, which add up; v ``[B, H, N, V]``. A k_p = A k for the
    averaging A, whose windows are cut at the edge of the image. The map is the product of the attention to pooled keys
    and A.
    """
    check_tensor("q", q, ("R", "B", "H", "N", "E"))
    check_tensor("k", k, ("R", *q.shape[1:]))
    _, b, h, n, _ = q.shape
    check_tensor("v", v, (b, h, n, "V"))
    sides = check_sides(grid, n, 2)
    if pool < 1:
        raise WorkbenchError(f"a window has at least one token a side; got pool={pool}")
    at = windows((sides[0], sides[1]), pool, v.device)
    shares = (at >= 0).to(working_dtype(v.dtype))
    shares = shares / shares.sum(1, keepdim=True)

    def pooled(values: Tensor) -> Tensor:
        return (values[:, :, at.clamp(min=0)] * shares.to(values.dtype)[..., None]).sum(3)

    out, left = softmax_attention(q.sum(0), pooled(k.sum(0)), pooled(v), mask=Mask(), scale=scale)
    right = SparseMap(at[None, None], shares.expand(b, h, -1, -1), n)
    return out, ProductMap(left, right)


def graph_attention(
    x: Tensor, v: Tensor, target: Tensor, source: Tensor, neighbours: Tensor, *, slope: float = 0.2
) -> tuple[Tensor, SparseMap]:
    """alpha_ij = softmax over the neighbours j of i of leakyrelu(a . x_i + b . x_j) (Velickovic et al.,
    arXiv:1710.10903).

    x ``[B, H, N, F]`` and v ``[B, H, N, E]`` are features of the nodes, the same projection in the paper; ``target`` a
    and ``source`` b ``[H, F]``; ``neighbours`` ``[N, S]`` int64, -1 where a node has fewer, the node itself among them
    if it is to see itself. A node without edges gives zeros.
    """
    b, h, n, _ = check_values(v)
    check_tensor("x", x, (b, h, n, "F"))
    check_tensor("target", target, (h, x.shape[3]))
    check_tensor("source", source, tuple(target.shape))
    fits = neighbours.dtype == torch.int64 and neighbours.ndim == 2 and len(neighbours) == n
    if not fits or int(neighbours.max()) >= n or int(neighbours.min()) < -1:
        got = f"{neighbours.dtype} {list(neighbours.shape)}"
        raise WorkbenchError(f"neighbours are int64 [N, S] of 0 .. {n - 1} or -1; got {got}")
    work = working_dtype(x.dtype)
    from_target = torch.einsum("bhnf,hf->bhn", x.to(work), target.to(work))
    from_source = torch.einsum("bhnf,hf->bhn", x.to(work), source.to(work))
    at = neighbours.clamp(min=0)
    scores = functional.leaky_relu(from_target[..., None] + from_source[:, :, at], slope)
    weights = masked_softmax(scores, neighbours < 0)
    out = (weights.to(v.dtype)[..., None] * v[:, :, at]).sum(3)
    return out, SparseMap(neighbours[None, None], weights, n)


def _affinity_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(count, 3)
    n = grid[0] * grid[1] * grid[2]
    return {**example_tensors(seed, dtype, v=(2, 3, n, 1), table=(3, 5, 5, 5)), "grid": grid}


def _shared_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"x": (2, count, 4, 4), "v": (2, 2, count, 5), "query": (2, 3, 3), "key": (2, 3, 3)}
    return example_tensors(seed, dtype, **shapes)


def _lightweight_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(count)
    n = grid[0] * grid[1]
    shapes = {"q": (3, 2, 2, n, 4), "k": (3, 2, 2, n, 4), "v": (2, 2, n, 5)}
    return {**example_tensors(seed, dtype, **shapes), "grid": grid}


def _graph_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"x": (2, 2, count, 4), "v": (2, 2, count, 3), "target": (2, 4), "source": (2, 4)}
    generator = torch.Generator().manual_seed(seed)
    some = torch.rand(count, count, generator=generator).argsort(1)[:, :4]
    kept = torch.rand(some.shape, generator=generator) < 0.7
    own = torch.arange(count)[:, None]
    neighbours = torch.cat([own, some.masked_fill(~kept | (some == own), -1)], 1)
    return {**example_tensors(seed, dtype, **shapes), "neighbours": neighbours}


def _affinity_parts(parts: dict[str, Any]) -> dict[str, Any]:
    table = parts["table"].flatten(0, 1).unflatten(1, (5, 5))
    return {"v": head_values(parts), "table": table, "grid": grid_of(parts)}


def _shared_parts(parts: dict[str, Any]) -> dict[str, Any]:
    images = parts["embedding"].transpose(1, 2)
    kernels = {name: parts[name][:, None] for name in ("query", "key")}
    return {"x": images, "v": parts["v"], **kernels}


def _lightweight_parts(parts: dict[str, Any]) -> dict[str, Any]:
    heads = parts["q"].shape[1]
    k, v = parts["k"].repeat_interleave(heads // parts["k"].shape[1], 1), head_values(parts)
    q, k = torch.stack([parts["q"], parts["second_q"]]), torch.stack([k, parts["second_k"]])
    return {"q": q, "k": k, "v": v, "grid": grid_of(parts)}


def _graph_parts(parts: dict[str, Any]) -> dict[str, Any]:
    neighbours = taps(grid_of(parts), 3, device=parts["q"].device)
    vectors = {name: parts[name] for name in ("target", "source")}
    nodes = head_values(parts)
    return {"x": nodes, "v": nodes, **vectors, "neighbours": neighbours}


VARIANTS = (
    Variant(
        name="uniformer-local-affinity",
        paper="#126 UniFormer: Unifying Convolution and Self-attention for Visual Recognition (2022)",
        family="convolution",
        priority="C",
        operator=local_affinity,
        example=_affinity_example,
        reference="Sense-X/UniFormer CBlock",
        note="A video in the example, an image in native models. The deep layers are plain attention.",
        recipe=Recipe(
            parameters={"table": Parameter("HE25", small)}, prepare=_affinity_parts, ignores=UNUSED
        ),
    ),
    Variant(
        name="shared-convolution-attention",
        paper="#50 ConvShareViT: Enhancing Vision Transformers with Convolutional Attention Mechanisms for Free-Space Optical "
        "Accelerators (2025)",
        family="softmax",
        priority="C",
        operator=shared_convolution_attention,
        example=_shared_example,
        note="Known from the abstract: one kernel per head and projection is assumed.",
        recipe=Recipe(
            learned={"embedding": Learned("HE")},
            parameters={"query": Parameter("H3", small), "key": Parameter("H3", small)},
            prepare=_shared_parts,
            ignores=UNUSED,
        ),
    ),
    Variant(
        name="fmvit-lightweight-attention",
        paper="#138 FMViT: A multiple-frequency mixing Vision Transformer (2023)",
        family="two-stage",
        priority="C",
        operator=lightweight_attention,
        example=_lightweight_example,
        note="Known from the abstract: branches that merge into one projection, and pooled keys as in related hybrids, are "
        "assumed.",
        recipe=Recipe(learned={"second_q": Learned("HE"), "second_k": Learned("HE")}, prepare=_lightweight_parts),
    ),
    Variant(
        name="graph-attention",
        paper="#69 Tackling Incomplete Data in Air Quality Prediction: A Bayesian Deep Learning Framework for Uncertainty "
        "Quantification (2025)",
        family="weighted softmax",
        priority="C",
        operator=graph_attention,
        example=_graph_example,
        reference="torch_geometric GATConv",
        note="The paper's encoder is taken as graph attention of the usual form. In native models the graph is the 3x3 "
        "neighbourhood.",
        recipe=Recipe(
            parameters={"target": Parameter("HE", small), "source": Parameter("HE", small)},
            prepare=_graph_parts,
            ignores=UNUSED,
        ),
    ),
)  # fmt: skip
