"""Does removing the parts that an analysis ranks first change the model more than removing others?

Every ranking is a claim about cause, and this is its test: parts are removed in the order of the ranking, and as many random
parts beside it, layer by layer the same number. What removal means is always said: ``zero``, ``mean`` (over the real tokens of
the reference inputs), ``resample`` (the part's output on the next example of the batch) or ``counterfactual`` (on the corrupted
prompt of the pair).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Edit, Model
from workbench.pairs import Pairs, accuracy, at_answer, logit_difference
from workbench.probes.bootstrap import interval
from workbench.results import Result, axis
from workbench.run import Provenance, Run
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

ABLATIONS = ("zero", "mean", "resample", "counterfactual")
Metric = Callable[[Run], Tensor]
"""One number per example, ``[B]``, from a run with logits."""
Part = Site | tuple[int, int]
"""A site whose tensor is replaced, or ``(layer, head)`` for the head's ``hook_z``."""


@dataclass(frozen=True)
class AblationCurve(Result):
    """``base`` ``[N]``: the metric of N examples with nothing removed; ``ranked`` ``[C, N]`` with the first ``counts[c]`` parts
    of the ranking removed, ``random`` ``[R, C, N]`` with as many random ones, R draws."""

    metric: str
    ablation: str
    counts: tuple[int, ...]
    base: Tensor
    ranked: Tensor
    random: Tensor
    order: tuple[str, ...]
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    def frame(self) -> pd.DataFrame:
        """One row per count: ``removed, ranked, ranked_low, ranked_high`` (95% interval over examples), ``random`` (mean over
        draws), ``random_low, random_high`` (range over draws), ``base``."""
        import pandas as pd

        low, high = interval(self.ranked.T)
        draws = self.random.mean(2)
        return pd.DataFrame(
            {
                "removed": self.counts,
                "ranked": self.ranked.mean(1).numpy(),
                "ranked_low": low.numpy(),
                "ranked_high": high.numpy(),
                "random": draws.mean(0).numpy(),
                "random_low": draws.amin(0).numpy(),
                "random_high": draws.amax(0).numpy(),
                "base": float(self.base.mean()),
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The metric over the number of removed parts: by the ranking, and random ones (shaded: range over draws)."""
        table = self.frame()
        ax = axis(ax, 4.8, 3.2)
        ax.plot(table["removed"], table["ranked"], marker="o", label="by the ranking")
        ax.plot(table["removed"], table["random"], linestyle="--", color="0.4", label="random")
        ax.fill_between(
            table["removed"], table["random_low"], table["random_high"], color="0.4", alpha=0.2, linewidth=0
        )
        ax.axhline(float(self.base.mean()), color="0.7", linewidth=1)
        ax.set(xlabel=f"parts removed ({self.ablation})", ylabel=self.metric, title=self.provenance.model)
        ax.legend()
        return ax


@torch.no_grad()
def ablation_curve(
    model: Model,
    inputs: Any,
    ranking: Sequence[Part],
    *,
    metric: str | Metric = "loss",
    ablation: str = "mean",
    counts: Sequence[int] | None = None,
    pool: Iterable[Part] | None = None,
    random: int = 8,
    seed: int = 0,
) -> AblationCurve:
    """The metric as parts are removed in the order of ``ranking``, and as random ones are.

    ``inputs``: ``Pairs``, or what ``model.run`` takes. ``metric``: ``loss`` (mean negative log probability of the next token,
    nats), ``kl`` (of the next-token distribution from the unchanged model's, nats), with pairs ``probability``, ``accuracy``
    and ``logit-difference`` of the answer, or a function of the run. ``counts``: how many to remove, by default up to ten steps
    from 1 to all of the ranking. ``pool``: what random parts are drawn from, by default all heads of the model, or the ranking
    itself if it ranks other sites; of the layer of the part they stand in for, and outside of the removed ones, where there
    are any left.
    """
    order = [as_site(part) for part in ranking]
    if not order:
        raise WorkbenchError("the ranking names no parts")
    if len(set(order)) < len(order):
        raise WorkbenchError("the ranking names a part twice")
    if ablation not in ABLATIONS:
        raise UnknownName("ablation", ablation, ABLATIONS)
    if random < 1:
        raise WorkbenchError(f"random is the number of random rankings, at least 1; got {random}")
    steps = _counts(len(order)) if counts is None else tuple(counts)
    if not steps or min(steps) < 1 or max(steps) > len(order):
        raise WorkbenchError(f"counts lie between 1 and the {len(order)} parts of the ranking; got {list(steps)}")
    everything = _pool(model, order) if pool is None else [as_site(part) for part in pool]
    name, measure = named_metric(metric, inputs)
    tokens = inputs.clean if isinstance(inputs, Pairs) else inputs
    removed = list(dict.fromkeys([*order[: max(steps)], *everything]))
    plain = model.run(tokens, read={part.whole for part in removed})
    replacement = _replacements(model, inputs, plain, ablation)

    def with_removed(parts: Sequence[Site]) -> Tensor:
        edits: dict[Site | str, Edit | Tensor] = {part: replacement(part) for part in parts}
        return measure(model.run(tokens, edit=edits), plain)

    generator = torch.Generator().manual_seed(seed)
    ranked = torch.stack([with_removed(order[:count]) for count in steps])
    draws = [
        torch.stack([with_removed(matched(order[:count], everything, generator)) for count in steps])
        for _ in range(random)
    ]
    names = tuple(str(part) for part in order)
    return AblationCurve(
        name, ablation, steps, measure(plain, plain), ranked, torch.stack(draws), names, plain.provenance
    )


def as_site(part: Part) -> Site:
    """``(layer, head)`` is the head's output before ``W_O``."""
    if isinstance(part, Site):
        return part
    layer, head = part
    return Site("z", layer, head)


def matched(chosen: Sequence[Site], pool: Sequence[Site], generator: torch.Generator) -> list[Site]:
    """As many parts of the pool, none of them chosen, layer by layer where the layer has some left; chosen ones only if
    nothing else is left."""
    left = [part for part in pool if part not in set(chosen)]
    spare = [part for part in pool if part in set(chosen)]
    picked = []
    for part in chosen:
        if not left:
            left, spare = spare, []
        if not left:
            raise Refused(f"the pool holds {len(pool)} parts, too few to draw {len(chosen)} random ones")
        near = [other for other in left if other.layer == part.layer] or left
        pick = near[int(torch.randint(len(near), (1,), generator=generator))]
        left.remove(pick)
        picked.append(pick)
    return picked


def next_token_loss(run: Run) -> Tensor:
    """Mean negative log probability of the next token over the real tokens of each sequence, ``[B]`` in nats."""
    if run.logits is None or run.tokens.ids.shape[1] != run.logits.shape[1] or run.logits.shape[1] < 2:
        raise Refused("the loss needs logits of every token of a text of two tokens or more")
    ids, real = run.tokens.ids, run.tokens.mask
    logp = run.logits[:, :-1].float().log_softmax(-1)
    loss = -logp.gather(-1, ids[:, 1:, None].long().to(logp.device))[..., 0].double().cpu()
    both = (real[:, 1:] & real[:, :-1]).cpu()
    return (loss * both).sum(1) / both.sum(1)


def divergence(run: Run, plain: Run) -> Tensor:
    """Mean KL divergence of the prediction from that of ``plain`` over real tokens, ``[B]`` in nats."""
    if run.logits is None or plain.logits is None:
        raise Refused("the divergence compares logits; this model gives none")
    wanted, got = (x.logits.double().log_softmax(-1) for x in (plain, run))  # type: ignore[union-attr]
    each = (wanted.exp() * (wanted - got)).sum(-1).cpu()
    if each.ndim == 1:
        return each
    mask = plain.tokens.mask.cpu()
    real = mask if mask.shape == each.shape else torch.ones_like(each, dtype=torch.bool)
    return (each * real).sum(1) / real.sum(1)


def named_metric(metric: str | Metric, inputs: Any) -> tuple[str, Callable[[Run, Run], Tensor]]:
    """Its name, and the metric as a function of a run and of the unchanged run: ``[B]`` float64 on the CPU."""
    if not isinstance(metric, str):
        return getattr(metric, "__name__", "metric"), lambda run, plain: metric(run).detach().double().cpu()
    if metric == "loss":
        return metric, lambda run, plain: next_token_loss(run)
    if metric == "kl":
        return metric, divergence
    answers: dict[str, Callable[[Tensor, Pairs], Tensor]] = {
        "probability": _answer_probability,
        "accuracy": accuracy,
        "logit-difference": logit_difference,
    }
    if metric not in answers:
        raise UnknownName("metric", metric, ("loss", "kl", *answers))
    if not isinstance(inputs, Pairs):
        raise WorkbenchError(f"metric {metric!r} asks for the answer of pairs; got {type(inputs).__name__}")

    def measure(run: Run, plain: Run) -> Tensor:
        if run.logits is None:
            raise Refused(f"metric {metric!r} needs logits; this model gives none")
        return answers[metric](run.logits.float(), inputs).detach().double().cpu()

    return metric, measure


def _answer_probability(logits: Tensor, pairs: Pairs) -> Tensor:
    p, answer = at_answer(logits, pairs).softmax(-1), pairs.answer.to(logits.device)
    return torch.where(answer >= 0, p.gather(1, answer.clamp(min=0)), 0.0).sum(1)


def _counts(parts: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(parts * i / 10)) for i in range(1, 11)}))


