"""Do encoder and decoder look at the same few image tokens, and does the answer hang on them?

DAMRO (Gong et al., arXiv 2410.04514, and the authors' code) holds that image encoders attend to a few background tokens, that the
decoder follows, and that such outliers make it see objects that are not there. Outliers are the k patches with the largest weight
in the class token's row of an encoder layer (the last but one) with all heads merged:

    softmax_j(q_cls . k_j / sqrt(C)),  q and k of all heads side by side, C numbers each

which is no row of the model's attention: heads with large dot products rule it, and dividing by sqrt(C) flattens it. The row of
each head, averaged over heads, stands beside it. k is 10 for LLaVA, 4 for InstructBLIP. The answer is decoded from

    (1 + a) logits(whole image) - a logits(outlier tokens alone)

among the tokens whose probability is at least ``cut`` (0.1) times the largest; a is 2 for LLaVA, 0.5 to 1.5 elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Model
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_rows
from workbench.probes.tables import LayerTable
from workbench.probes.vision.erasure import random_vision_model
from workbench.probes.vision.grid import Grid
from workbench.probes.vision.pruning import as_inputs, prediction, pruned_run, random_patches, top_patches
from workbench.results import Result, axis
from workbench.run import Provenance, Run
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class AttentionOutliers(Result):
    """``merged`` ``[B, N]``: weight of each patch in the row with merged heads; ``by_head`` ``[B, H, N]``: in each head's own row
    (before any rotary positions); ``outlier`` ``[B, N]``: the k largest of ``merged``. ``layer`` is the layer they are of."""

    merged: Tensor
    by_head: Tensor
    outlier: Tensor
    layer: int
    query: str
    grid: Grid
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    @property
    def k(self) -> int:
        """How many outliers an image has."""
        return int(self.outlier[0].sum())

    def agreement(self) -> LayerTable:
        """How far merging heads changes the choice: ``token_overlap`` of the merged row with the mean of the heads' rows."""
        return token_overlap(self.merged, {self.layer: self.by_head.mean(1)}, self.k)

    def frame(self) -> pd.DataFrame:
        """One row per image and patch: ``image, patch, row, column, merged, by_head`` (mean of heads), ``even, outlier``."""
        import pandas as pd

        b, n = self.merged.shape
        places = self.grid.places.repeat(b, 1)
        return pd.DataFrame(
            {
                "image": torch.arange(b).repeat_interleave(n).numpy(),
                "patch": torch.arange(n).repeat(b).numpy(),
                "row": places[:, 0].numpy(),
                "column": places[:, 1].numpy(),
                "merged": self.merged.flatten().numpy(),
                "by_head": self.by_head.mean(1).flatten().numpy(),
                "even": 1 / n,
                "outlier": self.outlier.flatten().numpy(),
            }
        )

    def plot(self, ax: Axes | None = None, image: int = 0) -> Axes:
        """The weights of one image, largest first: heads merged, and the mean of the heads' own rows."""
        if not 0 <= image < len(self.merged):
            raise UnknownName("image", image, range(len(self.merged)))
        ax = axis(ax, 4.8, 3.2)
        order = self.merged[image].argsort(descending=True)
        ranks = range(1, len(order) + 1)
        ax.plot(ranks, self.merged[image][order].numpy(), label="heads merged")
        ax.plot(ranks, self.by_head[image].mean(0)[order].numpy(), ".", markersize=3, label="mean of heads")
        ax.axvline(self.k + 0.5, color="0.6", linewidth=1)
        ax.set(
            xlabel="patches by merged weight", ylabel=f"weight, {self.query}",
            title=f"Layer {self.layer}\n{self.provenance.model}",
        )  # fmt: skip
        ax.legend(fontsize=7)
        return ax


