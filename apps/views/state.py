"""Linear and state-space layers: effective attention with its sign, its decay, and how much the state holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import streamlit as st

from workbench.apps.components.tilemap import TILEMAP, tilemap_data
from workbench.apps.screen import runs, state
from workbench.apps.screen.need import guarded, job, need
from workbench.apps.screen.shown import downloads, figure
from workbench.apps.screen.text import literal

if TYPE_CHECKING:
    from workbench.apps.work_state import StateView
    from workbench.maps import AttentionMap

_SOURCES = {"variant": "a variant of the catalogue", "run": "a layer of a captured run"}
_TOKENS = (32, 64, 128, 256, 512)
_CELLS = 512


def page() -> None:
    st.title("Linear and state-space")
    st.caption(
        "What a token's output takes from every earlier value. The weights have a sign (blue adds, orange takes away) and do not "
        "add up to 1: they are no probabilities, and they are not called attention weights of a softmax."
    )
    source = state.choose("Look at", list(_SOURCES), "source", show=_SOURCES.__getitem__, kind="segmented_control")
    looked = _variant() if source == "variant" else _captured()
    if looked is not None:
        _facts(looked)
        _map(looked)
        _numbers(looked)


@dataclass(frozen=True)
class _Looked:
    """A view with the map that tiles are cut from, and the code that makes both: ``view`` and ``amap``."""

    view: StateView
    amap: AttentionMap
    python: str


def _variant() -> _Looked | None:
    import workbench as wb
    from workbench.apps.work_state import state_variants, view_from

    columns = st.columns([3, 2, 1])
    known = {name: f"{name} ({wb.variants()[name].family})" for name in state_variants()}
    name = state.choose(
        "Variant", list(known), "variant", default="gated-deltanet", where=columns[0], show=known.__getitem__
    )
    tokens = state.choose("Tokens", _TOKENS, "tokens", default=128, where=columns[1])
    seed = state.number("Seed", 0, 9999, "seed", default=0, where=columns[2], kind="number_input")
    done = need(job("workbench.apps.work_state:state_view", variant=name, tokens=tokens, seed=seed), f"Running {name}")
    view = view_from(done.load())
    record = wb.variants()[name]
    st.caption(literal(f"{record.paper}. {record.note}".strip()))
    python = (
        "import workbench as wb\nfrom workbench.apps.work_state import state_view\n\n"
        f"view = state_view({name!r}, seed={seed}, tokens={tokens})\namap = wb.AttentionMap.from_dense(view.weights[None])"
    )
    return _Looked(view, wb.AttentionMap.from_dense(view.weights[None]), python)


def _captured() -> _Looked | None:
    from workbench.apps.work_state import softmax_like

    run = runs.current()
    found = runs.opened(run)
    layers = [name for name, amap in found.maps.items() if not softmax_like(amap)]
    if not layers:
        st.info(
            "All layers of this run are softmax attention, whose rows are shares: look at them on the page of a head. Capture "
            "a model with linear, delta-rule or state-space layers, or choose a variant of the catalogue above."
        )
        st.page_link("views/head.py", label="One head", icon=":material/grid_on:", query_params={"run": run.key})
        st.page_link("views/capture.py", label="Capture", icon=":material/photo_camera:")
        return None
    layer = state.choose("Layer", layers, "layer")
    amap = found.maps[layer]
    python = (
        f"{run.python}\nfrom workbench.apps.work_state import viewed\n\n"
        f"amap = run.maps[{layer!r}]\nview = viewed(amap, 'layer {layer}')"
    )
    return _Looked(_viewed(run.key, f"layer {layer}", amap), amap, python)


@st.cache_resource(max_entries=8, show_spinner="Reading the layer")
def _viewed(key: str, layer: str, _amap: AttentionMap) -> StateView:
    from workbench.apps.work_state import viewed

    return viewed(_amap, layer)


def _facts(looked: _Looked) -> None:
    facts, error = looked.view.facts, looked.view.error
    sums = {"1": "rows add up to 1", "<=1": "rows add up to at most 1", "gate": "rows add up to their gate"}
    exact = {
        "exact": "The map is exact",
        "jacobian": "The map is the derivative of the output by the values, at this input",
        "approximation": "The map is an approximation",
    }[facts["exactness"]]
    checked = "" if error is None else f": the output and the map times the values differ by {error:.2g} at most"
    channel = " Every channel has weights of its own; shown is their mean." if facts["channelwise"] else ""
    sign = "Weights can be negative" if facts["sign"] == "signed" else "No weight is negative"
    st.text(f"{exact}{checked}. {sign}; {sums.get(facts['row_sum'], 'rows add up to anything')}.{channel}")


def _map(looked: _Looked) -> None:
    import workbench as wb

    view, tokens = looked.view, looked.amap.shape[3]
    left, _ = st.columns([1, 4])
    head = state.choose("Head", list(range(len(view.profile))), "head", where=left)
    part = state.held(
        "view", lambda text: _part(text, tokens), (0, tokens, 0, tokens), say=lambda at: "-".join(map(str, at))
    )
    if max(part) > tokens:
        part = (0, tokens, 0, tokens)
    found = wb.zoom(looked.amap, head, part[:2], part[2:], cells=_CELLS)
    data = tilemap_data(
        found.values, queries=tokens, keys=tokens, view=[*found.queries, *found.keys], size=found.size, exact=found.exact,
        signed=True, unit="weight" if found.size == 1 else "sum per query", title=f"{view.name}, head {head}",
        source=f"{view.name} {head}",
    )  # fmt: skip
    TILEMAP.show(data, key="effective", on={"view": lambda at: state.put("view", tuple(int(edge) for edge in at))})
    downloads(
        found.frame,
        name="effective-map",
        python=f"{looked.python}\n"
        f"found = wb.zoom(amap, {head}, {part[:2]}, {part[2:]}, cells={_CELLS})\nfound.plot()\nfound.frame()",
        draw=found.plot,
    )


def _part(text: str, tokens: int) -> tuple[int, int, int, int] | None:
    edges = text.split("-")
    if len(edges) != 4 or not all(edge.isdigit() for edge in edges):
        return None
    q0, q1, k0, k1 = map(int, edges)
    return (q0, q1, k0, k1) if 0 <= q0 < q1 <= tokens and 0 <= k0 < k1 <= tokens else None


def _numbers(looked: _Looked) -> None:
    view = looked.view
    left, right = st.columns(2, gap="medium")
    with left:
        st.subheader(
            "Decay",
            help="Mean absolute weight by distance; dashed an exponential, where one fits, with its half-life in tokens.",
        )
        figure(
            view.plot, view.decay(), name="decay", python=f"{looked.python}\nview.plot()\nview.decay()", width="stretch"
        )
    with right:
        st.subheader(
            "State", help="How much the state would hold of independent values of unit size. It grows where nothing is "
            "forgotten, and levels off where old values fade or are erased.",
        )  # fmt: skip
        if view.norms is None:
            st.info(literal(view.stateless))
        else:
            code = f"{looked.python}\nview.plot_norms()\nview.states()"
            figure(view.plot_norms, view.states(), name="state-norm", python=code, width="stretch")
    frame = view.frame()
    st.dataframe(
        frame,
        hide_index=True,
        column_config={
            "half_life": st.column_config.NumberColumn(
                "half-life (tokens)", format="%.3g", help="empty: it does not fall"
            ),
            "r2": st.column_config.NumberColumn("fit R²", format="%.2f", help="1: the decay is exponential"),
            "effective_rank": st.column_config.NumberColumn("effective rank", format="%.1f"),
            "negative": st.column_config.NumberColumn("negative share", format="percent"),
            "last_norm": st.column_config.NumberColumn("last state norm", format="%.3g"),
        },
    )
    downloads(frame, name="state", python=f"{looked.python}\nview.frame()")


guarded(page)
