"""Where does a text plan ahead, and what does it come back to?

Reading rhythm (Li et al., arXiv 2510.13554): WAAD_t averaged over local heads and FAI_s averaged over global heads.
Where Delta_t = |WAAD_t - WAAD_{t+1}| peaks a new stretch begins: the largest 40% of the response are its preplan
tokens. The 40% with the largest FAI are its anchors. A coupling is an anchor with a preplan token at most k tokens
before it; by chance is what the same anchors have with the preplan tokens shifted around the response.

Columns of the prompt are left out: the first token would collect everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.padding import padding
from workbench.probes.rhythm.spans import SHARE, global_heads, head_spans, local_heads, mean_over
from workbench.probes.rhythm.waad import fai, waad
from workbench.probes.sources import Source, inner, maps_of, provenance_of
from workbench.probes.tables import TokenTable
from workbench.results import Result, axis
from workbench.run import Provenance, Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

TOP = 0.4
_SHIFTS = 256


@dataclass(frozen=True)
class Rhythm(TokenTable):
    """Per token ``[B, T]``: ``waad`` (tokens), ``delta``, ``fai`` (weight), ``preplan`` and ``anchor`` (1 or 0), and
    ``entropy`` in nats of the distribution that the token was drawn from, if the run has logits. NaN in the prompt and
    where undefined.

    ``local`` and ``over`` name the heads that were averaged, ``prompt`` the columns that were left out.
    """

    local: tuple[tuple[int | str, int], ...] = ()
    over: tuple[tuple[int | str, int], ...] = ()
    prompt: int = 0

    def preplan(self, sequence: int = 0) -> list[int]:
        """Positions of the preplan tokens, in the order of the text."""
        return (self.values["preplan"][sequence] == 1).nonzero()[:, 0].tolist()

    def anchors(self, sequence: int = 0) -> list[int]:
        """Positions of the anchors, in the order of the text."""
        return (self.values["anchor"][sequence] == 1).nonzero()[:, 0].tolist()

    def plot(self, ax: Axes | None = None, measure: str | None = None) -> Axes:
        """WAAD over the first sequence with its preplan tokens marked, or another measure."""
        ax = super().plot(ax, measure)
        if measure in (None, "waad"):
            places = self.preplan()
            ax.plot(places, self.values["waad"][0, places].numpy(), "v", color="tab:red", label="preplan token")
            anchors = self.anchors()
            ax.plot(anchors, [0.0] * len(anchors), "^", color="tab:green", label="anchor")
            ax.legend()
        return ax


def rhythm(
    source: Source,
    *,
    prompt: int = 0,
    window: int = 10,
    clip: tuple[int, int] = (10, 50),
    share: float = SHARE,
    top: float = TOP,
    raw: bool = False,
) -> Rhythm:
    """WAAD, FAI, preplan tokens and anchors of a text.

    ``source``: maps of all layers over one text (a batch of texts of one length, padded or not). ``prompt``: the first
    so many columns are the prompt; queries and keys in it do not count. ``share`` of all heads count as local and as
    global, ``top`` of the response's tokens as preplan tokens and as anchors. ``window`` and ``clip`` are the published
    ones. Gated maps count as they act; ``raw=True`` looks inside the gate. Refused for signed and channel maps, and
    maps of unequal sizes.
    """
    if not 0 < top <= 1:
        raise WorkbenchError(f"top is the part of the tokens that is marked, in (0, 1]; got {top}")
    maps = {name: inner(name, amap, raw) for name, amap in maps_of(source).items()}
    sizes = {m.shape[::2] + m.shape[3:] + (m.offset,) for m in maps.values()}
    if len(sizes) > 1 or next(iter(maps.values())).shape[2] != next(iter(maps.values())).shape[3]:
        raise WorkbenchError(
            "a rhythm is that of one text, every token a query and a key; got maps of "
            f"{sorted({tuple(m.shape) for m in maps.values()})}"
        )
    run = source if isinstance(source, Run) else None
    tokens = run.tokens if run is not None else None
    spans = head_spans(source, prompt=prompt, raw=raw)
    near, far = local_heads(spans, share), global_heads(spans, share)
    if not near:
        raise Refused("no head has any weight on the text, so that there is no rhythm")
    name, first = next(iter(maps.items()))
    real = padding(name, first, tokens).queries
    batch, length = first.shape[0], first.shape[2]
    counted = (torch.ones(batch, length, dtype=torch.bool) if real is None else real) & (torch.arange(length) >= prompt)
    wanted = {head.layer for head in near}, {head.layer for head in far}
    w = mean_over(near, {n: waad(m, window, prompt=prompt) for n, m in maps.items() if n in wanted[0]})
    f = mean_over(far, {n: fai(m, clip, prompt=prompt, real=real) for n, m in maps.items() if n in wanted[1]})
    w, f = (x.masked_fill(~counted, float("nan")) for x in (w, f))
    delta = torch.nn.functional.pad((w[:, :-1] - w[:, 1:]).abs(), (0, 1), value=float("nan"))
    values = {"waad": w, "delta": delta, "fai": f, "preplan": _largest(delta, top), "anchor": _largest(f, top)}
    units = {"waad": "tokens", "delta": "tokens", "fai": "mean weight", "preplan": "0 or 1", "anchor": "0 or 1"}
    if run is not None and run.logits is not None and run.logits.shape[1] == length:
        values["entropy"] = _entropy(run.logits).masked_fill(~counted, float("nan"))
        units["entropy"] = "nats"
    undefined = {"delta": "the last token has no next one", "preplan": "as delta", "anchor": "as fai"}
    undefined["fai"] = "the text ends before any later query" if bool(f.isnan().all()) else "no query is so far behind"
    if not bool(counted.all()):
        undefined["waad"] = "padding and the prompt do not count"
    return Rhythm(
        "Reading rhythm", values, units, tokens.labels if tokens is not None else (), undefined=undefined,
        provenance=provenance_of(source), local=tuple((h.layer, h.head) for h in near),
        over=tuple((h.layer, h.head) for h in far), prompt=prompt,
    )  # fmt: skip


@dataclass(frozen=True)
class Couplings(Result):
    """Per window k: the part of the anchors that have a preplan token at most k tokens before them or are one
    (``coupled``, with a 95% interval over sequences), the same with the preplan tokens shifted around the response
    (``chance``), and ``z``, the difference in standard deviations of the shifts."""

    windows: tuple[int, ...]
    coupled: Tensor
    low: Tensor
    high: Tensor
    chance: Tensor
    z: Tensor
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def frame(self) -> pd.DataFrame:
        """One row per window: ``window, coupled, low, high, chance, z``."""
        import pandas as pd

        columns = ("coupled", "low", "high", "chance", "z")
        return pd.DataFrame({"window": self.windows} | {name: getattr(self, name).numpy() for name in columns})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Coupled anchors by window, beside chance."""
        ax = axis(ax, 4.2, 3.0)
        ax.plot(self.windows, self.coupled.numpy(), marker="o", label="anchors")
        ax.plot(self.windows, self.chance.numpy(), "--", color="0.5", label="by chance")
        ax.set_xticks(list(self.windows))
        ax.set(xlabel="window, tokens", ylabel="part with a preplan token before", title=self.provenance.model)
        ax.legend()
        return ax


