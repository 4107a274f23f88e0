"""The app's interactive views in notebooks and in files of their own: a head, all heads, a text, a circuit, a graph.

What a function gives is shown as it stands by a notebook, saved output included; ``.widget()`` asks this process for what
comes into view, and ``.save(path)`` writes one HTML file that needs nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.apps.components.component import Component
from workbench.apps.components.graph import GRAPH, attribution_data, circuit_data
from workbench.apps.components.tilemap import TILEMAP
from workbench.apps.components.tokens import DIRECTIONS, PAGE, TOKENS
from workbench.apps.components.wall import WALL, wall_data
from workbench.apps.head_data import map_data, text_data
from workbench.apps.screen.head_view import Heads, Look, fitted, is_causal, part, weights_of
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.zooming import EXACT, stored_sizes

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.attention_map import AttentionMap
    from workbench.circuits import Circuit
    from workbench.feature_graph import FeatureGraph
    from workbench.run import Run

Data = Mapping[str, Any]
CELLS = 64
"""Cells on a side of each head's picture in a wall, about."""


@dataclass(frozen=True)
class Shown:
    """An interactive view. ``data`` is what ``component`` draws.

    ``answers[event](data, value)`` is what is drawn after an event; ``opens[event](value)`` another view, which a live one
    shows below itself.
    """

    component: Component
    data: Data
    answers: Mapping[str, Callable[[Data, Any], Data]] = field(default_factory=dict)
    opens: Mapping[str, Callable[[Any], Shown]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What the view shows, in words."""
        return str(self.data["title"])

    def _repr_html_(self) -> str:
        return self.component.html(self.data, title=self.title)

    def __repr__(self) -> str:
        return f"<{self.component.name}: {self.title}>"

    def widget(self, on: Mapping[str, Callable[[Any], Any]] | None = None) -> Any:
        """The view as a live widget: what is panned, zoomed and chosen is answered from this process, and what is opened
        appears below. ``on[event](value)`` is called too. Its first child is the view, an ``anywidget`` with the traits
        ``data`` and ``event``.

        Raises ``WorkbenchError`` where the package anywidget is missing; a request that is refused says why in the title.
        """
        live = self.component.widget(self.data)
        from ipywidgets import VBox

        box = VBox([live])

        def react(change: Any) -> None:
            event, value = change["new"]["event"], change["new"]["value"]
            try:
                if event in self.answers:
                    live.data = dict(self.answers[event](live.data, value))
                if event in self.opens:
                    below = self.opens[event](value).widget()
                    for old in box.children[1:]:
                        _close(old)
                    box.children = (live, below)
            except WorkbenchError as error:
                live.data = {**live.data, "title": f"{self.title}: {error}"}
            if on and event in on:
                on[event](value)

        live.observe(react, "event")
        return box

    def save(self, path: str | Path) -> Path:
        """Write one HTML file that shows the view anywhere, without Python and without a network. A file that is there is
        replaced."""
        path = Path(path)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_text(self.component.page(self.data, title=self.title), encoding="utf-8")
            part.replace(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise WorkbenchError(f"cannot write {path}: {error.strerror or error}") from error
        return path


def show_head(
    run: Run,
    layer: int | str,
    head: int | Sequence[int],
    queries: tuple[int, int] | None = None,
    keys: tuple[int, int] | None = None,
    *,
    way: str = "mass",
    raw: bool = False,
    hide: Sequence[int] = (),
    renormalise: bool = False,
    scale: str = "sqrt",
) -> Shown:
    """One head's map, or the mean of several heads': the part ``queries`` x ``keys`` (half-open ranges, everything by default).

    ``way``, ``hide`` and ``renormalise`` are those of ``wb.zoom``; ``raw`` looks inside the gate of a gated head. ``scale``:
    ``"linear"``, ``"sqrt"`` or ``"log"``. Live, any part can be zoomed to until single weights are seen, and a clicked cell
    opens its query's text below. Raises as ``wb.zoom`` does: for maps longer than 2,048 tokens capture with ``blocks=``.
    """
    amap = _map(run, layer)
    _, _, q, k = amap.shape
    look = Look(
        layer, _heads(amap, head), (*(queries or (0, q)), *(keys or (0, k))), way, raw, tuple(hide), renormalise
    )

    def moved(data: Data, view: Sequence[int]) -> Data:
        now = replace(look, view=fitted(tuple(map(int, view)), amap))
        return _head_data(run, now, str(data["scale"]), data["cross"])

    return Shown(
        TILEMAP,
        _head_data(run, look, scale, None),
        answers={
            "view": moved,
            "cell": lambda data, cell: {**data, "cross": list(map(int, cell))},
            "scale": lambda data, name: {**data, "scale": name},
        },
        opens={"cell": lambda cell: show_tokens(run, layer, head, focus=int(cell[0]), raw=raw)},
    )


def show_tokens(
    run: Run,
    layer: int | str,
    head: int | Sequence[int],
    focus: int | None = None,
    direction: str = "from",
    *,
    raw: bool = False,
) -> Shown:
    """The text, its tokens coloured by the weights of one of them, ``focus`` (the last by default).

    ``direction`` ``"from"``: what the query ``focus`` attends to; ``"to"``: which queries attend to the key ``focus``. Within
    the 256 tokens of a page the pointer colours by any token; live, all pages can be turned.
    """
    if direction not in DIRECTIONS:
        raise UnknownName("direction", direction, DIRECTIONS)
    amap = _map(run, layer)
    _, _, q, k = amap.shape
    look = Look(layer, _heads(amap, head), (0, q, 0, k), raw=raw)
    last = (q if direction == "from" else k) - 1
    chosen = last if focus is None else focus
    first = chosen // PAGE * PAGE
    return Shown(
        TOKENS,
        _tokens_data(run, look, chosen, direction, first),
        answers={
            "focus": lambda data, i: _tokens_data(run, look, min(int(i), last), direction, data["start"]),
            "page": lambda data, i: _tokens_data(run, look, data["focus"], direction, int(i)),
        },
    )


def show_wall(run: Run, scores: Mapping[tuple[int | str, int], float] | None = None, *, raw: bool = False) -> Shown:
    """A small picture of every head of the run, each on a scale of its own.

    ``scores`` ``{(layer, head): number}`` (or a pandas series with that index) orders the heads, the largest first. Live, a
    clicked head opens below. Pictures come from the block maps that were captured; short maps need none.
    """
    ranked: dict[tuple[int | str, int], float] = dict(scores) if scores is not None else {}
    heads = [(layer, head) for layer in run.maps for head in range(_map(run, layer).shape[1])]
    for key in ranked:
        if key not in heads:
            raise UnknownName("(layer, head)", key, heads)
    heads.sort(key=lambda one: -ranked.get(one, float("-inf")))
    pictures = {layer: _pictures(run, layer, raw) for layer in run.maps}
    if not heads:
        raise WorkbenchError("this run captured no attention; run it again with maps=wb.capture(blocks=64)")
    said = f"{run.provenance.model}{_first(run)}, {'by score' if ranked else 'by layer'}"
    data = wall_data(
        [pictures[layer][head] for layer, head in heads],
        [
            {"layer": layer, "head": head, "text": _known(run.maps[layer], head), "value": ranked.get((layer, head))}
            for layer, head in heads
        ],
        title=said,
    )
    return Shown(
        WALL,
        data,
        answers={"select": lambda data, chosen: {**data, "selected": sorted(map(int, chosen))}},
        opens={"open": lambda i: show_head(run, *heads[int(i)], raw=raw)},
    )


def show_circuit(
    circuit: Circuit, truth: Circuit | None = None, other: Circuit | None = None, *, title: str = ""
) -> Shown:
    """A circuit by layer and head. ``truth`` marks what a known circuit holds; ``other`` is laid over it, and colours tell what
    is in the first, in the second, and in both."""
    told = title or ", ".join(str(circuit.provenance[key]) for key in ("task", "method") if key in circuit.provenance)
    data = circuit_data(circuit, truth=truth, other=other, title=told or repr(circuit))

    def chosen(data: Data, what: Any) -> Data:
        return {**data, "selected": what}

    return Shown(GRAPH, data, answers={"node": chosen, "edge": chosen})


def show_graph(graph: FeatureGraph, *, title: str = "") -> Shown:
    """An attribution graph: tokens to the right, layers upwards, the strongest edges."""
    data = attribution_data(graph, title=title or repr(graph))
    return Shown(GRAPH, data, answers={"node": lambda data, name: {**data, "selected": name}})


def _map(run: Run, layer: int | str) -> AttentionMap:
    if not run.maps:
        raise WorkbenchError("this run captured no attention; run it again with maps=wb.capture(blocks=64)")
    return run.maps[layer]


def _heads(amap: AttentionMap, head: int | Sequence[int]) -> Heads:
    chosen = (head,) if isinstance(head, int) else tuple(head)
    for one in chosen:
        if not 0 <= one < amap.shape[1]:
            raise UnknownName("head", one, range(amap.shape[1]))
    return Heads(", ".join(map(str, chosen)), chosen)


def _first(run: Run) -> str:
    texts = len(run.tokens.mask)
    return f", the first of {texts} texts" if texts > 1 else ""


def _head_data(run: Run, look: Look, scale: str, cross: Sequence[int] | None) -> Data:
    found = part(run, look)
    return map_data(run, look, found, scale=scale, cross=cross, source="head", title=found.title + _first(run))


def _tokens_data(run: Run, look: Look, focus: int, direction: str, start: int) -> Data:
    title = f"{run.provenance.model}{_first(run)}, layer {look.layer}, head {look.heads.name}"
    return text_data(run, look, focus, direction, start, weights_of(run, look, focus, direction), title)


def _pictures(run: Run, layer: int | str, raw: bool) -> Tensor:
    """``[H, rows, columns]`` of the first text: mean mass that a query of a block gives to the keys of another, NaN where no
    query of the one sees a key of the other."""
    amap: AttentionMap = run.maps[layer]
    amap = getattr(amap, "raw", amap) if raw else amap
    _, _, q, k = amap.shape
    sizes = stored_sizes(amap)
    sizes = [size for size in sizes if max(q, k) / size >= CELLS / 2] or sizes[:1]
    if not sizes and q * k > EXACT:
        raise Refused(f"the map of layer {layer} has {q:,} x {k:,} weights and no block maps; capture with blocks=64")
    size = sizes[-1] if sizes else max(1, -(-max(q, k) // CELLS))
    import torch

    mass = amap.blocks(size, "sum")[0].detach().float().cpu()
    counts = torch.tensor([min(size, q - at) for at in range(0, q, size)], dtype=torch.float32)
    mass = mass / counts[:, None]
    if is_causal(amap) and mass.shape[1] == mass.shape[2]:
        mass = mass.masked_fill(torch.ones(mass.shape[1:], dtype=torch.bool).triu(1), float("nan"))
    return mass


def _known(amap: AttentionMap, head: int) -> str:
    """What was captured about a head, in words."""
    said = []
    if ("entropy",) in amap._memo:
        said.append(f"entropy {float(amap.entropy()[0, head].mean()):.2f} nats")
    if ("distance", None) in amap._memo:
        said.append(f"looks back {float(amap.distance()[0, head].mean()):.1f} tokens on average")
    return ", ".join(said)


def _close(widget: Any) -> None:
    for child in getattr(widget, "children", ()):
        _close(child)
    widget.close()
