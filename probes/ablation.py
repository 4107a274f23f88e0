"""Does removing the parts that an analysis ranks first change the model more than removing others?

Every ranking is a claim about cause, and this is its test: parts are removed in the order of the ranking, and as many random
parts beside it (``matched`` says which). What removal means is always said; ``probes/removal.py`` has the words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs, accuracy, at_answer, logit_difference
from workbench.probes.bootstrap import interval
from workbench.probes.removal import ABLATIONS, Heads, Part, Removal, all_heads, as_part, as_site
from workbench.results import Result, axis
from workbench.run import Provenance, Run
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

__all__ = [
    "ABLATIONS", "AblationCurve", "Heads", "Part", "ablation_curve", "as_part", "as_site", "divergence", "matched",
    "named_metric", "next_token_loss", "over_tokens",
]  # fmt: skip

Metric = Callable[[Run], Tensor]
"""One number per example, ``[B]``, from a run with logits."""
_NUMBERS = 2**22


@dataclass(frozen=True)
class AblationCurve(Result):
    """``base`` ``[N]``: the metric of N examples with nothing removed; ``ranked`` ``[C, N]`` with the first ``counts[c]`` parts
    of the ranking removed, ``random`` ``[R, C, N]`` with as many random ones, R draws.

    Up to half of what random parts are drawn from, they are others than the ranked ones, of the same layers while these have
    any. Beyond half there are not enough others: the ranked parts are drawn too, and the curves meet where all are removed.
    """

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
    from 1 to all of the ranking. ``pool``: what random parts are drawn from, as ``matched`` tells; by default all heads of the
    stacks it ranks heads of, or the ranking itself if it ranks anything else. Whole KV groups are ranked as
    ``Heads(layer, heads)``, sublayers as ``Site("attn_out", l)``.
    """
    order = [as_part(part) for part in ranking]
    if not order:
        raise WorkbenchError("the ranking names no parts")
    if len(set(order)) < len(order):
        raise WorkbenchError("the ranking names a part twice")
    if random < 1:
        raise WorkbenchError(f"random is the number of random rankings, at least 1; got {random}")
    steps = steps_to(len(order)) if counts is None else tuple(counts)
    if not steps or min(steps) < 1 or max(steps) > len(order):
        raise WorkbenchError(f"counts lie between 1 and the {len(order)} parts of the ranking; got {list(steps)}")
    everything = default_pool(model, order) if pool is None else list(dict.fromkeys(map(as_part, pool)))
    name, measure = named_metric(metric, inputs)
    if name == "loss" and not model.shape.causal:
        raise Refused(f"{model.name} sees the next token; its loss is none: use kl, or a metric of your own")
    removal = Removal.of(model, inputs, [*order[: max(steps)], *everything], ablation)
    generator = torch.Generator().manual_seed(seed)
    removals = [order[:count] for count in steps]
    removals += [matched(order[:count], everything, generator) for _ in range(random) for count in steps]
    # Sets that were drawn twice are run once.
    different = {frozenset(parts): parts for parts in removals}
    found = dict(
        zip(different, (measure(run, removal.plain) for run in removal.runs(list(different.values()))), strict=True)
    )
    values = torch.stack([found[frozenset(parts)] for parts in removals]).unflatten(0, (1 + random, len(steps)))
    base = measure(removal.plain, removal.plain)
    names = tuple(map(str, order))
    return AblationCurve(name, ablation, steps, base, values[0], values[1:], names, removal.plain.provenance)


P = TypeVar("P", Site, Heads, Site | Heads)


def matched(chosen: Sequence[P], pool: Sequence[P], generator: torch.Generator) -> list[P]:
    """As many random parts of the pool as are chosen: the control of every removal.

    Each stands in for a chosen part and is of its layer and kind. Where the chosen ones fill a layer, or leave too few others
    in it, the rest are of the same kind in any layer, and of any kind if there is none. None is a chosen one as long as the pool
    holds enough others; if it does not (more than half of it is chosen), chosen ones are drawn like any other.
    """
    everything, taken = list(dict.fromkeys(pool)), set(chosen)
    others = [part for part in everything if part not in taken]
    drawn_from = others if len(others) >= len(chosen) else everything
    if len(drawn_from) < len(chosen):
        raise Refused(f"the pool holds {len(everything)} parts, too few to draw {len(chosen)} random ones")
    open_places = set(map(_place, others))
    wanted = Counter(place for place in map(_place, chosen) if place in open_places)
    picked = _drawn(drawn_from, wanted, _place, generator)
    for like in (_kind, lambda part: ""):
        left = [part for part in drawn_from if part not in picked]
        picked += _drawn(left, Counter(map(like, chosen)) - Counter(map(like, picked)), like, generator)
    return picked


