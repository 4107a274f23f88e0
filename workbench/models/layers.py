"""Which attention layers a Hugging Face model has, and by which route each can be captured."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from workbench.models.protocol import LayerRecord
from workbench.models.recorders.choice import indexer_of
from workbench.models.recorders.gates import gate_of, hides_gate
from workbench.models.recorders.registry import is_listed, is_recorded, recorder_of

_LOOKS_LIKE_MIXER = re.compile(
    r"Attention|Attn|Mixer|DeltaNet|Mamba|SSM|Retention|TimeMix|RecurrentBlock|Hyena|ShortConv|FourierTransform"
)
_IS_A_PART = re.compile(r"Norm|Embedding|Bias|Output|Mask|Pool")
_INTERFACE_CALL = re.compile(r"(?:get_interface\(\s*[^,]+,\s*|ALL_ATTENTION_FUNCTIONS\.get\(\s*[^,]+,\s*)(\w+)")


_EAGER: dict[Any, str | None] = {}


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One attention module: its key in ``Run.maps``, its stack and number, and how it is reached."""

    stack: str
    index: int
    key: int | str
    path: str
    module: nn.Module
    block: str
    """Path of the block (an entry of a ``ModuleList``) it lives in."""
    route: str
    shared: bool = False
    """Whether its module runs as other layers too."""

    @property
    def name(self) -> str:
        return f"{self.path} ({type(self.module).__name__})"


def interface_function(cls: Any) -> str | None:
    """Name of the eager function that a module class hands to the attention interface; None if it never asks it."""
    if cls not in _EAGER:
        _EAGER[cls] = _read_eager_function(cls)
    return _EAGER[cls]


def _read_eager_function(cls: Any) -> str | None:
    try:
        source = inspect.getsource(inspect.unwrap(cls.forward))
    except (OSError, TypeError):
        return None
    if "ALL_ATTENTION_FUNCTIONS" not in source:
        return None
    match = _INTERFACE_CALL.search(source)
    return match[1] if match else None


@cache
def _calls_twice(forward: Callable[..., Any]) -> bool:
    """Whether a forward pass always calls the attention function twice (differential attention): neither call has the layer's
    pattern."""
    function: Any = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))).body[0]
    calls = [step.value for step in function.body if isinstance(step, ast.Assign) and isinstance(step.value, ast.Call)]
    return sum(isinstance(call.func, ast.Name) and call.func.id == "attention_interface" for call in calls) > 1


def why_not(module: nn.Module) -> str:
    """Why a layer without a route cannot be captured."""
    if interface_function(type(module)) is not None:
        return "calls its attention function twice and combines what comes out, so no one map is its own"
    if is_listed(module):
        return "mixes inside of its own forward in this version of transformers; newer ones have a function that can be recorded"
    return "does not go through transformers' attention interface and no recorder knows it"


