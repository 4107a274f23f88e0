"""Directions of the residual stream, written as sums over what is upstream: components, heads by source, features of coders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model
from workbench.probes.features.feature_attribution import Component, site_of
from workbench.probes.features.stream import Layer, Point, Stream
from workbench.sites import Site

if TYPE_CHECKING:
    from workbench.coders.coder import Coder


class Part(NamedTuple):
    """One summand: what it is, its layer and ``number`` (head, feature), where it writes, the source that a head reads, its
    value, and what opens it: of heads the direction ``[E]`` of its output that is read."""

    kind: str
    layer: int
    number: int
    position: int
    source: int
    value: float
    opens: Tensor | None = None


class Merged(NamedTuple):
    """All paths added up: ``values`` ``[C, T]`` by component and token, and what biases add."""

    components: tuple[Component, ...]
    values: Tensor
    bias: float


class Upstream:
    """A text in a model up to ``reach``, and the coders whose features stand for what they write."""

    def __init__(
        self, model: Model, text: Any, reach: Point, read: Site, coders: Mapping[str | Site, Coder] | Sequence[Coder]
    ) -> None:
        self.coders = written_by(coders)
        reads = [read]
        for site, (_, source) in self.coders.items():
            if _mlps(site) > reach.mlps:
                raise Refused(f"a coder of {site} writes behind what {read} is made of: nothing of it goes there")
            reads += [source, site]
        self.stream = Stream(model, text, reach, reads=reads)
        self._codes: dict[tuple[Site, int], tuple[list[Part], list[Tensor]]] = {}

    def open(self, part: Part) -> list[Part]:
        """The parts of a head's output: what it read at its source."""
        assert part.opens is not None
        layer = self.stream.layers[part.layer]
        direction, bias = layer.source(part.opens, part.number, part.position, part.source)
        found = self.parts(direction, Point(part.layer, part.layer), part.source)
        return [*found, Part("bias", part.layer, -1, part.source, -1, bias)]

    def parts(self, direction: Tensor, point: Point, t: int) -> list[Part]:
        """What a direction ``[D]`` of the stream at a point reads at t."""
        stream, r = self.stream, direction
        if point.attentions == point.mlps:
            names = [Site("resid_pre", point.mlps), *([Site("resid_post", point.mlps - 1)] if point.mlps else [])]
            for site in names:
                if site in self.coders:
                    return self._features(site, r, t)
        found = [Part("embedding", -1, -1, t, -1, _dot(r, stream.embed[t]))]
        if stream.position is not None:
            found.append(Part("position", -1, -1, t, -1, _dot(r, stream.position[t])))
        bias = 0.0
        for index in range(point.attentions):
            layer = stream.layers[index]
            found += self.heads(layer, layer.heads_read(r, t), t)
            bias += _dot(r, layer.bias(t))
        for index in range(point.mlps):
            if (site := Site("mlp_out", index)) in self.coders:
                found += self._features(site, r, t)
            elif index in stream.mlps:
                found.append(Part("mlp", index, -1, t, -1, _dot(r, stream.mlps[index][t])))
        return [*found, Part("bias", -1, -1, t, -1, bias)]

    def heads(self, layer: Layer, reads: Tensor, t: int) -> list[Part]:
        """Directions ``[H, E]`` of the heads' outputs at t, by head and source."""
        values = layer.moved(reads, t)
        h, s = values.nonzero(as_tuple=True)
        numbers = values[h, s].double().tolist()
        return [
            Part("head", layer.index, head, t, source, value, reads[head])
            for head, source, value in zip(h.tolist(), s.tolist(), numbers, strict=True)
        ]

    def merged(self, direction: Tensor, point: Point, t: int) -> Merged:
        """A direction ``[D]`` of the stream at a point and position, by component and token, all paths added up."""
        start = direction.new_zeros(self.stream.length, len(direction))
        start[t] = direction
        return self._merged(start, point, 0.0)

    def merged_heads(self, layer: Layer, reads: Tensor, t: int) -> Merged:
        """The same for directions ``[H, E]`` of one layer's head outputs at t."""
        grouped = layer.values_read(reads, t)
        bias = float((grouped.sum(1).double() * layer.v_bias.double()).sum())
        start = torch.einsum("gse,gde->sd", grouped, layer.v) * layer.inverse[:, None]
        return self._merged(start, Point(layer.index, layer.index), bias)

    def _merged(self, r: Tensor, point: Point, bias: float) -> Merged:
        stream, found = self.stream, []
        for index in reversed(range(max(point))):
            if index < point.mlps and index in stream.mlps:
                found.append((Component("mlp", index, -1), (r * stream.mlps[index]).sum(1)))
            if index < point.attentions:
                layer = stream.layers[index]
                every = torch.arange(stream.length, device=r.device)
                bias += float((r * layer.bias(every)).sum(dtype=torch.float64))
                through, moved = layer.back(r)
                r, bias = r + through, bias + moved
        if stream.position is not None:
            found.append((Component("position", -1, -1), (r * stream.position).sum(1)))
        found.append((Component("embedding", -1, -1), (r * stream.embed).sum(1)))
        found.reverse()
        return Merged(tuple(name for name, _ in found), torch.stack([values for _, values in found]), bias)

    def _features(self, site: Site, r: Tensor, t: int) -> list[Part]:
        """A direction of what a coder writes, by its active features, its decoder's bias, its skip and its error."""
        if (site, t) not in self._codes:
            coder, source = self.coders[site]
            given = self.stream.run.acts[source][0, t].detach().flatten()
            own = self.stream.run.acts[site][0, t].detach().to(r)
            if len(given) != coder.reads[0] or len(own) != coder.writes[0]:
                raise WorkbenchError(f"{source} and {site} have widths {len(given)} and {len(own)} in this model; the coder "
                                     f"expects {coder.reads[0]} and {coder.writes[0]}")  # fmt: skip
            x = given[None].to(coder.W_enc.device, coder.W_enc.dtype)
            f = coder.encode(x)[0].detach()
            active = f.nonzero()[:, 0]
            layer = -1 if site.layer is None else site.layer
            vectors = [*(f[active, None] * coder.W_dec.detach()[active]).to(r)]
            parts = [Part("feature", layer, i, t, -1, 0.0) for i in active.tolist()]
            vectors.append(coder.b_dec.detach().to(r))
            parts.append(Part("decoder bias", layer, -1, t, -1, 0.0))
            if coder.W_skip is not None:
                vectors.append((x @ coder.W_skip.detach())[0].to(r))
                parts.append(Part("skip", layer, -1, t, -1, 0.0))
            vectors.append(own - torch.stack(vectors).sum(0))
            parts.append(Part("error", layer, -1, t, -1, 0.0))
            self._codes[site, t] = parts, vectors
        parts, vectors = self._codes[site, t]
        values = (torch.stack(vectors).double() @ r.double()).tolist()
        return [part._replace(value=value) for part, value in zip(parts, values, strict=True)]


