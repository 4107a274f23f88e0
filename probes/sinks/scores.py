"""Which keys collect attention whatever the query asks for?

The share of key k in one head is the mean weight that a query which may see the key gives it:

    alpha_k = sum_i A[i, k] / |{i : query i may see k}|

which for a causal map is the mean over queries i >= k (Gu et al., arXiv 2410.10781, section 3). The sink score is the
part of (layer, head) pairs whose first token has alpha > epsilon. F-Attn is the attention paid to the first token,
averaged over all queries, heads and layers (Qiu et al., arXiv 2505.06708). Both need column sums of the map only.

Padding queries and padding keys do not count, and "first" means the first real token of a sequence. The null beside
every share is what the key would get if each query spread its weight evenly over what it may see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import GatedMap
from workbench.probes.bootstrap import interval, resampled_means
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.sinks.shares import shares
from workbench.probes.sources import Source, maps_of
from workbench.results import Result, axis, head_map
from workbench.run import Provenance, Run
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FORCED = "the first token is seen only by queries that see nothing else, so its share is 1 by necessity"
_RESIDUAL = ("resid_pre", "resid_mid", "resid_post")


class Sink(NamedTuple):
    """One head's favourite key."""

    layer: int | str
    head: int
    key: int
    token: str
    share: float
    uniform: float


