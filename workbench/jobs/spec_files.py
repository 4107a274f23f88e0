"""Spec files, YAML or JSON, as plain values that know the line they stand on.

Read by the rules of YAML 1.2, as far as its versions agree: only ``true`` and ``false`` are booleans (``yes``, ``on`` are texts)
and ``1e-3`` is a number. What another reader may take for something else (``010``, ``1_000``, ``1:30``, ``2020-01-01``) is
refused until it is written plainly or in quotes. Tags are refused, so nothing is constructed but texts, numbers, lists, mappings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from workbench.errors import WorkbenchError

_MOST_VALUES = 1_000_000
_LARGEST = 2**63
_PLAIN, _QUOTED, _LIST, _MAPPING = "plain", "quoted", "list", "mapping"
_NULL = re.compile(r"~|null|Null|NULL")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity|nan)", re.IGNORECASE)
_DISPUTED = re.compile(
    r"[-+]?0[0-9_]+(\.[0-9_]*)?([eE][-+]?[0-9]+)?"  # 010
    r"|[-+]?0[xXoObB][0-9a-fA-F_]+"
    r"|[-+]?[0-9][0-9_]*_[0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?"  # 1_000
    r"|[-+]?[0-9]+\.[0-9]*_[0-9_]*([eE][-+]?[0-9]+)?"
    r"|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"  # 1:30
    r"|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}([Tt ].*)?"
)
_UNPRINTABLE = re.compile(f"{yaml.reader.Reader.NON_PRINTABLE.pattern}|[\x85\u2028\u2029]")
"""Beside control characters those that YAML 1.1 takes for the end of a line and YAML 1.2 and JSON do not."""


@dataclass(frozen=True, slots=True)
class Marked:
    """A value and the place it was read from, as in ``spec.yaml:12``; empty if it comes from Python.

    ``value`` is a scalar, a list of ``Marked`` or a dict from texts to ``Marked``. What stands under a key has the key's line.
    """

    value: Any
    at: str = ""

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {name: item.plain() for name, item in self.value.items()}
        return [item.plain() for item in self.value] if isinstance(self.value, list) else self.value


def mistake(at: str, message: object) -> WorkbenchError:
    """The error of a mistake at a place of a spec."""
    return WorkbenchError(f"{at}: {message}" if at else str(message))


def marked(value: Any, at: str = "") -> Marked:
    """A value of Python with the same place everywhere; tuples and ranges become lists."""
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise mistake(at, f"names are texts; got {name!r}")
        return Marked({name: marked(item, at) for name, item in value.items()}, at)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return Marked([marked(item, at) for item in value], at)
    return Marked(value, at)


def read(path: Path) -> Marked:
    """The mapping that a file holds. Raises for a file that cannot be read, for broken syntax, keys given twice, tags, and
    numbers that are not finite or that two versions of YAML read differently; the message begins with file and line."""
    text = _text(path)
    if path.suffix.lower() == ".json":
        text = _json_without_tabs(text, path)
    try:
        root = yaml.compose(text, _Loader)
    except yaml.MarkedYAMLError as error:
        raise _broken(text, path, error) from None
    except RecursionError:
        raise WorkbenchError(f"{path} is nested too deeply to be a grid") from None
    if root is None or (isinstance(root, yaml.ScalarNode) and root.tag == _PLAIN and not root.value):
        raise WorkbenchError(f"{path} is empty; a spec names at least a probe, as in `probe: find_circuit`")
    if not isinstance(root, yaml.MappingNode):
        raise mistake(f"{path}:{_line(root)}", f"a spec maps names to values, as in `probe: sleep`; got {_said(root)}")
    return _Reader(str(path)).read(root)


class _Loader(yaml.SafeLoader):
    """Composes nodes whose tags only say how they are written; a tag of the file stays and is refused."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is yaml.ScalarNode:
            return _PLAIN if implicit[0] else _QUOTED
        return _LIST if kind is yaml.SequenceNode else _MAPPING


