"""Attention that does less: pruned tokens and heads, held keys, borrowed maps.

SpAtten    a_j += sum over heads and queries of P_hij, layer by layer; the ``keep`` tokens with the largest a go on, as
           queries and as keys; heads by the magnitude of their outputs likewise
DeltaLLM   s_ij = scale q_i . k_j inside of the last ``window`` keys, scale q_i . k^_j before, where k^_jc is k_jc if it moved
           by at least ``threshold`` since k_{j-1,c}, and k^_{j-1,c} otherwise
EchoAtt    o^l = P^{owner(l)} v^l: less critical layers use the map of another layer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.maps import GatedMap
from workbench.mixers.chosen import best, check_side
from workbench.mixers.grid_groups import whole_numbers
from workbench.mixers.scored import check_tensor, checked, masked_softmax, plain_scores, visible, weighted
from workbench.mixers.softmax import softmax_attention
from workbench.patterns.softmax import SoftmaxMap


class CascadeMap(GatedMap):
    """The map of a layer of a cascade: ``raw`` over surviving tokens, pruned heads gated to zero.

    ``survivors`` ``[B, K]`` and ``kept_heads`` ``[B, H]`` are bool; ``importance`` ``[B, K]`` (also ``native()``) and
    ``head_importance`` ``[B, H]`` are what the next layer is given: the sums so far and this layer's part."""

    def __init__(
        self, raw: SoftmaxMap, kept_heads: Tensor, survivors: Tensor, before: Tensor, head_importance: Tensor
    ) -> None:
        gate = kept_heads[:, :, None].to(raw.scores.dtype).expand(raw.shape[:3])
        super().__init__(raw, gate)
        self.row_sum = "<=1"  # a head's gate is 1 also in the rows of pruned tokens
        self.survivors, self.kept_heads = survivors, kept_heads
        self._before, self.head_importance = before.detach(), head_importance.detach()

    @property
    def importance(self) -> Tensor:
        return self._before + self.received().sum(1).to(self._before)

    def native(self) -> Tensor:
        """Cumulative importance of each token."""
        return self.importance


def spatten_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    importance: Tensor | None = None,
    head_importance: Tensor | None = None,
    *,
    keep: int | None = None,
    keep_heads: int | None = None,
    mask: Mask = Mask(causal=True),
    scale: float | None = None,
) -> tuple[Tensor, CascadeMap]:
    """One layer of SpAtten's cascade: q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]``.

    ``importance`` ``[B, K]`` and ``head_importance`` ``[B, H]`` are those of the layer before (None in the first: zeros). The
    ``keep`` most important tokens take part, as keys and as queries (rows of the others are zero), and the ``keep_heads`` most
    important heads; None keeps all, ties go to the first. What is pruned stays pruned in later layers that keep no more, as it
    gains nothing.

    Source: Wang et al., SpAtten, arXiv:2012.09852; the local pruning of values and the progressive quantisation of the
    accelerator are left out.
    """
    b, h, n, m = checked(q, k, v, mask)
    work = working_dtype(q.dtype)
    before = torch.zeros(b, m, dtype=work, device=q.device) if importance is None else importance
    check_tensor("importance", before, (b, m))
    heads_before = torch.zeros(b, h, dtype=work, device=q.device) if head_importance is None else head_importance
    check_tensor("head_importance", heads_before, (b, h))
    survivors = _most(before, keep, "keep", mask.keys)
    kept_heads = _most(heads_before, keep_heads, "keep_heads", None)
    rows = mask.queries
    if mask.offset + n <= m:
        own = survivors[:, mask.offset : mask.offset + n]
        rows = own if rows is None else rows.expand(b, n) & own
    out, raw = softmax_attention(q, k, v, mask=replace(mask, keys=survivors, queries=rows), scale=scale)
    out = out * kept_heads[:, :, None, None].to(out.dtype)
    magnitude = heads_before + out.detach().abs().sum((2, 3)).to(heads_before)
    return out, CascadeMap(raw, kept_heads, survivors, before, magnitude)


def _most(importance: Tensor, keep: int | None, name: str, real: Tensor | None) -> Tensor:
    allowed = torch.ones_like(importance, dtype=torch.bool)
    allowed = allowed if real is None else allowed & real
    return allowed if keep is None else best(importance, keep, allowed, name=name)