def _pool(model: Model, order: Sequence[Site]) -> list[Site]:
    if any(part.kind != "z" or part.head is None or part.stack for part in order):
        return list(order)
    return [Site("z", layer, head) for layer in range(model.shape.layers) for head in range(model.shape.heads)]


def _replacements(model: Model, inputs: Any, plain: Run, ablation: str) -> Callable[[Site], Edit]:
    """What stands in for a part, as an edit of its site."""
    if ablation == "zero":
        return lambda part: torch.zeros_like
    if ablation == "counterfactual":
        if not isinstance(inputs, Pairs):
            raise WorkbenchError(f"a counterfactual is the corrupted prompt of pairs; got {type(inputs).__name__}")
        other = model.run(inputs.corrupt, read=list(plain.acts), logits=None).acts
        return lambda part: _constant(other[part])
    if ablation == "resample":
        if len(plain.tokens.mask) < 2:
            raise WorkbenchError("resampling takes the output on another example: give two or more")
        return lambda part: _constant(plain.acts[part].roll(1, 0))
    real = plain.tokens.mask

    def mean(part: Site) -> Edit:
        values = plain.acts[part]
        kept = values[real.to(values.device)] if real.shape == values.shape[:2] else values.flatten(0, 1)
        return lambda output: kept.mean(0).to(output.dtype).expand_as(output)

    return mean


def _constant(values: Tensor) -> Edit:
    return lambda output: values.to(output.dtype)
