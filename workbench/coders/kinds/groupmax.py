"""GroupMax coders (sparsify): features stand in k groups of equal size, and each group keeps its largest if it is positive."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.coders.coder import Coder, Progress, Terms
from workbench.errors import Refused, WorkbenchError


class GroupMax(Coder):
    kind = "groupmax"
    defaults: ClassVar[dict[str, Any]] = {"k": 32}

    def _begin(self) -> None:
        k = self.options["k"]
        if not 1 <= k <= self.features or self.features % k:
            raise WorkbenchError(f"{self.features} features do not stand in k={k} groups of equal size")

    def activate(self, pre: Tensor) -> Tensor:
        groups = torch.relu(pre).unflatten(-1, (self.options["k"], -1))
        best = groups.max(dim=-1, keepdim=True)
        return torch.zeros_like(groups).scatter(-1, best.indices, best.values).flatten(-2)

    def objective(self, x: Tensor, target: Tensor, now: Progress) -> Terms:
        raise Refused(
            "groupmax coders are read from files and not trained here; make_coder('topk', ...) makes one that is"
        )
