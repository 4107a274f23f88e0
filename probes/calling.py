"""Any analysis called on a model: what it reads is made for it, from a text or the prompts of a task.

The command line and batch jobs know an analysis by its name only. ``prepare`` looks at the signature, finds out what has to be
made (a run, a map, prompts), checks the options, and refuses before a model is loaded what could not be called.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from workbench.errors import UnknownName, WorkbenchError

if TYPE_CHECKING:
    import pandas as pd
    from pydantic import TypeAdapter

    from workbench.models.protocol import Model
    from workbench.pairs import Pairs
    from workbench.probes.catalogue import Analysis
    from workbench.run import Run

_RUNS, _MAP, _MODELS, _PAIRS, _EITHER = ("source", "run"), ("amap",), ("model",), ("pairs",), ("inputs",)
Layers = Sequence[int | str] | int | str | None
_MADE = (*_RUNS, *_MAP, *_MODELS, *_PAIRS, *_EITHER)
_WRITTEN = (
    "int",
    "float",
    "bool",
    "str",
    "tuple[",
    "Sequence[int",
    "Sequence[float",
    "Sequence[str",
    "Sequence[tuple[",
)
"""How types of options begin that can be written down."""


@dataclass(frozen=True)
class Wording:
    """How the caller's person gives things: what refusals name. ``option`` is a format with the field ``name``."""

    option: str = "{name}=..."
    prompts: str = "text= or pairs="
    pairs: str = "pairs="
    layers: str = "layers="
    caller: str = "call_analysis"


@dataclass(frozen=True)
class Call:
    """A checked call. ``made`` are the arguments that are made for it, ``options`` the others, ``captures`` whether it reads a
    run of the prompts, ``layers`` the layers whose maps that run has, None for all."""

    record: Analysis
    made: tuple[str, ...]
    options: Mapping[str, Any]
    captures: bool
    layers: Layers = None
    wording: Wording = field(default_factory=Wording)

    def __call__(self, model: Model, prompts: str | Sequence[str] | Pairs | None = None) -> Any:
        """The result, with ``prompts`` as announced to ``prepare``."""
        run = self._run(model, prompts) if self.captures else None
        given: dict[str, Any] = {}
        for name in self.made:
            if name in (*_PAIRS, *_EITHER):
                given[name] = prompts
            elif run is None or name in _MODELS:
                given[name] = model
            else:
                given[name] = self._one_map(run) if name in _MAP else run
        return self.record(**given, **self.options)

    def _run(self, model: Model, prompts: Any) -> Run:
        import torch

        from workbench.captures import capture
        from workbench.pairs import Pairs

        layers = range(model.shape.layers)
        reads = [
            site.replace("{l}", str(layer))
            for site in self.record.reads
            for layer in (layers if "{l}" in site else (0,))
        ]
        tokens = prompts.clean if isinstance(prompts, Pairs) else prompts
        with torch.no_grad():
            return model.run(tokens, read=reads, maps=capture(layers=self.layers), logits=None)

    def _one_map(self, run: Run) -> Any:
        layers = list(run.maps)
        if len(layers) != 1:
            raise WorkbenchError(
                f"{self.record.name} looks at one map: choose it with {self.wording.layers}, one of "
                f"{', '.join(map(str, layers))}"
            )
        return run.maps[layers[0]]


def call_analysis(
    record: Analysis,
    model: Model,
    *,
    text: str | Sequence[str] | None = None,
    pairs: Pairs | None = None,
    layers: Layers = None,
    options: Mapping[str, Any] | None = None,
    wording: Wording | None = None,
) -> Any:
    """The result of an analysis on a model.

    Prompts are ``text`` or ``pairs`` (their clean side, where it reads one side only), as far as the analysis wants any.
    ``layers`` limits what is captured. ``options`` are the analysis' own. Raises as ``prepare`` does.
    """
    call = prepare(
        record,
        options or {},
        text=text is not None,
        pairs=pairs is not None,
        layers=layers,
        wording=wording or Wording(),
    )
    return call(model, text if pairs is None else pairs)


def prepare(
    record: Analysis,
    options: Mapping[str, Any],
    *,
    text: bool = False,
    pairs: bool = False,
    layers: Layers = None,
    wording: Wording | None = None,
) -> Call:
    """Check a call of ``record`` that will have a text, or pairs, or neither; no model is needed for that.

    Lists pass as tuples, and one item where only a sequence is taken as a sequence of one. Refused, each with what to do: options
    that it does not have or whose value has another type, arguments that nobody can write down, prompts that are missing or
    that it would not look at, layers where it captures none.
    """
    wording = wording or Wording()
    if text and pairs:
        raise WorkbenchError(f"{record.name} looks at a text or at the prompts of a task; got both")
    chosen = dict(options)
    for name in chosen:
        if name not in option_defaults(record):
            raise UnknownName(f"option of {record.name}", name, option_defaults(record))
    made = _made(record, chosen, text or pairs, wording)
    itself = record.source == "model" and not text and not pairs and made == ("source",)
    captures = not itself and any(name in (*_RUNS, *_MAP) for name in made)
    if layers is not None and not captures:
        if "layers" not in option_defaults(record):
            raise WorkbenchError(f"{record.name} captures no maps of single layers; leave out {wording.layers}")
        if "layers" in chosen:
            raise WorkbenchError(f"{wording.layers} and {wording.option.format(name='layers')} say the same twice")
        chosen["layers"], layers = layers, None
    chosen = {name: checked(record, name, value) for name, value in chosen.items()}
    reads = [name for name in made if name not in _MODELS]
    if reads and not (text or pairs or itself):
        raise WorkbenchError(f"{record.name} looks at prompts: give {wording.prompts}")
    if not reads and (text or pairs):
        raise WorkbenchError(f"{record.name} makes its own prompts, or needs none; leave out the text or task")
    if set(made) & set(_PAIRS) and not pairs:
        raise WorkbenchError(f"{record.name} compares clean and corrupted prompts: give {wording.pairs}")
    return Call(record, made, chosen, captures, layers, wording)


