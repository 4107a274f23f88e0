"""Cross-layer transcoders on arrays, with scikit-learn's conventions: ``fit``, ``transform``, learned attributes end in ``_``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from torch import Tensor

from workbench.coders.cross_layer import CrossLayer
from workbench.coders.cross_layer_kinds import make_cross_layer
from workbench.coders.cross_layer_learner import CrossLayerLearner
from workbench.errors import WorkbenchError

ROWS = 16_384
"""Rows that what inference needs to know is taken from, at most."""


class CrossLayerTranscoder(BaseEstimator):
    """A cross-layer transcoder of ``kind`` ``topk``, ``batchtopk`` or ``jumprelu``, with ``features`` per layer.

    ``k`` counts features per row and layer (kinds ``topk`` and ``batchtopk``). ``sparsity``, ``tanh_scale``, ``bandwidth`` and
    ``threshold`` are those of ``JumpReLUCrossLayer``. Training (``CrossLayerLearner``): ``steps`` batches of ``batch`` random
    rows at ``rate``; the coder that results takes and gives raw numbers. A feature is dead after ``dead_after`` silent rows.

    Learned: ``coder_`` (a ``CrossLayer``), ``encoders_ [L, D, F]``, ``decoders_`` (``decoders_[l] [F, L - l, D']``), ``losses_``
    ``[steps]`` (training error of each step over the variance of Y), ``silent_ [L, F]`` rows since a feature was last active.
    """

    def __init__(
        self,
        features: int = 256,
        kind: str = "topk",
        k: int = 8,
        skip: bool = False,
        steps: int = 1000,
        batch: int = 512,
        rate: float = 2e-3,
        sparsity: float = 0.1,
        tanh_scale: float = 4.0,
        bandwidth: float = 2.0,
        threshold: float = 0.1,
        dead_after: int = 20_000,
        seed: int = 0,
    ) -> None:
        self.features = features
        self.kind = kind
        self.k = k
        self.skip = skip
        self.steps = steps
        self.batch = batch
        self.rate = rate
        self.sparsity = sparsity
        self.tanh_scale = tanh_scale
        self.bandwidth = bandwidth
        self.threshold = threshold
        self.dead_after = dead_after
        self.seed = seed

    def fit(self, X: Any, Y: Any) -> CrossLayerTranscoder:
        """Learn to make Y ``[N, L, D']``, what MLPs write, of X ``[N, L, D]``, what they read; arrays or tensors."""
        x, y = stacked("X", X), stacked("Y", Y)
        if x.shape[:2] != y.shape[:2]:
            raise WorkbenchError(
                f"X [N, L, D] and Y [N, L, D'] have the same N and L; got {list(x.shape)} and {list(y.shape)}"
            )
        for name in ("steps", "batch", "dead_after"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise WorkbenchError(f"{name} is a positive whole number; got {value!r}")
        n, layers, width = x.shape
        coder = make_cross_layer(
            self.kind, layers, width, self.features, width_out=y.shape[2], skip=self.skip, seed=self.seed, **self._options()
        ).to(x)  # fmt: skip
        learner = CrossLayerLearner(coder, steps=self.steps, rate=self.rate, dead_after=self.dead_after)
        learner.start(x, y)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            rows = torch.randint(n, (min(self.batch, n),), generator=generator)
            learner.step(x[rows], y[rows])
        coder = learner.finish(x[:ROWS])
        coder.about["recipe"] = {"rows": n, **self.get_params()}
        self.coder_: CrossLayer = coder
        self.losses_ = torch.tensor(learner.losses)
        self.silent_ = learner.silent
        return self

    @property
    def encoders_(self) -> Tensor:
        """Reading directions, the columns of ``[L, D, F]``."""
        return self._coder().W_enc.detach()

    @property
    def decoders_(self) -> list[Tensor]:
        """``decoders_[l] [F, L - l, D']``: what the features of layer l write into layer l, l + 1, ..."""
        return [weight.detach() for weight in self._coder().W_dec]

    def transform(self, X: Any) -> Any:
        """Codes ``[N, L, F]`` of X ``[N, L, D]``, an array for an array and a tensor for a tensor."""
        return self._answer(X, "encode_all")

    def reconstruct(self, X: Any) -> Any:
        """The outputs ``[N, L, D']`` that the coder makes of X, skip term included."""
        return self._answer(X, "forward")

    def fvu(self, X: Any, Y: Any) -> Tensor:
        """Share of Y's variance that is not explained, per layer ``[L]``."""
        y = stacked("Y", Y)
        made = self.reconstruct(stacked("X", X)).to(y)
        if made.shape != y.shape:
            raise WorkbenchError(f"Y is {list(made.shape)} for this X; got {list(y.shape)}")
        return (made - y).square().sum((0, 2)) / (y - y.mean(0)).square().sum((0, 2))

    def save(self, folder: str | Path) -> Path:
        """Write the coder as ``CrossLayer.save`` does."""
        return self._coder().save(folder)

    @classmethod
    def load(cls, folder: str | Path) -> CrossLayerTranscoder:
        """A fitted estimator around the coder in a folder, with the settings it was trained with where they are known."""
        coder = CrossLayer.load(folder)
        known = cls().get_params()
        recipe = coder.about.get("recipe", {})
        found = cls(**{name: value for name, value in recipe.items() if name in known})
        found.set_params(kind=coder.kind, features=coder.features)
        for parameter in coder.parameters():
            parameter.requires_grad_(False)
        found.coder_ = coder
        return found

    def _options(self) -> dict[str, Any]:
        if self.kind == "jumprelu":
            names = ("sparsity", "tanh_scale", "bandwidth", "threshold")
            return {name: getattr(self, name) for name in names}
        return {"k": self.k}

    def _coder(self) -> CrossLayer:
        if not hasattr(self, "coder_"):
            raise NotFittedError("this CrossLayerTranscoder is not fitted yet; call fit(X, Y) first")
        return self.coder_

    def _answer(self, X: Any, method: str) -> Any:
        coder = self._coder()
        x = stacked("X", X)
        with torch.no_grad():
            found: Tensor = getattr(coder, method)(x.to(coder.W_enc))
        return found if isinstance(X, Tensor) else found.cpu().numpy()


def stacked(name: str, given: Any) -> Tensor:
    """Rows of every layer as a tensor ``[N, L, D]`` of floats; refuses other shapes, NaN and empty input."""
    tensor = torch.as_tensor(np.asarray(given) if not isinstance(given, Tensor) else given).detach()
    if tensor.ndim != 3 or 0 in tensor.shape:
        raise WorkbenchError(f"{name} is [N, L, D], rows of every layer, not empty; got {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise WorkbenchError(f"{name} holds floats; got {tensor.dtype}")
    tensor = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    if not bool(torch.isfinite(tensor).all()):
        raise WorkbenchError(f"{name} holds NaN or infinity")
    return tensor
