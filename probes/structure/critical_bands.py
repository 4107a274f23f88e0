"""At which scales does an image classifier look?

Critical-band masking (Subramanian et al., arXiv 2309.13190): noise of one octave of spatial frequency is added to
images, and the noise at which accuracy falls to one half says how much the classifier uses that octave. Seven bands
have their centres at 1.75 x 2^i cycles per image, noise has standard deviation 0, .02, .04, .08, .16. The sensitivity
of a band is log2(sd_max / threshold), and a Gaussian over the octaves is fitted to it:

    centre 1.75 x 2^mu cycles per image,   bandwidth 2 sqrt(ln 4) sigma octaves,   peak A octaves below the largest
    noise.

People recognise objects in a band of about one octave, networks in one two to four times as wide, and wider ones go
with less shape bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BASE = 1.75
BANDS = 7
DEVIATIONS = (0.0, 0.02, 0.04, 0.08, 0.16)
Classifier = Callable[[Tensor], Tensor]
"""Images ``[N, C, H, W]`` to logits ``[N, classes]``."""


@dataclass(frozen=True)
class CriticalBands(Result):
    """``correct`` ``[bands, deviations, N]``: 1 where the noisy image was named right. ``sensitivity`` ``[bands]`` in
    octaves, NaN where accuracy never falls to the level. ``centre`` (cycles per image), ``bandwidth`` (octaves) and
    ``peak`` (octaves) are those of the fit, NaN with a ``reason`` where it fails."""

    centres: tuple[float, ...]
    deviations: tuple[float, ...]
    correct: Tensor
    sensitivity: Tensor
    level: float
    centre: float
    bandwidth: float
    peak: float
    reason: str = ""
    provenance: Provenance = field(default_factory=lambda: Provenance("classifier"))

    @property
    def peak_sensitivity(self) -> float:
        """The published form of the peak, 2^(A - 4): 1/16 where it takes the largest of the five published noises."""
        return 2.0 ** (self.peak - 4)

    def frame(self) -> pd.DataFrame:
        """One row per band and noise: ``cycles, deviation, accuracy, low, high, sensitivity``."""
        import pandas as pd

        low, high = interval(self.correct.permute(2, 0, 1))
        return pd.DataFrame(
            {
                "cycles": centre,
                "deviation": sd,
                "accuracy": float(self.correct[i, j].mean()),
                "low": float(low[i, j]),
                "high": float(high[i, j]),
                "sensitivity": float(self.sensitivity[i]),
            }
            for i, centre in enumerate(self.centres)
            for j, sd in enumerate(self.deviations)
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy by band and noise."""
        ax = axis(ax, 4.8, 3.2)
        image = ax.imshow(self.correct.mean(2).T.numpy(), origin="lower", aspect="auto", vmin=0, vmax=1, cmap="viridis")
        ax.set_xticks(range(len(self.centres)), [f"{c:g}" for c in self.centres])
        ax.set_yticks(range(len(self.deviations)), [f"{sd:g}" for sd in self.deviations])
        ax.set(xlabel="centre of the noise, cycles per image", ylabel="its standard deviation")
        ax.set_title(f"centre {self.centre:.3g} cycles per image, bandwidth {self.bandwidth:.2g} octaves")
        ax.figure.colorbar(image, ax=ax, label="accuracy")
        return ax


@torch.no_grad()
def critical_bands(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    bands: int = BANDS,
    deviations: Sequence[float] = DEVIATIONS,
    level: float = 0.5,
    batch: int = 256,
    seed: int = 0,
) -> CriticalBands:
    """Accuracy under noise of every band and size, and the Gaussian fitted to the sensitivities.

    ``images`` ``[N, C, H, W]`` are floats on the scale that the deviations refer to, published for grey images from 0
    to 1. ``level`` is the accuracy that defines the threshold. Bands whose lower end lies above the largest frequency
    of the image are left out. A classifier that is no better than ``level`` without noise is refused.
    """
    if images.ndim != 4 or not images.is_floating_point() or labels.shape != images.shape[:1]:
        raise WorkbenchError(
            f"images are floats [N, C, H, W] and labels [N]; got {list(images.shape)}, {list(labels.shape)}"
        )
    sizes = tuple(float(sd) for sd in deviations)
    if len(sizes) < 2 or sizes[0] != 0 or any(a >= b for a, b in pairwise(sizes)):
        raise WorkbenchError(f"deviations grow from 0 on; got {sizes}")
    most = min(images.shape[2:]) / 2
    centres = [BASE * 2**i for i in range(bands) if BASE * 2**i / 2**0.5 < most]
    if not centres:
        raise WorkbenchError(f"images of {list(images.shape[2:])} pixels hold none of {bands} bands")
    generator = torch.Generator().manual_seed(seed)
    correct = torch.zeros(len(centres), len(sizes), len(images), dtype=torch.float64)
    for i, centre in enumerate(centres):
        noise = octave_noise(images.shape, centre, generator)
        for j, sd in enumerate(sizes):
            noisy = (images + sd * noise.to(images)).split(batch)
            guesses = torch.cat([classifier(part).argmax(-1).cpu() for part in noisy])
            correct[i, j] = (guesses == labels.cpu()).double()
    if float(correct[:, 0].mean()) <= level:
        raise WorkbenchError(
            f"without noise the classifier names {float(correct[:, 0].mean()):.0%} right, no more than the level of {level:.0%}"
        )
    sensitivity = torch.stack([_sensitivity(row.mean(1), sizes, level) for row in correct])
    fit, reason = _fit(sensitivity)
    return CriticalBands(tuple(centres), sizes, correct, sensitivity, level, *fit, reason)


