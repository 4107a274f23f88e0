"""Which attention and MLP sublayers can go, and in which order?

FinerCut (arXiv 2405.18218): attention and MLP sublayers are separate candidates; skipping one leaves the residual stream as it is
(its ``hook_attn_out`` or ``hook_mlp_out`` is zero). Greedy: of the candidates that are left, remove the one without which the
output moves least from that of the whole model; again until none is left. Distances of the logits, mean over real tokens:
``js`` Jensen-Shannon divergence (nats, at most ln 2), ``norm`` length of the difference, ``angular`` acos of the cosine
(radians). Where a model normalises after the addition (BERT), skipping leaves that norm in place. A mean over all tokens does not
see the one that an answer hangs on: with ``at="answer"`` the distance of pairs is taken there alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs, at_answer
from workbench.probes.ablation import Metric, default_metric, named_metric, over_tokens
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled
from workbench.probes.importance.outcomes import jensen_shannon
from workbench.probes.removal import Removal
from workbench.results import Result, axis
from workbench.run import Provenance, Run
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

KINDS = {"attn_out": "attention", "mlp_out": "mlp"}
PLACES = ("tokens", "answer")
SEARCHES = ("greedy", "one-shot")


@dataclass(frozen=True)
class SublayerRemoval(Result):
    """``order``: sublayers in the order of removal, of ``candidates`` there are. ``moved`` ``[C, N]``: distance of the output of
    N texts from the whole model's after the first c + 1 removals; ``kept`` ``[C, M]``: the metric of the M evaluated examples,
    ``base`` ``[M]`` with nothing removed. ``random_moved`` ``[R, C, N]`` and ``random_kept`` ``[R, C, M]``: R random orders."""

    distance: str
    search: str
    order: tuple[str, ...]
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    candidates: int
    metric: str
    base: Tensor
    moved: Tensor
    kept: Tensor
    random_moved: Tensor
    random_kept: Tensor
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    def frame(self) -> pd.DataFrame:
        """One row per removal: ``removed, sublayer, layer, kind, share_kept`` (of all sublayers), ``distance`` with its 95%
        interval over texts and the random orders' mean and range, ``metric`` likewise, ``metric_base``."""
        import pandas as pd

        removed = torch.arange(1, len(self.order) + 1)
        columns: dict[str, Any] = {
            "removed": removed.numpy(),
            "sublayer": self.order,
            "layer": self.layers,
            "kind": self.kinds,
            "share_kept": (1 - removed / self.candidates).numpy(),
        }
        for name, ranked, random in (
            ("distance", self.moved, self.random_moved),
            ("metric", self.kept, self.random_kept),
        ):
            low, high = interval(ranked.T)
            draws = random.mean(2)
            columns |= {
                name: ranked.mean(1).numpy(),
                f"{name}_low": low.numpy(),
                f"{name}_high": high.numpy(),
                f"{name}_random": draws.mean(0).numpy(),
                f"{name}_random_low": draws.amin(0).numpy(),
                f"{name}_random_high": draws.amax(0).numpy(),
            }
        return pd.DataFrame(columns | {"metric_base": float(self.base.mean())})

    def plot(self, ax: Axes | None = None, what: str = "distance") -> Axes:
        """``distance`` or ``metric`` over the number of removed sublayers, beside random orders (shaded: range over orders)."""
        if what not in ("distance", "metric"):
            raise UnknownName("curve", what, ("distance", "metric"))
        table = self.frame()
        ax = axis(ax, max(4.8, 1.5 + 0.3 * len(table)), 3.4)
        ax.plot(table["removed"], table[what], marker="o", label=self.search)
        ax.plot(table["removed"], table[f"{what}_random"], linestyle="--", color="0.4", label="random order")
        low, high = table[f"{what}_random_low"], table[f"{what}_random_high"]
        ax.fill_between(table["removed"], low, high, color="0.4", alpha=0.2, linewidth=0)
        if what == "metric":
            ax.axhline(float(self.base.mean()), color="0.7", linewidth=1)
        names = [f"{kind[:4]} {layer}" for kind, layer in zip(self.kinds, self.layers, strict=True)]
        ax.set_xticks(table["removed"], names, rotation=60, ha="right", fontsize=7)
        label = f"{self.distance} from the whole model" if what == "distance" else self.metric
        ax.set(xlabel="sublayers removed, in this order", ylabel=label, title=self.provenance.model)
        ax.legend()
        return ax


