"""Coders on arrays, as scikit-learn estimators: what is learned ends in ``_``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import NotFittedError
from torch import Tensor

from workbench.coders.catalogue import make_coder
from workbench.coders.coder import Coder
from workbench.coders.learner import Learner
from workbench.errors import WorkbenchError

_STEPS, _BATCH = 5_000, 1024
_CHUNK = 8192


class _Dictionary(TransformerMixin, BaseEstimator):
    """What the estimators share; each says how its arrays become rows."""

    coder_: Coder
    history_: list[dict[str, float]]
    _numpy: bool = False

    def __init__(
        self,
        kind: str = "topk",
        *,
        features: int = 1024,
        k: int | None = None,
        sparsity: float | None = None,
        seed: int = 0,
        steps: int = _STEPS,
        batch: int = _BATCH,
        rate: float | None = None,
        start: str = "active-subspace",
        normalise: str = "expected",
        dead_after: int | None = None,
        redraws: int = 100,
        options: Mapping[str, Any] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.kind = kind
        self.features = features
        self.k = k
        self.sparsity = sparsity
        self.seed = seed
        self.steps = steps
        self.batch = batch
        self.rate = rate
        self.start = start
        self.normalise = normalise
        self.dead_after = dead_after
        self.redraws = redraws
        self.options = options
        self.progress = progress

    @property
    def decoder_(self) -> Any:
        """Directions that features write, ``[F, D_out]``."""
        return self._out(self._fitted().W_dec)

    @property
    def encoder_(self) -> Any:
        """Directions that features read, ``[D_in, F]``."""
        return self._out(self._fitted().W_enc)

    @property
    def n_features_in_(self) -> int:
        return self._fitted().d_in

    def transform(self, X: Any) -> Any:
        """The code of the rows of X, ``[N, F]``, at inference."""
        coder = self._fitted()
        return self._out(self._chunks(self._rows(X), coder.encode))

    def inverse_transform(self, code: Any) -> Any:
        """``code W_dec + b_dec``, ``[N, D_out]``, of a code ``[N, F]``."""
        coder = self._fitted()
        rows = _tensor(code, "a code").to(coder.W_dec)
        return self._out(self._chunks(rows, coder.decode))

    def save(self, folder: str | Path) -> Path:
        """Write the fitted coder into the new folder ``folder``."""
        return self._fitted().save(folder)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """An estimator fitted to the coder that is saved in ``folder``."""
        coder = Coder.load(folder)
        told = {name: coder.options[name] for name in ("k", "sparsity") if name in coder.options}
        rest = {name: value for name, value in coder.options.items() if name not in told}
        new = cls(coder.kind, features=coder.features, **told, options=rest)
        new.coder_, new.history_ = coder.requires_grad_(False), []
        return new

    def _learn(self, x: Tensor, y: Tensor | None, **shape: Any) -> Self:
        if y is not None and len(x) != len(y):
            raise WorkbenchError(f"X and Y have one row per sample; got {len(x)} and {len(y)}")
        for name, rows in (("X", x), ("Y", y)):
            if rows is not None and not bool(torch.isfinite(rows).all()):
                raise WorkbenchError(f"{name} holds NaN or infinities")
        given = {name: getattr(self, name) for name in ("k", "sparsity") if getattr(self, name) is not None}
        drawn = torch.Generator().manual_seed(self.seed)
        coder = make_coder(
            self.kind, x.shape[1], self.features, generator=drawn, **shape, **given, **dict(self.options or {})
        ).to(x)
        learner = Learner(
            coder, steps=self.steps, rows=min(self.batch, len(x)), rate=self.rate, seed=self.seed, normalise=self.normalise,
            start=self.start, dead_after=self.dead_after, redraws=self.redraws,
        )  # fmt: skip
        learner.start(x, y)
        self.history_ = []
        for step, some in enumerate(_batches(len(x), self.batch, self.steps, self.seed)):
            self.history_.append(learner.step(x[some], None if y is None else y[some]))
            if self.progress is not None:
                self.progress(step + 1, self.steps)
        self.coder_ = learner.finish()
        self.coder_.about = {"samples": len(x), "steps": self.steps, "batch": self.batch, "seed": self.seed}
        return self

    def _rows(self, X: Any) -> Tensor:
        coder = self._fitted()
        return _tensor(X, "X").to(coder.W_dec)

    def _fitted(self) -> Coder:
        if not hasattr(self, "coder_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet; call fit(X) first")
        return self.coder_

    def _out(self, value: Tensor) -> Any:
        value = value.detach()
        return value.cpu().numpy() if self._numpy else value

    @staticmethod
    @torch.no_grad()
    def _chunks(rows: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([work(some) for some in rows.split(_CHUNK)]) if len(rows) else work(rows)

    def _take(self, X: Any, name: str = "X") -> Tensor:
        """Rows of a fit, in a floating-point type; results are arrays if this was one."""
        self._numpy = not isinstance(X, Tensor)
        return _tensor(X, name)


class SAE(_Dictionary):
    """A sparse autoencoder of rows X ``[N, D]``.

    ``kind`` is one of ``wb.coder_kinds()``, ``features`` F, ``k`` (TopK, BatchTopK, Matryoshka) or ``sparsity`` (the others) the
    main option of the kind, ``options`` the others. ``steps`` batches of ``batch`` rows are drawn, epoch after epoch. ``start``
    and ``normalise``: see ``Learner``.

    Learned: ``coder_`` (the ``Coder``), ``decoder_ [F, D]``, ``encoder_ [D, F]``, ``history_`` (metrics of every step).
    Arrays give arrays, tensors give tensors. Refuses NaN.
    """

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn the dictionary; ``y`` is not looked at."""
        return self._learn(self._take(X), None)

    def reconstruct(self, X: Any) -> Any:
        """``inverse_transform(transform(X))``."""
        return self._out(self._chunks(self._rows(X), self._fitted()))


