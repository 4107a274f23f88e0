"""What does a model lose without its massive activations, and what if they are constants?

Published intervention (Sun et al., arXiv 2402.17762, section 3): where massive activations first appear they are set to zero,
or to their mean over texts, and the rest of the network runs on. In Llama-2-7B zero ruins the model (perplexity of WikiText
infinite, zero-shot accuracy 68.95 to 36.75%) and the mean changes nothing (perplexity 5.47). The null sets as many random
numbers of the same block outputs and texts to zero, or to the mean of their dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Edit, Model
from workbench.probes.ablation import Metric, named_metric
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.sinks.levels import Streams, block_outputs
from workbench.probes.sinks.massive import MassiveActivations, massive_activations
from workbench.probes.sinks.planted import planted_model, planted_texts
from workbench.probes.sources import prompts_of
from workbench.results import Result, axis
from workbench.run import Provenance
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Entry = tuple[int, int, int, int]
"""Block, text, column of the batch, dimension."""


@dataclass(frozen=True)
class MassiveEffect(Result):
    """``base zero mean`` ``[N]``: the metric of N texts as they are, and with their massive activations set to zero and to their
    mean; ``random_zero random_mean`` ``[R, N]`` with as many random numbers, R draws. ``entries`` ``[E, 4]`` are the numbers that
    were set: block, text, position, dimension; ``means`` ``[E]`` what ``mean`` set them to."""

    metric: str
    base: Tensor
    zero: Tensor
    mean: Tensor
    random_zero: Tensor
    random_mean: Tensor
    entries: Tensor
    means: Tensor
    undefined: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    def frame(self) -> pd.DataFrame:
        """One row per intervention (``none, zero, mean, random zero, random mean``): the metric's ``value`` and ``change`` from
        none, means over texts (and draws) with 95% intervals over texts."""
        import pandas as pd

        cases = {
            "none": self.base,
            "zero": self.zero,
            "mean": self.mean,
            "random zero": self.random_zero.mean(0),
            "random mean": self.random_mean.mean(0),
        }
        rows = []
        for name, values in cases.items():
            row: dict[str, object] = {"intervention": name}
            for column, numbers in (("value", values), ("change", values - self.base)):
                low, high = interval(numbers)
                row |= {column: float(numbers.nanmean()), f"{column}_low": float(low), f"{column}_high": float(high)}
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The metric of every intervention, with its interval."""
        ax = axis(ax, 4.8, 3.2)
        table = self.frame()
        ax.bar(table["intervention"], table["value"], color=["0.6", "C3", "C0", "0.8", "0.8"])
        ax.vlines(range(len(table)), table["value_low"], table["value_high"], color="grey")
        ax.set(ylabel=self.metric, title=f"Massive activations set to a constant\n{self.provenance.model}")
        ax.tick_params(axis="x", labelsize=8)
        return ax


@torch.no_grad()
def massive_effect(
    model: Model,
    inputs: Any,
    *,
    least: float = 100.0,
    ratio: float = 1000.0,
    where: str = "first",
    metric: str | Metric = "loss",
    reference: Any = None,
    random: int = 8,
    seed: int = 0,
) -> MassiveEffect:
    """The metric with massive activations set to zero and to their mean.

    ``inputs``: what ``model.run`` takes, or ``Pairs``. ``least`` and ``ratio`` as in ``massive_activations``. ``where``:
    ``first``, at the block whose output has the activation and the one before has not (published), or ``all``, at every block
    output that has it, for models whose blocks write it anew. ``metric`` as in ``ablation_curve``. ``reference``: texts that
    the means are taken over, the inputs by default; the mean is that of the numbers that would be set there in the same block
    and dimension. ``random`` draws of as many numbers, each of the block and text of the one it stands for, over real tokens.
    """
    if where not in ("first", "all"):
        raise UnknownName("place", where, ("first", "all"))
    if random < 1:
        raise WorkbenchError(f"random is the number of random draws, at least 1; got {random}")
    tokens = prompts_of(inputs)
    reads = [Site("resid_post", layer) for layer in range(model.shape.layers)]
    plain = model.run(tokens, read=reads)
    found, streams = massive_activations(plain, least=least, ratio=ratio), block_outputs(plain)
    if not len(found.layer):
        raise Refused(f"{model.name}: {found.undefined['activations']}")
    entries = _entries(found, streams, where)
    sample = entries, plain.acts
    if reference is not None:
        other = model.run(reference, read=reads, logits=None)
        sample = _entries(massive_activations(other, least=least, ratio=ratio), block_outputs(other), where), other.acts
    means = _means(entries, *sample)
    name, measure = named_metric(metric, inputs)

    def with_values(chosen: list[Entry], values: Tensor) -> Tensor:
        return measure(model.run(tokens, edit=_edits(chosen, values)), plain)

    generator = torch.Generator().manual_seed(seed)
    draws = [_random(entries, found, streams, generator) for _ in range(random)]
    nothing = torch.zeros(len(entries), dtype=torch.float64)
    column = torch.tensor(entries)
    column[:, 2] -= streams.first[column[:, 1]]
    return MassiveEffect(
        metric=name,
        base=measure(plain, plain),
        zero=with_values(entries, nothing),
        mean=with_values(entries, means),
        random_zero=torch.stack([with_values(draw, nothing) for draw in draws]),
        random_mean=torch.stack([with_values(draw, _dim_means(draw, streams)) for draw in draws]),
        entries=column,
        means=means,
        undefined={"mean": "of one text: it is the value itself"}
        if reference is None and len(streams.real) < 2
        else {},
        provenance=plain.provenance,
    )


