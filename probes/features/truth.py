"""Are a coder's directions the true ones, and would another training find the same?

Cosines c[f, m] between decoder rows and known directions, with their sign:

    recovered   max over features, for each true direction: its mean is the mean max cosine of toy data
    explained   max over true directions, for each feature: low where features are made up
    matched     of the one-to-one assignment with the largest total cosine

``recovered_share`` and ``matched_share`` are the shares above ``above``. The null is a decoder of as many random unit vectors:
with F features in D dimensions chance alone gives a maximum of about sqrt(2 ln F / D).

Two coders are compared in the same way (stability over seeds: Paulo & Belrose, arXiv 2501.16615); a pair of features is
shared if decoder and, where both have one, encoder directions agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.errors import WorkbenchError
from workbench.probes.features.reading import check_rows
from workbench.results import Result, axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_CELLS = 2**24
"""Cosines held at once."""
_ASSIGNED = 2**27
"""The largest table of cosines that is assigned one to one."""


@dataclass(frozen=True)
class DecoderCosine(Result):
    """``recovered`` ``[M]`` and ``nearest`` ``[M]``: cosine and index of the feature nearest to each true direction;
    ``explained`` ``[F]`` the cosine for features; ``matched`` ``[P]`` the cosines of ``pairs`` ``[P, 2]`` (feature, true
    direction), P the smaller of F and M. ``null`` has the numbers of random unit vectors, ``above`` the cosine from which a
    direction counts as found."""

    recovered: Tensor
    nearest: Tensor
    explained: Tensor
    matched: Tensor
    pairs: Tensor
    above: float
    null: dict[str, float]

    @property
    def mean_max_cosine(self) -> float:
        """Mean over true directions of the cosine with their nearest feature."""
        return float(self.recovered.mean())

    @property
    def explained_mean(self) -> float:
        """Mean over features of the cosine with their nearest true direction."""
        return float(self.explained.mean())

    @property
    def recovered_share(self) -> float:
        return float((self.recovered > self.above).double().mean())

    @property
    def matched_share(self) -> float:
        """Share of true directions whose partner in the one-to-one assignment is above ``above``."""
        return float((self.matched > self.above).sum() / len(self.recovered))

    def frame(self) -> pd.DataFrame:
        """``measure, value, null``."""
        import pandas as pd

        found = _summary(self)
        return pd.DataFrame([{"measure": k, "value": v, "null": self.null[k]} for k, v in found.items()])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Histograms of the cosines of true directions and of features with their nearest."""
        ax = axis(ax, 5.6, 3.4)
        bins = torch.linspace(-1, 1, 81).tolist()
        for name, values in (("true directions", self.recovered), ("features", self.explained)):
            ax.hist(values.tolist(), bins=bins, histtype="step", label=name)
        ax.axvline(self.null["mean_max_cosine"], color="0.5", linestyle="--", label="random vectors, mean")
        low = min(float(self.recovered.min()), float(self.explained.min()), 0.0)
        ax.set(xlabel="cosine with the nearest", ylabel="number", xlim=(low - 0.02, 1.02))
        ax.legend()
        return ax


