"""Recorders: capture for layers that compute their mixing in their own code instead of asking the attention interface.

For one run the forward of each wanted module is replaced, on the instance, by one that hands the call to a ``Recorder``. A
recorder sees the tensors of the mixing in one of two ways: as a ``Watch`` it is a ``TorchFunctionMode`` around the original
forward and waits for the call that matters; or it names, in ``functions``, the functions of the module's own source file that do
the mixing, which then call it with their arguments. Either way the model's own code computes everything; recorders pass on what
they see, but for edits.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from workbench.models.current import current

if TYPE_CHECKING:
    from workbench.models.layers import AttentionLayer
    from workbench.models.session import Session


class Recorder:
    """One call of a recorded module's forward; ``given`` are the call's arguments by name.

    A class tells, before anything runs, what it makes of a module: the manifest's line (``mixer``, ``missing``), the sites it
    serves (``sites``), head counts (``heads``) and requests it refuses (``check``).
    """

    mixer: ClassVar[str] = ""
    """Name of the mixer in the manifest; empty for softmax, which is described by the module's attributes."""
    missing: ClassVar[str] = ""
    """What cannot be captured, for the manifest."""
    sites: ClassVar[frozenset[str] | None] = None
    """Kinds of sites that the recorder itself serves; None for those of softmax attention."""
    statistics: ClassVar[frozenset[str]] = frozenset({"pattern", "received", "block_mass", "block_max"})
    """Kinds of sites that are read off the recorded map, where ``sites`` is not None."""
    functions: ClassVar[tuple[str, ...]] = ()
    """Functions of the module's source file, or attributes of the module, that report to ``called`` while its forward runs.
    Not every version of transformers has them all."""
    interface: ClassVar[bool] = False
    """Whether the module calls transformers' attention interface; its calls go through ``attended``."""
    state: ClassVar[bool] = False
    """Whether the mixer has no scores of pairs: it carries a state, or is a fixed transform."""

    def __init__(self, layer: AttentionLayer, session: Session, given: dict[str, Any]) -> None:
        self.layer, self.session, self.given = layer, session, given
        self.module: Any = layer.module

    @classmethod
    def fits(cls, module: nn.Module) -> bool:
        """Whether the module mixes in a function that is known, in the version of transformers that runs."""
        found = (holder(module, name).get(name) for name in cls.functions)
        return not cls.functions or any(callable(function) for function in found)

    @classmethod
    def heads(cls, module: Any) -> tuple[int, int, int] | None:
        """Heads H, value heads G and width E of the map; None if the module's attributes are those of softmax attention."""
        return None

    @classmethod
    def named(cls, module: Any) -> str:
        """Name of the mixer with what the module adds to it."""
        return cls.mixer

    @classmethod
    def causal(cls, module: Any) -> bool:
        """Whether no token sees one behind it."""
        return bool(getattr(module, "is_causal", True))

    @classmethod
    def quadratic(cls, module: Any) -> bool:
        """Whether it builds the scores of all pairs at once where the model is eager."""
        return not cls.state

    @classmethod
    def pads(cls, module: Any) -> bool:
        """Whether the model lengthens its input with padding of its own."""
        return False

    @classmethod
    def check(cls, layer: AttentionLayer, session: Session) -> None:
        """Refuse, before the model runs, what cannot be recorded of ``layer`` in this run."""

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The original forward, looked at."""
        token = _RECORDING.set(self)
        try:
            return forward(*args, **kwargs)
        finally:
            _RECORDING.reset(token)

    def called(self, name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of one of ``functions``; calls ``function``, which is the original, and returns its output."""
        raise NotImplementedError

    def attended(
        self, kernel: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: Any, base: str
    ) -> Any:
        """A call of the attention interface by the module with queries, keys, values and mask: calls ``kernel``, the function of
        implementation ``base``. ``options`` are those of its arguments that shape the map."""
        raise NotImplementedError