@torch.no_grad()
def attention_outliers(run: Run, grid: Grid, *, k: int = 10, layer: int | None = None) -> AttentionOutliers:
    """The ``k`` patches that the encoder's class token looks at most with all heads merged.

    ``run`` must have read ``hook_q`` and ``hook_k`` of the encoder's layers (``run.acts``); ``grid`` is the encoder's. ``layer``:
    by default the last but one of those read (the only one, if there is one). Without a class token the row is the mean over
    patches of theirs. Weights are over the patches and whatever else the encoder holds, as it would see them.
    """
    if not 0 < k < grid.patches:
        raise WorkbenchError(f"between 1 and {grid.patches - 1} patches can be outliers; got {k}")
    layers = _read(run, grid)
    if layer is None:
        layer = layers[max(0, len(layers) - 2)]
    if layer not in layers:
        raise UnknownName("layer whose queries and keys were read", layer, layers)
    q, key = (run.acts[Site(kind, layer, None, grid.stack)].detach().cpu().double() for kind in ("q", "k"))
    grid.check(q.shape[1], f"layer {layer}")
    groups = q.shape[2] // key.shape[2]
    key = key.repeat_interleave(groups, dim=2)
    merged = _row(q.flatten(2)[:, :, None], key.flatten(2)[:, :, None], grid)[:, 0]
    by_head = _row(q, key, grid)
    who = "class token" if grid.cls is not None else "mean over patches"
    return AttentionOutliers(merged, by_head, top_patches(merged, k), layer, who, grid, run.provenance)


def _read(run: Run, grid: Grid) -> list[int]:
    found: dict[str, set[int]] = {"q": set(), "k": set()}
    for site in run.acts:
        if isinstance(site, Site) and site.kind in found and site.stack == grid.stack and site.layer is not None:
            found[site.kind].add(site.layer)
    both = sorted(found["q"] & found["k"])
    if not both:
        stack = f"{grid.stack}." if grid.stack else ""
        raise WorkbenchError(
            f"this run read no queries and keys; run the model with read=['{stack}blocks.<layer>.attn.hook_q', "
            f"'{stack}blocks.<layer>.attn.hook_k']"
        )
    return both