@torch.no_grad()
def sublayer_removal(
    model: Model,
    inputs: Any,
    *,
    distance: str = "js",
    at: str = "tokens",
    search: str = "greedy",
    protect: float = 0.0,
    count: int | None = None,
    metric: str | Metric | None = None,
    evaluate: Any = None,
    random: int = 4,
    seed: int = 0,
) -> SublayerRemoval:
    """Remove sublayers one after the other, those first without which the output moves least.

    ``inputs``: calibration texts, pairs or images. ``distance``: ``js``, ``norm`` or ``angular``; ``at``: the mean over real
    ``tokens``, or of pairs at the ``answer``. ``search``: ``greedy`` measures all that are left after every removal, at most
    n (n + 1) / 2 runs for n candidates, several to a batch; ``one-shot`` ranks once, by single removals. ``protect``: the share
    of candidates, counted from the input, that go only when no other is left (published: .4). ``count``: how many to remove, all
    by default. ``metric`` as in ``ablation_curve``, measured along the way on ``evaluate`` (by default the same inputs); by
    default the answer's probability of pairs, the loss of texts, else the divergence ``kl``. Beside it ``random`` random orders.
    """
    if distance not in DISTANCES:
        raise UnknownName("distance", distance, DISTANCES)
    if at not in PLACES:
        raise UnknownName("place of the distance", at, PLACES)
    if at == "answer" and not isinstance(inputs, Pairs):
        raise WorkbenchError(f"the distance at the answer is that of pairs; got {type(inputs).__name__}")
    if search not in SEARCHES:
        raise UnknownName("search", search, SEARCHES)
    if not 0 <= protect <= 1:
        raise WorkbenchError(f"protect is a share of the sublayers, in [0, 1]; got {protect}")
    if random < 1:
        raise WorkbenchError(f"random is the number of random orders, at least 1; got {random}")
    candidates = sublayers(model)
    count = len(candidates) if count is None else count
    if not 1 <= count <= len(candidates):
        raise WorkbenchError(f"count is a number of sublayers, 1 to {len(candidates)}; got {count}")
    removal = Removal.of(model, inputs, candidates, "zero")
    judged = inputs if evaluate is None else evaluate
    if metric is None:
        metric = default_metric(model, judged)
    name, measure = named_metric(metric, judged)
    tried = removal if evaluate is None else Removal.of(model, evaluate, candidates, "zero")
    guarded = set(candidates[: round(protect * len(candidates))])

    def moved(run: Run) -> Tensor:
        two = [removal.plain, run]
        if at == "answer":
            two = [replace(one, logits=at_answer(one.logits, inputs)) for one in two if one.logits is not None]
        return DISTANCES[distance](*two)

    find = _greedy if search == "greedy" else _one_shot
    order = find(removal, candidates, guarded, count, moved)
    generator = torch.Generator().manual_seed(seed)
    orders = [order]
    for _ in range(random):
        orders.append([candidates[i] for i in torch.randperm(len(candidates), generator=generator)[:count].tolist()])
    sets = [line[: c + 1] for line in orders for c in range(count)]
    distances = torch.stack([moved(run) for run in removal.runs(sets)]).unflatten(0, (1 + random, count))
    values = torch.stack([measure(run, tried.plain) for run in tried.runs(sets)]).unflatten(0, (1 + random, count))
    return SublayerRemoval(
        distance=distance,
        search=search,
        order=tuple(map(str, order)),
        layers=tuple(int(site.layer or 0) for site in order),
        kinds=tuple(KINDS[site.kind] for site in order),
        candidates=len(candidates),
        metric=name,
        base=measure(tried.plain, tried.plain),
        moved=distances[0],
        kept=values[0],
        random_moved=distances[1:],
        random_kept=values[1:],
        provenance=removal.plain.provenance,
    )


def sublayers(model: Model) -> list[Site]:
    """The attention and MLP sublayers of a model with one stack, in the order of computation."""
    served = {Site.parse(name) for name in model.manifest().sites}
    found = [site for layer in range(model.shape.layers) for kind in KINDS if (site := Site(kind, layer)) in served]
    if not found:
        raise Refused(f"{model.name} serves neither hook_attn_out nor hook_mlp_out of a single stack")
    return found


def _greedy(
    removal: Removal, candidates: Sequence[Site], guarded: set[Site], count: int, moved: Callable[[Run], Tensor]
) -> list[Site]:
    order: list[Site] = []
    while len(order) < count:
        left = [site for site in candidates if site not in order]
        left = [site for site in left if site not in guarded] or left
        far = [float(moved(run).mean()) for run in removal.runs([[*order, site] for site in left])]
        order.append(left[far.index(min(far))])
    return order


def _one_shot(
    removal: Removal, candidates: Sequence[Site], guarded: set[Site], count: int, moved: Callable[[Run], Tensor]
) -> list[Site]:
    far = {
        site: float(moved(run).mean())
        for site, run in zip(candidates, removal.runs([[c] for c in candidates]), strict=True)
    }
    return sorted(candidates, key=lambda site: (site in guarded, far[site]))[:count]


def _angle(a: Tensor, b: Tensor) -> Tensor:
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
    return cosine.clamp(-1, 1).acos()


DISTANCES: dict[str, Callable[[Run, Run], Tensor]] = {
    "js": lambda plain, run: over_tokens(plain, run, jensen_shannon),
    "norm": lambda plain, run: over_tokens(plain, run, lambda a, b: (a - b).norm(dim=-1), log=False),
    "angular": lambda plain, run: over_tokens(plain, run, _angle, log=False),
}
"""Of two runs' logits, mean over real tokens, ``[B]``."""


ANALYSES = (
    Analysis(
        name="sublayer-removal",
        question="Which attention and MLP sublayers can go, and in which order?",
        function=sublayer_removal,
        example=lambda: {
            "model": bundled("compiled-induction"),
            "inputs": torch.arange(24).view(2, 12) % 7 + 4,
            "random": 2,
        },
        paper="Zhang et al. 2024 (arXiv 2405.18218)",
        source="model",
        null="random orders of removal",
        cause="sublayers are removed, and the metric is measured along the order and along random ones",
        definition="distances are means over tokens, js in nats; protected early sublayers go only when no other is left",
    ),
)
