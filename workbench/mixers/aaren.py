"""Attention of a query that knows no input: every token gets the mean of its past by weights that belong to the keys.

    s_j = scale q . k_j,   o_i = sum_{j <= i} exp(s_j) v_j / sum_{j <= i} exp(s_j)

q is a learned vector of the layer. A prefix of tokens is the triple (m, u, w): the largest score, sum exp(s - m) and
sum exp(s - m) v; joining two is associative, so that all prefixes come out of a scan, and one more token costs constant memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Parameter, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.mixers.linear import causal_option
from workbench.mixers.scored import check_tensor
from workbench.patterns.prefix import PrefixSoftmaxMap, prefix_softmax


def aaren_attention(
    query: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None
) -> tuple[Tensor, PrefixSoftmaxMap]:
    """Aaren: query ``[H, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]`` to ``[B, H, N, V]``.

    M_ij = exp(s_j) / sum_{j' <= i} exp(s_j') for j <= i with s_j = scale query_h . k_j; ``scale=None`` is ``E ** -0.5``. The map
    holds the N scores, which are its ``native()``. Source: Feng et al., arXiv:2405.13956, section 3.
    """
    check_tensor("k", k, ("B", "G", "N", "E"))
    b, g, n, e = k.shape
    check_tensor("v", v, (b, g, n, "V"))
    check_tensor("query", query, ("H", e))
    h = query.shape[0]
    if h % g:
        raise WorkbenchError(f"query has a multiple of the {g} heads of k; got {h}")
    work = torch.promote_types(working_dtype(k.dtype), v.dtype)
    rows = query.to(work).view(g, h // g, e) * (e**-0.5 if scale is None else scale)
    scores = (rows @ k.to(work).transpose(-1, -2)).view(b, h, n)
    out, _ = prefix_softmax(scores, v.to(work).repeat_interleave(h // g, 1))
    return out.to(v.dtype), PrefixSoftmaxMap(scores, kv_heads=g)


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return example_tensors(seed, dtype, query=(4, 6), k=(2, 2, tokens, 6), v=(2, 2, tokens, 5))


def _prepare(made: dict[str, Any]) -> dict[str, Any]:
    causal_option(made["mask"])
    return {name: made[name] for name in ("query", "k", "v")}


VARIANTS = (
    Variant(
        name="aaren",
        paper="#53 Attention as an RNN (2024)",
        family="linear",
        priority="C",
        operator=aaren_attention,
        example=_example,
        causal=True,
        reference="the paper's recurrence of (m, u, w)",
        note="No official code was found; prefixes are scanned in chunks, not in a tree.",
        recipe=Recipe(parameters={"query": Parameter("HE", torch.randn)}, prepare=_prepare, ignores=("q",)),
    ),
)
