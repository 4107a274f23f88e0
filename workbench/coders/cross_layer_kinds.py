"""The activations of cross-layer transcoders: TopK, BatchTopK and JumpReLU, each with its loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workbench.coders.coder import Progress, Terms
from workbench.coders.cross_layer import CrossLayer
from workbench.coders.kinds.jumprelu import jump
from workbench.errors import UnknownName, WorkbenchError
from workbench.kernels.topk_encode import topk_encode

AUXILIARY = 1 / 32
"""Weight of the loss that lets dead features explain what is left (Gao et al. 2024, appendix A.2)."""


class TopKCrossLayer(CrossLayer):
    """The k largest positive pre-activations of every layer and row (Gao et al. 2024, arXiv 2406.04093), with AuxK."""

    kind = "topk"

    def __init__(self, layers: int, width: int, features: int, *, k: int, **options: Any) -> None:
        super().__init__(layers, width, features, **options)
        self.k = _whole_k(k, features)

    @property
    def options(self) -> dict[str, Any]:
        return {"k": self.k}

    def activation(self, pre: Tensor, layer: int | slice = slice(None)) -> Tensor:
        values, indices = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter(-1, indices, values.relu())

    def objective(self, x: Tensor, y: Tensor, now: Progress) -> Terms:
        codes = [
            topk_encode(x[:, layer], self.W_enc[layer], self.b_enc[layer], k=self.k) for layer in range(self.layers)
        ]
        values = torch.stack([code.values.to(x.dtype) for code in codes], 1)
        indices = torch.stack([code.indices for code in codes], 1)
        output = self.decode_sparse(values, indices) + self.skipped(x)
        error = squared_error(output, y)
        counts = torch.zeros(self.layers, self.features + 1, device=x.device)
        for layer in range(self.layers):
            counts[layer] = torch.bincount(indices[:, layer].flatten() + 1, minlength=self.features + 1)
        active = counts[:, 1:]
        auxiliary = auxiliary_error(self, x, (y - output).detach(), now)
        loss = error if auxiliary is None else error + AUXILIARY * auxiliary
        return Terms(loss, output, active, _parts(error, auxiliary, active, len(x)))


class BatchTopKCrossLayer(CrossLayer):
    """The N L k largest positive pre-activations of a batch (Bussmann et al. 2024, arXiv 2412.06410), layers sharing the budget.

    Inference keeps what exceeds ``threshold``: while training the running mean of the smallest pre-activation that was kept, and
    at its end (``settle``) the one that gives k features on average.
    """

    kind = "batchtopk"
    threshold: Tensor
    RATE = 0.01

    def __init__(self, layers: int, width: int, features: int, *, k: float, **options: Any) -> None:
        super().__init__(layers, width, features, **options)
        if isinstance(k, bool) or not isinstance(k, int | float) or not 0 < k <= features:
            raise WorkbenchError(
                f"k, the features per row and layer on average, is from above 0 to {features}; got {k!r}"
            )
        self.k = k
        self.register_buffer("threshold", torch.zeros(()))

    @property
    def options(self) -> dict[str, Any]:
        return {"k": self.k}

    def activation(self, pre: Tensor, layer: int | slice = slice(None)) -> Tensor:
        return pre * (pre > self.threshold).to(pre.dtype)

    def objective(self, x: Tensor, y: Tensor, now: Progress) -> Terms:
        pre = self.pre_all(x).relu()
        least = self._least(pre.detach())
        code = pre * ((pre >= least) & (pre > 0)).to(pre.dtype)
        with torch.no_grad():
            first = now.step == 0
            self.threshold.copy_(least if first else torch.lerp(self.threshold, least.to(self.threshold), self.RATE))
        output = self.decode(code) + self.skipped(x)
        error = squared_error(output, y)
        active = (code.detach() > 0).sum(0).float()
        auxiliary = auxiliary_error(self, x, (y - output).detach(), now)
        loss = error if auxiliary is None else error + AUXILIARY * auxiliary
        return Terms(loss, output, active, _parts(error, auxiliary, active, len(x)))

    @torch.no_grad()
    def settle(self, x: Tensor) -> None:
        self.threshold.copy_(torch.nextafter(self._least(self.pre_all(x).relu()), torch.zeros((), dtype=x.dtype)))

    def _least(self, pre: Tensor) -> Tensor:
        """The smallest of the N L k largest of ``[N, L, F]``."""
        count = max(1, min(round(self.k * len(pre) * self.layers), pre.numel()))
        return pre.flatten().kthvalue(pre.numel() - count + 1).values


class JumpReLUCrossLayer(CrossLayer):
    """f = p where p > theta, else 0, with a price for large codes (Ameisen et al. 2025, equation 3):

        loss = error + lambda sum_i tanh(c |w_i| f_i) + pre_act sum_i |w_i| ReLU(theta_i - p_i)      |w| of all its decoders

    lambda grows linearly over the whole run. The last term, for features below their threshold, keeps them alive. Gradients to
    theta are those of a rectangle kernel of width ``bandwidth`` (Rajamanoharan et al. 2024, arXiv 2407.14435, equations 11, 12).
    """

    kind = "jumprelu"

    def __init__(
        self,
        layers: int,
        width: int,
        features: int,
        *,
        sparsity: float = 0.1,
        tanh_scale: float = 4.0,
        bandwidth: float = 2.0,
        threshold: float = 0.1,
        pre_act: float = 3e-6,
        **options: Any,
    ) -> None:
        super().__init__(layers, width, features, **options)
        for name, value in (("tanh_scale", tanh_scale), ("bandwidth", bandwidth), ("threshold", threshold)):
            if not value > 0:
                raise WorkbenchError(f"{name} is above 0; got {value!r}")
        self.sparsity, self.tanh_scale, self.bandwidth, self.pre_act = sparsity, tanh_scale, bandwidth, pre_act
        self.start = threshold
        self.log_threshold = nn.Parameter(torch.full((layers, features), float(threshold)).log())

    @property
    def options(self) -> dict[str, Any]:
        names = ("sparsity", "tanh_scale", "bandwidth", "pre_act")
        return {"threshold": self.start, **{name: getattr(self, name) for name in names}}

    @property
    def threshold(self) -> Tensor:
        """Theta ``[L, F]``, above 0."""
        return self.log_threshold.exp()

    def activation(self, pre: Tensor, layer: int | slice = slice(None)) -> Tensor:
        return jump_relu(pre, self.threshold[layer], self.bandwidth)

    def objective(self, x: Tensor, y: Tensor, now: Progress) -> Terms:
        pre = self.pre_all(x)
        code = self.activation(pre)
        output = self.decode(code) + self.skipped(x)
        error = squared_error(output, y)
        norms = self.decoder_norms()
        price = torch.tanh(self.tanh_scale * norms * code).sum((-1, -2)).mean()
        below = ((self.threshold - pre).relu() * norms).sum((-1, -2)).mean()
        loss = error + self.sparsity * now.ramp(1.0) * price + self.pre_act * below
        active = (code.detach() > 0).sum(0).float()
        parts = {**_parts(error, None, active, len(x)), "price": price.detach()}
        return Terms(loss, output, active, parts)


KINDS: dict[str, type[CrossLayer]] = {c.kind: c for c in (TopKCrossLayer, BatchTopKCrossLayer, JumpReLUCrossLayer)}


def make_cross_layer(kind: str, layers: int, width: int, features: int, **options: Any) -> CrossLayer:
    """A cross-layer transcoder with random weights; ``options`` are the kind's own and those of ``CrossLayer``."""
    if kind not in KINDS:
        raise UnknownName("kind of cross-layer transcoder", kind, KINDS)
    try:
        return KINDS[kind](layers, width, features, **options)
    except TypeError as error:
        raise WorkbenchError(
            f"a cross-layer transcoder of kind {kind!r}: {str(error).split('.__init__() ')[-1]}"
        ) from None


