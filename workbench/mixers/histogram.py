"""Histogram self-attention: pixels are sorted by intensity, channel by channel, and bins of intensity attend to each other.

Rank r of channel c goes to bin f and place e of that bin:

    bins        r = f L + e    a bin holds neighbouring intensities
    frequency   r = e F + f    a bin holds every F-th intensity

with F bins of L = ceil(N / F) places; ranks from N on are padding with zeros. The tokens are the (channel, bin) pairs, their
features the L places, and the weights a softmax with one more key that holds nothing:

    A = exp(s) / (1 + sum exp(s)),   s = t_h q^ . k^,   q^ = q / |q|,   o_(c f) e = sum_(c' f') A_(c f)(c' f') v_(c' f') e

On pixels this is a map of (channel, pixel) pairs: each sees one pixel of every bin of every channel, the one in its own place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.attention_map import AttentionMap
from workbench.catalogue import Variant, example_tensors
from workbench.errors import UnknownName, WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.maps import GatedMap, head_index
from workbench.mixers.scored import check_tensor
from workbench.patterns.sparse import SparseMap

LAYOUTS = ("bins", "frequency")


class HistogramMap(SparseMap):
    """The map of (channel, pixel) pairs ``[B, H, C*N, C*N]``; ``native()`` is ``bins``, the map of (channel, bin) pairs."""

    def __init__(self, indices: Tensor, weights: Tensor, bins: AttentionMap) -> None:
        super().__init__(indices, weights, weights.shape[2], domain="channel", sign="nonnegative", row_sum="<=1")
        self.bins = bins

    def native(self) -> AttentionMap:
        return self.bins

    def heads(self, indices: Sequence[int]) -> HistogramMap:
        chosen = head_index(indices, self.shape[1])
        return HistogramMap(self.indices[:, chosen], self.weights[:, chosen], self.bins.heads(chosen))


def histogram_attention(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, temperature: Tensor, *, bins: int, layout: str
) -> tuple[Tensor, HistogramMap]:
    """One branch of histogram self-attention: q, k and the intensities x ``[B, H, C, N]``, v ``[B, H, C*N, 1]``.

    x says how the pixels of every channel are sorted; in the network it is v itself. ``temperature`` is ``[H]``, ``bins`` the
    number of bins per channel, ``layout`` ``"bins"`` or ``"frequency"``. Output ``[B, H, C*N, 1]``, in the pixels' own order.
    Source: Sun et al., Histoformer, arXiv:2407.10172.
    """
    b, h, c, n = _check(q, k, v, x, temperature, bins)
    if layout not in LAYOUTS:
        raise UnknownName("histogram layout", layout, LAYOUTS)
    length = -(-n // bins)
    order = x.sort(dim=-1, stable=True).indices
    q_in, k_in, v_in = (_binned(t, order, bins, layout) for t in (q, k, v.view(b, h, c, n)))
    work = working_dtype(q.dtype)
    logits = functional.normalize(q_in.to(work), dim=-1) @ functional.normalize(k_in.to(work), dim=-1).transpose(-1, -2)
    weights = _with_nothing(logits * temperature.to(work)[:, None, None])
    out = weights.to(v.dtype) @ v_in
    ranked = out.view(b, h, c, bins, length)
    ranked = (ranked if layout == "bins" else ranked.transpose(-1, -2)).flatten(3)[..., :n]
    out = ranked.gather(-1, order.argsort(-1)).view(b, h, c * n, 1)
    return out, _on_pixels(weights.detach(), order, bins, length, layout)


def histogram_bin_attention(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, temperature: Tensor, *, bins: int
) -> tuple[Tensor, HistogramMap]:
    """The branch whose bins hold neighbouring intensities, so that attention runs across the range of intensities;
    arguments as in ``histogram_attention``."""
    return histogram_attention(q, k, v, x, temperature, bins=bins, layout="bins")


def histogram_frequency_attention(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, temperature: Tensor, *, bins: int
) -> tuple[Tensor, HistogramMap]:
    """The branch whose bins hold every ``bins``-th intensity, so that attention runs among pixels of like intensity;
    arguments as in ``histogram_attention``."""
    return histogram_attention(q, k, v, x, temperature, bins=bins, layout="frequency")


def histogram_self_attention(
    q: Tensor,
    k: Tensor,
    q_frequency: Tensor,
    k_frequency: Tensor,
    v: Tensor,
    x: Tensor,
    temperature: Tensor,
    *,
    bins: int,
) -> tuple[Tensor, GatedMap]:
    """Both branches multiplied number by number, o = (A_bins v) * (A_frequency x), as the network does with x = v.

    Arguments as in ``histogram_attention``, with queries and keys for each branch. The map holds the second branch fixed as a
    gate; its ``raw`` is the map of the first.
    """
    _check(q, k, v, x, temperature, bins)
    for name, part in (("q_frequency", q_frequency), ("k_frequency", k_frequency)):
        check_tensor(name, part, tuple(q.shape))
    out, raw = histogram_bin_attention(q, k, v, x, temperature, bins=bins)
    other, _ = histogram_frequency_attention(q_frequency, k_frequency, x.reshape(v.shape), x, temperature, bins=bins)
    return out * other, GatedMap(raw, other.squeeze(-1))


def _check(q: Tensor, k: Tensor, v: Tensor, x: Tensor, temperature: Tensor, bins: int) -> tuple[int, int, int, int]:
    check_tensor("q", q, ("B", "H", "C", "N"))
    b, h, c, n = q.shape
    check_tensor("k", k, (b, h, c, n))
    check_tensor("x", x, (b, h, c, n))
    check_tensor("v", v, (b, h, c * n, 1))
    check_tensor("temperature", temperature, (h,))
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise WorkbenchError(f"bins is a positive number of bins per channel; got {bins!r}")
    return b, h, c, n


def _binned(t: Tensor, order: Tensor, bins: int, layout: str) -> Tensor:
    """``[B, H, C, N]`` sorted and padded, as (channel, bin) pairs ``[B, H, C*F, L]``."""
    n = t.shape[3]
    ranked = functional.pad(t.gather(-1, order), (0, -n % bins))
    split = ranked.unflatten(-1, (bins, -1)) if layout == "bins" else ranked.unflatten(-1, (-1, bins)).transpose(-1, -2)
    return split.flatten(2, 3)


def _with_nothing(logits: Tensor) -> Tensor:
    """Softmax with one more logit, 0, whose weight is dropped."""
    top = logits.detach().amax(-1, keepdim=True).clamp(min=0.0)
    weights = (logits - top).exp()
    return weights / (weights.sum(-1, keepdim=True) + (-top).exp())


def _on_pixels(weights: Tensor, order: Tensor, bins: int, length: int, layout: str) -> HistogramMap:
    """``weights`` ``[B, H, C*F, C*F]`` between bins as a map between pixels."""
    b, h, c, n = order.shape
    ranks = torch.arange(n, device=order.device)
    bin_of, place_of = (ranks // length, ranks % length) if layout == "bins" else (ranks % bins, ranks // bins)
    every = torch.arange(bins, device=order.device)
    # Rank in place e of every bin, [N, F], then the pixel that has it in every channel, [B, H, N, C, F].
    seen = every * length + place_of[:, None] if layout == "bins" else place_of[:, None] * bins + every
    pixel = order[:, :, None].expand(b, h, n, c, n).gather(-1, seen.clamp(max=n - 1)[:, None].expand(b, h, n, c, bins))
    pixel = pixel + torch.arange(c, device=order.device)[:, None] * n
    at = pixel.masked_fill((seen >= n)[:, None], -1).flatten(3)
    rank_of = order.argsort(-1)
    at = at[:, :, None].expand(b, h, c, n, c * bins).gather(3, rank_of[..., None].expand(b, h, c, n, c * bins))
    rows = bin_of[rank_of] + torch.arange(c, device=order.device)[:, None] * bins
    picked = weights.gather(2, rows.flatten(2)[..., None].expand(b, h, c * n, c * bins))
    between = AttentionMap.from_dense(
        weights, offset=0, domain="channel", sign="nonnegative", row_sum="<=1", value_space="bins of sorted V"
    )
    return HistogramMap(at.flatten(2, 3), picked, between)


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shape = (2, 2, 3, tokens)
    found = example_tensors(seed, dtype, q=shape, k=shape, x=shape, temperature=(2,))
    return {**found, "v": found["x"].reshape(2, 2, 3 * tokens, 1).clone(), "bins": 2}


def _example_of_both(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shape = (2, 2, 3, tokens)
    return {
        **_example(seed, tokens, dtype),
        **example_tensors(seed + 1000, dtype, q_frequency=shape, k_frequency=shape),
    }


_NOTE = "Not in native models: rows and columns of the map are pairs of a channel and a pixel."
_PAPER = "#131 Restoring Images in Adverse Weather Conditions via Histogram Transformer (2024)"
_REFERENCE = "sunshangquan/Histoformer basicsr/models/archs/histoformer_arch.py"

VARIANTS = (
    Variant(
        name="histogram-bin-attention",
        paper=_PAPER,
        family="channel",
        priority="C",
        operator=histogram_bin_attention,
        example=_example,
        reference=_REFERENCE,
        note=_NOTE,
    ),
    Variant(
        name="histogram-frequency-attention",
        paper=_PAPER,
        family="channel",
        priority="C",
        operator=histogram_frequency_attention,
        example=_example,
        reference=_REFERENCE,
        note=_NOTE,
    ),
    Variant(
        name="histogram-self-attention",
        paper=_PAPER,
        family="channel",
        priority="C",
        operator=histogram_self_attention,
        example=_example_of_both,
        reference=_REFERENCE,
        note=f"The second branch is held fixed as a gate; the product of both is quadratic in the values. {_NOTE}",
    ),
)
