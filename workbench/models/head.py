"""The end of a Hugging Face forward pass: the last hidden states, and logits at the positions that were asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from workbench.models.current import current


def row_ends(real: Tensor) -> Tensor | None:
    """Index of the last real position of every row, None where there are no positions that logits belong to."""
    return real.shape[1] - 1 - real.flip(1).int().argmax(1) if real.shape[1] else None


class Head:
    """Keeps the last hidden states and cuts them before the unembedding: logits nobody asked for are not computed."""

    def __init__(self, run: object, module: Any, norm: Any, which: str | None, ends: Tensor | None) -> None:
        self.run = run
        self.module, self.norm, self.which, self.ends = module, norm, which, ends
        self.hidden: Tensor | None = None
        self._cut = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        handles = []
        if self.norm is not None:
            handles.append(self.norm.register_forward_hook(self._keep))
        if self.module is not None and self.which != "all":
            handles.append(self.module.register_forward_pre_hook(self._before))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, _: nn.Module, args: Any, output: Any) -> None:
        if current() is self.run:
            self.hidden = output if isinstance(output, Tensor) and output.ndim == 3 else None

    def _before(self, _: nn.Module, args: tuple[Any, ...]) -> Any:
        if current() is not self.run or args[0].ndim != 3:
            return None
        self._cut = True
        return (self._take(args[0]), *args[1:])

    def _take(self, hidden: Tensor) -> Tensor:
        if self.which is None:
            return hidden[:, :0]
        if self.ends is None:
            return hidden[:, -1:]
        rows = torch.arange(len(hidden), device=hidden.device)
        return hidden[rows, self.ends.to(hidden.device)][:, None]

    def logits(self, outputs: Any) -> Tensor | None:
        found = getattr(outputs, "logits", None)
        if found is None:
            found = getattr(outputs, "logits_per_image", None)
        if found is None or self.which is None:
            return None
        return self._take(found) if self.which == "last" and not self._cut and found.ndim == 3 else found
