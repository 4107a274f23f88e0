"""Does a coder have a few features that stand for a concept?

k-sparse probing (Gurnee et al., arXiv 2305.01610, as in SAEBench): the k features whose mean activation differs most between
the rows with and without the concept, on balanced training rows; a logistic probe on these k; its accuracy on held-out rows.
Beside it stand a probe of the whole rows themselves (what is there to be found), a probe of k random active features (what
any k features know), and the same method on shuffled labels (chance).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.probes.bootstrap import interval
from workbench.probes.features.labels import alive, class_means, columns, concepts, f1, probe, split
from workbench.probes.features.reading import check_rows
from workbench.results import Result, axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from workbench.coders.coder import Coder

_RANDOM = 5
"""Draws of random features."""


@dataclass(frozen=True)
class SparseProbing(Result):
    """For C ``concepts`` and K sizes ``ks``: held-out ``accuracy`` ``[C, K]`` with 95% intervals over test rows (``low``,
    ``high``), ``f1`` ``[C, K]``; ``random`` and ``shuffled`` ``[C, K]`` beside them, ``raw`` ``[C]`` the accuracy of a probe
    of whole rows. ``features`` ``[C, max k]`` are the chosen ones, best first; ``rows`` ``[C, 2]`` the training and test
    rows."""

    concepts: tuple[str, ...]
    ks: tuple[int, ...]
    features: Tensor
    accuracy: Tensor
    low: Tensor
    high: Tensor
    f1: Tensor
    random: Tensor
    shuffled: Tensor
    raw: Tensor
    rows: Tensor

    def frame(self) -> pd.DataFrame:
        """One row per concept and k: ``concept, k, accuracy, low, high, f1, random, shuffled, raw, features``."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "concept": name,
                    "k": k,
                    "accuracy": float(self.accuracy[c, i]),
                    "low": float(self.low[c, i]),
                    "high": float(self.high[c, i]),
                    "f1": float(self.f1[c, i]),
                    "random": float(self.random[c, i]),
                    "shuffled": float(self.shuffled[c, i]),
                    "raw": float(self.raw[c]),
                    "features": ", ".join(map(str, self.features[c, :k].tolist())),
                }
                for c, name in enumerate(self.concepts)
                for i, k in enumerate(self.ks)
            ]
        )

    def mean(self) -> dict[int, float]:
        """Accuracy at each k, mean over concepts."""
        return dict(zip(self.ks, self.accuracy.mean(0).tolist(), strict=True))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Mean accuracy over concepts against k, beside the baselines."""
        ax = axis(ax, 4.8, 3.4)
        for name, values, style in (
            ("top features", self.accuracy, "-o"),
            ("random features", self.random, "--"),
            ("shuffled labels", self.shuffled, ":"),
        ):
            ax.plot(self.ks, values.mean(0).tolist(), style, label=name)
        ax.axhline(float(self.raw.mean()), color="0.5", label="whole rows")
        ax.set(
            xlabel="features of the probe", ylabel="held-out accuracy", title=f"mean over {len(self.concepts)} concepts"
        )
        ax.legend()
        return ax


@torch.no_grad()
def sparse_probing(
    coder: Coder,
    X: Any,
    labels: Any,
    *,
    ks: Sequence[int] = (1, 2, 5),
    train: int = 4000,
    test: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SparseProbing:
    """Probe concepts on the k best features of a coder.

    ``X`` ``[N, D_in]``: rows that the coder reads (``activations_at`` reads them at chosen tokens). ``labels``: a mapping of
    concept to bool ``[N]``, a bool array ``[N]`` or ``[N, C]``, or classes ``[N]``. Of each concept as many rows with it as
    without are drawn, at most ``train`` and ``test``. Refused: NaN, unequal numbers of rows, a concept with fewer than 8 rows
    on one side, more features than the coder has.
    """
    x = check_rows("X", X, sum(coder.reads)).cpu()
    names, on = concepts(labels, len(x))
    sizes = tuple(dict.fromkeys(int(k) for k in ks))
    if not sizes or min(sizes) < 1 or max(sizes) > coder.features:
        raise WorkbenchError(f"a probe reads 1 to {coder.features} features of this coder; got ks={sizes}")
    used = alive(coder, x)
    parts = [
        _concept(coder, x, on[:, c], sizes, used, split(on[:, c], name, train=train, test=test, seed=seed), seed)
        for c, name in _told(names, progress)
    ]
    stacked = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
    return SparseProbing(names, sizes, **stacked)


def _told(names: Sequence[str], progress: Callable[[int, int], None] | None) -> Any:
    for c, name in enumerate(names):
        yield c, name
        if progress is not None:
            progress(c + 1, len(names))


def _concept(
    coder: Coder, x: Tensor, label: Tensor, ks: Sequence[int], used: Tensor, rows: Any, seed: int
) -> dict[str, Tensor]:
    seen, held = x[rows.train], x[rows.test]
    truth, goal = label[rows.train], label[rows.test]
    generator = torch.Generator().manual_seed(seed)
    # Labels of test rows are shuffled as well: one feature with ever so little weight can part the true classes, in either
    # direction, so that the accuracy on true labels would be near 0 or 1 by chance.
    wrong, other = (side[torch.randperm(len(side), generator=generator)] for side in (truth, goal))
    largest = max(ks)
    with_it, without = class_means(coder, seen, torch.stack([truth, wrong], 1))
    order = (with_it - without).abs().topk(largest).indices
    chosen, chance = order[0], order[1]
    tables = {"top": _pair(coder, seen, held, chosen), "wrong": _pair(coder, seen, held, chance)}
    pool = used if len(used) else torch.arange(coder.features)
    draws = [pool[torch.randperm(len(pool), generator=generator)[:largest]] for _ in range(_RANDOM)]
    drawn = [_pair(coder, seen, held, one) for one in draws]
    out: dict[str, list[float]] = {key: [] for key in ("accuracy", "low", "high", "f1", "random", "shuffled")}
    for k in ks:
        fitted = probe(tables["top"][0][:, :k], truth)
        says = fitted.says(tables["top"][1][:, :k])
        right = (says == goal).double()
        low, high = interval(right)
        out["accuracy"].append(float(right.mean()))
        out["low"].append(float(low))
        out["high"].append(float(high))
        out["f1"].append(f1(says, goal))
        out["random"].append(sum(probe(a[:, :k], truth).accuracy(b[:, :k], goal) for a, b in drawn) / _RANDOM)
        out["shuffled"].append(probe(tables["wrong"][0][:, :k], wrong).accuracy(tables["wrong"][1][:, :k], other))
    found = {key: torch.tensor(values, dtype=torch.float64) for key, values in out.items()}
    return {
        "features": chosen,
        **found,
        "raw": torch.tensor(probe(seen, truth).accuracy(held, goal), dtype=torch.float64),
        "rows": torch.tensor([len(rows.train), len(rows.test)]),
    }


def _pair(coder: Coder, seen: Tensor, held: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    return columns(coder, seen, features), columns(coder, held, features)
