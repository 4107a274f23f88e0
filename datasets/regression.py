"""Linear regression in context as vectors, and what ordinary and ridge regression make of the same rows.

::

    row      [x_1; y_1] [x_2; y_2] ... [x_L; y_L] [x_q; 0]        y = w . x + noise, a w of its own for every row

x is normal, w normal with variance 1 / d, so y has variance 1 + noise^2; the scale of w, sizes and noise are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError


@dataclass(frozen=True)
class RegressionBatch:
    """``tokens`` ``[B, L + 1, d + 1]``, the last with 0 for its y; ``target`` ``[B]``, that y; ``weights`` ``[B, d]``."""

    tokens: Tensor
    target: Tensor
    weights: Tensor

    @property
    def x(self) -> Tensor:
        """``[B, L, d]`` of the context."""
        return self.tokens[:, :-1, :-1]

    @property
    def y(self) -> Tensor:
        """``[B, L]`` of the context."""
        return self.tokens[:, :-1, -1]

    @property
    def query(self) -> Tensor:
        """``[B, d]``."""
        return self.tokens[:, -1, :-1]


def regression_batch(
    n: int, generator: torch.Generator, *, width: int = 5, examples: int = 40, noise: float = 0.1
) -> RegressionBatch:
    """``n`` rows of ``examples`` points in ``width`` dimensions; ``noise`` is the standard deviation added to every y, that of
    the query included."""
    if width < 1 or examples < 1:
        raise WorkbenchError(f"rows have at least one point and one dimension; got {examples} and {width}")
    if noise < 0:
        raise WorkbenchError(f"noise is a standard deviation, 0 or more; got {noise}")
    x = torch.randn(n, examples + 1, width, generator=generator)
    weights = torch.randn(n, width, generator=generator) / width**0.5
    y = torch.einsum("nld,nd->nl", x, weights) + noise * torch.randn(n, examples + 1, generator=generator)
    tokens = torch.cat([x, y[..., None]], -1)
    tokens[:, -1, -1] = 0
    return RegressionBatch(tokens, y[:, -1], weights)


def ridge(batch: RegressionBatch, penalty: float) -> Tensor:
    """Prediction at the query ``[B]`` of w = (X^T X + penalty I)^-1 X^T y, without intercept. With penalty = d * noise^2 it is
    the mean of the posterior under the prior that rows are drawn from: no predictor has a smaller expected squared error."""
    if penalty < 0:
        raise WorkbenchError(f"the penalty is 0 or more; got {penalty}")
    count, width = batch.x.shape[1:]
    if penalty == 0 and count < width:
        raise Refused(
            f"{count} points leave {width} weights open; give ridge a penalty above 0, or rows of more points"
        )
    gram = batch.x.mT @ batch.x + penalty * torch.eye(width, dtype=batch.x.dtype)
    moment = batch.x.mT @ batch.y[..., None]
    return (batch.query[:, None] @ torch.linalg.solve(gram, moment)).flatten()


def least_squares(batch: RegressionBatch) -> Tensor:
    """Prediction at the query ``[B]`` of ordinary least squares, without intercept."""
    return ridge(batch, 0.0)
