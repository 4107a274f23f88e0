"""Module hooks that read and edit sites of one run, and the table of which sites a model serves and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from workbench.models.current import current
from workbench.models.families import Wiring, has_stream, join_heads, split_heads, submodule, wiring_of
from workbench.models.layers import AttentionLayer
from workbench.models.recorders.gates import gate_of
from workbench.models.recorders.registry import is_recorded, recorder_of
from workbench.models.requests import MAP_KINDS, apply_edits
from workbench.models.session import Session
from workbench.sites import Site

_FINAL_NORMS = ("norm", "ln_f", "norm_f", "final_layer_norm", "final_layernorm", "layernorm", "layer_norm", "final_norm",
                "ln_out", "embedding_norm")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Place:
    """One attention layer with its block's wiring, head counts, and which kinds are served by which means."""

    layer: AttentionLayer
    block: nn.Module
    wiring: Wiring | None
    heads: int
    kv_heads: int
    width: int
    at_function: frozenset[str] = frozenset()
    at_modules: frozenset[str] = frozenset()
    of_map: frozenset[str] = field(default=frozenset(MAP_KINDS))

    @property
    def kinds(self) -> frozenset[str]:
        return self.at_function | self.at_modules | self.of_map


def places(model: nn.Module, layers: Sequence[AttentionLayer]) -> list[Place]:
    """What each layer serves."""
    found = []
    for layer in layers:
        block = model.get_submodule(layer.block)
        cross = layer.stack == "cross"
        wiring = wiring_of(block, cross)
        heads, kv_heads, width = head_counts(layer.module)
        if layer.route == "none":
            found.append(Place(layer, block, None, heads, kv_heads, width, of_map=frozenset()))
            continue
        modules: set[str] = {"resid_pre", "resid_post"} if has_stream(block) and not cross else set()
        if wiring is not None:
            paths = {
                "attn_out": wiring.attn_out,
                "attn_norm": wiring.attn_norm,
                "resid_mid": wiring.mid,
                "mlp_norm": wiring.mlp_norm,
                "mlp_out": wiring.mlp_out,
                "mlp_pre": wiring.pre,
                "mlp_post": wiring.post,
                "result": wiring.out,
                "q": wiring.q or wiring.fused,
                "k": wiring.k or wiring.fused,
                "v": wiring.v or wiring.fused,
            }
            modules |= {kind for kind, path in paths.items() if submodule(block, path) is not None}
            if "attn_out" not in modules and not wiring.end:
                modules.discard("resid_mid")
        if layer.shared:  # hooks on its modules would not tell its runs apart
            modules, wiring = set(), None
        function = {"q", "k", "v", "z"} if wiring is not None and not wiring.rotary else {"rot_q", "rot_k", "v", "z"}
        sites = recorder_of(layer.module).sites if layer.route == "recorder" else None
        if sites is not None:
            found.append(_of_recorder(layer, block, wiring, (heads, kv_heads, width), sites))
            continue
        if layer.route == "recorder":
            modules |= {"z"}
        if gate_of(layer.module) is not None:  # what the attention function returns is not what goes into W_O
            modules |= {"z"} if wiring is not None else set()
            function -= {"z"}
        function -= modules
        found.append(
            Place(layer, block, wiring, heads, kv_heads, width, frozenset(function | {"pattern"}), frozenset(modules))
        )
    return found


def _of_recorder(
    layer: AttentionLayer, block: nn.Module, wiring: Wiring | None, counts: tuple[int, int, int], sites: frozenset[str]
) -> Place:
    """A layer whose recorder says which sites of the mixing there are."""
    modules = {"resid_pre", "resid_post"} if has_stream(block) else set()
    if wiring is not None:
        paths = {"attn_norm": wiring.attn_norm, "attn_out": wiring.attn_out, "resid_mid": wiring.mid,
                 "mlp_norm": wiring.mlp_norm, "mlp_out": wiring.mlp_out,
                 "mlp_pre": wiring.pre, "mlp_post": wiring.post}  # fmt: skip
        modules |= {kind for kind, path in paths.items() if submodule(block, path) is not None}
        if "attn_out" not in modules:
            modules.discard("resid_mid")
    statistics = recorder_of(layer.module).statistics
    return Place(layer, block, wiring, *counts, at_function=sites, at_modules=frozenset(modules), of_map=statistics)


