"""Native models as a ``Model``: the bundled and the hand-compiled ones, and any ``NativeNet`` of your own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.captures import Capture
from workbench.errors import UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.native_net import NativeCache, NativeConfig, NativeNet
from workbench.models.protocol import Edit, LayerRecord, Manifest, Shape, Tokens
from workbench.models.requests import (
    MAP_KINDS,
    apply_edits,
    check_ids,
    check_layers,
    check_length,
    check_logits,
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

    Sites are read after edits. Reading ``pattern`` takes it from the captured map; editing ``pattern`` or touching
    ``attn_scores`` builds the scores explicitly in that layer, which changes the last bits of the output.
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
        c = net.config
        self.shape = Shape(
            c.layers, c.heads, c.kv_heads or c.heads, c.width, c.head_width, c.vocab, c.context, c.causal
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
        except (TypeError, ValueError) as error:
            raise WorkbenchError(f"{folder / 'config.json'} does not describe a native model: {error}") from error
        net = NativeNet(config)
        try:
            weights = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
            net.load_state_dict(weights)
        except Exception as error:
            raise WorkbenchError(f"cannot read {folder / 'model.safetensors'}: {str(error).splitlines()[0]}") from error
        tokenizer = None
        if (folder / "tokenizer.json").is_file():
            from transformers import PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast(
                tokenizer_file=str(folder / "tokenizer.json"),
                bos_token="<bos>",
                pad_token="<pad>",
                unk_token="<unk>",
                padding_side="right",
            )
        truth = None
        if (folder / "ground_truth").is_dir():
            from workbench.circuits import Circuit

            truth = Circuit.load(folder / "ground_truth")
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
        return cls(net.eval(), tokenizer, name=name or folder.name, revision=digest, ground_truth=truth)

    def save(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write what ``load`` reads."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        written = {"model_type": "workbench-native", **self.net.config.dict()}
        (folder / "config.json").write_text(json.dumps(written, indent=1) + "\n")
        save_file({k: v.to(dtype).contiguous() for k, v in self.net.state_dict().items()}, folder / "model.safetensors")
        if self.tokenizer is not None:
            self.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
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
        mixer = self.net.config.mixer
        records = tuple(LayerRecord(layer, mixer, "native", "exact") for layer in range(self.shape.layers))
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
        if self.net.training:
            raise WorkbenchError(f"{self.name} is in training mode; call .net.eval() first")
        given = self._given(tokens)
        past = cache if isinstance(cache, NativeCache) else None
        check_length((past.length if past else 0) + given.ids.shape[1], self.shape)
        check_ids(given.ids, self.shape)
        check_logits(logits, *given.ids.shape, self.shape)
        reads = parse_sites(read, self._serves, self._names)
        edits = dict(zip(parse_sites(edit, self._serves, self._names), edit.values(), strict=True))
        wanted = check_layers(maps, range(self.shape.layers))
        unfit = [s for s in edits if s.kind in MAP_KINDS and s.kind != "pattern"]
        if unfit:
            raise WorkbenchError(
                f"{unfit[0]} is a statistic of the attention map and cannot be edited; edit pattern or z"
            )

        acts: dict[Site, Tensor] = {}
        captured: dict[int | str, AttentionMap] = {}
        from_maps = [s for s in reads if s.kind in MAP_KINDS]
        needed = {s.layer for s in from_maps} | set(wanted)

        def on_map(layer: int, amap: AttentionMap) -> None:
            if layer not in needed:
                return
            for site in from_maps:
                if site.layer == layer:
                    acts[site] = site_from_map(amap, site, maps)
            if maps is not None and layer in wanted:
                captured[layer] = amap.precompute(maps)

        handles: list[Any] = []
        try:
            for site in {s.whole for s in [*reads, *edits] if s.kind not in MAP_KINDS or s in edits}:
                point = self.net.hook_dict[self._point(site)]
                handles.append(point.register_forward_hook(self._hook(site, reads, edits, acts)))
                # TransformerLens keeps its own list; hook points that are computed only on demand look at it.
                point.fwd_hooks.append(handles[-1])
            hidden, new = self.net(
                given.ids, given.mask if not given.mask.all() else None, cache=past, on_map=on_map, hidden=True
            )
        finally:
            for handle in handles:
                handle.remove()
            for point in self.net.hook_dict.values():
                point.fwd_hooks[:] = [h for h in point.fwd_hooks if not any(h is mine for mine in handles)]
        for site in {s.whole for s in reads}:
            if not any(stored.whole == site for stored in acts):
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
            cache=new if cache is not None and cache is not False else None,
        )

    # ---------------------------------------------------------------- helpers

    def _given(self, tokens: Any) -> Tokens:
        if isinstance(tokens, Tokens):
            return tokens
        if isinstance(tokens, Mapping):
            unknown = set(tokens) - {"input_ids", "attention_mask"}
            if unknown or "input_ids" not in tokens:
                raise WorkbenchError(f"a native model takes input_ids and attention_mask; got {sorted(tokens)}")
            plain = Tokens.of(tokens["input_ids"], self.tokenizer)
            mask = tokens.get("attention_mask")
            return plain if mask is None else Tokens(plain.ids, mask.bool(), plain.labels)
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
    def _hook(site: Site, reads: list[Site], edits: Mapping[Site, Any], acts: dict[Site, Tensor]) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
            value = apply_edits(output, site, edits)
            for key in reads:
                if key.whole == site and key.kind not in MAP_KINDS:
                    acts[key] = value if key.head is None else value.select(key.head_axis, key.head)
            return value

        return hook

    def _logits(self, hidden: Tensor, given: Tokens, which: str | None) -> Tensor | None:
        if which is None:
            return None
        if which == "last":
            last = given.mask.shape[1] - 1 - given.mask.flip(1).int().argmax(1)
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), last.to(hidden.device)][:, None]
        return hidden @ self.net.unembed

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
