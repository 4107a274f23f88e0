"""Variants: the same input through any two of the catalogue's attention mechanisms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.apps.components.tilemap import TILEMAP, tilemap_data
from workbench.apps.screen import state
from workbench.apps.screen.need import guarded, job, need
from workbench.apps.screen.shown import downloads, figure
from workbench.apps.screen.text import literal

if TYPE_CHECKING:
    from torch import Tensor

_TOKENS = (16, 36, 64, 144, 256)
_MEAN = "mean"


def page() -> None:
    st.title("Variants")
    st.caption(
        "One random input, through any two attention mechanisms with parameters drawn alike: what each attends to, how far their "
        "outputs lie apart, and whether the map really is what the output is made of."
    )
    import workbench as wb

    records = wb.variants()
    names = list(records.names)
    columns = st.columns([3, 3, 2, 1])
    show = {name: f"{name} ({records[name].family})" for name in names}.__getitem__
    first = state.choose("Variant", names, "variant", default="multi-head-attention", show=show, where=columns[0])
    second = state.choose("Against", names, "against", default="sliding-window-attention", show=show, where=columns[1])
    tokens = state.choose("Tokens", _TOKENS, "tokens", default=64, where=columns[2])
    seed = state.number("Seed", 0, 9999, "seed", default=0, where=columns[3], kind="number_input")
    done = need(
        job("workbench.apps.work_variants:compared", variant=first, other=second, tokens=tokens, seed=seed),
        f"Running {first} and {second}",
    )
    saved = done.load()
    found = saved.labels
    python = (
        "from workbench.apps.work_variants import compared\n\n"
        f"found = compared({first!r}, {second!r}, seed={seed}, tokens={tokens})"
    )
    _said(found)
    _maps(found, saved, python)
    _table(done.table(), python)


def _said(found: Mapping[str, Any]) -> None:
    own = [name for name in found["names"] if not found["facts"][name]["shared"]]
    for name in own:
        st.info(
            literal(
                f"{name} takes an input of another kind (it is no self-attention layer, or looks ahead where the "
                "other does not): what is shown is its own example, and outputs are not compared."
            )
        )


def _maps(found: Mapping[str, Any], saved: Any, python: str) -> None:
    """Both maps and whether each is what its output is made of; below their difference and that of the outputs."""
    maps = {name: saved.tensors[f"maps.{name}"] for name in found["names"]}
    left, _ = st.columns([1, 3])
    head = state.choose("Head", [*range(min(len(part) for part in maps.values())), _MEAN], "head", where=left)
    shown = {name: part.mean(0) if head == _MEAN else part[head] for name, part in maps.items()}
    at = ".mean(0)" if head == _MEAN else f"[{head}]"
    for number, (column, (name, values)) in enumerate(zip(st.columns(2, gap="medium"), shown.items(), strict=True)):
        facts = found["facts"][name]
        with column:
            unit = "weight" if facts["domain"] == "token" else f"weight, {facts['domain']}s"
            _tiles(values, name, unit, f"map {number}")
            _identity(facts)
            downloads(_cells(values), name=f"map-{number}", python=f"{python}\nfound.maps[{name!r}]{at}")
    first, second = shown.values()
    left, right = st.columns(2, gap="medium")
    tokens = all(facts["domain"] == "token" for facts in found["facts"].values())
    if first.shape == second.shape and tokens and found["difference"] is not None:
        with left:
            _tiles(
                second - first, f"{found['names'][1]} minus {found['names'][0]}", "weight", "difference", signed=True
            )
            downloads(
                _cells(second - first), name="difference", python=f"{python}\na, b = found.maps.values()\n(b - a){at}"
            )
    with right:
        _outputs(found, saved, python)


def _identity(facts: Mapping[str, Any]) -> None:
    error = facts["error"]
    if error is None:
        st.caption(literal(f"Whether the output is the map times values is not told: {facts['unchecked']}."))
    else:
        st.caption(literal(f"output and map × values differ by {error:.2g} at most ({facts['exactness']})"))


def _tiles(values: Tensor, title: str, unit: str, key: str, *, signed: bool | None = None) -> None:
    queries, keys = values.shape
    data = tilemap_data(
        values, queries=queries, keys=keys, view=[0, queries, 0, keys], size=1, exact=True, title=title, unit=unit,
        signed=bool((values < 0).any()) if signed is None else signed, source=title,
    )  # fmt: skip
    TILEMAP.show(data, key=key)


def _cells(values: Tensor) -> Any:
    import pandas as pd

    rows, columns = values.shape
    places = [(row, column) for row in range(rows) for column in range(columns)]
    query, key = zip(*places, strict=True)
    return pd.DataFrame({"query": query, "key": key, "weight": values.flatten().tolist()})


def _outputs(found: Mapping[str, Any], saved: Any, python: str) -> None:
    from workbench.apps.work_variants import comparison_from

    if found["difference"] is None:
        st.caption("The outputs are not comparable: the inputs or their shapes differ.")
        return
    st.metric(
        "Difference of outputs", f"{found['relative']:.1%}",
        help=f"Norm of the difference over that of the first output; the largest single difference is {found['difference']:.3g}.",
    )  # fmt: skip
    comparison = comparison_from(saved)
    figure(
        comparison.plot, comparison.numbers(), name="outputs", python=f"{python}\nfound.plot()\nfound.numbers()", width=360,
        caption="A dot per number of the output; on the line both say the same.",
    )  # fmt: skip


def _table(frame: Any, python: str) -> None:
    st.subheader("What the catalogue and the maps say")
    turned = frame.set_index("variant").T.astype(str).reset_index(names="")
    st.dataframe(turned, hide_index=True)
    downloads(frame, name="variants", python=f"{python}\nfound.frame()")


guarded(page)
