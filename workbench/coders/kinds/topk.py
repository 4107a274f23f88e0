"""TopK autoencoders (Gao et al. 2024, arXiv 2406.04093): f keeps the k largest pre-activations that are positive.

loss = |y - x|^2 + aux min(n_dead / aux_k, 1) |e - e_hat|^2 + multi |y_4k - x|^2

AuxK: e = x - y is given, and e_hat is what the ``aux_k`` strongest of the dead features make of it. Multi-TopK (``multi``, 1/8
in the paper): y_4k is the output with 4k features, so that more features than k at inference do no harm.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from workbench.coders.code import Code
from workbench.coders.coder import Coder, Progress, Terms, squared
from workbench.errors import WorkbenchError
from workbench.kernels.sparse_decode import sparse_decode
from workbench.kernels.topk_encode import topk_encode


class TopK(Coder):
    kind = "topk"
    paper = "arXiv 2406.04093"
    defaults: ClassVar[dict[str, Any]] = {"k": 32, "aux": 1 / 32, "aux_k": None, "multi": 0.0}

    def _begin(self) -> None:
        k = self.options["k"]
        if not 1 <= k <= self.features:
            raise WorkbenchError(f"k of a coder with {self.features} features is 1 to {self.features}; got {k}")

    def sparse(self, x: Tensor) -> Code:
        flat = x.reshape(-1, x.shape[-1])
        self._check(flat)
        return self._largest(flat, self.options["k"])

    def activate(self, pre: Tensor) -> Tensor:
        flat = pre.reshape(-1, pre.shape[-1])
        found = flat.topk(self.options["k"], dim=1)
        dense = torch.zeros_like(flat).scatter(1, found.indices, torch.relu(found.values))
        return dense.view(pre.shape)

    def objective(self, x: Tensor, target: Tensor, now: Progress) -> Terms:
        code = self.chosen(x, now)
        skipped = self.skipped(x)
        output = self.decode(code) + skipped
        error = squared(output, target)
        parts = {"error": error}
        loss = error
        revived = self.auxiliary(x, (target - output).detach(), now)
        if revived is not None:
            parts["auxiliary"] = revived
            loss = loss + self.options["aux"] * revived
        if self.options["multi"]:
            more = self._largest(x, min(4 * self.options["k"], self.features))
            parts["multi"] = squared(self.decode(more) + skipped, target)
            loss = loss + self.options["multi"] * parts["multi"]
        return Terms(loss, output, self.activity(code), parts)

    def chosen(self, x: Tensor, now: Progress) -> Code:
        """The code that training decodes."""
        return self.sparse(x)

    def activity(self, code: Code) -> Tensor:
        """In how many rows each feature counts as active, ``[F]``."""
        return code.counts()

    def strength(self, x: Tensor, size: Tensor, features: Tensor) -> Tensor:
        return size.maximum(1.2 * self.pre(x).topk(self.options["k"], dim=1).values[:, -1])

    def auxiliary(self, x: Tensor, error: Tensor, now: Progress) -> Tensor | None:
        """``min(n_dead / aux_k, 1) |e - e_hat|^2``, None where nothing is dead."""
        dead = now.dead
        count = int(dead.sum())
        if not count or not self.options["aux"]:
            return None
        wanted = self.options["aux_k"] or max(1, min(512, self.d_in // 2))
        code = self._largest(x, min(wanted, count), excluded=~dead)
        found = sparse_decode(code.values, code.indices, self.W_dec)
        return min(count / wanted, 1.0) * squared(found, error)

    def _largest(self, x: Tensor, k: int, excluded: Tensor | None = None) -> Code:
        code = topk_encode(x, self.W_enc, self.b_enc, k=k, centre=self.centre, excluded=excluded)
        return Code(code.values.to(x.dtype), code.indices, self.features)