def kernel_before(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The function that ``module`` calls under ``implementation``: its own eager one, or the registered one."""
    names = inspect.unwrap(type(module).forward).__globals__
    eager = names[interface_function(type(module))]
    return names["ALL_ATTENTION_FUNCTIONS"].get_interface(implementation, eager)


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """All attention layers in order of their modules, those without a route included (``route="none"``)."""
    found: list[tuple[str, int, str, nn.Module, str, str]] = []
    for block_path, block in _blocks(model):
        routed = []
        candidate: tuple[str, nn.Module] | None = None
        for name, module in block.named_modules():
            path = f"{block_path}.{name}" if name else block_path
            route = _route(module)
            if route != "none":
                routed.append((path, module, route))
            elif name and candidate is None and _looks_like_mixer(module):
                candidate = (path, module)
        if not routed and candidate is not None:
            routed = [(*candidate, "none")]
        number = int(block_path.rsplit(".", 1)[1])
        found += [(_stack(path), number, path, module, block_path, route) for path, module, route in routed]
    found = _in_passes(model, found)
    times = Counter(id(module) for _, _, _, module, _, _ in found)
    stacks = list(dict.fromkeys(stack for stack, *_ in found))
    if stacks in (["encoder"], ["decoder"], ["text"], ["vision"]):
        found = [("", n, p, m, b, r) for _, n, p, m, b, r in found]
    layers = []
    for stack in dict.fromkeys(stack for stack, *_ in found):
        members = [entry for entry in found if entry[0] == stack]
        numbers = [entry[1] for entry in members]
        if len(set(numbers)) != len(numbers):
            numbers = list(range(len(members)))
        for number, (_, _, path, module, block_path, route) in zip(numbers, members, strict=True):
            key: int | str = f"{stack}.{number}" if stack else number
            layers.append(
                AttentionLayer(stack, number, key, path, module, block_path, route, shared=times[id(module)] > 1)
            )
    return layers


def _in_passes(model: nn.Module, found: list[Any]) -> list[Any]:
    """``found`` in the order in which the layers run, with those named again that run again (ALBERT)."""
    for path, stack in model.named_modules():
        if type(stack).__name__ == "AlbertTransformer":
            config: Any = stack.config
            layers, groups = config.num_hidden_layers, config.num_hidden_groups
            members = [
                [entry for entry in found if entry[2].startswith(f"{path}.albert_layer_groups.{group}.".lstrip("."))]
                for group in range(groups)
            ]
            return [entry for i in range(layers) for entry in members[int(i / (layers / groups))]]
    return found


def has_state(layer: AttentionLayer) -> bool:
    """Whether a recorder knows the layer as one without scores of pairs."""
    return layer.route == "recorder" and recorder_of(layer.module).state


def is_causal(layer: AttentionLayer) -> bool:
    if layer.route == "recorder":
        return recorder_of(layer.module).causal(layer.module)
    return bool(getattr(layer.module, "is_causal", False))


def is_compiled(model: nn.Module) -> bool:
    made = (getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod") for module in model.modules())
    return any(made)


def on_interface(layer: AttentionLayer) -> bool:
    """Whether a layer calls the attention interface."""
    return layer.route == "attention interface" or (layer.route == "recorder" and recorder_of(layer.module).interface)


def pads(layer: AttentionLayer) -> bool:
    """Whether the layer's model lengthens its input by itself."""
    return layer.route == "recorder" and recorder_of(layer.module).pads(layer.module)


def builds_scores(layer: AttentionLayer, implementation: str) -> bool:
    """Whether the scores of all pairs are built in full."""
    if implementation != "eager" or layer.route == "none":
        return implementation == "eager"
    return layer.route != "recorder" or recorder_of(layer.module).quadratic(layer.module)


def describe(layer: AttentionLayer, implementation: str, *, stream: bool = True) -> LayerRecord:
    """The manifest's line about one layer; ``stream``: whether the residual stream around it can be had."""
    if layer.route == "none":
        what = type(layer.module).__name__
        return LayerRecord(layer.key, what, "none", "none", f"{what} {why_not(layer.module)}")
    missing = ""
    if "flash" in implementation or "flex" in implementation:
        missing = f"editing pattern ({implementation} never builds it)"
    elif layer.route == "recorder" or implementation != "eager":
        missing = "editing pattern (load with attn_implementation='eager' where the family allows it)"
    mixer = ""
    cls: Any = type(layer.module)
    if hides_gate(cls):
        missing = "; ".join(filter(None, ("output gate (the map is before it)", missing)))
    if layer.route == "recorder":
        recorder = recorder_of(layer.module)
        mixer, missing = recorder.named(layer.module), recorder.missing or missing
    cross = layer.stack == "cross"
    if not (stream or cross):
        missing = "; ".join(filter(None, (missing, "residual stream")))
    return LayerRecord(layer.key, mixer or _softmax(layer.module, cross=cross), layer.route, "exact", missing)


def _softmax(module: nn.Module, *, cross: bool) -> str:
    """``softmax`` with what the module adds to it, as far as its attributes tell."""
    parts = ["softmax"]
    config: Any = getattr(module, "config", None)
    window = getattr(module, "sliding_window", None)
    if window is None and getattr(module, "is_sliding", True):
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None) if kinds is None else None
        if not getattr(config, "use_sliding_window", True):
            window = None
    if isinstance(window, int):
        parts.append(f"window {window}")
    chunk, kinds = getattr(config, "attention_chunk_size", None), getattr(config, "layer_types", None)
    if chunk and kinds and kinds[module.layer_idx] == "chunked_attention":
        parts.append(f"chunks of {chunk}")
    cap = getattr(module, "attn_logit_softcapping", None)
    if cap is not None:
        parts.append(f"softcap {cap:g}")
    if getattr(module, "sinks", None) is not None:
        parts.append("sink")
    if type(module).__name__ == "SwinAttention":
        parts.append("shifted windows")
    biased = getattr(module, "relative_position_bias", None) is not None
    if biased or (hasattr(module, "has_relative_attention_bias") and not cross):
        parts.append("position bias")
    if indexer_of(module) is not None:
        parts.append(f"top {config.index_topk} by indexer")
    if type(module).__name__ in ("BloomAttention", "MptAttention") or getattr(config, "alibi", False):
        parts.append("alibi")
    if gate_of(module) is not None:
        parts.append("output gate per channel")
    return " + ".join(parts)


def _route(module: nn.Module) -> str:
    if interface_function(type(module)) is not None and not _calls_twice(type(module).forward):
        return "attention interface"
    if is_recorded(module):
        return "recorder"
    return "none"


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every block: the entries of the innermost ``ModuleList`` whose entries are of one class and
    mix tokens (a stage of Swin holds blocks; a block of T5 holds unlike sublayers), or of an outer mixed list."""
    mixing = {path: m for path, m in model.named_modules() if isinstance(m, nn.ModuleList) and _mixes(m)}
    alike = {path for path, entries in mixing.items() if len({type(entry) for entry in entries}) == 1}
    for path, entries in mixing.items():
        if path in alike:
            skip = any(other.startswith(f"{path}.") for other in alike)
        else:
            skip = any(other.startswith(f"{path}.") or path.startswith(f"{other}.") for other in alike)
            skip = skip or any(path.startswith(f"{other}.") for other in mixing)
        if not skip:
            for i, block in enumerate(entries):
                yield f"{path}.{i}", block


def _mixes(entries: nn.Module) -> bool:
    return any(_route(m) != "none" or _looks_like_mixer(m) for m in entries.modules())


def _looks_like_mixer(module: nn.Module) -> bool:
    name = type(module).__name__
    return bool(_LOOKS_LIKE_MIXER.search(name)) and not _IS_A_PART.search(name)


def _stack(path: str) -> str:
    """The half of a two-stack model that an attention module belongs to, read off its path."""
    if re.search(r"EncDecAttention|encoder_attn|cross_?attention|cross_attn", path):
        return "cross"
    for word, stack in (("vision", "vision"), ("visual", "vision"), ("text", "text"), ("language", "text")):
        if re.search(rf"(^|\.){word}", path):
            return stack
    match = re.search(r"(?:^|\.)(encoder|decoder)\.", path)
    return match[1] if match else ""
