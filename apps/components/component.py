"""One interactive part in four places: a Streamlit app, a notebook's saved output, a live notebook, a file of its own.

A component is a JavaScript file beside this one that defines ``draw(root, data, send)``; ``<name>.<part>.js`` holds a
part of a long one. Joined with ``shared.js`` and ``component.css`` it is one module without imports, so nothing is
fetched, and the same text serves every place.
"""

from __future__ import annotations

import functools
import html
import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import Refused, UnknownName, WorkbenchError

if TYPE_CHECKING:
    import anywidget

LIMIT = 2_500_000
"""Characters of the longest message to a browser: one picture of 2 MB, and the words around it."""
_HERE = Path(__file__).parent
_STREAMLIT = """
const unheard = new WeakMap();
let latest = 0;
export default ({data, parentElement, setTriggerValue}) => {
  unheard.set(parentElement, (unheard.get(parentElement) ?? []).filter(([number]) => number > data.heard));
  mount(parentElement, data.data, (event, value) => {
    if (!data.events.includes(event)) return;
    latest = Math.max(latest + 1, data.heard + 1, Date.now());
    unheard.get(parentElement).push([latest, event, value]);
    setTriggerValue("events", [...unheard.get(parentElement)]);
  });
};
"""
"""While a script runs, Streamlit keeps only the last trigger. So each one carries all events since the last that is
known to be heard, numbered in their order."""
_WIDGET = """
let sent = 0;
export default {
  render({model, el}) {
    const send = (event, value) => { model.set("event", {event, value, number: ++sent}); model.save_changes(); };
    const again = () => mount(el, model.get("data"), send);
    model.on("change:data", again);
    again();
    return () => model.off("change:data", again);
  },
};
"""
_UNSEEN = "<p>This figure is drawn by a script, which did not run here. A notebook runs it once it is trusted.</p>"
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; background: light-dark(#ffffff, #0e1117); color: light-dark(#1f2430, #e8eaf0); }}
body {{ margin: 16px; font-family: system-ui, sans-serif; }}
</style>
</head>
<body>
{fragment}
</body>
</html>
"""


@dataclass(frozen=True)
class Component:
    """The component drawn by ``<name>.js``; what ``data`` must hold is told by the Python file of the same name.

    An event is a name with a value, as ``send(event, value)`` in the script gives them.
    """

    name: str

    def show(self, data: Mapping[str, Any], *, key: str, on: Mapping[str, Callable[[Any], None]] | None = None) -> None:
        """Show it in a Streamlit script. ``on[event]`` is called with the value of each event, in order and once, before
        the next run of the script (of the fragment, inside one); other events run nothing. ``key`` names the instance:
        with the same key it is updated in place."""
        import streamlit as st

        calls, heard = dict(on or {}), f"{key}: last event heard"

        def react() -> None:
            for number, event, value in st.session_state[key].get("events", []):
                if number > st.session_state.get(heard, 0):
                    st.session_state[heard] = number
                    if event in calls:
                        calls[event](value)

        _message(self.name, data)
        sent = {"data": dict(data), "events": list(calls), "heard": st.session_state.get(heard, 0)}
        _streamlit(self.name)(key=key, data=sent, **({"on_events_change": react} if calls else {}))

    def html(self, data: Mapping[str, Any], *, title: str = "") -> str:
        """A fragment for the saved output of a notebook: an element and the script that draws into it.

        Each event is a ``CustomEvent("workbench", {detail: {event, value}})`` on the element, and bubbles.
        """
        mark = f"workbench-{uuid.uuid4().hex}"
        label = f' aria-label="{html.escape(title)}"' if title else ""
        return (
            f'<div data-figure="{mark}" role="group"{label}>{_UNSEEN}</div>\n'
            f'<script type="module">\n{_module(self.name)}\n'
            f"for (const place of document.querySelectorAll('[data-figure=\"{mark}\"]'))\n"
            f"  mount(place, {_inline(_message(self.name, data))}, (event, value) => place.dispatchEvent(\n"
            '    new CustomEvent("workbench", {detail: {event, value}, bubbles: true})));\n</script>'
        )

    def page(self, data: Mapping[str, Any], *, title: str) -> str:
        """A whole HTML file, opened from disk, nothing fetched; events as :meth:`html` gives them."""
        return _PAGE.format(title=html.escape(title), fragment=self.html(data, title=title))

    def widget(self, data: Mapping[str, Any]) -> anywidget.AnyWidget:
        """Live in a notebook: set ``.data`` to update it; ``.event`` is the last event, ``{event, value, number}``
        (``number`` counts, so that equal events are told apart): ``widget.observe(f, "event")``."""
        _message(self.name, data)
        return _widget(self.name)(data=dict(data))


def names() -> list[str]:
    """The components there are."""
    return sorted({path.name.split(".")[0] for path in _HERE.glob("*.js")} - {"shared"})


@functools.cache
def _module(name: str) -> str:
    """The JavaScript of a component as one module: style, shared functions, its own ``draw``. It contains no ``</``,
    so that it can stand inside a page."""
    if name not in names():
        raise UnknownName("component", name, names())
    style = (_HERE / "component.css").read_text(encoding="utf-8")
    files = [_HERE / "shared.js", *sorted(_HERE.glob(f"{name}.*js"))]
    return "\n".join([f"const STYLE = {_inline(json.dumps(style))};", *(file.read_text("utf-8") for file in files)])


@functools.cache
def _streamlit(name: str) -> Callable[..., Any]:
    """Registered once per process: a second registration of the same name warns."""
    import streamlit as st

    return st.components.v2.component(f"workbench-{name}", js=_module(name) + _STREAMLIT)


@functools.cache
def _widget(name: str) -> type[anywidget.AnyWidget]:
    try:
        import anywidget
        import traitlets
    except ModuleNotFoundError:
        raise WorkbenchError(
            "live components in notebooks need the package anywidget: pip install 'attention-workbench[notebook]'"
        ) from None

    traits = {"data": traitlets.Dict({}).tag(sync=True), "event": traitlets.Dict({}).tag(sync=True)}
    return type(name.title(), (anywidget.AnyWidget,), {"_esm": _module(name) + _WIDGET, **traits})


def _message(name: str, data: Mapping[str, Any]) -> str:
    """``data`` as JSON, refused where it cannot be JSON or is too long to be sent at once."""
    try:
        text = json.dumps(data, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise WorkbenchError(f"data of the component {name!r} must be plain JSON without NaN: {error}") from None
    if len(text) > LIMIT:
        raise Refused(
            f"data of the component {name!r} takes {len(text) / 1e6:.1f} MB, more than the {LIMIT / 1e6:.1f} MB that "
            "are sent at once; show less of it"
        )
    return text


def _inline(text: str) -> str:
    """JSON that can stand in a script inside a page: no text in it can end the script or open a comment."""
    return text.replace("<", "\\u003c")
