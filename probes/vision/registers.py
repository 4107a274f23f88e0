"""Which patches carry outlier norms, and are they used as registers?

Large vision transformers turn a few background patches into storage: their output tokens have norms far from all others, draw
attention and carry global information; added register tokens take that over (Darcet et al., arXiv 2309.16588). A patch is an
outlier if its norm is above a threshold: a number (150 was published for DINOv2-g), or by default the valley between two modes
of the log-norms' density. A density with one mode has no outliers. That default is ours, as is what counts as two modes: they
lie a factor of 2 apart, the density between them falls to half of the smaller one, and 1% of all patches (two at least) lie
above. ``outlier_attention`` tells whether these patches are sinks, ``outlier_erasure`` what the model loses without them,
against as many other patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Model
from workbench.probes.ablation import AblationCurve
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.sources import Source, provenance_of
from workbench.probes.tables import HeadTable
from workbench.probes.vision.erasure import Metric, erasure_curve
from workbench.probes.vision.grid import Grid
from workbench.probes.vision.on_patches import patch_maps, patch_sums
from workbench.results import Result, axis
from workbench.run import Provenance, Run
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

PUBLISHED = 150.0
"""Norm of an outlier among the output tokens of DINOv2-g (Darcet et al., section 2.1)."""
APART, DEEP, LEAST = 2.0, 0.5, 0.01
ONE_MODE = "the log-norms have one mode, so there is no threshold and no outlier"


@dataclass(frozen=True)
class OutlierTokens(Result):
    """``norm`` ``[B, N]``: L2 norm of every patch's token; ``outlier`` ``[B, N]`` those above ``threshold`` (NaN if the norms
    have one mode); ``others`` ``[B, M]`` norms of the tokens beside the patches (class token first).

    ``bimodality`` is Sarle's coefficient of the log-norms, (skewness^2 + 1) / kurtosis: 1 for two equal spikes, .56 for even
    spread, .33 for a normal one, which is its null. ``undefined`` says what has no number.
    """

    norm: Tensor
    outlier: Tensor
    others: Tensor
    threshold: float
    bimodality: float
    site: str
    grid: Grid
    undefined: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("tokens"))

    @property
    def share(self) -> float:
        """Part of all patches that are outliers."""
        return float(self.outlier.double().mean())

    def interval(self) -> tuple[float, float]:
        """95% bootstrap interval of the share over images; NaN for one image."""
        low, high = interval(self.outlier.double().mean(1))
        return float(low), float(high)

    def frame(self) -> pd.DataFrame:
        """One row per image and patch: ``image, patch, row, column, norm, outlier``."""
        return self.grid.table({"norm": self.norm, "outlier": self.outlier})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Histogram of the norms, logarithmic both ways, with the threshold."""
        ax = axis(ax, 4.8, 3.2)
        logs = self.norm.clamp(min=1e-12).log10().flatten()
        edges = torch.linspace(float(logs.min()) - 0.02, float(logs.max()) + 0.02, 50)
        ax.hist(10 ** logs.numpy(), bins=(10**edges).tolist(), color="0.5")
        if self.threshold == self.threshold:
            ax.axvline(self.threshold, color="red", label=f"threshold {self.threshold:.3g}: {self.share:.1%} above")
            ax.legend()
        ax.set(
            xscale="log", yscale="log", xlabel="norm of the token", ylabel="patches",
            title=f"{self.site}\n{self.provenance.model}",
        )  # fmt: skip
        return ax


@torch.no_grad()
def outlier_tokens(
    tokens: Tensor | Run, grid: Grid, *, threshold: float | None = None, layer: int | None = None
) -> OutlierTokens:
    """The patches whose tokens have outlier norms.

    ``tokens``: ``[B, T, D]`` with all tokens of the grid, or a run: its residual stream after ``layer`` if that was read
    (``blocks.{l}.hook_resid_post``; the last one read by default), else its output. ``threshold``: the norm above which a patch
    is an outlier; by default the valley between the two modes of the log-norms of all patches together.
    """
    values, site = _tokens(tokens, grid, layer) if isinstance(tokens, Run) else (tokens, "tokens")
    if values.ndim != 3:
        raise WorkbenchError(f"tokens are [B, T, D]; got {list(values.shape)}")
    grid.check(values.shape[1], "this tensor")
    if threshold is not None and not threshold > 0:
        raise WorkbenchError(f"a threshold is a positive norm; got {threshold!r}")
    norms = values.detach().cpu().double().norm(dim=-1)
    norm = norms[:, grid.index]
    logs = norm.clamp(min=1e-300).log().flatten()
    found = valley(logs) if threshold is None else threshold
    undefined = {} if found is not None else {"threshold": ONE_MODE}
    spread = _sarle(logs)
    if spread != spread:
        undefined["bimodality"] = "all norms are equal, or there are fewer than four"
    beside = [place for place in (grid.cls, *grid.others) if place is not None]
    return OutlierTokens(
        norm,
        norm > found if found is not None else torch.zeros_like(norm, dtype=torch.bool),
        norms[:, beside],
        float("nan") if found is None else float(found),
        spread,
        site,
        grid,
        undefined,
        provenance_of(tokens) if isinstance(tokens, Run) else Provenance("tokens"),
    )