def head_counts(module: nn.Module) -> tuple[int, int, int]:
    """Query heads H, key heads G and query-key width E of an attention module, as its attributes tell; 0 if they do not."""
    known = recorder_of(module).heads(module) if is_recorded(module) else None
    if known is not None:
        return known

    def attribute(*names: str) -> int:
        config = getattr(module, "config", None)
        for holder in (module, config):
            for name in names:
                value = getattr(holder, name, None)
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
        return 0

    heads = attribute("num_heads", "num_attention_heads", "n_heads", "n_head")
    groups = getattr(module, "num_key_value_groups", None)
    if any(cls.__name__ == "FalconAttention" for cls in type(module).__mro__):
        kv_heads = heads if module.new_decoder_architecture else attribute("num_kv_heads")
    elif isinstance(groups, int) and groups:
        kv_heads = heads // groups
    else:
        kv_heads = heads
    width = attribute("qk_head_dim", "head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "d_kv")
    if not width and heads:
        width = attribute("hidden_size", "embed_dim", "d_model") // heads
    return heads, kv_heads, width


class Globals:
    """Modules of the sites that belong to no layer: the token embedding and the last norm of each stack."""

    def __init__(self, model: Any, layers: Sequence[AttentionLayer]) -> None:
        self.modules: dict[tuple[str, str], nn.Module] = {}
        stacks = list(dict.fromkeys(layer.stack for layer in layers))
        try:
            embedding = model.get_input_embeddings()
        except (AttributeError, NotImplementedError):
            embedding = None
        if isinstance(embedding, nn.Embedding) and stacks in ([""], ["text", "vision"], ["vision", "text"]):
            self.modules["embed", "" if stacks == [""] else "text"] = embedding
        for stack in stacks:
            if stack in ("cross", "vision"):
                continue
            first = next(layer for layer in layers if layer.stack == stack)
            owner = first.block.rsplit(".", 2)[0] if first.block.count(".") > 1 else ""
            for path in (owner, owner.rpartition(".")[0]):
                holder = model.get_submodule(path)
                norm = next(
                    (getattr(holder, n) for n in _FINAL_NORMS if isinstance(getattr(holder, n, None), nn.Module)), None
                )
                if norm is not None and wiring_of(model.get_submodule(first.block)) is not None:
                    self.modules["final_norm", stack] = norm
                    break


class Taps:
    """Hooks of one run. ``installed`` puts them in and takes them out, also after an exception."""

    def __init__(self, places: Sequence[Place], extra: Globals, session: Session) -> None:
        self.session = session
        self._handles: list[Any] = []
        self._places = places
        self._extra = extra
        self._sites = {s.whole for s in [*session.reads, *session.edits]}

    @contextmanager
    def installed(self) -> Iterator[None]:
        try:
            for (kind, stack), module in self._extra.modules.items():
                site = Site(kind, stack=stack)
                if site in self._sites:
                    self._after(module, self._visit(site))
            for place in self._places:
                asked = {s.kind for s in self._sites if (s.stack, s.layer) == (place.layer.stack, place.layer.index)}
                if asked & place.at_modules:
                    self._tap(place, asked & place.at_modules)
            yield
        finally:
            for handle in self._handles:
                handle.remove()

    def _visit(self, site: Site) -> Callable[[Tensor], Tensor]:
        return lambda value: self.session.visit(site, value)

    def _tap(self, place: Place, asked: set[str] | frozenset[str]) -> None:
        layer, block = place.layer, place.block
        wiring = place.wiring or Wiring("")
        frame = _Frame()

        def site(kind: str) -> Site:
            return Site(kind, layer.index, stack=layer.stack)

        def module(path: str) -> nn.Module:
            found = submodule(block, path)
            assert found is not None
            return found

        if "resid_pre" in asked:
            self._before(block, self._visit(site("resid_pre")))
        self._before(block, frame.see)
        for kind, path in (
            ("attn_norm", wiring.attn_norm),
            ("mlp_norm", wiring.mlp_norm),
            ("mlp_pre", wiring.pre),
            ("attn_out", wiring.attn_out),
            ("mlp_out", wiring.mlp_out),
        ):
            if kind in asked:
                keep = kind == "mlp_out" and wiring.adds_in_place
                self._after(module(path), frame.shaped(self._visit(site(kind)), clone=keep))
        if "mlp_post" in asked:
            self._before(module(wiring.post), frame.shaped(self._visit(site("mlp_post"))))
        if "resid_mid" in asked:
            if wiring.end:
                self._before(module(wiring.mid), frame.shaped(self._visit(site("resid_mid"))))
            else:
                self._after(module(wiring.attn_out), frame.shaped(self._edit_mid(site("resid_mid"), frame)))
                self._before(module(wiring.mid), frame.shaped(self._read(site("resid_mid"))))
        if "resid_post" in asked:
            if wiring.end:
                self._before(module(wiring.end), frame.shaped(self._visit(site("resid_post"))))
            else:
                self._after(block, self._visit(site("resid_post")))
        for kind in ("q", "k", "v"):
            if kind in asked and getattr(wiring, kind):
                self._after(module(getattr(wiring, kind)), _per_head(self._visit(site(kind)), place.width))
        if wiring.fused and asked & {"q", "k", "v"}:
            self._after(
                module(wiring.fused), self._fused(place, wiring, [site(k) for k in ("q", "k", "v") if k in asked])
            )
        if "z" in asked:
            visit = self._visit(site("z"))
            self._before(module(wiring.out), lambda x: visit(x.unflatten(-1, (place.heads, -1))).flatten(-2))
        if "result" in asked:
            self._result(module(wiring.out), place, site("result"))

    def _edit_mid(self, site: Site, frame: _Frame) -> Callable[[Tensor], Tensor]:
        """In pre-norm blocks the stream after attention is edited through what attention adds to it."""
        edits = {key: edit for key, edit in self.session.edits.items() if key.whole == site}

        def act(output: Tensor) -> Tensor:
            if not edits:
                return output
            assert frame.entry is not None
            stream = frame.entry + output
            self.session.mark(edits)
            return output + (apply_edits(stream, site, edits) - stream)

        return act

    def _read(self, site: Site) -> Callable[[Tensor], Tensor]:
        def act(value: Tensor) -> Tensor:
            self.session.record(site, value)
            return value

        return act

    def _fused(self, place: Place, wiring: Wiring, sites: list[Site]) -> Callable[[Tensor], Tensor]:
        def act(output: Tensor) -> Tensor:
            parts = split_heads(wiring, output, place.heads, place.kv_heads, place.width)
            before = dict(parts)
            for site in sites:
                parts[site.kind] = self.session.visit(site, parts[site.kind])
            if not output.requires_grad and all(parts[name] is before[name] for name in parts):
                return output
            return join_heads(wiring, parts)

        return act

    def _result(self, projection: nn.Module, place: Place, site: Site) -> None:
        held: list[Tensor] = []

        def take(value: Tensor) -> Tensor:
            held[:] = [
                torch.einsum("bthe,hed->bthd", value.unflatten(-1, (place.heads, -1)), w_o(projection, place.heads))
            ]
            return value

        def give(output: Tensor) -> Tensor:
            old, new = held[0], self.session.visit(site, held[0])
            if new is not old:
                return output + (new - old).sum(-2)
            # The same bits, with gradients leading through the heads and through nothing else.
            return output.detach() + (new - new.detach()).sum(-2) if old.requires_grad else output

        self._before(projection, take)
        self._after(projection, give)

    def _before(self, module: nn.Module, act: Callable[[Tensor], Tensor]) -> None:
        """Let ``act`` see and replace the first tensor that goes into ``module``."""

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if current() is not self.session:
                return None
            if args:
                new = act(args[0])
                return None if new is args[0] else ((new, *args[1:]), kwargs)
            name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
            new = act(kwargs[name])
            return None if new is kwargs[name] else (args, {**kwargs, name: new})

        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _after(self, module: nn.Module, act: Callable[[Tensor], Tensor]) -> None:
        """Let ``act`` see and replace the (first) tensor that comes out of ``module``."""

        def hook(_: nn.Module, args: Any, output: Any) -> Any:
            if current() is not self.session:
                return None
            if isinstance(output, tuple):
                new = act(output[0])
                return None if new is output[0] else (new, *output[1:])
            new = act(output)
            return None if new is output else new

        self._handles.append(module.register_forward_hook(hook))


def _per_head(act: Callable[[Tensor], Tensor], width: int) -> Callable[[Tensor], Tensor]:
    """``act`` of ``[B, T, heads, E]`` as a function of ``[B, T, heads * E]``."""
    return lambda value: act(value.unflatten(-1, (-1, width))).flatten(-2)


class _Frame:
    """The block's input, and through it the shape [B, T] that some families flatten inside the block."""

    entry: Tensor | None = None

    def see(self, value: Tensor) -> Tensor:
        self.entry = value
        return value

    def shaped(self, act: Callable[[Tensor], Tensor], *, clone: bool = False) -> Callable[[Tensor], Tensor]:
        def wrapped(value: Tensor) -> Tensor:
            assert self.entry is not None
            if value.ndim == 2 and self.entry.ndim == 3:
                given = value.view(*self.entry.shape[:2], -1)
                return act(given).reshape(value.shape)
            new = act(value)
            return new.clone() if clone else new

        return wrapped


def w_o(projection: nn.Module, heads: int) -> Tensor:
    """W_O as ``[H, E, D]``: the part of the output projection that each head writes through."""
    weight: Any = projection.weight
    if type(projection).__name__ != "Conv1D":
        weight = weight.T
    return weight.unflatten(0, (heads, -1))
