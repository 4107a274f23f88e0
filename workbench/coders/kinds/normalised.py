"""Coders that normalise every row before they read it, and undo it on what they write.

``layer_norm``: (x - mean) / (std + 1e-5) with std over D_in - 1, output * std + mean. ``constant_norm_rescale``: rows of norm
sqrt(D_in), output * |x| / sqrt(D_in). ``constant_scalar_rescale``: x * factor, output / factor. A transcoder writes elsewhere,
and its output is left as it is. Since the output of a code depends on x, ``decode`` alone is refused; ``forward`` has x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.coders.code import Code
from workbench.coders.coder import Coder, Progress, Terms
from workbench.errors import Refused, UnknownName

Undo = Callable[[Tensor], Tensor]


class Normalised(Coder):
    """``inner`` behind a normalisation of the rows; weights are those of ``inner``, in normalised units."""

    kind = "normalised"
    defaults: ClassVar[dict[str, Any]] = {"rule": "layer_norm", "factor": 1.0}
    RULES = ("layer_norm", "constant_norm_rescale", "constant_scalar_rescale")

    def __init__(self, inner: Coder, rule: str, *, factor: float = 1.0, undone: bool = True) -> None:
        nn.Module.__init__(self)
        if rule not in self.RULES:
            raise UnknownName("normalisation of a coder", rule, self.RULES)
        self.inner = inner
        self.options = {"rule": rule, "factor": factor}
        self.undone = undone
        self.reads, self.writes, self.features = inner.reads, inner.writes, inner.features
        self.centred, self.about = inner.centred, inner.about

    def __getattr__(self, name: str) -> Any:
        """Weights of the inner coder."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name == "inner":
                raise
            return getattr(self.inner, name)

    def normalised(self, x: Tensor) -> tuple[Tensor, Undo]:
        """The rows as the inner coder reads them, and what takes its output back."""
        self._check(x)
        rule, factor = self.options["rule"], self.options["factor"]
        if rule == "layer_norm":
            mean = x.mean(-1, keepdim=True)
            std = (x - mean).std(-1, keepdim=True)
            return (x - mean) / (std + 1e-5), lambda y: y * std + mean
        if rule == "constant_norm_rescale":
            scale = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
            return x * scale, lambda y: y / scale
        return x * factor, lambda y: y / factor

    def pre(self, x: Tensor) -> Tensor:
        return self.inner.pre(self.normalised(x)[0])

    def activate(self, pre: Tensor) -> Tensor:
        return self.inner.activate(pre)

    def encode(self, x: Tensor) -> Tensor:
        return self.inner.encode(self.normalised(x)[0])

    def sparse(self, x: Tensor) -> Code:
        return self.inner.sparse(self.normalised(x)[0])

    def decode(self, f: Tensor | Code) -> Tensor:
        if not self.undone:
            return self.inner.decode(f)
        raise Refused(
            f"what a code of this coder writes depends on x ({self.options['rule']}); coder(x) gives the output, "
            "coder.inner.decode(f) the output in normalised units"
        )

    def forward(self, x: Tensor) -> Tensor:
        inside, undo = self.normalised(x)
        if self.undone:
            return undo(self.inner(inside))
        return self.inner.decode(self.inner.encode(inside)) + self.inner.skipped(x)

    def objective(self, x: Tensor, target: Tensor, now: Progress) -> Terms:
        raise Refused("a coder with normalised rows is read from a file and not trained here")

    @torch.no_grad()
    def fold(self, scale_in: Tensor, scale_out: Tensor) -> None:
        raise Refused("a coder that normalises every row cannot be rescaled")
