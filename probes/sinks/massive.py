"""Which single numbers of the residual stream are larger than the rest by orders of magnitude, and does the model need them?

Sun et al. (arXiv 2402.17762) call an activation massive if |x| > 100 and |x| is about 1000 times the median |x| of its layer or
more. They set the massive ones, where they first appear, to zero (which ruins the model) and to their mean over texts (which
changes nothing: they are constants, and act as biases).

Small models have none by these thresholds; ``least=0`` and a smaller ``ratio`` find what stands out in them. The null is how far
the largest of as many Gaussian numbers of the same median would stand out: about 5 medians of 1,500 numbers, 8 of 10 million.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.probes.catalogue import Analysis
from workbench.probes.sinks.levels import block_outputs
from workbench.probes.sinks.planted import planted_stream
from workbench.results import Result, axis
from workbench.run import Provenance, Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_QUARTILE = 0.6744897501960817
"""Median |x| of a standard Gaussian."""


@dataclass(frozen=True)
class MassiveActivations(Result):
    """N massive activations. ``layer sequence position dim`` ``[N]`` (layer l is the output of block l, position counts from the
    first real token), ``value`` ``[N]``; ``largest`` ``[L, B, 3]`` the three largest |x| of each block output and text,
    ``median`` ``[L, B]`` its median |x|, ``chance`` ``[L, B]`` the largest of as many Gaussian numbers of that median."""

    layer: Tensor
    sequence: Tensor
    position: Tensor
    dim: Tensor
    value: Tensor
    tokens: tuple[str, ...]
    largest: Tensor
    median: Tensor
    chance: Tensor
    least: float
    ratio: float
    batched: bool
    undefined: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("residual stream"))

    def frame(self) -> pd.DataFrame:
        """One row per massive activation: ``layer``, of a batch or a run ``sequence``, ``position``, ``token`` where the text is
        known, ``dim, value``, and ``ratio``, |value| over the median |x| of the block output in this text."""
        import pandas as pd

        columns: dict[str, object] = {"layer": self.layer.numpy()}
        if self.batched:
            columns["sequence"] = self.sequence.numpy()
        columns["position"] = self.position.numpy()
        if any(self.tokens):
            columns["token"] = list(self.tokens)
        ratio = self.value.abs() / self.median[self.layer, self.sequence]
        columns |= {"dim": self.dim.numpy(), "value": self.value.numpy(), "ratio": ratio.numpy()}
        return pd.DataFrame(columns)

    def layers(self) -> pd.DataFrame:
        """One row per block output, means over texts: ``layer, largest, second, third, median, ratio`` (largest over median),
        ``chance`` (the same ratio of as many Gaussian numbers) and ``massive``, how many there are per text."""
        import pandas as pd

        top = self.largest.mean(1)
        blocks, texts = self.median.shape
        return pd.DataFrame(
            {
                "layer": range(blocks),
                **{name: top[:, i].numpy() for i, name in enumerate(("largest", "second", "third"))},
                "median": self.median.mean(1).numpy(),
                "ratio": (self.largest[..., 0] / self.median).mean(1).numpy(),
                "chance": (self.chance / self.median).mean(1).numpy(),
                "massive": (torch.bincount(self.layer, minlength=blocks).double() / texts).numpy(),
            }
        )

    def dims(self) -> pd.DataFrame:
        """One row per dimension that has any: ``dim, activations, layers, tokens`` (different places in texts), ``mean,
        spread`` of the values (standard deviation, NaN of one)."""
        import pandas as pd

        rows = []
        for dim in self.dim.unique().tolist():
            here = self.dim == dim
            places = torch.stack([self.sequence[here], self.position[here]]).unique(dim=1).shape[1]
            value = self.value[here]
            spread = float(value.std()) if len(value) > 1 else float("nan")
            rows.append((dim, int(here.sum()), len(self.layer[here].unique()), places, float(value.mean()), spread))
        names = ["dim", "activations", "layers", "tokens", "mean", "spread"]
        table = pd.DataFrame(rows, columns=names)
        return table.sort_values(by="activations", ascending=False, kind="stable", ignore_index=True)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The three largest |x| and the median by block, means over texts, with the largest by chance."""
        ax = axis(ax, 4.8, 3.2)
        table = self.layers()
        for name in ("largest", "second", "third", "median"):
            ax.plot(table["layer"], table[name], marker="o", label=name)
        ax.plot(table["layer"], self.chance.mean(1).numpy(), linestyle="--", color="0.5", label="largest by chance")
        ax.set(
            xlabel="output of block",
            ylabel="|x|",
            yscale="log",
            title=f"Largest activations\n{self.provenance.model}",
        )
        ax.legend(fontsize=7)
        return ax


