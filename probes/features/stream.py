"""One text through a model as a sum: what every component adds to the residual stream, with norms and patterns as they were.

The stream at a point is the embedding plus what each attention layer and each MLP before it added. With the pattern A and the
sizes of norms held, head h of layer l at position t is a sum over source positions s,

    out_h(t) = sum_s A[h, t, s] v[h, s] W_O^h / after(t),      v[h, s] = L(x(s)) W_V^h / size(s) + b_V^h,

and what a direction r of the stream reads of it can be followed back to the stream at s. Nothing here is approximate: the map is
the model's own, whatever mixer made it, and it is checked against the model's own head outputs wherever it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workbench.captures import capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.maps import AttentionMap
from workbench.models.protocol import Model
from workbench.patterns.per_channel import ChannelGatedMap, PerChannelMap
from workbench.probes.features.layer_weights import LayerWeights, Norm, last_norm, layer_weights
from workbench.probes.heads.weights import positions as position_table
from workbench.run import Run
from workbench.sites import Site

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""Largest relative difference between a sum and the model's own number that counts as rounding; norms of transformers compute in
float32 in models of float64 too."""
_ROWS = 256


class Point(NamedTuple):
    """A place of the stream: how many attention layers and how many MLPs have written to it."""

    attentions: int
    mlps: int