def _entries(found: MassiveActivations, streams: Streams, where: str) -> list[Entry]:
    column = found.position + streams.first[found.sequence]
    every = list(zip(found.layer.tolist(), found.sequence.tolist(), column.tolist(), found.dim.tolist(), strict=True))
    if where == "all":
        return every
    known = set(every)
    return [entry for entry in every if (entry[0] - 1, *entry[1:]) not in known]


def _means(entries: Iterable[Entry], sample: Iterable[Entry], acts: Mapping[Site | str, Tensor]) -> Tensor:
    """Per entry the mean of the sample's values in its block and dimension, ``[E]`` in float64."""
    values: dict[tuple[int, int], list[float]] = {}
    for layer, text, column, dim in sample:
        value = float(acts[Site("resid_post", layer)][text, column, dim])
        values.setdefault((layer, dim), []).append(value)
    means = []
    for layer, _, _, dim in entries:
        if (layer, dim) not in values:
            raise WorkbenchError(
                f"the reference texts have no massive activation in dimension {dim} of block {layer}: give more, or none"
            )
        means.append(sum(values[layer, dim]) / len(values[layer, dim]))
    return torch.tensor(means, dtype=torch.float64)


def _random(
    entries: Iterable[Entry], found: MassiveActivations, streams: Streams, generator: torch.Generator
) -> list[Entry]:
    taken = set(_entries(found, streams, "all"))
    width = streams.outputs[0].shape[-1]
    drawn: list[Entry] = []
    for layer, text, _, _ in entries:
        real = streams.real[text].nonzero()[:, 0]
        free = len(real) * width - sum(entry[:2] == (layer, text) for entry in taken)
        if free < 1:
            raise Refused(f"block {layer} of text {text} has no number left to draw in the place of a massive one")
        while True:
            pick = int(torch.randint(len(real) * width, (1,), generator=generator))
            entry = (layer, text, int(real[pick // width]), pick % width)
            if entry not in taken:
                break
        taken.add(entry)
        drawn.append(entry)
    return drawn


def _dim_means(entries: Iterable[Entry], streams: Streams) -> Tensor:
    """Mean over real tokens of the block and dimension."""
    return torch.stack([streams.layer(layer)[..., dim][streams.real].double().mean() for layer, _, _, dim in entries])


def _edits(entries: Iterable[Entry], values: Tensor) -> dict[Site | str, Edit | Tensor]:
    by_layer: dict[int, list[tuple[int, int, int, float]]] = {}
    for (layer, *rest), value in zip(entries, values.tolist(), strict=True):
        by_layer.setdefault(layer, []).append((rest[0], rest[1], rest[2], value))
    return {Site("resid_post", layer): _setter(parts) for layer, parts in by_layer.items()}


def _setter(parts: list[tuple[int, int, int, float]]) -> Edit:
    texts, columns, dims, values = zip(*parts, strict=True)

    def edit(output: Tensor) -> Tensor:
        new = output.clone()
        new[list(texts), list(columns), list(dims)] = torch.tensor(values, dtype=output.dtype, device=output.device)
        return new

    return edit


ANALYSES = (
    Analysis(
        name="massive-effect",
        question="What does a model lose without its massive activations, and what if they are constants?",
        function=massive_effect,
        example=lambda: {"model": planted_model(), "inputs": planted_texts(), "ratio": 100.0, "random": 2},
        paper="Sun et al. 2024 (arXiv 2402.17762), section 3",
        source="model",
        null="as many random numbers of the same block outputs and texts",
        cause="it is an intervention: numbers of the residual stream set to zero and to their mean",
        definition="the mean is over the numbers that are set in the same block and dimension",
    ),
)
