"""Which queries and keys of a layer's map are real tokens, and what they are called."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
from workbench.probes.sources import ungated


@dataclass(frozen=True)
class Padding:
    """``queries`` ``[B, Q]`` and ``keys`` ``[B, K]`` are False on padding, ``None`` where nothing is known to be
    padding.

    ``names[b][k]`` is the text of key k, empty if it has none.
    """

    batch: int
    queries: Tensor | None
    keys: Tensor | None
    names: tuple[tuple[str, ...], ...]

    def real_queries(self, queries: int) -> Tensor:
        """Number of real queries per sequence, ``[B]`` in float64."""
        if self.queries is None:
            return torch.full((self.batch,), float(queries), dtype=torch.float64)
        return self.queries.sum(1, dtype=torch.float64)

    def align(self, values: Tensor) -> Tensor:
        """``values`` ``[B, ..., K]`` with each sequence moved so that its first real key is column 0; NaN on
        padding."""
        if self.keys is None or bool(self.keys.all()):
            return values
        width = values.shape[-1]
        at = torch.arange(width) + self._start()[:, None]
        inside = at < width
        at = at.clamp(max=width - 1)
        real = inside & self.keys.gather(1, at)
        spread = (len(values), *([1] * (values.ndim - 2)), width)
        moved = values.gather(-1, at.view(spread).expand_as(values))
        return moved.masked_fill(~real.view(spread), float("nan"))

    def labels(self, width: int) -> tuple[str, ...]:
        """The text of the first ``width`` aligned keys; empty where the sequences differ."""
        starts = self._start().tolist()
        found = []
        for key in range(width):
            texts = {row[key + s] for row, s in zip(self.names, starts, strict=True) if self._has(row, key, s)}
            found.append(texts.pop() if len(texts) == 1 else "")
        return tuple(found)

    def _has(self, row: tuple[str, ...], key: int, start: int) -> bool:
        return key + start < len(row) and row[key + start] != ""

    def _start(self) -> Tensor:
        if self.keys is None:
            return torch.zeros(self.batch, dtype=torch.long)
        return self.keys.int().argmax(1)


def padding(name: int | str, amap: AttentionMap, tokens: Tokens | None) -> Padding:
    """Padding of the layer ``name`` (``"encoder.0"``, ``"cross.0"`` ... in two-stack models) from the run's tokens.

    Keys of a self-attention layer are the run's tokens, after whatever a key-value cache held before them. A layer
    whose sizes are not those of the tokens (patches, frames, windows) has no padding and no names.
    """
    b, _, queries, keys = amap.shape
    stack = name.split(".")[0] if isinstance(name, str) and "." in name else ""
    key_side = _side(tokens, "decoder" if stack == "decoder" else "" if stack != "vision" else None)
    query_side = _side(tokens, "decoder" if stack in ("decoder", "cross") else "" if stack != "vision" else None)
    mask = getattr(ungated(amap), "mask", None) or Mask()
    keys_real = None if mask.keys is None else mask.keys.cpu().expand(b, keys)
    behind = 0 if mask.window is None or mask.prefix else amap.offset - mask.window + 1
    if keys_real is not None and 0 < behind < keys:
        # Behind every window, keys that a cache forgot are hidden like padding. They are padding if the first in reach is.
        keys_real = torch.cat([keys_real[:, behind, None].expand(-1, behind), keys_real[:, behind:]], 1)
    queries_real = keys_real if stack != "cross" and queries == keys else None
    if mask.queries is not None:
        queries_real = mask.queries.cpu().expand(b, queries)
    if query_side is not None and query_side.mask.shape == (b, queries):
        queries_real = query_side.mask.cpu()
    before = keys - key_side.ids.shape[1] if key_side is not None else 0
    fits = key_side is not None and len(key_side.ids) == b and before >= 0
    fits = fits and (before == 0 if stack == "cross" else keys - before == queries)
    names: tuple[tuple[str, ...], ...] = ((),) * b
    if fits and key_side is not None and key_side.ids.shape[1]:
        told = torch.nn.functional.pad(key_side.mask.cpu(), (before, 0), value=True)
        keys_real = told if keys_real is None else keys_real & told
        rows = key_side.labels or tuple(tuple(f"#{i}" for i in row) for row in key_side.ids.tolist())
        real = told[:, before:].tolist()
        names = tuple(
            ("",) * before + tuple(text if is_real else "" for text, is_real in zip(row, on, strict=True))
            for row, on in zip(rows, real, strict=True)
        )
    return Padding(b, queries_real, keys_real, names)


def _side(tokens: Tokens | None, stack: str | None) -> Tokens | None:
    """The tokens of one half of the model; None if there are none."""
    if tokens is None or stack is None:
        return None
    if stack != "decoder":
        return tokens
    ids = tokens.inputs.get("decoder_input_ids")
    if ids is None:
        return None
    mask = tokens.inputs.get("decoder_attention_mask")
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool())
