"""TransformerLens bridges as a ``Model``."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from workbench.captures import Capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models import requests
from workbench.models.bridge_hooks import Hooks, probe, settable, user_hooks
from workbench.models.hf import HFModel
from workbench.models.inputs import cache_length, forward_arguments, full_mask, given_tokens
from workbench.models.interface import capturing
from workbench.models.protocol import Edit, LayerRecord, Manifest, Tokens
from workbench.models.requests import MAP_KINDS
from workbench.models.unwrap import fused, unwrapped
from workbench.run import EMPTY, Activations, Maps, Provenance, Run, versions
from workbench.sites import Site

EAGER_LIMIT = 2**27
"""Pattern entries of all layers together (L * B * H * Q * K) up to which a run goes through the bridge's own attention."""

_NORMS = ("attn_norm", "mlp_norm")
"""Sites whose tensor some blocks hold with batch and positions in one axis; there they are hook names and no sites."""


class BridgeModel:
    """A ``TransformerBridge`` behind the ``Model`` protocol.

    A bridge computes attention itself, with the whole pattern in memory. Up to ``EAGER_LIMIT`` pattern entries a run is
    exactly the bridge's own forward, bit for bit, and maps are the patterns that its ``hook_pattern`` passes. Longer runs
    without reads and edits, with or without maps, go through the Hugging Face model inside the bridge and its fused
    attention, which differs from the bridge in the last bits; ``Run.provenance.attention`` tells which one ran. Layers whose
    attention the bridge leaves to the module inside (see ``manifest()``) are captured there, in the same pass.

    ``read`` and ``edit`` take any hook name of the bridge, aliases included; names that are no ``Site`` are keys of
    ``Run.acts`` as they are. Hooks that are on the bridge already stay and act. Hooks and settings of a run are taken back
    at its end, also after an exception. Hook shapes are those of the bridge's hooks.
    """

    def __init__(self, bridge: Any, tokenizer: Any = None, *, name: str | None = None, revision: str = "") -> None:
        if not hasattr(bridge, "blocks"):
            raise Refused(
                f"{type(bridge).__name__} of {bridge.cfg.model_name} has no single stack of blocks (encoder-decoder?); "
                "load the Hugging Face model itself, before it is bridged"
            )
        self.bridge: Any = bridge
        self.tokenizer = tokenizer if tokenizer is not None else bridge.tokenizer
        self._lock = threading.RLock()
        model = bridge.original_model
        self.name = name or getattr(model, "name_or_path", "") or bridge.cfg.model_name
        self.revision = revision
        with unwrapped(model):
            self._inner = HFModel(model, self.tokenizer, name=self.name, revision=revision)
        self.shape = self._inner.shape
        self._named: tuple[bool, dict[str, HookPoint]] | None = None
        self._inside_layers: frozenset[int] | None = None
        self._alive: tuple[frozenset[str], frozenset[int], frozenset[str]] | None = None

    def tokens(self, texts: str | Sequence[str]) -> Tokens:
        """As ``bridge.to_tokens`` makes them of each text (with or without a leading BOS, as the bridge is set)."""
        batch = requests.check_texts(self.tokenizer, texts)
        if self.tokenizer is not self.bridge.tokenizer:
            return requests.tokenize(self.tokenizer, batch, self.shape)
        rows = [self.bridge.to_tokens(text, truncate=False)[0].cpu() for text in batch]
        length = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        if pad is None and any(len(row) < length for row in rows):
            raise WorkbenchError(
                "the tokenizer has no padding token, so texts of different lengths cannot share a batch; "
                "set tokenizer.pad_token or run them one at a time"
            )
        ids = torch.full((len(rows), length), 0 if pad is None else pad, dtype=torch.int64)
        mask = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            at = slice(length - len(row), None) if self.tokenizer.padding_side == "left" else slice(len(row))
            ids[i, at], mask[i, at] = row, True
        requests.check_length(length, self.shape)
        labels = tuple(tuple(map(str, self.tokenizer.convert_ids_to_tokens(row))) for row in ids.tolist())
        return Tokens(ids, mask, labels)

    def layers(self) -> list[int]:
        """Layers whose attention can be captured."""
        if self._inside_layers is None:
            with self._lock, unwrapped(self.bridge.original_model):
                records = self._inner.manifest().layers
            self._inside_layers = frozenset(r.layer for r in records if r.route != "none" and isinstance(r.layer, int))
        return [i for i in range(len(self.bridge.blocks)) if i in self._inside_layers or i in self._shown()]

    def sites(self) -> list[Site]:
        """Every site that can be read, heads left out. Further hook names of the bridge: ``hooks()``."""
        alive, layers, shown = self._fires(), self.layers(), self._shown()
        found = []
        for kind in Site.kinds():
            try:
                candidates = [Site(kind, layer) for layer in range(len(self.bridge.blocks))]
            except WorkbenchError:
                candidates = [Site(kind)]
            for site in candidates:
                of_map = site.kind in MAP_KINDS or (site.kind == "attn_scores" and site.layer not in shown)
                whole = site.hook in alive and not (site.kind in _NORMS and site.hook in self._probe()[2])
                if (site.layer in layers and site.kind in MAP_KINDS) or (not of_map and whole):
                    found.append(site)
        return found

    def hooks(self) -> list[str]:
        """Every hook name of the bridge that passes a tensor in a forward pass, aliases included."""
        return sorted(self._fires())

    def manifest(self) -> Manifest:
        with self._lock, unwrapped(self.bridge.original_model):
            inner = {record.layer: record for record in self._inner.manifest().layers}
        records = []
        for layer in range(len(self.bridge.blocks)):
            record = inner.get(layer)
            mixer = type(self.bridge.blocks[layer]).__name__ if record is None else record.mixer
            if layer in self._shown():
                records.append(LayerRecord(layer, mixer, "bridge", "exact"))
            elif record is not None and record.route != "none":
                missing = "editing pattern and attn_scores (the bridge leaves attention to the module inside)"
                records.append(LayerRecord(layer, mixer, record.route, record.exactness, missing))
            else:
                records.append(LayerRecord(layer, mixer, "none", "none", "the bridge shows no pattern in this layer"))
        return Manifest(self.name, tuple(records), tuple(map(str, self.sites())))

    def weight(self, name: str, layer: int | None = None) -> Tensor:
        """A weight as the bridge holds it: ``W_O`` of a layer ``[H, E, D]``, ``W_U`` ``[D, V]``, ``W_E`` ``[V, D]``."""
        in_block = {"W_Q": "attn", "W_K": "attn", "W_V": "attn", "W_O": "attn", "W_in": "mlp", "W_out": "mlp"}
        owner: Any = None
        if layer is None and name in ("W_U", "W_E"):
            owner = self.bridge
        elif layer is not None and name in in_block:
            if not 0 <= layer < len(self.bridge.blocks):
                raise UnknownName("layer", layer, range(len(self.bridge.blocks)))
            owner = getattr(self.bridge.blocks[layer], in_block[name], None)
        found = getattr(owner, name, None)
        if not isinstance(found, Tensor):
            known = ["W_U", "W_E", *(f"{w} of a layer" for w in in_block)]
            raise UnknownName("weight", name if layer is None else f"{name} of layer {layer}", known)
        return found

    def run(
        self,
        tokens: str | Sequence[str] | Tensor | Tokens | Mapping[str, Tensor],
        read: Iterable[Site | str] = (),
        edit: Mapping[Site | str, Edit | Tensor] = EMPTY,
        maps: Capture | None = None,
        *,
        logits: str | None = "all",
        cache: Any = None,
    ) -> Run:
        with self._lock:
            model = self.bridge.original_model
            if self.bridge.training or any(module.training for module in model.modules()):
                raise WorkbenchError(f"{self.name} is in training mode; call .eval() on the bridge first")
            given = self._given(tokens)
            past = None if cache is None or isinstance(cache, bool) else cache
            keys = cache_length(past) + given.ids.shape[1]
            entries = len(self.bridge.blocks) * given.ids.shape[0] * self.shape.heads * given.ids.shape[1] * keys
            reads = self._parse(read)
            edits = requests.check_edits(self._parse(edit), edit.values())
            wanted = requests.check_layers(maps, self.layers())
            plain = not edits and all(isinstance(key, Site) and key.kind in MAP_KINDS for key in reads)
            if entries > EAGER_LIMIT and (wanted or plain):
                reason = self._only_bridge() if plain else "reads and edits need the bridge's own attention"
                if reason is None:
                    with unwrapped(model), fused(model):
                        return self._inner.run(given, reads, {}, maps, logits=logits, cache=cache)
                if wanted:
                    raise Refused(
                        f"maps of {given.ids.shape[0]} x {keys} tokens need {entries:,} pattern entries here, over the limit "
                        f"of {EAGER_LIMIT:,}: {reason}; ask for maps alone, or shorten the input"
                    )
            requests.check_logits(
                logits, len(given.ids), given.ids.shape[1], self.shape, torch.finfo(self._dtype).bits // 8
            )
            return self._run_hooked(given, reads, edits, maps, wanted, logits, cache)

    # ---------------------------------------------------------------- helpers

    def _run_hooked(
        self, given: Tokens, reads: Any, edits: Any, maps: Any, wanted: Any, logits: Any, cache: Any
    ) -> Run:
        past = None if cache is None or isinstance(cache, bool) else cache
        cached, seen = past is not None or cache is True, cache_length(past)
        model = self.bridge.original_model
        arguments = forward_arguments(model, given, self.shape, past, self._inner._device(), cached=cached)
        if not cached:
            arguments.pop("use_cache", None)  # the bridge's default; forbidding the cache changes last bits in gpt2
        ids = arguments.pop("input_ids", None)
        if ids is None:
            raise WorkbenchError(f"a bridge takes token ids; got {sorted(arguments)}")
        reads, inside = self._split(reads, edits)
        shown = self._shown() if wanted else frozenset()
        here, beyond = [i for i in wanted if i in shown], tuple(i for i in wanted if i not in shown)
        hidden = "unembed.hook_in"
        last = [hidden] if hidden in self._points and hidden not in reads else []
        hooks = Hooks(
            self.bridge,
            self._points,
            [*reads, *last],
            edits,
            maps,
            here,
            shape=self.shape,
            real=given.mask,
            past=seen,
            name=self.name,
        )
        request = None if maps is None else replace(maps, layers=beyond)
        session = self._inner._session(inside, {}, request, beyond, seen if cached else None, given)
        switch = bool(inside or beyond)
        with (
            self._gates(hooks.names),
            hooks.installed(session),
            self._inner._recording(session),
            capturing(model, session, switch=switch),
        ):
            found, new = self.bridge(ids, return_type="logits_and_cache", **arguments)
        session.finish(self._inner._layers)
        hooks.finish()
        acts: dict[Site | str, Tensor] = {**hooks.acts}
        for site, value in session.acts.items():
            acts[site] = value
        captured = {**hooks.maps, **session.maps}
        output = acts.pop(hidden) if last else acts.get(hidden)
        if cached and new is not None:
            new._workbench_mask = full_mask(given.mask, past)
        if isinstance(found, Tensor) and logits == "last":
            at = given.mask.shape[1] - 1 - given.mask.flip(1).int().argmax(1)
            found = found[torch.arange(len(found)), at.to(found.device)][:, None]
        return Run(
            tokens=given,
            logits=None if logits is None else found,
            output=output,
            acts=Activations(acts),
            maps=Maps({layer: captured[layer] for layer in wanted}),
            provenance=self._provenance(),
            cache=new if cached else None,
        )

    def _split(self, reads: list[Site | str], edits: Mapping[Site | str, Any]) -> tuple[list[Site | str], list[Site]]:
        """Reads that the bridge answers, and properties of patterns that only the module inside knows."""
        mine: list[Site | str] = []
        inside: list[Site] = []
        for key in [*reads, *edits]:
            of_attention = isinstance(key, Site) and (key.kind in MAP_KINDS or key.kind == "attn_scores")
            if not isinstance(key, Site) or not of_attention or key.layer in self._shown():
                mine.append(key)
            elif key in edits or key.kind == "attn_scores":
                raise Refused(
                    f"{key} of {self.name} cannot be edited, and scores cannot be read: this bridge leaves attention to the "
                    "Hugging Face module and shows what came out; edit z"
                )
            else:
                inside.append(key)
        return mine[: len(mine) - len(edits)], inside

    def _given(self, tokens: Any) -> Tokens:
        texts = isinstance(tokens, str) or (
            isinstance(tokens, Sequence) and len(tokens) > 0 and all(isinstance(text, str) for text in tokens)
        )
        if texts:
            return self.tokens(tokens)
        return given_tokens(self.bridge.original_model, tokens, self.tokenizer, self.shape)

    def _parse(self, keys: Iterable[Site | str]) -> list[Site | str]:
        """Sites, and as plain names those hooks of the bridge that are no site."""
        points = self._points
        found: list[Site | str] = []
        for key in [keys] if isinstance(keys, str | Site) else keys:
            try:
                parsed: Site | str = Site.parse(key)
            except UnknownName:
                parsed = str(key)
            if not (self._serves(parsed) if isinstance(parsed, Site) else parsed in points):
                raise UnknownName("hook of this bridge", key, self._names())
            found.append(parsed)
        return found

    def _serves(self, site: Site) -> bool:
        if site.stack or (site.layer is not None and site.layer >= len(self.bridge.blocks)):
            return False
        grouped = site.kind in ("k", "v", "rot_k", "k_input", "v_input")
        if site.head is not None and site.head >= (self.shape.kv_heads if grouped else self.shape.heads):
            return False
        return site.hook in self._points or (site.kind in MAP_KINDS and site.layer in self.layers())

    def _names(self) -> list[str]:
        """Hook names that fire, layers as a range, for messages."""
        last = len(self.bridge.blocks) - 1
        names = dict.fromkeys(_over_layers(name, last) for name in [*map(str, self.sites()), *self.hooks()])
        return [*names, f"(heads 0-{self.shape.heads - 1}, kv heads 0-{self.shape.kv_heads - 1})"]

    @property
    def _points(self) -> dict[str, HookPoint]:
        """Hook points of the bridge by name, aliases included; TransformerLens collects them anew on every look."""
        mode = bool(getattr(self.bridge, "compatibility_mode", False))
        if self._named is None or self._named[0] != mode:
            self._named = mode, dict(self.bridge.hook_dict)
        return self._named[1]

    def _fires(self) -> frozenset[str]:
        """Hook names whose point passes a tensor, with the bridge's settings as they are or switched on for it."""
        return self._probe()[0]

    def _shown(self) -> frozenset[int]:
        """Layers in which the bridge computes attention itself: what its ``hook_pattern`` passes is what acts."""
        return self._probe()[1]

    def _probe(self) -> tuple[frozenset[str], frozenset[int], frozenset[str]]:
        if self._alive is None:
            ids = torch.zeros(1, min(2, self.shape.context or 2), dtype=torch.int64, device=self._inner._device())
            with self._lock:
                self._alive = probe(self.bridge, self._points, ids, lambda: self._gates(self._points, lenient=True))
        return self._alive

    @contextmanager
    def _gates(self, names: Iterable[str], *, lenient: bool = False) -> Any:
        """Switch on the settings without which the named hooks never fire, for the length of the block."""
        points = self._points
        flags = (settable(points[name]) for name in names if name in points)
        wanted = dict.fromkeys(flag for flag in flags if flag and not getattr(self.bridge.cfg, flag))
        with ExitStack() as undo:
            for flag in wanted:
                try:
                    getattr(self.bridge, f"set_{flag}")(True)
                except (NotImplementedError, ValueError) as error:
                    if not lenient:
                        raise Refused(f"a hook that was asked for needs {flag}: {error}") from error
                    continue
                undo.callback(getattr(self.bridge, f"set_{flag}"), False)
            yield

    def _only_bridge(self) -> str | None:
        """Why the model inside cannot stand for the bridge; None if it can."""
        if getattr(self.bridge, "compatibility_mode", False) or getattr(self.bridge, "_weights_processed", False):
            return "the bridge's weights were processed, the model inside has the original ones"
        hooked = user_hooks(self._points)
        if hooked:
            return f"the bridge has hooks of its own on {', '.join(hooked[:3])} (bridge.reset_hooks() removes them)"
        return None

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.bridge.original_model.parameters()).dtype

    def _provenance(self) -> Provenance:
        return Provenance(
            model=self.name,
            revision=self.revision,
            dtype=str(self._dtype).removeprefix("torch."),
            device=str(self._inner._device()),
            attention="bridge",
            versions=versions(),
        )

    def __repr__(self) -> str:
        return f"BridgeModel({self.name!r}, {type(self.bridge.original_model).__name__}, {len(self.layers())} attention layers)"


def _over_layers(name: str, last: int) -> str:
    head, dot, rest = name.partition("blocks.")
    number, dot2, tail = rest.partition(".")
    return f"{head}blocks.0-{last}.{tail}" if dot and dot2 and number.isdigit() else name
