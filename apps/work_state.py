"""What linear, delta-rule and state-space layers keep of a sequence: effective weights, their decay, and the size of the state.

The effective map of such a layer says what each token's output takes from every earlier value. Its weights have a sign and do
not add up to 1, so they are no probabilities. For a state S_t = A_t S_(t-1) + b_t v_t^T the norm shown is that of what S_t would
hold of independent values of unit size: (sum over j <= t of |A_t ... A_(j+1) b_j|^2)^(1/2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.apps.work_variants import identity_error
from workbench.catalogue import variants
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import AttentionMap, GatedMap
from workbench.patterns.algebra import SumMap
from workbench.patterns.delta import DeltaMap
from workbench.patterns.diagonal import DiagonalMap
from workbench.patterns.linear import ChannelDecayMap, LinearMap
from workbench.patterns.per_channel import PerChannelMap
from workbench.patterns.prefix import PrefixSoftmaxMap
from workbench.patterns.selective import SelectiveScanMap
from workbench.patterns.state import StateMap
from workbench.results import Result, axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FAMILIES = ("linear", "delta")
LONGEST = 1024
RANKED = 2048
GOOD = 0.5
"""The R^2 from which an exponential is drawn."""
_SAMPLED = 256


def state_variants() -> list[str]:
    """Names of the variants of the linear and delta families over tokens."""
    return [record.name for record in variants() if record.family in FAMILIES]


def decay_profile(amap: AttentionMap, *, batch: int = 0, queries: int = _SAMPLED) -> Tensor:
    """Mean absolute weight at each distance between query and key, ``[H, K]`` in float64, over ``queries`` evenly spaced queries
    (all, if there are fewer); NaN where none of them has a key so far back. Keys after a query count by their distance too."""
    _, heads, rows, keys = amap.shape
    count = min(rows, queries)
    chosen = torch.linspace(0, rows - 1, count, dtype=torch.float64).round().long().unique()
    total, seen = torch.zeros(heads, keys, dtype=torch.float64), torch.zeros(keys, dtype=torch.float64)
    ahead = not _causal(amap)
    for query in chosen.tolist():
        weights = amap.rows(query, query + 1)[batch, :, 0].detach().double().cpu().abs()
        place = query + amap.offset
        kept = torch.arange(keys if ahead else min(place + 1, keys))
        far = (place - kept).abs()
        total.index_add_(1, far, weights[:, kept])
        seen.index_add_(0, far, torch.ones(len(far), dtype=torch.float64))
    return torch.where(seen > 0, total / seen.clamp(min=1), float("nan"))


@dataclass(frozen=True)
class Fit:
    """An exponential through a profile: the weight halves every ``half_life`` tokens (None: it does not fall); ``r2`` is the part
    of the variance of its logarithm that the line explains."""

    half_life: float | None
    level: float
    r2: float


def half_life(profile: Tensor) -> Fit | None:
    """The least-squares line through the logarithm of a profile ``[K]`` at distances of 1 and more; None for fewer than three
    positive values."""
    far = torch.arange(len(profile), dtype=torch.float64)
    kept = (far >= 1) & profile.isfinite() & (profile > 0)
    if int(kept.sum()) < 3:
        return None
    x, y = far[kept], profile[kept].double().log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    level = float(y.mean() - slope * x.mean())
    spread = float(((y - y.mean()) ** 2).sum())
    left = float(((y - level - slope * x) ** 2).sum())
    r2 = 1.0 - left / spread if spread > 0 else 1.0
    return Fit(math.log(2) / -slope if slope < -1e-12 else None, math.exp(level), r2)


def state_norms(amap: AttentionMap) -> Tensor:
    """Norm of the state after each token for independent values of unit size, ``[B, H, N]`` in float64.

    Refuses maps without a known recurrence. Skip connections beside the state and a gate on its output do not count.
    """
    if isinstance(amap, GatedMap):
        return state_norms(amap.raw)
    if isinstance(amap, PerChannelMap | SelectiveScanMap):
        return state_norms(amap.native())
    if isinstance(amap, SumMap):
        parts = [part for part in amap.maps if not isinstance(part, DiagonalMap)]
        if len(parts) == 1:
            return state_norms(parts[0])
    elif isinstance(amap, LinearMap) and amap.causal:
        b, h, n, _ = amap.shape
        size = amap.k.double().square().sum(-1).repeat_interleave(h // amap.k.shape[1], 1)
        a = torch.zeros(b, h, n, dtype=torch.float64)
        if amap.log_decay is not None:
            log = amap.log_decay.double()
            a = log[None, :, None].expand(b, h, n) if log.ndim == 1 else log
        return _carried(size[..., None], (2 * a).exp()[..., None])
    elif isinstance(amap, ChannelDecayMap):
        return _carried(amap.k.double().square(), (2 * amap.log_decay.double()).exp())
    elif isinstance(amap, DeltaMap):
        return _delta_norms(amap)
    elif isinstance(amap, StateMap):
        return _step_norms(amap)
    raise Refused(f"no state that is carried from token to token is known of this map ({type(amap).__name__})")


_KNOWN = (LinearMap, ChannelDecayMap, DeltaMap, StateMap, SelectiveScanMap)


def _carried(size: Tensor, keep: Tensor) -> Tensor:
    """Squares ``[B, H, N, S]`` that are added token by token and fade by the factors ``keep``; root of their sum."""
    held, found = torch.zeros_like(size[:, :, 0]), []
    for t in range(size.shape[2]):
        held = held * keep[:, :, t] + size[:, :, t]
        found.append(held.sum(-1))
    return torch.stack(found, -1).sqrt()


def _delta_norms(amap: DeltaMap) -> Tensor:
    """S_t = e^a (I - beta k k^T) S_(t-1) + beta k v^T, followed by the Gram matrix of what is written."""
    heads = amap.shape[1]
    k = amap.k.double().repeat_interleave(heads // amap.k.shape[1], 1)
    beta = amap.beta.double()
    decay = torch.ones_like(beta) if amap.log_decay is None else amap.log_decay.double().exp()
    eye = torch.eye(k.shape[-1], dtype=torch.float64, device=k.device)
    gram, found = torch.zeros(*k.shape[:2], k.shape[-1], k.shape[-1], dtype=torch.float64, device=k.device), []
    for t in range(k.shape[2]):
        key, rate = k[:, :, t], beta[:, :, t, None, None]
        outer = key[..., :, None] * key[..., None, :]
        step = decay[:, :, t, None, None] * (eye - rate * outer)
        gram = step @ gram @ step.transpose(-1, -2) + rate**2 * outer
        found.append(gram.diagonal(dim1=-2, dim2=-1).sum(-1))
    return torch.stack(found, -1).sqrt()


def _step_norms(amap: StateMap) -> Tensor:
    recurrence = amap.recurrence
    write = recurrence.write.double()
    if recurrence.diagonal is not None:
        return _carried(write.square(), recurrence.diagonal.double().square())
    assert recurrence.step is not None
    b, h, n, s = write.shape
    eye = torch.eye(s, dtype=torch.float64, device=write.device).expand(b, h, s, s)
    gram, found = torch.zeros(b, h, s, s, dtype=torch.float64, device=write.device), []
    for t in range(n):
        step = recurrence.step(eye[:, :, None], torch.tensor([t], device=write.device))[:, :, 0]
        column = write[:, :, t, :, None]
        gram = step @ gram @ step.transpose(-1, -2) + column @ column.transpose(-1, -2)
        found.append(gram.diagonal(dim1=-2, dim2=-1).sum(-1))
    return torch.stack(found, -1).sqrt()


@dataclass(frozen=True)
class StateView(Result):
    """One layer over one sequence. ``weights`` ``[H, N, N]`` the effective map (empty for more than ``LONGEST`` tokens);
    ``profile`` ``[H, N]`` the mean absolute weight by distance, ``fits`` one mapping ``half_life, level, r2`` per head or None;
    ``norms`` ``[H, N]`` of the state or None (``stateless`` says why); ``rank`` ``[H]`` the effective rank of the map, None for
    more than ``RANKED`` tokens; ``negative`` ``[H]`` the negative share of the absolute weight. ``facts`` is what the map says of
    itself, ``error`` the largest difference between the output and map times values, None where the values are not known."""

    name: str
    weights: Tensor
    profile: Tensor
    fits: tuple[Mapping[str, float | None] | None, ...]
    norms: Tensor | None
    stateless: str
    rank: Tensor | None
    negative: Tensor
    facts: Mapping[str, Any]
    error: float | None = None

    def frame(self) -> pd.DataFrame:
        """One row per head: ``head, half_life`` (tokens), ``r2`` of the fit, ``effective_rank, negative, last_norm``."""
        import pandas as pd

        heads = range(len(self.profile))
        fits = [fit or {} for fit in self.fits]
        return pd.DataFrame(
            {
                "head": list(heads),
                "half_life": [fit.get("half_life") for fit in fits],
                "r2": [fit.get("r2") for fit in fits],
                "effective_rank": [None if self.rank is None else float(self.rank[head]) for head in heads],
                "negative": self.negative.tolist(),
                "last_norm": [None if self.norms is None else float(self.norms[head, -1]) for head in heads],
            }
        )

    def decay(self) -> pd.DataFrame:
        """One row per head and distance: ``head, distance, weight`` (mean absolute) and ``fit``."""
        import pandas as pd

        parts = []
        for head, (line, fit) in enumerate(zip(self.profile, self.fits, strict=True)):
            far = torch.arange(len(line), dtype=torch.float64)
            rate = 0.0 if not fit or fit["half_life"] is None else math.log(2) / fit["half_life"]
            level = math.nan if not fit or fit["level"] is None else fit["level"]
            fitted = level * (-rate * far).exp()
            parts.append(
                pd.DataFrame(
                    {"head": head, "distance": far.long().numpy(), "weight": line.numpy(), "fit": fitted.numpy()}
                )
            )
        return pd.concat(parts, ignore_index=True)

    def states(self) -> pd.DataFrame:
        """One row per head and token: ``head, token, norm``."""
        import pandas as pd

        if self.norms is None:
            raise Refused(self.stateless)
        heads, tokens = self.norms.shape
        return pd.DataFrame(
            {
                "head": torch.arange(heads).repeat_interleave(tokens).numpy(),
                "token": torch.arange(tokens).repeat(heads).numpy(),
                "norm": self.norms.flatten().numpy(),
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Mean absolute weight over the distance, logarithmic, a line per head; dashed its exponential if it fits (``GOOD``)."""
        ax = axis(ax, 5.6, 3.4)
        table = self.decay()
        for head, fit in enumerate(self.fits):
            part = table[(table["head"] == head) & (table["distance"] > 0)]
            found = None if fit is None or (fit["r2"] or 0) < GOOD else fit["half_life"]
            label = f"head {head}" + ("" if found is None else f", halves in {found:.3g}")
            line = ax.plot(part["distance"], part["weight"].where(part["weight"] > 0), label=label)[0]
            if found is not None:
                ax.plot(part["distance"], part["fit"], linestyle="--", linewidth=0.9, color=line.get_color())
        seen = table.loc[(table["distance"] > 0) & (table["weight"] > 0), "weight"]
        if len(seen):
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
            ax.yaxis.set_minor_formatter(lambda value, _: "")
            least = max(float(seen.min()), float(seen.max()) * 1e-8)
            ax.set_ylim(least / 2, float(seen.max()) * 2)
            ax.set_xlim(0, 1.02 * float(table.loc[table["weight"] >= least, "distance"].max()) + 1)
        ax.set(xlabel="distance between query and key (tokens)", ylabel="mean |weight|")
        ax.legend(fontsize=7)
        return ax

    def plot_norms(self, ax: Axes | None = None) -> Axes:
        """Norm of the state over the tokens, a line per head."""
        ax = axis(ax, 5.6, 3.4)
        for head, part in self.states().groupby("head"):
            ax.plot(part["token"], part["norm"], label=f"head {head}")
        ax.set(xlabel="token", ylabel="norm of the state")
        ax.set_ylim(bottom=0)
        ax.legend(fontsize=7)
        return ax


