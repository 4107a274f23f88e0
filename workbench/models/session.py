"""What one run of a Hugging Face model is asked to look at, and what it has seen so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from workbench.captures import Capture
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.models.layers import AttentionLayer
from workbench.models.masking import Masks, behind
from workbench.models.protocol import Edit
from workbench.models.recorders.choice import Choice
from workbench.models.recorders.gates import gate_of
from workbench.models.recorders.windows import Windows, windows_of
from workbench.models.requests import MAP_KINDS, apply_edits, kept, site_from_map
from workbench.patterns.per_channel import ChannelGatedMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.windows import WindowsMap
from workbench.sites import Site

INPUT_KINDS = ("q", "k", "v", "rot_q", "rot_k")
_GROWING = ("", "text", "decoder")
"""Stacks whose keys a cache keeps, so that queries stand behind them."""


class Session:
    """State of one run. The attention function and the module hooks report here; edits are applied here.

    ``past``: positions in the cache of the run, None without a cache. ``real``: for each stack with padding in it, which of
    its new positions are real, ``[B, T]``. ``cut``: the number of new positions where the model pads its input by itself; sites
    end there.
    """

    def __init__(
        self,
        family: str,
        layers: Sequence[AttentionLayer],
        *,
        request: Capture | None,
        wanted: Sequence[int | str],
        reads: Sequence[Site],
        edits: Mapping[Site, Edit | Tensor],
        served: Mapping[tuple[str, int], frozenset[str]],
        past: int | None,
        real: Mapping[str, Tensor],
        cut: int | None = None,
    ) -> None:
        self.family = family
        self.request = request
        self.reads, self.edits = list(reads), dict(edits)
        self.acts: dict[Site, Tensor] = {}
        self.maps: dict[int | str, AttentionMap] = {}
        self.masks = Masks(family)
        self._past = past
        self._real = real
        self.gates: dict[int, Tensor] = {}
        """Output gates ``[B, Q, H, E]`` of this run by the id of their module, until the map they belong to is built."""
        self.choices: dict[int, Choice] = {}
        """Keys that the layer's own indexer has chosen in this run, in the same way."""
        self.grids: dict[int, tuple[nn.Module, tuple[int, int]]] = {}
        """Block and sides of its image, by the id of the module whose attention is in windows of it."""
        self.ran: set[int] | None = None
        """Ids of the wanted modules whose forward was called, None where nobody looks."""
        self._windows: dict[int, Windows] = {}
        self._cut = cut
        self._layers: dict[int, list[AttentionLayer]] = {}
        for layer in layers:
            self._layers.setdefault(id(layer.module), []).append(layer)
        self._turns: dict[int, int] = {}
        self._served = served
        self._edited: set[Site] = set()
        self._visited: set[Site] = set()
        touched = {site.whole for site in [*self.reads, *self.edits]}
        self._sites = {(s.stack, s.layer, s.kind) for s in touched}
        self._from_maps = [s for s in self.reads if s.kind in MAP_KINDS]
        self._wanted = set(wanted)
        self._mapped = {layer.key for layer in layers if self._in_reads(layer)} | self._wanted

    def _in_reads(self, layer: AttentionLayer) -> bool:
        return any((s.stack, s.layer) == (layer.stack, layer.index) for s in self._from_maps)

    def next_layer(self, module: nn.Module) -> AttentionLayer | None:
        """The layer as which a module runs now: that of its turn, where it is several layers."""
        layers = self._layers.get(id(module))
        if layers is None:
            return None
        turn = self._turns.get(id(module), 0)
        self._turns[id(module)] = turn + 1
        return layers[min(turn, len(layers) - 1)]

    def touches(self, layer: AttentionLayer, kind: str) -> bool:
        """Whether a site of this kind in this layer is read or edited, and is served at the attention function."""
        here = (layer.stack, layer.index)
        return kind in self._served[here] and (*here, kind) in self._sites

    def wants(self, layer: AttentionLayer) -> bool:
        return self.wants_map(layer) or any(self.touches(layer, kind) for kind in (*INPUT_KINDS, "z", "pattern"))

    def wants_map(self, layer: AttentionLayer) -> bool:
        return layer.key in self._mapped

    @property
    def past(self) -> int:
        """Positions in the cache that the run continues from."""
        return self._past or 0

    def real(self, layer: AttentionLayer) -> Tensor | None:
        """Which of the new positions are real, ``[B, T]`` bool; None where all are."""
        return self._real.get(layer.stack)

    def tokens(self, length: int) -> int:
        """Tokens of the input among ``length`` positions, of which the last may be padding that the model has added."""
        return length if self._cut is None else min(length, self._cut)

    # ------------------------------------------------------------- any site

    def visit(self, site: Site, value: Tensor) -> Tensor:
        """Edit and record the tensor of a whole site; returns what the model goes on with."""
        if site in self._visited:
            raise Refused(f"{site} fired twice in one run of {self.family}; modules that run repeatedly are not served")
        self._visited.add(site)
        whole, n = value, self._cut
        if n is not None and value.shape[1] > n:
            value = whole[:, :n]
        edited = apply_edits(value, site, self.edits)
        self.mark(key for key in self.edits if key.whole == site)
        self.record(site, edited)
        if edited is value and not value.requires_grad:
            return whole
        return edited if value is whole else torch.cat([edited, whole[:, n:]], 1)

    def record(self, site: Site, value: Tensor) -> None:
        """Keep the tensor of a whole site for those reads that ask for it or for one of its heads."""
        for key in self.reads:
            if key.whole == site:
                self.acts[key] = value if key.head is None else value.select(key.head_axis, key.head)

    def mark(self, edits: Iterable[Site]) -> None:
        """Note that these edits took place."""
        self._edited |= set(edits)

    # ------------------------------------------------- the attention function

    def on_inputs(self, layer: AttentionLayer, **tensors: Tensor) -> tuple[Tensor, ...]:
        """``q`` ``[B, H, Q, E]``, ``k`` and ``v`` ``[B, G, K, E]`` on their way into the attention function, after edits."""
        for kind in INPUT_KINDS:
            name = kind.removeprefix("rot_")
            if name not in tensors or not self.touches(layer, kind):
                continue
            site = Site(kind, layer.index, stack=layer.stack)
            if name != "q":
                self._check_cached(site)
            tensors[name] = self._visit_tokens(layer, site, tensors[name].transpose(1, 2)).transpose(1, 2)
        return tuple(tensors.values())

    def _check_cached(self, site: Site) -> None:
        if self._past is not None and any(key.whole == site for key in self.edits):
            raise Refused(
                f"editing {site} in a run with a cache would leave the unedited tensor in the cache; "
                "edit without cache, or edit resid_pre"
            )

    def _visit_tokens(self, layer: AttentionLayer, site: Site, value: Tensor) -> Tensor:
        """``visit`` of ``[B, T, H, E]``; in the order of the image where ``value`` comes in windows."""
        windows = self.windows(layer)
        if windows is None:
            return self.visit(site, value)
        return windows.split(self.visit(site, windows.join(value)))

    def windows(self, layer: AttentionLayer) -> Windows | None:
        """Where the windows lie that the layer's tensors come in, None where they come in one piece."""
        key = id(layer.module)
        if key in self.grids and key not in self._windows:
            self._windows[key] = windows_of(*self.grids[key])
        return self._windows.get(key)

    def on_map(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        mask: Mask,
        *,
        scale: float | None,
        softcap: float | None = None,
        sink: Tensor | None = None,
        bias: Any = None,
        lse: Tensor | None = None,
        choice: Choice | None = None,
    ) -> None:
        """Build the layer's map, compute what was asked for, keep it. ``lse`` ``[B, H, Q]`` is that of the model's own kernel,
        for calls without padding, bias, sink, softcap or choice."""
        if self._pattern_edits(layer):
            return
        lse = None if choice is not None else lse
        executed = self.softmax(layer, q, k, mask, scale=scale, softcap=softcap, sink=sink, bias=bias, lse=lse)
        self._keep(layer, executed if choice is None else choice.map(executed))

    def softmax(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        mask: Mask,
        *,
        scale: float | None,
        softcap: float | None = None,
        sink: Tensor | None = None,
        bias: Any = None,
        lse: Tensor | None = None,
    ) -> SoftmaxMap:
        """The softmax of queries ``[B, H, Q, E]`` and keys ``[B, G, K, E]`` of a layer, without its padded rows and with the
        positions that a cache has dropped."""
        with torch.no_grad():
            q, k = q.detach(), k.detach()
            real = self._real.get(layer.stack)
            if real is not None and real.shape == (q.shape[0], q.shape[2]):
                mask = replace(mask, queries=real.to(q.device))
            if any(part is not None for part in (mask.queries, mask.keys, mask.dense, bias, sink, softcap)):
                lse = None
            q, k = _own(q), k.clone() if self._past is not None else _own(k)  # the cache may go on in place
            if self._past is not None:
                gone = self._gone(layer, q.shape[2], k.shape[2])
                if gone:
                    mask, k = behind(mask, gone, k.shape[2]), pad(k, (0, 0, gone, 0))
                    bias = pad(bias, (gone, 0)) if isinstance(bias, Tensor) and bias.shape[-1] > 1 else bias
            return SoftmaxMap(q, k, lse, mask=mask, scale=scale, softcap=softcap, sink=sink, bias=bias)

    def _gone(self, layer: AttentionLayer, queries: int, keys: int) -> int:
        """Keys that a cache with a window has dropped: maps count positions from 0 all the same."""
        return max(0, self._past + queries - keys) if self._past is not None and layer.stack in _GROWING else 0

    def _keep(self, layer: AttentionLayer, found: AttentionMap) -> None:
        if layer.key in self.maps:
            raise Refused(f"layer {layer.key} of {self.family}: {layer.name} ran twice in one run; its maps would mix")
        with torch.no_grad():
            windows = self.windows(layer)
            if windows is not None:
                found = WindowsMap(found, windows.places)
            held = found = self._gated(layer, found)
            if layer.key in self._wanted and self.request is not None:
                held = kept(found, self.request, layer.key)
            for site in self._from_maps:
                if (site.stack, site.layer) == (layer.stack, layer.index):
                    self.acts[site] = site_from_map(found, site, self.request)
            self.maps[layer.key] = held if layer.key in self._wanted else found

    def _gated(self, layer: AttentionLayer, found: AttentionMap) -> AttentionMap:
        """The map that acts: gated where the layer multiplies its output by a gate that ``gating`` reads."""
        if layer.route != "attention interface" or gate_of(layer.module) is None:
            return found
        gate = self.gates.pop(id(layer.module), None)
        if gate is None or tuple(gate.transpose(1, 2).shape[:3]) != tuple(found.shape[:3]):
            raise WorkbenchError(
                f"layer {layer.key} of {self.family}: {layer.name} did not make its output gate as expected"
            )
        return ChannelGatedMap(found, gate.transpose(1, 2))

    def on_values(self, layer: AttentionLayer, values: Tensor) -> Tensor:
        """Values ``[B, T, G, E]`` on their way into a recorded mixer, after edits."""
        if not self.touches(layer, "v"):
            return values
        site = Site("v", layer.index, stack=layer.stack)
        self._check_cached(site)
        return self._visit_tokens(layer, site, values)

    def on_built(self, layer: AttentionLayer, found: AttentionMap) -> None:
        """The map of a layer, ready made by its recorder."""
        self._keep(layer, found)

    def on_pattern(self, layer: AttentionLayer, weights: Tensor | None, v: Tensor, output: Tensor, base: str) -> Tensor:
        """The pattern of an eager layer ``[B, H, Q, K]``: read with its graph, and edited by recomputing the output."""
        site = Site("pattern", layer.index, stack=layer.stack)
        edits = self._pattern_edits(layer)
        if weights is None:
            if edits:
                raise Refused(
                    f"{site} cannot be edited: attention {base!r} of {self.family} never builds the pattern; load the "
                    "model with attn_implementation='eager' to edit it, or edit hook_z"
                )
            return output
        if not self.touches(layer, "pattern"):
            return output
        values = v.repeat_interleave(weights.shape[1] // v.shape[1], dim=1)
        if edits and not _product(weights, values, output):
            raise Refused(
                f"{site} cannot be edited: the eager attention of {self.family} does more than multiply the values by its "
                "pattern; edit hook_z"
            )
        gone = self._gone(layer, *weights.shape[2:])
        windows = self.windows(layer)
        shown = pad(weights, (gone, 0)) if gone else weights
        new = apply_edits(shown if windows is None else windows.spread(shown), site, self.edits)
        self.record(site, new)
        if not edits:
            return output
        self.mark(edits)
        if windows is not None:
            new = windows.gather(new, site)
        if self.wants_map(layer):
            offset = self._past if self._past is not None and layer.stack in _GROWING else 0
            self._keep(layer, AttentionMap.from_dense(new.detach(), offset=offset, kv_heads=v.shape[1]))
        return (new[..., gone:].to(values.dtype) @ values).transpose(1, 2).contiguous()

    def _pattern_edits(self, layer: AttentionLayer) -> list[Site]:
        site = Site("pattern", layer.index, stack=layer.stack)
        return [key for key in self.edits if key.whole == site]

    def on_output(self, layer: AttentionLayer, output: Any) -> Any:
        """Output of the attention function, ``[B, Q, H, E]``."""
        if not self.touches(layer, "z"):
            return output
        return self._visit_tokens(layer, Site("z", layer.index, stack=layer.stack), output)

    # ------------------------------------------------------------- at the end

    def finish(self, layers: Sequence[AttentionLayer]) -> None:
        """Everything that was asked for must have happened."""
        for layer in layers:
            if layer.key in self._wanted and layer.key not in self.maps and not self._left_out(layer):
                raise WorkbenchError(
                    f"layer {layer.key} of {self.family} ({layer.name}) did not run its attention with this input; "
                    "name the layers that do with maps=capture(layers=[...])"
                )
        if self._wanted and not self.maps:
            raise WorkbenchError(f"no layer of {self.family} ran its attention with this input")
        for site in self.reads:
            if site not in self.acts:
                raise WorkbenchError(f"{site} was asked for and did not run in {self.family} with this input")
        for site in self.edits:
            if site not in self._edited:
                raise WorkbenchError(f"the edit of {site} never ran in {self.family} with this input")

    def _left_out(self, layer: AttentionLayer) -> bool:
        """Whether the layer was not asked for by name and belongs to a stack that this input does not reach at all."""
        if self.request is None or self.request.layers is not None or self.ran is None:
            return False
        stack = (id(other.module) for turns in self._layers.values() for other in turns if other.stack == layer.stack)
        return not self.ran.intersection(stack)


def _own(part: Tensor) -> Tensor:
    """The tensor without the rest of what it is a view of: a map must not keep the values that lie beside fused q and k."""
    return part.clone() if part.untyped_storage().nbytes() > part.numel() * part.element_size() else part


def _product(weights: Tensor, values: Tensor, output: Tensor) -> bool:
    """Whether ``output`` ``[B, Q, H, E]`` is nothing but the weights times the values, up to rounding."""
    found = (weights.to(values.dtype) @ values).transpose(1, 2)
    tolerance = torch.finfo(values.dtype).eps ** 0.5 * output.abs().max()
    return bool(((found - output).abs() <= tolerance).all())