class _Reader:
    """The nodes of one file as ``Marked``; aliases are laid out where they are used."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._count = 0
        self._open: set[int] = set()

    def read(self, node: Any, line: int | None = None) -> Marked:
        """``line`` is that of the key that the node stands under."""
        at = f"{self._file}:{_line(node) if line is None else line}"
        self._count += 1
        if self._count > _MOST_VALUES:
            raise mistake(at, f"the file holds more than {_MOST_VALUES:,} values once its aliases are laid out")
        if node.tag not in (_PLAIN, _QUOTED, _LIST, _MAPPING):
            said = node.tag.replace("tag:yaml.org,2002:", "!!")
            raise mistake(at, f"tags are not read; got {said}; put a text in quotes")
        if isinstance(node, yaml.ScalarNode):
            return Marked(_scalar(node, f"{self._file}:{_line(node)}"), at)
        if id(node) in self._open:
            raise mistake(at, "an alias stands inside what it names")
        self._open.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            found: Any = [self.read(item) for item in node.value]
        else:
            found = self._mapping(node)
        self._open.remove(id(node))
        return Marked(found, at)

    def _mapping(self, node: Any) -> dict[str, Marked]:
        found: dict[str, Marked] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            at = f"{self._file}:{_line(key)}"
            name = self.read(key).value if isinstance(key, yaml.ScalarNode) else key
            if not isinstance(name, str):
                raise mistake(at, f"names are texts; got {_said(key)}")
            if name == "<<" and key.tag == _PLAIN:
                raise mistake(at, "merge keys (<<) are not read; use extends: for another file, grids: for variations")
            if name in found:
                raise mistake(at, f"{name!r} is given twice; first on line {lines[name]}")
            lines[name] = _line(key)
            found[name] = self.read(value, lines[name])
        return found


def _scalar(node: Any, at: str) -> Any:
    text = node.value
    if node.tag == _QUOTED:
        return _joined(text, at)
    if not text:
        raise mistake(at, "nothing stands here; write null for no value, '' for an empty text")
    if _NULL.fullmatch(text):
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _NOT_FINITE.fullmatch(text):
        raise mistake(at, f"numbers of a grid are finite; got {text}; a text stands in quotes")
    if _INTEGER.fullmatch(text):
        if len(text) > 20 or abs(int(text)) >= _LARGEST:
            raise mistake(at, f"whole numbers of a grid fit in 64 bits; got {text[:30]}; a text stands in quotes")
        return int(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise mistake(at, f"numbers of a grid are finite; got {text[:30]}, which is too large")
        return number
    if _DISPUTED.fullmatch(text):
        raise mistake(
            at, f"versions of YAML read {text} differently; write a plain number such as 1000, or a text in quotes"
        )
    return text


def _joined(text: str, at: str) -> str:
    """JSON writes characters outside the basic plane as two halves; halves alone are refused."""
    try:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError:
        raise mistake(at, f"{text!r} holds half of a character") from None


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except IsADirectoryError:
        raise WorkbenchError(f"{path} is a folder; a spec is a YAML or JSON file") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise WorkbenchError(f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = f"{path}:{raw[: error.start].count(10) + 1}"
        raise mistake(at, f"a spec is UTF-8 text; got byte 0x{raw[error.start]:02x}") from None
    if odd := _UNPRINTABLE.search(text):
        at = f"{path}:{text[: odd.start()].count(chr(10)) + 1}"
        raise mistake(at, f"a spec is text; got the character U+{ord(odd[0]):04X}; write it as an escape in quotes")
    return text


def _json_without_tabs(text: str, path: Path) -> str:
    """Refuse what is no JSON. Tabs stand between the values of JSON only, where YAML takes spaces alone."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        if text.strip():
            raise mistake(f"{path}:{error.lineno}", f"not valid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise WorkbenchError(f"{path} is nested too deeply to be a grid") from None
    except ValueError:
        pass  # a number of thousands of digits, which is refused with its line when it is read
    return text.replace("\t", " ")


def _broken(text: str, path: Path, error: yaml.MarkedYAMLError) -> WorkbenchError:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return WorkbenchError(f"{path}: not valid YAML: {' '.join(str(error).split())}")
    if "single document" in str(error.context):
        return mistake(f"{path}:{mark.line + 1}", "a spec is one document; a second one begins here")
    said = " ".join((error.problem or str(error)).split())
    if text[mark.index : mark.index + 1] == "\t":
        said = "a tab stands where YAML takes spaces only"
    elif error.context and error.context_mark:
        said += f" {error.context}, which begins on line {error.context_mark.line + 1}"
    return mistake(f"{path}:{mark.line + 1}", f"not valid YAML: {said}")


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1


def _said(node: Any) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
