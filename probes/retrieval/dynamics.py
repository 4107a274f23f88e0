"""Are the same heads active in every context?

A head is active in a trial if it copied at least one token of the needle there (Wu et al., arXiv 2404.15574, section 3: some
retrieval heads are always active, others in some contexts only). Over the trials in which the model retrieved:

    frequency     part of the trials in which the head is active
    information   I(active; context) in bits: what knowing the context (length, depth, needle ...) tells about whether it is

and between contexts, the Jaccard similarity |A n B| / |A u B| of the sets of active heads, mean over pairs of trials. Null: the
trials' contexts are shuffled. With few trials the information is above 0 by chance alone, so it stands beside its null and has
a p-value, (1 + shuffles with as much) / (1 + shuffles).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled
from workbench.probes.retrieval.copying import RetrievalResult, retrieval_heads
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

BY = ("cell", "length", "depth", "example")
ALWAYS = 0.95
_SHOWN = 24


@dataclass(frozen=True)
class Activation(Result):
    """``frequency low high information information_null p`` are ``[L, H]``, ``by_context`` ``[C, L, H]`` the frequency in each
    context, ``jaccard`` and ``jaccard_null`` ``[C, C]`` (NaN where no two trials, or no active head, are to be compared).

    ``trials`` ``[C]``: trials of each context. ``within`` and ``between`` are the mean similarities of trials of one and of two
    contexts, ``p_context`` the part of the shuffles whose difference is as large.
    """

    layers: tuple[int | str, ...]
    by: str
    contexts: tuple[str, ...]
    trials: Tensor
    frequency: Tensor
    low: Tensor
    high: Tensor
    by_context: Tensor
    information: Tensor
    information_null: Tensor
    p: Tensor
    jaccard: Tensor
    jaccard_null: Tensor
    within: float
    between: float
    p_context: float
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    def kinds(self) -> list[str]:
        """``always`` (active in ``ALWAYS`` of the trials or more), ``sometimes`` or ``never``, head by head."""
        return [
            "never" if share == 0 else "always" if share >= ALWAYS else "sometimes"
            for share in self.frequency.flatten().tolist()
        ]

    def frame(self) -> pd.DataFrame:
        """One row per head: ``layer, head, frequency, low, high, kind, information, information_null, p, trials``; the interval
        is over trials, and ``p`` of one head, not corrected for the number of heads."""
        import pandas as pd

        heads = self.frequency.shape[1]
        columns = ("frequency", "low", "high", "information", "information_null", "p")
        table = pd.DataFrame(
            {
                "layer": [layer for layer in self.layers for _ in range(heads)],
                "head": list(range(heads)) * len(self.layers),
                **{name: getattr(self, name).flatten().numpy() for name in columns},
                "trials": int(self.trials.sum()),
            }
        )
        table.insert(5, "kind", self.kinds())
        return table

    def pairs(self) -> pd.DataFrame:
        """One row per pair of contexts: ``first, second, jaccard, null``."""
        import pandas as pd

        rows = [
            (a, b, float(self.jaccard[i, j]), float(self.jaccard_null[i, j]))
            for i, a in enumerate(self.contexts)
            for j, b in enumerate(self.contexts)
            if i <= j
        ]
        return pd.DataFrame(rows, columns=["first", "second", "jaccard", "null"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """The most active heads by context: part of the trials in which each is active."""
        heads = self.frequency.shape[1]
        order = self.frequency.flatten().argsort(descending=True, stable=True)
        chosen = [i for i in order.tolist() if self.frequency.flatten()[i] > 0][:_SHOWN] or order[:1].tolist()
        ax = axis(ax, max(4.8, 2.0 + 0.5 * len(self.contexts)), max(2.6, 1.6 + 0.22 * len(chosen)))
        grid = self.by_context.flatten(1)[:, chosen].T.numpy()
        image = ax.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        ax.set_yticks(range(len(chosen)), [f"{self.layers[i // heads]}.{i % heads}" for i in chosen])
        ax.set_xticks(range(len(self.contexts)), list(self.contexts), rotation=60, ha="right")
        ax.set(xlabel=self.by, ylabel="head", title=f"Active retrieval heads\n{self.provenance.model}")
        ax.figure.colorbar(image, ax=ax, label="part of the trials")
        return ax


def activation(
    result: RetrievalResult,
    by: str | Sequence[object] = "cell",
    *,
    shuffles: int = 200,
    seed: int = 0,
) -> Activation:
    """How often every head is active, and whether the context decides it.

    ``by``: what a context is: ``cell`` (length and depth), ``length``, ``depth``, ``example`` (the number of the needle in its
    cell), or a label for every trial of ``result``, in its order. Refuses a result without a retrieved needle.
    """
    if result.reason:
        raise Refused(f"no heads to follow: {result.reason}")
    if shuffles < 1:
        raise WorkbenchError(f"shuffles is at least 1; got {shuffles}")
    used = result.used
    labels, name = _labels(result, by)
    kept = [label for label, use in zip(labels, used.tolist(), strict=True) if use]
    contexts = tuple(dict.fromkeys(kept))
    index = torch.tensor([contexts.index(label) for label in kept])
    active = (result.copied[used] > 0).double()
    trials, layers, heads = active.shape
    flat = active.flatten(1)
    generator = torch.Generator().manual_seed(seed)
    similarity = _similarity(flat)
    information = _information(flat, index, len(contexts))
    jaccard = _between(similarity, index, len(contexts))
    within, between = _contrast(similarity, index)
    nulls, pairs, contrasts = [], [], []
    for _ in range(shuffles):
        turned = index[torch.randperm(trials, generator=generator)]
        nulls.append(_information(flat, turned, len(contexts)))
        pairs.append(_between(similarity, turned, len(contexts)))
        contrasts.append(torch.tensor(_contrast(similarity, turned), dtype=torch.float64))
    null = torch.stack(nulls)
    apart = torch.stack(contrasts)
    low, high = interval(active)
    difference = within - between
    more = (apart[:, 0] - apart[:, 1] >= difference - 1e-12).sum()
    return Activation(
        layers=result.layers,
        by=name,
        contexts=contexts,
        trials=torch.bincount(index, minlength=len(contexts)),
        frequency=active.mean(0),
        low=low,
        high=high,
        by_context=torch.stack([active[index == i].mean(0) for i in range(len(contexts))]),
        information=information.view(layers, heads),
        information_null=null.mean(0).view(layers, heads),
        p=((1 + (null >= information - 1e-12).sum(0)) / (1 + shuffles)).double().view(layers, heads),
        jaccard=jaccard,
        jaccard_null=torch.stack(pairs).nanmean(0),
        within=within,
        between=between,
        p_context=float((1 + more) / (1 + shuffles)) if difference == difference else float("nan"),
        provenance=result.provenance,
    )


def _labels(result: RetrievalResult, by: str | Sequence[object]) -> tuple[list[str], str]:
    lengths, depths = result.length.tolist(), [f"{depth:.0%}" for depth in result.depth.tolist()]
    known = {
        "cell": [f"{length} at {depth}" for length, depth in zip(lengths, depths, strict=True)],
        "length": [str(length) for length in lengths],
        "depth": depths,
        "example": [str(number) for number in result.example.tolist()],
    }
    if isinstance(by, str):
        if by not in known:
            raise UnknownName("context of the trials", by, BY)
        return known[by], by
    given = [str(label) for label in by]
    if len(given) != len(lengths):
        raise WorkbenchError(f"a label for each of the {len(lengths)} trials; got {len(given)}")
    return given, "context"


def _information(active: Tensor, index: Tensor, contexts: int) -> Tensor:
    """I(active; context) in bits for heads ``[R, F]``: H(active) - sum_c p(c) H(active | c)."""
    member = torch.nn.functional.one_hot(index, contexts).double()
    sizes = member.sum(0)
    rate = (member.T @ active) / sizes.clamp(min=1)[:, None]
    conditional = (sizes / len(active)) @ _bits(rate)
    return (_bits(active.mean(0)) - conditional).clamp(min=0)


def _bits(rate: Tensor) -> Tensor:
    return (torch.special.entr(rate) + torch.special.entr(1 - rate)) / torch.log(torch.tensor(2.0, dtype=rate.dtype))


def _similarity(active: Tensor) -> Tensor:
    """Jaccard similarity of the active sets of every two trials ``[R, R]``; NaN with both empty, and of a trial with itself."""
    both = active @ active.T
    size = active.sum(1)
    found = both / (size[:, None] + size[None, :] - both)  # 0 / 0: NaN
    return found.fill_diagonal_(float("nan"))


def _between(similarity: Tensor, index: Tensor, contexts: int) -> Tensor:
    """Mean similarity of trials of every two contexts ``[C, C]``."""
    member = torch.nn.functional.one_hot(index, contexts).double()
    known = similarity.isfinite().double()
    total = member.T @ similarity.nan_to_num(0.0) @ member
    return total / (member.T @ known @ member)


def _contrast(similarity: Tensor, index: Tensor) -> tuple[float, float]:
    """Mean similarity of two trials of one context, and of different ones."""
    same = index[:, None] == index[None, :]
    return float(similarity[same].nanmean()), float(similarity[~same].nanmean())


ANALYSES = (
    Analysis(
        name="retrieval-activation",
        question="Are the same retrieval heads active in every context?",
        function=activation,
        example=lambda: {
            "result": retrieval_heads(bundled("compiled-needle"), (48, 64), 2, trials=2),
            "by": "length",
            "shuffles": 20,
        },
        paper="Wu et al. 2024 (arXiv 2404.15574), section 3",
        source="tensors",
        null="the contexts of the trials shuffled",
        definition="active: at least one token copied; information and Jaccard similarity are our measures of the dependence",
    ),
)
