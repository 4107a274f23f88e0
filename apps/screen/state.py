"""Widgets whose value stands in the page's address, so that every view is a link and the browser's back button works.

A value in the address that is no option is said in the page, never passed over. Values stay while other pages are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import streamlit as st

from workbench.apps.screen.text import literal
from workbench.errors import UnknownName

T = TypeVar("T")
SHARED = ("model", "task", "run", "layer", "head", "method", "other", "seed")
"""Values that mean the same on every page: another page takes them over. All others belong to their page."""


def turn_to(page: str) -> None:
    """Before a page is drawn: put away what the page before it had chosen, and bring back what this one had. Pages may so use one
    word for different things."""
    before, kept = st.session_state.get("page"), st.session_state.setdefault("pages", {})
    if before == page:
        return
    own = [
        key.removeprefix("written ")
        for key in map(str, st.session_state)
        if key.startswith("written ") and key.removeprefix("written ") not in SHARED
    ]
    names = [name for key in own for name in (key, f"written {key}", f"wrong {key}") if name in st.session_state]
    values = {name: st.session_state[name] for name in names}
    for name in names:
        del st.session_state[name]
    if before is not None:
        kept[before] = values
    for name, value in kept.get(page, {}).items():
        st.session_state[name] = value
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
    help: str | None = None,
) -> T:
    """One of ``options``, in a ``selectbox``, ``radio`` or ``segmented_control``; ``default``, else the first, to begin with.

    In the address an option stands as ``str`` gives it. Raises ``UnknownName`` if there are no options."""
    if not options:
        raise UnknownName(label.lower(), "", [])
    named = {str(option): option for option in options}
    _adopt(label, key, named.get, list(named))
    before = st.session_state.get(key)
    if before not in options:  # a head of another page may be the same by its name
        st.session_state[key] = named.get(str(before), default if default in options else options[0])
    rest: dict[str, Any] = (
        {"required": True} if kind == "segmented_control" else {"horizontal": True} if kind == "radio" else {}
    )
    value = getattr(where, kind)(label, options, key=key, format_func=show, help=help, persist_state="session", **rest)
    return _written(key, value)


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

    _adopt(key, key, read, [f"{low} .. {high}"])
    held = st.session_state.get(key)
    if not isinstance(held, int) or not low <= held <= high:
        st.session_state[key] = min(max(default, low), high)
    value = getattr(where, kind)(label, low, high, key=key, step=step, help=help, persist_state="session")
    return _written(key, int(value))


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

    _adopt(key, key, read, [f"{low} .. {high}"])
    if not low <= st.session_state.get(key, low - 1) <= high:
        st.session_state[key] = min(max(default, low), high)
    return _written(key, float(where.slider(label, low, high, key=key, step=step, help=help, persist_state="session")))


def flag(label: str, key: str, *, default: bool = False, where: Any = st, help: str | None = None) -> bool:
    """A switch; ``1`` or ``0`` in the address."""
    _adopt(label, key, {"1": True, "0": False}.get, ["1", "0"])
    st.session_state.setdefault(key, default)
    value = bool(where.toggle(label, key=key, help=help, persist_state="session"))
    _write(key, "1" if value else "0")
    return value


def several(
    label: str,
    options: Sequence[str],
    key: str,
    *,
    default: Sequence[str] = (),
    show: Callable[[str], str] = str,
    where: Any = st,
    help: str | None = None,
) -> list[str]:
    """Some of ``options``, which are texts without commas; in the address they stand with commas between them."""

    def read(asked: str) -> list[str] | None:
        names = [name for name in asked.split(",") if name]
        return names if set(names) <= set(options) else None

    _adopt(label, key, read, options)
    st.session_state[key] = [name for name in st.session_state.get(key, default) if name in options]
    value: list[str] = where.multiselect(label, options, key=key, format_func=show, help=help, persist_state="session")
    _write(key, ",".join(value))
    return value


def held(key: str, read: Callable[[str], T | None], default: T, *, say: Callable[[T], str] = str) -> T:
    """A value without a widget: a component sets it with ``put``. ``read`` gives None for what is no value."""
    _adopt(key, key, read, [say(default)])
    if key not in st.session_state:
        st.session_state[key] = default
    value: T = st.session_state[key]
    _write(key, say(value))
    return value


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


def _adopt(label: str, key: str, read: Callable[[str], Any], known: Sequence[str]) -> None:
    """Take the value from the address if it was changed there: a link, or the back button."""
    asked, wrong = st.query_params.get(key), f"wrong {key}"
    if asked is None or asked == st.session_state.get(f"written {key}"):
        _tell(key, wrong)
        return
    st.session_state[f"written {key}"] = asked
    st.session_state.pop(wrong, None)
    found = read(asked)
    if found is None:
        said = str(UnknownName(f"{label.lower()} in the address", asked, known))
        st.session_state[wrong] = (said, None)
        st.warning(literal(said))
    else:
        st.session_state[key] = found


def _tell(key: str, wrong: str) -> None:
    """Say again what was wrong in the address, until another value is chosen: the page may have run again for a job meanwhile."""
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


def _written(key: str, value: T) -> T:
    _write(key, str(value))
    return value


def _write(key: str, text: str) -> None:
    if st.query_params.get(key) != text:
        st.query_params[key] = text
    st.session_state[f"written {key}"] = text
