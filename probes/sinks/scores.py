"""Which keys collect attention whatever the query asks for?

The share of key k in one head is the mean weight that a query which may see the key gives it:

    alpha_k = sum_i A[i, k] / |{i : query i may see k}|

which for a causal map is the mean over queries i >= k (Gu et al., arXiv 2410.10781, section 3). The sink score is the
part of (layer, head) pairs whose first token has alpha > epsilon; any other token is asked for with ``token=k``. F-Attn is
the attention paid to the first token, averaged over all queries, heads and layers (Qiu et al., arXiv 2505.06708). Both need
column sums of the map only.

Signed weights are no shares. Of a signed map A_ik stands for |A_ik| / sum_j |A_ij|, as in the code of Gu et al. for kernels
that may be negative: a row of absolute weights sums to 1, and a gate g scales it by |g|. ``relative=True`` takes the rows of
non-negative maps the same way, which makes unnormalised attention (sigmoid) comparable with softmax; by default their
weights count as they are. The mean signed weight is told beside the share.

Padding queries and padding keys do not count, and "first" means the first real token of a sequence. The null beside
every share is what the key would get if each query spread its weight evenly over what it may see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.sinks.shares import shares
from workbench.probes.sources import Source, maps_of
from workbench.results import Result, head_map
from workbench.run import Provenance, Run
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FORCED = "the sink token is seen only by queries that see nothing else, so its share is 1 by necessity"
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
    layer -> ``[H, K]``: the null, NaN where a map was captured without its row sums and these are free. ``signed`` layer ->
    ``[H, K]``: mean signed weight, of signed maps. ``queries`` layer -> ``[K]``: queries per sequence that may see the key.
    ``first`` and ``paid`` layer -> ``[B, H]``: share of the sink token (``token``, the first by default), and the attention
    it gets averaged over all queries. ``gate`` layer -> ``[H]``: mean gate of gated layers. ``activations`` ``[B]``: largest
    absolute value of a real token in the residual streams that were read, ``later`` ``[B]`` of the tokens after the first (None
    if none were read). ``undefined`` names layers without a sink score and why.
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
    token: int = 0
    signed: Mapping[int | str, Tensor] = field(default_factory=dict)
    activations: Tensor | None = None
    later: Tensor | None = None
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

    @property
    def largest(self) -> float | None:
        """Largest absolute value among the residual streams that were read, over all sequences; None if none were."""
        return None if self.activations is None else float(self.activations.max())

    def mean(self, quantity: str = "f_attn") -> float:
        """Mean over sequences of ``sink_score``, ``f_attn``, ``largest`` (the mean of the sequences' largest) or
        ``largest_later`` (without the first token, whose stream is the same in all sequences that begin alike)."""
        return _mean(self.per_sequence(quantity))

    def interval(self, quantity: str = "f_attn") -> tuple[float, float]:
        """95% bootstrap interval of ``mean(quantity)`` over sequences; NaN for a single sequence."""
        low, high = interval(self.per_sequence(quantity))
        return float(low), float(high)

    def per_sequence(self, quantity: str) -> Tensor:
        """``sink_score``, ``f_attn`` (layers count equally), ``largest`` or ``largest_later`` of every sequence, ``[B]``."""
        if quantity in ("largest", "largest_later"):
            found = self.activations if quantity == "largest" else self.later
            return torch.full((1,), float("nan"), dtype=torch.float64) if found is None else found
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
            raise UnknownName("sink quantity", quantity, ("sink_score", "f_attn", "largest", "largest_later"))
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
            known = self.token < self.uniform[layer].shape[1]
            row["uniform"] = _mean(self.uniform[layer][:, self.token]) if known else float("nan")
            row["mean_gate"] = float(self.gate[layer].mean()) if layer in self.gate else float("nan")
            rows.append({**row, "reason": self.undefined.get(layer, "")})
        return pd.DataFrame(rows)

    def frame(self) -> pd.DataFrame:
        """One row per layer, head and key: ``layer, head, key, token, share, error, uniform, queries``, and ``signed`` (NaN in
        non-negative layers) where a map is signed."""
        import pandas as pd

        parts = []
        for layer, share in self.share.items():
            heads, keys = share.shape
            part: dict[str, Any] = {
                "layer": layer,
                "head": torch.arange(heads).repeat_interleave(keys).numpy(),
                "key": torch.arange(keys).repeat(heads).numpy(),
                "token": list(self.tokens[layer]) * heads,
                "share": share.flatten().numpy(),
                "error": self.error[layer].flatten().numpy(),
                "uniform": self.uniform[layer].flatten().numpy(),
                "queries": self.queries[layer].repeat(heads).numpy(),
            }
            if self.signed:
                signed = self.signed.get(layer)
                part["signed"] = float("nan") if signed is None else signed.flatten().numpy()
            parts.append(pd.DataFrame(part))
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
    token: int = 0,
    raw: bool = False,
    relative: bool = False,
    mask: Mask | None = None,
) -> SinkResult:
    """Shares of the keys, sink score and F-Attn of every captured layer.

    ``source``: a run with captured maps, or maps alone (one, a list, or a mapping from layer names). ``keys``: only
    the first so many keys (all by default). ``token``: the sink of sink score and F-Attn, counted from the first real token.
    ``relative``: rows divided by their absolute sum, as those of signed maps always are (see the top of this module; rows are
    then walked in chunks). Gated maps count as they act (rows scaled by the gate); ``raw=True``
    looks at the attention inside the gate, which is what the published F-Attn of gated models measures. ``mask``
    says who may see whom for maps that do not know; one that neither knows nor is told is taken as causal if it
    holds no weight on any later key. Only column sums are used, so nothing of size Q x K is built; with padding
    queries in the batch, rows are walked in chunks instead.
    """
    if not 0 < epsilon < 1:
        raise WorkbenchError(f"epsilon is a share of attention between 0 and 1; got {epsilon!r}")
    if keys is not None and (isinstance(keys, bool) or not isinstance(keys, int) or keys < 1):
        raise WorkbenchError(f"keys is how many first keys to report, at least 1; got {keys!r}")
    if isinstance(token, bool) or not isinstance(token, int) or token < 0:
        raise WorkbenchError(f"token is the position of the sink, counted from 0; got {token!r}")
    maps = maps_of(source)
    run = source if isinstance(source, Run) else None
    tokens = run.tokens if run is not None else None
    found = {
        name: shares(name, amap, tokens, keys=keys, token=token, raw=raw, mask=mask, relative=relative)
        for name, amap in maps.items()
    }
    largest = None if run is None else _largest(run)
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
        token=token,
        signed={name: layer.signed for name, layer in found.items() if layer.signed is not None},
        activations=None if largest is None else largest[0],
        later=None if largest is None else largest[1],
        undefined={name: FORCED for name, layer in found.items() if layer.forced},
        provenance=run.provenance if run is not None else Provenance("maps"),
    )


def _largest(run: Run) -> tuple[Tensor, Tensor] | None:
    """Largest absolute value of a real token in the residual streams, per sequence: of all tokens, and of those after the
    first (NaN if there are none), ``[B]`` in float64."""
    found: list[tuple[Tensor, Tensor]] = []
    for key, tensor in run.acts.items():
        try:
            kind = Site.parse(key).kind
        except UnknownName:  # a bridge's own hook
            continue
        if kind not in _RESIDUAL:
            continue
        values = tensor.detach().cpu().double().abs().flatten(2).amax(2)
        real = run.tokens.mask.cpu()
        real = real if real.shape == values.shape else torch.ones_like(values, dtype=torch.bool)
        later = real & (real.cumsum(1) > 1)
        most = [values.masked_fill(~part, -1.0).amax(1) for part in (real, later)]
        found.append((most[0], most[1].masked_fill(most[1] < 0, float("nan"))))
    if not found:
        return None
    whole, later = (torch.stack(parts).amax(0) for parts in zip(*found, strict=True))
    return whole, later


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
