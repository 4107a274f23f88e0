"""How much do frames of a video attend to themselves, and how fast does attention change over frames?

For temporal maps (every place of a video attends over its N frames), as in ByTheWay, first called BroadWay (arXiv 2410.06241):

    energy      E = mean over rows of sum_s A[t, s]^2            1 for the identity, 1/N for even attention
    disparity   |A_block - A_up1|, Frobenius, from the map of a reference block
    bands       DFT of each row over s; high: frequencies within tau of N/2, low: the others

By Parseval E = E_low + E_high with E_band = mean over rows of sum_{f in band} |DFT(f)|^2 / N. Energy goes with the motion of
the video, disparity with its inconsistency. Two edits follow: ``guided`` moves a map towards that of the reference, which costs
energy; ``amplified`` multiplies the high band by

    beta_c = sqrt((E1 - E2_low) / E2_high)

which gives the guided map (2) the energy of the one before (1). The published method does so in the first fifth of the steps. The
direction of the DFT and what counts as within tau (|f - N/2| <= tau, f and N - f alike) are our reading.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Edit
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.similarity.aligned import CHUNK, Aligned, aligned_layers
from workbench.probes.sources import Source, provenance_of
from workbench.probes.tables import HeadTable

UNIT = "squared weight per row"


def temporal_bands(source: Source, tau: float = 3, *, raw: bool = False) -> HeadTable:
    """``energy``, its ``low`` and ``high`` part, and ``high_share`` = high / energy, per head; means over real queries, then over
    sequences (places) with 95% intervals.

    ``tau``: the high band are DFT indices f with ``|f - N/2| <= tau``. The null shuffles the keys of every row: the energy
    stays, and every frequency but 0 has the same part of it, (N E - S^2) / (N - 1) / N for a row of sum S, in the mean over all
    shuffles. Maps of any sign, square or not; sequences of different lengths have a DFT each. ``raw`` looks inside the gate.
    Refuses a high band that holds frequency 0. NaN for heads without weight.
    """
    values: dict[str, dict[int | str, Tensor]] = {name: {} for name in ("energy", "low", "high", "high_share")}
    low, high, null = ({name: dict(part) for name, part in values.items()} for _ in range(3))
    undefined = {}
    for name, layer in aligned_layers(source, raw=raw).items():
        energy, upper, chance, flat = _energies(layer, tau)
        parts = {"energy": energy, "low": energy - upper, "high": upper, "high_share": upper / energy}
        nulls = {"energy": flat, "low": energy - chance, "high": chance, "high_share": chance / energy}
        for key, part in parts.items():
            empty = part.masked_fill(energy == 0, float("nan"))
            values[key][name] = empty.nanmean(0)
            low[key][name], high[key][name] = interval(empty)
            null[key][name] = nulls[key].masked_fill(energy == 0, float("nan")).nanmean(0)
        if bool((energy == 0).any()):
            undefined[str(name)] = "a head without weight has no energy"
    return HeadTable(
        f"Energy of temporal maps, high band within {tau:g} of N/2",
        values,
        {"energy": UNIT, "low": UNIT, "high": UNIT, "high_share": "share of the energy"},
        low=low,
        high=high,
        null=null,
        undefined=undefined,
        provenance=provenance_of(source),
    )


def temporal_disparity(source: Source, reference: int | str, *, raw: bool = False) -> HeadTable:
    """``disparity`` = |A - A_ref| of every head from the same head of the layer ``reference``, and ``relative``, the same over
    |A_ref|; means over sequences (places) with 95% intervals.

    The null is the disparity from even attention over all real frames. Layers need maps of one shape: blocks of a network with
    other resolutions have other places, so average or resample over places first, as in
    ``AttentionMap.from_dense(map.dense().mean(0, keepdim=True))``. The layer itself has disparity 0.
    """
    layers = aligned_layers(source, raw=raw)
    if reference not in layers:
        raise UnknownName("reference layer", reference, layers)
    other = layers[reference]
    parts: dict[str, dict[int | str, Tensor]] = {"disparity": {}, "relative": {}}
    null: dict[str, dict[int | str, Tensor]] = {"disparity": {}, "relative": {}}
    undefined = {}
    for name, layer in layers.items():
        if layer.shape != other.shape or not torch.equal(layer.real_keys, other.real_keys):
            raise WorkbenchError(
                f"layer {name!r} has maps {list(layer.shape)}, the reference {list(other.shape)}; average over places and "
                "heads first: AttentionMap.from_dense(map.dense().mean((0, 1), keepdim=True))"
            )
        b, h, queries, keys = layer.shape
        apart, even, square = (torch.zeros(b, h, dtype=torch.float64) for _ in range(3))
        step = max(1, min(queries, CHUNK // max(1, 3 * b * h * keys)))
        for lo in range(0, queries, step):
            hi = min(queries, lo + step)
            rows, wanted = layer.rows(lo, hi), other.rows(lo, hi)
            real = layer.real_queries[:, None, lo:hi, None] & layer.real_keys[:, None, None]
            flat = real / real.sum(-1, keepdim=True).clamp(min=1)
            apart += (rows - wanted).square().sum((-2, -1))
            even += (flat - wanted).square().sum((-2, -1))
            square += wanted.square().sum((-2, -1))
        empty = square == 0
        nothing = ~layer.real_queries.any(1, keepdim=True)
        parts["disparity"][name] = apart.sqrt().masked_fill(nothing, float("nan"))
        parts["relative"][name] = (apart / square).sqrt().masked_fill(empty, float("nan"))
        null["disparity"][name] = even.sqrt().masked_fill(nothing, float("nan")).nanmean(0)
        null["relative"][name] = (even / square).sqrt().masked_fill(empty, float("nan")).nanmean(0)
        if bool(empty.any()):
            undefined[f"{name}, relative"] = "the reference has a head without weight"
    bounds = {key: {name: interval(part) for name, part in row.items()} for key, row in parts.items()}
    return HeadTable(
        f"Disparity from layer {reference}",
        {key: {name: part.nanmean(0) for name, part in row.items()} for key, row in parts.items()},
        {"disparity": "Frobenius norm", "relative": "share of the reference's norm"},
        low={key: {name: pair[0] for name, pair in row.items()} for key, row in bounds.items()},
        high={key: {name: pair[1] for name, pair in row.items()} for key, row in bounds.items()},
        null=null,
        undefined=undefined,
        provenance=provenance_of(source),
    )


def guided(weights: Tensor, reference: Tensor, alpha: float = 0.5) -> Tensor:
    """``A + alpha (A_ref - A)`` of maps of one shape: self-guidance towards the reference block. Rows keep summing to 1."""
    if weights.shape != reference.shape:
        raise WorkbenchError(f"a map and a reference of one shape; got {list(weights.shape)}, {list(reference.shape)}")
    return weights + alpha * (reference - weights)


def amplified(weights: Tensor, beta: float | Tensor, tau: float = 3) -> Tensor:
    """The maps ``[..., Q, N]`` with the high band of every row multiplied by ``beta`` (a number, or one per map as
    ``motion_gain`` returns it, which broadcasts). Sums of rows stay, single weights may become negative."""
    spectrum = torch.fft.fft(weights.double(), dim=-1)
    band = high_band(weights.shape[-1], tau).to(weights.device)
    factor = torch.as_tensor(beta, dtype=torch.float64, device=weights.device)
    while 0 < factor.ndim < weights.ndim:
        factor = factor[..., None]
    return torch.fft.ifft(torch.where(band, factor * spectrum, spectrum), dim=-1).real.to(weights.dtype)


def motion_gain(before: Tensor, after: Tensor, tau: float = 3) -> Tensor:
    """beta_c = sqrt((E1 - E2_low) / E2_high), one per map: the factor that gives ``after`` ``[..., Q, N]`` the energy of
    ``before`` by its high band alone. NaN where ``after`` has no high band, or more energy in its low band than ``before`` has
    altogether."""
    if before.shape != after.shape:
        raise WorkbenchError(f"two maps of one shape; got {list(before.shape)} and {list(after.shape)}")
    wanted = before.double().square().sum(-1).mean(-1)
    energy, upper = (part.mean(-1) for part in _row_energies(after.double(), tau))
    need = wanted - (energy - upper)
    return (need / upper).masked_fill((upper <= 1e-12 * energy) | (need < 0), float("nan")).sqrt()


def motion_edit(beta: float, tau: float = 3) -> Edit:
    """``amplified`` as an edit of a ``hook_pattern`` site: ``model.run(video, edit={site: motion_edit(1.5)})``.

    Temporal attention sees all frames. In a causal layer the edit would give weight to hidden keys, so it is refused there."""

    def edit(pattern: Tensor) -> Tensor:
        if pattern.shape[-1] > 1 and not bool(pattern.triu(1 + pattern.shape[-1] - pattern.shape[-2]).any()):
            raise Refused("this pattern is causal: amplifying its high band would give weight to keys that are hidden")
        return amplified(pattern, beta, tau)

    return edit


def high_band(length: int, tau: float) -> Tensor:
    """Which DFT indices of ``length`` lie within ``tau`` of ``length / 2``, ``[length]`` bool; refuses a band with index 0."""
    if tau < 0:
        raise WorkbenchError(f"tau is a distance in DFT indices, not negative; got {tau}")
    index = torch.arange(length)
    band = (index - length / 2).abs() <= tau
    if bool(band[:1].any()):
        raise Refused(f"a high band within {tau:g} of {length}/2 holds frequency 0; take tau below {length / 2:g}")
    return band


def _row_energies(rows: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Energy of each row and its high part."""
    length = rows.shape[-1]
    power = torch.fft.fft(rows, dim=-1).abs().square() / length
    return rows.square().sum(-1), (power * high_band(length, tau).to(rows.device)).sum(-1)