class Layer:
    """The attention layer of one run. ``values`` ``[G, T, E]``, ``z`` ``[T, H, E]``, ``out`` ``[T, D]`` and ``map`` are the
    model's own; ``v`` ``[G, D, E]`` reads the stream and ``o`` ``[H, E, D]`` writes to it, but for the sizes ``inverse`` and
    ``out_inverse`` ``[T]`` of the norms around them."""

    def __init__(self, model: Model, index: int, run: Run) -> None:
        self.index, self.where = index, f"layer {index} of {model.name}"
        acts = run.acts
        z = acts[Site("z", index)][0].detach()
        self.kind, work = z.dtype, working_dtype(z.dtype)
        self.z = z.to(work)
        values = acts[Site("v", index)][0].detach()
        self.values = values.transpose(0, 1).to(work)
        self.map: AttentionMap = run.maps[index]
        self.heads, self.groups = self.z.shape[1], len(self.values)
        if self.values.shape[1] != len(z):
            raise Refused(f"{self.where} keeps {self.values.shape[1]} values for {len(z)} tokens")
        self._rows: dict[int, Tensor] = {}

    def connect_output(self, weights: LayerWeights, out: Tensor) -> None:
        """Learn how the layer writes ``out`` ``[T, D]``; refused if it is not its heads' z through W_O."""
        work = self.z.dtype
        self.weights, self.out = weights, out.to(work)
        o = weights.o.to(work)
        raw = self.z.flatten(1) @ o.flatten(0, 1) + weights.o_bias.to(work)
        self.out_inverse = weights.after.sizes(raw, self.where)
        self.o = weights.after.fold.linear(o)
        every = torch.arange(len(self.z), device=self.z.device)
        made = self.written(self.z) + self.bias(every)
        agrees(self.out, made, f"{self.where}: its output is not its heads' z through W_O", self.kind)

    def connect_input(self, weights: LayerWeights, x: Tensor) -> None:
        """Learn how the layer reads the stream ``x`` ``[T, D]``; refused if its values are no projection of it."""
        work, fold = self.z.dtype, weights.before.fold
        v = weights.v.weight.to(work)
        self.inverse = weights.before.sizes(x.to(work), self.where)
        self.v = fold.into(v)
        self.v_bias = torch.einsum("d,gde->ge", fold.shift.to(work), v) + weights.v.bias.to(work)
        made = self.read(x.to(work)) + self.v_bias[:, None]
        agrees(self.values, made, f"{self.where}: its values are no projection of the normed stream", self.kind)

    def read(self, x: Tensor) -> Tensor:
        """Values ``[G, T, E]`` of streams ``[T, D]`` with the sizes of this run, without biases."""
        return torch.einsum("td,gde->gte", x * self.inverse[:, None], self.v)

    def written(self, z: Tensor) -> Tensor:
        """What head outputs ``[T, H, E]`` of all positions add to the stream ``[T, D]``, without biases."""
        return (z.flatten(1) @ self.o.flatten(0, 1)) * self.out_inverse[:, None]

    def bias(self, t: Tensor | int) -> Tensor:
        """What the layer adds at positions t whatever its heads do, ``[..., D]``."""
        after = self.weights.after.fold
        constant = after.linear(self.weights.o_bias.to(self.o))
        return constant * self.out_inverse[t][..., None] + after.shift.to(self.o)

    def heads_read(self, direction: Tensor, t: int) -> Tensor:
        """A direction ``[..., D]`` of what the layer writes at t, as one of its head outputs: ``[..., H, E]``."""
        return torch.einsum("...d,hed->...he", direction, self.o) * self.out_inverse[t]

    def row(self, t: int) -> Tensor:
        """Row t of the map, ``[H, S]``, or ``[H, S, E]`` where channels have weights of their own; checked against the model's
        own head outputs at t."""
        if t not in self._rows:
            if len(self._rows) >= _ROWS:
                self._rows.clear()
            row = self._made(t).to(self.z.dtype)
            if row.shape[1] != self.values.shape[1]:
                raise Refused(f"{self.where}: its map has {row.shape[1]} keys for {self.values.shape[1]} values")
            own = self._summed(row, self.values)
            agrees(self.z[t], own, f"{self.where}: head outputs are not the map times the values", self.kind)
            self._rows[t] = row
        return self._rows[t]

    def _made(self, t: int) -> Tensor:
        amap = self.map
        if not amap.channelwise:
            return amap.rows(t, t + 1)[0, :, 0]
        if isinstance(amap, ChannelGatedMap):
            return amap.raw.rows(t, t + 1)[0, :, 0, :, None] * amap.channel_gate[0, :, t, None]
        if isinstance(amap, PerChannelMap):
            return amap.inner.rows(t, t + 1)[0, :, 0].unflatten(0, (self.heads, -1)).transpose(1, 2)
        raise Refused(f"{self.where} has a {type(amap).__name__} for every channel: no weights of single sources")

    def _summed(self, row: Tensor, values: Tensor) -> Tensor:
        """Values ``[G, S, E]`` by a row: ``[H, E]``."""
        if row.ndim == 2:
            return torch.einsum("gms,gse->gme", row.unflatten(0, (self.groups, -1)), values).flatten(0, 1)
        return (row * values.repeat_interleave(self.heads // self.groups, 0)).sum(1)

    def moved(self, reads: Tensor, t: int) -> Tensor:
        """What directions ``[..., H, E]`` of the head outputs at t read from every source: ``[..., H, S]``."""
        row = self.row(t)
        if row.ndim == 2:
            grouped = reads.unflatten(-2, (self.groups, -1))
            return torch.einsum("...gme,gse->...gms", grouped, self.values).flatten(-3, -2) * row
        return torch.einsum(
            "...he,hse->...hs", reads, row * self.values.repeat_interleave(self.heads // self.groups, 0)
        )

    def values_read(self, reads: Tensor, t: int) -> Tensor:
        """Directions ``[H, E]`` of the head outputs at t as directions of the values, ``[G, S, E]``."""
        row = self.row(t)
        if row.ndim == 2:
            return torch.einsum("gms,gme->gse", *(x.unflatten(0, (self.groups, -1)) for x in (row, reads)))
        return (row * reads[:, None]).unflatten(0, (self.groups, -1)).sum(1)

    def back(self, directions: Tensor) -> tuple[Tensor, float]:
        """Directions ``[T, D]`` of what the layer writes at every position, as directions of the stream in front of it, through
        all heads, and the part of the values' biases."""
        reads = torch.einsum("td,hed->hte", directions * self.out_inverse[:, None], self.o)
        found = self.map.rmatvec(reads[None])[0].to(self.z.dtype)
        bias = float((found.sum(1).double() * self.v_bias.double()).sum())
        return torch.einsum("gte,gde->td", found, self.v) * self.inverse[:, None], bias

    def source(self, reads: Tensor, head: int, t: int, s: int) -> tuple[Tensor, float]:
        """The direction ``[D]`` of the stream in front of the layer at source s that one head's ``[E]`` at t reads, and the part
        of biases."""
        reads = reads * self.row(t)[head, s]
        group = head // (self.heads // self.groups)
        return (self.v[group] @ reads) * self.inverse[s], float(self.v_bias[group].double() @ reads.double())


class Stream:
    """A text in a model up to a point. ``embed`` ``[T, D]``, ``position`` (where learned positions are added to it) and
    ``mlps[l]`` ``[T, D]`` are what was added; ``layers[l]`` the attention layers. ```deep=False`` knows head outputs and values
    of the ``only`` layer alone and no stream, which any model can tell that serves them."""

    def __init__(
        self,
        model: Model,
        text: Any,
        point: Point,
        *,
        reads: Sequence[Site] = (),
        only: int | None = None,
        maps: Sequence[int] = (),
    ) -> None:
        self.model, self.point = model, point
        self._deep = only is None
        layers = list(range(point.attentions)) if only is None else [only]
        shown = model.shape.layers
        if any(not 0 <= layer < shown for layer in layers) or point.mlps > shown:
            raise WorkbenchError(
                f"{model.name} has layers 0 to {shown - 1}; asked for {max([*layers, point.mlps - 1])}"
            )
        wanted = [*reads, *(Site(kind, layer) for layer in layers for kind in ("v", "z"))]
        served = set(map(str, model.manifest().sites))
        table = None
        if self._deep:
            table = position_table(model, 1)
            wanted += [Site("resid_pre", layer) for layer in range(max(1, point.attentions))]
            wanted += [Site("attn_out", layer) for layer in layers]
            wanted += [site for layer in layers if str(site := Site("resid_mid", layer)) in served]
            self._has_mlp = [layer for layer in range(point.mlps) if str(Site("mlp_out", layer)) in served]
            wanted += [Site("mlp_out", layer) for layer in self._has_mlp]
            wanted += [Site("resid_post", point.mlps - 1)] if point.mlps else []
            wanted += [Site("embed")] if table is not None else []
        with torch.no_grad():
            mapped = sorted({*layers, *maps})
            request = capture(keep=True, layers=mapped) if mapped else None
            run = model.run(text, read=list(dict.fromkeys(wanted)), maps=request, logits=None)
        self.run = run
        if len(run.tokens.ids) != 1 or not bool(run.tokens.mask.all()):
            raise WorkbenchError("attributions are of one text without padding; got a batch or a padded text")
        self.layers = {layer: Layer(model, layer, run) for layer in layers}
        first = run.acts[wanted[0]] if wanted else run.tokens.ids
        self.length = first.shape[1]
        labels = run.tokens.labels
        self.tokens = labels[0] if labels else tuple(map(str, run.tokens.ids[0].tolist()))
        if self._deep:
            self._connect(table)

    def _connect(self, table: Tensor | None) -> None:
        """Everything that was added to the stream, checked to sum to it."""
        model, point = self.model, self.point
        x = self._act(Site("resid_pre", 0))
        self.width, self.dtype = x.shape[1], x.dtype
        kind = self.run.acts[Site("resid_pre", 0)].dtype
        self.embed, self.position = x, None
        if table is not None:
            self.embed = self._act(Site("embed"))
            self.position = x - self.embed
        self.mlps = {layer: self._act(Site("mlp_out", layer)) for layer in self._has_mlp}
        self.weights: dict[int, LayerWeights] = {}
        for layer in range(point.attentions):
            self.weights[layer] = layer_weights(model, layer)
            out = self._act(Site("attn_out", layer))
            self.layers[layer].connect_output(self.weights[layer], out)
            self.layers[layer].connect_input(self.weights[layer], self.before(layer))
            x = x + out
            if (site := Site("resid_mid", layer)) in self.run.acts:
                agrees(
                    self._act(site),
                    x,
                    f"layer {layer} of {model.name}: the stream behind the attention is no sum",
                    kind,
                )
            if layer in self.mlps:
                x = x + self.mlps[layer]
            after = Site("resid_pre", layer + 1)
            after = after if after in self.run.acts else Site("resid_post", layer)
            if after in self.run.acts and (layer in self.mlps or layer < point.mlps):
                agrees(
                    self._act(after),
                    x,
                    f"layer {layer} of {model.name}: the stream behind it is no sum of its parts",
                    kind,
                )

    def _act(self, site: Site) -> Tensor:
        found = self.run.acts[site][0].detach()
        return found.to(working_dtype(found.dtype))

    def before(self, layer: int) -> Tensor:
        """The stream in front of a layer, ``[T, D]``."""
        return self._act(Site("resid_pre", layer))

    def at(self, point: Point) -> Tensor:
        """The stream ``[T, D]`` at a point."""
        if point.attentions == point.mlps:
            site = Site("resid_pre", point.mlps)
            return self._act(site) if site in self.run.acts else self._act(Site("resid_post", point.mlps - 1))
        return self.before(point.mlps) + self.layers[point.mlps].out

    def norm_at(self, site: Site) -> tuple[Norm, Point]:
        """The norm whose output is ``site``, and where in the stream its input is."""
        if site.kind == "final_norm":
            return last_norm(self.model, self.embed), Point(self.model.shape.layers, self.model.shape.layers)
        assert site.layer is not None
        weights = self.weights.get(site.layer) or layer_weights(self.model, site.layer)
        if site.kind == "attn_norm":
            return weights.before, Point(site.layer, site.layer)
        return weights.mlp, Point(site.layer + 1, site.layer)

    def check_position(self, position: int, what: str = "position") -> int:
        """A position as it counts from 0; negative ones count from the end."""
        if isinstance(position, bool) or not isinstance(position, int) or not -self.length <= position < self.length:
            raise UnknownName(what, position, [f"0 to {self.length - 1}"])
        return position % self.length


def point_of(site: Site) -> Point | None:
    """Where in the stream a site is, None if it is not on it."""
    layer = site.layer or 0
    places = {
        "resid_pre": Point(layer, layer),
        "attn_norm": Point(layer, layer),
        "resid_mid": Point(layer + 1, layer),
        "mlp_in": Point(layer + 1, layer),
        "mlp_norm": Point(layer + 1, layer),
        "resid_post": Point(layer + 1, layer + 1),
    }
    return places.get(site.kind)


def agrees(own: Tensor, made: Tensor, message: str, kind: torch.dtype) -> None:
    """Refuse unless two tensors of a model of dtype ``kind`` are the same but for rounding."""
    off, size = float((own.double() - made.double()).abs().max()), float(own.abs().max())
    if not off <= TOLERANCE.get(kind, 3e-2) * max(size, 1e-3):
        raise Refused(f"{message} (off by {off:.2g} of {size:.2g})")
