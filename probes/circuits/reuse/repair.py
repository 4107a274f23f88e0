"""Can heads of one task repair another, once they are told where to look?

In colored objects GPT-2 medium leaves the heads idle that inhibit wrong answers in indirect object identification. Made to
attend at the last position to the two wrong colors, they do here what they do there: accuracy 49.6 -> 93.7% without a new
mistake, attention of the movers to the wrong colors 8.7 points down and to the right one 2.7 up. The inhibition heads alone
give 81.5%, the negative mover alone 78.1% (Merullo et al., arXiv 2310.08744; 1000 prompts). Controls, which are ours: the same
forcing on random heads of the same layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.models.protocol import Model, Tokens
from workbench.pairs import Pairs, accuracy
from workbench.probes.bootstrap import interval
from workbench.probes.circuits.components import Metric, Setting, components
from workbench.probes.circuits.reuse.override import override_edits
from workbench.results import Result, axis
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

NONE, FORCED, RANDOM = "as it is", "forced", "random"
_DRAWS = 50


@dataclass(frozen=True)
class Repair(Result):
    """What forcing the attention of heads at the answer position does, per condition and example.

    ``conditions`` are ``as it is``, ``forced`` and ``random 1`` ..., with the ``heads`` that each forces. ``correct``
    ``[C, B]`` bool: the largest logit is an answer. ``difference`` ``[C, B]`` float64: the metric. ``on_answer`` and
    ``on_forced`` ``[C, B]``: attention at the answer position, mean over ``movers``, to keys that hold an answer and to the
    keys of the spans ``onto``; NaN without movers.
    """

    conditions: tuple[str, ...]
    heads: tuple[tuple[str, ...], ...]
    onto: tuple[str, ...]
    movers: tuple[str, ...]
    correct: Tensor
    difference: Tensor
    on_answer: Tensor
    on_forced: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> Tensor:
        """Share of correct examples per condition, ``[C]``."""
        return self.correct.double().mean(1)

    @property
    def fixed(self) -> Tensor:
        """Examples that are wrong as it is and right in the condition, ``[C, B]``."""
        return self.correct & ~self.correct[:1]

    @property
    def broken(self) -> Tensor:
        """Examples that are right as it is and wrong in the condition, ``[C, B]``."""
        return ~self.correct & self.correct[:1]

    def frame(self) -> pd.DataFrame:
        """One row per condition: ``condition, heads, accuracy, low, high`` (95% bootstrap over examples), ``difference`` (mean),
        ``fixed, broken`` (examples), ``on_answer, on_forced`` (means)."""
        import pandas as pd

        low, high = interval(self.correct.double().T)
        return pd.DataFrame(
            {
                "condition": list(self.conditions),
                "heads": [", ".join(heads) for heads in self.heads],
                "accuracy": self.accuracy.numpy(),
                "low": low.numpy(),
                "high": high.numpy(),
                "difference": self.difference.mean(1).numpy(),
                "fixed": self.fixed.sum(1).numpy(),
                "broken": self.broken.sum(1).numpy(),
                "on_answer": self.on_answer.mean(1).numpy(),
                "on_forced": self.on_forced.mean(1).numpy(),
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy per condition with its interval."""
        ax = axis(ax)
        table = self.frame()
        error = [(table.accuracy - table.low).clip(0), (table.high - table.accuracy).clip(0)]
        colors = ["grey" if name.startswith(RANDOM) else "C0" for name in table.condition]
        ax.bar(table.condition, table.accuracy, yerr=error, ecolor="grey", color=colors)
        ax.tick_params(axis="x", rotation=90)
        ax.set(ylim=(0, 1.02), ylabel="accuracy", title=f"attention forced onto {', '.join(self.onto)}")
        return ax


