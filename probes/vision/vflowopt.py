"""How few image tokens will do, layer by layer, and does it pay to recycle the pruned ones?

VFlowOpt (Yang et al., arXiv 2508.05211; the abstract was read, so that everything below it is our reading) ranks image tokens by

    importance = w relevance + (1 - w) entropy,   each scaled to 0 ... 1 over the image

relevance: attention that a patch receives in a layer of the encoder, averaged over heads and queries; entropy: that of the
histogram of the patch's grey levels (``bins`` of equal width over the image's range), in nats. Tokens go in stages. What is
pruned may be recycled: each pruned token is merged into the kept one of largest cosine, which becomes the mean of its group
weighted by importance. The settings are searched for the least discrepancy of the last token, the distance 1 - cosine of its
final hidden state to that without pruning (class token or mean of the patches, for a model of images alone), at a fixed budget:
the share of tokens kept, averaged over layers. The search is a plain grid, on half of the examples; the other half judges it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Edit, Model
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.removal import attention_layers
from workbench.probes.sources import Source, provenance_of
from workbench.probes.tables import TokenTable
from workbench.probes.vision.erasure import random_vision_model
from workbench.probes.vision.grid import Grid
from workbench.probes.vision.hiprune import DEEP, even_share, pick_layer, received
from workbench.probes.vision.on_patches import patch_maps
from workbench.probes.vision.pruning import START, WAYS, as_inputs, entry, last_token, summary, top_patches, unseen
from workbench.results import Result, axis
from workbench.run import Provenance, Run
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@torch.no_grad()
def patch_importance(
    source: Source,
    images: Tensor,
    grid: Grid,
    *,
    weight: float = 0.5,
    layer: int | str | float = DEEP,
    bins: int = 16,
    raw: bool = False,
    seed: int = 0,
) -> TokenTable:
    """``importance`` of every patch, and the ``relevance`` (attention) and ``entropy`` (nats) that it is made of, ``[B, N]``.

    ``images`` ``[B, C, height, width]`` belong to the maps. ``weight`` w counts relevance, 1 - w entropy. ``layer``: a layer of
    the maps or a share of their depth. Null: relevance if every query spread its mass evenly, entropy of the image's pixels in
    random order. Where all patches of an image are equal in one of the two, that one adds nothing.
    """
    if not 0 <= weight <= 1:
        raise WorkbenchError(f"weight is a share, between 0 and 1; got {weight!r}")
    maps = patch_maps(source, grid, raw=raw)
    amap = maps[pick_layer(maps, layer)]
    relevance = received(amap, grid)
    entropy = patch_entropy(images, grid, bins)
    if len(relevance) != len(entropy):
        raise WorkbenchError(f"the maps are of {len(relevance)} images; got {len(entropy)}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(images.shape[0], images[0, 0].numel(), generator=generator).argsort(1)
    mixed = images.flatten(2).gather(2, order[:, None].expand(-1, images.shape[1], -1)).view(images.shape)
    values = {"importance": combined(relevance, entropy, weight), "relevance": relevance, "entropy": entropy}
    null = {
        "relevance": even_share(amap, grid).expand_as(relevance).clone(),
        "entropy": patch_entropy(mixed, grid, bins),
    }
    units = {"importance": "importance (0 to 1)", "relevance": "mean attention received", "entropy": "nats"}
    return TokenTable("Patch importance", values, units, null=null, provenance=provenance_of(source))


def patch_entropy(images: Tensor, grid: Grid, bins: int = 16) -> Tensor:
    """Entropy of each patch's grey levels (mean of channels) over ``bins`` of equal width from the image's least to its largest
    grey, ``[B, N]`` in nats; 0 for a patch of one grey."""
    if images.ndim != 4 or tuple(images.shape[2:]) != grid.size:
        raise WorkbenchError(
            f"images are [B, C, {grid.size[0]}, {grid.size[1]}] for this grid; got {list(images.shape)}"
        )
    if bins < 2:
        raise WorkbenchError(f"a histogram has two bins or more; got {bins}")
    grey = images.detach().cpu().double().mean(1)
    low, high = grey.amin((1, 2), keepdim=True), grey.amax((1, 2), keepdim=True)
    level = ((grey - low) / (high - low).clamp(min=1e-300) * bins).long().clamp(0, bins - 1)
    cells = level.unflatten(2, (grid.cols, -1)).unflatten(1, (grid.rows, -1)).transpose(2, 3).flatten(3).flatten(1, 2)
    counts = torch.zeros(*cells.shape[:2], bins, dtype=torch.float64)
    counts.scatter_add_(2, cells, torch.ones_like(cells, dtype=torch.float64))
    return torch.special.entr(counts / cells.shape[2]).sum(-1)


def combined(relevance: Tensor, entropy: Tensor, weight: float) -> Tensor:
    """w relevance + (1 - w) entropy, each scaled to 0 ... 1 over the image; one that is the same everywhere counts 0."""
    return weight * _scaled(relevance) + (1 - weight) * _scaled(entropy)


def _scaled(values: Tensor) -> Tensor:
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    return torch.where(high > low, (values - low) / (high - low).clamp(min=1e-300), 0.0)


@dataclass(frozen=True)
class Schedule:
    """After block ``layers[i]`` (-1: before the first) ``keep[i]`` tokens are left, chosen by importance with ``weight``;
    ``recycle`` merges pruned tokens into kept ones."""

    layers: tuple[int, ...]
    keep: tuple[int, ...]
    weight: float = 0.5
    recycle: bool = True

    def __post_init__(self) -> None:
        falling = all(a >= b for a, b in itertools.pairwise(self.keep))
        rising = all(a < b for a, b in itertools.pairwise(self.layers))
        if not self.keep or len(self.keep) != len(self.layers) or min(self.keep) < 1 or not (falling and rising):
            raise WorkbenchError(f"stages lie at rising layers and keep ever fewer tokens, 1 or more; got {self!r}")

    def share(self, patches: int, layers: int) -> float:
        """Share of image tokens kept, averaged over ``layers`` layers."""
        kept = [patches] * layers
        for at, keep in zip(self.layers, self.keep, strict=True):
            kept[at + 1 :] = [keep] * (layers - at - 1)
        return sum(kept) / (patches * layers)


@torch.no_grad()
def scheduled_run(
    model: Model,
    inputs: Any,
    importance: Tensor,
    grid: Grid,
    schedule: Schedule,
    *,
    how: str = "remove",
    read: Sequence[Site] = (),
) -> Run:
    """A run pruned by a schedule, by ``importance`` ``[B, N]``. ``how`` as in ``pruning_curve``: ``remove`` edits patterns,
    ``mean`` leaves the mean of the kept tokens in the place of pruned ones."""
    if how not in WAYS:
        raise UnknownName("way of pruning", how, WAYS)
    if importance.ndim != 2 or importance.shape[1] != grid.patches or schedule.keep[0] > grid.patches:
        raise WorkbenchError(
            f"importance is [B, {grid.patches}], of which a schedule keeps some; got {list(importance.shape)}"
        )
    edits: dict[Site | str, Edit | Tensor] = {}
    alive = torch.ones(importance.shape, dtype=torch.bool)
    for at, keep in zip(schedule.layers, schedule.keep, strict=True):
        stay = top_patches(importance, keep)
        edits[entry(at, grid)] = _stage(alive, stay, importance, grid, recycle=schedule.recycle, fill=how == "mean")
        if how == "remove":
            edits |= unseen(model, ~stay, grid, at)
        alive = stay
    return model.run(as_inputs(inputs), read=read, edit=edits)


def _stage(alive: Tensor, stay: Tensor, importance: Tensor, grid: Grid, *, recycle: bool, fill: bool) -> Edit:
    """The edit of one stage: merge the tokens that go into those that stay, put the mean of these in the place of all gone."""

    def edit(values: Tensor) -> Tensor:
        grid.check(values.shape[1], "this site")
        index = grid.index.to(values.device)
        tokens = values[:, index]
        stays = stay.to(values.device)
        if recycle:
            tokens = recycled(tokens, (alive & ~stay).to(values.device), stays, importance.to(tokens))
        if fill:
            mean = (tokens * stays[..., None]).sum(1, keepdim=True) / stays.sum(1)[:, None, None]
            tokens = torch.where(stays[..., None], tokens, mean)
        out = values.clone()
        out[:, index] = tokens
        return out

    return edit


def recycled(tokens: Tensor, gone: Tensor, stay: Tensor, importance: Tensor) -> Tensor:
    """``tokens`` ``[B, N, D]`` with those ``gone`` ``[B, N]`` merged into the most similar of those that ``stay``: a token that
    stays becomes the mean of its group, weighted by importance (a little above 0, so that no weight is all lost)."""
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    nearest = (unit @ unit.transpose(1, 2)).masked_fill(~stay[:, None], float("-inf")).argmax(-1)
    own = torch.arange(tokens.shape[1], device=tokens.device).expand_as(nearest)
    group = torch.where(stay, own, nearest)
    share = (importance + 1e-6) * (gone | stay)
    total = torch.zeros_like(share).scatter_add_(1, group, share)
    merged = torch.zeros_like(tokens).scatter_add_(1, group[..., None].expand_as(tokens), tokens * share[..., None])
    return torch.where(stay[..., None], merged / total.clamp(min=1e-30)[..., None], tokens)


@dataclass(frozen=True)
class ScheduleSearch(Result):
    """``searched`` ``[S, B1]`` and ``held_out`` ``[S, B2]``: discrepancy of S schedules on the two halves of the examples.
    ``random`` ``[R, B2]``: that of the best schedule with tokens kept at random, on the second half."""

    schedules: tuple[Schedule, ...]
    searched: Tensor
    held_out: Tensor
    random: Tensor
    shares: tuple[float, ...]
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    @property
    def best(self) -> Schedule:
        """The schedule of least mean discrepancy on the examples that were searched."""
        return self.schedules[int(self.searched.mean(1).argmin())]

    def frame(self) -> pd.DataFrame:
        """One row per schedule, best first: ``layers, keep, weight, recycle, share`` (of tokens kept, over layers), ``searched``,
        ``held_out`` with its 95% interval over examples, and ``random`` with the range of its draws (of the best one)."""
        import pandas as pd

        low, high = interval(self.held_out.T)
        draws = self.random.mean(1)
        best = self.searched.mean(1).argmin()
        rows = []
        for i in self.searched.mean(1).argsort(dim=0, stable=True).tolist():
            plan = self.schedules[i]
            spread = [float(x) if i == best else float("nan") for x in (draws.mean(), draws.amin(), draws.amax())]
            rows.append(
                {
                    "layers": str(list(plan.layers)), "keep": str(list(plan.keep)), "weight": plan.weight,
                    "recycle": plan.recycle, "share": self.shares[i], "searched": float(self.searched[i].mean()),
                    "held_out": float(self.held_out[i].mean()), "low": float(low[i]), "high": float(high[i]),
                    "random": spread[0], "random_low": spread[1], "random_high": spread[2],
                }
            )  # fmt: skip
        return pd.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Discrepancy of every schedule where it was searched against where it is judged; dashed: random tokens."""
        ax = axis(ax, 4.2, 3.6)
        for recycle, marker in ((False, "o"), (True, "x")):
            chosen = [i for i, plan in enumerate(self.schedules) if plan.recycle == recycle]
            if chosen:
                x, y = (side.mean(1)[chosen].numpy() for side in (self.searched, self.held_out))
                ax.scatter(x, y, marker=marker, label="recycled" if recycle else "dropped")
        ax.axhline(float(self.random.mean()), linestyle="--", color="0.4", label="random tokens, best schedule")
        ax.set(
            xlabel="discrepancy, searched", ylabel="discrepancy, held out",
            title=f"{len(self.schedules)} schedules\n{self.provenance.model}",
        )  # fmt: skip
        ax.legend(fontsize=7)
        return ax