def _energies(layer: Aligned, tau: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Energy, its high part, the high part of shuffled rows and the energy of even ones: means over the real queries of each
    sequence, ``[B, H]``."""
    b, h = layer.shape[:2]
    total, upper, chance, flat = (torch.zeros(b, h, dtype=torch.float64) for _ in range(4))
    lengths = layer.real_keys.sum(1)
    if not bool((layer.real_keys == (torch.arange(layer.shape[3]) < lengths[:, None])).all()):
        raise Refused(f"layer {layer.name!r}: padding between real tokens leaves no frames in a row to transform")
    for _, _, rows in layer.chunks(copies=4):
        for length in lengths[lengths > 0].unique().tolist():
            here = lengths == length
            part = rows[here][..., :length]
            energy, above = _row_energies(part, tau)
            share = float(high_band(length, tau).sum()) / length
            square = part.sum(-1).square()
            mixed = share * (length * energy - square) / max(1, length - 1)
            for into, row in ((total, energy), (upper, above), (chance, mixed), (flat, square / length)):
                into[here] += row.sum(2)
    count = layer.real_queries.sum(1, keepdim=True).clamp(min=1)
    return total / count, upper / count, chance / count, flat / count


ANALYSES = (
    Analysis(
        name="temporal-bands",
        question="How much energy do temporal maps have, and in which frequencies?",
        function=temporal_bands,
        example=lambda: {"source": random_maps(batch=2, causal=False)},
        paper="ByTheWay/BroadWay 2024 (arXiv 2410.06241): energy, bands, beta_c",
        source="maps",
        null="even attention (energy); the keys of every row shuffled, mean over all shuffles (bands)",
        cause="probes.similarity.temporal.motion_edit",
        definition="The DFT runs over the keys of each row; within tau means |f - N/2| <= tau.",
    ),
    Analysis(
        name="temporal-disparity",
        question="How far are the temporal maps of a block from those of the reference block?",
        function=temporal_disparity,
        example=lambda: {"source": random_maps(layers=3, batch=2, causal=False), "reference": 1},
        paper="ByTheWay/BroadWay 2024 (arXiv 2410.06241): disparity from up block 1",
        source="maps",
        null="the disparity of even attention from the same reference",
        cause="probes.similarity.temporal.guided",
        definition="Frobenius norm per head and place; maps of other resolutions are to be averaged over places first.",
    ),
)