def _drawn(parts: Sequence[P], wanted: Counter[Any], like: Callable[[P], Any], generator: torch.Generator) -> list[P]:
    """Random parts, as many of every likeness as are wanted of it, or all that there are."""
    found: list[P] = []
    for i in torch.randperm(len(parts), generator=generator).tolist():
        if wanted[like(parts[i])] > 0:
            wanted[like(parts[i])] -= 1
            found.append(parts[i])
    return found


def _kind(part: Site | Heads) -> tuple[str, str]:
    if isinstance(part, Heads):
        return part.stack, f"{len(part.heads)} heads"
    return part.stack, part.kind if part.head is None else f"{part.kind} of a head"


def _place(part: Site | Heads) -> tuple[Any, ...]:
    return (part.layer, *_kind(part))


def next_token_loss(run: Run) -> Tensor:
    """Mean negative log probability of the next token over the real tokens of each sequence, ``[B]`` in nats."""
    ids, real = predicted(run)
    if run.logits is None or run.logits.ndim != 3 or ids.shape[1] != run.logits.shape[1] or ids.shape[1] < 2:
        raise Refused(
            "the loss needs logits of every token of a text of two tokens or more; for images pass a function of the run"
        )
    each = []
    for logits, row in zip(run.logits[:, :-1], ids[:, 1:], strict=True):
        logp = precise(logits).log_softmax(-1)
        each.append(-logp.gather(-1, row[:, None].long().to(logp.device))[:, 0].double().cpu())
    both = (real[:, 1:] & real[:, :-1]).cpu()
    return (torch.stack(each) * both).sum(1) / both.sum(1)


def divergence(run: Run, plain: Run) -> Tensor:
    """Mean KL divergence of the prediction from that of ``plain`` over real tokens, ``[B]`` in nats."""
    return over_tokens(plain, run, lambda p, q: torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1))


def over_tokens(plain: Run, run: Run, compare: Callable[[Tensor, Tensor], Tensor], *, log: bool = True) -> Tensor:
    """Mean over real tokens of ``compare`` of two runs' log probabilities (or logits, with ``log=False``), ``[B]``.

    ``compare`` takes float64 ``[n, V]`` twice, some tokens at a time, and gives ``[n]``."""
    if run.logits is None or plain.logits is None:
        raise Refused(f"predictions are compared by their logits; {plain.provenance.model} gives none")
    one, two = plain.logits.flatten(0, -2), run.logits.flatten(0, -2)
    step = max(1, _NUMBERS // one.shape[-1])
    parts = []
    for lo in range(0, len(one), step):
        pair = [x[lo : lo + step].double() for x in (one, two)]
        parts.append(compare(*(x.log_softmax(-1) if log else x for x in pair)).cpu())
    each = torch.cat(parts).unflatten(0, plain.logits.shape[:-1])
    if each.ndim == 1:
        return each
    mask = predicted(plain)[1].cpu()
    real = mask if mask.shape == each.shape else torch.ones_like(each, dtype=torch.bool)
    return (each * real).sum(1) / real.sum(1)


def predicted(run: Run) -> tuple[Tensor, Tensor]:
    """Ids and mask of the tokens that the logits belong to: the decoder's, where the model has one."""
    ids = run.tokens.inputs.get("decoder_input_ids")
    if ids is None:
        return run.tokens.ids, run.tokens.mask
    mask = run.tokens.inputs.get("decoder_attention_mask")
    return ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def precise(logits: Tensor) -> Tensor:
    """Logits in float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()


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
        return answers[metric](precise(run.logits), inputs).detach().double().cpu()

    return metric, measure


def _answer_probability(logits: Tensor, pairs: Pairs) -> Tensor:
    p, answer = at_answer(logits, pairs).softmax(-1), pairs.answer.to(logits.device)
    return torch.where(answer >= 0, p.gather(1, answer.clamp(min=0)), 0.0).sum(1)


def default_metric(model: Model, inputs: Any) -> str:
    """``probability`` of the answer for pairs, the ``loss`` of texts, else ``kl``."""
    return "probability" if isinstance(inputs, Pairs) else "loss" if model.shape.causal else "kl"


def steps_to(most: int) -> tuple[int, ...]:
    """Up to ten even steps from 1 to ``most``."""
    return tuple(sorted({max(1, round(most * i / 10)) for i in range(1, 11)}))


def default_pool(model: Model, order: Sequence[Site | Heads]) -> list[Site | Heads]:
    """What random parts are drawn from: all heads of the stacks if the ranking ranks heads, else what it ranks."""
    if all(isinstance(part, Site) and part.kind == "z" and part.head is not None for part in order):
        return [head for stack in dict.fromkeys(part.stack for part in order) for head in all_heads(model, stack)]
    return list(dict.fromkeys(order))
