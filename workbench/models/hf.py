"""Hugging Face models as a ``Model``: run as they always run, with a look at their attention and residual stream."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from workbench.captures import Capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.models import requests
from workbench.models.head import Head, row_ends
from workbench.models.inputs import (
    cache_length,
    check_eager,
    forward_arguments,
    forward_names,
    full_mask,
    given_tokens,
    keeps_state_alone,
    real_positions,
    two_stacks,
)
from workbench.models.interface import Key, capturing, configs
from workbench.models.layers import (
    AttentionLayer,
    attention_layers,
    builds_scores,
    describe,
    has_state,
    is_causal,
    is_compiled,
    on_interface,
    pads,
    why_not,
)
from workbench.models.protocol import Edit, Manifest, Shape, Tokens
from workbench.models.recorders.base import recording
from workbench.models.recorders.choice import choosing
from workbench.models.recorders.gates import gating
from workbench.models.recorders.reached import noticing
from workbench.models.recorders.windows import gridding
from workbench.models.requests import check_layers, check_logits
from workbench.models.session import Session
from workbench.models.taps import Globals, Place, Taps, places, w_o
from workbench.run import EMPTY, Activations, Maps, Provenance, Run, versions
from workbench.sites import Site


class HFModel:
    """A ``PreTrainedModel`` with its tokenizer, behind the ``Model`` protocol.

    The wrapped model is never changed: hooks, edits and the capture key live for one ``run``. Sites are read after edits.
    Maps come from the query and key tensors of the model's own kernel call. Rows of padded queries are zero in the map,
    whatever the kernel computed for them: padding gives no mass to anything. ``logits="last"`` is the last real token of
    every row. With padding on the left, positions count from the first real token where the model takes
    ``position_ids``. While a cache is in use, ``k`` and ``v`` read at the attention function hold the cached positions too,
    those that are left where a cache with a window dropped the first; keys of maps count from position 0 all the same.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, name: str | None = None, revision: str = "") -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.name = name or getattr(model, "name_or_path", "") or type(model).__name__
        self.revision = revision or getattr(self.model.config, "_commit_hash", None) or ""
        self._layers = attention_layers(model)
        self._places = places(model, self._layers)
        self._globals = Globals(model, self._layers)
        self._lock = threading.RLock()
        self.shape = _shape(model, self._places)

    @property
    def family(self) -> str:
        return type(self.model).__name__

    @property
    def attention(self) -> str:
        """The attention implementation that computes the output; ``none`` where no layer has attention."""
        if self._layers and all(has_state(layer) for layer in self._layers):
            return "none"
        found = dict.fromkeys(_name(config._attn_implementation_internal) for config in configs(self.model))
        return " + ".join(found)

    def tokens(self, texts: str | Sequence[str]) -> Tokens:
        return requests.tokenize(self.tokenizer, texts, self.shape)

    def layers(self) -> list[int | str]:
        """Keys of the attention layers, as in ``Run.maps``."""
        return [layer.key for layer in self._layers]

    def sites(self) -> list[Site]:
        """Every site that can be read, heads left out."""
        found = [Site(kind, stack=stack) for kind, stack in self._globals.modules if kind == "embed"]
        order = Site.kinds()
        for place in self._places:
            kinds = sorted(place.kinds, key=order.index)
            found += [Site(kind, place.layer.index, stack=place.layer.stack) for kind in kinds]
        return found + [Site(kind, stack=stack) for kind, stack in self._globals.modules if kind != "embed"]

    def manifest(self) -> Manifest:
        records = tuple(
            describe(place.layer, self._implementation(place.layer), stream="resid_pre" in place.kinds)
            for place in self._places
        )
        return Manifest(self.name, records, tuple(map(str, self.sites())))

    def weight(self, name: str, layer: int | None = None) -> Tensor:
        """A weight in TransformerLens's layout: ``W_O`` of a layer ``[H, E, D]``, ``W_U`` ``[D, V]``, ``W_E`` ``[V, D]``."""
        head = self._head()
        if name == "W_U" and head is not None:
            return head.weight.T
        if name == "W_E" and isinstance(self.model.get_input_embeddings(), nn.Embedding):
            return self.model.get_input_embeddings().weight
        if name == "W_O" and layer is not None:
            for place in self._places:
                if place.layer.key == layer and "result" in place.at_modules:
                    assert place.wiring is not None
                    return w_o(place.block.get_submodule(place.wiring.out), place.heads)
            known = [place.layer.key for place in self._places if "result" in place.at_modules]
            raise UnknownName("layer with W_O", layer, known)
        known = [*(["W_U"] if head is not None else []), "W_E", "W_O of a layer"]
        raise UnknownName("weight", name if layer is None else f"{name} of layer {layer}", known)

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
            return self._run(tokens, read, edit, maps, logits, cache)

    def _run(self, tokens: Any, read: Any, edit: Any, maps: Capture | None, logits: str | None, cache: Any) -> Run:
        if any(module.training for module in self.model.modules()):
            raise WorkbenchError(f"{self.name} is in training mode; call .eval() on the model first")
        device = self._device()
        given = given_tokens(self.model, tokens, self.tokenizer, self.shape)
        past = None if cache is None or isinstance(cache, bool) else cache
        cached = past is not None or cache is True
        width = torch.finfo(next(self.model.parameters()).dtype).bits // 8
        real = real_positions(given, decoder=two_stacks(self.model))
        check_logits(logits, len(real), real.shape[1], self.shape, width)
        reads = requests.parse_sites(read, self._serves, self._names)
        edits = requests.parse_edits(edit, self._serves, self._names)
        wanted = check_layers(maps, self.layers())
        states = [layer for layer in self._layers if layer.key in wanted and layer.route == "recorder"]
        if (reads or edits or states) and is_compiled(self.model):
            raise Refused(
                f"{self.name} is compiled, and hooks do not reach inside compiled code: read and edit sites of the model "
                "before it is compiled; maps alone of layers on the attention interface can be captured here"
            )
        if cached and keeps_state_alone(self.model):
            raise Refused(
                f"{self.family} keeps no key-value cache but a state, which does not say how many tokens it holds; run the "
                "whole text without cache"
            )
        session = self._session(reads, edits, maps, wanted, cache_length(past) if cached else None, given)
        arguments = forward_arguments(self.model, given, self.shape, past, device, cached=cached)
        if session.past and self._counts_from_zero(given):
            positions = torch.arange(real.shape[1], device=device) + session.past
            arguments.setdefault("position_ids", positions.expand(len(real), -1))
        taps = Taps(self._places, self._globals, session)
        switch = any(session.wants(layer) for layer in self._layers if on_interface(layer))
        self._check_memory(real, past, width, device)
        head = Head(session, self._head(), self._last_norm(), logits, row_ends(real))
        with (
            taps.installed(),
            head.installed(),
            self._recording(session),
            capturing(self.model, session, switch=switch),
        ):
            outputs = self.model(**arguments)
        session.finish(self._layers)
        new = getattr(outputs, "past_key_values", None) if cached else None
        if cached and new is None:
            raise Refused(f"{self.family} keeps no key-value cache")
        if new is not None and real.shape[1]:
            new._workbench_mask = full_mask(real, past)
        return Run(
            tokens=given,
            logits=head.logits(outputs),
            output=head.hidden if getattr(outputs, "last_hidden_state", None) is None else outputs.last_hidden_state,
            acts=Activations(session.acts),
            maps=Maps({key: session.maps[key] for key in self.layers() if key in wanted and key in session.maps}),
            provenance=self._provenance(session.maps),
            cache=new,
        )

    # ---------------------------------------------------------------- helpers

    def _session(
        self, reads: Any, edits: Any, maps: Capture | None, wanted: Any, past: int | None, given: Tokens
    ) -> Session:
        by_key = {layer.key: layer for layer in self._layers}
        for key in wanted:
            if by_key[key].route == "none":
                fine = [layer.key for layer in self._layers if layer.route != "none"]
                raise Refused(
                    f"layer {key} of {self.family}: {by_key[key].name} {why_not(by_key[key].module)}; layers that can be "
                    f"captured: {fine or 'none'}"
                )
        for site in edits:
            layer = next((x for x in self._layers if (x.stack, x.index) == (site.stack, site.layer)), None)
            if site.kind == "pattern" and layer is not None:
                base = self._implementation(layer)
                if layer.route == "recorder" or base != "eager":
                    raise Refused(
                        f"{site} cannot be edited: {'the recorder' if layer.route == 'recorder' else f'attention {base!r}'} "
                        f"of {self.family} does not build the pattern; edit hook_z, or load a model that goes through the "
                        "attention interface with attn_implementation='eager'"
                    )
        first, two = real_positions(given), two_stacks(self.model)
        second = real_positions(given, decoder=True) if two else first
        stacks = {"encoder" if two else "": first, "text": first, "decoder": second, "cross": second}
        served = {(place.layer.stack, place.layer.index): place.at_function for place in self._places}
        return Session(
            self.family,
            self._layers,
            request=maps,
            wanted=wanted,
            reads=reads,
            edits=edits,
            served=served,
            past=past,
            real={stack: real for stack, real in stacks.items() if not bool(real.all())},
            cut=first.shape[1] if any(pads(layer) for layer in self._layers) else None,
        )

    def _counts_from_zero(self, given: Tokens) -> bool:
        """Whether a text model with states may need to be told where a continued text stands: some ask the cache's first layer,
        which is a state."""
        hybrid = any(has_state(layer) and layer.stack == "" for layer in self._layers)
        return hybrid and not given.inputs and "position_ids" in (forward_names(self.model) or set())

    @contextmanager
    def _recording(self, session: Session) -> Iterator[None]:
        layers = [layer for layer in self._layers if layer.route == "recorder" and session.wants(layer)]
        mapped = [layer for layer in self._layers if session.wants_map(layer)]
        cut_up = [layer for layer in self._layers if session.wants(layer)]
        with (
            gridding(cut_up, self.model, session),
            recording(layers, session),
            gating(mapped, session),
            choosing(mapped, session),
            noticing([] if is_compiled(self.model) else mapped, session),
        ):
            yield

    def _serves(self, site: Site) -> bool:
        if site.layer is None:
            return (site.kind, site.stack) in self._globals.modules
        for place in self._places:
            if (place.layer.stack, place.layer.index) == (site.stack, site.layer):
                grouped = site.kind in ("k", "v", "rot_k")
                heads = place.kv_heads if grouped else place.heads
                return site.kind in place.kinds and (site.head is None or not heads or site.head < heads)
        return False

    def _names(self) -> list[str]:
        """Served sites with layers as ranges, for messages."""
        spans: dict[str, list[int]] = {}
        for site in self.sites():
            template = str(site) if site.layer is None else str(site).replace(f"blocks.{site.layer}.", "blocks.{}.")
            spans.setdefault(template, []).append(site.layer or 0)
        names = [t.replace("{}", f"{min(at)}-{max(at)}" if len(at) > 1 else str(at[0])) for t, at in spans.items()]
        return [*names, f"(heads 0-{self.shape.heads - 1}, kv heads 0-{self.shape.kv_heads - 1})"]

    def _implementation(self, layer: AttentionLayer) -> str:
        config = getattr(layer.module, "config", self.model.config)
        return _name(getattr(config, "_attn_implementation_internal", None))

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _head(self) -> Any:
        """The module that makes logits of hidden states, if the model has one."""
        try:
            return self.model.get_output_embeddings()
        except (AttributeError, NotImplementedError):
            return None

    def _last_norm(self) -> nn.Module | None:
        found = self._globals.modules
        return found.get(("final_norm", "decoder")) or found.get(("final_norm", ""))

    def _check_memory(self, real: Tensor, past: Any, width: int, device: torch.device) -> None:
        batch, length = real.shape
        layers = [place for place in self._places if builds_scores(place.layer, self._implementation(place.layer))]
        eager = [place.heads for place in layers]
        if eager and length:
            check_eager(batch, max(eager), length, length + cache_length(past), width, device)

    def _provenance(self, maps: Mapping[int | str, AttentionMap]) -> Provenance:
        kernels = dict.fromkeys(str(getattr(found, "impl", "") or "") for found in maps.values())
        parameter = next(self.model.parameters())
        return Provenance(
            model=self.name,
            revision=self.revision,
            dtype=str(parameter.dtype).removeprefix("torch."),
            device=str(parameter.device),
            attention=self.attention,
            kernel=", ".join(sorted(filter(None, kernels))),
            versions=versions(),
        )

    def __repr__(self) -> str:
        return f"HFModel({self.name!r}, {self.family}, {len(self._layers)} attention layers, {self.attention})"


