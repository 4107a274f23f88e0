"""Hooks on TransformerLens hook points that live as long as a ``with`` block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformer_lens.hook_points import HookPoint

from workbench.models.current import current


@contextmanager
def attached(hooks: Iterable[tuple[HookPoint, Callable[..., Any]]], run: object | None = None) -> Iterator[None]:
    """Hooks ``f(tensor, hook)`` on their points, last in line, that act inside ``run`` (None: outside of any run); gone on
    exit, those of others untouched."""
    placed: list[tuple[HookPoint, Any]] = []
    try:
        for point, function in hooks:
            point.add_hook(_only_in(run, function))
            placed.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, handle in placed:
            handle.hook.remove()
            point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]


def _only_in(run: object | None, function: Callable[..., Any]) -> Callable[..., Any]:
    def act(tensor: Tensor, hook: HookPoint) -> Any:
        return function(tensor, hook) if current() is run else None

    return act
