"""The mask of a Hugging Face attention call as a ``Mask``: described, checked against the tensor, never guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused
from workbench.kernels.mask import Mask
from workbench.models.layers import AttentionLayer

DENSE_MASK_LIMIT = 2**24
"""A mask that has no description is kept as it is up to this many pairs; above, capture refuses."""
_CHUNK = 2**22


class Masks:
    """Masks seen in one run: which rule each tensor was built from, and the description found for it."""

    def __init__(self, family: str) -> None:
        self.family = family
        self._rules: dict[int, Mask | None] = {}
        self._found: dict[tuple[Any, ...], tuple[Mask, Tensor | None]] = {}
        self._inverse: dict[int, Tensor] = {}
        self._alive: list[Any] = []

    def remember(self, tensor: Any, built: Mapping[str, Any]) -> None:
        """Note the rule a mask was built from; ``built`` are the arguments of the mask function."""
        self._alive.append(tensor)
        self._rules[id(tensor)] = rule(built)

    def inverse(self, hidden: Tensor) -> Tensor:
        """The allowed pairs of a bool mask whose True hides, one tensor per mask."""
        if id(hidden) not in self._inverse:
            self._alive.append(hidden)
            self._inverse[id(hidden)] = ~hidden
        return self._inverse[id(hidden)]

    def resolve(
        self, layer: AttentionLayer, mask: Any, q: Tensor, k: Tensor, base: str, options: Mapping[str, Any]
    ) -> tuple[Mask, Tensor | None]:
        """Mask, and additive bias if the mask tensor carries one, of one attention call."""
        queries, keys = q.shape[2], k.shape[2]
        if base not in ("eager", "sdpa", "flex_attention") and "flash" not in base:
            raise Refused(
                f"layer {layer.key} of {self.family}: what attention {base!r} makes of its mask is not known; load the model "
                "with attn_implementation='sdpa' or 'eager'"
            )
        causal = options.get("is_causal")
        if causal is None:
            causal = bool(getattr(layer.module, "is_causal", True))
        if mask is None:
            plain = self._without(base, bool(causal), queries, keys, options.get("sliding_window"))
            packed = _packed(options.get("position_ids"), q) if "flash" in base else None
            return replace(plain, documents=packed), None
        if isinstance(mask, Tensor) and mask.ndim == 2 and "flash" in base:
            plain = self._without(base, bool(causal), queries, keys, options.get("sliding_window"))
            return replace(plain, keys=mask.bool()), None
        if not isinstance(mask, Tensor):
            described = self._rules.get(id(mask))
            if described is None:
                raise Refused(
                    f"layer {layer.key} of {self.family}: cannot describe a mask of type {type(mask).__name__}"
                )
            return described, None
        if mask.ndim != 4:
            raise Refused(
                f"layer {layer.key} of {self.family}: its mask has shape {list(mask.shape)}, not [B, H, Q, K]"
            )
        memo = (id(mask), queries, keys, options.get("sliding_window"))
        if memo not in self._found:
            self._alive.append(mask)
            self._found[memo] = self._describe(
                layer, mask[..., :keys], bool(causal), options, self._rules.get(id(mask))
            )
        return self._found[memo]

    @staticmethod
    def _without(base: str, causal: bool, queries: int, keys: int, window: int | None) -> Mask:
        """What no mask means to an implementation."""
        offset = max(0, keys - queries) if causal else 0
        if "flash" in base:
            return Mask(causal, window, offset=offset)
        if base == "sdpa" and causal and queries > 1:
            return Mask(True)
        return Mask(causal and queries == 1, offset=offset)

    def _describe(
        self, layer: AttentionLayer, mask: Tensor, causal: bool, options: Mapping[str, Any], known: Mask | None
    ) -> tuple[Mask, Tensor | None]:
        queries, keys = mask.shape[2:]
        offset = max(0, keys - queries) if causal else 0
        if mask.is_floating_point() and _adds(mask):
            return Mask(offset=offset), mask
        seen = _any_row(mask)
        padding = None if bool(seen.all()) else seen
        windows = {
            options.get("sliding_window"),
            getattr(getattr(layer.module, "config", None), "sliding_window", None),
        }
        candidates = [] if known is None else [known]
        candidates += [Mask(True, keys=padding, offset=max(0, keys - queries)), Mask(keys=padding, offset=offset)]
        candidates += [
            Mask(True, w, keys=padding, offset=max(0, keys - queries)) for w in windows if isinstance(w, int) and w > 0
        ]
        for candidate in candidates:
            if _agrees(candidate, mask):
                return candidate, None
        if mask.numel() <= DENSE_MASK_LIMIT:
            return Mask(dense=allowed(mask), offset=offset), None
        raise Refused(
            f"layer {layer.key} of {self.family}: its mask over {queries} x {keys} positions is neither causal, windowed, "
            f"by documents nor padding, and too large to keep; capture at most {int(DENSE_MASK_LIMIT**0.5)} tokens"
        )


def rule(built: Mapping[str, Any]) -> Mask | None:
    """The ``Mask`` that the arguments of a transformers mask function describe; None if they say more than it can."""
    parts: dict[str, Any] = {}
    try:
        for name, value in _parse(built["mask_function"], built):
            if name in parts and name != "causal":
                return None  # two windows, or chunks inside of documents
            parts[name] = value
    except (_Unknown, KeyError, AttributeError):  # the last: a callable that is no function
        return None
    causal, window = bool(parts.get("causal")), parts.get("window")
    q_offset, k_offset = int(built.get("q_offset", 0)), int(built.get("kv_offset", 0))
    keys = built["kv_length"]
    padding = built.get("attention_mask")
    if padding is not None:
        short = keys + k_offset - padding.shape[-1]
        padding = torch.nn.functional.pad(padding, (0, max(0, short)))[:, k_offset : k_offset + keys].bool()
        padding = None if bool(padding.all()) else padding
    documents = parts.get("documents")
    if documents is not None:
        if callable(documents):
            documents = documents(torch.arange(k_offset, k_offset + keys, device=built.get("device")))
        else:
            documents = documents[:, k_offset : k_offset + keys]
    try:
        return Mask(causal, window, documents=documents, keys=padding, offset=q_offset - k_offset)
    except ValueError:
        return None


class _Unknown(Exception):
    """A mask function that is not one of those we can describe."""


def _parse(function: Callable[..., Any], built: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Parts of the ``Mask`` that a composition of transformers' mask functions stands for."""
    from transformers import masking_utils as hf

    if function is hf.causal_mask_function:
        yield "causal", True
        return
    if function is hf.bidirectional_mask_function:
        return
    names = dict(zip(function.__code__.co_freevars, (c.cell_contents for c in function.__closure__ or ()), strict=True))
    maker = function.__qualname__.split(".", 1)[0]
    if maker == "and_masks":
        for part in names["mask_functions"]:
            yield from _parse(part, built)
    elif maker == "sliding_window_overlay":
        yield "window", names["sliding_window"]
        yield "causal", True
    elif maker == "sliding_window_bidirectional_overlay":
        yield "window", names["sliding_window"] + 1
    elif maker == "chunked_overlay":
        size, left = names["chunk_size"], names["left_padding"]
        yield "documents", lambda at: (at[None, :] - left[:, None].to(at.device)) // size
    elif maker == "packed_sequence_mask_function":
        yield "documents", names["packed_sequence_mask"]
    elif maker == "remap_positions_for_packed_sequence":
        yield from _parse(names["mask_function"], built)
    else:
        raise _Unknown(function.__qualname__)


