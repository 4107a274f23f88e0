"""BatchTopK autoencoders (Bussmann et al. 2024, arXiv 2412.06410): a batch of N rows shares N k places.

In training f keeps the N k largest positive pre-activations of the batch, so that hard rows may use more features than easy
ones. At inference a row stands alone: f keeps what is above ``threshold``, the running mean of the smallest activation
that was kept. The further terms of the loss are those of TopK.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.coders.code import Code
from workbench.coders.coder import Coder, Progress
from workbench.coders.kinds.topk import TopK


class BatchTopK(TopK):
    kind = "batchtopk"
    paper = "arXiv 2412.06410"
    defaults: ClassVar[dict[str, Any]] = {**TopK.defaults, "memory": 0.99}
    scaled = ("b_enc", "threshold")
    threshold: Tensor

    def _begin(self) -> None:
        super()._begin()
        self.register_buffer("threshold", torch.tensor(0.0))

    def sparse(self, x: Tensor) -> Code:
        return Coder.sparse(self, x)

    def activate(self, pre: Tensor) -> Tensor:
        return torch.where(pre > self.threshold, torch.relu(pre), 0.0)

    def chosen(self, x: Tensor, now: Progress) -> Code:
        code, smallest = self.of_batch(x)
        if smallest is not None:
            with torch.no_grad():
                # A plain mean at first, so that the start is forgotten.
                keep = min(self.options["memory"], now.step / (now.step + 1))
                self.threshold.mul_(keep).add_(smallest, alpha=1 - keep)
        return code

    def of_batch(self, x: Tensor) -> tuple[Code, Tensor | None]:
        """The N k largest of a batch, and the smallest of them (None if nothing is positive).

        Each row offers its m largest. If the last offer of a row was taken it might have had more, and all offer twice as many.
        """
        wanted = len(x) * self.options["k"]
        m = min(2 * self.options["k"], self.features)
        while True:
            offered = self._largest(x, m)
            values = offered.values.detach()
            positive = int((values > 0).sum())
            if not positive:
                return offered, None
            # kept is a value, of which the batch has at most a few copies: ties above N k places are all taken
            cut = values.flatten().kthvalue(values.numel() - min(wanted, positive) + 1).values
            taken = values >= cut
            if m == self.features or not bool(taken[:, -1].any()):
                break
            m = min(2 * m, self.features)
        width = max(1, int(taken.sum(1).max()))
        taken = taken[:, :width]
        kept = Code(
            offered.values[:, :width] * taken, offered.indices[:, :width].masked_fill(~taken, -1), self.features
        )
        return kept, cut
