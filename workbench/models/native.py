"""Native models as a ``Model``: the bundled and the hand-compiled ones, and any ``NativeNet`` of your own."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.captures import Capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.current import inside
from workbench.models.hookpoints import attached
from workbench.models.native_net import NativeCache, NativeConfig, NativeNet
from workbench.models.protocol import Edit, LayerRecord, Manifest, Shape, Tokens
from workbench.models.requests import (
    MAP_KINDS,
    apply_edits,
    check_ids,
    check_layers,
    check_length,
    check_logits,
    kept,
    parse_edits,
    parse_sites,
    site_from_map,
    tokenize,
)
from workbench.run import EMPTY, Activations, Maps, Provenance, Run, versions
from workbench.sites import Site

if TYPE_CHECKING:
    from workbench.circuits import Circuit


class NativeModel:
    """A ``NativeNet`` with its tokenizer, behind the ``Model`` protocol.

    Sites are read after edits. ``pattern`` and ``attn_scores`` are read off the map, detached, which changes no bit of the
    output; editing one of them builds the scores explicitly in that layer, which changes the last bits.
    ``ground_truth`` is the circuit of a hand-compiled model, ``None`` otherwise.
    """

    def __init__(
        self,
        net: NativeNet,
        tokenizer: Any = None,
        *,
        name: str = "native",
        revision: str = "",
        ground_truth: Circuit | None = None,
    ) -> None:
        self.net, self.tokenizer, self.name, self.revision = net, tokenizer, name, revision
        self.ground_truth = ground_truth
        self._lock = threading.RLock()
        c = net.config
        vocab, context = (c.vocab, c.context) if c.grid is None else (None, None)
        self.shape = Shape(
            c.layers, c.heads, c.kv_heads or c.heads, c.width, c.head_width, vocab, context, c.causal, c.trained
        )

    @classmethod
    def load(cls, folder: str | Path, *, name: str | None = None) -> NativeModel:
        """The model in a folder of ``config.json``, ``model.safetensors`` and ``tokenizer.json``."""
        from safetensors.torch import load_file

        folder = Path(folder)
        for part in ("config.json", "model.safetensors"):
            if not (folder / part).is_file():
                raise WorkbenchError(f"{folder} is not a native model: it has no {part}")
        try:
            written = json.loads((folder / "config.json").read_text())
            config = NativeConfig(**{k: v for k, v in written.items() if k != "model_type"})
            with torch.device("meta"):
                net = NativeNet(config)
        except (TypeError, ValueError, AttributeError) as error:
            message = str(error).replace("NativeConfig.__init__() got an ", "")
            raise WorkbenchError(f"{folder / 'config.json'} does not describe a native model: {message}") from error
        try:
            stored = load_file(folder / "model.safetensors")
            net.load_state_dict(
                {k: v if v.dtype == torch.float64 else v.float() for k, v in stored.items()}, assign=True
            )
        except Exception as error:
            message = " ".join(line.strip() for line in str(error).splitlines()[-1:])
            raise WorkbenchError(f"cannot read {folder / 'model.safetensors'}: {message}") from error
        tokenizer = None
        if (folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            try:
                tokenizer = PreTrainedTokenizerFast(
                    tokenizer_file=str(folder / "tokenizer.json"),
                    bos_token="<bos>",
                    pad_token="<pad>",
                    unk_token="<unk>",
                    padding_side="right",
                )
            except Exception as error:
                raise WorkbenchError(f"cannot read {folder / 'tokenizer.json'}: {error}") from error
        truth = None
        if (folder / "ground_truth").is_dir():
            from workbench.circuits import Circuit

            truth = Circuit.load(folder / "ground_truth")
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
        return cls(net.eval(), tokenizer, name=name or folder.name, revision=digest, ground_truth=truth)

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write config, weights and tokenizer as ``load`` reads them; weights come back as float32, float64 if saved so.

        A ground truth is not written: ``model.ground_truth.save(folder / "ground_truth")`` does.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        weights = {k: v.detach().to("cpu", dtype).contiguous() for k, v in self.net.state_dict().items()}
        written = {"model_type": "workbench-native", **self.net.config.dict()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(written, indent=1) + "\n")
            save_file(weights, folder / "model.safetensors")
            if self.tokenizer is not None:
                self.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        except OSError as error:
            raise WorkbenchError(f"cannot write the model to {folder}: {error}") from error
        return folder

    def tokens(self, texts: str | Sequence[str]) -> Tokens:
        return tokenize(self.tokenizer, texts, self.shape)

    def sites(self) -> list[Site]:
        """Every site that can be read, heads left out."""
        found = []
        for kind in Site.kinds():
            try:
                candidates = [Site(kind, layer) for layer in range(self.shape.layers)]
            except WorkbenchError:
                candidates = [Site(kind)]
            found += [s for s in candidates if s.kind in MAP_KINDS or self._point(s) in self.net.hook_dict]
        return found

    def weight(self, name: str, layer: int | None = None) -> Tensor:
        """A parameter by TransformerLens's name: ``W_O`` is ``[H, E, D]``, ``W_U`` ``[D, V]``, ``W_E`` ``[V, D]``."""
        if name == "W_U":
            return self.net.unembed
        prefix = "" if layer is None else f"blocks.{layer}."
        parameters = dict(self.net.named_parameters())
        for key in (f"{prefix}{name}", f"{prefix}attn.{name}", f"{prefix}attn.mixer.{name}", f"{prefix}mlp.{name}"):
            if key in parameters:
                return parameters[key]
        raise UnknownName("weight", f"{prefix}{name}", parameters)

    def manifest(self) -> Manifest:
        blocks: Any = self.net.blocks
        mixer = self.net.config.mixer
        records = tuple(
            LayerRecord(layer, mixer, "native", block.attn.mixer.exactness) for layer, block in enumerate(blocks)
        )
        return Manifest(self.name, records, tuple(map(str, self.sites())))

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
        if self.net.training:
            raise WorkbenchError(f"{self.name} is in training mode; call .net.eval() first")
        given = self._given(tokens)
        past = self._past(cache, given)
        pixels = given.inputs.get("pixel_values")
        if cache is not None and cache is not False and (not self.shape.causal or pixels is not None):
            why = "its tokens see those after them" if not self.shape.causal else "an image is seen whole"
            raise WorkbenchError(f"{self.name} keeps no key-value cache: {why}")
        if cache is not None and cache is not False and not self.net.steps:
            raise WorkbenchError(
                f"{self.name} keeps no key-value cache: with {self.net.config.mixer}, what a token sees depends on the length of "
                "the whole text; run the text whole"
            )
        if pixels is None:
            check_length((past.length if past else 0) + given.ids.shape[1], self.shape)
            check_ids(given.ids, self.shape)
        width = torch.finfo(self.net.W_E.dtype).bits // 8
        check_logits(logits, len(given.ids), given.ids.shape[1], self.shape, width)
        reads = parse_sites(read, self._serves, self._names)
        edits = parse_edits(edit, self._serves, self._names)
        wanted = check_layers(maps, range(self.shape.layers))
        for site in edits:
            if self._point(site.whole) not in self.net.hook_dict:
                raise Refused(
                    f"{site} cannot be edited: the mixer {self.net.config.mixer!r} of {self.name} does not build it; edit hook_z"
                )

        acts: dict[Site, Tensor] = {}
        captured: dict[int | str, AttentionMap] = {}
        explicit = {s.layer for s in edits if s.kind in ("pattern", "attn_scores")}
        from_maps = [s for s in reads if s.kind in MAP_KINDS or (s.kind == "attn_scores" and s.layer not in explicit)]
        needed = {s.layer for s in from_maps} | set(wanted)

        def on_map(layer: int, amap: AttentionMap) -> None:
            if layer not in needed:
                return
            for site in from_maps:
                if site.layer == layer:
                    acts[site] = site_from_map(amap, site, maps)
            if maps is not None and layer in wanted:
                captured[layer] = kept(amap, maps, layer)

        points = {s.whole for s in edits} | {s.whole for s in reads if s not in from_maps}
        fired: set[Site] = set()
        hooks = [
            (self.net.hook_dict[self._point(site)], self._hook(site, reads, edits, acts, fired)) for site in points
        ]
        device = self.net.W_E.device
        mask = None if given.mask.all() else given.mask.to(device)
        run = object()
        with attached(hooks, run), inside(run):
            data = (given.ids if pixels is None else pixels).to(device)
            hidden, new = self.net(data, mask, cache=past, on_map=on_map, hidden=True)
        for site in [*points - fired, *(s for s in reads if s not in acts)]:
            raise WorkbenchError(f"{site} was asked for and did not fire in {self.name}")
        for layer in wanted:
            if layer not in captured:
                raise WorkbenchError(f"layer {layer} of {self.name} was asked for and captured nothing")
        return Run(
            tokens=given,
            logits=self._logits(hidden, given, logits),
            output=hidden,
            acts=Activations(acts),
            maps=Maps(captured),
            provenance=self._provenance(captured),
            cache=new if past is not None or cache is True else None,
        )

    # ---------------------------------------------------------------- helpers

    @staticmethod
    def _past(cache: Any, given: Tokens) -> NativeCache | None:
        if cache is None or isinstance(cache, bool):
            return None
        if not isinstance(cache, NativeCache):
            raise WorkbenchError(f"cache is True, or the Run.cache of a native model; got {type(cache).__name__}")
        if len(cache.mask) != len(given.ids):
            raise WorkbenchError(f"the cache holds a batch of {len(cache.mask)}; the new tokens are {len(given.ids)}")
        return cache

    def _given(self, tokens: Any) -> Tokens:
        if self.net.config.grid is not None:
            return self._images(tokens)
        found = self._as_tokens(tokens)
        if found.inputs:
            raise WorkbenchError(f"a native model takes input_ids and attention_mask; got also {sorted(found.inputs)}")
        if not len(found.ids):
            raise WorkbenchError("the input is an empty batch")
        if found.ids.shape[1] and not bool(found.mask.any(1).all()):
            raise WorkbenchError("a row of the batch is nothing but padding")
        return found

    def _images(self, given: Any) -> Tokens:
        """Images of a tensor, of ``{"pixel_values": ...}`` or of ``Tokens`` with them."""
        if isinstance(given, Tokens):
            given = given.inputs
        if isinstance(given, Mapping):
            if set(given) != {"pixel_values"}:
                raise WorkbenchError(f"{self.name} reads images, pixel_values; got {sorted(given)}")
            given = given["pixel_values"]
        if not isinstance(given, Tensor) or given.ndim != 4 or not len(given):
            got = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise WorkbenchError(f"{self.name} reads images, a tensor [B, channels, rows, columns]; got {got}")
        empty = torch.zeros(len(given), 0, dtype=torch.int64)
        return Tokens(empty, empty.bool(), inputs={"pixel_values": given})

    def _as_tokens(self, tokens: Any) -> Tokens:
        if isinstance(tokens, Tokens):
            return tokens
        if isinstance(tokens, Mapping):
            unknown = set(tokens) - {"input_ids", "attention_mask"}
            if unknown or "input_ids" not in tokens:
                raise WorkbenchError(f"a native model takes input_ids and attention_mask; got {sorted(tokens)}")
            ids = torch.as_tensor(tokens["input_ids"])
            check_ids(ids, self.shape)
            plain = Tokens.of(ids, self.tokenizer)
            if tokens.get("attention_mask") is None:
                return plain
            mask = torch.as_tensor(tokens["attention_mask"]).bool()
            return Tokens(plain.ids, mask[None] if mask.ndim == 1 else mask, plain.labels)
        if isinstance(tokens, Tensor):
            check_ids(tokens, self.shape)
            return Tokens.of(tokens, self.tokenizer)
        return self.tokens(tokens)

    @staticmethod
    def _point(site: Site) -> str:
        """Module name of a site's hook point; the mixer owns its own."""
        kind = site.kind
        return (
            f"blocks.{site.layer}.attn.mixer.hook_{kind}" if kind in ("pattern", "attn_scores", "gate") else site.hook
        )

    def _serves(self, site: Site) -> bool:
        if site.stack or (site.layer is not None and site.layer >= self.shape.layers):
            return False
        grouped = site.kind in ("k", "v", "rot_k", "k_input", "v_input")
        heads = self.shape.kv_heads if grouped else self.shape.heads
        if site.head is not None and site.head >= heads:
            return False
        return site.kind in MAP_KINDS or self._point(site) in self.net.hook_dict

    def _names(self) -> list[str]:
        """Served sites with layers and heads as ranges, for messages."""
        last = self.shape.layers - 1
        names = dict.fromkeys(str(s).replace(f"blocks.{s.layer}.", f"blocks.0-{last}.") for s in self.sites())
        return [*names, f"(heads 0-{self.shape.heads - 1})"]

    @staticmethod
    def _hook(
        site: Site, reads: list[Site], edits: Mapping[Site, Any], acts: dict[Site, Tensor], fired: set[Site]
    ) -> Any:
        def act(tensor: Tensor, hook: Any) -> Tensor:
            fired.add(site)
            value = apply_edits(tensor, site, edits)
            for key in reads:
                if key.whole == site and key.kind not in MAP_KINDS:
                    acts[key] = value if key.head is None else value.select(key.head_axis, key.head)
            return value

        return act

    def _logits(self, hidden: Tensor, given: Tokens, which: str | None) -> Tensor | None:
        if which is None:
            return None
        if which == "last" and self.net.config.grid is None:
            last = given.mask.shape[1] - 1 - given.mask.flip(1).int().argmax(1)
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)][:, None]
        return self.net.logits(hidden)

    def _provenance(self, captured: Mapping[int | str, AttentionMap]) -> Provenance:
        impls = {getattr(m, "impl", "") or getattr(getattr(m, "raw", None), "impl", "") for m in captured.values()}
        parameter = next(self.net.parameters())
        return Provenance(
            model=self.name,
            revision=self.revision,
            dtype=str(parameter.dtype).removeprefix("torch."),
            device=str(parameter.device),
            attention=f"native {self.net.config.mixer}",
            kernel=", ".join(sorted(filter(None, impls))),
            versions=versions(),
        )

    def __repr__(self) -> str:
        return f"NativeModel({self.name!r}, {asdict(self.shape)})"
