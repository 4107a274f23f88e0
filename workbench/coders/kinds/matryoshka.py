"""Matryoshka autoencoders (Bussmann et al. 2025, arXiv 2503.17547): the first features alone must already explain x.

Codes are those of BatchTopK; the error is the mean over nested dictionaries, of which the m-th has the first ``prefixes[m]``
share of the features. General features come first, special ones do not eat them up (absorption).
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from workbench.coders.code import Code
from workbench.coders.coder import Progress, Terms, squared
from workbench.coders.kinds.batchtopk import BatchTopK
from workbench.errors import WorkbenchError
from workbench.kernels.sparse_decode import sparse_decode


class Matryoshka(BatchTopK):
    kind = "matryoshka"
    paper = "arXiv 2503.17547"
    defaults: ClassVar[dict[str, Any]] = {**BatchTopK.defaults, "prefixes": (0.0625, 0.125, 0.25, 0.5, 1.0)}

    def _begin(self) -> None:
        super()._begin()
        shares = self.options["prefixes"] = tuple(self.options["prefixes"])
        if not shares or list(shares) != sorted(set(shares)) or shares[0] <= 0 or shares[-1] != 1:
            raise WorkbenchError(
                f"prefixes are growing shares of the features up to 1, such as (.25, .5, 1); got {shares}"
            )

    @property
    def sizes(self) -> list[int]:
        """Features of the nested dictionaries."""
        return [max(1, round(share * self.features)) for share in self.options["prefixes"]]

    def objective(self, x: Tensor, target: Tensor, now: Progress) -> Terms:
        code = self.chosen(x, now)
        skipped = self.skipped(x)
        output, low, errors = self.b_dec + skipped, 0, []
        for size in self.sizes:
            inside = (code.indices >= low) & (code.indices < size)
            part = Code(code.values * inside, code.indices.masked_fill(~inside, -1), self.features)
            output = output + sparse_decode(part.values, part.indices, self.W_dec)
            errors.append(squared(output, target))
            low = size
        error = sum(errors[1:], errors[0]) / len(errors)
        parts = {"error": errors[-1], "nested": error}
        revived = self.auxiliary(x, (target - output).detach(), now)
        loss = error
        if revived is not None:
            parts["auxiliary"] = revived
            loss = loss + self.options["aux"] * revived
        return Terms(loss, output, self.activity(code), parts)
