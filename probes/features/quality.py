"""How well does a sparse coder rebuild what it reads, with how many features, and does the model still work with it in place?

Of rows x (the target, for a transcoder) and the coder's output y, over all judged positions:

    L0       mean number of features above 0
    FVU      sum |x - y|^2 / sum |x - mean|^2     mean: of all judged rows, so 1 is what the best constant leaves
    cosine   mean of x.y / |x||y|                 norm ratio: mean of |y| / |x|
    CE       mean loss of the next token (nats): the model's own, with y put in the place of x, with x ablated
    KL       mean over judged positions of KL(own next-token distribution || the changed model's)
    CE recovered = (CE_ablated - CE_coder) / (CE_ablated - CE_own)

The recovered share depends on the ablation, so both are named: ``zero`` puts 0 in the place of x, ``mean`` the mean of all judged
rows. It is not defined (NaN) where ablation does not hurt. A feature is dead if no judged position has it above 0; how many
positions that were is told. The null is the same code through a shuffled decoder: as many features, equally strong, in directions
of other features. Intervals are bootstrapped over texts; ratios are ratios of sums, resampled together.

Definitions: SAEBench (Karvonen et al., arXiv 2503.09532), core metrics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.probes.bootstrap import resampled_means
from workbench.probes.features.reading import check_rows, chunks, decoded, like
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from workbench.coders.coder import Coder

_BLOCKS = 100
"""Into how many blocks rows of unknown texts are cut for intervals."""


@dataclass(frozen=True)
class CoderQuality(Result):
    """Measures of one coder on ``texts`` texts with ``tokens`` judged positions.

    ``sums`` ``[M, N, 2]``: numerator and denominator of each of the M ``measures`` for each of N texts; a measure is the ratio of
    their totals. ``null`` ``[M]`` has the values of the shuffled decoder, NaN where it cannot differ. ``density`` ``[F]`` is the
    share of positions at which a feature is active, ``l0_counts[j]`` the number of positions with j active features.
    """

    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    measures: tuple[str, ...]
    sums: Tensor
    null: Tensor
    density: Tensor
    l0_counts: Tensor
    texts: int
    tokens: int
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    @property
    def values(self) -> dict[str, float]:
        """Every measure by name."""
        return dict(zip(self.measures, _ratio(self.sums.sum(1)).tolist(), strict=True))

    def value(self, measure: str) -> float:
        """One measure; an unknown name lists those there are."""
        if measure not in self.measures:
            raise UnknownName("measure of a coder", measure, self.measures)
        return self.values[measure]

    @property
    def l0(self) -> float:
        return self.value("l0")

    @property
    def fvu(self) -> float:
        return self.value("fvu")

    @property
    def features(self) -> int:
        return len(self.density)

    @property
    def dead(self) -> float:
        """Share of features that were never active on the ``tokens`` judged positions."""
        return float((self.density == 0).double().mean())

    def ce_recovered(self, ablation: str) -> float:
        """Share of the loss that ablation would add and the coder does not, for ``zero`` or ``mean`` ablation."""
        return self.value(f"ce_recovered_{ablation}")

    def intervals(self, draws: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor]:
        """95% percentile intervals ``low, high`` ``[M]`` over texts; NaN for a single text, and for a share that is undefined, or
        undefined in more than one in forty of the draws."""
        if self.sums.shape[1] < 2:
            lonely = torch.full((len(self.measures),), float("nan"), dtype=torch.float64)
            return lonely, lonely
        means = resampled_means(self.sums.transpose(0, 1), draws=draws, seed=seed)
        found = _ratio(means)
        shaky = _ratio(self.sums.sum(1)).isnan() | (found.isnan().double().mean(0) > 0.025)
        low, high = (torch.nanquantile(found, q, dim=0).masked_fill(shaky, float("nan")) for q in (0.025, 0.975))
        return low, high

    def histogram(self, bins: int = 50) -> tuple[Tensor, Tensor]:
        """``counts [bins], edges [bins + 1]`` of log10 density from one position in all to every position; dead features, which
        have no logarithm, are left out."""
        if bins < 1:
            raise WorkbenchError(f"a histogram has at least one bin; got {bins}")
        low = -torch.tensor(float(max(self.tokens, 10)), dtype=torch.float64).log10()
        edges = torch.linspace(float(low), 0.0, bins + 1, dtype=torch.float64)
        alive = self.density[self.density > 0].double().log10()
        place = torch.bucketize(alive, edges[1:-1])
        return torch.bincount(place, minlength=bins), edges

    def frame(self) -> pd.DataFrame:
        """One row per measure: ``measure, value, low, high`` (95% over texts), ``null`` (the shuffled decoder), ``tokens``.

        ``dead`` is a share of features and has no interval."""
        import pandas as pd

        low, high = self.intervals()
        nan = float("nan")
        rows = list(
            zip(self.measures, self.values.values(), low.tolist(), high.tolist(), self.null.tolist(), strict=True)
        )
        table = pd.DataFrame(
            [*rows, ("dead", self.dead, nan, nan, nan)], columns=["measure", "value", "low", "high", "null"]
        )
        return table.assign(tokens=self.tokens)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Histogram of log10 density; dead features are told in the title."""
        counts, edges = self.histogram()
        ax = axis(ax, 5.6, 3.4)
        ax.stairs(counts.numpy(), edges.numpy(), fill=True)
        title = f"{', '.join(self.writes) or self.kind}: L0 {self.l0:.1f}, FVU {self.fvu:.3f}, dead {self.dead:.1%}"
        ax.set(xlabel="log10 of the share of positions where active", ylabel="features", title=title)
        return ax