class Watch(Recorder, TorchFunctionMode):
    """A recorder that lets every torch call of the forward through unchanged but for edits, and reports the one it waits for."""

    def __init__(self, layer: AttentionLayer, session: Session, given: dict[str, Any]) -> None:
        Recorder.__init__(self, layer, session, given)
        TorchFunctionMode.__init__(self)
        self.met = False
        """Whether the call that is waited for has been seen."""

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self:
            return Recorder.run(self, forward, args, kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = args, kwargs or {}
        if current() is self.session:  # what an edit runs is not the module's
            args, kwargs = self.pass_on(func, args, kwargs)
        return func(*args, **kwargs)

    def pass_on(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments to go on with, after a look at them."""
        raise NotImplementedError

    def report(self, q: Tensor, k: Tensor, mask: Any, *, base: str, scale: float, bias: Tensor | None) -> None:
        """Queries and keys of a softmax layer, with the mask and bias its module was given."""
        self.met = True
        if not self.session.wants_map(self.layer):
            return
        found, extra = self.session.masks.resolve(
            self.layer, mask, q, k, base, {"is_causal": type(self).causal(self.module)}
        )
        bias = extra if bias is None else bias if extra is None else bias + extra
        self.session.on_map(self.layer, q, k, found, scale=scale, bias=bias)


def attending(module: nn.Module) -> Recorder | None:
    """The recorder that a module's call of the attention interface belongs to."""
    found = _RECORDING.get()
    inside = found is not None and found.interface and found.module is module and found.session is current()
    return found if inside else None


@contextmanager
def recording(layers: Sequence[AttentionLayer], session: Session) -> Iterator[None]:
    """Record ``layers`` for the length of a run; modules and functions are as before on exit, also after an exception."""
    from workbench.models.recorders.registry import recorder_of

    for layer in layers:
        recorder_of(layer.module).check(layer, session)
    with ExitStack() as undo:
        for layer in layers:
            recorder = recorder_of(layer.module)
            for name in recorder.functions:
                undo.enter_context(_reporting(holder(layer.module, name), name))
            undo.enter_context(replaced_forward(layer.module, session, _recorded(layer, session, recorder)))
        yield


Forward = Callable[..., Any]
"""What stands for a module's forward: takes the forward itself, and the positional and named arguments of a call."""


@contextmanager
def replaced_forward(module: nn.Module, run: object, replacement: Forward) -> Iterator[None]:
    """Let ``replacement`` stand for the forward of one module in one run. Runs in other threads have replacements of their
    own; the module is as before when the last of them ends."""
    entry = (run, replacement)
    with _LOCK:
        held = _FORWARDS.get(id(module))
        if held is None:
            held = _FORWARDS[id(module)] = [module.__dict__.get("forward"), []]
            module.__dict__["forward"] = _dispatcher(module.forward, held[1])
        held[1].append(entry)
    try:
        yield
    finally:
        with _LOCK:
            held[1].remove(entry)
            if not held[1]:
                del _FORWARDS[id(module)]
                if held[0] is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = held[0]


def _dispatcher(forward: Callable[..., Any], entries: list[tuple[object, Forward]]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        for run, replacement in tuple(entries):
            if run is current():
                return replacement(forward, args, kwargs)
        return forward(*args, **kwargs)

    return dispatch


def _recorded(layer: AttentionLayer, session: Session, recorder: type[Recorder]) -> Forward:
    def recorded(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = inspect.signature(forward).bind(*args, **kwargs)
        return recorder(layer, session, bound.arguments).run(forward, args, kwargs)

    return recorded


# ------------------------------------------------------------------ functions that do the mixing

_RECORDING: ContextVar[Recorder | None] = ContextVar("workbench_recording", default=None)
"""The recorder whose module's forward is running here."""
_REPLACED: dict[tuple[int, str], list[Any]] = {}
"""Function and number of runs that hold it replaced, by the id of the namespace and its name."""
_FORWARDS: dict[int, list[Any]] = {}
"""What stood in the place of a module's forward, and what stands for it in which run, by the id of the module."""
_LOCK = threading.Lock()


def holder(module: nn.Module, name: str) -> dict[str, Any]:
    """The namespace in which a module's forward finds a function: its own attributes, or its source file."""
    own = vars(module)
    return own if name in own else inspect.unwrap(type(module).forward).__globals__


@contextmanager
def _reporting(namespace: dict[str, Any], name: str) -> Iterator[None]:
    """Let the function ``name`` report to the recorder it is called under. Runs in other threads share the replacement; the
    function is as before when the last of them ends. Where there is no such function, nothing happens."""
    if not callable(namespace.get(name)):
        yield
        return
    key = (id(namespace), name)
    with _LOCK:
        held = _REPLACED.setdefault(key, [namespace[name], 0])
        if not held[1]:
            namespace[name] = _reporter(name, held[0])
        held[1] += 1
    try:
        yield
    finally:
        with _LOCK:
            held[1] -= 1
            if not held[1]:
                namespace[name] = held[0]
                del _REPLACED[key]


def _reporter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def reporter(*args: Any, **kwargs: Any) -> Any:
        recorder = _RECORDING.get()
        if recorder is None or current() is not recorder.session or name not in recorder.functions:
            return function(*args, **kwargs)
        return recorder.called(name, function, args, kwargs)

    return reporter