@dataclass(frozen=True)
class FeatureAgreement(Result):
    """One-to-one pairs of features of two coders: ``pairs`` ``[P, 2]``, ``cosine`` ``[P]`` of their decoder rows, ``encoder``
    ``[P]`` of their encoder columns (empty where one of them has none). ``best_a`` ``[F_a]`` and ``best_b`` ``[F_b]``: cosine
    with the nearest feature of the other. ``null`` as for ``DecoderCosine``: the first coder replaced by random unit
    vectors."""

    pairs: Tensor
    cosine: Tensor
    encoder: Tensor
    best_a: Tensor
    best_b: Tensor
    above: float
    null: dict[str, float]

    @property
    def shared(self) -> float:
        """Share of the pairs whose decoder rows, and encoder columns if known, agree beyond ``above``."""
        agree = self.cosine > self.above
        if len(self.encoder):
            agree = agree & (self.encoder > self.above)
        return float(agree.double().mean())

    def frame(self) -> pd.DataFrame:
        """One row per pair: ``a, b, cosine, encoder``."""
        import pandas as pd

        encoder = self.encoder if len(self.encoder) else torch.full_like(self.cosine, float("nan"))
        return pd.DataFrame(
            {
                "a": self.pairs[:, 0].tolist(),
                "b": self.pairs[:, 1].tolist(),
                "cosine": self.cosine.tolist(),
                "encoder": encoder.tolist(),
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Cosines of the pairs, largest first, beside those of random vectors."""
        ax = axis(ax, 5.6, 3.4)
        ax.plot(self.cosine.sort(descending=True).values.tolist(), label="decoder")
        if len(self.encoder):
            ax.plot(self.encoder.sort(descending=True).values.tolist(), label="encoder")
        ax.axhline(self.null["matched_mean"], color="0.5", linestyle="--", label="random vectors, mean")
        ax.set(xlabel="pairs of features, best first", ylabel="cosine", title=f"shared: {self.shared:.0%}")
        ax.legend()
        return ax


@torch.no_grad()
def decoder_cosine(coder: Any, truth: Any, *, above: float = 0.9, seed: int = 0) -> DecoderCosine:
    """Compare a decoder with the directions ``truth`` ``[M, D]`` that made the data.

    ``coder`` is a ``Coder``, an estimator with ``decoder_``, or the decoder ``[F, D]`` itself. A row of zeros has no direction
    and counts as cosine 0. Refused: other widths, NaN, a true direction of zeros, a threshold outside -1 to 1.
    """
    if not -1 <= above <= 1:
        raise WorkbenchError(f"above is a cosine, -1 to 1; got {above}")
    rows = _decoder(coder)
    goal = check_rows("truth", truth, rows.shape[1]).double().cpu()
    if bool((goal.norm(dim=1) == 0).any()):
        raise WorkbenchError("truth holds a direction of zeros")
    found = _compared(rows, goal, above)
    null = _compared(_random(rows, seed), goal, above)
    return DecoderCosine(**found, above=above, null=_summary(DecoderCosine(**null, above=above, null={})))


@torch.no_grad()
def feature_agreement(a: Any, b: Any, *, above: float = 0.7, seed: int = 0) -> FeatureAgreement:
    """Pair the features of two coders of the same site one to one, by the cosine of their decoder rows.

    Paulo & Belrose call a feature shared where decoder and encoder cosines both exceed 0.7. Encoders are compared where both
    have one. Refused: other widths, NaN.
    """
    if not -1 <= above <= 1:
        raise WorkbenchError(f"above is a cosine, -1 to 1; got {above}")
    rows, others = _decoder(a), _decoder(b)
    if rows.shape[1] != others.shape[1]:
        raise WorkbenchError(f"coders of one site write the same width; got {rows.shape[1]} and {others.shape[1]}")
    found = _compared(rows, others, above)
    encoders = [_encoder(x) for x in (a, b)]
    encoder = torch.zeros(0, dtype=torch.float64)
    if encoders[0] is not None and encoders[1] is not None and encoders[0].shape[1] == encoders[1].shape[1]:
        left, right = (_unit(x) for x in encoders if x is not None)
        encoder = (left[found["pairs"][:, 0]] * right[found["pairs"][:, 1]]).sum(1)
    null = _summary(DecoderCosine(**_compared(_random(rows, seed), others, above), above=above, null={}))
    return FeatureAgreement(
        found["pairs"], found["matched"], encoder, found["explained"], found["recovered"], above, null
    )


def _compared(rows: Tensor, goal: Tensor, above: float) -> dict[str, Tensor]:
    from scipy.optimize import linear_sum_assignment

    rows, goal = _unit(rows), _unit(goal)
    if len(rows) * len(goal) > _ASSIGNED:
        raise WorkbenchError(
            f"{len(rows):,} features and {len(goal):,} directions make more cosines than are assigned one to one "
            f"({_ASSIGNED:,}); compare a part of them"
        )
    cosine = torch.empty(len(rows), len(goal))
    size = max(1, _CELLS // len(goal))
    for i in range(0, len(rows), size):
        cosine[i : i + size] = rows[i : i + size] @ goal.T
    feature, direction = (torch.as_tensor(x) for x in linear_sum_assignment(cosine.numpy(), maximize=True))
    # Single precision picks the partners; the cosines that are told are those of the vectors themselves.
    nearest, best = cosine.argmax(0), cosine.argmax(1)
    return {
        "recovered": (rows[nearest] * goal).sum(1),
        "nearest": nearest,
        "explained": (rows * goal[best]).sum(1),
        "matched": (rows[feature] * goal[direction]).sum(1),
        "pairs": torch.stack([feature, direction], 1),
    }


def _summary(found: DecoderCosine) -> dict[str, float]:
    return {
        "mean_max_cosine": found.mean_max_cosine,
        "explained_mean": found.explained_mean,
        "matched_mean": float(found.matched.mean()),
        "recovered_share": found.recovered_share,
        "matched_share": found.matched_share,
    }


def _decoder(coder: Any) -> Tensor:
    if isinstance(coder, nn.Module) and hasattr(coder, "W_dec"):
        coder = coder.W_dec
    return check_rows("the decoder", getattr(coder, "decoder_", coder)).double().cpu()


def _encoder(coder: Any) -> Tensor | None:
    """Reading directions ``[F, D_in]``, None for a bare decoder."""
    if isinstance(coder, nn.Module) and hasattr(coder, "W_enc"):
        return check_rows("the encoder", coder.W_enc).T.double().cpu()
    found = getattr(coder, "encoder_", None)
    return None if found is None else check_rows("the encoder", found).T.double().cpu()


def _random(rows: Tensor, seed: int) -> Tensor:
    # Toy directions are often the first draw of a small seed: the null must not be the same draw.
    return torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed + 0x6E756C6C), dtype=torch.float64)


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
