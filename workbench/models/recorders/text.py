"""Base of recorders of text encoders whose attention is sparse or of low rank.

Values are what the module's value projection makes; the output is what the module returns, heads merged. Some of these models pad
their input to whole windows, blocks or chunks: maps and sites end with the text, as the weights on that padding are zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from workbench.models.current import current
from workbench.models.recorders.base import Watch

SOFTMAX = (torch.softmax, Tensor.softmax, nn.functional.softmax)
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class TextWatch(Watch):
    """``seen`` is told every torch call of the forward with its result."""

    missing = "editing pattern"
    sites = frozenset({"v", "z"})
    statistics = Watch.statistics | {"entropy"}

    @classmethod
    def heads(cls, module: Any) -> tuple[int, int, int]:
        heads = getattr(module, "num_attention_heads", 0) or module.num_heads
        width = getattr(module, "attention_head_size", 0) or module.head_dim
        return heads, heads, width

    @classmethod
    def causal(cls, module: Any) -> bool:
        return False

    @classmethod
    def quadratic(cls, module: Any) -> bool:
        return False

    @property
    def value(self) -> nn.Module:
        """The projection that makes the values."""
        return self.module.value

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        handle = self.value.register_forward_hook(self._project)
        try:
            return self.leave(super().run(forward, args, kwargs))
        finally:
            handle.remove()

    def leave(self, output: Any) -> Any:
        """What the mixing module returns, after edits; the map is built here."""
        self.met = True
        if self.session.wants_map(self.layer):
            with torch.no_grad():
                self.build()
        if not self.session.touches(self.layer, "z"):
            return output
        z, whole = self.output(output)
        heads = type(self).heads(self.module)[0]
        return whole(self.session.on_output(self.layer, z.unflatten(-1, (heads, -1))).flatten(-2))

    def output(self, output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """The mixing's output ``[B, N, H E]`` in what the forward returned, and how to put another in its place."""
        return output[0], lambda z: (z, *output[1:])

    def build(self) -> None:
        """Hand in the map, if everything that it is made of was seen."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.met and current() is self.session:  # not what an edit runs
            self.seen(func, args, kwargs or {}, result)
        return result

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """A torch call of the forward, with its result."""

    def tokens(self, length: int) -> int:
        """Tokens of the text among ``length`` positions."""
        return self.session.tokens(length)

    def shown(self, length: int, like: Tensor) -> Tensor:
        """1 at real and 0 at padded tokens, ``[B or 1, 1, N]``."""
        real = self.session.real(self.layer)
        found = like.new_ones(1, length) if real is None else real.to(like)
        return found[:, None]

    def _project(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if current() is not self.session or not self.session.touches(self.layer, "v"):
            return None
        heads = type(self).heads(self.module)[1]
        values = self.arrange(output).unflatten(-1, (heads, -1))
        return self.arrange(self.session.on_values(self.layer, values).flatten(-2))

    def arrange(self, projected: Tensor) -> Tensor:
        """``[B, N, H E]`` of what the value projection makes, and back."""
        return projected
