"""Which heads do nothing on a text?

Scores of inactivity after Sandoval-Segura et al. (arXiv 2504.03889): the best that needs no tuning to a model is the
mean norm of a head's output over the tokens, divided by its mean over the heads of the layer ("AHON-LN"):

    s_h = mean_t |z_t,h| / mean_h' mean_t |z_t,h'|

Small means inactive. Beside it stand the norm alone, the attention to the first token and the entropy of the rows: a
sink is not the same as inactivity, and the first-token score finds fewer heads that can be removed. ``zeroable`` is the
proof: heads are set to zero in the order of a score, and the loss tells how many can go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.captures import capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Model
from workbench.probes.ablation import AblationCurve, ablation_curve
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import SENTENCE, bundled, bundled_run
from workbench.probes.sinks.shares import shares
from workbench.probes.sources import inner, prompts_of, read_site, real_mean, real_tokens
from workbench.probes.tables import HeadTable
from workbench.run import Run

READS = ("blocks.{l}.attn.hook_z",)
SCORES = ("relative_norm", "norm", "first_token", "entropy")


def inactive_heads(run: Run, *, share: float = 0.12, raw: bool = False) -> HeadTable:
    """Scores of every head, means over real tokens and then sequences, with intervals over sequences: ``relative_norm``
    (AHON-LN), ``norm`` of ``hook_z``, ``first_token`` (its share of attention) and ``entropy`` (nats); and
    ``inactive``: 1 for the ``share`` of all heads with the smallest relative norm, the published 12% by default.

    ``run`` has captured maps and read ``hook_z`` of its layers. Norms are those of the outputs before W_O. The null of
    the relative norm is 1, that of a head like the others. ``raw=True`` takes first-token and entropy of gated maps
    inside the gate. Entropy is NaN where rows are no distributions.
    """
    if not 0 < share < 1:
        raise WorkbenchError(f"share is the part of the heads called inactive, in (0, 1); got {share}")
    if not run.maps:
        raise WorkbenchError("this run captured no attention; run it again with maps=wb.capture()")
    each: dict[str, dict[int | str, Tensor]] = {name: {} for name in SCORES}
    for layer, amap in run.maps.items():
        z = read_site(run, "z", layer).cpu().double()
        real = real_tokens(run, z)
        norm = real_mean(z.norm(dim=-1).transpose(1, 2), real)
        each["norm"][layer] = norm
        each["relative_norm"][layer] = norm / norm.mean(1, keepdim=True)
        each["first_token"][layer] = shares(layer, amap, run.tokens, raw=raw).first
        try:
            each["entropy"][layer] = real_mean(inner(layer, amap, raw).entropy(), real)
        except Refused:
            each["entropy"][layer] = torch.full_like(norm, float("nan"))
    order = torch.cat([rows.nanmean(0) for rows in each["relative_norm"].values()]).argsort()
    marked = torch.zeros(len(order), dtype=torch.float64)
    marked[order[: max(1, round(share * len(order)))]] = 1
    sizes = [rows.shape[1] for rows in each["norm"].values()]
    inactive = dict(zip(each["norm"], marked.split(sizes), strict=True))
    units = {
        "relative_norm": "of the layer's mean", "norm": "norm", "first_token": "mean weight", "entropy": "nats",
        "inactive": "1 or 0",
    }  # fmt: skip
    null = {"relative_norm": {layer: torch.ones_like(rows) for layer, rows in each["norm"].items()}}
    return HeadTable.averaged(
        "Inactive heads", each, units, single={"inactive": inactive}, null=null, provenance=run.provenance
    )


@dataclass(frozen=True)
class Zeroable(AblationCurve):
    """An ablation curve, and how many heads can be set to zero before the mean loss has grown by more than
    ``within``."""

    score: str = ""
    within: float = 0.01

    @property
    def removable(self) -> int:
        """The largest count up to which every count of the ranking keeps the loss within ``within`` of the unchanged
        one."""
        return self._within(self.ranked.mean(1))

    @property
    def removable_random(self) -> float:
        """The same for random heads, mean over draws."""
        return sum(map(self._within, self.random.mean(2))) / len(self.random)

    def _within(self, losses: Tensor) -> int:
        base, found = float(self.base.mean()), 0
        for count, loss in zip(self.counts, losses.tolist(), strict=True):
            if loss > base * (1 + self.within):
                break
            found = count
        return found


def zeroable(
    model: Model,
    inputs: Any,
    *,
    score: str = "relative_norm",
    within: float = 0.01,
    counts: tuple[int, ...] | None = None,
    random: int = 8,
    seed: int = 0,
) -> Zeroable:
    """How many heads can be set to zero, the least active first, before the loss grows by more than ``within`` of
    itself?

    ``score``: the least active are those with the smallest ``relative_norm``, ``norm`` or ``entropy``, or the largest
    ``first_token``. ``inputs`` are texts; heads are ranked and the loss is measured on them. As many random heads of
    the same layers stand beside it. (Published: about 12% of the heads with MMLU within 1%.)
    """
    if score not in SCORES:
        raise UnknownName("score of inactivity", score, SCORES)
    if not within > 0:
        raise WorkbenchError(f"within is the part by which the loss may grow, above 0; got {within}")
    reads = [READS[0].replace("{l}", str(layer)) for layer in range(model.shape.layers)]
    with torch.no_grad():
        run = model.run(prompts_of(inputs), read=reads, maps=capture(), logits=None)
    ranked = inactive_heads(run).top(score)
    order = [(int(head.layer), head.head) for head in (ranked if score == "first_token" else ranked[::-1])]
    steps = counts if counts is not None else tuple(range(1, len(order)))
    curve = ablation_curve(model, inputs, order, ablation="zero", counts=steps, random=random, seed=seed)
    return Zeroable(**{name: getattr(curve, name) for name in curve.__dataclass_fields__}, score=score, within=within)


ANALYSES = (
    Analysis(
        name="inactive-heads",
        question="Which heads do nothing on a text?",
        function=inactive_heads,
        example=lambda: {"run": bundled_run(read=tuple(READS[0].replace("{l}", str(i)) for i in range(4)))},
        paper="Sandoval-Segura et al. 2025 (arXiv 2504.03889)",
        source="run",
        null="1, a head with the mean norm of its layer",
        cause="workbench.probes.sinks.inactive.zeroable",
        definition="norms are those of outputs before W_O",
        reads=READS,
    ),
    Analysis(
        name="zeroable",
        question="How many heads can be set to zero before the loss grows?",
        function=zeroable,
        example=lambda: {"model": bundled(), "inputs": [SENTENCE], "counts": (1, 2, 4), "random": 2},
        paper="Sandoval-Segura et al. 2025 (arXiv 2504.03889)",
        source="model",
        null="as many random heads of the same layers",
        cause="is the intervention: heads are set to zero",
    ),
)
