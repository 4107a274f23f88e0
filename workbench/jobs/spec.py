"""What a person asks for: a spec, which is a grid plus fixed values, laid out as the jobs of its cells.

Lists multiply in the order they are written, the last one fastest; scalars and mappings are one value; a list in a list is a
value that is a list. ``model``, ``revision``, ``dtype``, ``task``, ``probe`` and ``seed`` are the fields of the jobs, every other
key is an argument of the probe. Beside them stand ``name``, ``extends`` (a file whose values this one overrides), ``grids``
(blocks, each laid over the other values) and ``run`` (settings of the run). An overridden value keeps its place in the order.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.jobs.job import Job, plain
from workbench.jobs.spec_files import Marked, marked, mistake, read
from workbench.jobs.spec_run import read_bytes, read_run

__all__ = ["FIELDS", "RESERVED", "Grid", "merged", "read_bytes", "read_grid", "value_of"]

FIELDS = ("model", "revision", "dtype", "task", "probe", "seed")
RESERVED = ("name", "extends", "grids", "run", *FIELDS)
MOST_CELLS = 1_000_000
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", re.ASCII)
_STRANGER = "probe"


@dataclass(frozen=True)
class Grid:
    """The cells of a spec, each once, in their order.

    ``run`` holds the settings of the run that the spec gives, ``memory`` in bytes. ``lines`` tells for a job's key where its
    block begins, or the line of ``probe:`` where there are no blocks (``spec.yaml:12``); empty for what came from Python.
    ``places`` tells for a block, a field or argument, and a value as JSON, where the value stands; read it with ``place``.
    """

    name: str
    jobs: tuple[Job, ...]
    run: Mapping[str, Any] = field(default_factory=dict)
    lines: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[tuple[str, str, str], str] = field(default_factory=dict)

    def place(self, job: Job, name: str = "") -> str:
        """Where the job's value of a field or argument stands, ``task.split`` for an option of its task; the job's block if
        that is not known or the value is a default. Empty for what came from Python."""
        line = self.lines.get(job.key, "")
        if not line or not name:
            return line
        whole, _, option = name.partition(".")
        value = _coded(value_of(job, whole if option and whole == "task" else name))
        return self.places.get((line, name, value)) or self.places.get((line, whole, value)) or line


def value_of(job: Job, name: str) -> Any:
    """The value of a field or argument of a job, None if it has none."""
    return getattr(job, name) if name in FIELDS else job.args.get(name)


def read_grid(
    source: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any] | Job],
    *,
    name: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Grid:
    """The cells of a spec.

    ``source`` is the path of a YAML or JSON file, the mapping that such a file would hold, or a sequence of jobs and of mappings
    without ``name``, ``extends``, ``grids`` and ``run``. ``name`` is the grid's name if it is not to be the spec's own, the
    file's or ``grid``. ``overrides`` replace values of the spec, and of all its blocks, as if they were written there.

    Raises ``WorkbenchError`` with file and line for whatever cannot be read; that models, tasks, probes and their arguments
    exist is what ``check_grid`` looks at.
    """
    over = {key: marked(value, f"override {key}") for key, value in (overrides or {}).items()}
    for key in over:
        if key in ("extends", "grids", "run"):
            raise WorkbenchError(f"{key} cannot be overridden; change the spec, or write another one that extends it")
    if isinstance(source, str | Path):
        path = Path(source)
        spec = _read_file(path, ())
        default = path.stem
    elif isinstance(source, Mapping):
        spec = _spec(marked(source), Path(), ())
        default = "grid"
    elif isinstance(source, Sequence) and not isinstance(source, bytes | bytearray):
        given = Marked(name or "grid")
        return _grid(_name(over.get("name", given), given), _laid_out_items(source, over), {})
    else:
        raise WorkbenchError(
            f"a grid is read from the path of a spec, a mapping, or a list of mappings and jobs; got a {type(source).__name__}"
        )
    fallback = Marked(default, spec.at)
    named = Marked(name) if name is not None else over.get("name", spec.name or fallback)
    return _grid(_name(named, fallback), _laid_out(spec, over), read_run(spec.run))


@dataclass(frozen=True)
class _Spec:
    """A spec with what it extends already under it."""

    at: str
    name: Marked | None
    values: Mapping[str, Marked]
    blocks: Sequence[Marked] | None
    run: Mapping[str, Marked]


@dataclass(frozen=True)
class _Block:
    """Values that multiply, and where they begin."""

    at: str
    values: Mapping[str, Marked]


def _read_file(path: Path, chain: tuple[Path, ...]) -> _Spec:
    return _spec(read(path), path.parent, (*chain, path))


def _spec(root: Marked, folder: Path, chain: tuple[Path, ...]) -> _Spec:
    own = dict(root.value)
    special = {key: own.pop(key, None) for key in ("name", "extends", "grids", "run")}
    blocks, run = special["grids"], special["run"]
    if blocks is not None:
        if not isinstance(blocks.value, list) or not blocks.value:
            raise mistake(blocks.at, f"grids is a list of blocks, each a mapping; got {_short(blocks)}")
        for block in blocks.value:
            _check_block(block)
    if run is not None and not isinstance(run.value, dict):
        raise mistake(run.at, f"run maps settings to values, as in {{workers: 2}}; got {_short(run)}")
    settings = dict(run.value) if run else {}
    if special["extends"] is None:
        return _Spec(root.at, special["name"], own, blocks and blocks.value, settings)
    base = _base(special["extends"], folder, chain)
    return _Spec(
        root.at,
        special["name"],
        {**base.values, **own},
        blocks.value if blocks else base.blocks,
        {**base.run, **settings},
    )


def _base(given: Marked, folder: Path, chain: tuple[Path, ...]) -> _Spec:
    if not isinstance(given.value, str) or not given.value:
        raise mistake(given.at, f"extends is the path of one spec; got {_short(given)}")
    path = folder / given.value
    try:
        again = any(path.samefile(other) for other in chain)
        there = path.is_file()
    except (OSError, ValueError):  # none there, no way to it, or no name of a file
        again = there = False
    if again:
        raise mistake(given.at, f"specs extend each other: {' -> '.join(map(str, (*chain, path)))}")
    if not there:
        raise mistake(given.at, f"extends {path}, which is no file that can be read")
    return _read_file(path, chain)


def _check_block(block: Marked) -> None:
    if not isinstance(block.value, dict):
        raise mistake(block.at, f"a block of grids is a mapping, as in {{task: ioi}}; got {_short(block)}")
    for key, value in block.value.items():
        if key in ("name", "extends", "grids", "run"):
            raise mistake(value.at, f"{key} stands at the top level of a spec, not in a block")


def _name(given: Marked, fallback: Marked) -> str:
    name = given.value
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        hint = "; add name: to the spec" if given is fallback else ""
        raise mistake(
            given.at,
            f"a grid's name has 1 to 100 letters, digits, '-', '_', '.', the first one no '-' or '.'; got {name!r}{hint}",
        )
    return name


def _laid_out(spec: _Spec, over: Mapping[str, Marked]) -> Iterable[tuple[Job, str, _Block]]:
    if spec.blocks is None:
        probe = spec.values.get("probe")
        blocks = [_Block(probe.at if probe else spec.at, spec.values)]
    else:
        blocks = [_Block(block.at, {**spec.values, **block.value}) for block in spec.blocks]
    replaced = {key: value for key, value in over.items() if key != "name"}
    return _product([_Block(block.at, {**block.values, **replaced}) for block in blocks])


def _laid_out_items(items: Sequence[Any], over: Mapping[str, Marked]) -> Iterable[tuple[Job, str, _Block]]:
    if not items:
        raise WorkbenchError("the grid has no cells: the list is empty")
    replaced = {key: value for key, value in over.items() if key != "name"}
    for i, item in enumerate(items):
        try:
            if isinstance(item, Job) and not replaced:
                yield item, "", _Block("", {})
                continue
            if isinstance(item, Job):
                record = item.dict()
                block = Marked({key: marked([value]) for key, value in {**record.pop("args"), **record}.items()})
            elif isinstance(item, Mapping):
                block = marked(item)
            else:
                raise WorkbenchError(f"a grid is a list of mappings and jobs; got a {type(item).__name__}")
            _check_block(block)
            yield from _product([_Block("", {**block.value, **replaced})])
        except WorkbenchError as error:
            raise WorkbenchError(f"item {i} of the list: {error}") from None


def _product(blocks: Sequence[_Block]) -> Iterable[tuple[Job, str, _Block]]:
    """The jobs of all blocks, after all of their values are looked at."""
    choices = [_choices(block) for block in blocks]
    cells = sum(math.prod(len(values) for values in each.values()) for each in choices)
    if cells > MOST_CELLS:
        raise mistake(blocks[0].at, f"the grid has {cells:,} cells, more than {MOST_CELLS:,}; split it into several")
    for block, each in zip(blocks, choices, strict=True):
        fields = {key: i for i, key in enumerate(each) if key in FIELDS}
        args = {key: i for i, key in enumerate(each) if key not in FIELDS}
        for cell in itertools.product(*each.values()):
            job = Job(**{key: cell[i] for key, i in fields.items()}, args={key: cell[i] for key, i in args.items()})
            yield job, block.at, block


def _choices(block: _Block) -> dict[str, list[Any]]:
    """The values of every key, each looked at alone, so that a mistake has its own line."""
    found: dict[str, list[Any]] = {}
    for key, given in block.values.items():
        if key == "args":
            raise mistake(given.at, "arguments of the probe stand beside the other keys of a spec, not under args")
        if key not in FIELDS and not key.isidentifier():
            raise mistake(given.at, f"arguments of a probe are names such as method; got {key!r}")
        if isinstance(given.value, list) and not given.value:
            raise mistake(given.at, f"{key} is an empty list, which makes no cells; remove it or give it a value")
        found[key] = []
        for item in _items(given):
            value = item.plain()
            try:
                if key in FIELDS:
                    Job(**{"probe": _STRANGER, key: value})
                else:
                    value = plain(value, key)
            except WorkbenchError as error:
                number = key in FIELDS and key != "seed" and isinstance(value, int | float)
                raise mistake(item.at, f"{error}{'; a text stands in quotes' if number else ''}") from None
            found[key].append(value)
    if "probe" not in found:
        raise mistake(block.at, "no probe is named; add one, such as `probe: find_circuit`")
    return found


def _items(given: Marked) -> Sequence[Marked]:
    return given.value if isinstance(given.value, list) else [given]


def _grid(name: str, laid_out: Iterable[tuple[Job, str, _Block]], run: Mapping[str, Any]) -> Grid:
    jobs: dict[str, Job] = {}
    lines: dict[str, str] = {}
    places: dict[tuple[str, str, str], str] = {}
    last: _Block | None = None
    for job, at, block in laid_out:
        if job.key not in jobs:
            jobs[job.key], lines[job.key] = job, at
        if block is not last and at:
            for where, place in _places(block):
                places.setdefault(where, place)
        last = block
    return Grid(name, tuple(jobs.values()), run, lines, places)


def _places(block: _Block) -> Iterator[tuple[tuple[str, str, str], str]]:
    for key, given in block.values.items():
        for item in _items(given):
            value = item.plain()
            if key == "task":
                value = Job(_STRANGER, task=value).task
                if isinstance(value, Mapping):
                    yield from (
                        ((block.at, f"task.{name}", _coded(value)), said.at) for name, said in item.value.items()
                    )
            yield (block.at, key, _coded(value)), item.at


def merged(grid: Grid, jobs: Iterable[Job]) -> Grid:
    """The grid with a new job for each of its own, in their order; equal ones are one cell. Lines stay."""
    found: dict[str, Job] = {}
    lines: dict[str, str] = {}
    for old, new in zip(grid.jobs, jobs, strict=True):
        if new.key not in found:
            found[new.key], lines[new.key] = new, grid.lines.get(old.key, "")
    return Grid(grid.name, tuple(found.values()), grid.run, lines, grid.places)


def _coded(value: Any) -> str:
    return json.dumps(dict(value) if isinstance(value, Mapping) else value, sort_keys=True)


def _short(given: Marked) -> str:
    if isinstance(given.value, list):
        return "a list" if given.value else "an empty list"
    return "a mapping" if isinstance(given.value, dict) else repr(given.value)
