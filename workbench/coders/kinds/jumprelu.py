"""JumpReLU autoencoders (Rajamanoharan et al. 2024, arXiv 2407.14435): f = pre 1[pre > theta], a threshold per feature.

loss = |y - x|^2 + sparsity sum_i 1[pre_i > theta_i]

Neither f nor the count has a slope in theta. The backward pass uses that of their expectation under a rectangle of width
``bandwidth`` = eps around the threshold (equations 11 and 12): with K(u) = 1[|u| < 1/2],

d f / d theta = -(theta / eps) K((pre - theta) / eps)        d count / d theta = -(1 / eps) K((pre - theta) / eps)

Thresholds are exp(log_threshold) > 0. ``threshold`` (where they start) and ``bandwidth`` are for rows whose mean norm is sqrt(D),
as the trainer scales them; the paper has rows of norm 1 and 0.001 for both. The penalty ramps up over the whole training.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from workbench.coders.coder import Coder, Progress, Terms, squared


class JumpReLU(Coder):
    kind = "jumprelu"
    paper = "arXiv 2407.14435"
    defaults: ClassVar[dict[str, Any]] = {"sparsity": 1.0, "bandwidth": 2.0, "threshold": 0.5, "warm": 1.0}

    def _begin(self) -> None:
        self.log_threshold = nn.Parameter(torch.full((self.features,), float(self.options["threshold"])).log())

    @property
    def threshold(self) -> Tensor:
        """theta ``[F]``."""
        return self.log_threshold.exp()

    def activate(self, pre: Tensor) -> Tensor:
        return pre * (pre > self.threshold)

    def objective(self, x: Tensor, target: Tensor, now: Progress) -> Terms:
        pre = self.pre(x)
        f = jump(pre, self.threshold, self.options["bandwidth"])
        output = self.decode(f) + self.skipped(x)
        error, size = squared(output, target), self.penalty(pre, f)
        loss = error + self.options["sparsity"] * now.ramp(self.options["warm"]) * size
        return Terms(loss, output, (f > 0).sum(0), {"error": error, "penalty": size})

    def strength(self, x: Tensor, size: Tensor, features: Tensor) -> Tensor:
        return size.maximum(1.2 * self.threshold[features])

    def penalty(self, pre: Tensor, f: Tensor) -> Tensor:
        """Active features per row."""
        return step(pre, self.threshold, self.options["bandwidth"]).sum(-1).mean()

    @torch.no_grad()
    def fold(self, scale_in: Tensor, scale_out: Tensor) -> None:
        super().fold(scale_in, scale_out)
        self.log_threshold.sub_(scale_in.mean().log())


class JumpReLUTanh(JumpReLU):
    """The recipe of Conerly et al. (Anthropic, January 2025): wide bandwidth, every pre-activation gets a slope, and

    loss = |y - x|^2 + sparsity sum_i tanh(scale f_i |d_i|) + revive sum_i ReLU(theta_i - pre_i) |d_i|

    whose last term revives features that are never active."""

    kind = "jumprelu-tanh"
    paper = "Conerly et al. 2025"
    defaults: ClassVar[dict[str, Any]] = {
        "sparsity": 5.0, "bandwidth": 2.0, "threshold": 0.1, "warm": 1.0, "scale": 4.0, "revive": 3e-6,
    }  # fmt: skip
    unit_decoder = False

    def objective(self, x: Tensor, target: Tensor, now: Progress) -> Terms:
        pre = self.pre(x)
        theta, norms = self.threshold, self.decoder_norms()
        f = _JumpBoth.apply(pre, theta, self.options["bandwidth"])
        output = self.decode(f) + self.skipped(x)
        error = squared(output, target)
        size = torch.tanh(self.options["scale"] * f * norms).sum(-1).mean()
        asleep = (torch.relu(theta - pre) * norms).sum(-1).mean()
        loss = (
            error + self.options["sparsity"] * now.ramp(self.options["warm"]) * size + self.options["revive"] * asleep
        )
        return Terms(loss, output, (f > 0).sum(0), {"error": error, "penalty": size, "asleep": asleep})


def jump(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """``pre 1[pre > threshold]``, with the straight-through slope in the threshold."""
    return _Jump.apply(pre, threshold, bandwidth)


def step(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """``1[pre > threshold]``, with the straight-through slope in the threshold alone."""
    return _Step.apply(pre, threshold, bandwidth)


def _near(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype)


def _over_rows(grad: Tensor, threshold: Tensor) -> Tensor:
    return grad.reshape(-1, threshold.shape[-1]).sum(0)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        slope = -(threshold / ctx.bandwidth) * _near(pre, threshold, ctx.bandwidth)
        return grads[0] * (pre > threshold), _over_rows(grads[0] * slope, threshold), None


class _JumpBoth(_Jump):
    """As ``_Jump``; within the rectangle the pre-activation gets the slope 1 even below the threshold."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        to_pre, to_threshold, _ = _Jump.backward(ctx, *grads)
        return torch.where(_near(pre, threshold, ctx.bandwidth) > 0, grads[0], to_pre), to_threshold, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        slope = -_near(pre, threshold, ctx.bandwidth) / ctx.bandwidth
        return None, _over_rows(grads[0] * slope, threshold), None
