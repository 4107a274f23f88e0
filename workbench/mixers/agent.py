"""Agent attention: a few averaged queries gather from the keys and hand on to all queries.

    a   = averages of q on a small grid                          n agents
    L   = softmax(scale q a^T + B_q),   R = softmax(scale a k^T + B_k)
    o_i = sum_j (L R)_ij v_j + (DW v)_i

L R has rank n at most and rows that sum to 1. The depthwise convolution DW of the values, which gives back the detail that few
agents cannot carry, is a band with coefficients of its own for every channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Parameter, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.mixers.channels import correlation_map
from workbench.mixers.grid_groups import whole_numbers
from workbench.mixers.image import Grid, check_grid, depthwise, grid_of, pooled, spread
from workbench.mixers.scored import check_tensor, masked_softmax, plain_scores, weighted
from workbench.patterns.algebra import ProductMap, SumMap
from workbench.patterns.per_channel import PerChannelMap
from workbench.patterns.softmax import SoftmaxMap


class AgentMap(SumMap):
    """The sum of ``attention``, the product through the agents, and ``band``, the convolution; ``native()`` are the two factors
    of the first, ``[B, H, N, n]`` and ``[B, H, n, N]``."""

    def __init__(self, attention: ProductMap, band: PerChannelMap) -> None:
        super().__init__(attention, band)
        self.attention, self.band = attention, band

    def native(self) -> tuple[AttentionMap, AttentionMap]:
        return self.attention.native()


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Tensor,
    *,
    grid: Grid,
    agents: Grid = (7, 7),
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, AgentMap]:
    """Attention through agents and a convolution of the values: q, k ``[B, H, N, E]``, v ``[B, H, N, V]``.

    ``agents`` is the grid of agents, ``kernel`` ``[H, V, s, s]`` the depthwise convolution; ``query_bias`` ``[H, N, n]`` and
    ``key_bias`` ``[H, n, N]`` are added to the logits of the two stages. Source: Han et al., Agent Attention,
    arXiv:2312.08874.
    """
    check_tensor("q", q, ("B", "H", "N", "E"))
    b, h, n, e = q.shape
    grid = check_grid(grid, n)
    check_tensor("k", k, (b, h, n, e))
    check_tensor("v", v, (b, h, n, "V"))
    if not whole_numbers(agents) or len(agents) != 2:
        raise WorkbenchError(f"agents is (rows, columns) of a grid of agents; got {agents!r}")
    count = agents[0] * agents[1]
    for name, bias, shape in (("query_bias", query_bias, (h, n, count)), ("key_bias", key_bias, (h, count, n))):
        if bias is not None:
            check_tensor(name, bias, shape)
    middle = pooled(q, grid, agents)
    gather, gather_lse = _stage(middle, k, key_bias, scale)
    broadcast, lse = _stage(q, middle, query_bias, scale)
    out = weighted(broadcast, weighted(gather, v)) + depthwise(v, kernel, grid)
    left = SoftmaxMap(q, middle, lse, mask=Mask(), scale=scale, bias=query_bias)
    right = SoftmaxMap(middle, k, gather_lse, mask=Mask(), scale=scale, bias=key_bias)
    band = PerChannelMap(correlation_map(kernel.flatten(0, 1), grid, batch=b), v.shape[3])
    return out, AgentMap(ProductMap(left, right), band)


def _stage(q: Tensor, k: Tensor, bias: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    scores = plain_scores(q, k, scale)
    return masked_softmax(scores if bias is None else scores + bias.to(scores.dtype))


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(tokens)
    n = grid[0] * grid[1]
    shapes = {"q": (2, 3, n, 4), "k": (2, 3, n, 4), "v": (2, 3, n, 4), "kernel": (3, 4, 3, 3)}
    found = example_tensors(seed, dtype, **shapes, query_bias=(3, n, 4), key_bias=(3, 4, n))
    return {**found, "grid": grid, "agents": (2, 2)}


def _prepare(parts: dict[str, Any]) -> dict[str, Any]:
    q = parts["q"]
    k, v = (spread(parts[name], q.shape[1]) for name in ("k", "v"))
    return {"q": q, "k": k, "v": v, "kernel": parts["kernel"].unflatten(-1, (3, 3)), "grid": grid_of(parts)}


def _small(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * 0.1


VARIANTS = (
    Variant(
        name="agent-attention",
        paper="#36 Agent Attention: On the Integration of Softmax and Linear Attention (2023)",
        family="two-stage",
        priority="C",
        operator=agent_attention,
        example=_example,
        reference="LeapLabTHU/Agent-Attention agent_transformer/models/agent_pvt.py",
        note="The biases are taken as they are; the network makes them of small tables.",
        recipe=Recipe(parameters={"kernel": Parameter("HE9", _small)}, prepare=_prepare),
    ),
)