@dataclass(frozen=True)
class SinkResult(Result):
    """Shares per layer. Keys are counted from the first real token of each sequence.

    ``share`` layer -> ``[H, K]``: mean over the sequences in which some query may see the key, NaN where there is
    none. ``error`` layer -> ``[H, K]``: its standard error over sequences, NaN for fewer than two. ``uniform``
    layer -> ``[H, K]``: the null. ``queries`` layer -> ``[K]``: queries per sequence that may see the key.
    ``first`` and ``paid`` layer -> ``[B, H]``: the first token's share, and the attention it gets averaged over all
    queries. ``gate`` layer -> ``[H]``: mean gate of gated layers. ``largest`` is the largest absolute value among
    the residual streams that were read (else None). ``undefined`` names layers without a sink score and why.
    """

    share: Mapping[int | str, Tensor]
    error: Mapping[int | str, Tensor]
    uniform: Mapping[int | str, Tensor]
    queries: Mapping[int | str, Tensor]
    first: Mapping[int | str, Tensor]
    paid: Mapping[int | str, Tensor]
    gate: Mapping[int | str, Tensor]
    tokens: Mapping[int | str, tuple[str, ...]]
    epsilon: float
    raw: bool
    largest: float | None = None
    undefined: Mapping[int | str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    @property
    def sink_score(self) -> float:
        """Part of (layer, head) pairs whose first token has a share above epsilon; mean over sequences."""
        return _mean(self.per_sequence("sink_score"))

    @property
    def f_attn(self) -> float:
        """Attention to the first token, averaged over queries, heads, layers and sequences."""
        return _mean(self.per_sequence("f_attn"))

    def interval(self, quantity: str = "f_attn") -> tuple[float, float]:
        """95% bootstrap interval over sequences of ``sink_score`` or ``f_attn``; NaN for a single sequence."""
        low, high = interval(self.per_sequence(quantity))
        return float(low), float(high)

    def per_sequence(self, quantity: str) -> Tensor:
        """``sink_score`` or ``f_attn`` of every sequence, ``[B]``: layers count equally."""
        rows = [row for layer in self.share if layer not in self.undefined for row in [self._layer(quantity, layer)]]
        if not rows:
            return torch.full((1,), float("nan"), dtype=torch.float64)
        if len({len(row) for row in rows}) > 1:
            return torch.stack([row.nanmean() for row in rows]).mean()[None]
        return torch.stack(rows).mean(0)

    def _layer(self, quantity: str, layer: int | str) -> Tensor:
        if quantity == "f_attn":
            return self.paid[layer].mean(1)
        if quantity != "sink_score":
            raise UnknownName("sink quantity", quantity, ("sink_score", "f_attn"))
        first = self.first[layer]
        return torch.where(first.isnan(), float("nan"), (first > self.epsilon).double()).mean(1)

    def layers(self) -> pd.DataFrame:
        """One row per layer: ``layer, sink_score, f_attn`` with their intervals over sequences, ``uniform`` (the first
        token's share if attention were even), ``mean_gate``, and the ``reason`` where the score is undefined."""
        import pandas as pd

        rows = []
        for layer in self.share:
            row: dict[str, object] = {"layer": layer}
            for quantity in ("sink_score", "f_attn"):
                values = self._layer(quantity, layer)
                if layer in self.undefined:
                    values = torch.full_like(values, float("nan"))
                low, high = interval(values)
                row |= {quantity: _mean(values), f"{quantity}_low": float(low), f"{quantity}_high": float(high)}
            row["uniform"] = _mean(self.uniform[layer][:, 0])
            row["mean_gate"] = float(self.gate[layer].mean()) if layer in self.gate else float("nan")
            rows.append({**row, "reason": self.undefined.get(layer, "")})
        return pd.DataFrame(rows)

    def frame(self) -> pd.DataFrame:
        """One row per layer, head and key: ``layer, head, key, token, share, error, uniform, queries``."""
        import pandas as pd

        parts = []
        for layer, share in self.share.items():
            heads, keys = share.shape
            parts.append(
                pd.DataFrame(
                    {
                        "layer": layer,
                        "head": torch.arange(heads).repeat_interleave(keys).numpy(),
                        "key": torch.arange(keys).repeat(heads).numpy(),
                        "token": list(self.tokens[layer]) * heads,
                        "share": share.flatten().numpy(),
                        "error": self.error[layer].flatten().numpy(),
                        "uniform": self.uniform[layer].flatten().numpy(),
                        "queries": self.queries[layer].repeat(heads).numpy(),
                    }
                )
            )
        return pd.concat(parts, ignore_index=True)

    def strongest(self) -> list[Sink]:
        """Per head the key with the largest share, strongest first.

        Keys that fewer than half as many queries see as the most visible key are left out: the last token of a
        causal map is seen by itself alone, and a share of one query is no sink.
        """
        found = []
        for layer, share in self.share.items():
            seen = self.queries[layer]
            usable = (seen >= seen.max() / 2)[None] & share.isfinite()
            for head, (values, keep) in enumerate(zip(share, usable, strict=True)):
                if not keep.any():
                    continue
                key = int(values.masked_fill(~keep, float("-inf")).argmax())
                null = float(self.uniform[layer][head, key])
                found.append(Sink(layer, head, key, self.tokens[layer][key], float(values[key]), null))
        return sorted(found, key=lambda s: -s.share)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Layer x head heat map of the strongest key's share."""
        rows = {layer: torch.full((len(share),), float("nan")) for layer, share in self.share.items()}
        for sink in self.strongest():
            rows[sink.layer][sink.head] = sink.share
        title = f"Strongest sink of each head\n{self.provenance.model}"
        unit = "mean attention weight, not gated" if self.raw else "mean attention weight"
        top = max((sink.share for sink in self.strongest()), default=1.0)
        return head_map(ax, list(rows.values()), list(rows), title=title, unit=unit, limits=(0.0, max(1.0, top)))


def sinks(
    source: Source,
    epsilon: float = 0.3,
    *,
    keys: int | None = None,
    raw: bool = False,
    mask: Mask | None = None,
) -> SinkResult:
    """Shares of the keys, sink score and F-Attn of every captured layer.

    ``source``: a run with captured maps, or maps alone (one, a list, or a mapping from layer names). ``keys``: only
    the first so many keys (all by default). Gated maps count as they act (rows scaled by the gate); ``raw=True``
    looks at the attention inside the gate, which is what the published F-Attn of gated models measures. ``mask``
    says who may see whom for maps that do not know; one that neither knows nor is told is taken as causal if it
    holds no weight on any later key. Only column sums are used, so nothing of size Q x K is built; with padding
    queries in the batch, rows are walked in chunks instead.
    """
    if not 0 < epsilon < 1:
        raise WorkbenchError(f"epsilon is a share of attention between 0 and 1; got {epsilon!r}")
    if keys is not None and (isinstance(keys, bool) or not isinstance(keys, int) or keys < 1):
        raise WorkbenchError(f"keys is how many first keys to report, at least 1; got {keys!r}")
    maps = maps_of(source)
    run = source if isinstance(source, Run) else None
    tokens = run.tokens if run is not None else None
    found = {name: shares(name, amap, tokens, keys=keys, raw=raw, mask=mask) for name, amap in maps.items()}
    return SinkResult(
        share={name: layer.share for name, layer in found.items()},
        error={name: layer.error for name, layer in found.items()},
        uniform={name: layer.uniform for name, layer in found.items()},
        queries={name: layer.queries for name, layer in found.items()},
        first={name: layer.first for name, layer in found.items()},
        paid={name: layer.paid for name, layer in found.items()},
        gate={name: layer.gate for name, layer in found.items() if layer.gate is not None},
        tokens={name: layer.tokens for name, layer in found.items()},
        epsilon=epsilon,
        raw=raw,
        largest=_largest(run),
        undefined={name: FORCED for name, layer in found.items() if layer.forced},
        provenance=run.provenance if run is not None else Provenance("maps"),
    )


@dataclass(frozen=True)
class SinkComparison(Result):
    """Sinks of two models on the same texts. ``results[i]`` are the effective and, for a gated model, the raw result of
    ``labels[i]``. ``paired`` tells whether both saw the same tokens, so that sequences were resampled together."""

    labels: tuple[str, str]
    results: tuple[tuple[SinkResult, ...], tuple[SinkResult, ...]]
    paired: bool

    def frame(self) -> pd.DataFrame:
        """``model, map, f_attn, sink_score`` with intervals, ``mean_gate, largest``; the last row is second minus
        first.

        ``map`` is ``effective`` (rows scaled by the gate, if any) or ``raw``; the difference is of the effective maps.
        """
        import pandas as pd

        rows = []
        for label, found in zip(self.labels, self.results, strict=True):
            for result in found:
                row: dict[str, object] = {"model": label, "map": "raw" if result.raw else "effective"}
                for quantity in ("f_attn", "sink_score"):
                    low, high = result.interval(quantity)
                    row |= {quantity: getattr(result, quantity), f"{quantity}_low": low, f"{quantity}_high": high}
                gates = [gate.mean() for gate in result.gate.values()]
                row["mean_gate"] = float(torch.stack(gates).mean()) if gates else float("nan")
                rows.append({**row, "largest": _known(result.largest)})
        a, b = (found[0] for found in self.results)
        row = {"model": f"{self.labels[1]} - {self.labels[0]}", "map": "effective"}
        for quantity in ("f_attn", "sink_score"):
            low, high = self.difference(quantity)
            row |= {
                quantity: getattr(b, quantity) - getattr(a, quantity),
                f"{quantity}_low": low,
                f"{quantity}_high": high,
            }
        row["largest"] = _known(b.largest) - _known(a.largest)
        return pd.DataFrame([*rows, row])

    def difference(self, quantity: str = "f_attn") -> tuple[float, float]:
        """95% bootstrap interval of second minus first (effective maps); NaN for a single sequence."""
        a, b = (found[0].per_sequence(quantity) for found in self.results)
        if len(a) < 2 or len(b) < 2:
            return float("nan"), float("nan")
        draws = resampled_means(b, seed=0) - resampled_means(a, seed=0 if self.paired else 1)
        return float(draws.nanquantile(0.025)), float(draws.nanquantile(0.975))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Attention to the first token by layer, one line per model."""
        ax = axis(ax)
        for label, found in zip(self.labels, self.results, strict=True):
            for result in found:
                table = result.layers()
                name = f"{label}, attention inside the gate" if result.raw else label
                ax.plot(
                    range(len(table)), table["f_attn"], marker="o", linestyle="--" if result.raw else "-", label=name
                )
                ax.set_xticks(range(len(table)), [str(layer) for layer in table["layer"]])
        ax.set(
            xlabel="layer",
            ylabel="mean attention to the first token",
            title="Attention given to the first token",
            ylim=(0, 1),
        )
        ax.legend()
        return ax


def compare_sinks(a: Run, b: Run, labels: tuple[str, str] = ("a", "b"), epsilon: float = 0.3) -> SinkComparison:
    """Sinks of twin models side by side: F-Attn, sink score, mean gate, and the largest residual activation if
    it was read."""
    if len(labels) != 2:
        raise WorkbenchError(f"two runs take two labels; got {labels!r}")
    results = []
    for run in (a, b):
        gated = any(isinstance(amap, GatedMap) for amap in maps_of(run).values())
        results.append(tuple(sinks(run, epsilon, raw=raw) for raw in ((False, True) if gated else (False,))))
    paired = a.tokens.ids.shape == b.tokens.ids.shape and bool((a.tokens.ids.cpu() == b.tokens.ids.cpu()).all())
    return SinkComparison((labels[0], labels[1]), (results[0], results[1]), paired)


def _largest(run: Run | None) -> float | None:
    if run is None:
        return None
    found = [
        tensor.detach().abs().max().item() for site, tensor in run.acts.items() if Site.parse(site).kind in _RESIDUAL
    ]
    return max(found, default=None)


def _known(value: float | None) -> float:
    return float("nan") if value is None else value


def _mean(values: Tensor) -> float:
    return float(values.nanmean())


ANALYSES = (
    Analysis(
        name="sinks",
        question="Which keys collect attention whatever the query asks for?",
        function=sinks,
        example=lambda: {"source": random_maps()},
        paper="Gu et al. 2024 (arXiv 2410.10781), section 3; Qiu et al. 2025 (arXiv 2505.06708)",
        source="maps",
        null="evenly spread attention",
    ),
)
