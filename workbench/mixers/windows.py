"""Softmax over near tokens, parts of a sequence, and first tokens: masks that are rules about positions.

    sliding window  0 <= i - j < W                      chunks     floor(i / C) = floor(j / C), j <= i
    prefix LM       j <= i or j < P                     documents  doc(i) = doc(j), j <= i
    dilated window  i - j = d t, 0 <= t < W             sinks      j <= i and (j < S or i - j < W)
    Longformer      |i - j| <= W / 2, or j < G, or i < G

A window of W keeps W keys, the query's own included. (FlashAttention's ``window_size=(left, right)`` keeps left + right + 1.)
Every map answers with memory linear in the tokens: from a mask, from a few disjoint masks (``UnionMap``), or from a mask over
tokens in another order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Learned, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.flash import flash_attention, union_attention, with_keys, with_rows
from workbench.mixers.local import check_qkv, chosen
from workbench.patterns.arranged import PermutedMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.union import UnionMap

CAUSAL = Mask(causal=True)


def sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, mask: Mask = CAUSAL, scale: float | None = None
) -> tuple[Tensor, SoftmaxMap]:
    """Attention to the last ``window`` tokens: ``0 <= i - j < window`` (``|i - j| < window`` if the mask is not causal).

    q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]``; ``mask`` gives the other conditions. As in Mistral and Gemma.
    """
    at_least_one("window", window)
    return flash_attention(q, k, v, mask=replace(mask, window=window), scale=scale)


def chunked_attention(
    q: Tensor, k: Tensor, v: Tensor, *, chunk: int, mask: Mask = CAUSAL, scale: float | None = None
) -> tuple[Tensor, SoftmaxMap]:
    """Attention inside of chunks of ``chunk`` tokens, which start at multiples of it. As in the local layers of Llama 4.

    Shapes as in ``sliding_window_attention``; documents of the mask are cut at chunk borders too.
    """
    at_least_one("chunk", chunk)
    check_qkv(q, k, v)
    numbers = torch.arange(k.shape[2], device=k.device)[None] // chunk
    if mask.documents is not None:
        numbers = mask.documents.to(numbers) * (k.shape[2] + 1) + numbers
    return flash_attention(q, k, v, mask=replace(mask, documents=numbers), scale=scale)


def prefix_lm_attention(
    q: Tensor, k: Tensor, v: Tensor, *, prefix: int, mask: Mask = CAUSAL, scale: float | None = None
) -> tuple[Tensor, SoftmaxMap]:
    """A prefix of ``prefix`` tokens that every token sees, its own included; causal after it. Source: Raffel et al.,
    arXiv:1910.10683, section 3.2.1."""
    if isinstance(prefix, bool) or not isinstance(prefix, int) or prefix < 0:
        raise WorkbenchError(f"prefix is a number of tokens, 0 or more; got {prefix!r}")
    return flash_attention(q, k, v, mask=replace(mask, prefix=prefix), scale=scale)


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor, *, mask: Mask = CAUSAL, scale: float | None = None
) -> tuple[Tensor, SoftmaxMap]:
    """Attention inside of packed documents: ``documents`` ``[B or 1, K]`` int holds every token's document."""
    if documents.ndim != 2 or documents.is_floating_point() or documents.dtype == torch.bool:
        raise WorkbenchError(f"documents are int [B or 1, K]; got {documents.dtype} {list(documents.shape)}")
    return flash_attention(q, k, v, mask=replace(mask, documents=documents), scale=scale)


def dilated_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    dilation: int,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, PermutedMap]:
    """A window with gaps: of the tokens ``dilation`` apart the ``window`` nearest, on the left (or, not causal, each side).

    q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]``. In the order of (position mod dilation, position) this is a
    plain window in each residue class, and so it is computed. Source: Beltagy et al., arXiv:2004.05150, section 3.1.
    """
    at_least_one("window", window)
    at_least_one("dilation", dilation)
    check_square(q, k, v)
    positions = torch.arange(q.shape[2], device=q.device)
    order = (positions % dilation * q.shape[2] + positions).argsort()
    mask = Mask(causal=causal, window=window, documents=(order % dilation)[None])
    out, inner = flash_attention(q[:, :, order], k[:, :, order], v[:, :, order], mask=mask, scale=scale)
    place = order.argsort()
    return out[:, :, place], PermutedMap(inner, place, place)


def streaming_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, sinks: int = 4, mask: Mask = CAUSAL, scale: float | None = None
) -> tuple[Tensor, UnionMap]:
    """StreamingLLM: the first ``sinks`` tokens and the last ``window`` tokens, both only as far as they are past.

    Shapes as in ``sliding_window_attention``; ``mask`` is causal. q and k come after positions, which the paper counts inside
    of the cache. Source: Xiao et al., arXiv:2309.17453, section 3.2.
    """
    at_least_one("window", window)
    at_least_one("sinks", sinks)
    check_qkv(q, k, v)
    if not mask.causal:
        raise WorkbenchError("mask of streaming attention is causal; got causal=False")
    first = torch.arange(k.shape[2], device=k.device)[None] < sinks
    masks = [with_keys(mask, first), with_keys(replace(mask, window=window), ~first)]
    return union_attention([(q, k, part) for part in masks], v, scale=scale)


def longformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    global_tokens: int,
    q_global: Tensor | None = None,
    k_global: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, UnionMap]:
    """Longformer: ``window / 2`` tokens on each side; the first ``global_tokens`` tokens see all and are seen by all.

    q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]``. Rows of global tokens use ``q_global`` and ``k_global`` (shapes
    of q and k), the network's second pair of projections, or q and k. Source: Beltagy et al., arXiv:2004.05150, section 3.1.
    """
    at_least_one("window", window)
    check_square(q, k, v)
    n = q.shape[2]
    if isinstance(global_tokens, bool) or not isinstance(global_tokens, int) or not 0 <= global_tokens <= n:
        raise WorkbenchError(f"global_tokens is a number of tokens from 0 to {n}; got {global_tokens!r}")
    for name, given, like in (("q_global", q_global, q), ("k_global", k_global, k)):
        if given is not None and (given.shape != like.shape or given.dtype != like.dtype):
            want, got = f"{like.dtype} {list(like.shape)}", f"{given.dtype} {list(given.shape)}"
            raise WorkbenchError(f"{name} is {want} here; got {got}")
    lead = (torch.arange(n, device=q.device) < global_tokens)[None]
    tiles = [(q, k, Mask(window=window // 2 + 1, keys=~lead, queries=~lead))]
    if global_tokens:
        tiles.append((q, k, Mask(keys=lead, queries=~lead)))
        rows = (q if q_global is None else q_global, k if k_global is None else k_global)
        tiles.append((*rows, with_rows(Mask(), lead, n)))
    return union_attention(tiles, v, scale=scale)


def at_least_one(name: str, value: int) -> None:
    """Raise ``WorkbenchError`` unless the option is a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise WorkbenchError(f"{name} is a whole number of at least 1; got {value!r}")


def check_square(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ``WorkbenchError`` unless q, k and v fit and there are as many queries as keys."""
    check_qkv(q, k, v)
    if q.shape[2] != k.shape[2]:
        raise WorkbenchError(f"k has the {q.shape[2]} tokens of q here; got {k.shape[2]}")


def _drawn(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 8), "k": (2, 2, tokens, 8), "v": (2, 2, tokens, 8)}
    return dict(example_tensors(seed, dtype, **shapes))


def _example(**options: Any) -> Any:
    return lambda seed, tokens, dtype: _drawn(seed, tokens, dtype) | options


def _document_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    at = torch.arange(tokens)
    documents = torch.stack([(at >= 4).long(), (at >= 2).long() + (at >= 7)])
    return {**_drawn(seed, tokens, dtype), "documents": documents}


def _longformer_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    more = example_tensors(seed + 1, dtype, q_global=(2, 4, tokens, 8), k_global=(2, 2, tokens, 8))
    return {**_drawn(seed, tokens, dtype), **more, "window": 4, "global_tokens": min(2, tokens)}


def _documents_of_the_mask(given: dict[str, Any]) -> dict[str, Any]:
    """A model that was given no documents has one."""
    documents = given["mask"].documents
    if documents is None:
        documents = torch.zeros(1, given["k"].shape[2], dtype=torch.int64, device=given["k"].device)
    return {name: given[name] for name in ("q", "k", "v", "mask")} | {"documents": documents}


def _dilated(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in ("q", "k", "v")} | {
        "window": 8, "dilation": 2, "causal": given["mask"].causal,
    }  # fmt: skip


QKVM = ("q", "k", "v", "mask")
LONGFORMER = "Longformer: The Long-Document Transformer (2020)"
VARIANTS = (
    Variant(
        name="sliding-window-attention",
        paper="Mistral 7B (2023)",
        family="softmax",
        priority="A",
        operator=sliding_window_attention,
        example=_example(window=4),
        causal=True,
        reference="transformers sliding_window of Mistral, Gemma and gpt-oss",
        note="Among the mask patterns of #61.",
        recipe=Recipe(prepare=chosen(*QKVM, window=8)),
    ),
    Variant(
        name="chunked-attention",
        paper="Llama 4 (2025)",
        family="softmax",
        priority="A",
        operator=chunked_attention,
        example=_example(chunk=5),
        causal=True,
        reference="transformers masking_utils chunked_overlay",
        recipe=Recipe(prepare=chosen(*QKVM, chunk=8)),
    ),
    Variant(
        name="prefix-lm-attention",
        paper="Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer (2019)",
        family="softmax",
        priority="A",
        operator=prefix_lm_attention,
        example=_example(prefix=3),
        reference="attention-gym prefix_lm",
        recipe=Recipe(prepare=chosen("q", "k", "v", mask=CAUSAL, prefix=4)),
    ),
    Variant(
        name="document-attention",
        paper="#61 Long-Context Attention Benchmark: From Kernel Efficiency to Distributed Context Parallelism (2025)",
        family="softmax",
        priority="A",
        operator=document_attention,
        example=_document_example,
        causal=True,
        reference="attention-gym document_mask",
        recipe=Recipe(prepare=_documents_of_the_mask),
    ),
    Variant(
        name="dilated-window-attention",
        paper=LONGFORMER,
        family="softmax",
        priority="A",
        operator=dilated_window_attention,
        example=_example(window=3, dilation=2),
        causal=True,
        reference="attention-gym dilated sliding window",
        recipe=Recipe(prepare=_dilated),
    ),
    Variant(
        name="streaming-llm-attention",
        paper="Efficient Streaming Language Models with Attention Sinks (2023)",
        family="softmax",
        priority="A",
        operator=streaming_attention,
        example=_example(window=3, sinks=2),
        causal=True,
        reference="definition: a window and first tokens",
        recipe=Recipe(prepare=chosen(*QKVM, window=8, sinks=2)),
    ),
    Variant(
        name="longformer-attention",
        paper=LONGFORMER,
        family="softmax",
        priority="A",
        operator=longformer_attention,
        example=_longformer_example,
        reference="transformers LongformerSelfAttention",
        note="The network also projects values of their own for the rows of global tokens; one set of values here.",
        recipe=Recipe(
            learned={"q_global": Learned("HE"), "k_global": Learned("GE")},
            prepare=chosen("q", "k", "v", "q_global", "k_global", window=8, global_tokens=1),
        ),
    ),
)
