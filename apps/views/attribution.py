"""Attribution graph: through which features does a prompt become the next token?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.apps.components.graph import GRAPH, attribution_data
from workbench.apps.screen import place, state
from workbench.apps.screen.need import guarded, job, need
from workbench.apps.screen.shown import downloads
from workbench.apps.screen.text import literal, readable
from workbench.apps.work_attribution import (
    DRAWN,
    drawable,
    file_of,
    known_node,
    models_with_transcoders,
    paths_table,
    read_file,
    reduced,
    store_file,
    stored_files,
)
from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    from workbench.feature_graph import FeatureGraph

_PROMPT = "Later Adam and Ruth stayed at the house . Ruth brought a snack to"
_FROM = {"prompt": "A prompt", "task": "A task's example", "file": "A file"}
_PARTS = {"whole": "all of it", "around": "around the node in focus", "pinned": "pinned nodes"}
_LARGEST = 100
"""Megabytes of a file that is brought along: what Neuronpedia takes."""
_LINKS = 12


def page() -> None:
    st.title("Attribution graph")
    st.caption(
        "Features of transcoders take the place of the MLPs. A line says how much one feature, token or error adds to the next; "
        "columns are tokens, rows are layers, and what reaches the top makes the explained token likelier. Click a node."
    )
    what = state.choose("Explain", list(_FROM), "from", show=_FROM.__getitem__, kind="segmented_control")
    found = _from_file() if what == "file" else _computed(what)
    if found is None:
        return
    graph, folder, python, name = found
    small, pruning = _pruned(graph, folder)
    if not len(small.source):
        st.info("Nothing is left: move the sliders to the right.")
        return
    _scores(graph, small)
    _graph(small, python + pruning, name)


Found = tuple["FeatureGraph", str, str, str]
"""A graph, the path it was read from, the code that makes it, a name."""


# Where the graph comes from


def _computed(what: str) -> Found | None:
    row = st.columns([2, 5, 2, 2] if what == "prompt" else [1, 3])
    model = state.choose("Model", models_with_transcoders(), "transcoded", where=row[0],
                         help="Bundled models with transcoders. Graphs of other models come as a file.")  # fmt: skip
    targets = None
    if what == "prompt":
        prompt = state.held("prompt", str, _PROMPT)
        row[1].text_input("Prompt", key="prompt", persist_state="session")
        said = [state.held(key, str, "") for key in ("token", "against")]
        row[2].text_input("Explain this token", key="token", placeholder="the likely ones", persist_state="session")
        row[3].text_input("against this one", key="against", placeholder="nothing", persist_state="session",
                          help="With two tokens the difference of their logits is explained.")  # fmt: skip
        if said[1].strip() and not said[0].strip():
            raise WorkbenchError("a second token is compared with a first one; give that too")
        targets = [token.strip() for token in said if token.strip()] or None
        asked = job("workbench.apps.work_attribution:prompt_graph", model, coders=model, prompt=prompt, targets=targets)
        given = f"prompt = {prompt!r}\n" + f"graph = graph_of(model, {model!r}, prompt, {targets!r})\n"
    else:
        table = need(job("workbench.apps.work_circuit:fitting_tasks", model), "Trying the tasks on the model").table()
        right = dict(zip(table["task"], table["accuracy"], strict=True))
        side = row[1].columns([3, 1])
        task = state.choose(
            "Task",
            list(right),
            "task",
            default="ioi",
            where=side[0],
            show=lambda name: f"{name} ({right[name]:.0%} right)",
        )
        seed = state.number(
            "Seed",
            0,
            999,
            "seed",
            default=0,
            where=side[1],
            kind="number_input",
            help="Another seed is another example.",
        )
        asked = job("workbench.apps.work_attribution:prompt_graph", model, task, seed=seed, coders=model)
        given = (
            f"pairs = wb.task({task!r}).build(seed={seed}, tokenizer=model.tokenizer, n=1)\n"
            "targets = (int(pairs.answer[0, 0]), int(pairs.wrong[0, 0]))\n"
            f"graph = graph_of(model, {model!r}, pairs.clean, targets, int(pairs.position[0]))\n"
        )
    done = need(asked, "Attributing the prompt")
    python = (
        "import workbench as wb\nfrom workbench.apps.work_attribution import graph_of\n\n"
        + f"model = wb.load({model!r})\n{given}"
    )
    graph = _saved(str(done.folder))
    unknown = sum(token in ("<unk>", "[UNK]") for token in graph.tokens)
    if unknown:
        st.warning(f"{unknown} of {len(graph.tokens)} tokens are unknown to the model's tokenizer; all read as one.")
    return graph, str(done.folder), python, f"{model}-{what}"


def _from_file() -> Found | None:
    folder = place.store() / "graphs"
    file = st.file_uploader(
        "A graph as JSON, of this app, circuit-tracer or Neuronpedia", type="json", max_upload_size=_LARGEST
    )
    if file is not None:
        taken, refused = st.session_state.get("taken", (None, ""))
        if taken != file.file_id:
            refused = _take(folder, file.getvalue())
            st.session_state["taken"] = (file.file_id, refused)
        if refused:
            st.error(literal(f"{file.name} is not shown: {refused}"))
    known = stored_files(folder)
    if not known:
        st.info("Nothing was brought along yet. The button below a computed graph writes such a file.")
        return None
    key = state.choose("Graph", list(known), "file", show=lambda key: f"{_title(str(known[key]))} ({key})")
    path = known[key]
    python = (
        "from pathlib import Path\n\nimport workbench as wb\nfrom workbench.apps.work_attribution import read_file\n\n"
    )
    python += f"graph = read_file(Path({str(path)!r}))\n"
    return _file(str(path)), str(path), python, f"file-{key}"


def _take(folder: Path, raw: bytes) -> str:
    """Keep a file that was brought along and show it; why not, if that is so."""
    try:
        state.put("file", store_file(folder, raw))
    except WorkbenchError as error:
        return str(error)
    return ""


def _title(path: str) -> str:
    graph = _file(path)
    return f"{_prompt(graph)[:60]}, {len(graph.nodes):,} nodes"


@st.cache_resource(max_entries=4)
def _saved(folder: str) -> FeatureGraph:
    from workbench.feature_graph import FeatureGraph

    return FeatureGraph.load(folder)


@st.cache_resource(max_entries=8)
def _file(path: str) -> FeatureGraph:
    return read_file(Path(path))


@st.cache_resource(max_entries=8)
def _small(_graph: FeatureGraph, folder: str, node_share: float, edge_share: float) -> FeatureGraph:
    return reduced(_graph, node_share, edge_share)


def _pruned(graph: FeatureGraph, folder: str) -> tuple[FeatureGraph, str]:
    """The graph without its weak parts, by what the sliders say, and the code for that."""
    row = st.columns(2)
    nodes = state.fraction("Nodes that carry this share", 0.1, 1.0, "nodes", default=0.8, where=row[0],
                           help="Of the nodes, the strongest ones with this share of all influence on the logits.")  # fmt: skip
    edges = state.fraction("Lines that carry this share", 0.1, 1.0, "edges", default=0.98, where=row[1],
                           help="Of the lines among them, the strongest ones with this share.")  # fmt: skip
    code = f"small = wb.pruned(graph, {nodes}, {edges})\n" if len(graph.logits) else "small = graph\n"
    return _small(graph, folder, nodes, edges), code


# What it shows


def _scores(graph: FeatureGraph, small: FeatureGraph) -> None:
    said = [
        f"**{len(small.nodes):,}** of {len(graph.nodes):,} nodes, **{len(small.source):,}** of {len(graph.source):,} lines"
    ]
    for name, label in (("replacement_score", "replacement"), ("completeness_score", "completeness")):
        value = graph.meta.get(name)
        if isinstance(value, float):
            said.append(f"{label} **{value:.3f}**")
    st.markdown(
        " · ".join(said),
        help="replacement: of what leads to the logits, the share that comes from tokens and not from what the coders leave; "
             "completeness: the share of inputs that are no such errors. 1 at best.",
    )  # fmt: skip


def _graph(small: FeatureGraph, python: str, name: str) -> None:
    import workbench as wb

    focus = state.held("node", str, "")
    if focus and not known_node(small, focus):
        st.warning(literal(f"The node {focus!r} of this link is not in what is kept of the graph."))
        focus = ""
    none: list[str] = []
    pins = [pin for pin in state.held("pins", _names, none, say=",".join) if known_node(small, pin)]
    part = state.choose("Show", list(_PARTS), "part", show=_PARTS.__getitem__, kind="segmented_control")
    shown = small
    if part == "around":
        row = st.columns(2)
        depth = state.number("Links away", 1, 6, "depth", default=1, where=row[0])
        top = state.number("Strongest links of each node", 1, 30, "top", default=8, where=row[1])
        if focus:
            shown = wb.subgraph(small, around=focus, depth=depth, top=top)
            python += f"small = wb.subgraph(small, around={focus!r}, depth={depth}, top={top})\n"
        else:
            st.info("Click a node first: its surroundings are shown then.")
    elif part == "pinned":
        if pins:
            shown = wb.subgraph(small, pins)
            python += f"small = wb.subgraph(small, {pins!r})\n"
        else:
            st.info("Pin nodes first: click one and press Pin. The graph of the pinned ones is shown then.")
    drawn = drawable(
        shown, (*([focus] if focus and known_node(shown, focus) else []), *(p for p in pins if known_node(shown, p)))
    )
    left, *right = st.columns([3, 2]) if focus else [st.container()]
    with left:
        chosen = focus if focus and known_node(drawn, focus) else None
        GRAPH.show(
            attribution_data(drawn, selected=chosen, pinned=pins, title=_prompt(small)),
            key="attribution graph",
            on={"node": lambda node: state.put("node", node), "edge": lambda edge: state.put("node", edge["target"])},
        )
        if len(drawn.nodes) < len(shown.nodes):
            st.caption(f"The {DRAWN} nodes of largest influence are drawn, of {len(shown.nodes):,}.")
        with st.container(horizontal=True):
            downloads(shown.frame(), name=name, python=python + "small.plot()\nsmall.frame()", draw=shown.plot)
            if len(shown.logits):
                st.download_button("Graph as JSON", lambda: file_of(shown, name), f"{name}.json", "application/json",
                                   key="graph json",
                                   type="tertiary", icon=":material/download:", on_click="ignore",
                                   help="As circuit-tracer and Neuronpedia read it; this page reads it too.")  # fmt: skip
    if focus:
        with right[0]:
            _focus(small, focus, pins)
    _paths(small, python)


def _names(text: str) -> list[str] | None:
    return [name for name in text.split(",") if name]


def _prompt(graph: FeatureGraph) -> str:
    words = " ".join(readable(token) for token in graph.tokens)
    return words if len(words) <= 120 else f"{words[:119]}…"


def _focus(graph: FeatureGraph, focus: str, pins: list[str]) -> None:
    import workbench as wb
    from workbench.feature_graph import NODE_KINDS
    from workbench.probes.features.subgraph import describe, node_index

    at = int(node_index(graph, focus)[0])
    nodes = graph.nodes
    st.subheader(literal(describe(graph, at)), anchor=False)
    said = []
    for label, value in (
        ("activation", nodes.activation[at]),
        ("influence", nodes.influence[at]),
        ("probability", nodes.probability[at]),
    ):
        if float(value) == float(value):
            said.append(f"{label} {float(value):.4g}")
    st.text(", ".join(said))
    with st.container(horizontal=True):
        pinned = focus in pins
        after = [pin for pin in pins if pin != focus] if pinned else [*pins, focus]
        st.button(
            "Take the pin out" if pinned else "Pin",
            on_click=state.put,
            args=("pins", after),
            icon=":material/keep:",
            type="tertiary",
        )
        st.button("Let go", on_click=state.put, args=("node", ""), icon=":material/close:", type="tertiary")
        coder = f"{graph.meta.get('model')}/mlp-{int(nodes.layer[at])}"
        if NODE_KINDS[int(nodes.kind[at])] == "feature" and coder.partition("/")[0] in models_with_transcoders():
            query = {"coder": coder, "feature": str(int(nodes.feature[at])), "look": "features"}
            st.page_link(
                "views/features.py",
                label="What this feature stands for",
                query_params=query,
                icon=":material/scatter_plot:",
            )
    links = wb.node_links(graph, focus, top=_LINKS)
    table = links.frame()
    for direction, title in (("in", "What adds to it"), ("out", "What it adds to")):
        part = table[table["direction"] == direction].reset_index(drop=True)
        if len(part):
            _links(graph, part, title, direction)


def _links(graph: FeatureGraph, part: Any, title: str, direction: str) -> None:
    def chosen() -> None:
        rows = st.session_state[f"links {direction}"].selection.rows
        if rows:
            state.put("node", graph.name(int(part["node"][rows[0]])))

    st.caption(title)
    st.dataframe(part[["name", "weight"]], hide_index=True, key=f"links {direction}", on_select=chosen,
                 selection_mode="single-row",
                 height=38 + 35 * min(6, len(part)),
                 column_config={"weight": st.column_config.NumberColumn(format="%.4g")})  # fmt: skip


def _paths(graph: FeatureGraph, python: str) -> None:
    if not len(graph.logits):
        return
    table = paths_table(graph)
    st.subheader("Strongest paths", anchor=False)
    st.dataframe(
        table, hide_index=True,
        column_config={"share": st.column_config.NumberColumn("share of the logits", format="percent", width="small"),
                       "raises": st.column_config.CheckboxColumn("raises", width="small",
                                                                 help="Whether what goes along it makes the token likelier.")},
    )  # fmt: skip
    code = python + "from workbench.apps.work_attribution import paths_table\n\npaths_table(small)"
    downloads(table, name="paths", python=code)


guarded(page)