@torch.no_grad()
def schedule_search(
    model: Model,
    inputs: Any,
    relevance: Tensor,
    entropy: Tensor,
    grid: Grid,
    *,
    layers: Sequence[int],
    budget: float = 0.5,
    first: Sequence[float] = (1.0, 0.75, 0.5, 0.25),
    weights: Sequence[float] = (0.0, 0.5, 1.0),
    recycle: Sequence[bool] = (False, True),
    how: str = "remove",
    random: int = 8,
    seed: int = 0,
) -> ScheduleSearch:
    """All schedules of a grid at one budget, by the discrepancy of the last token.

    ``relevance`` and ``entropy`` ``[B, N]`` (``patch_importance``). Stages lie after the one or two ``layers`` (-1: before the
    first block) of the grid's stack. With two, ``first`` are the shares left after the first stage, and what is left after the
    second follows from ``budget``, the share of tokens kept averaged over all layers of the stack; a share that would have to
    rise again, or leaves no token, is no schedule. The first half of the examples is searched, the second one judges.
    """
    if len(layers) not in (1, 2) or not 0 < budget < 1 or random < 1:
        raise WorkbenchError(
            f"one or two stages, a budget between 0 and 1 and a random draw or more; got {list(layers)}, {budget!r}"
        )
    if relevance.shape != entropy.shape or relevance.shape[-1] != grid.patches or len(relevance) < 2:
        raise WorkbenchError(
            f"relevance and entropy are [B, {grid.patches}] of two images or more, to search and to judge"
        )
    depth = attention_layers(model, grid.stack)[-1] + 1
    if min(layers) < START or max(layers) >= depth - 1:
        raise UnknownName("layer that others follow", list(layers), range(START, depth - 1))
    plans = [
        Schedule(tuple(sorted(layers)), keep, weight, recycling)
        for keep in _keeps(sorted(layers), depth, grid.patches, budget, first)
        for weight in weights
        for recycling in recycle
    ]
    if not plans:
        raise Refused(
            f"no share in {list(first)} fits a budget of {budget:g}: {depth} layers, stages after {list(layers)}"
        )
    place = Site("resid_post", depth - 1, None, grid.stack)
    plain = model.run(as_inputs(inputs), read=[place])
    whole = _represents(plain, place, grid)

    def discrepancy(importance: Tensor, plan: Schedule) -> Tensor:
        run = scheduled_run(model, inputs, importance, grid, plan, how=how, read=[place])
        left = top_patches(importance, plan.keep[-1])
        return 1 - torch.cosine_similarity(_represents(run, place, grid, left), whole, dim=1)

    found = torch.stack([discrepancy(combined(relevance, entropy, plan.weight), plan) for plan in plans])
    half = (len(relevance) + 1) // 2
    best = plans[int(found[:, :half].mean(1).argmin())]
    generator = torch.Generator().manual_seed(seed)
    draws = [discrepancy(torch.rand(relevance.shape, generator=generator).double(), best) for _ in range(random)]
    return ScheduleSearch(
        tuple(plans), found[:, :half], found[:, half:], torch.stack(draws)[:, half:],
        tuple(plan.share(grid.patches, depth) for plan in plans), plain.provenance,
    )  # fmt: skip


