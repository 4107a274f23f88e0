"""Widgets whose value stands in the page's address, so that every view is a link and the browser's back button works.

A value stands there once it is another than the default, so a page that was just opened is one step in the browser's history, and
a value that leaves the address by the back button is the default again. Defaults that depend on what is stored (the newest run)
stand there always. A value in the address that is no option is said in the page, never passed over. Values stay while other pages
are looked at.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import streamlit as st

from workbench.apps.screen.text import literal
from workbench.errors import UnknownName

T = TypeVar("T")
SHARED = ("model", "task", "run", "layer", "head", "method", "other", "seed")
"""Values that mean the same on every page: another page takes them over. All others belong to their page."""

_SOON = 2.0
"""Seconds within which a request may come from a browser that has not heard yet of the page's last change of the address."""


class _Drawn(NamedTuple):
    """How a value was drawn last since its page was opened: its text in the address, if it stands there; its default; what stood
    in the address before the page wrote there, and when it did."""

    value: Any
    asked: str | None
    default: str
    before: str | None = None
    at: float = 0.0


def turn_to(page: str) -> None:
    """Before a page is drawn: put away what the page before it had chosen, and bring back what this one had. Pages may so use one
    word for different things."""
    before, kept = st.session_state.get("page"), st.session_state.setdefault("pages", {})
    if before == page:
        return
    chosen = {}
    for key in [name.removeprefix("drawn ") for name in map(str, st.session_state) if name.startswith("drawn ")]:
        drawn: _Drawn = st.session_state.pop(f"drawn {key}")
        st.session_state.pop(f"wrong {key}", None)
        if key not in SHARED and key in st.session_state:
            value = st.session_state.pop(key)
            if drawn.asked is not None:
                chosen[key] = value
    if before is not None:
        kept[before] = chosen
    for key, value in kept.get(page, {}).items():
        st.session_state[key] = value
    st.session_state["page"] = page


def choose(
    label: str,
    options: Sequence[T],
    key: str,
    *,
    default: T | None = None,
    show: Callable[[T], str] = str,
    where: Any = st,
    kind: str = "selectbox",
    always: bool = False,
    help: str | None = None,
) -> T:
    """One of ``options``, in a ``selectbox``, ``radio`` or ``segmented_control``; ``default``, else the first, to begin with.

    In the address an option stands as ``str`` gives it, the default only if ``always``. Raises ``UnknownName`` if there are no
    options."""
    if not options:
        raise UnknownName(label.lower(), "", [])
    named = {str(option): option for option in options}
    first: T = default if default is not None and default in options else options[0]
    _adopt(label, key, named.get, list(named), first)
    before = st.session_state[key]
    if before not in options:  # a head of another page may be the same by its name
        st.session_state[key] = named.get(str(before), first)
    rest: dict[str, Any] = (
        {"required": True} if kind == "segmented_control" else {"horizontal": True} if kind == "radio" else {}
    )
    value = getattr(where, kind)(label, options, key=key, format_func=show, help=help, persist_state="session", **rest)
    return _written(key, value, first, always=always)


def number(
    label: str,
    low: int,
    high: int,
    key: str,
    *,
    default: int,
    where: Any = st,
    kind: str = "slider",
    step: int = 1,
    help: str | None = None,
) -> int:
    """A whole number from ``low`` to ``high``, with a ``slider`` or a ``number_input``."""

    def read(asked: str) -> int | None:
        return int(asked) if asked.lstrip("-").isdigit() and low <= int(asked) <= high else None

    first = min(max(default, low), high)
    _adopt(key, key, read, [f"{low} .. {high}"], first)
    held = st.session_state[key]
    if not isinstance(held, int) or not low <= held <= high:
        st.session_state[key] = first
    value = getattr(where, kind)(label, low, high, key=key, step=step, help=help, persist_state="session")
    return _written(key, int(value), first)


def fraction(
    label: str,
    low: float,
    high: float,
    key: str,
    *,
    default: float,
    where: Any = st,
    step: float = 0.01,
    help: str | None = None,
) -> float:
    """A number from ``low`` to ``high``, with a slider."""

    def read(asked: str) -> float | None:
        try:
            return float(asked) if low <= float(asked) <= high else None
        except ValueError:
            return None

    first = min(max(default, low), high)
    _adopt(key, key, read, [f"{low} .. {high}"], first)
    if not low <= st.session_state[key] <= high:
        st.session_state[key] = first
    value = where.slider(label, low, high, key=key, step=step, help=help, persist_state="session")
    return _written(key, float(value), float(first))