def octave_noise(shape: Sequence[int], centre: float, generator: torch.Generator) -> Tensor:
    """Noise ``[N, C, H, W]`` whose spectrum is flat from centre / sqrt 2 to centre x sqrt 2 cycles per image and empty
    elsewhere, of standard deviation 1; the same in all channels."""
    n, channels, height, width = shape
    white = torch.randn(n, 1, height, width, generator=generator, dtype=torch.float64)
    y, x = torch.fft.fftfreq(height) * height, torch.fft.rfftfreq(width) * width
    radius = (y[:, None] ** 2 + x[None] ** 2).sqrt()
    inside = (radius >= centre / 2**0.5) & (radius < centre * 2**0.5)
    found = torch.fft.irfft2(torch.fft.rfft2(white) * inside, s=(height, width))
    return (found / found.std(dim=(-1, -2), keepdim=True).clamp(min=1e-12)).expand(-1, channels, -1, -1)


def _sensitivity(accuracy: Tensor, deviations: Sequence[float], level: float) -> Tensor:
    """log2(sd_max / threshold), the threshold interpolated between noises on a logarithmic scale; NaN if never
    reached."""
    below = (accuracy <= level).nonzero()[:, 0]
    if not len(below) or int(below[0]) == 0:
        return torch.tensor(float("nan"), dtype=torch.float64)
    j = int(below[0])
    near = max(deviations[j - 1], deviations[1] / 2)  # no logarithm of 0
    share = float((accuracy[j - 1] - level) / (accuracy[j - 1] - accuracy[j]).clamp(min=1e-12))
    threshold = near * (deviations[j] / near) ** share
    return torch.tensor(deviations[-1] / threshold, dtype=torch.float64).log2()


def _fit(sensitivity: Tensor) -> tuple[tuple[float, float, float], str]:
    import numpy as np
    from scipy.optimize import curve_fit

    values = sensitivity.nan_to_num(0.0).numpy()  # a band that never matters has no sensitivity
    nothing = (float("nan"),) * 3
    if not (values > 0).any():
        return nothing, "no band lowers accuracy to the level: use more noise"
    if len(values) < 3:
        return nothing, f"{len(values)} bands are too few to fit a Gaussian"
    places = np.arange(len(values), dtype=float)
    start = (values.max(), float(values.argmax()), 1.0)
    bounds = ([0.0, -2.0, 0.1], [20.0, len(values) + 1.0, 2.0 * len(values)])
    try:
        (height, mu, sigma), _ = curve_fit(
            lambda i, a, m, s: a * np.exp(-((i - m) ** 2) / (2 * s**2)), places, values, p0=start, bounds=bounds
        )
    except RuntimeError as error:
        return nothing, f"the fit does not converge: {error}"
    return (BASE * 2 ** float(mu), 2 * float(np.sqrt(np.log(4))) * float(sigma), float(height)), ""


def _example() -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 1, 32, 32, generator=generator) * 0.05
    labels = torch.arange(24) % 2
    wave = torch.sin(2 * torch.pi * 4 * torch.arange(32) / 32).expand(32, 32)
    images += 0.1 * torch.where(labels[:, None, None, None] == 1, wave.T, wave)

    def classifier(x: Tensor) -> Tensor:
        return torch.stack([(x * wave).sum((1, 2, 3)), (x * wave.T).sum((1, 2, 3))], 1).abs()

    return {"classifier": classifier, "images": images, "labels": labels, "deviations": (0.0, 0.2, 0.4, 0.8, 1.6)}


ANALYSES = (
    Analysis(
        name="critical-bands",
        question="At which scales does an image classifier look?",
        function=critical_bands,
        example=_example,
        paper="Subramanian et al. 2023 (arXiv 2309.13190)",
        source="tensors",
        null="accuracy without noise, and the other bands",
        cause="is the intervention: one band of frequencies is masked",
        definition="thresholds are interpolated, where the authors count the noises that bring accuracy down; bands that never "
        "reach the level count as sensitivity 0 in the fit",
    ),
)