@torch.no_grad()
def massive_activations(
    source: Run | Tensor, *, least: float = 100.0, ratio: float = 1000.0, mask: Tensor | None = None
) -> MassiveActivations:
    """Activations with |x| > ``least`` and |x| >= ``ratio`` times the median |x| of the block output in their text.

    ``source``: a run that read ``hook_resid_post`` of all layers, or the residual stream ``[L + 1, T, D]`` or
    ``[L + 1, B, T, D]``, the embedding first (it is not looked at). The defaults are the published ones; activations of small
    models are smaller, so there ``least=0`` and a ratio of their own say what is meant. ``mask`` ``[B, T]`` is False on padding.
    """
    if not least >= 0 or not ratio >= 1:
        raise WorkbenchError(f"least is a magnitude from 0 and ratio at least 1; got {least!r} and {ratio!r}")
    streams = block_outputs(source, mask)
    blocks, (texts, _) = len(streams.outputs), streams.real.shape
    places, values = [], []
    largest = torch.full((blocks, texts, 3), float("nan"), dtype=torch.float64)
    median, chance = (torch.zeros(blocks, texts, dtype=torch.float64) for _ in range(2))
    for layer in range(blocks):
        x = streams.layer(layer)
        for s in range(texts):
            size = x[s][streams.real[s]].abs()
            top = size.flatten().topk(min(3, size.numel())).values
            largest[layer, s, : len(top)] = top.double()
            middle = float(size.median())
            median[layer, s], chance[layer, s] = middle, middle * _largest_of(size.numel())
            massive = (x[s].abs() > least) & (x[s].abs() >= ratio * middle) & streams.real[s][:, None]
            at = massive.nonzero()
            head = torch.tensor([layer, s]).expand(len(at), 2)
            places.append(torch.cat([head, at], 1))
            values.append(x[s][massive].double())
    layer_, sequence, column, dim = torch.cat(places).unbind(1)
    reasons = {}
    if not len(layer_):
        peak = (largest[..., 0] / median).max()
        reasons["activations"] = (
            f"none is above {least:g} and {ratio:g} times the median: the largest is {float(largest.max()):.3g}, and "
            f"{float(peak):.3g} times the median at most; least= and ratio= set other thresholds"
        )
    return MassiveActivations(
        layer=layer_,
        sequence=sequence,
        position=column - streams.first[sequence],
        dim=dim,
        value=torch.cat(values),
        tokens=tuple(streams.label(s, c) for s, c in zip(sequence.tolist(), column.tolist(), strict=True)),
        largest=largest,
        median=median,
        chance=chance,
        least=least,
        ratio=ratio,
        batched=streams.batched,
        undefined=reasons,
        provenance=streams.provenance,
    )


def _largest_of(numbers: int) -> float:
    """Median of the largest |x| of so many Gaussian numbers, in units of the median |x|."""
    from scipy.special import ndtri

    # P(all |x| <= z) = 1/2 where the two tails hold 1 - 2^(-1/n).
    tails = -math.expm1(-math.log(2) / numbers)
    return -float(ndtri(tails / 2)) / _QUARTILE


ANALYSES = (
    Analysis(
        name="massive-activations",
        question="Which single numbers of the residual stream are larger than the rest by orders of magnitude?",
        function=massive_activations,
        example=lambda: {"source": planted_stream(), "least": 30.0, "ratio": 60.0},
        paper="Sun et al. 2024 (arXiv 2402.17762), section 2",
        source="run",
        null="the largest of as many Gaussian numbers of the same median",
        cause="workbench.probes.sinks.massive_effect.massive_effect",
        reads=("blocks.{l}.hook_resid_post",),
    ),
)