def flag(label: str, key: str, *, default: bool = False, where: Any = st, help: str | None = None) -> bool:
    """A switch; ``1`` or ``0`` in the address."""

    def say(on: bool) -> str:
        return "1" if on else "0"

    _adopt(label, key, {"1": True, "0": False}.get, ["1", "0"], default, say)
    return _written(key, bool(where.toggle(label, key=key, help=help, persist_state="session")), default, say)


def several(
    label: str,
    options: Sequence[str],
    key: str,
    *,
    default: Sequence[str] = (),
    show: Callable[[str], str] = str,
    where: Any = st,
    always: bool = False,
    help: str | None = None,
) -> list[str]:
    """Some of ``options``, which are texts without commas; in the address they stand with commas between them, the default ones
    only if ``always``."""

    def read(asked: str) -> list[str] | None:
        names = [name for name in asked.split(",") if name]
        return names if set(names) <= set(options) else None

    first = [name for name in default if name in options]
    _adopt(label, key, read, options, first, ",".join)
    st.session_state[key] = [name for name in st.session_state[key] if name in options]
    value: list[str] = where.multiselect(label, options, key=key, format_func=show, help=help, persist_state="session")
    return _written(key, value, first, ",".join, always)


def held(key: str, read: Callable[[str], T | None], default: T, *, say: Callable[[T], str] = str) -> T:
    """A value without a widget: a component sets it with ``put``. ``read`` gives None for what is no value."""
    _adopt(key, key, read, [say(default)], default, say)
    value: T = st.session_state[key]
    return _written(key, value, default, say)


def put(key: str, value: Any) -> None:
    """Set the value of a widget or of ``held`` before the next run, from a callback."""
    st.session_state[key] = value


def forget_unless(key: str, value: str, names: Sequence[str]) -> None:
    """Give the values ``names`` their defaults if ``value`` is another than at the last run: a view belongs to its run. What the
    address says anew stays."""
    if st.session_state.setdefault(key, value) != value:
        for name in names:
            st.session_state.pop(name, None)
        st.session_state[key] = value


def _adopt(
    label: str,
    key: str,
    read: Callable[[str], T | None],
    known: Sequence[str],
    default: T,
    say: Callable[[T], str] = str,
) -> None:
    """Take the value from the address if it was changed there: a link, or the back button. What nobody chose is the default, even
    where that is another one than before."""
    asked = st.query_params.get(key)
    drawn: _Drawn | None = st.session_state.get(f"drawn {key}")
    if asked == (drawn.asked if drawn else None):
        _tell(key)
        if drawn and asked is None and say(st.session_state.get(key, default)) == drawn.default != say(default):
            st.session_state[key] = default
    elif drawn is None or not _late(asked, drawn):
        for name in (f"drawn {key}", f"wrong {key}"):
            st.session_state.pop(name, None)
        found = default if asked is None else read(asked)
        if found is not None or asked is None:
            st.session_state[key] = found
        else:
            said = str(UnknownName(f"{label.lower()} in the address", asked, known))
            st.session_state[f"wrong {key}"] = (said, None)
            st.warning(literal(said))
    st.session_state.setdefault(key, default)


def _late(asked: str | None, drawn: _Drawn) -> bool:
    """Whether the browser had not heard yet what the page wrote into the address when it sent its request: something else was
    chosen right behind. The back button brings the same address, and no other choice."""
    if asked != drawn.before or time.monotonic() - drawn.at > _SOON:
        return False
    every = [(name.removeprefix("drawn "), name) for name in map(str, st.session_state) if name.startswith("drawn ")]
    values = [(st.session_state.get(key, st.session_state[name].value), st.session_state[name]) for key, name in every]
    return any(value != one.value or one.at > drawn.at for value, one in values)


def _tell(key: str) -> None:
    """Say again what was wrong in the address, until another value is chosen: the page may have run again for a job meanwhile."""
    wrong = f"wrong {key}"
    if wrong not in st.session_state:
        return
    said, value = st.session_state[wrong]
    now = st.session_state.get(key)
    if value is None:
        st.session_state[wrong] = (said, repr(now))
    elif value != repr(now):
        del st.session_state[wrong]
        return
    st.warning(literal(said))


def _written(key: str, value: T, default: T, say: Callable[[T], str] = str, always: bool = False) -> T:
    """Let the value stand in the address if it is not the default; one that is there stays, as a link may name a default."""
    text, asked = say(value), st.query_params.get(key)
    wanted = text if always or text == asked or text != say(default) else None
    drawn: _Drawn | None = st.session_state.get(f"drawn {key}")
    before, at = (drawn.before, drawn.at) if drawn else (None, 0.0)
    if asked != wanted:
        before, at = asked, time.monotonic()
        if wanted is None:
            del st.query_params[key]
        else:
            st.query_params[key] = wanted
    st.session_state[f"drawn {key}"] = _Drawn(value, wanted, say(default), before, at)
    return value
