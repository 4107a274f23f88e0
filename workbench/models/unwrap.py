"""The Hugging Face model inside a TransformerLens bridge, as it was before the bridge wrapped its modules.

A bridge puts its own components into the module tree of the model it boots and computes attention itself, as an N x N
tensor. For the length of a ``with`` block the original modules are back in their places, so that the model's own forward,
and with it transformers' attention interface, runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent


@contextmanager
def unwrapped(model: nn.Module) -> Iterator[Any]:
    """``model`` with every bridge component replaced by the module it wraps; all are back on exit."""
    undo: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        _restore_originals(model, undo)
        yield model
    finally:
        for parent, name, component in reversed(undo):
            parent._modules[name] = component


def _restore_originals(parent: nn.Module, undo: list[tuple[nn.Module, str, nn.Module]]) -> None:
    for name, child in list(parent._modules.items()):
        if child is None:
            continue
        original: Any = child
        while isinstance(original, GeneralizedComponent) and original.original_component is not None:
            original = original.original_component
        if original is not child:
            undo.append((parent, name, child))
            parent._modules[name] = original
        _restore_originals(original, undo)


@contextmanager
def fused(model: Any) -> Iterator[None]:
    """An unwrapped model running torch's fused attention where its family supports it; as before on exit."""
    from workbench.models.interface import configs

    before = [(config, config._attn_implementation_internal) for config in configs(model)]
    try:
        try:
            model.set_attn_implementation("sdpa")
        except ValueError:
            for config, implementation in before:
                config._attn_implementation_internal = implementation
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