class HeldKeysMap(SoftmaxMap):
    """The map with keys held where they moved little, ``held`` ``[B, G, K, E]``; ``plain`` is the map of full attention."""

    def __init__(self, plain: SoftmaxMap, held: Tensor, bias: Any) -> None:
        s = plain.scores
        super().__init__(s.q, s.k, mask=s.mask, scale=s.scale, bias=bias)
        self.plain, self.held = plain, held

    def error(self, lo: int, hi: int) -> Tensor:
        """Rows ``[lo, hi)`` of this map minus those of full attention."""
        return self.rows(lo, hi) - self.plain.rows(lo, hi)

    def reused(self) -> Tensor:
        """Share of numbers of each key that were held, ``[B, G, K]``."""
        return (self.held != self.plain.scores.k).to(self.held.dtype).mean(-1)


def held_keys(k: Tensor, threshold: float) -> Tensor:
    """``k`` ``[B, G, K, E]`` with every channel held at its last value that differed by at least ``threshold`` from the one
    before it."""
    moved = torch.ones_like(k, dtype=torch.bool)
    moved[:, :, 1:] = k.detach().diff(dim=2).abs() >= threshold
    places = torch.arange(k.shape[2], device=k.device)[:, None].expand_as(k)
    return k.gather(2, places.masked_fill(~moved, 0).cummax(2).values)


def delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    threshold: float,
    window: int,
    mask: Mask = Mask(causal=True),
    scale: float | None = None,
) -> tuple[Tensor, HeldKeysMap]:
    """DeltaLLM: q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]``; exact scores in the last ``window`` keys of a query,
    scores of held keys before them.

    A channel whose change from one key to the next is below ``threshold`` adds nothing to the product that is carried on. Rows
    are softmax rows of these scores: ``map.error(lo, hi)`` is their distance from full attention.
    """
    _, _, n, m = checked(q, k, v, mask)
    found = held_keys_map(q, k, threshold=threshold, window=window, mask=mask, scale=scale)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    moved = (held_keys(k, threshold) - k).to(working_dtype(k.dtype))
    far = _outside(window, mask.offset, 0, n, m, q.device)
    scores = plain_scores(q, k, factor) + plain_scores(q, moved, factor) * far
    weights, found._lse = masked_softmax(scores, visible(mask, n, m, q.device))
    return weighted(weights, v), found


def held_keys_map(
    q: Tensor,
    k: Tensor,
    *,
    threshold: float,
    window: int,
    mask: Mask = Mask(causal=True),
    scale: float | None = None,
) -> HeldKeysMap:
    """The map of ``delta_attention`` alone, in memory linear in the tokens."""
    check_side("window", window)
    if not threshold >= 0:
        raise WorkbenchError(f"threshold is a distance of keys, not negative; got {threshold}")
    queries, keys = q.detach(), k.detach()
    held = held_keys(keys, threshold)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    shift = (held - keys).to(working_dtype(k.dtype))

    def bias(lo: int, hi: int) -> Tensor:
        far = _outside(window, mask.offset, lo, hi, k.shape[2], q.device)
        return plain_scores(queries[:, :, lo:hi], shift, factor) * far

    return HeldKeysMap(SoftmaxMap(q, k, mask=mask, scale=factor), held, bias)


def _outside(window: int, offset: int, lo: int, hi: int, keys: int, device: torch.device) -> Tensor:
    """Keys before the last ``window`` of each query, ``[hi - lo, K]``."""
    rows = torch.arange(lo, hi, device=device)[:, None] + offset
    return rows - torch.arange(keys, device=device) >= window


class EchoMap(SoftmaxMap):
    """Maps of all layers side by side as heads, some of them the same: layer l has that of ``owners[l]``.

    ``native()`` holds the maps that were computed, one layer of heads per distinct owner, in order."""

    def __init__(self, executed: SoftmaxMap, owners: tuple[int, ...], computed: SoftmaxMap) -> None:
        s = executed.scores
        super().__init__(s.q, s.k, executed._lse, mask=s.mask, scale=s.scale)
        self.owners, self.computed = owners, computed

    def native(self) -> SoftmaxMap:
        """The maps that were computed."""
        return self.computed