def _packed(positions: Tensor | None, q: Tensor) -> Tensor | None:
    """Documents that flash attention tells apart in a single row, by positions that begin anew; None if there is one."""
    if positions is None or positions.ndim != 2 or q.shape[0] != 1 or bool((positions.diff() == 1).all()):
        return None
    return (positions == 0).cumsum(-1)


def behind(mask: Mask, gone: int, keys: int) -> Mask:
    """The mask over ``keys`` keys with ``gone`` more in front of them, which nobody sees."""
    pad = torch.nn.functional.pad
    shown = torch.ones(1, keys, dtype=torch.bool) if mask.keys is None else mask.keys
    return replace(
        mask,
        prefix=mask.prefix + gone if mask.prefix else 0,
        documents=None if mask.documents is None else pad(mask.documents, (gone, 0)),
        keys=pad(shown, (gone, 0)),
        dense=None if mask.dense is None else pad(mask.dense, (gone, 0)),
        offset=mask.offset + gone,
    )


def allowed(mask: Tensor) -> Tensor:
    """Which pairs a mask tensor lets through: True of a bool mask, not hugely negative of an additive one."""
    if mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


def _chunks(mask: Tensor) -> Iterator[tuple[slice, Tensor]]:
    b, h, q, k = mask.shape
    step = max(1, _CHUNK // max(1, b * h * k))
    for lo in range(0, q, step):
        yield slice(lo, min(q, lo + step)), mask[:, :, lo : lo + step]


def _adds(mask: Tensor) -> bool:
    """Whether an additive mask does more than hide: values other than 0 and the huge negative one."""
    return any(bool(((part != 0) & allowed(part)).any()) for _, part in _chunks(mask))


def _any_row(mask: Tensor) -> Tensor:
    """Keys that some query sees, ``[B, K]``."""
    seen = mask.new_zeros(mask.shape[0], mask.shape[3], dtype=torch.bool)
    for _, part in _chunks(mask):
        seen |= allowed(part).flatten(1, 2).any(1)
    return seen


def _agrees(candidate: Mask, mask: Tensor) -> bool:
    b, h, q, k = mask.shape
    try:
        candidate.check((b, h, q, k))
    except ValueError:
        return False
    for rows, part in _chunks(mask):
        tile = candidate.tile(rows, slice(0, k), mask.device)
        want = allowed(part)
        if not bool(want.all() if tile is None else (want == tile).all()):
            return False
    return True
