"""Does the answer need the retrieval heads?

The output of chosen heads (``hook_z``) is set to zero and the answer is asked for again: with the best retrieval
heads removed, and with as many other heads of the same layers removed. If copying is what the heads are for, the
first drops the answer and the second does not (Wu et al., arXiv 2404.15574, section 4: the best k of 1 to 30 heads against k
random ones outside the top 100, with needle recall as the measure).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Edit, Model
from workbench.pairs import Pairs
from workbench.probes.ablation import AblationCurve, matched
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled
from workbench.probes.retrieval.copy_scores import recall_of
from workbench.probes.retrieval.copying import RetrievalResult, retrieval_heads, steps_of, target
from workbench.probes.retrieval.decoding import decode
from workbench.probes.retrieval.haystack import Prompts, default_prompts
from workbench.probes.tables import HeadTable
from workbench.results import Result, axis
from workbench.run import Provenance
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

KS = (1, 2, 5, 10, 20, 30)
OUTSIDE = 100
METRICS = ("recall", "accuracy", "probability")
_FIRST = {"probability": 0, "accuracy": 1}
Heads = tuple[tuple[int, int], ...]
Ranking = RetrievalResult | HeadTable | Sequence[tuple[int, int]]


@dataclass(frozen=True)
class MaskingResult(Result):
    """``conditions[i]`` (``none``, ``top`` or ``random``) removed ``heads[i]``; ``probability accuracy`` ``[C, N]``
    hold the summed probability of the accepted answers and whether the largest logit is one of them, per example.
    """

    conditions: tuple[str, ...]
    heads: tuple[Heads, ...]
    probability: Tensor
    accuracy: Tensor
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    def frame(self) -> pd.DataFrame:
        """One row per condition and draw: ``condition, heads, accuracy, probability, low, high, examples``; the
        interval is the 95% bootstrap interval of the probability over examples."""
        import pandas as pd

        low, high = interval(self.probability.T)
        return pd.DataFrame(
            {
                "condition": self.conditions,
                "heads": [" ".join(f"{layer}.{head}" for layer, head in heads) for heads in self.heads],
                "accuracy": self.accuracy.mean(1).numpy(),
                "probability": self.probability.mean(1).numpy(),
                "low": low.numpy(),
                "high": high.numpy(),
                "examples": self.probability.shape[1],
            }
        )

    def drop(self, condition: str = "top") -> float:
        """Mean loss of answer probability under a condition, against nothing removed."""
        rows = [i for i, name in enumerate(self.conditions) if name == condition]
        if not rows:
            raise WorkbenchError(f"no condition {condition!r}; there are: {', '.join(dict.fromkeys(self.conditions))}")
        return float(self.probability[self.conditions.index("none")].mean() - self.probability[rows].mean())

    def plot(self, ax: Axes | None = None) -> Axes:
        """Answer probability with nothing, the retrieval heads, and random heads removed."""
        table = self.frame().groupby("condition", sort=False)["probability"]
        mean = table.mean()
        spread = [(mean - table.min()).clip(lower=0).to_numpy(), (table.max() - mean).clip(lower=0).to_numpy()]
        ax = axis(ax)
        names = {"none": "nothing", "top": "retrieval heads", "random": "random heads"}
        ax.bar(
            [names[name] for name in mean.index],
            mean.to_numpy(),
            yerr=spread,
            capsize=4,
            ecolor="grey",
            color="tab:blue",
        )
        title = f"Answer probability after removing heads\n{self.provenance.model}"
        ax.set(ylabel="probability of the answer", xlabel="removed (bars: range over draws)", title=title, ylim=(0, 1))
        return ax


def masking(
    model: Model,
    result: RetrievalResult,
    top: int | None = None,
    random: int = 8,
    *,
    prompts: Prompts | None = None,
    lengths: Sequence[int] | None = None,
    seed: int = 1000,
) -> MaskingResult:
    """Remove the ``top`` best heads of ``result`` (by default all at or above its threshold, or as many as other
    heads are left), and ``random`` times as many random heads below it.

    Random heads are drawn in the layers of the removed ones, elsewhere only where a layer has no other head. The
    prompts are new ones (``seed`` on top of the result's) at the lengths and depths where the model retrieved a needle.
    Measured on the first token of the answer; ``masking_curve`` writes the whole answer, for a range of counts.
    """
    ranked = _ranked(result)
    found = len(result.heads())
    if top is None:
        top = min(found, result.score.numel() - found)
        if not found:
            raise Refused(f"no head reaches the threshold of {result.threshold}; name how many to remove with top=")
    if top < 1 or random < 1:
        raise WorkbenchError(f"top and random count from 1; got top={top}, random={random}")
    pool = ranked[max(found, top) :]
    if len(pool) < top:
        raise Refused(
            f"{len(pool)} heads are below the threshold, so {top} random ones cannot be drawn; ask for a smaller top"
        )
    generator = torch.Generator().manual_seed(seed)
    removed = [[], ranked[:top], *(matched(ranked[:top], pool, generator) for _ in range(random))]
    source = prompts if prompts is not None else default_prompts(model)
    groups = [part for pairs in _cells(result, source, lengths, seed) for part in pairs]
    answers = [[_first(model, pairs, heads) for pairs in groups] for heads in removed]
    probability, accuracy = (torch.stack([torch.cat([each[i] for each in row]) for row in answers]) for i in (0, 1))
    conditions = ("none", "top", *["random"] * random)
    named = tuple(tuple((site.layer or 0, site.head or 0) for site in heads) for heads in removed)
    return MaskingResult(conditions, named, probability, accuracy, result.provenance)


def masking_curve(
    model: Model,
    ranking: Ranking,
    *,
    ks: Sequence[int] = KS,
    outside: int | None = None,
    random: int = 4,
    metric: str = "recall",
    whole: bool = False,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] | None = None,
    prompts: Prompts | None = None,
    max_new_tokens: int | None = None,
    cache: bool = True,
    seed: int = 1000,
    progress: Callable[[int, int], None] | None = None,
) -> AblationCurve:
    """Needle recall with the best k heads of a ranking removed, and with k random heads outside the top removed.

    ``ranking``: a ``RetrievalResult``, any table of heads (best first by its first measure, ``load_scores`` gives one), or
    ``(layer, head)`` in order. ``ks`` is cut to what the model has heads for. Random heads stand outside the first ``outside``
    of the ranking, which is 100 as published, and in models with fewer than ten times as many heads a tenth of them and no
    less than those that reach the threshold; they are drawn in the layers of the heads they stand in for where these have
    any (the authors draw from all layers alike). The metric's name says what was drawn.

    ``metric``: ``recall`` of the needle in the answer, written greedily, or of its first token ``accuracy`` or
    ``probability``. Heads are off from the last token of the prompt on, as published, which needs a key-value cache; with
    ``whole`` in the prompt too, so that reading it suffers as well. Prompts are new ones (``seed``) where a
    ``RetrievalResult`` retrieved, else at ``lengths`` and ``depths``, by ``prompts`` as in ``retrieval_heads``.
    ``progress(done, total)`` is called after every set of heads.
    """
    ranked = _ranked(ranking)
    if metric not in METRICS:
        raise UnknownName("metric of masking", metric, METRICS)
    if random < 1 or not ks or min(ks) < 1:
        raise WorkbenchError(f"ks and random count from 1; got ks={tuple(ks)}, random={random}")
    total = model.shape.layers * model.shape.heads
    everything = [Site("z", layer, head) for layer in range(model.shape.layers) for head in range(model.shape.heads)]
    if outside is None:
        tenth = min(OUTSIDE, math.ceil(total / 10))
        outside = max(tenth, len(ranking.heads()) if isinstance(ranking, RetrievalResult) else 0)
    if not 1 <= outside <= total:
        raise WorkbenchError(f"outside counts heads, 1 to the {total} of {model.name}; got {outside}")
    top = set(ranked[:outside])
    pool = [site for site in everything if site not in top]
    counts = tuple(k for k in sorted(set(ks)) if k <= len(ranked) and total - max(outside, k) >= k)
    if not counts:
        raise Refused(
            f"{model.name} has {total} heads, {len(pool)} of them outside the top {outside}: too few to remove {min(ks)} of "
            "either kind; ask for smaller ks or a smaller outside"
        )
    generator = torch.Generator().manual_seed(seed)
    sets: list[list[Site]] = [[], *(ranked[:k] for k in counts)]
    sets += [matched(ranked[:k], pool, generator) for _ in range(random) for k in counts]
    source = prompts if prompts is not None else default_prompts(model)
    given = ranking if isinstance(ranking, RetrievalResult) else None
    groups = [part for pairs in _cells(given, source, lengths, seed, depths) for part in pairs]
    values = []
    for done, heads in enumerate(sets):
        values.append(torch.cat([_measured(model, g, heads, metric, whole, max_new_tokens, cache) for g in groups]))
        if progress is not None:
            progress(done + 1, len(sets))
    found = torch.stack(values)
    where = "off throughout" if whole else "off in the answer"
    return AblationCurve(
        metric=f"needle {metric} (random: outside the top {outside})",
        ablation=f"zero, {where}",
        counts=counts,
        base=found[0],
        ranked=found[1 : 1 + len(counts)],
        random=found[1 + len(counts) :].unflatten(0, (random, len(counts))),
        order=tuple(str(site) for site in ranked),
        provenance=given.provenance if given is not None else Provenance(model.name),
    )


def _ranked(ranking: Any) -> list[Site]:
    """Sites of the heads, best first."""
    if isinstance(ranking, RetrievalResult):
        if ranking.reason:
            raise Refused(f"no retrieval heads to remove: {ranking.reason}")
        heads: list[tuple[Any, int]] = [(head.layer, head.head) for head in ranking.heads(0.0)]
    elif isinstance(ranking, HeadTable):
        heads = [(head.layer, head.head) for head in ranking.top()]
    else:
        heads = [(layer, head) for layer, head in ranking]
    if not heads:
        raise WorkbenchError("the ranking names no heads")
    if any(not isinstance(layer, int) for layer, _ in heads):
        raise Refused("removing heads needs plain layer numbers; this model has several stacks")
    if len(set(heads)) < len(heads):
        raise WorkbenchError("the ranking names a head twice")
    return [Site("z", layer, head) for layer, head in heads]


def _cells(
    result: RetrievalResult | None,
    source: Prompts,
    lengths: Sequence[int] | None,
    seed: int,
    depths: Sequence[float] | None = None,
) -> Iterator[list[Pairs]]:
    """New prompts of every length and depth, in batches whose answers start at one position."""
    if result is None:
        if not lengths:
            raise WorkbenchError("a ranking alone does not say where its model retrieves: give lengths (in tokens)")
        cells = {(length, depth) for length in lengths for depth in (depths or (0.0, 0.5, 1.0))}
    else:
        seed += result.seed
        cells = {
            (int(length), float(depth))
            for length, depth, used in zip(result.length, result.depth, result.used, strict=True)
            if used and (lengths is None or int(length) in lengths) and (depths is None or float(depth) in depths)
        }
        if not cells:
            known = sorted(set(result.length[result.used].tolist()))
            raise WorkbenchError(
                f"the needle was retrieved at lengths {known}; none of them is in {sorted(lengths or ())}"
            )
    for i, (length, depth) in enumerate(sorted(cells)):
        pairs = source(length, depth, seed + i)
        same = len(pairs.position.unique()) == 1
        yield [pairs] if same else [pairs[j : j + 1] for j in range(len(pairs))]


def _measured(
    model: Model, pairs: Pairs, heads: Sequence[Site], metric: str, whole: bool, asked: int | None, cache: bool
) -> Tensor:
    """The metric of every example with the heads off, ``[B]``."""
    if metric != "recall" and whole:
        return _first(model, pairs, heads)[_FIRST[metric]]
    prompt, spans = pairs.clean[:, : int(pairs.position[0]) + 1], target(pairs)
    steps = steps_of(model, prompt, spans, asked) if metric == "recall" else 1
    decoded = decode(model, prompt, steps, cache=cache, look=False, edit=_off(heads), edit_prompt=whole)
    if metric != "recall":
        return _accepted(decoded.first.double(), pairs.answer)[_FIRST[metric]]
    found = [
        recall_of(decoded.tokens[b][decoded.alive[b]], line[lo:hi], pairs.answer[b])
        for b, (line, (lo, hi)) in enumerate(zip(prompt.cpu(), spans.tolist(), strict=True))
    ]
    return torch.tensor(found, dtype=torch.float64)


@torch.no_grad()
def _first(model: Model, pairs: Pairs, heads: Sequence[Site]) -> tuple[Tensor, Tensor]:
    """Probability of the accepted answers and accuracy at the answer's first token, ``[B]`` each, with the heads off."""
    run = model.run(pairs.clean[:, : int(pairs.position[0]) + 1], edit=_off(heads), logits="last")
    assert run.logits is not None
    return _accepted(run.logits[:, -1].cpu().double(), pairs.answer)


def _accepted(logits: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """Summed probability of the accepted answers, and whether the largest logit is one of them."""
    vocab = logits.shape[1]
    answer = answer.cpu().masked_fill(answer.cpu() < 0, vocab)  # padding goes to a column of its own
    accepted = torch.zeros(len(logits), vocab + 1, dtype=torch.bool).scatter(1, answer, True)[:, :vocab]
    return (logits.softmax(-1) * accepted).sum(1), accepted.gather(1, logits.argmax(1, keepdim=True))[:, 0].double()


def _off(heads: Sequence[Site]) -> dict[Site | str, Edit | Tensor]:
    return dict.fromkeys(heads, torch.zeros_like)


def _example(**options: Any) -> dict[str, Any]:
    model = bundled("compiled-needle")
    return {"model": model, "random": 2} | options


ANALYSES = (
    Analysis(
        name="masking",
        question="Does the answer's probability fall when the retrieval heads are off, and not when others are?",
        function=masking,
        example=lambda: _example(result=retrieval_heads(bundled("compiled-needle"), (48,), 2, trials=2)),
        paper="Wu et al. 2024 (arXiv 2404.15574), section 4",
        source="model",
        null="as many random heads of the same layers below the threshold",
        cause="masking",
        definition="probability of the answer's first token; new prompts where the model retrieved",
    ),
    Analysis(
        name="masking-curve",
        question="How many retrieval heads must go until needle recall is gone, and does it survive without random ones?",
        function=masking_curve,
        example=lambda: _example(ranking=((1, 1), (0, 1), (1, 0)), ks=(1, 2), lengths=(48,), depths=(0.5,)),
        paper="Wu et al. 2024 (arXiv 2404.15574), section 4 and the authors' code",
        source="model",
        null="as many random heads outside the top 100 (a tenth of the heads in small models)",
        cause="masking_curve",
        definition="random heads are drawn layer by layer, where the authors draw from all layers; recall over tokens",
    ),
)
