"""At which scales does an attention map vary?

A map of Q real queries and K real keys is taken as an image. Its mean is taken away, and the energy of its two-dimensional
Fourier transform is summed over rings of radius r = sqrt(f_q^2 + f_k^2), with f_q and f_k in cycles per map (radial energy):

    share of the octave from r on  =  sum over r <= |f| < 2 r of |F(A - mean A)[f]|^2  /  sum over all f

Broad windows fill the low octaves. A diagonal has its energy evenly at f_q = -f_k, a single column (a sink) at f_q = 0. By
Parseval the sum over all f, divided by Q K, is the sum of squares of A - mean A, whose mean is ``variance``. A causal mask alone
is a broad pattern with edges; the null, each row's weights at random visible keys, has it too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import Refused
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.similarity.aligned import Aligned, aligned_layers, shuffled
from workbench.probes.sources import Source, provenance_of
from workbench.probes.tables import HeadTable

EXACT = 2048
"""The longer side of a map whose transform is computed."""
FLAT = "a map of equal weights has no energy besides its mean"


def map_frequencies(source: Source, *, size: int | None = None, raw: bool = False) -> HeadTable:
    """Per head the share of energy in each octave of radius, ``from_1``, ``from_2``, ``from_4`` ... cycles per map, and
    ``variance``, the mean square of A - mean A; means over sequences with 95% intervals.

    The null of the shares gives each row's weights to random keys that its query may see. ``size``: of maps of block sums, at
    any length; else maps of more than 2,048 queries or keys are refused. Padding does not count, every sequence has a transform
    of its own. Gated maps count as they act, ``raw`` looks inside the gate. Maps of any sign. NaN for a map of equal weights,
    and in octaves that a smaller layer or a shorter text does not have.
    """
    layers = aligned_layers(source, raw=raw)
    found = {name: _shares(layer, size) for name, layer in layers.items()}
    octaves = max(shares.shape[0] for shares, _, _ in found.values())
    names = [f"from_{2**i}" for i in range(octaves)]
    each = {name: {layer: _at(shares, i) for layer, (shares, _, _) in found.items()} for i, name in enumerate(names)}
    null = {name: {layer: _at(chance, i) for layer, (_, chance, _) in found.items()} for i, name in enumerate(names)}
    flat = {str(layer): FLAT for layer, (_, _, variance) in found.items() if bool((variance == 0).any())}
    return HeadTable.averaged(
        "Radial energy of attention maps",
        each | {"variance": {layer: variance for layer, (_, _, variance) in found.items()}},
        dict.fromkeys(names, "share of the energy") | {"variance": "squared weight"},
        null=null,
        undefined=flat,
        provenance=provenance_of(source),
    )


def radial_energy(image: Tensor) -> Tensor:
    """Energy of ``image`` ``[..., Q, K]`` less its mean, by octave of radius in cycles per map: ``[..., octaves]``, the first
    from 1 to 2. Their sum is the sum of squares of image - mean."""
    queries, keys = image.shape[-2:]
    power = torch.fft.fft2(image - image.mean((-2, -1), keepdim=True)).abs().square() / (queries * keys)
    down, right = (torch.fft.fftfreq(n, dtype=torch.float64) * n for n in (queries, keys))
    radius = (down[:, None].square() + right.square()).sqrt()
    octave = radius.clamp(min=1).log2().floor().long().flatten()
    out = power.new_zeros(*power.shape[:-2], int(octave.max()) + 1)
    return out.index_add_(-1, octave, power.flatten(-2))


def _shares(layer: Aligned, size: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Shares and their null ``[octaves, B, H]``, variance ``[B, H]``."""
    queries, keys = layer.shape[2:]
    if size is None and max(queries, keys) > EXACT:
        raise Refused(
            f"layer {layer.name!r}: a transform of {queries} x {keys} tokens is over the limit of {EXACT}; take size= for "
            "block maps"
        )
    if size is None:
        whole = torch.cat([rows for _, _, rows in layer.chunks()], 2)
        other = torch.cat([_mixed(layer, lo, hi, rows) for lo, hi, rows in layer.chunks(copies=3)], 2)
    else:
        whole, other = layer.block_sums(size), _mixed_sums(layer, size)
    counts = torch.stack([layer.real_queries.sum(1), layer.real_keys.sum(1)], 1)
    counts = -(-counts // (size or 1))
    energies = [
        [radial_energy(part[i, :, : max(1, q), : max(1, k)]) for i, (q, k) in enumerate(counts.tolist())]
        for part in (whole, other)
    ]
    octaves = max(part.shape[-1] for part in energies[0])
    stacked = [
        torch.stack(
            [torch.nn.functional.pad(part, (0, octaves - part.shape[-1]), value=float("nan")) for part in parts]
        )
        for parts in energies
    ]
    total = stacked[0].nansum(-1)
    scale = whole.square().sum((-2, -1))
    variance = torch.where(total > 1e-20 * scale, total, 0.0) / counts.prod(1)[:, None]  # NaN for padding alone
    shares, chance = (
        (part / part.nansum(-1, keepdim=True)).masked_fill(~(variance > 0)[..., None], float("nan")).permute(2, 0, 1)
        for part in stacked
    )
    return shares, chance, variance


def _mixed(layer: Aligned, lo: int, hi: int, rows: Tensor) -> Tensor:
    return shuffled(rows, layer.visible(lo, hi), lo)


def _mixed_sums(layer: Aligned, size: int) -> Tensor:
    b, h, queries, keys = layer.shape
    out = torch.zeros(b, h, -(-queries // size), -(-keys // size), dtype=torch.float64)
    column = torch.nn.functional.one_hot(torch.arange(keys) // size).double()
    for lo, hi, rows in layer.chunks(copies=3):
        out.index_add_(2, torch.arange(lo, hi) // size, _mixed(layer, lo, hi, rows) @ column)
    return out


def _at(shares: Tensor, octave: int) -> Tensor:
    return shares[octave] if octave < len(shares) else torch.full_like(shares[0], float("nan"))


ANALYSES = (
    Analysis(
        name="map-frequencies",
        question="At which scales does an attention map vary?",
        function=map_frequencies,
        example=lambda: {"source": random_maps(batch=2)},
        paper="after critical-band masking, Subramanian et al. 2023 (arXiv 2309.13190)",
        source="maps",
        null="each row's weights at random visible keys",
        definition="octaves of radius in cycles per map are ours",
    ),
)
