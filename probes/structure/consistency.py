"""From which layer on does a model know its answer?

Internal consistency (Xie et al., arXiv 2405.18711): the stream after layer l is read by the model's own last norm and
unembedding (logit lens), normalised over the possible answers alone; its label is the largest of them. The consistency of an
example is the part of the layers whose label is that of the last:

    IC = mean over l < L of 1[label_l = label_L].

Middle layers are biased towards some answers, so labels are calibrated: from each answer's log probability the layer's
quantile (C - 1)/C over the examples is taken away, C the number of answers, so that every answer is the label of its
share of examples. Labels that tie count 1/C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled, needles
from workbench.probes.heads.weights import unembedding
from workbench.probes.sources import prompts_of
from workbench.probes.tables import LayerTable

_DRAWS = 64


@dataclass(frozen=True)
class Consistency(LayerTable):
    """``agreement`` per layer: the part of the examples whose label there is the last layer's, with a 95% interval over
    examples; its null pairs the layers' labels with the last labels of other examples. ``labels`` ``[L, N]`` are
    indices of answers, ``scores`` ``[L, N, C]`` the log probabilities they come from, before calibration."""

    labels: Tensor = field(default_factory=lambda: torch.empty(0))
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    agreements: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def consistency(self) -> Tensor:
        """IC of every example, ``[N]``."""
        return self.agreements[:-1].mean(0)


@torch.no_grad()
def internal_consistency(
    model: Model, inputs: Any, answers: Sequence[int] | Tensor, *, calibrate: bool = True, seed: int = 0
) -> Consistency:
    """Labels of every layer and how they agree with the last.

    ``inputs``: pairs (read at their position), or what ``model.run`` takes (read at the last real token). ``answers``:
    the ids of the C possible answers. Calibration needs several examples; a single one is refused with
    ``calibrate=True``. Serves models whose last norm and unembedding are known.
    """
    ids = torch.as_tensor(answers).flatten()
    if len(ids) < 2 or len(ids.unique()) < len(ids):
        raise WorkbenchError(f"answers are two or more different token ids; got {ids.tolist()}")
    head = unembedding(model)
    sites = [f"blocks.{layer}.hook_resid_post" for layer in range(model.shape.layers)]
    run = model.run(prompts_of(inputs), read=sites, logits=None)
    mask = run.tokens.mask.cpu()
    at = inputs.position if hasattr(inputs, "position") else mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    rows = torch.arange(len(mask))
    layers = [head.logits(run.acts[site][rows, at]).double().cpu()[:, ids] for site in sites]
    return consistency_of(
        torch.stack(layers), calibrate=calibrate, seed=seed, layers=tuple(range(len(sites))), provenance=run.provenance
    )


def consistency_of(scores: Tensor, *, calibrate: bool = True, seed: int = 0, **labels: Any) -> Consistency:
    """The same from scores ``[L, N, C]`` of C answers to N examples in L layers, the last layer last: logits or log
    probabilities, which are normalised over the answers, so that what an example adds to all of them does not count."""
    if scores.ndim != 3 or scores.shape[0] < 2 or scores.shape[2] < 2:
        raise WorkbenchError(f"scores are [L, N, C] with two layers and two answers or more; got {list(scores.shape)}")
    count, classes = scores.shape[1:]
    if calibrate and count < 2:
        raise Refused("calibration takes quantiles over examples: give two or more, or calibrate=False")
    logp = scores.double().log_softmax(-1)
    values = logp
    if calibrate:
        values = values - values.quantile((classes - 1) / classes, dim=1, keepdim=True)
    best = values == values.amax(-1, keepdim=True)
    agree = _agreement(best, best[-1:])
    generator = torch.Generator().manual_seed(seed)
    shuffled = [_agreement(best, best[-1:, torch.randperm(count, generator=generator)]).mean(1) for _ in range(_DRAWS)]
    low, high = interval(agree.T)
    return Consistency(
        "Internal consistency",
        labels.pop("layers", tuple(range(len(scores)))),
        {"agreement": agree.mean(1)},
        {"agreement": "part of the examples"},
        {"agreement": low},
        {"agreement": high},
        {"agreement": torch.stack(shuffled).mean(0)},
        labels=values.argmax(-1),
        scores=logp,
        agreements=agree,
        **labels,
    )


def weighted_vote(answers: Sequence[Any], consistency: Sequence[float] | Tensor) -> dict[Any, float]:
    """Sampled answers of one question weighed by their consistency (SC + IC), largest share first; shares sum to 1."""
    weights = torch.as_tensor(consistency, dtype=torch.float64).flatten()
    if len(answers) != len(weights) or not len(weights) or bool((weights < 0).any()) or not float(weights.sum()) > 0:
        raise WorkbenchError(
            f"as many consistencies, not negative, as answers; got {len(answers)} answers, {len(weights)} weights"
        )
    total: dict[Any, float] = {}
    for answer, weight in zip(answers, weights.tolist(), strict=True):
        total[answer] = total.get(answer, 0.0) + weight / float(weights.sum())
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def _agreement(best: Tensor, last: Tensor) -> Tensor:
    """Per layer and example the chance that a label drawn from the best answers is one drawn from the last layer's,
    ``[L, N]``."""
    share, end = (x.double() / x.sum(-1, keepdim=True) for x in (best, last))
    return (share * end).sum(-1)


def _example() -> dict[str, Any]:
    model = bundled()
    pairs = needles(model, n=8)
    return {"model": model, "inputs": pairs, "answers": pairs.answer[:, 0].unique()}


ANALYSES = (
    Analysis(
        name="internal-consistency",
        question="From which layer on does a model know its answer?",
        function=internal_consistency,
        example=_example,
        paper="Xie et al. 2024 (arXiv 2405.18711)",
        source="model",
        null="the last labels of other examples",
        definition="labels are the answers furthest above their quantile, and the last layer does not count; the authors' code "
        "asks whether the last label's answer is above its quantile, the last layer included",
    ),
)