@torch.no_grad()
def outlier_attention(source: Source, found: OutlierTokens, *, raw: bool = False) -> HeadTable:
    """Are outliers sinks? Per head the mean attention that an outlier patch and another patch receive from all patches, their
    ratio, with intervals over images and the null: what each would get if every patch spread its mass evenly.

    Images without an outlier (or with nothing else) are left out; NaN if none is left.
    """
    grid, outlier = found.grid, found.outlier[:, None].double()
    units = {"to_outliers": "attention per patch", "to_others": "attention per patch", "ratio": "outliers / others"}
    each: dict[str, dict[int | str, Tensor]] = {name: {} for name in units}
    null: dict[str, dict[int | str, Tensor]] = {name: {} for name in units}
    undefined = {}
    for layer, amap in patch_maps(source, grid, raw=raw).items():
        if amap.shape[0] != len(found.outlier):
            raise WorkbenchError(
                f"layer {layer!r} holds {amap.shape[0]} images, the outliers were found in {len(outlier)}"
            )
        received, even = (part / grid.patches for part in patch_sums(amap, grid))
        for store, sums in ((each, received), (null, even)):
            for name, number in _means(sums, outlier).items():
                store[name][layer] = number
    if not bool((found.outlier.any(1) & ~found.outlier.all(1)).any()):
        undefined["to_outliers"] = "no image holds outliers and other patches"
    elif any(bool(row.nanmean(0).isnan().any()) for row in each["ratio"].values()):
        undefined["ratio"] = "a head gives other patches nothing"
    return HeadTable.averaged(
        "Attention to outlier patches", each, units, null=null, undefined=undefined, provenance=provenance_of(source)
    )


@torch.no_grad()
def outlier_erasure(
    model: Model,
    images: Tensor,
    found: OutlierTokens,
    *,
    site: Site | str,
    metric: Metric | None = None,
    random: int = 8,
    seed: int = 0,
) -> AblationCurve:
    """What the model loses if its outlier tokens become the mean patch, against as many of the other patches.

    ``site`` is where they are replaced, as ``blocks.8.hook_resid_post``; later layers no longer find them. They go in the order
    of their norms, at most those that an image has; images without any are left out. ``metric`` as in ``erasure_curve``: the
    probability of the class, or the cosine of the class token's output to what it was.
    """
    counts = found.outlier.sum(1)
    most = int(counts.max())
    if not most:
        raise Refused("there are no outliers to replace" + (f": {ONE_MODE}" if "threshold" in found.undefined else ""))
    if len(images) != len(counts):
        raise WorkbenchError(f"outliers were found in {len(counts)} images; got {len(images)}")
    some = counts > 0
    steps = sorted({max(1, round(most * share)) for share in (0.25, 0.5, 0.75, 1.0)})
    curve = erasure_curve(
        model, images[some], found.norm[some], found.grid, site=site, metric=metric, counts=steps, random=random, seed=seed,
        allowed=~found.outlier[some], limit=counts[some],
    )  # fmt: skip
    return replace(curve, ablation=f"mean patch at {Site.parse(site)}")


def valley(logs: Tensor) -> float | None:
    """The norm between two modes of log-norms ``[M]``, or None: the lowest density (Gaussian kernel, Scott's width) between
    the main mode and the highest mode above it, if these are two modes as defined above."""
    from scipy.signal import find_peaks
    from scipy.stats import gaussian_kde

    values = logs.double().numpy()
    if len(values) < 4 or values.max() - values.min() < 1e-9:
        return None
    # Outliers widen the spread that Scott's rule starts from; the middle half of the norms does not know them.
    quarter = float(logs.quantile(0.75) - logs.quantile(0.25)) / 1.349
    width = max(min(float(logs.std()), quarter or float(logs.std())), 0.05) * len(values) ** -0.2
    at = torch.linspace(float(logs.min()) - 4 * width, float(logs.max()) + 4 * width, 1024).double().numpy()
    density = gaussian_kde(values, bw_method=width / float(logs.std()))(at)
    peaks = find_peaks(density)[0]
    main = max(peaks, key=lambda i: density[i])
    above = [i for i in peaks if at[i] - at[main] >= torch.tensor(APART).log().item()]
    deep = [
        (float(density[i]), i) for i in above if density[main : i + 1].min() <= DEEP * min(density[i], density[main])
    ]
    if not deep:
        return None
    upper = max(deep)[1]
    found = at[main + density[main : upper + 1].argmin()]
    # The farthest of many norms makes a mode of its own; it is the tail of the main one.
    return float(torch.tensor(found).exp()) if (values > found).sum() >= max(2, LEAST * len(values)) else None


