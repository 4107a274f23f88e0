"""Hooks on TransformerLens hook points that live as long as a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformer_lens.hook_points import HookPoint


@contextmanager
def attached(hooks: Iterable[tuple[HookPoint, Callable[..., Any]]]) -> Iterator[None]:
    """Hooks ``f(tensor, hook)`` on their points, last in line; gone on exit, those of others untouched."""
    placed: list[tuple[HookPoint, Any]] = []
    try:
        for point, function in hooks:
            point.add_hook(function)
            placed.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, handle in placed:
            handle.hook.remove()
            point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]