def written_by(coders: Mapping[str | Site, Coder] | Sequence[Coder]) -> dict[Site, tuple[Coder, Site]]:
    """Coders by the site that they write, with the site that they read."""
    found: dict[Site, tuple[Coder, Site]] = {}
    if isinstance(coders, Mapping):
        named = [(coder, Site.parse(site)) for site, coder in coders.items()]
    else:
        named = []
        for coder in coders:
            writes = coder.about.get("writes") or coder.about.get("reads")
            if not writes:
                raise WorkbenchError(
                    "a coder does not say what it writes: pass coders={'blocks.1.hook_mlp_out': coder}"
                )
            named.append((coder, Site.parse(writes if isinstance(writes, str | Site) else writes[0])))
    for coder, site in named:
        if site.kind not in ("resid_pre", "resid_post", "mlp_out"):
            raise Refused(
                f"features stand for hook_resid_pre, hook_resid_post or hook_mlp_out; got a coder that writes {site}"
            )
        if site in found:
            raise WorkbenchError(f"two coders write {site}; give one")
        reads = site_of(coder, None if coder.about.get("reads") else site)
        found[site] = coder, reads
    return found


def _mlps(site: Site) -> int:
    """How many MLPs have written where a coder writes."""
    assert site.layer is not None
    return site.layer if site.kind == "resid_pre" else site.layer + 1


def _dot(a: Tensor, b: Tensor) -> float:
    return float(a.double() @ b.double())
