"""TopK coders without the ReLU, so that features may be negative. They come from files and are not trained here.

``AbsTopK`` (arXiv 2510.00404) keeps the k pre-activations of largest size with their signs. ``RawTopK`` keeps the k largest
as they are: circuit-tracer's TopK transcoders, which differ from ``TopK`` only where fewer than k pre-activations are positive.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.coders.coder import Coder, Progress, Terms
from workbench.errors import Refused, WorkbenchError


class AbsTopK(Coder):
    kind = "abstopk"
    paper = "arXiv 2510.00404"
    defaults: ClassVar[dict[str, Any]] = {"k": 32}

    def _begin(self) -> None:
        if not 1 <= self.options["k"] <= self.features:
            raise WorkbenchError(
                f"k of a coder with {self.features} features is 1 to {self.features}; got {self.options['k']}"
            )

    def activate(self, pre: Tensor) -> Tensor:
        found = self._order(pre).topk(self.options["k"], dim=-1).indices
        return torch.zeros_like(pre).scatter(-1, found, pre.gather(-1, found))

    def _order(self, pre: Tensor) -> Tensor:
        return pre.abs()

    def objective(self, x: Tensor, target: Tensor, now: Progress) -> Terms:
        raise Refused(
            f"{self.kind} coders are read from files and not trained here; make_coder('topk', ...) makes one that is"
        )


class RawTopK(AbsTopK):
    kind = "raw-topk"
    paper = ""

    def _order(self, pre: Tensor) -> Tensor:
        return pre