def _name(implementation: Any) -> str:
    base = implementation.base if isinstance(implementation, Key) else implementation
    return str(base or "eager")


def _shape(model: Any, found: Sequence[Place]) -> Shape:
    """Sizes as the config tells them; of the text half where there are two, of the decoder where there is one."""
    config = model.config.get_text_config(decoder=True) if hasattr(model.config, "get_text_config") else model.config
    own = [place for place in found if place.layer.stack in ("", "decoder", "text")] or list(found)
    first = own[0] if own else None
    width = getattr(config, "hidden_size", 0)
    return Shape(
        layers=len(own),
        heads=first.heads if first else 0,
        kv_heads=first.kv_heads if first else 0,
        width=width if isinstance(width, int) else width[0],
        head_width=first.width if first else 0,
        vocab=getattr(config, "vocab_size", None),
        context=_context(model, config),
        causal=_causal(first),
    )


def _causal(place: Place | None) -> bool:
    if place is None:
        return True
    if "CLIPText" in type(getattr(place.layer.module, "config", None)).__name__:
        return True  # says so per call, not on the module
    return is_causal(place.layer)


def _context(model: Any, config: Any) -> int | None:
    """Longest input: the number of positions a model has or was made for; None where positions are unbounded."""
    kind = getattr(config, "model_type", "")
    if kind in ("t5", "mt5", "bloom") or getattr(config, "alibi", False):
        return None
    if kind == "mpt":
        return config.max_seq_len
    if kind == "whisper":
        return config.max_target_positions
    try:
        limit = getattr(config, "max_position_embeddings", None)
    except NotImplementedError:  # transformers' way of saying that there is no limit
        return None
    if kind in ("roberta", "xlm-roberta", "camembert") and limit is not None:
        return limit - (config.pad_token_id or 0) - 1
    return limit if isinstance(limit, int) else None