@torch.no_grad()
def repair(
    model: Model,
    pairs: Pairs,
    heads: Sequence[str],
    onto: Sequence[str],
    *,
    movers: Sequence[str] = (),
    controls: int = 8,
    metric: Metric | None = None,
    batch: int = 16,
    seed: int = 0,
) -> Repair:
    """Force ``heads`` at the answer position of the clean prompts to attend evenly to the tokens of the spans ``onto``.

    ``movers`` are heads whose attention is watched. ``controls`` sets of other random heads, as many per layer as ``heads``
    has there, are forced in the same way; fewer if there are not so many different sets, none if a layer has too few other
    heads. Refused where a span is absent from a prompt or comes after the answer position.
    """
    setting = Setting.of(model, pairs, metric, "counterfactual", batch)
    known = {unit.name: unit.site for unit in components(model) if unit.site.head is not None}
    for name in (*heads, *movers):
        if name not in known:
            raise UnknownName(f"head of {model.name}", name, known)
    if not heads or not onto or set(heads) & set(movers):
        raise WorkbenchError("repair wants heads to force, spans to force them onto, and other heads to watch")
    for name in onto:
        if name not in pairs.spans:
            raise UnknownName("span of these pairs", name, pairs.spans)
    heads, onto, movers = tuple(dict.fromkeys(heads)), tuple(dict.fromkeys(onto)), tuple(dict.fromkeys(movers))
    others = _controls(known, heads, set(heads) | set(movers), controls, seed)
    sets = ((), heads, *others)
    rows: list[list[tuple[Tensor, ...]]] = [[] for _ in sets]
    for part in setting.chunks():
        keys = _keys(part, onto)
        answer = (part.clean[:, :, None] == part.answer[:, None]).any(-1) & (_at(part) <= part.position[:, None])
        for row, chosen in zip(rows, sets, strict=True):
            row.append(_outcome(setting, part, chosen, keys, answer, [known[name] for name in movers]))
    correct, difference, on_answer, on_forced = (
        torch.stack([torch.cat([cell[i] for cell in row]) for row in rows]) for i in range(4)
    )
    names = (NONE, FORCED, *(f"{RANDOM} {i + 1}" for i in range(len(others))))
    provenance = setting.provenance("attention-override", "node", {"controls": controls, "seed": seed})
    return Repair(names, sets, onto, movers, correct.bool(), difference, on_answer, on_forced, provenance)


def _outcome(
    setting: Setting, pairs: Pairs, heads: Sequence[str], keys: Tensor, answer: Tensor, movers: list[Site]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Correct, metric, and the movers' attention to answers and to forced keys, each ``[B]``."""
    model = setting.model
    patterns = [Site("pattern", site.layer, site.head) for site in movers]
    edits = override_edits(model, Tokens.of(pairs.clean), dict.fromkeys(heads, keys), pairs.position)
    run = model.run(pairs.clean, read=patterns, edit=edits)
    difference = setting.measure(run.logits, pairs)
    assert run.logits is not None
    nothing = torch.full((len(pairs),), float("nan"), dtype=torch.float64)
    looks = [run.acts[site][torch.arange(len(pairs)), pairs.position].double().cpu() for site in patterns]
    mean = torch.stack(looks).mean(0) if looks else None
    on_answer, on_forced = (nothing if mean is None else (mean * wanted).sum(1) for wanted in (answer, keys))
    return accuracy(run.logits, pairs).cpu(), difference.double().cpu(), on_answer, on_forced


def _keys(pairs: Pairs, onto: Sequence[str]) -> Tensor:
    """The tokens of the spans, ``[B, T]`` bool."""
    keys = torch.zeros(pairs.clean.shape, dtype=torch.bool)
    for name in onto:
        start, stop = pairs.spans[name][:, :1], pairs.spans[name][:, 1:]
        if (start < 0).any() or (stop - 1 > pairs.position[:, None]).any():
            raise WorkbenchError(
                f"span {name!r} is absent from some prompt or comes after its answer position; choose other spans"
            )
        keys |= (_at(pairs) >= start) & (_at(pairs) < stop)
    return keys


def _at(pairs: Pairs) -> Tensor:
    return torch.arange(pairs.clean.shape[1])


def _controls(
    known: dict[str, Site], heads: Sequence[str], taken: set[str], count: int, seed: int
) -> tuple[tuple[str, ...], ...]:
    """Different sets of heads with as many in each layer as ``heads``, and none of those ``taken``."""
    generator = torch.Generator().manual_seed(seed)
    layers = [known[name].layer for name in heads]
    pools = {
        layer: [name for name, site in known.items() if site.layer == layer and name not in taken] for layer in layers
    }
    if any(len(pool) < layers.count(layer) for layer, pool in pools.items()):
        return ()
    found: dict[tuple[str, ...], None] = {}
    for _ in range(_DRAWS * count):
        picks = [
            pool[i]
            for layer, pool in sorted(pools.items(), key=lambda item: str(item[0]))
            for i in sorted(torch.randperm(len(pool), generator=generator)[: layers.count(layer)].tolist())
        ]
        found[tuple(picks)] = None
        if len(found) == count:
            break
    return tuple(found)