def couplings(rhythm: Rhythm, windows: Sequence[int] = (1, 2, 3), *, seed: int = 0) -> Couplings:
    """How often anchors follow preplan tokens.

    The null shifts the preplan tokens of each response around its end by a random number of places, which keeps their
    spacing. Undefined (NaN) without anchors.
    """
    if not windows or any(isinstance(k, bool) or not isinstance(k, int) or k < 0 for k in windows):
        raise WorkbenchError(f"windows are distances in tokens, 0 or more; got {list(windows)}")
    plan, anchor = rhythm.values["preplan"], rhythm.values["anchor"]
    generator = torch.Generator().manual_seed(seed)
    found, shifted = [], []
    for b in range(len(plan)):
        places = (~plan[b].isnan() | ~anchor[b].isnan()).nonzero()[:, 0]
        marks, ends = plan[b, places] == 1, anchor[b, places] == 1
        found.append(torch.stack([_coupled(marks, ends, k) for k in windows]))
        steps = torch.randint(1, max(2, len(places)), (_SHIFTS,), generator=generator).tolist()
        shifted.append(torch.stack([torch.stack([_coupled(marks.roll(s), ends, k) for k in windows]) for s in steps]))
    each, draws = torch.stack(found), torch.stack(shifted).nanmean(0)
    low, high = interval(each)
    coupled, chance = each.nanmean(0), draws.nanmean(0)
    spread = draws.std(0)
    z = torch.where(spread > 0, (coupled - chance) / spread, float("nan"))
    return Couplings(tuple(windows), coupled, low, high, chance, z, rhythm.provenance)


def _coupled(marks: Tensor, ends: Tensor, window: int) -> Tensor:
    near = torch.stack([torch.nn.functional.pad(marks, (k, 0))[: len(marks)] for k in range(window + 1)]).any(0)
    return (near & ends).sum(dtype=torch.float64) / ends.sum()


def _largest(values: Tensor, top: float) -> Tensor:
    """1 for the ``top`` part of the defined values of each row, 0 for the others, NaN for undefined ones."""
    known = ~values.isnan()
    count = (known.sum(1) * top).round().clamp(min=1).long()
    ranks = values.masked_fill(~known, float("-inf")).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (ranks < count[:, None]).double().masked_fill(~known, float("nan"))


def _entropy(logits: Tensor) -> Tensor:
    """Entropy of the distribution that each token was drawn from, ``[B, T]``; NaN for the first."""
    logp = logits.detach().float().log_softmax(-1)
    each = -(logp.exp() * logp).sum(-1).double().cpu()
    return torch.nn.functional.pad(each[:, :-1], (1, 0), value=float("nan"))


ANALYSES = (
    Analysis(
        name="rhythm",
        question="Where does a text plan ahead, and what does it come back to?",
        function=rhythm,
        example=lambda: {"source": random_maps(2, tokens=40, heads=4)},
        paper="Li et al. 2025 (arXiv 2510.13554)",
        source="maps",
        null="couplings(): the preplan tokens shifted around the response",
        cause="workbench.probes.rhythm.perturbation.perturbation",
    ),
    Analysis(
        name="couplings",
        question="Do the tokens that are looked back at follow those where a stretch begins?",
        function=couplings,
        example=lambda: {"rhythm": rhythm(random_maps(2, tokens=40, heads=4))},
        paper="Li et al. 2025 (arXiv 2510.13554)",
        source="tensors",
        null="the preplan tokens shifted around the response, spacing kept",
        definition="an anchor is coupled if a preplan token stands at most k tokens before it or is the anchor itself",
    ),
)
