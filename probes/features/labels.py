"""Rows with labels: concepts, balanced splits, linear probes, and the features of a coder that tell a concept apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.probes.features.reading import chunks, like

if TYPE_CHECKING:
    from workbench.coders.coder import Coder

FEWEST = 8
"""Rows with and without a concept that a split needs at least."""
_TRAINED = 0.8


@dataclass(frozen=True)
class Probe:
    """A linear probe of rows: it says yes where ``x @ weight + bias > 0``."""

    weight: Tensor
    bias: float

    def says(self, x: Tensor) -> Tensor:
        """``[N]`` bool."""
        return x.double() @ self.weight + self.bias > 0

    def accuracy(self, x: Tensor, label: Tensor) -> float:
        return float((self.says(x) == label).double().mean())


@dataclass(frozen=True)
class Split:
    """Row numbers for training and for testing, as many with the concept as without."""

    train: Tensor
    test: Tensor


def concepts(labels: Any, rows: int) -> tuple[tuple[str, ...], Tensor]:
    """Names and ``[N, C]`` bool of concepts.

    ``labels``: a mapping of name to bool ``[N]``; a bool array ``[N]`` or ``[N, C]``; or whole numbers ``[N]``, the class of each
    row, where each class becomes a concept. Refused: another number of rows, and values that are neither.
    """
    if isinstance(labels, Mapping):
        if not labels:
            raise WorkbenchError("no concept given: labels is an empty mapping")
        columns = [flags(name, value, rows) for name, value in labels.items()]
        return tuple(map(str, labels)), torch.stack(columns, 1)
    found = torch.as_tensor(labels)
    if found.shape[:1] != (rows,):
        raise WorkbenchError(f"labels belong to {rows} rows; got {list(found.shape)}")
    if found.dtype == torch.bool:
        found = found[:, None] if found.ndim == 1 else found
        if found.ndim == 2:
            return tuple(map(str, range(found.shape[1]))), found
    elif not found.is_floating_point() and found.ndim == 1:
        classes = found.unique().tolist()
        return tuple(map(str, classes)), torch.stack([found == c for c in classes], 1)
    raise WorkbenchError(
        "labels are bool [N] or [N, C], whole numbers [N], or a mapping of name to bool [N]; "
        f"got {found.dtype} {list(found.shape)}"
    )


def split(label: Tensor, name: str, *, train: int, test: int, seed: int) -> Split:
    """A balanced split: at most ``train`` and ``test`` rows, fewer where the rarer side is smaller (four fifths for training)."""
    generator = torch.Generator().manual_seed(seed)
    sides = [side.nonzero()[:, 0] for side in (label, ~label)]
    sides = [side[torch.randperm(len(side), generator=generator)] for side in sides]
    fewest = min(map(len, sides))
    if fewest < FEWEST:
        raise Refused(
            f"concept {name!r} has {len(sides[0])} rows with and {len(sides[1])} without; at least {FEWEST} are needed"
        )
    cut = min(train // 2, int(_TRAINED * fewest))
    end = cut + min(test // 2, fewest - cut)
    return Split(torch.cat([side[:cut] for side in sides]), torch.cat([side[cut:end] for side in sides]))


def probe(x: Tensor, label: Tensor) -> Probe:
    """Logistic regression (L2, C = 1) on standardised columns, folded back so that it reads the rows themselves."""
    from sklearn.linear_model import LogisticRegression

    rows = x.detach().cpu().double()
    mean, scale = rows.mean(0), rows.std(0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    fitted = LogisticRegression(max_iter=1000).fit(((rows - mean) / scale).numpy(), label.cpu().numpy())
    weight = torch.as_tensor(fitted.coef_[0]) / scale
    return Probe(weight, float(fitted.intercept_[0]) - float(mean @ weight))


def f1(says: Tensor, label: Tensor) -> float:
    """Harmonic mean of precision and recall; 0 where nothing is found."""
    both = int((says & label).sum())
    return 2 * both / max(int(says.sum()) + int(label.sum()), 1)


@torch.no_grad()
def class_means(coder: Coder, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean activation ``[C, F]`` (float64) of every feature on the rows with and on those without each concept ``[N, C]``."""
    totals = torch.zeros(2, labels.shape[1], coder.features, dtype=torch.float64)
    at = 0
    for part in chunks(like(x, coder), coder.features):
        f = coder.encode(part)
        on = labels[at : at + len(part)].to(f.device, f.dtype)
        at += len(part)
        totals[0] += (on.T @ f).double().cpu()
        totals[1] += ((1 - on).T @ f).double().cpu()
    sizes = torch.stack([labels.sum(0), (~labels).sum(0)]).double()
    means = totals / sizes.clamp(min=1)[..., None]
    return means[0], means[1]


@torch.no_grad()
def columns(coder: Coder, x: Tensor, features: Sequence[int] | Tensor) -> Tensor:
    """Activations ``[N, K]`` (float64) of chosen features."""
    chosen = torch.as_tensor(features, dtype=torch.int64).to(coder.W_dec.device)
    return torch.cat([coder.encode(part)[:, chosen].double().cpu() for part in chunks(like(x, coder), coder.features)])


@torch.no_grad()
def alive(coder: Coder, x: Tensor) -> Tensor:
    """Indices of the features that are active on some row."""
    on = torch.zeros(coder.features, dtype=torch.bool)
    for part in chunks(like(x, coder), coder.features):
        on |= (coder.encode(part) > 0).any(0).cpu()
    return on.nonzero()[:, 0]


def flags(name: Any, value: Any, rows: int) -> Tensor:
    """One concept as bool ``[N]``; 0 and 1 pass as bool."""
    found = torch.as_tensor(value)
    if found.shape != (rows,):
        raise WorkbenchError(f"labels of {name!r} belong to {rows} rows; got {list(found.shape)}")
    if found.dtype == torch.bool:
        return found
    if not bool(((found == 0) | (found == 1)).all()):
        raise WorkbenchError(f"labels of {name!r} are bool, or 0 and 1; got {found.dtype}")
    return found == 1