def takes_prompts(record: Analysis) -> str:
    """``"no"``, ``"optional"`` or ``"required"``: whether an analysis on a model looks at prompts that it is given."""
    parameters = inspect.signature(record.function).parameters
    if any(name in parameters for name in (*_RUNS, *_MAP)):
        return "optional" if record.source == "model" else "required"
    reading = [parameters[name] for name in (*_PAIRS, *_EITHER) if name in parameters]
    if not reading:
        return "no"
    return "required" if any(parameter.default is parameter.empty for parameter in reading) else "optional"


def takes_pairs(record: Analysis) -> bool:
    """Whether an analysis compares clean and corrupted prompts, so that a text is not enough."""
    return any(name in inspect.signature(record.function).parameters for name in _PAIRS)


def option_defaults(record: Analysis) -> dict[str, Any]:
    """The options that a call can name, with their defaults; ``inspect.Parameter.empty`` where there is none."""
    parameters = inspect.signature(record.function).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in _MADE and p.kind is not p.VAR_KEYWORD}


def checked(record: Analysis, name: str, value: Any) -> Any:
    """The value of an option as its function takes it; one of another type is refused."""
    from pydantic import ValidationError

    value = _tuples(value)
    kind = _kind(record, name)
    if kind is None:
        return value
    try:
        kind.validate_python(value, strict=True)
    except ValidationError as error:
        try:
            kind.validate_python((value,), strict=True)
        except ValidationError:
            raise WorkbenchError(f"{record.name}, option {name}: {error.errors()[0]['msg']}; got {value!r}") from None
        return (value,)
    return value


def analysis_frame(result: Any) -> pd.DataFrame:
    """The table of what an analysis returned: a result's own, or of a plain tensor one row per number."""
    if hasattr(result, "frame"):
        frame: pd.DataFrame = result.frame()
        return frame
    import pandas as pd

    values = result.detach().cpu().double()
    index = pd.MultiIndex.from_product([range(size) for size in values.shape])
    index.names = [f"axis {i}" for i in range(values.ndim)]
    return pd.DataFrame({"value": values.flatten().numpy()}, index=index).reset_index()


def _made(record: Analysis, chosen: Mapping[str, Any], prompts: bool, wording: Wording) -> tuple[str, ...]:
    """The arguments that are made for the call; what cannot be made is refused with the call to make."""
    parameters = inspect.signature(record.function).parameters
    wanted = [p for p in parameters.values() if p.name not in chosen and p.kind is not p.VAR_KEYWORD]
    found = [p.name for p in wanted if p.name in (*_RUNS, *_MAP, *_MODELS)]
    found += [p.name for p in wanted if p.name in (*_PAIRS, *_EITHER) and (prompts or p.default is p.empty)]
    missing = [p.name for p in wanted if p.default is p.empty and p.name not in found]
    if record.source == "tensors" or missing or not found:
        written = [name for name in missing if str(parameters[name].annotation).startswith(_WRITTEN)]
        other = [name for name in missing if name not in written]
        if written and not other and record.source != "tensors":
            options = " ".join(wording.option.format(name=name) for name in written)
            raise WorkbenchError(f"{record.name} needs {', '.join(written)}: give {options}")
        what = ", ".join(other or written) or "arrays"
        raise WorkbenchError(
            f"{record.name} needs {what}, which {wording.caller} cannot make; call {record.call} from Python "
            f"(`workbench analyses {record.name}` shows how)"
        )
    return tuple(found)


class _Names(dict[str, Any]):
    """The names of a module as its annotations use them: classes of its own as "an instance of it", so that their fields are
    not looked into. What it imports for type checkers alone is looked for in ``typing``."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def __missing__(self, name: str) -> Any:
        from pydantic import InstanceOf

        instance: Any = InstanceOf  # of a class that is only known when this runs
        for place in (self.module, typing):
            if hasattr(place, name):
                found = getattr(place, name)
                own = isinstance(found, type) and found.__module__ not in ("builtins", "typing", "collections.abc")
                return instance[found] if own else found
        raise KeyError(name)


@lru_cache(maxsize=1024)
def _kind(record: Analysis, name: str) -> TypeAdapter[Any] | None:
    """The type of an option; None if it cannot be told."""
    from pydantic import ConfigDict, TypeAdapter
    from pydantic.errors import PydanticUserError

    function = record.function
    names = _Names(sys.modules[function.__module__])
    for config in (ConfigDict(arbitrary_types_allowed=True), None):  # a class with fields refuses the first
        with suppress(PydanticUserError, AttributeError, NameError, TypeError):
            return TypeAdapter(eval(str(function.__annotations__[name]), {}, names), config=config)
    return None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