def jump_relu(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """``pre [..., L, F]`` (or ``[..., F]``) where it exceeds ``threshold`` ``[L, F]`` (``[F]``), else 0. The gradient to the
    threshold is -(theta / bandwidth) where |pre - theta| < bandwidth / 2, else 0."""
    axes = threshold.ndim
    found = jump(pre.flatten(-axes), threshold.flatten(), bandwidth)
    return found.unflatten(-1, threshold.shape)


def squared_error(output: Tensor, y: Tensor) -> Tensor:
    """Squared error summed over layers and width, mean over rows."""
    return (output - y).square().sum((-1, -2)).mean()


def auxiliary_error(coder: CrossLayer, x: Tensor, left: Tensor, now: Progress) -> Tensor | None:
    """Error of the dead features of every layer at explaining ``left`` ``[N, L, D']``, scaled down while few are dead; None if
    none is."""
    dead = now.dead
    most = max(1, coder.width // 2)
    k = min(most, int(dead.sum(1).max()))
    if not k:
        return None
    pre = coder.pre_all(x).masked_fill(~dead, float("-inf"))
    values, indices = pre.topk(k, dim=-1)
    empty = values.isneginf()
    guess = coder.decode_sparse(values.masked_fill(empty, 0.0).relu(), indices.masked_fill(empty, -1)) - coder.b_dec
    return min(1.0, float(dead.sum()) / (coder.layers * most)) * squared_error(guess, left)


def _parts(error: Tensor, auxiliary: Tensor | None, active: Tensor, rows: int) -> dict[str, Tensor]:
    parts = {"error": error.detach(), "l0": active.sum() / rows}
    return parts if auxiliary is None else {**parts, "auxiliary": auxiliary.detach()}


def _whole_k(k: Any, features: int) -> int:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= features:
        raise WorkbenchError(f"k, the features per row and layer, is a whole number from 1 to {features}; got {k!r}")
    return k