def _keeps(
    layers: Sequence[int], depth: int, patches: int, budget: float, first: Sequence[float]
) -> list[tuple[int, ...]]:
    """Tokens left after each stage, within the budget: layers before the first stage see all of them."""
    left = budget * depth - (layers[0] + 1)
    if len(layers) == 1:
        keep = int(left / (depth - layers[0] - 1) * patches + 1e-9)
        return [(keep,)] if 1 <= keep < patches else []
    found: list[tuple[int, ...]] = []
    for share in first:
        keep = round(share * patches)
        rest = left - keep / patches * (layers[1] - layers[0])
        last = int(rest / (depth - layers[1] - 1) * patches + 1e-9)
        if 1 <= last <= keep <= patches:
            found.append((keep, last))
    return found


def _represents(run: Run, place: Site, grid: Grid, left: Tensor | None = None) -> Tensor:
    """What a later reader takes from the sequence: its last token, its class token, or the mean of the patches left."""
    values = run.acts[place]
    if grid.stack == "text":
        return values[torch.arange(len(values)), last_token(run)].detach().cpu().double()
    return summary(values, grid, left)


def _importance_example() -> dict[str, Any]:
    images = torch.rand(1, 1, 24, 32, generator=torch.Generator().manual_seed(0))
    return {"source": random_maps(tokens=12, causal=False), "images": images, "grid": Grid(3, 4, (8, 8))}


def _search_example() -> dict[str, Any]:
    model, images, grid = random_vision_model()
    relevance = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)).double()
    entropy = patch_entropy(images, grid)
    return {
        "model": model,
        "inputs": images,
        "relevance": relevance,
        "entropy": entropy,
        "grid": grid,
        "layers": (-1,),
        "random": 2,
    }


PAPER = "Yang et al. 2025 (arXiv 2508.05211), abstract"

ANALYSES = (
    Analysis(
        name="patch-importance",
        question="Which image tokens are relevant and rich?",
        function=patch_importance,
        example=_importance_example,
        paper=PAPER,
        source="maps",
        null="even attention; the image's pixels in random order",
        cause="schedule_search: tokens are pruned in the order of importance",
        definition="attention received in a deep layer, and the entropy of grey levels; the abstract names both without formulas",
    ),
    Analysis(
        name="schedule-search",
        question="How few image tokens will do, layer by layer?",
        function=schedule_search,
        example=_search_example,
        paper=PAPER,
        source="model",
        null="the best schedule with random tokens, on examples that were not searched",
        cause="schedule_search: tokens are pruned, merged or not",
        definition="a grid of shares and weights, pruned tokens merged by cosine, 1 - cosine of the last hidden state",
    ),
)
