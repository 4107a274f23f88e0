"""Capture through transformers' attention interface: an attention and a mask function under a key of our own.

For the length of one run the model's configs carry a ``Key`` that stands for the implementation they had. Model code that
branches on the implementation's name still takes its own branch (the key compares equal to that name), while lookups in
the interface find ``attend`` and ``build_mask`` here. Both call exactly the function that the model would have called with
exactly its arguments, so that outputs are bit-identical; what they add is a look at the arguments.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from workbench.errors import Refused
from workbench.models.current import current, inside
from workbench.models.denominators import Denominators
from workbench.models.layers import kernel_before
from workbench.models.recorders.base import attending
from workbench.models.session import Session
from workbench.models.steps import Steps

_SUFFIX = "+workbench"
_REGISTERED: set[str] = set()
_SWITCHED: dict[int, list[Any]] = {}
"""Config, implementation it had, and number of runs that hold it switched, by the config's id."""
_LOCK = threading.Lock()

# What the attention functions of transformers are passed beside q, k, v and the mask, and what each means for the map.
_IN_THE_MAP = ("scaling", "softcap", "s_aux", "position_bias", "is_causal", "sliding_window")
_HARMLESS = (
    "position_ids",
    "cache_position",
    "use_cache",
    "past_key_values",
    "past_key_value",
    "layer_past",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "logits_to_keep",
    "num_items_in_batch",
    "position_embeddings",
)


class Key(str):
    """Name of our function standing for implementation ``base``: looked up as itself, compared as ``base``."""

    base: str | None

    def __new__(cls, base: str | None) -> Key:
        key = super().__new__(cls, f"{base or 'eager'}{_SUFFIX}")
        key.base = base
        return key

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == (self.base or "eager")

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def __deepcopy__(self, memo: Any) -> Key:
        return self


def configs(model: nn.Module) -> list[Any]:
    """Every config that modules of ``model`` look at, sub-configs and per-module copies included."""
    found: dict[int, Any] = {}
    holders: list[Any] = [m for m in model.modules() if hasattr(m, "config")]
    queue = [m.config for m in holders if hasattr(m.config, "_attn_implementation_internal")]
    while queue:
        config = queue.pop()
        if id(config) not in found:
            found[id(config)] = config
            subs = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
            queue += [sub for sub in subs if hasattr(sub, "_attn_implementation_internal")]
    return list(found.values())


@contextmanager
def capturing(model: nn.Module, session: Session | Steps, *, switch: bool) -> Iterator[None]:
    """Make ``session`` the one that attention calls report to; with ``switch``, point the model's configs at us.

    Everything is as before on exit, also after an exception; a config that several runs share (other threads, other models)
    when the last of them ends.
    """
    with ExitStack() as undo:
        for config in configs(model) if switch else ():
            _switch(config)
            undo.callback(_switch_back, config)
        undo.enter_context(inside(session))
        yield


def _switch(config: Any) -> None:
    with _LOCK:
        found = config._attn_implementation_internal
        if not isinstance(found, Key):
            config._attn_implementation_internal = _registered(Key(found))
        _SWITCHED.setdefault(id(config), [config, found, 0])[2] += 1


def _switch_back(config: Any) -> None:
    with _LOCK:
        held = _SWITCHED[id(config)]
        held[2] -= 1
        if not held[2]:
            config._attn_implementation_internal = held[1]
            del _SWITCHED[id(config)]


def _registered(key: Key) -> Key:
    from transformers import AttentionInterface, AttentionMaskInterface

    if str.__str__(key) not in _REGISTERED:
        AttentionInterface.register(key, attend)
        AttentionMaskInterface.register(key, build_mask)
        _REGISTERED.add(str.__str__(key))
    return key


def _base(found: Any) -> str:
    """The implementation behind what a config holds; another thread may have switched it back already."""
    return (found.base if isinstance(found, Key) else found) or "eager"


def build_mask(*args: Any, **kwargs: Any) -> Any:
    """The mask that the model's own implementation builds, remembered together with the rule it was built from."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    found = getattr(kwargs.get("config"), "_attn_implementation_internal", None)
    mask = ALL_MASK_ATTENTION_FUNCTIONS[_base(found)](*args, **kwargs)
    run = current()
    if isinstance(run, Session) and mask is not None:
        run.masks.remember(mask, kwargs)
    elif isinstance(run, Steps) and mask is not None:
        run.built.append((mask, kwargs))
    return mask


@torch.compiler.disable
def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
) -> tuple[Any, Any]:
    """The attention function the model had, with the session looking on. In a compiled model it is called between graphs."""
    run = current()
    if isinstance(run, Steps) and (held := run.layers.get(id(module))) is not None:
        result = held.kernel(module, query, key, value, attention_mask, *args, **kwargs)
        if held.wanted:
            held.add(query, key, attention_mask, args, kwargs, run.gates.pop(id(module), None))
        return result
    session = run if isinstance(run, Session) else None
    recorder = None if session is None else attending(module)
    base = _base(getattr(getattr(module, "config", None), "_attn_implementation_internal", None))
    kernel = kernel_before(module, base)
    if recorder is not None:
        options = allowed_options(recorder.session.family, recorder.layer, args, kwargs)
        return recorder.attended(kernel, (query, key, value, attention_mask), kwargs, options, base)
    layer = None if session is None else session.next_layer(module)
    if session is None or layer is None or not session.wants(layer):
        return kernel(module, query, key, value, attention_mask, *args, **kwargs)
    options = allowed_options(session.family, layer, args, kwargs)
    query, key, value = session.on_inputs(layer, q=query, k=key, v=value)
    with Denominators() if session.wants_map(layer) else nullcontext() as seen:
        output, weights = kernel(module, query, key, value, attention_mask, **kwargs)
    if session.wants_map(layer):
        bias = options.get("position_bias")
        choice = session.choices.pop(id(module), None)
        given = attention_mask if choice is None else choice.mask
        mask, extra = session.masks.resolve(layer, given, query, key, base, options)
        if extra is not None:
            bias = extra if bias is None else bias + extra
        session.on_map(
            layer, query, key, mask, scale=options.get("scaling"), softcap=options.get("softcap"),
            sink=options.get("s_aux"), bias=bias, lse=None if seen is None else seen.lse, choice=choice,
        )  # fmt: skip
    output = session.on_pattern(layer, weights if base == "eager" else None, value, output, base)
    return session.on_output(layer, output), weights


def allowed_options(family: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The options that shape the map; an argument whose meaning we do not know is refused."""
    if args:
        raise Refused(f"layer {layer.key} of {family}: {layer.name} passes {len(args)} unnamed attention arguments")
    if kwargs.get("dropout"):
        raise Refused(f"layer {layer.key} of {family}: attention dropout {kwargs['dropout']} is on; call .eval()")
    for name, given in kwargs.items():
        if given is None or given is False or name in _IN_THE_MAP or name in _HARMLESS or name == "dropout":
            continue
        raise Refused(
            f"layer {layer.key} of {family}: {layer.name} passes the attention argument {name!r}, whose effect on the "
            "pattern is not modelled; leave the layer out with maps=capture(layers=[...])"
        )
    return {name: kwargs.get(name) for name in (*_IN_THE_MAP, "position_ids")}