@torch.no_grad()
def array_quality(coder: Coder, X: Any, Y: Any = None, *, blocks: int = _BLOCKS, seed: int = 0) -> CoderQuality:
    """Judge a coder on rows ``X`` ``[N, D_in]``, for a transcoder with what it should write, ``Y`` ``[N, D_out]``.

    There is no model, hence no CE. Rows beside each other may come from one text: intervals are over ``blocks`` blocks of
    consecutive rows. Refused: rows of another width than the coder's, of unequal number, or with NaN; a coder that writes
    something else than it reads without ``Y``; fewer than one block.
    """
    x = check_rows("X", X, sum(coder.reads))
    if Y is None and not writes_what_it_reads(coder):
        raise WorkbenchError(
            "this coder writes something else than it reads; pass what it should write as Y [N, D_out]"
        )
    y = x if Y is None else check_rows("Y", Y, sum(coder.writes))
    if len(x) != len(y):
        raise WorkbenchError(f"X and Y hold the same rows; got {len(x)} and {len(y)}")
    if blocks < 1:
        raise WorkbenchError(f"intervals need blocks of rows; got blocks={blocks}")
    blocks = min(blocks, len(x))
    tally = Tally(coder, blocks, y.double().mean(0), seed)
    group = torch.arange(len(x)) * blocks // len(x)
    size = 4096
    for i in range(0, len(x), size):
        tally.add(group[i : i + size], x[i : i + size], y[i : i + size])
    return tally.result((), (), Provenance("rows"))


def writes_what_it_reads(coder: Coder) -> bool:
    """Whether the coder is an autoencoder, as far as it says: the same sites, or centred on its own bias where none are named."""
    about = coder.about
    if about.get("reads") and about.get("writes"):
        return bool(about["reads"] == about["writes"])
    return bool(coder.centred) and tuple(coder.reads) == tuple(coder.writes)