class Transcoder(_Dictionary):
    """Features of rows X ``[N, D_in]`` that predict Y ``[N, D_out]``, with ``skip`` beside a linear map (``W_skip``)."""

    def __init__(self, kind: str = "topk", *, skip: bool = False, **options: Any) -> None:
        super().__init__(kind, **options)
        self.skip = skip

    @classmethod
    def _get_param_names(cls) -> list[str]:
        return sorted([*_Dictionary._get_param_names(), "skip"])

    def fit(self, X: Any, y: Any = None) -> Self:
        """Learn to predict y, which is Y."""
        if y is None:
            raise WorkbenchError("a transcoder learns what X becomes: fit(X, Y)")
        given, target = self._take(X), _tensor(y, "Y")
        return self._learn(given, target.to(given), d_out=target.shape[1], skip=self.skip)

    def predict(self, X: Any) -> Any:
        """The prediction of Y, ``[N, D_out]``."""
        return self._out(self._chunks(self._rows(X), self._fitted()))


class Crosscoder(_Dictionary):
    """One dictionary for several places or models that were seen together: X is a list of ``[N, D_p]``, or ``[N, parts, D]``.

    ``decoder_`` is ``[F, sum of D_p]``, split by ``coder_.writes``; ``wb.relative_norms`` tells whose a feature is.
    """

    def fit(self, X: Any, y: Any = None) -> Self:
        parts = self._parts(X, fitting=True)
        widths = [part.shape[1] for part in parts]
        return self._learn(torch.cat(parts, 1), None, reads=widths, writes=widths)

    def transform(self, X: Any) -> Any:
        return self._out(self._chunks(self._joined(X), self._fitted().encode))

    def reconstruct(self, X: Any) -> list[Any]:
        """Of every part, ``[N, D_p]``."""
        found = self._chunks(self._joined(X), self._fitted())
        return [self._out(part) for part in found.split(self._fitted().writes, 1)]

    def _joined(self, X: Any) -> Tensor:
        return torch.cat(self._parts(X), 1).to(self._fitted().W_dec)

    def _parts(self, X: Any, *, fitting: bool = False) -> list[Tensor]:
        given = list(X) if isinstance(X, list | tuple) else list(torch.as_tensor(X).unbind(1))
        if fitting:
            self._numpy = not isinstance(X[0] if isinstance(X, list | tuple) else X, Tensor)
        parts = [_tensor(part, f"part {i} of X") for i, part in enumerate(given)]
        if len(parts) < 2:
            raise WorkbenchError("a crosscoder joins at least two places; an SAE has one")
        if len({len(part) for part in parts}) > 1:
            raise WorkbenchError(f"parts of X have one row per sample; got {[len(part) for part in parts]}")
        return parts


def _tensor(given: Any, name: str) -> Tensor:
    found = given if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    if found.ndim != 2 or not len(found):
        raise WorkbenchError(f"{name} is [N, D] with at least one row; got {list(found.shape)}")
    return found.detach() if found.is_floating_point() else found.float()


def _batches(rows: int, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Rows of ``steps`` batches: a new order for every epoch, a batch never larger than an epoch."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch, rows)
    order, at = torch.randperm(rows, generator=generator), 0
    for _ in range(steps):
        if at + size > rows:
            order, at = torch.randperm(rows, generator=generator), 0
        yield order[at : at + size]
        at += size
