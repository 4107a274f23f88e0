"""Every analysis as a record: what it asks, where it comes from, what it is compared with, how its cause is tested."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    import pandas as pd

GROUPS = ("sinks", "retrieval", "rhythm", "heads", "similarity", "importance", "structure", "vision")
SOURCES = ("maps", "run", "model", "tensors")
"""``maps``: a run or maps alone. ``run``: a run that also read activations. ``model``: runs the model itself. ``tensors``:
activations or images as arrays."""


@dataclass(frozen=True)
class Analysis:
    """One analysis.

    ``function`` answers it, ``example()`` gives keyword arguments for a call that takes a second or two and needs nothing from
    outside. ``paper`` is its source; ``definition`` is empty if it follows the source, else it says what is our own reading,
    as where only an abstract was published. ``source`` is one of ``SOURCES``. ``null`` says what the numbers stand beside,
    ``cause`` what intervention tests the claim (empty: it claims none). ``reads`` are the sites that a run must have read,
    ``{l}`` standing for every layer, as in ``blocks.{l}.hook_resid_post``.
    """

    name: str
    question: str
    function: Callable[..., Any]
    example: Callable[[], Mapping[str, Any]]
    paper: str
    source: str
    null: str
    cause: str = ""
    definition: str = ""
    reads: tuple[str, ...] = ()
    group: str = ""

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise WorkbenchError(f"{self.name}: a source is one of {', '.join(SOURCES)}; got {self.source!r}")
        if not (self.question.endswith("?") and self.paper and self.null):
            raise WorkbenchError(f"{self.name}: an analysis has a question, a paper and a null")

    @property
    def call(self) -> str:
        """How to import the function."""
        return f"{self.function.__module__}.{self.function.__name__}"

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(*args, **options)


class Analyses(Mapping[str, Analysis]):
    """Analyses by name, in the order of their groups."""

    def __init__(self, records: Mapping[str, Analysis]) -> None:
        self._records = MappingProxyType(dict(records))

    def __getitem__(self, name: str) -> Analysis:
        from workbench.errors import UnknownName

        if name not in self._records:
            raise UnknownName("analysis", name, self._records)
        return self._records[name]

    def __contains__(self, name: object) -> bool:
        return name in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def frame(self) -> pd.DataFrame:
        """One row per analysis: ``name, group, question, call, source, null, cause, paper, definition``."""
        import pandas as pd

        columns = ("name", "group", "question", "call", "source", "null", "cause", "paper", "definition")
        return pd.DataFrame([{column: getattr(record, column) for column in columns} for record in self.values()])

    def _repr_html_(self) -> str:
        from workbench.fragments import table_view

        return table_view(self.frame(), "Analyses", rows=len(self))


@cache
def analyses() -> Analyses:
    """All analyses, from the tuples ``ANALYSES`` of the modules in ``probes/<group>/``."""
    from dataclasses import replace

    found: dict[str, Analysis] = {}
    for group in GROUPS:
        for path in sorted((Path(__file__).parent / group).glob("*.py")):
            module = importlib.import_module(f"workbench.probes.{group}.{path.stem}")
            for record in getattr(module, "ANALYSES", ()):
                if record.name in found:
                    raise WorkbenchError(f"two analyses are called {record.name!r}")
                found[record.name] = replace(record, group=group)
    return Analyses(found)