@torch.no_grad()
def viewed(amap: AttentionMap, name: str, *, batch: int = 0, error: float | None = None) -> StateView:
    """The numbers of a square map over tokens."""
    import workbench as wb

    if amap.domain != "token" or amap.shape[2] != amap.shape[3]:
        raise Refused(
            f"{name}: a map over one sequence of tokens is needed; this one is a {amap.domain} map {list(amap.shape)}"
        )
    tokens = amap.shape[3]
    profile = decay_profile(amap, batch=batch)
    fits = tuple(None if (fit := half_life(line)) is None else vars(fit) for line in profile)
    norms, stateless = None, ""
    try:
        norms = state_norms(amap)[batch]
    except Refused as error_of_state:
        stateless = str(error_of_state)
    size, minus = (torch.zeros(amap.shape[1], dtype=torch.float64) for _ in range(2))
    step = max(1, 2**20 // tokens)
    for lo in range(0, tokens, step):
        rows = amap.rows(lo, min(lo + step, tokens))[batch].detach().double().cpu()
        size += rows.abs().sum((1, 2))
        minus += rows.clamp(max=0).abs().sum((1, 2))
    kept = tokens <= LONGEST
    return StateView(
        name=name,
        weights=amap.rows(0, tokens)[batch].detach().float().cpu().contiguous() if kept else torch.zeros(0, 0, 0),
        profile=profile,
        fits=fits,
        norms=norms,
        stateless=stateless,
        rank=wb.effective_rank(amap)[batch].double().cpu() if tokens <= RANKED else None,
        negative=minus / size.clamp(min=1e-300),
        facts={key: getattr(amap, key) for key in ("domain", "sign", "row_sum", "value_space", "exactness")}
        | {"map": type(amap).__name__, "channelwise": amap.channelwise},
        error=error,
    )


@torch.no_grad()
def state_view(variant: str, seed: int, tokens: int = 64) -> StateView:
    """A variant of ``state_variants()`` on its own example of ``tokens`` tokens."""
    if variant not in state_variants():
        raise UnknownName("linear, delta or state-space variant", variant, state_variants())
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 4 <= tokens <= LONGEST:
        raise WorkbenchError(f"tokens is a whole number from 4 to {LONGEST}; got {tokens!r}")
    record = variants()[variant]
    arguments = record.example(seed, tokens, torch.float64)
    output, amap = record(**arguments)
    values = None if record.value_input is None else arguments[record.value_input]
    error = None if values is None else identity_error(amap, values, output)
    return viewed(amap, variant, error=error)


def view_from(saved: Any) -> StateView:
    """A view that was read back from its folder (``load_result``)."""
    labels, tensors = saved.labels, saved.tensors
    return StateView(
        name=labels["name"],
        weights=tensors["weights"],
        profile=tensors["profile"],
        fits=tuple(labels["fits"]),
        norms=tensors.get("norms"),
        stateless=labels["stateless"],
        rank=tensors.get("rank"),
        negative=tensors["negative"],
        facts=labels["facts"],
        error=labels["error"],
    )


def softmax_like(amap: AttentionMap) -> bool:
    """Whether a map's rows are shares that a softmax makes, gated or not: nothing that decays, erases or has a sign."""
    inner = amap.raw if isinstance(amap, GatedMap) else amap
    return inner.sign == "nonnegative" and not isinstance(inner, (*_KNOWN, PrefixSoftmaxMap))


def _causal(amap: AttentionMap) -> bool:
    from workbench.probes.visibility import looks_ahead

    return not looks_ahead(amap)
