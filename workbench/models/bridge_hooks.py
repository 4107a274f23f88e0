"""Reads, edits and maps of one run of a TransformerLens bridge, through the bridge's own hook points."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from workbench.captures import Capture
from workbench.errors import Refused, WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.hookpoints import attached
from workbench.models.protocol import Edit, Shape
from workbench.models.requests import MAP_KINDS, apply_edits, edited, kept, site_from_map
from workbench.patterns.explicit import ExplicitMap
from workbench.sites import Site

_GATES = {
    "attn.hook_result": "use_attn_result",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
    "hook_mlp_in": "use_hook_mlp_in",
}
_DERIVED = ("result", "q_input", "k_input", "v_input")


def settable(point: HookPoint) -> str | None:
    """The bridge setting without which a hook point never fires; None if it needs none."""
    return next((flag for ending, flag in _GATES.items() if (point.name or "").endswith(ending)), None)


def user_hooks(points: Mapping[str, HookPoint]) -> list[str]:
    """Hook points, each by one name, that carry hooks which the bridge did not put there itself."""
    found: dict[int, str] = {}
    for name, point in points.items():
        placed = [getattr(hook, "__name__", "") for hook in point._forward_hooks.values()]
        if point._backward_hooks or any("_wire_symbolic_hooks" not in made for made in placed):
            found[id(point)] = name
    return list(found.values())


@torch.no_grad()
def probe(
    bridge: Any, points: Mapping[str, HookPoint], ids: Tensor, gates: Callable[[], AbstractContextManager[Any]]
) -> tuple[frozenset[str], frozenset[int], frozenset[str]]:
    """Hook names whose point passes a tensor, with the bridge's settings as they are or all switched on by ``gates``; the
    layers in which the bridge computes attention itself, so that what ``hook_pattern`` passes is what acts; and the names whose
    tensor has batch and positions in one axis, as inside of OPT's blocks. Found by two forward passes over ``ids``: scores,
    pattern and z fire in this order where they depend on each other.
    """
    seen: list[int] = []
    flat: set[int] = set()
    handles = []

    def note(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append(id(module))
            if output.ndim == 2 and len(output) == ids.numel():
                flat.add(id(module))

    try:
        handles += [point.register_forward_hook(note) for point in {id(p): p for p in points.values()}.values()]
        bridge(ids)
        first = {key: at for at, key in reversed(list(enumerate(seen)))}
        with gates():
            bridge(ids)
    finally:
        for handle in handles:
            handle.remove()
    alive = frozenset(name for name, point in points.items() if id(point) in set(seen))
    shown = []
    for layer in range(len(bridge.blocks)):
        names = [f"blocks.{layer}.attn.hook_{kind}" for kind in ("attn_scores", "pattern", "z")]
        order = [first.get(id(points[name]), -1) if name in points else -1 for name in names]
        if -1 < order[0] < order[1] < order[2]:
            shown.append(layer)
    return alive, frozenset(shown), frozenset(name for name, point in points.items() if id(point) in flat)


class Hooks:
    """What one run reads, edits and captures. ``acts`` and ``maps`` fill up while the bridge runs."""

    def __init__(
        self,
        bridge: Any,
        points: Mapping[str, HookPoint],
        reads: Iterable[Site | str],
        edits: Mapping[Site | str, Edit | Tensor],
        request: Capture | None,
        wanted: Iterable[int | str],
        *,
        shape: Shape,
        real: Tensor,
        past: int,
        name: str,
    ) -> None:
        self.acts: dict[Site | str, Tensor] = {}
        self.maps: dict[int | str, AttentionMap] = {}
        self._bridge, self._points, self._request, self._wanted = bridge, points, request, set(wanted)
        self._shape, self._real, self._past, self._name = shape, real, past, name
        self._reads, self._edits = list(reads), dict(edits)
        self._derived = [] if torch.is_grad_enabled() else [key for key in self._reads if self._derivable(key)]
        self._fired: set[Site | str] = set()
        self._scores: dict[int, tuple[Tensor, Tensor]] = {}
        statistics = {
            s.layer for s in self._reads if isinstance(s, Site) and s.kind in MAP_KINDS and s.kind != "pattern"
        }
        self._mapped = sorted(layer for layer in self._wanted | statistics if isinstance(layer, int))

    @property
    def names(self) -> list[str]:
        """Hook names of the run."""
        return [_hook(key) for key in [*self._reads, *self._edits] if key not in self._derived]

    def _derivable(self, key: Site | str) -> bool:
        """Whether a read can be computed beside the run, instead of switching the bridge to a path that computes it."""
        points = self._points
        return (
            isinstance(key, Site)
            and key.kind in _DERIVED
            and all(points[_hook(other)] is not points[key.hook] for other in self._edits if _hook(other) in points)
            and (key.kind != "result" or isinstance(self._w_o(key.layer), Tensor))
        )

    def _w_o(self, layer: int | None) -> Any:
        return getattr(self._bridge.blocks[layer].attn, "W_O", None)

    @contextmanager
    def installed(self, run: object) -> Iterator[None]:
        points = self._points
        tensors: dict[int, tuple[HookPoint, list[Site | str]]] = {}
        for key in [*self._reads, *self._edits]:
            if key not in self._derived and (
                isinstance(key, str) or key.kind not in MAP_KINDS or key.kind == "pattern"
            ):
                point = points[_hook(key)]
                tensors.setdefault(id(point), (point, []))[1].append(key)
        placed: list[tuple[HookPoint, Any]] = []
        for point, keys in tensors.values():
            placed.append((point, self._tensor_hook(keys)))
        for key in self._derived:
            assert isinstance(key, Site)
            source = "attn.hook_z" if key.kind == "result" else "hook_resid_pre"
            placed.append((points[f"blocks.{key.layer}.{source}"], self._derive(key)))
        for layer in self._mapped:
            placed.append((points[f"blocks.{layer}.attn.hook_attn_scores"], self._see_scores(layer)))
            placed.append((points[f"blocks.{layer}.attn.hook_pattern"], self._see_pattern(layer)))
        with attached(placed, run):
            yield

    def finish(self) -> None:
        """Everything that was asked for must have happened."""
        for key in [*self._reads, *self._edits]:
            if key not in self.acts and key not in self._fired:
                raise WorkbenchError(f"{key} was asked for and did not fire in {self._name} with this input")
        for layer in self._wanted:
            if layer not in self.maps:
                raise WorkbenchError(f"layer {layer} of {self._name} was asked for and showed no pattern")

    def _tensor_hook(self, keys: list[Site | str]) -> Callable[..., Any]:
        here = set(keys)
        edits = {key: edit for key, edit in self._edits.items() if key in here}
        reads = [key for key in self._reads if key in here]

        def act(value: Tensor, hook: Any) -> Tensor | None:
            if any(key in self.acts or key in self._fired for key in here):
                raise Refused(
                    f"{hook.name} fired twice in one run of {self._name}; points that run repeatedly are not served"
                )
            new = value
            for key, edit in edits.items():
                new = apply_edits(new, key, {key: edit}) if isinstance(key, Site) else edited(new, key, edit)
                self._fired.add(key)
            for key in reads:
                self.acts[key] = new
                if isinstance(key, Site) and key.head is not None:
                    self.acts[key] = new.select(key.head_axis, key.head)
            # The bridge shows a reshaped copy: gradients reach it only if it is what the bridge goes on with.
            return new if edits or torch.is_grad_enabled() else None

        return act

    def _derive(self, key: Site) -> Callable[..., None]:
        heads = self._shape.kv_heads if key.kind in ("k_input", "v_input") else self._shape.heads

        def act(value: Tensor, hook: Any) -> None:
            if key.kind == "result":
                whole = torch.einsum("bthe,hed->bthd", value, self._w_o(key.layer))
            else:
                whole = value[:, :, None].expand(-1, -1, heads, -1)
            self.acts[key] = whole if key.head is None else whole.select(key.head_axis, key.head)

        return act

    def _see_scores(self, layer: int) -> Callable[..., None]:
        def act(value: Tensor, hook: Any) -> None:
            top, at = value.detach().max(-1, keepdim=True)
            self._scores[layer] = (top, at)

        return act

    def _see_pattern(self, layer: int) -> Callable[..., None]:
        def act(value: Tensor, hook: Any) -> None:
            with torch.no_grad():
                found = self._map(layer, value.detach())
                for key in self._reads:
                    if isinstance(key, Site) and key.layer == layer and key.kind in MAP_KINDS and key.kind != "pattern":
                        self.acts[key] = site_from_map(found, key, self._request)
                if layer in self._wanted and self._request is not None:
                    self.maps[layer] = kept(found, self._request, layer)

        return act

    def _map(self, layer: int, pattern: Tensor) -> AttentionMap:
        queries, keys = pattern.shape[2:]
        blind = ~self._real.to(pattern.device)[:, None].expand(pattern.shape[:3])
        top, at = self._scores[layer]
        lse = (top - pattern.gather(-1, at).log()).squeeze(-1)
        # A query that sees no key has nothing but the most negative number as scores.
        blind = blind | (top.squeeze(-1) <= torch.finfo(top.dtype).min / 2)
        pattern, lse = pattern.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, float("-inf"))
        gone = max(0, self._past + queries - keys)  # keys that a cache with a window dropped
        pattern = torch.nn.functional.pad(pattern, (gone, 0))
        return ExplicitMap(pattern, lse, offset=gone + keys - queries, kv_heads=self._shape.kv_heads)


def _hook(key: Site | str) -> str:
    return key.hook if isinstance(key, Site) else key
