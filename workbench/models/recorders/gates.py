"""Output gates of layers that go through the attention interface: the layer's map is the gated one, with the softmax inside.

The interface never sees a gate that the module multiplies its output by. It is read off the projection that makes it, which runs
before the attention function, and waits in the run until the map it belongs to is built.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from workbench.models.current import current

if TYPE_CHECKING:
    from workbench.models.layers import AttentionLayer


class Gate(NamedTuple):
    """``projection``: the submodule whose output holds the gate; ``of``: the gate ``[B, Q, H, E]`` as it multiplies the attention
    output, from the module and that output."""

    projection: str
    of: Callable[[Any, Tensor], Tensor]


def _half_of_queries(module: Any, projected: Tensor) -> Tensor:
    """Every head's projection is its query and its gate, side by side."""
    return projected.unflatten(-1, (-1, 2 * module.head_dim))[..., module.head_dim :].sigmoid()


GATES: dict[str, Gate] = {
    "Qwen3NextAttention": Gate("q_proj", _half_of_queries),
    "Qwen3_5Attention": Gate("q_proj", _half_of_queries),
    "Qwen3_5MoeAttention": Gate("q_proj", _half_of_queries),
}
"""By the class of the module; subclasses of a listed class count too."""

_MULTIPLIED = re.compile(r"^[^#\n]*(?:\*[^#\n]*gate|gate[^#\n]*\*\s*attn_output|\*[^#\n]*sigmoid)", re.MULTILINE)


def gate_of(module: nn.Module) -> Gate | None:
    return next((GATES[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in GATES), None)


@cache
def hides_gate(cls: Any) -> bool:
    """Whether a class that is not listed multiplies the output of the attention function by a gate, by the look of its source."""
    if any(base.__name__ in GATES for base in cls.__mro__):
        return False
    try:
        source = inspect.getsource(inspect.unwrap(cls.forward))
    except (OSError, TypeError):
        return False
    _, call, rest = source.rpartition("attention_interface(")
    return bool(call) and bool(_MULTIPLIED.search(rest))


class Gated(Protocol):
    """A run that takes gates, by the id of their module."""

    gates: dict[int, Tensor]


@contextmanager
def gating(layers: Sequence[AttentionLayer], run: Gated) -> Iterator[None]:
    """Put the gates of those of ``layers`` that have one into ``run.gates`` while the model runs."""
    with ExitStack() as undo:
        for layer in layers:
            gate = gate_of(layer.module)
            if gate is not None and layer.route == "attention interface":
                projection = layer.module.get_submodule(gate.projection)
                undo.callback(projection.register_forward_hook(_reader(layer.module, gate, run)).remove)
        yield


def _reader(module: nn.Module, gate: Gate, run: Gated) -> Callable[..., None]:
    def read(_: nn.Module, args: Any, output: Tensor) -> None:
        if current() is run:
            with torch.no_grad():
                run.gates[id(module)] = gate.of(module, output.detach())

    return read
