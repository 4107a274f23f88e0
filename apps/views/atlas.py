"""The atlas: a small map of every head, sorted by what is looked for."""

from __future__ import annotations

from typing import Any

import streamlit as st
import torch

from workbench.apps.components.wall import WALL, wall_data
from workbench.apps.screen import head_view, runs, scores, state
from workbench.apps.screen.need import guarded
from workbench.apps.screen.runs import Captured
from workbench.apps.screen.shown import downloads
from workbench.apps.screen.text import literal

_BY_LAYER = "layer"


def page() -> None:
    if target := st.session_state.pop("go", None):
        st.switch_page("views/head.py", query_params=target)
    st.title("Atlas")
    st.caption(
        "One picture per head: queries run downwards, keys to the right, brighter is more, each head on a scale of its own. "
        "Click a head to look at it closely; Shift-click or drag a rectangle to put heads side by side in the table."
    )
    run = runs.current()
    _atlas(run)


@st.fragment
def _atlas(run: Captured) -> None:
    guarded(lambda: _wall(run))


def _wall(run: Captured) -> None:
    if "go" in st.session_state:  # a head was opened: only a whole run of the page can leave it
        st.rerun()
    left, right = st.columns([1, 3], vertical_alignment="bottom")
    order = state.choose(
        "Sorted by",
        [_BY_LAYER, *scores.STORED, *scores.ASKED],
        "sort",
        where=left,
        show=lambda name: "layer and head" if name == _BY_LAYER else name,
        help="The strongest head comes first. Scores that need the model are computed by the worker.",
    )
    found = runs.atlas_of(run)
    ranked = found.frame()[["layer", "head"]]
    ranked["value"] = float("nan")
    if order != _BY_LAYER:
        table = _scores(run, order)
        if table is None:
            return
        ranked = table.sort_values("value", ascending=False, kind="stable", na_position="last")[
            ["layer", "head", "value"]
        ]
        right.caption(literal(scores.STORED.get(order) or scores.ASKED[order].says))
    heads: list[tuple[Any, int]] = list(zip(ranked["layer"].tolist(), ranked["head"].tolist(), strict=True))
    chosen = state.held("heads", lambda text: _read(text, heads), (), say=_say)
    WALL.show(
        wall_data(
            [_picture(run, found, layer, head) for layer, head in heads],
            [
                {"layer": layer, "head": head, "text": _told(found, layer, head), "value": value}
                for (layer, head), value in zip(heads, ranked["value"], strict=True)
            ],
            selected=[i for i, head in enumerate(heads) if head in set(chosen)],
            title=f"{run.title}, {'by layer' if order == _BY_LAYER else 'by ' + order}",
        ),
        key="wall",
        on={
            "open": lambda index: state.put("go", _address(run, *heads[int(index)])),
            "select": lambda indices: state.put("heads", tuple(heads[int(i)] for i in indices)),
        },
    )
    numbers = found.frame().merge(ranked, on=["layer", "head"]) if order != _BY_LAYER else found.frame()
    shown = numbers[
        [(layer, head) in set(chosen) for layer, head in zip(numbers["layer"], numbers["head"], strict=True)]
    ]
    st.dataframe(shown if chosen else numbers, hide_index=True, height=260)
    if chosen:
        with st.container(horizontal=True):
            for layer, head in chosen[:12]:
                st.page_link(
                    "views/head.py",
                    label=f"head {layer}.{head}",
                    icon=":material/zoom_in:",
                    query_params=_address(run, layer, head),
                )
    size = found.size
    downloads(
        numbers,
        name="atlas",
        python=f"{run.python}\nfound = wb.atlas(run, blocks={size})\nfound.plot()\nfound.frame()",
        draw=found.plot,
    )


def _picture(run: Captured, found: Any, layer: int | str, head: int) -> Any:
    """The head's block map; NaN where causality lets no query of a block see a key."""
    blocks = found.blocks[layer][head]
    if not head_view.is_causal(runs.opened(run).maps[layer]) or blocks.shape[0] != blocks.shape[1]:
        return blocks
    return blocks.masked_fill(blocks.new_ones(blocks.shape, dtype=torch.bool).triu(1), float("nan"))


def _scores(run: Captured, name: str) -> Any:
    """The table of a score; None while the worker is at it."""
    if name in scores.STORED:
        return scores.scores(run)[name]
    done = scores.asked(run, name)
    return None if done is None else scores.score_of(done, name)


def _address(run: Captured, layer: int | str, head: int) -> dict[str, str]:
    return {"run": run.key, "layer": str(layer), "head": str(head)}


def _told(found: Any, layer: int | str, head: int) -> str:
    entropy, distance = float(found.entropy[layer][head]), float(found.distance[layer][head])
    return f"entropy {entropy:.2f} nats, looks back {distance:.1f} tokens on average"


def _say(heads: Any) -> str:
    return "_".join(f"{layer}.{head}" for layer, head in heads)


def _read(text: str, known: list[Any]) -> tuple[Any, ...] | None:
    """Heads as they stand in the address: ``2.3_0.1``."""
    named = {f"{layer}.{head}": (layer, head) for layer, head in known}
    parts = [part for part in text.split("_") if part]
    return tuple(named[part] for part in parts) if all(part in named for part in parts) else None


guarded(page)