class Tally:
    """Sums over judged positions, per text, of one coder and of the same with its decoder shuffled."""

    def __init__(self, coder: Coder, texts: int, mean: Tensor, seed: int) -> None:
        self.coder, self.texts, self.mean = coder, texts, mean
        generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(coder.features, generator=generator).to(coder.W_dec.device)
        self.sums: dict[str, Tensor] = {}
        self.active = torch.zeros(coder.features, dtype=torch.int64)
        self.l0_counts = torch.zeros(coder.features + 1, dtype=torch.int64)
        self.ablations: tuple[str, ...] = ()

    def into(self, name: str, text: Tensor, values: Tensor) -> None:
        """Add one number per row to the sums of its text."""
        total = self.sums.setdefault(name, torch.zeros(self.texts, dtype=torch.float64))
        total.index_add_(0, text, values.detach().cpu().double())

    def add(self, text: Tensor, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Count rows of the texts ``text`` ``[N]``; gives the coder's output and that of the shuffled decoder."""
        outs, nulls = [], []
        step = 0
        for part in chunks(like(x, self.coder), self.coder.features):
            f = self.coder.encode(part)
            where = text[step : step + len(part)]
            wanted = target[step : step + len(part)].double().cpu()
            step += len(part)
            on = f > 0
            l0 = on.sum(-1).cpu()
            self.active += on.sum(0).cpu()
            self.l0_counts += torch.bincount(l0, minlength=len(self.l0_counts))
            self.into("tokens", where, torch.ones(len(part)))
            self.into("l0", where, l0)
            self.into("variance", where, (wanted - self.mean).square().sum(-1))
            y, null = decoded(self.coder, f, part), decoded(self.coder, f[:, self.order], part)
            self._compare("", where, wanted, y.double().cpu())
            self._compare("null_", where, wanted, null.double().cpu())
            outs.append(y)
            nulls.append(null)
        return torch.cat(outs), torch.cat(nulls)

    def _compare(self, name: str, text: Tensor, x: Tensor, y: Tensor) -> None:
        size = x.norm(dim=-1)
        tiny = torch.finfo(torch.float64).tiny
        self.into(f"{name}error", text, (x - y).square().sum(-1))
        self.into(f"{name}cosine", text, (x * y).sum(-1) / (size * y.norm(dim=-1)).clamp(min=tiny))
        self.into(f"{name}norm_ratio", text, y.norm(dim=-1) / size.clamp(min=tiny))

    def result(self, reads: Sequence[str], writes: Sequence[str], provenance: Provenance) -> CoderQuality:
        measured = self._measures("")
        shuffled = self._measures("null_")
        names = tuple(measured)
        sums = torch.stack([torch.stack(measured[name], -1) for name in names])
        null = torch.stack(
            [_ratio(torch.stack([part.sum() for part in shuffled[n]])) if n in shuffled else NAN for n in names]
        )
        tokens = int(self.sums["tokens"].sum())
        longest = int(self.l0_counts.nonzero().max()) + 1
        return CoderQuality(
            kind=self.coder.kind,
            reads=tuple(reads),
            writes=tuple(writes),
            measures=names,
            sums=sums,
            null=null,
            density=self.active.double() / tokens,
            l0_counts=self.l0_counts[:longest],
            texts=self.texts,
            tokens=tokens,
            provenance=provenance,
        )

    def _measures(self, which: str) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Numerator and denominator per text of the coder's measures, or of the shuffled decoder's (``null_``)."""
        s, tokens = self.sums, self.sums["tokens"]
        found = {} if which else {"l0": (s["l0"], tokens)}
        found["fvu"] = (s[f"{which}error"], s["variance"])
        found["mse"] = (s[f"{which}error"], tokens * len(self.mean))
        found |= {name: (s[f"{which}{name}"], tokens) for name in ("cosine", "norm_ratio")}
        if "predicted" not in s:
            return found
        judged, changed = s["predicted"], f"{which}ce_coder"
        if not which:
            found["ce"] = (s["ce"], judged)
        found["ce_coder"] = (s[changed], judged)
        for ablation in self.ablations:
            ablated = s[f"ce_{ablation}"]
            if not which:
                found[f"ce_{ablation}"] = (ablated, judged)
            found[f"ce_recovered_{ablation}"] = (ablated - s[changed], ablated - s["ce"])
        found["kl_coder"] = (s[f"{which}kl_coder"], tokens)
        if not which:
            found |= {f"kl_{ablation}": (s[f"kl_{ablation}"], tokens) for ablation in self.ablations}
        return found


NAN = torch.tensor(float("nan"), dtype=torch.float64)


def _ratio(sums: Tensor) -> Tensor:
    """``[..., 2]`` to numerator over denominator, NaN where the denominator is 0 or below."""
    above, below = sums[..., 0], sums[..., 1]
    return torch.where(below > 0, above / below.clamp(min=torch.finfo(below.dtype).tiny), NAN)
