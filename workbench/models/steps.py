"""What attention layers see while a model generates: one query row and one key row per step, nothing computed.

A cache with a window drops keys, so rows are kept as they come; one pass at the end makes the map of all steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.models.layers import AttentionLayer
from workbench.models.masking import Masks, allowed
from workbench.patterns.softmax import SoftmaxMap


@dataclass(frozen=True)
class Call:
    """The last row of one call of the attention function: its mask as it was passed, positions and keys at that time, other
    arguments."""

    mask: Any
    seen: int
    keys: int
    args: tuple[Any, ...]
    options: Mapping[str, Any]


class LayerSteps:
    """One attention layer through a generation. ``add`` runs in every step and must stay cheap."""

    def __init__(self, layer: AttentionLayer, kernel: Callable[..., Any], prompt: int, wanted: bool) -> None:
        self.layer, self.kernel, self.wanted = layer, kernel, wanted
        self.seen, self._prompt = 0, prompt
        self.queries: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.gates: list[Tensor] = []
        """Output gates ``[B, 1, H, E]`` of the queries, where the layer has one."""
        self.first: Call | None = None
        self._last: tuple[Any, ...] = ()

    def add(
        self,
        query: Tensor,
        key: Tensor,
        mask: Any,
        args: tuple[Any, ...],
        options: Mapping[str, Any],
        gate: Tensor | None = None,
    ) -> None:
        """Keep the new keys, and the query (and its output gate) of the newest position once the prompt is through."""
        rows = len(self.queries)
        self._add(query, key, mask, args, options)
        if gate is not None and len(self.queries) > rows:
            self.gates.append(gate[:, -1:].clone())

    def _add(self, query: Tensor, key: Tensor, mask: Any, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        if self.first is not None:
            if query.shape[2] != 1:
                raise Refused(
                    f"layer {self.layer.key}: a step ran it on {query.shape[2]} positions: it runs more than once, or the "
                    "model guesses ahead (assisted decoding); leave the layer out, or generate without guesses"
                )
            self.keys.append(key[:, :, -1:].clone())
            self.queries.append(query)
            self.seen += 1
            self._last = mask, key.shape[2], args, options
            return
        if self.seen:
            self.keys.append(key[:, :, -query.shape[2] :].clone())
            self.seen += query.shape[2]
        else:
            self.keys.append(key.clone())
            self.seen = key.shape[2]
        if self.seen > self._prompt:
            raise Refused(
                f"layer {self.layer.key}: the cache shows {self.seen} keys for a prompt of {self._prompt}: it has fixed places "
                "(a static cache) or holds another text; leave cache_implementation and past_key_values out"
            )
        if self.seen == self._prompt:
            self.queries.append(query[:, :, -1:].clone())
            if isinstance(mask, Tensor) and mask.ndim == 4:
                mask = mask[:, :, -1:].clone()
            self.first = Call(mask, self.seen, key.shape[2], args, options)

    @property
    def last(self) -> Call | None:
        """The newest call after the prompt."""
        return Call(self._last[0], self.seen, *self._last[1:]) if self._last else None


class Steps:
    """The run of one generation: attention calls inside of it report here. ``layers`` by the id of their module, all that
    go through the attention interface, so that a step looks nothing up."""

    def __init__(self, family: str, prompt: int) -> None:
        self.family, self.prompt = family, prompt
        self.layers: dict[int, LayerSteps] = {}
        self.gates: dict[int, Tensor] = {}
        """Output gates of the step that is running, by the id of their module."""
        self.built: deque[tuple[Any, Mapping[str, Any]]] = deque(maxlen=8)
        """The newest masks, each with the arguments it was built from: those of the last step when all is over."""

    def map(
        self, held: LayerSteps, real: Tensor, base: str, options: Callable[[Call], Mapping[str, Any]]
    ) -> SoftmaxMap:
        """The map of all steps: queries from position ``prompt - 1`` on against every key that was ever seen.

        ``real`` ``[B, T + S]``: which positions of the final text are real. ``options`` reads the arguments of a call. The rule
        of the mask is found from the first and the last step, and both must agree with it."""
        layer, steps = held.layer, real.shape[1] - self.prompt
        where = f"layer {layer.key} of {self.family}"
        if held.first is None or len(held.queries) != steps or held.seen != self.prompt + steps - 1:
            raise WorkbenchError(
                f"{where} ran {len(held.queries)} times in {steps} steps and saw {held.seen} of "
                f"{self.prompt + steps - 1} positions: its rows do not belong to the steps; leave it out with layers=[...]"
            )
        if len({(len(q), len(k)) for q, k in zip(held.queries, held.keys, strict=False)} | {(len(real),) * 2}) > 1:
            raise Refused(f"{where}: the batch changed while generating; generate without beams or candidates")
        q, k = torch.cat(held.queries, 2), torch.cat(held.keys, 2)
        calls = [(0, held.first), *([(steps - 1, held.last)] if held.last is not None else [])]
        given = [options(call) for _, call in calls]
        if any(call.get("position_bias") is not None for call in given):
            raise Refused(f"{where}: the bias of its scores is known for the prompt only; run with cache= step by step")
        rows = [(at, self._row(layer, call, told, q, base)) for (at, call), told in zip(calls, given, strict=True)]
        windows = {getattr(layer.module, "sliding_window", None), *(told.get("sliding_window") for told in given)}
        windows |= {getattr(getattr(layer.module, "config", None), "sliding_window", None)}
        windows |= {call.keys for _, call in calls if call.keys < call.seen}
        prompt = real.clone()
        prompt[:, self.prompt :] = True  # a finished text goes on with padding that the model takes for text
        for window in (None, *sorted(w for w in windows if isinstance(w, int) and w > 0)):
            seen = Mask(True, window, keys=prompt[:, : k.shape[2]], offset=self.prompt - 1)
            if all(_agrees(seen, at, row, k.shape[2]) for at, row in rows):
                break
        else:
            raise Refused(
                f"{where}: what a step sees is neither all keys before it nor a window of them, and cannot be continued "
                "past the prompt; run with cache= step by step"
            )
        new = real[:, self.prompt - 1 :][:, :steps]
        mask = Mask(
            True,
            window,
            keys=None if bool(real[:, : k.shape[2]].all()) else real[:, : k.shape[2]].to(q.device),
            queries=None if bool(new.all()) else new.to(q.device),
            offset=self.prompt - 1,
        )
        first = given[0]
        return SoftmaxMap(
            q, k, mask=mask, scale=first.get("scaling"), softcap=first.get("softcap"), sink=first.get("s_aux")
        )

    def _row(self, layer: AttentionLayer, call: Call, options: Mapping[str, Any], q: Tensor, base: str) -> Tensor:
        """Keys that the query of a call saw, ``[B or 1, H or 1, 1, keys so far]`` bool."""
        mask = call.mask
        if isinstance(mask, Tensor) and mask.ndim == 4:
            shown = allowed(mask[..., : call.keys])
            if mask.is_floating_point() and bool(((mask[..., : call.keys] != 0) & shown).any()):
                raise Refused(
                    f"layer {layer.key} of {self.family}: its mask adds a bias, which is known for the prompt only; "
                    "run with cache= step by step"
                )
        else:
            masks = Masks(self.family)
            for tensor, built in self.built:
                masks.remember(tensor, built)
            keys = q.new_empty(1, 1, 1, 1).expand(1, 1, call.keys, 1)
            found, _ = masks.resolve(layer, mask, q[:, :, :1], keys, base, options)
            tile = found.at(call.keys - 1).tile(slice(0, 1), slice(0, call.keys), q.device)
            shown = q.new_ones(1, 1, 1, call.keys, dtype=torch.bool) if tile is None else tile
        return torch.nn.functional.pad(shown, (call.seen - call.keys, 0))


def _agrees(mask: Mask, at: int, row: Tensor, keys: int) -> bool:
    """Whether row ``at`` of ``mask`` shows exactly ``row``, and no key behind it."""
    tile = mask.tile(slice(at, at + 1), slice(0, keys), row.device)
    assert tile is not None
    n = row.shape[3]
    return bool((tile[..., :n] == row).all()) and not bool(tile[..., n:].any())
