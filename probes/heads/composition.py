"""Which heads read what which earlier heads write?

Composition scores (Elhage et al. 2021): with W_OV = W_V W_O of the writer and W_QK = W_Q W_K^T, W_OV' of the reader,

    Q   |W_OV W_QK|    / (|W_OV| |W_QK|)         the queries read it
    K   |W_OV W_QK^T|  / (|W_OV| |W_QK|)         the keys read it
    V   |W_OV W_OV'|   / (|W_OV| |W_OV'|)        the values read it

in Frobenius norms: 1 for matrices of rank one that meet, 1 / sqrt(E) for E equal singular values that all meet. No D x D
matrix is built: |W_V X| = |R X| with W_V = (orthonormal) R, so every factor has E rows and every
pair of heads costs an E x E product.

Null: the same matrices turned against each other at random. Over rotations U the mean square of |A U B| is |A|^2 |B|^2 / D, so
the null score is 1 / sqrt(D). ``z`` is for the squared score, in standard deviations sqrt(2 p_A p_B) / D with
p = sum s^4 / (sum s^2)^2 of the singular values s, which is what D x D blocks with independent Gaussian entries give (good for
E << D). Rotary positions, biases and the sizes that norms divide by play no part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName
from workbench.models.protocol import Model
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled
from workbench.probes.heads.circuits import provenance_of_weights
from workbench.probes.heads.weights import PER, HeadWeights, grouped, weight_layers
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

CHANNELS = ("q", "k", "v")


class Pair(NamedTuple):
    """A head that writes and one that reads it."""

    channel: str
    writer: tuple[int, int]
    reader: tuple[int, int]
    value: float
    z: float


@dataclass(frozen=True)
class Composition(Result):
    """``value`` and ``z``: channel (``q``, ``k``, ``v``) -> ``[L, H, L, H]`` from writer to reader, NaN unless the writer's layer
    is the earlier one. ``null`` is 1 / sqrt(D). ``layers`` are the numbers of the layers; H counts groups of heads where
    ``per`` is not ``query``."""

    value: Mapping[str, Tensor]
    z: Mapping[str, Tensor]
    null: float
    layers: tuple[int, ...]
    per: str = "query"
    undefined: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("weights"))

    def frame(self) -> pd.DataFrame:
        """One row per pair and channel: ``channel, writer_layer, writer_head, reader_layer, reader_head, value, null, z``."""
        import pandas as pd

        parts = []
        for channel, value in self.value.items():
            a, h, b, g = self._pairs(value)
            at = (a, h, b, g)
            layers = torch.tensor(self.layers)
            columns = {"writer_layer": layers[a], "writer_head": h, "reader_layer": layers[b], "reader_head": g}
            numbers = {"value": value[at], "null": torch.full(a.shape, self.null), "z": self.z[channel][at]}
            parts.append(pd.DataFrame({"channel": channel} | {k: v.numpy() for k, v in (columns | numbers).items()}))
        return pd.concat(parts, ignore_index=True)

    def top(self, channel: str, n: int | None = None) -> list[Pair]:
        """Pairs of heads with a score, largest first."""
        value, z = self._channel(channel), self.z[channel]
        flat = value.flatten()
        order = flat.nan_to_num(nan=-1.0).argsort(descending=True)[: int(flat.isfinite().sum())][:n]
        found = []
        for index in order.tolist():
            a, h, b, g = (int(i) for i in torch.unravel_index(torch.tensor(index), value.shape))
            score, gap = float(flat[index]), float(z.flatten()[index])
            found.append(Pair(channel, (self.layers[a], h), (self.layers[b], g), score, gap))
        return found

    def plot(self, ax: Axes | None = None, channel: str = "k") -> Axes:
        """Writer x reader heat map of one channel."""
        value = self._channel(channel)
        heads = value.shape[1]
        grid = value.flatten(2).flatten(0, 1)
        ax = axis(ax, 5.2, 4.4)
        image = ax.imshow(grid.numpy(), cmap="viridis", vmin=0)
        ticks = [i * heads for i in range(len(self.layers))]
        for axes in (ax.xaxis, ax.yaxis):
            axes.set_ticks(ticks, [f"{layer}.0" for layer in self.layers])
        ax.set(xlabel="head that reads", ylabel="head that writes")
        ax.set_title(f"{channel.upper()}-composition\n{self.provenance.model}")
        ax.figure.colorbar(image, ax=ax, label=f"share of the norms (by chance {self.null:.2g})")
        return ax

    def _channel(self, channel: str) -> Tensor:
        if channel not in self.value:
            raise UnknownName("composition channel", channel, self.value)
        return self.value[channel]

    @staticmethod
    def _pairs(value: Tensor) -> tuple[Tensor, ...]:
        layers, heads = value.shape[:2]
        order = torch.arange(layers)
        earlier = (order[:, None] < order)[:, None, :, None].expand(layers, heads, layers, heads)
        return torch.where(earlier)


@torch.no_grad()
def composition(model: Model, *, channels: Sequence[str] = CHANNELS, per: str = "query") -> Composition:
    """Q-, K- and V-composition of every two heads of different layers, from the weights alone.

    ``per``: ``query`` heads, or ``kv`` / ``kv-max`` for the mean / largest over the heads that share keys and values, of writers
    and of readers. A head whose weights are zero has no score. Layers without projections are left out and named in
    ``undefined``; one with other head counts is refused.
    """
    channels = (channels,) if isinstance(channels, str) else tuple(channels)
    for channel in channels:
        if channel not in CHANNELS:
            raise UnknownName("composition channel", channel, CHANNELS)
    if per not in PER:
        raise UnknownName("grouping of heads", per, PER)
    layers, undefined = weight_layers(model)
    if len({(*w.q.shape, *w.k.shape, *w.o.shape) for w in layers.values()}) > 1:
        raise Refused(f"{model.name}: layers have different head counts or widths")
    writers = [_writer(w) for w in layers.values()]
    readers = {channel: [_reader(w, channel) for w in layers.values()] for channel in channels}
    first = next(iter(layers.values()))
    heads, width, groups = len(first.q), first.q.shape[1], len(first.k)
    count = heads if per == "query" else groups
    shape = (len(layers), count, len(layers), count)
    value = {c: torch.full(shape, float("nan"), dtype=torch.float64) for c in channels}
    z = {c: torch.full(shape, float("nan"), dtype=torch.float64) for c in channels}
    for b in range(len(layers)):
        for channel, made in readers.items():
            for a in range(b):
                scores, gaps = _scores(writers[a], made[b], width)
                for store, found in ((value, scores), (z, gaps)):
                    rows = grouped(found, groups, per)
                    store[channel][a, :, b] = grouped(rows.T, groups, per).T
    if any(bool(value[c][:-1, :, -1].isnan().any()) for c in channels if len(layers) > 1):
        undefined["heads"] = "heads whose weights are zero have no share to read or to write"
    return Composition(value, z, width**-0.5, tuple(layers), per, undefined, provenance_of_weights(model))


class _Factor(NamedTuple):
    """One side of the products, ``[H, E, D]``, with |.|^2 and sum s^4 of the whole matrix ``[H]``."""

    rows: Tensor
    square: Tensor
    fourth: Tensor


def _factor(rows: Tensor) -> _Factor:
    gram = rows.double() @ rows.double().transpose(1, 2)
    return _Factor(rows, torch.diagonal(gram, dim1=1, dim2=2).sum(1), gram.square().sum((1, 2)))


def _triangle(weight: Tensor) -> Tensor:
    """R with ``weight [H, D, E] = (orthonormal) R``."""
    return torch.linalg.qr(weight.float() if weight.dtype.itemsize < 4 else weight).R.to(weight.dtype)


def _writer(weights: HeadWeights) -> _Factor:
    return _factor(_triangle(weights.v)[weights.groups] @ weights.o)


def _reader(weights: HeadWeights, channel: str) -> _Factor:
    at = weights.groups
    q, k, v, o = weights.q, weights.k[at], weights.v[at], weights.o
    if channel == "q":
        return _factor(_triangle(weights.k)[at] @ q.transpose(1, 2))
    if channel == "k":
        return _factor(_triangle(q) @ k.transpose(1, 2))
    return _factor(_triangle(o.transpose(1, 2)) @ v.transpose(1, 2))


def _scores(writer: _Factor, reader: _Factor, width: int) -> tuple[Tensor, Tensor]:
    """Scores and their z ``[H, H]`` of all heads of two layers, a head that writes at a time."""
    right = reader.rows.flatten(0, 1).T
    heads = len(reader.rows)
    square = torch.stack([(rows @ right).double().square().sum(0).view(heads, -1).sum(1) for rows in writer.rows]) / (
        writer.square[:, None] * reader.square
    )
    p_writer, p_reader = (part.fourth / part.square.square() for part in (writer, reader))
    deviation = (2 * p_writer[:, None] * p_reader).sqrt() / width
    return square.sqrt().cpu(), ((square - 1 / width) / deviation).cpu()


ANALYSES = (
    Analysis(
        name="composition",
        question="Which heads read what which earlier heads write?",
        function=composition,
        example=lambda: {"model": bundled("tiny-softmax")},
        paper="Elhage et al. 2021, A Mathematical Framework for Transformer Circuits",
        source="model",
        null="the same matrices turned against each other at random: 1 / sqrt(D)",
        definition="z of the squared score by Gaussian approximation; norms folded in, rotary positions left out",
    ),
)
