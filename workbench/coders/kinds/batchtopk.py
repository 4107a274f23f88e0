"""BatchTopK autoencoders (Bussmann et al. 2024, arXiv 2412.06410): a batch of N rows shares N k places.

In training f keeps the N k largest positive pre-activations of the batch, so that hard rows may use more features than easy
ones. At inference a row stands alone: f keeps what is above ``threshold``, the running mean of the smallest activation
that was kept. The further terms of the loss are those of TopK.

During the first ``by_row`` share of the training every row has k places of its own, as in TopK: as long as features are random,
rows that happen to be long would take nearly all places, and features that only short rows have would never be learned.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.coders.code import Code
from workbench.coders.coder import Coder, Progress
from workbench.coders.kinds.topk import TopK

_LOOKS = 8
"""While rows have their own places, every so many steps the threshold of the batch is looked at."""


class BatchTopK(TopK):
    kind = "batchtopk"
    paper = "arXiv 2412.06410"
    defaults: ClassVar[dict[str, Any]] = {**TopK.defaults, "memory": 0.99, "by_row": 0.8}
    scaled = ("b_enc", "threshold")
    threshold: Tensor

    def _begin(self) -> None:
        super()._begin()
        self.register_buffer("threshold", torch.tensor(0.0))
        self._offers = min(4 * self.options["k"], self.features)

    def sparse(self, x: Tensor) -> Code:
        return Coder.sparse(self, x)

    def activate(self, pre: Tensor) -> Tensor:
        return torch.where(pre > self.threshold, torch.relu(pre), 0.0)

    def chosen(self, x: Tensor, now: Progress) -> Code:
        if now.step < self.options["by_row"] * now.steps:
            if now.step % _LOOKS == 0:
                self._remember(self.of_batch(x)[1], now.step // _LOOKS)
            return TopK.sparse(self, x)
        code, smallest = self.of_batch(x)
        self._remember(smallest, now.step)
        return code

    def activity(self, code: Code) -> Tensor:
        """What is below the threshold is not active at inference, though a row with few features may have to use it: features
        that only fill such places count as silent."""
        held = code.values.detach() >= self.threshold
        return Code(code.values.detach() * held, code.indices, self.features).counts()

    @torch.no_grad()
    def _remember(self, smallest: Tensor | None, seen: int) -> None:
        """Let the running mean take in a batch; the first one of a training is taken as it is."""
        if smallest is not None:
            keep = min(self.options["memory"], seen / (seen + 1))
            self.threshold.mul_(keep).add_(smallest, alpha=1 - keep)

    def strength(self, x: Tensor, size: Tensor, features: Tensor) -> Tensor:
        return super().strength(x, size, features).maximum(1.2 * self.threshold)

    def of_batch(self, x: Tensor) -> tuple[Code, Tensor | None]:
        """The N k largest of a batch (of equal ones at the border all), and the smallest of them, None if nothing is positive.

        Each row offers its m largest; if the last offer of any row is taken, that row might have had more, and all offer more.
        """
        wanted = len(x) * self.options["k"]
        while True:
            m = self._offers
            offered = self._largest(x, m)
            values = offered.values.detach()
            positive = int((values > 0).sum())
            if not positive:
                return offered, None
            cut = values.flatten().kthvalue(values.numel() - min(wanted, positive) + 1).values
            taken = values >= cut
            width = int(taken.sum(1).max())
            if m == self.features or width < m:
                break
            self._offers = min(2 * m, self.features)
        self._offers = min(max(2 * self.options["k"], width + width // 4 + 1), self.features)
        taken = taken[:, :width]
        indices = offered.indices[:, :width].masked_fill(~taken, -1)
        return Code(offered.values[:, :width] * taken, indices, self.features), cut
