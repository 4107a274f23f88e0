"""Titans' three layouts of a memory and attention.

    MAC  memory as a context   y = attention over [persistent | retrieved | segment so far]
    MAG  memory as a gate      o = sigmoid(M(x)) * sliding-window attention(x)
    MAL  memory as a layer     o = sliding-window attention(M(x))

The memory is that of ``titans.linear_memory``. MAC's map says how much of a row falls on learned tokens, on what the memory
gave and on the segment itself; MAG's is the attention under a gate per channel; MAL's is the product of two maps, memory first.

Behrouz, Zhong and Mirrokni, Titans (arXiv 2501.00663), section 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from workbench.catalogue import Parameter, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.delta import unit
from workbench.mixers.image import spread
from workbench.mixers.local import grouped_softmax
from workbench.mixers.scored import check_tensor
from workbench.mixers.softmax import softmax_attention
from workbench.mixers.titans import PAPER, RATES, example_rates, linear_memory, prepare_linear
from workbench.patterns.algebra import ProductMap
from workbench.patterns.per_channel import ChannelGatedMap
from workbench.patterns.sparse import SparseMap


def memory_as_context(
    q: Tensor, k: Tensor, v: Tensor, *, persistent: int, segment: int, scale: float | None = None
) -> tuple[Tensor, SparseMap]:
    """Titans MAC, its attention: a token sees the persistent tokens, what its segment retrieved, and its segment so far.

    q ``[B, H, N, E]``; k ``[B, G, P + 2 N, E]`` and v ``[B, G, P + 2 N, V]`` hold P = ``persistent`` learned tokens, then N
    retrieved ones (token i of a segment asks the memory as it was before the segment), then the N tokens. Segments have
    ``segment`` tokens; all that a segment retrieved is visible to all of its tokens. Output ``[B, H, N, V]``; the map
    ``[B, H, N, P + 2 N]`` is row-stochastic over all three, with offset P + N and P + 2 ``segment`` weights a row. Memory is
    written with the outputs, after the segment (``retrieved`` runs that loop).
    """
    check_tensor("q", q, ("B", "H", "N", "E"))
    n = q.shape[2]
    for name, count, least in (("persistent", persistent, 0), ("segment", segment, 1)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise WorkbenchError(f"{name} is a number of tokens, at least {least}; got {count!r}")
    check_tensor("k", k, (q.shape[0], "G", persistent + 2 * n, q.shape[3]))
    count = -(-n // segment)
    own = torch.arange(count * segment, device=q.device).view(count, segment)
    own = own.masked_fill(own >= n, -1)
    always = torch.arange(persistent, device=q.device).expand(count, -1)
    keys = torch.cat(
        [always, torch.where(own < 0, own, own + persistent), torch.where(own < 0, own, own + persistent + n)], 1
    )
    seen = torch.ones(segment, persistent + 2 * segment, dtype=torch.bool, device=q.device)
    seen[:, persistent + segment :].tril_()
    return grouped_softmax(q, k, v, own[None, None], keys[None, None], allowed=seen, scale=scale, offset=persistent + n)


def retrieved(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    persistent_k: Tensor,
    persistent_v: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    *,
    segment: int,
) -> Tensor:
    """What each token of MAC retrieves, ``[B, H, N, E]``, with a matrix for a memory and no projections of its own.

    Segment after segment: the memory as it is answers the segment's queries, attention runs, and its outputs y are written
    token by token, as keys (at length 1) and as values. q ``[B, H, N, E]``, k and v ``[B, G, N, E]``, persistent tokens
    ``[H, P, E]``, rates ``[B, H, N]``. A loop over segments.
    """
    b, h, n, _ = q.shape
    k, v = spread(k, h), spread(v, h)
    first_k, first_v = (part.expand(b, *part.shape) for part in (persistent_k, persistent_v))
    found: list[Tensor] = []
    written = q.new_zeros(b, h, 0, q.shape[3])
    for lo in range(0, n, segment):
        part = slice(lo, min(n, lo + segment))
        asked = q[:, :, part]
        # Questions come after what was written, as tokens that neither write nor forget.
        nothing = torch.zeros_like(asked)
        keys = normalize(written, dim=-1)
        rates = [torch.cat([rate[:, :, :lo], nothing[..., 0]], 2) for rate in (theta, eta, alpha)]
        answers, _ = linear_memory(
            torch.cat([keys, asked], 2), torch.cat([keys, nothing], 2), torch.cat([written, nothing], 2), *rates
        )
        found.append(answers[:, :, lo:])
        y, _ = memory_as_context(
            asked,
            torch.cat([first_k, found[-1], k[:, :, part]], 2),
            torch.cat([first_v, found[-1], v[:, :, part]], 2),
            persistent=persistent_k.shape[1],
            segment=segment,
        )
        written = torch.cat([written, y], 2)
    return torch.cat(found, 2)


def memory_as_gate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor,
    memory_k: Tensor,
    memory_v: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    *,
    window: int,
    persistent: int = 0,
    scale: float | None = None,
) -> tuple[Tensor, ChannelGatedMap]:
    """Titans MAG: sliding-window attention of q ``[B, H, N, E]``, k and v ``[B, G, N, .]``, gated channel by channel by the
    sigmoid of what a linear memory gives for memory_q, memory_k ``[B, H, N, .]`` and memory_v ``[B, G, N, V]``.

    The first ``persistent`` of the N tokens are learned ones, which every token sees beside the ``window`` last ones. Linear
    in v for a given gate.
    """
    gate, _ = linear_memory(memory_q, memory_k, memory_v, theta, eta, alpha)
    out, raw = softmax_attention(q, k, v, mask=_sliding(window, persistent), scale=scale)
    if gate.shape != out.shape:
        raise WorkbenchError(f"memory_v has the tokens and width of v, {list(v.shape)}; got {list(memory_v.shape)}")
    gate = gate.sigmoid()
    return out * gate.to(out.dtype), ChannelGatedMap(raw, gate)


def memory_as_layer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    theta: Tensor,
    eta: Tensor,
    alpha: Tensor,
    attention_q: Tensor,
    attention_k: Tensor,
    *,
    window: int,
    persistent: int = 0,
    scale: float | None = None,
) -> tuple[Tensor, ProductMap]:
    """Titans MAL: a linear memory of q, k, v (as in ``linear_memory``), then sliding-window attention over its outputs.

    ``attention_q`` and ``attention_k`` ``[B, H, N, E]`` are projections of the memory's outputs, the attention's values are the
    outputs themselves. ``window`` and ``persistent`` as in ``memory_as_gate``. The map is the product, linear in v for
    given scores.
    """
    memory, right = linear_memory(q, k, v, theta, eta, alpha)
    out, left = softmax_attention(attention_q, attention_k, memory, mask=_sliding(window, persistent), scale=scale)
    return out, ProductMap(left, right)


def _sliding(window: int, persistent: int) -> Mask:
    for name, count, least in (("window", window, 1), ("persistent", persistent, 0)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise WorkbenchError(f"{name} is a number of tokens, at least {least}; got {count!r}")
    return Mask(causal=True, window=window, prefix=persistent)


# ------------------------------------------------------------------------ records


def _mac_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    heads, shared = (2, 4, tokens, 4), (2, 2, tokens, 4)
    given = example_tensors(seed, dtype, q=heads, k=shared, v=shared, persistent_k=(4, 3, 4), persistent_v=(4, 3, 4))
    asked = retrieved(**given, **example_rates(seed + 1, dtype, heads[:3]), segment=5)
    first = {name: given[f"persistent_{name}"].expand(2, 4, 3, 4) for name in "kv"}
    joined = {name: torch.cat([first[name], asked, spread(given[name], 4)], 2) for name in "kv"}
    return {"q": given["q"], **joined, "persistent": 3, "segment": 5}


def _mag_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    heads = (2, 4, tokens, 5)
    given = example_tensors(
        seed, dtype, q=heads, k=(2, 2, tokens, 5), v=(2, 2, tokens, 4), memory_q=heads, memory_k=heads,
        memory_v=(2, 2, tokens, 4),
    )  # fmt: skip
    units = {name: unit(given[name]) for name in ("memory_q", "memory_k")}
    return {**given, **units, **example_rates(seed + 1, dtype, heads[:3]), "window": 4, "persistent": 1}


def _mal_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    heads = (2, 4, tokens, 5)
    given = example_tensors(seed, dtype, q=heads, k=heads, v=(2, 2, tokens, 4), attention_q=heads, attention_k=heads)
    units = {name: unit(given[name]) for name in "qk"}
    return {**given, **units, **example_rates(seed + 1, dtype, heads[:3]), "window": 4, "persistent": 1}


def _prepare_gate(given: dict[str, Any]) -> dict[str, Any]:
    memory = prepare_linear(given)
    renamed = {f"memory_{name}" if name in "qkv" else name: value for name, value in memory.items()}
    return {**renamed, "q": given["q"], "k": given["k"], "v": given["v"], "window": 16}


def _prepare_layer(given: dict[str, Any]) -> dict[str, Any]:
    memory = prepare_linear(given)
    y, _ = linear_memory(**memory)
    return {**memory, "attention_q": y @ given["w_q"], "attention_k": y @ given["w_k"], "window": 16}


def _identities(shape: tuple[int, ...]) -> Tensor:
    return torch.eye(shape[-1]).expand(shape).clone()


VARIANTS = (
    Variant(
        name="titans-memory-as-context",
        paper=PAPER,
        family="softmax",
        priority="B",
        operator=memory_as_context,
        example=_mac_example,
        causal=True,
        reference="section 4.1 of the paper; lucidrains/titans-pytorch for the segment mask",
        note="the map is that of the attention, over persistent, retrieved and own tokens; the gate of the output by a second "
        "reading of the memory is not part of it. Keys are more than the tokens, so no native model runs it",
    ),
    Variant(
        name="titans-memory-as-gate",
        paper=PAPER,
        family="weighted softmax",
        priority="B",
        operator=memory_as_gate,
        example=_mag_example,
        causal=True,
        reference="section 4.2 of the paper",
        note="the paper normalises both branches with learned weights before its gate, which is left to the layer",
        recipe=Recipe(learned=RATES, prepare=_prepare_gate),
    ),
    Variant(
        name="titans-memory-as-layer",
        paper=PAPER,
        family="two-stage",
        priority="B",
        operator=memory_as_layer,
        example=_mal_example,
        causal=True,
        reference="section 4.3 of the paper",
        note="the attention's values are the memory's outputs, without a projection in between",
        recipe=Recipe(
            learned=RATES,
            parameters={"w_q": Parameter("HEE", _identities), "w_k": Parameter("HEE", _identities)},
            prepare=_prepare_layer,
        ),
    ),
)
