"""Does the answer need the retrieval heads?

The output of chosen heads (``hook_z``) is set to zero and the answer is asked for again: with the best retrieval
heads removed, and with as many other heads of the same layers removed. If copying is what the heads are for, the
first drops the answer and the second does not (Wu et al., arXiv 2404.15574, section 4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Edit, Model
from workbench.probes.bootstrap import interval
from workbench.probes.retrieval.copying import RetrievalResult
from workbench.probes.retrieval.haystack import Prompts, default_prompts
from workbench.results import Result, axis
from workbench.run import Provenance
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Heads = tuple[tuple[int, int], ...]


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
        ax.bar([names[name] for name in mean.index], mean.to_numpy(), yerr=spread, capsize=4, color="tab:blue")
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
    """
    if result.reason:
        raise Refused(f"no retrieval heads to remove: {result.reason}")
    if top is None:
        found = len(result.heads())
        top = min(found, result.score.numel() - found)
        if not found:
            raise Refused(f"no head reaches the threshold of {result.threshold}; name how many to remove with top=")
    if top < 1 or random < 1:
        raise WorkbenchError(f"top and random count from 1; got top={top}, random={random}")
    ranked = [(head.layer, head.head) for head in result.heads(0.0)]
    if any(not isinstance(layer, int) for layer, _ in ranked):
        raise Refused("removing heads needs plain layer numbers; this model has several stacks")
    chosen = tuple((int(layer), head) for layer, head in ranked[:top])
    kept = {(head.layer, head.head) for head in result.heads()} | set(chosen)
    pool = [(int(layer), head) for layer, head in ranked if (layer, head) not in kept]
    if len(pool) < top:
        raise Refused(
            f"{len(pool)} heads are below the threshold, so {top} random ones cannot be drawn; ask for a smaller top"
        )
    generator = torch.Generator().manual_seed(seed)
    removed: list[Heads] = [(), chosen, *(_matched(chosen, pool, generator) for _ in range(random))]
    source = prompts if prompts is not None else default_prompts(model)
    cells = {
        (int(length), float(depth))
        for length, depth, used in zip(result.length, result.depth, result.used, strict=True)
        if used and (lengths is None or int(length) in lengths)
    }
    if not cells:
        known = sorted(set(result.length[result.used].tolist()))
        raise WorkbenchError(f"the needle was retrieved at lengths {known}; none of them is in {sorted(lengths or ())}")
    parts = []
    for i, (length, depth) in enumerate(sorted(cells)):
        pairs = source(length, depth, result.seed + seed + i)
        parts.append([_answer(model, pairs.clean, pairs.answer, pairs.position, heads) for heads in removed])
    probability = torch.stack([torch.cat([part[c][0] for part in parts]) for c in range(len(removed))])
    accuracy = torch.stack([torch.cat([part[c][1] for part in parts]) for c in range(len(removed))])
    conditions = ("none", "top", *["random"] * random)
    return MaskingResult(conditions, tuple(removed), probability, accuracy, result.provenance)


def _matched(chosen: Heads, pool: list[tuple[int, int]], generator: torch.Generator) -> Heads:
    """As many heads from the pool, layer by layer where the layer has some left."""
    left, picked = list(pool), []
    for layer, _ in chosen:
        near = [head for head in left if head[0] == layer] or left
        pick = near[int(torch.randint(len(near), (1,), generator=generator))]
        left.remove(pick)
        picked.append(pick)
    return tuple(picked)


@torch.no_grad()
def _answer(model: Model, ids: Tensor, answer: Tensor, position: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """Probability of the accepted answers and accuracy, ``[B]`` each, with the heads' outputs at zero."""
    edit: dict[Site | str, Edit | Tensor] = {Site("z", layer, head): _zero for layer, head in heads}
    found = []
    for i in range(len(ids)) if len(position.unique()) > 1 else [slice(None)]:
        rows = slice(i, i + 1) if isinstance(i, int) else i
        run = model.run(ids[rows, : int(position[rows][0]) + 1], edit=edit, logits="last")
        assert run.logits is not None
        found.append(run.logits[:, -1].cpu().double())
    logits = torch.cat(found)
    vocab = logits.shape[1]
    answer = answer.cpu().masked_fill(answer.cpu() < 0, vocab)  # padding goes to a column of its own
    accepted = torch.zeros(len(logits), vocab + 1, dtype=torch.bool).scatter(1, answer, True)[:, :vocab]
    return (logits.softmax(-1) * accepted).sum(1), accepted.gather(1, logits.argmax(1, keepdim=True))[:, 0].double()


def _zero(output: Tensor) -> Tensor:
    return torch.zeros_like(output)
