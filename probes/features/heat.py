"""Tokens of a text shaded by a number each: blue raises, red lowers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from torch import Tensor

_RAISES, _LOWERS = (31, 111, 139), (193, 80, 46)


def token_heat(tokens: Sequence[str], values: Tensor, caption: str, mark: int | None = None) -> str:
    """``values`` ``[T]`` as escaped HTML; ``mark`` frames one token."""
    size = float(values.abs().max()) or 1.0 if len(values) else 1.0
    spans = []
    for i, (token, value) in enumerate(zip(tokens, values.tolist(), strict=True)):
        red, green, blue = _RAISES if value >= 0 else _LOWERS
        frame = "outline:2px solid currentColor;" if i == mark else ""
        style = f"background:rgba({red},{green},{blue},{abs(value) / size:.3f});{frame}padding:1px 2px"
        spans.append(f'<span title="{i}: {value:.4g}" style="{style}">{escape(token)}</span>')
    return f'<div><p>{escape(caption)}</p><p style="font-family:monospace;line-height:1.8">{"".join(spans)}</p></div>'


def heat_limits(values: np.ndarray) -> tuple[float, float]:
    """Colour limits symmetric about 0."""
    top = float(np.nanmax(np.abs(values))) if values.size else 1.0
    top = top or 1.0
    return -top, top


def plain(tokens: Sequence[str]) -> list[str]:
    """Tokens as labels of an axis: unprintable characters as codes, no mathematics."""
    return [repr(token)[1:-1].replace("$", r"\$") for token in tokens]
