"""How much do two circuits share, and how much would two random ones of their sizes?

With k1 and k2 of N parts kept, the number in both is hypergeometric by chance, k1 k2 / N on average. IoU =
|A and B| / |A or B|; min-overlap = |A and B| / min(k1, k2); the overlap published for circuit reuse = |A and B| / |A|
(Merullo et al. 2023, arXiv 2310.08744: 25 of 32 heads, 78%), which depends on which circuit is A. Two IOI circuits found
independently share 4.1% of their edges (IoU) and 64% of their nodes, so both levels are shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import WorkbenchError
from workbench.graph import edge_parts, name_place
from workbench.results import Result, axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class ComparisonResult(Result):
    """Per level of ``levels`` (``edge`` and ``node``, or ``node``) the ``parts`` N there are, how many ``a`` and ``b`` keep
    and how many they have in ``common``, all ``[L]``. ``spearman`` and ``kendall`` (tau-b) are rank correlations of the
    signed scores at the level of the circuits; NaN where one of them has no differences, which ``note`` tells. At node
    level the nodes of an edge circuit are the ends of its kept edges, without ``input`` and ``logits`` and places."""

    levels: tuple[str, ...]
    parts: Tensor
    a: Tensor
    b: Tensor
    common: Tensor
    spearman: float
    kendall: float
    note: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def iou(self) -> Tensor:
        """|A and B| / |A or B|, ``[L]``; NaN if both keep nothing."""
        return self.common.double() / (self.a + self.b - self.common)

    @property
    def min_overlap(self) -> Tensor:
        """|A and B| / min(|A|, |B|), ``[L]``; NaN if one of them keeps nothing."""
        return self.common.double() / torch.minimum(self.a, self.b)

    @property
    def overlap(self) -> Tensor:
        """|A and B| / |A|, ``[L]``, as published for circuit reuse; NaN if A keeps nothing."""
        return self.common.double() / self.a

    @property
    def expected(self) -> Tensor:
        """Parts in common by chance, |A| |B| / N, ``[L]``."""
        return self.a.double() * self.b / self.parts

    @property
    def expected_iou(self) -> Tensor:
        """Mean IoU of two random circuits of these sizes, ``[L]``."""
        return torch.tensor([self._chance(i)[1] for i in range(len(self.levels))], dtype=torch.float64)

    @property
    def p_value(self) -> Tensor:
        """Probability that two random circuits of these sizes share as many parts or more, ``[L]``."""
        return torch.tensor([self._chance(i)[0] for i in range(len(self.levels))], dtype=torch.float64)

    def chance_interval(self) -> Tensor:
        """The middle 95% of the number in common by chance, ``[L, 2]``."""
        return torch.tensor([self._chance(i)[2] for i in range(len(self.levels))], dtype=torch.float64)

    def _chance(self, i: int) -> tuple[float, float, tuple[float, float]]:
        from scipy.stats import hypergeom

        a, b = int(self.a[i]), int(self.b[i])
        law = hypergeom(int(self.parts[i]), a, b)
        iou = law.expect(lambda k: k / (a + b - k)) if a + b else math.nan
        return float(law.sf(int(self.common[i]) - 1)), float(iou), (float(law.ppf(0.025)), float(law.ppf(0.975)))

    def frame(self) -> pd.DataFrame:
        """Columns ``level parts a b common iou min_overlap overlap expected expected_low expected_high expected_iou p``."""
        import pandas as pd

        ends = self.chance_interval()
        return pd.DataFrame(
            {
                "level": list(self.levels),
                "parts": self.parts.numpy(),
                "a": self.a.numpy(),
                "b": self.b.numpy(),
                "common": self.common.numpy(),
                "iou": self.iou.numpy(),
                "min_overlap": self.min_overlap.numpy(),
                "overlap": self.overlap.numpy(),
                "expected": self.expected.numpy(),
                "expected_low": ends[:, 0].numpy(),
                "expected_high": ends[:, 1].numpy(),
                "expected_iou": self.expected_iou.numpy(),
                "p": self.p_value.numpy(),
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Parts in common per level, next to what chance gives, each as a share of the smaller circuit."""
        ax = axis(ax)
        smaller = torch.minimum(self.a, self.b).double()
        middle, ends = self.expected / smaller, self.chance_interval() / smaller[:, None]
        x = torch.arange(len(self.levels)).double()
        ax.bar((x - 0.2).numpy(), self.min_overlap.numpy(), 0.4, label="in common")
        ax.bar((x + 0.2).numpy(), middle.numpy(), 0.4, color="grey", label="by chance")
        ax.vlines((x + 0.2).numpy(), ends[:, 0].numpy(), ends[:, 1].numpy(), color="grey")
        ax.set_xticks(x.numpy(), list(self.levels))
        ax.set(ylabel="share of the smaller circuit", ylim=(0, 1.05))
        ax.legend()
        return ax


def compare_circuits(a: Circuit, b: Circuit) -> ComparisonResult:
    """Overlap of the kept sets of two circuits of one model, at the level of edges and of nodes, with what chance gives.

    Both must score the same parts, in any order; a circuit of edges and one of nodes are compared by their nodes, as far
    as both score them.
    """
    from scipy.stats import kendalltau, spearmanr

    rows: list[tuple[str, int, int, int, int]] = []
    spearman = kendall = math.nan
    notes = []
    if a.level == b.level:
        odd = set(a.names) ^ set(b.names)
        if odd:
            raise WorkbenchError(
                f"two circuits are compared over the same {a.level}s; {min(odd)!r} is scored by one of them only "
                f"({len(a.names):,} and {len(b.names):,} are scored)"
            )
        at = {name: i for i, name in enumerate(b.names)}
        order = torch.tensor([at[name] for name in a.names])
        kept, scores = b.kept[order], b.scores[order]
        if a.level == "edge":
            rows.append(("edge", len(a.names), len(a), len(b), int((a.kept & kept).sum())))
        elif any(name_place(name)[1] for name in a.names):
            rows.append(("node at place", len(a.names), len(a), len(b), int((a.kept & kept).sum())))
        if a.scores.unique().numel() > 1 and scores.unique().numel() > 1:
            spearman = float(spearmanr(a.scores.numpy(), scores.numpy()).statistic)
            kendall = float(kendalltau(a.scores.numpy(), scores.numpy()).statistic)
        else:
            notes.append("all scores of one circuit are equal, so there is no rank correlation")
    else:
        notes.append("scores of edges and of nodes have no rank correlation")
    known = _nodes(a, a.names) & _nodes(b, b.names)
    if not known:
        notes.append("no node is scored by both")
    else:
        mine, theirs = (set(circuit.nodes) & known for circuit in (a, b))
        rows.append(("node", len(known), len(mine), len(theirs), len(mine & theirs)))
    counts = torch.tensor([row[1:] for row in rows], dtype=torch.int64).view(-1, 4)
    return ComparisonResult(
        levels=tuple(row[0] for row in rows),
        parts=counts[:, 0],
        a=counts[:, 1],
        b=counts[:, 2],
        common=counts[:, 3],
        spearman=spearman,
        kendall=kendall,
        note="; ".join(notes),
        provenance={"a": dict(a.provenance), "b": dict(b.provenance)},
    )


def _nodes(circuit: Circuit, names: Sequence[str]) -> set[str]:
    """Nodes that a circuit scores: its names, or the ends of its edges that lie inside the model."""
    if circuit.level == "node":
        return {name_place(name)[0] for name in names}
    return {end for name in names for end in edge_parts(name)[:2]} - {"input", "logits"}