def echo_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    owners: Sequence[int],
    mask: Mask = Mask(causal=True),
    scale: float | None = None,
) -> tuple[Tensor, EchoMap]:
    """EchoAtt over a stack of layers: q ``[B, L H, Q, E]``, k ``[B, L G, K, E]``, v ``[B, L G, K, V]``, layer after layer.

    ``owners`` names for each of the L layers the layer whose attention map it uses: itself, or an earlier one that uses its own.
    Queries and keys of the other layers are never read. Source: EchoAtt: Attend, Copy, then Adjust for More Efficient Large
    Language Models; which layers are less critical is found there by the similarity of their maps.
    """
    _, h, _, _ = checked(q, k, v, mask)
    if not whole_numbers(owners, 0):
        raise WorkbenchError(f"owners are numbers of layers, one for each; got {owners!r}")
    owner = tuple(owners)
    layers, g = len(owner), k.shape[1]
    if not layers or h % layers or g % layers:
        raise WorkbenchError(f"owners name one layer for each: {layers} do not divide {h} heads and {g} key heads")
    if any(not 0 <= o <= i or owner[o] != o for i, o in enumerate(owner)):
        raise WorkbenchError(f"owners are layers up to the own one that own their map; got {owner}")
    at_q = torch.tensor(owner, device=q.device)[:, None] * (h // layers) + torch.arange(h // layers, device=q.device)
    at_k = torch.tensor(owner, device=q.device)[:, None] * (g // layers) + torch.arange(g // layers, device=q.device)
    out, executed = softmax_attention(q[:, at_q.flatten()], k[:, at_k.flatten()], v, mask=mask, scale=scale)
    own = [i for i, o in enumerate(owner) if i == o]
    computed = SoftmaxMap(q[:, at_q[own].flatten()], k[:, at_k[own].flatten()], mask=mask, scale=scale)
    return out, EchoMap(executed, owner, computed)


# ---------------------------------------------------------------------------- records


def _tensors(seed: int, tokens: int, dtype: torch.dtype, **more: tuple[int, ...]) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 6), **more}
    return {**example_tensors(seed, dtype, **shapes), "mask": Mask(causal=True)}


def _spatten_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    given = _tensors(seed, tokens, dtype, importance=(2, tokens), head_importance=(2, 4))
    positive = {name: given[name].abs() for name in ("importance", "head_importance")}
    return {**given, **positive, "keep": -(-2 * tokens // 3), "keep_heads": 3}


def _delta_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_tensors(seed, tokens, dtype), "threshold": 1.0, "window": 3}


def _echo_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 8, tokens, 8), "k": (2, 4, tokens, 8), "v": (2, 4, tokens, 6)}
    return {**example_tensors(seed, dtype, **shapes), "owners": (0, 1, 1, 3), "mask": Mask(causal=True)}


def prepare_delta(given: dict[str, Any]) -> dict[str, Any]:
    """Exact scores in the last 4 keys; changes of a key's channel below 0.5 are held."""
    return {**{name: given[name] for name in ("q", "k", "v", "mask")}, "threshold": 0.5, "window": 4}


VARIANTS = (
    Variant(
        name="cascade-token-and-head-pruning",
        paper="#112 SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning (2021)",
        family="routing",
        priority="C",
        operator=spatten_attention,
        example=_spatten_example,
        causal=True,
        reference="the paper's abstract",
        note="details from general knowledge; importances come from earlier layers, where later tokens gave to earlier ones",
    ),
    Variant(
        name="deltallm-attention",
        paper="#42 DeltaLLM: A Training-Free Framework Exploiting Temporal Sparsity for Efficient Edge LLM Inference (2025)",
        family="weighted softmax",
        priority="C",
        operator=delta_attention,
        example=_delta_example,
        causal=True,
        reference="the paper's abstract",
        note="how deltas are thresholded is taken from general knowledge: per channel, from one key to the next",
        recipe=Recipe(prepare=prepare_delta),
    ),
    Variant(
        name="echo-attention",
        paper="#49 EchoAtt: Attend, Copy, then Adjust for More Efficient Large Language Models (2024)",
        family="softmax",
        priority="B",
        operator=echo_attention,
        example=_echo_example,
        causal=True,
        reference="the paper's abstract",
        note="a stack of layers at once, so no single layer of a native model runs it",
    ),
)
