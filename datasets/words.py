"""The words and sentence templates of the tasks, from ``datasets/data``."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any

from workbench.errors import UnknownName

DATA = Path(__file__).resolve().parent / "data"


@cache
def _table(file: str) -> dict[str, Any]:
    return json.loads((DATA / file).read_text(encoding="utf-8"))


@cache
def words(kind: str) -> tuple[str, ...]:
    """The words of one kind (``names``, ``colors``, ``filler.people`` ...), in a fixed order."""
    table = _table("words.json")
    flat = {name: value for name, value in table.items() if isinstance(value, list)}
    flat |= {f"filler.{name}": value for name, value in table["filler"].items()}
    if kind not in flat:
        raise UnknownName("word list", kind, flat)
    return tuple(flat[kind])


def template(task: str) -> Any:
    """The templates of one task as stored in ``templates.json``."""
    table = _table("templates.json")
    if task not in table:
        raise UnknownName("template", task, table)
    return table[task]


@cache
def data(task: str) -> dict[str, Any]:
    """The words and templates that one task keeps in a file of its own, ``data/<task>.json``."""
    if task not in own_files():
        raise UnknownName("task with a file of its own", task, own_files())
    return _table(f"{task}.json")


def fill(frame: str, **values: str) -> tuple[str, dict[str, tuple[int, int]]]:
    """A frame with its slots filled, and the characters that each slot's value takes up."""
    text, places = "", {}
    for plain, slot, _, _ in Formatter().parse(frame):
        text += plain
        if slot is not None:
            places[slot] = (len(text), len(text) + len(values[slot]))
            text += values[slot]
    return text, places


@cache
def own_files() -> tuple[str, ...]:
    """The tasks that ``data`` knows."""
    return tuple(sorted(path.stem for path in DATA.glob("*.json") if path.stem not in ("words", "templates")))


def word_kinds() -> tuple[str, ...]:
    """Every kind that ``words`` knows."""
    table = _table("words.json")
    return (*(name for name in table if name != "filler"), *(f"filler.{name}" for name in table["filler"]))