def _row(q: Tensor, k: Tensor, grid: Grid) -> Tensor:
    """The class token's row, or the mean over patches, of softmax(q k^T / sqrt(width)): ``[B, T, H, E]`` to ``[B, H, N]``."""
    scale = q.shape[3] ** -0.5
    if grid.cls is not None:
        scores = torch.einsum("bhe,bkhe->bhk", q[:, grid.cls], k) * scale
        return scores.softmax(-1)[..., grid.index]
    total = q.new_zeros(q.shape[0], q.shape[2], grid.patches)
    step = max(1, 2**21 // (q.shape[0] * q.shape[2] * q.shape[1]))
    for at in range(0, grid.patches, step):
        scores = torch.einsum("bqhe,bkhe->bhqk", q[:, grid.index[at : at + step]], k) * scale
        total += scores.softmax(-1).sum(2)[..., grid.index]
    return total / grid.patches


def token_overlap(first: Tensor, others: Mapping[int | str, Tensor], k: int) -> LayerTable:
    """Do two weightings of an image's patches rank the same ones first? Per layer of ``others`` the ``share`` of the ``k``
    largest of ``first`` ``[B, N]`` that are among its own k largest, and their ``jaccard`` index; means with intervals.

    The null is the mean for k random patches (hypergeometric: k / N for the share). Images with undefined weights are left out.
    """
    from scipy.stats import hypergeom

    if first.ndim != 2 or not 0 < k < first.shape[1]:
        raise WorkbenchError(f"weights are [B, N] and k lies between 1 and N - 1; got {list(first.shape)} and k={k}")
    if not others:
        raise WorkbenchError("there is no weighting to compare with")
    n = first.shape[1]
    both = torch.arange(k + 1).double()
    chance = torch.from_numpy(hypergeom.pmf(range(k + 1), n, k, k)).double()
    by_chance = {"share": (chance * both / k).sum(), "jaccard": (chance * both / (2 * k - both)).sum()}
    values: dict[str, list[Tensor]] = {"share": [], "jaccard": []}
    undefined: dict[str, str] = {}
    top = top_patches(first.detach().cpu().double(), k)
    for layer, weight in others.items():
        if weight.shape != first.shape:
            raise WorkbenchError(
                f"layer {layer!r} weighs {list(weight.shape)} patches, the other side {list(first.shape)}"
            )
        common = (top & top_patches(weight.detach().cpu().double(), k)).sum(1).double()
        unknown = (first.isnan() | weight.isnan()).any(1).cpu()
        common = common.masked_fill(unknown, float("nan"))
        if bool(unknown.all()):
            undefined[f"layer {layer}"] = "no image has defined weights"
        values["share"].append(common / k)
        values["jaccard"].append(common / (2 * k - common))
    bounds = {name: [interval(row) for row in rows] for name, rows in values.items()}
    layers = len(others)
    return LayerTable(
        f"Overlap of the {k} largest tokens",
        tuple(others),
        {name: torch.stack([row.nanmean() for row in rows]) for name, rows in values.items()},
        {"share": "share of the k tokens", "jaccard": "intersection over union"},
        {name: torch.stack([low for low, _ in rows]) for name, rows in bounds.items()},
        {name: torch.stack([high for _, high in rows]) for name, rows in bounds.items()},
        {name: value.expand(layers).clone() for name, value in by_chance.items()},
        undefined,
    )


def contrast_logits(full: Tensor, negative: Tensor, *, a: float = 2.0, cut: float = 0.1) -> Tensor:
    """(1 + a) full - a negative, ``[..., V]``; -inf where the probability under ``full`` is below ``cut`` times the largest."""
    if full.shape != negative.shape:
        raise WorkbenchError(f"logits are of one shape; got {list(full.shape)} and {list(negative.shape)}")
    if not 0 < cut <= 1:
        raise WorkbenchError(f"cut is a share of the largest probability, above 0 and at most 1; got {cut!r}")
    least = full.amax(-1, keepdim=True) + math.log(cut)
    return ((1 + a) * full - a * negative).masked_fill(full < least, float("-inf"))


@dataclass(frozen=True)
class OutlierContrast(Result):
    """``values`` measure -> ``[A, B]`` for the contrast with the outlier tokens at every strength ``a``; ``random`` measure ->
    ``[R, A, B]`` with as many random tokens. ``plausible`` ``[B]``: how many answers the cut leaves."""

    a: tuple[float, ...]
    cut: float
    values: Mapping[str, Tensor]
    random: Mapping[str, Tensor]
    plausible: Tensor
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    def frame(self) -> pd.DataFrame:
        """One row per measure and strength: ``measure, a, value, low, high`` (mean and 95% interval over examples) and ``random``
        with the range of its draws."""
        import pandas as pd

        parts = []
        for name, values in self.values.items():
            low, high = interval(values.T)
            draws = self.random[name].mean(2)
            parts.append(
                pd.DataFrame(
                    {
                        "measure": name,
                        "a": self.a,
                        "value": values.mean(1).numpy(),
                        "low": low.numpy(),
                        "high": high.numpy(),
                        "random": draws.mean(0).numpy(),
                        "random_low": draws.amin(0).numpy(),
                        "random_high": draws.amax(0).numpy(),
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)

    def plot(self, ax: Axes | None = None, measure: str | None = None) -> Axes:
        """One measure over the strength: outliers, and random tokens (shaded: range of the draws)."""
        name = next(iter(self.values)) if measure is None else measure
        if name not in self.values:
            raise UnknownName("measure", name, self.values)
        draws = self.random[name].mean(2)
        ax = axis(ax, 4.8, 3.2)
        ax.plot(self.a, self.values[name].mean(1).numpy(), marker="o", label="outlier tokens")
        ax.plot(self.a, draws.mean(0).numpy(), linestyle="--", color="0.4", label="random tokens")
        ax.fill_between(self.a, draws.amin(0).numpy(), draws.amax(0).numpy(), color="0.4", alpha=0.2, linewidth=0)
        ax.set(xlabel="strength a", ylabel=name.replace("_", " "), title=f"Contrast\n{self.provenance.model}")
        ax.legend(fontsize=7)
        return ax


@torch.no_grad()
def outlier_contrast(
    model: Model,
    inputs: Any,
    outlier: Tensor,
    grid: Grid,
    *,
    a: Sequence[float] = (0.5, 1.0, 2.0),
    cut: float = 0.1,
    answer: Tensor | None = None,
    how: str = "remove",
    random: int = 8,
    seed: int = 0,
) -> OutlierContrast:
    """What subtracting the answer to the outlier tokens changes, against subtracting that to as many random tokens.

    ``outlier`` ``[B, N]`` bool (``attention_outliers(...).outlier``); ``grid`` says where these tokens stand in what ``model``
    reads: in the text for a model of text and images (the others are hidden by the attention mask), else in the encoder (the
    others leave every pattern, or with ``how="mean"`` become the mean of the outliers). Measures: ``divergence`` (KL from the
    plain answer's distribution to the contrasted one's, over the plausible answers, in nats), ``changed`` (1 where the most
    likely answer changes), and with ``answer`` ``[B]`` its ``probability`` and the ``gain`` over the plain one. Positions of
    hidden tokens are not renumbered, which the authors' shorter input does.
    """
    if outlier.ndim != 2 or outlier.shape[1] != grid.patches or outlier.dtype != torch.bool:
        raise WorkbenchError(f"outlier says of each patch whether it is one, bool [B, {grid.patches}]")
    if random < 1 or not len(a):
        raise WorkbenchError("a contrast takes one strength or more, and one random draw or more")
    if bool((~outlier.any(1)).any()) or bool(outlier.all(1).any()):
        raise Refused("every image needs some outlier tokens and some others")
    given = as_inputs(inputs)
    plain = model.run(given)
    full = prediction(plain)
    if len(full) != len(outlier):
        raise WorkbenchError(f"outliers are of {len(outlier)} images, the run of {len(full)}")

    def measured(chosen: Tensor) -> dict[str, Tensor]:
        negative = prediction(pruned_run(model, given, ~chosen, grid, how=how))
        each = [_compare(full, contrast_logits(full, negative, a=strength, cut=cut), cut, answer) for strength in a]
        return {name: torch.stack([part[name] for part in each]) for name in each[0]}

    generator = torch.Generator().manual_seed(seed)
    draws = [measured(random_patches(outlier, generator)) for _ in range(random)]
    values = measured(outlier.cpu())
    return OutlierContrast(
        tuple(float(strength) for strength in a), cut, values,
        {name: torch.stack([draw[name] for draw in draws]) for name in values},
        _plausible(full, cut).sum(-1), plain.provenance,
    )  # fmt: skip


def _plausible(full: Tensor, cut: float) -> Tensor:
    return full >= full.amax(-1, keepdim=True) + math.log(cut)


def _compare(full: Tensor, contrast: Tensor, cut: float, answer: Tensor | None) -> dict[str, Tensor]:
    allowed = _plausible(full, cut)
    p = full.masked_fill(~allowed, float("-inf")).log_softmax(-1)
    q = contrast.log_softmax(-1)
    gap = torch.where(allowed, p.exp() * (p - q), 0.0)
    found = {"divergence": gap.sum(-1), "changed": (contrast.argmax(-1) != full.argmax(-1)).double()}
    if answer is not None:
        at = answer.cpu().long()[:, None]
        found["probability"] = q.exp().gather(1, at)[:, 0]
        found["gain"] = found["probability"] - full.softmax(-1).gather(1, at)[:, 0]
    return found


def _outliers_example() -> dict[str, Any]:
    model, images, grid = random_vision_model()
    run = model.run({"pixel_values": images}, read=["blocks.0.attn.hook_q", "blocks.0.attn.hook_k"])
    return {"run": run, "grid": grid, "k": 3}


def _overlap_example() -> dict[str, Any]:
    rows = random_rows(4, 3, 12, causal=False)
    return {"first": rows[:, 0, 0], "others": {0: rows[:, 1, 0], 1: rows[:, 2, 0]}, "k": 4}


def _contrast_example() -> dict[str, Any]:
    found = attention_outliers(**_outliers_example())
    model, images, grid = random_vision_model()
    return {"model": model, "inputs": images, "outlier": found.outlier, "grid": grid, "random": 2}


PAPER = "Gong et al. 2024 (arXiv 2410.04514), and the authors' code"

ANALYSES = (
    Analysis(
        name="attention-outliers",
        question="Which image tokens does the encoder's class token look at most, heads merged?",
        function=attention_outliers,
        example=_outliers_example,
        paper=PAPER,
        source="run",
        null="even weight, and each head's own row beside the merged one",
        cause="outlier_contrast: the answer to the outlier tokens alone is subtracted",
        definition="without a class token the row is the mean over patches of theirs",
        reads=("blocks.{l}.attn.hook_q", "blocks.{l}.attn.hook_k"),
    ),
    Analysis(
        name="outlier-overlap",
        question="Do encoder and decoder rank the same image tokens first?",
        function=token_overlap,
        example=_overlap_example,
        paper=PAPER,
        source="tensors",
        null="k random tokens (hypergeometric)",
        cause="outlier_contrast: the answer to the outlier tokens alone is subtracted",
    ),
    Analysis(
        name="outlier-contrast",
        question="What does the answer become without what the outlier tokens say?",
        function=outlier_contrast,
        example=_contrast_example,
        paper=PAPER,
        source="model",
        null="as many random tokens in the place of the outliers",
        cause="outlier_contrast: the answer to the outlier tokens alone is subtracted",
        definition="hidden tokens keep their positions; for a model of images alone the others leave every pattern",
    ),
)
