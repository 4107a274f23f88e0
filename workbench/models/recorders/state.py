"""Recorders of mixers that carry a state from token to token.

``StateRecorder`` is for those whose mixing is a function of the module's source file: the call gives the operands of the map, the
values and the output. ``StateWatch`` is for those that mix in the module's own forward, between calls into torch.

A state does not tell apart the tokens it was made of, so what continues from a cache is refused. Padded tokens give and receive
nothing: most families zero what they write to the state, and those that do not are refused where padding comes before text.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.errors import Refused
from workbench.kernels.scores import working_dtype
from workbench.models.recorders.base import Recorder, Watch

if TYPE_CHECKING:
    from workbench.models.layers import AttentionLayer
    from workbench.models.session import Session

CONV = "post-conv V"
"""Values that a short convolution has mixed already."""


class _State(Recorder):
    sites = frozenset({"v", "z"})
    state = True
    missing = "editing pattern; decoding from a cache"
    heeds_padding: ClassVar[bool] = True
    """Whether the model keeps padded tokens out of its state."""

    @classmethod
    def check(cls, layer: AttentionLayer, session: Session) -> None:
        if not session.wants_map(layer):
            return
        where = f"layer {layer.key} of {session.family}: {layer.name}"
        if session.past:
            raise Refused(
                f"{where} continues from a state in which {session.past} cached tokens are mixed, so that a map over them is not "
                "known; run the whole text without cache, or leave the layer out with maps=capture(layers=[...])"
            )
        real = session.real(layer)
        if real is not None and not cls.heeds_padding and bool((real[:, 1:] & ~real[:, :-1]).any()):
            raise Refused(
                f"{where} takes padding for text, so that padding before a text changes what it computes; pad on the right, or "
                "run the texts one at a time"
            )

    def shown(self, tokens: int, like: Tensor) -> Tensor | None:
        """1 for real and 0 for padded tokens, ``[B, N]``; None where all are real."""
        real = self.session.real(self.layer)
        return None if real is None or real.shape[1] != tokens else real.to(like)


class StateRecorder(_State):
    """A mixer that is one function call. ``functions`` names it; ``values`` its argument that the map multiplies."""

    values: ClassVar[str] = ""

    def called(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        session, layer = self.session, self.layer
        bound = inspect.signature(function).bind(*args, **kwargs)
        given = bound.arguments
        if self.values not in given:
            raise Refused(
                f"layer {layer.key} of {session.family}: {layer.name} calls {name} without {self.values!r}: it is not the "
                "function that is known here, and nothing of it can be captured"
            )
        if session.touches(layer, "v"):
            given[self.values] = self.fold(session.on_values(layer, self.unfold(given[self.values])))
            args, kwargs = bound.args, bound.kwargs
        output = function(*args, **kwargs)
        if session.wants_map(layer):
            with torch.no_grad():
                session.on_built(layer, self.map({**_defaults(function), **given}))
        if not session.touches(layer, "z"):
            return output
        several = isinstance(output, tuple | list)
        z = self.fold(session.on_output(layer, self.unfold(output[0] if several else output)))
        return (z, *output[1:]) if several else z

    def unfold(self, x: Tensor) -> Tensor:
        """Values or output of the function as ``[B, N, H, E]``."""
        return x

    def fold(self, x: Tensor) -> Tensor:
        """The inverse of ``unfold``."""
        return x

    @abstractmethod
    def map(self, given: Mapping[str, Any]) -> AttentionMap:
        """The map, from the function's arguments by name."""


class StateWatch(_State, Watch):
    """A mixer inside of the module's own forward: ``seen`` is told every torch call with its result, and may replace it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = self.pass_on(func, args, kwargs or {})
        return self.seen(func, args, kwargs, func(*args, **kwargs))

    def pass_on(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs

    def seen(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        return result

    def build(self, make: Callable[[], AttentionMap]) -> None:
        """Hand in the map that ``make`` makes, where it is wanted."""
        self.met = True
        if self.session.wants_map(self.layer):
            with torch.no_grad():
                self.session.on_built(self.layer, make())


def work(*tensors: Tensor) -> list[Tensor]:
    """All in the type that holds the widest of them, at least float32."""
    dtype = working_dtype(tensors[0].dtype)
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.detach().to(dtype) for tensor in tensors]


def masked(x: Tensor, shown: Tensor | None) -> Tensor:
    """``x`` ``[B, H, N, ...]`` with zeros at padded tokens."""
    return x if shown is None else x * shown.to(x.dtype).view(len(shown), 1, -1, *[1] * (x.ndim - 3))


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}
