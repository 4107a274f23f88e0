"""Is a head an induction head, a retrieval head, or both?

On random tokens that repeat both kinds light up. They part where the word before the needle does not occur in the question:
an induction head that stands at token c looks behind an earlier c, and there is none, or it leads elsewhere; a head that
matches the question to the fact still finds the needle. Side by side, per head:

    induction   mean mass on what followed earlier copies of the current token, in random repeats (Olsson et al.)
    retrieval   part of the needle's tokens that it copies at the steps where following a repeat does not lead to the needle
                (``copy_scores.beyond_induction``; the first token of an answer is such a step)

A head has a property if its score reaches the threshold and its interval lies above its null.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled
from workbench.probes.heads.kinds import head_scores
from workbench.probes.retrieval.copying import RetrievalResult, retrieval_heads
from workbench.probes.tables import HeadTable

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("neither", "induction", "retrieval", "both")


@dataclass(frozen=True)
class InductionOrRetrieval(HeadTable):
    """Measures ``induction`` and ``retrieval`` per head with intervals and nulls; ``bars`` the threshold of each."""

    bars: tuple[float, float] = (0.1, 0.1)

    def kinds(self) -> dict[int | str, tuple[str, ...]]:
        """Of every head ``neither``, ``induction``, ``retrieval`` or ``both``. Where one score is undefined: ``induction?`` or
        ``retrieval?`` if the other one speaks for that, else ``undefined``."""
        found = {}
        for layer in self.layers:
            has = [self._has(name, bar, layer) for name, bar in zip(("induction", "retrieval"), self.bars, strict=True)]
            found[layer] = tuple(_kind(*pair) for pair in zip(*has, strict=True))
        return found

    def frame(self) -> pd.DataFrame:
        """One row per head: ``layer, head``, both measures with ``_low _high _null``, and ``kind``."""
        table = super().frame()
        table["kind"] = [kind for row in self.kinds().values() for kind in row]
        return table

    def _has(self, name: str, bar: float, layer: int | str) -> list[bool | None]:
        value, low, null = (part[name][layer] for part in (self.values, self.low, self.null))
        floor = torch.where(low.isnan(), value, low)  # one trial has no interval
        sure = (value >= bar) & ~(floor <= null.nan_to_num(0.0))
        return [None if bool(x.isnan()) else bool(yes) for x, yes in zip(value, sure, strict=True)]


def induction_or_retrieval(
    model: Model,
    lengths: Sequence[int] | int | None = None,
    depths: Sequence[float] | int = 3,
    *,
    result: RetrievalResult | None = None,
    thresholds: tuple[float, float] = (0.1, 0.1),
    batches: int = 4,
    sequences: int = 8,
    period: tuple[int, int] = (16, 48),
    words: Sequence[int | str] | None = None,
    seed: int = 0,
    **options: Any,
) -> InductionOrRetrieval:
    """Induction score on random repeats and copy score on needles that induction does not find, side by side.

    ``lengths depths options`` go to ``retrieval_heads``, unless its ``result`` is given; ``batches sequences period words`` go
    to ``head_scores``. ``thresholds``: of induction and of retrieval. Nulls: the same keys where nothing repeats, and as many
    random positions outside the needle. Intervals are over sequences and over trials. If the model retrieves no needle, or
    every token of every answer could have been copied by following a repeat, ``retrieval`` is undefined.
    """
    if not all(0 < bar <= 1 for bar in thresholds):
        raise WorkbenchError(f"thresholds are shares in (0, 1]; got {thresholds}")
    if result is not None and (options or lengths is not None):
        raise WorkbenchError(f"a result is measured already: leave {', '.join(options) or 'lengths'} out")
    found = result if result is not None else retrieval_heads(model, lengths, depths, seed=seed, **options)
    if any(not isinstance(layer, int) for layer in found.layers):
        raise Refused("telling induction from retrieval needs one stack of layers; this model has several")
    scores = head_scores(
        model, kinds=("induction",), batches=batches, sequences=sequences, period=period, words=words, seed=seed
    )
    missing = [layer for layer in found.layers if layer not in scores.value]
    if missing:
        raise Refused(f"layers {missing} have no induction score: they are no self-attention over the tokens")
    beyond, null = found.beyond[found.used], found.null[found.used]
    nothing = torch.full(found.copied.shape[1:], float("nan"), dtype=torch.float64)
    low, high = interval(beyond) if len(beyond) else (nothing, nothing)
    undefined = dict(scores.undefined)
    mean = beyond.nanmean(0) if len(beyond) else nothing
    if found.reason:
        undefined["retrieval"] = found.reason
    elif bool(mean.isnan().all()):
        undefined["retrieval"] = (
            "every token of the answers follows a repeat: an induction head would have copied it too"
        )

    def by_layer(values: Tensor) -> dict[int | str, Tensor]:
        return dict(zip(found.layers, values, strict=True))

    def of_induction(name: str) -> dict[int | str, Tensor]:
        return {layer: getattr(scores, name)[layer][0].double() for layer in found.layers}

    return InductionOrRetrieval(
        title="Induction or retrieval",
        values={"retrieval": by_layer(mean), "induction": of_induction("value")},
        units={"retrieval": "part of the needle copied", "induction": "mean attention mass"},
        low={"retrieval": by_layer(low), "induction": of_induction("low")},
        high={"retrieval": by_layer(high), "induction": of_induction("high")},
        null={
            "retrieval": by_layer(null.nanmean(0) if len(null) else nothing),
            "induction": of_induction("null"),
        },
        undefined=undefined,
        provenance=found.provenance,
        bars=thresholds,
    )


def _kind(induces: bool | None, retrieves: bool | None) -> str:
    if induces is None or retrieves is None:
        return "induction?" if induces else "retrieval?" if retrieves else "undefined"
    return KINDS[induces + 2 * retrieves]


ANALYSES = (
    Analysis(
        name="induction-or-retrieval",
        question="Is a head an induction head, a retrieval head, or both?",
        function=induction_or_retrieval,
        example=lambda: {
            "model": bundled("compiled-needle"),
            "lengths": (48,),
            "depths": 2,
            "trials": 2,
            "batches": 1,
            "sequences": 2,
            "period": (8, 12),
        },
        paper="Wu et al. 2024 (arXiv 2404.15574); Olsson et al. 2022 (arXiv 2209.11895)",
        source="model",
        null="the same keys where nothing repeats; random positions outside the needle",
        cause="masking_curve on needles, ablation_curve on the induction task",
        definition="our test: copies count only where following a repeat of the current token does not lead to them",
    ),
)