def _tokens(run: Run, grid: Grid, layer: int | None) -> tuple[Tensor, str]:
    sites = {
        site.layer: site
        for site in map(Site.parse, run.acts)
        if site.kind == "resid_post" and site.stack == grid.stack and site.layer is not None
    }
    if layer is not None and layer not in sites:
        raise UnknownName("residual stream that was read", layer, sites)
    if sites:
        chosen = sites[max(sites) if layer is None else layer]
        return run.acts[chosen], str(chosen)
    if run.output is None or grid.stack:
        stack = f"{grid.stack}." if grid.stack else ""
        raise WorkbenchError(
            f"this run holds no tokens; run the model with read=['{stack}blocks.<layer>.hook_resid_post']"
        )
    return run.output, "output"


def _means(received: Tensor, outlier: Tensor) -> dict[str, Tensor]:
    to = (received * outlier).sum(-1) / outlier.sum(-1)
    rest = (received * (1 - outlier)).sum(-1) / (1 - outlier).sum(-1)
    both = to.isfinite() & rest.isfinite()
    to, rest = to.masked_fill(~both, float("nan")), rest.masked_fill(~both, float("nan"))
    return {"to_outliers": to, "to_others": rest, "ratio": torch.where(rest > 0, to / rest, float("nan"))}


def _sarle(values: Tensor) -> float:
    from scipy.stats import kurtosis, skew

    x = values.double().numpy()
    n = len(x)
    if n < 4 or x.max() - x.min() < 1e-12:
        return float("nan")
    size = 3 * (n - 1) ** 2 / ((n - 2) * (n - 3))
    return float((skew(x, bias=False) ** 2 + 1) / (kurtosis(x, bias=False) + size))


def planted_outliers(
    grid: Grid, images: int = 4, each: int = 2, width: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Tokens ``[B, T, D]`` with norms near 1 but for ``each`` patches of every image, near 10; and which these are ``[B, N]``."""
    generator = torch.Generator().manual_seed(seed)
    last = grid.tokens or int(grid.index[-1]) + 1
    directions = torch.nn.functional.normalize(torch.randn(images, last, width, generator=generator).double(), dim=-1)
    norms = (0.15 * torch.randn(images, last, generator=generator).double()).exp()
    chosen = torch.rand(images, grid.patches, generator=generator).argsort(1)[:, :each]
    truth = torch.zeros(images, grid.patches, dtype=torch.bool).scatter_(1, chosen, True)
    norms[:, grid.index] *= torch.where(truth, 10.0, 1.0)
    return directions * norms[..., None], truth


def _attention_example() -> dict[str, Any]:
    grid = Grid(3, 4, (8, 8), start=1, cls=0, tokens=13)
    return {"source": random_maps(tokens=13, causal=False), "found": outlier_tokens(planted_outliers(grid, 1)[0], grid)}


def _erasure_example() -> dict[str, Any]:
    from workbench.probes.vision.erasure import random_vision_model

    model, images, grid = random_vision_model()
    found = outlier_tokens(planted_outliers(grid, len(images))[0], grid)
    return {"model": model, "images": images, "found": found, "site": "blocks.0.hook_resid_pre", "random": 2}


ANALYSES = (
    Analysis(
        name="outlier-tokens",
        question="Which patches carry outlier norms?",
        function=outlier_tokens,
        example=lambda: {"tokens": planted_outliers(Grid(5, 5), 4)[0], "grid": Grid(5, 5)},
        paper="Darcet et al. 2023 (arXiv 2309.16588), section 2",
        source="tensors",
        null="the bimodality of a normal distribution, 1/3; no outliers where the log-norms have one mode",
        cause="outlier_erasure: outlier tokens become the mean patch",
        definition="the threshold is the valley of the log-norms' density; threshold=150 is the published one of DINOv2-g",
    ),
    Analysis(
        name="outlier-attention",
        question="Do patches with outlier norms collect attention?",
        function=outlier_attention,
        example=_attention_example,
        paper="Darcet et al. 2023 (arXiv 2309.16588), section 2",
        source="maps",
        null="each patch's mass spread evenly over the tokens that it may see",
        cause="outlier_erasure: outlier tokens become the mean patch",
        definition="mean attention received per patch from patches, outliers against the others of the same image",
    ),
    Analysis(
        name="outlier-erasure",
        question="What does the model lose without its outlier tokens?",
        function=outlier_erasure,
        example=_erasure_example,
        paper="Darcet et al. 2023 (arXiv 2309.16588), section 2",
        source="model",
        null="as many of the other patches replaced",
        cause="outlier_erasure: outlier tokens become the mean patch",
        definition="the paper probes what outliers hold; replacing them by the mean patch is ours",
    ),
)
