"""Circuit: which connections carry a behaviour, how much of it they carry, and whether another method says the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import streamlit as st

from workbench.apps.components.graph import GRAPH, circuit_data
from workbench.apps.components.tilemap import TILEMAP, tilemap_data
from workbench.apps.screen import head_view, place, runs, state
from workbench.apps.screen.circuit_view import CONTROLS, OWN, Asked, head_of, options_of, reduced
from workbench.apps.screen.need import Done, ask, guarded, job, need
from workbench.apps.screen.shown import downloads, figure
from workbench.apps.screen.text import literal, readable
from workbench.apps.work_circuit import (
    beside,
    chosen_parts,
    faithfulness_of,
    fitting_models,
    known_circuit,
    sizes,
    task_of,
)

if TYPE_CHECKING:
    from workbench.circuits import Circuit

_MODEL = "compiled-ioi"
_EXACT, _FAST = "patching", "eap-ig"
"""Small models with a known circuit begin with exact effects, which gradients of their hard attention do not show."""
_NONE = "none"
_STRONG = 0.02
"""Parts with this share of the largest score are kept to begin with, if they are not many."""
_SHOWN = 1000
_OFFERED = 200
_BELOW = {
    "parts": "Parts",
    "faithfulness": "Faithfulness",
    "without": "Take away and run again",
    "methods": "Compare two methods",
}
_WITHOUT = {
    "rest": "everything but the circuit",
    "circuit": "the circuit",
    "part": "the part in focus",
    "some": "parts of my choice",
}


def page() -> None:
    st.title("Circuit")
    st.caption(
        "A method scores every connection by how much of a task's behaviour is lost without it. Layers go upwards; a line ends "
        "at the query, key or value input of a head. Click a line to see what that head attends to."
    )
    truth, asked = _asked()
    done = need(asked.job, "Finding the circuit")
    found: Circuit = done.load()
    keep = _keep(found)
    state.forget_unless("circuit of the part", f"{asked.model} {found.level}", ("part", "parts"))
    part = state.held("part", str, "")
    if part and not _is_part(found, part):
        st.warning(literal(f"The part {part!r} of this link is not in this circuit."))
        part = ""
    above = st.container()
    below = state.choose("Below", list(_BELOW), "below", show=_BELOW.__getitem__, kind="segmented_control")
    circuit = reduced(found, keep)
    other: Circuit | None = None
    if below == "parts":
        _parts(asked, circuit, truth, keep)
    elif below == "faithfulness":
        _faithfulness(asked, done)
    elif below == "without":
        _without(asked, done, circuit, keep, part)
    else:
        other = _methods(asked, circuit, keep)
    with above:
        _picture(asked, circuit, truth, other, keep, part)


# Controls


def _asked() -> tuple[Circuit | None, Asked]:
    import workbench as wb

    row = st.columns(4)
    model = state.choose("Model", fitting_models(place.models()), "model", default=_MODEL, where=row[0])
    truth = known_circuit(model)
    task = _task(model, truth, row[1])
    methods = wb.methods()
    method = state.choose("Method", list(methods), "method", default=_EXACT if truth is not None else _FAST, where=row[2],
                          help="\n".join(f"- **{m.name}**: {literal(m.description)}" for m in methods.values()))  # fmt: skip
    chosen = methods[method]
    level = state.choose("Level", list(chosen.levels), "level", default=chosen.levels[-1], where=row[3],
                         help="Score heads and MLPs, or every connection between them.")  # fmt: skip
    more = st.expander("Examples, replacement, options of the method")
    finer = more.columns([2, 2, 1, 3])
    examples = state.number("Examples", 2, 128, "examples", default=16 if truth is None else 8, where=finer[0])
    ablation = state.choose("What replaces a part", list(chosen.ablations), "ablation", where=finer[1],
                            help="counterfactual: its value on the corrupted prompt; mean: its mean over prompts; "
                                 "optimal: the constant that costs least.")  # fmt: skip
    seed = state.number("Seed", 0, 999, "seed", default=0, where=finer[2], kind="number_input")
    state.forget_unless("method of the options", method, ("options",))
    said = state.held("options", str, "")
    defaults = " ".join(f"{name}={value}" for name, value in chosen.options.items())
    finer[3].text_input("Options", key="options", placeholder=defaults or "this method has none",
                      help="name=value, with spaces between", persist_state="session")  # fmt: skip
    return truth, Asked(model, task, method, level, ablation, examples, seed, options_of(said))


def _task(model: str, truth: Circuit | None, where: Any) -> Any:
    """The task: of a model with a known circuit its own, else one that the model can read, best answered first."""
    own = task_of(truth)
    if own is not None:
        state.choose("Task", [own["name"]], "task", where=where, help="The task that this model was made for.")
        return own if len(own) > 1 else own["name"]
    table = need(job("workbench.apps.work_circuit:fitting_tasks", model), "Trying the tasks on the model").table()
    right = dict(zip(table["task"], table["accuracy"], strict=True))
    return state.choose("Task", list(right), "task", where=where, show=lambda name: f"{name} ({right[name]:.0%} right)",
                        help="Tasks whose words the model can read, with its share of right answers.")  # fmt: skip


def _keep(found: Circuit) -> int:
    """How many parts are kept: the threshold, said as a number."""
    parts = len(found.names)
    ordered = found.scores.abs().sort(descending=True).values.tolist()
    own = len(found) < parts

    def show(n: int) -> str:
        return f"{len(found)}, the method's own" if n == OWN else f"{n:,} of {parts:,}: |score| ≥ {ordered[n - 1]:.3g}"

    options = [*([OWN] if own else []), *sizes(parts)]
    strong = sum(score >= _STRONG * ordered[0] for score in ordered)
    usual = min(sizes(parts), key=lambda n: abs(n - max(min(8, parts // 2), min(strong, parts // 10))))
    return state.choose(f"Keep the strongest {found.level}s", options, "keep", default=OWN if own else usual, show=show,
                        kind="select_slider")  # fmt: skip


def _is_part(circuit: Circuit, part: str) -> bool:
    from workbench.errors import WorkbenchError

    if part == "logits" or part in circuit.names:
        return True
    try:
        return any(chosen_parts(circuit, [part]))
    except WorkbenchError:
        return any(f"->{part}" in name for name in circuit.names)


# The graph and what is in focus


def _picture(
    asked: Asked, circuit: Circuit, truth: Circuit | None, other: Circuit | None, keep: int, part: str
) -> None:
    _counts(circuit, truth)
    left, right = st.columns([3, 2])
    limit = float(circuit.scores.abs()[circuit.kept].min()) if len(circuit) and keep != OWN else None
    with left:
        GRAPH.show(
            circuit_data(circuit, truth=truth, other=other, selected=part or None, threshold=limit, title=asked.title),
            key="circuit graph",
            on={"node": lambda name: state.put("part", name), "edge": _edge},
        )
        downloads(
            circuit.frame(),
            name="circuit",
            python=asked.python(keep) + "circuit.plot()\ncircuit.frame()",
            draw=circuit.plot,
        )
    with right:
        _focus(asked, circuit, truth, part)


def _edge(value: Any) -> None:
    from workbench.circuits import edge_name

    state.put("part", edge_name(value["source"], value["target"], value["channel"]))


def _counts(circuit: Circuit, truth: Circuit | None) -> None:
    """How many parts are kept, and how well they are those of the known circuit."""
    said = [f"**{len(circuit):,}** of {len(circuit.names):,} {circuit.level}s kept"]
    if truth is None:
        said.append("no circuit of this model is known, so that nothing tells which parts are right")
    else:
        import workbench as wb

        whole = circuit.over_positions()
        right = set(truth.nodes)
        if whole.level == "edge":
            right = {name for name, stays in zip(truth.names, truth.kept.tolist(), strict=True) if stays}
        known = right & set(whole.names)
        kept = {name for name, stays in zip(whole.names, whole.kept.tolist(), strict=True) if stays}
        said.append(f"**{len(kept & known)} of {len(known)}** parts of the known circuit among them")
        value = wb.auroc(whole, truth)
        said.append(f"AUROC **{'undefined' if value != value else f'{value:.3f}'}**")
    st.markdown(
        " · ".join(said),
        help=None
        if truth is None
        else "AUROC: how often a part of the known circuit has a larger score than one outside of it; 0.5 by chance.",
    )


def _focus(asked: Asked, circuit: Circuit, truth: Circuit | None, part: str) -> None:
    if not part:
        st.info(
            "Click a line or a head in the graph, or a row of the table: its numbers and its head's map appear here."
        )
        return
    st.subheader(literal(part), anchor=False)
    scores = dict(zip(circuit.names, zip(circuit.scores.tolist(), circuit.kept.tolist(), strict=True), strict=True))
    if part in scores:
        score, stays = scores[part]
        said = [f"score {score:.4g}", "kept" if stays else "not kept"]
        if truth is not None and part in truth.names:
            known = dict(zip(truth.names, truth.kept.tolist(), strict=True))[part]
            said.append("in the known circuit" if known else "not in the known circuit")
        st.text(", ".join(said))
    st.button("Let go", on_click=lambda: state.put("part", ""), type="tertiary", icon=":material/close:")
    at = head_of(part, circuit)
    if at is None:
        st.caption("Neither end is a head, so there is no attention to show.")
        return
    done = ask(job("capture", asked.model, asked.task, seed=asked.seed), "Capturing the task's first example")
    if done is not None:
        _map(done, *at)


def _map(done: Done, layer: int, head: int) -> None:
    run = runs.Captured(done.key, done.job)
    opened = runs.opened(run)
    amap = opened.maps[layer]
    _, _, q, k = amap.shape
    look = head_view.Look(layer, head_view.heads_of(amap)[head], (0, q, 0, k))
    found = head_view.part(opened, look)
    queries, keys = head_view.token_names(opened, layer)
    TILEMAP.show(
        tilemap_data(
            found.values, queries=q, keys=k, view=(0, q, 0, k), size=found.size, exact=found.size == 1,
            signed=amap.sign == "signed", query_labels=[readable(token) for token in queries],
            key_labels=[readable(token) for token in keys], title=f"layer {layer}, head {head}, first example",
        ),
        key="circuit map",
    )  # fmt: skip
    st.page_link("views/head.py", label="Look at this head closely", icon=":material/grid_on:",
                 query_params={"run": done.key, "layer": str(layer), "head": str(head)})  # fmt: skip


# Below the graph


def _parts(asked: Asked, circuit: Circuit, truth: Circuit | None, keep: int) -> None:
    table = circuit.frame()
    table.insert(0, "part", list(circuit.names))
    if truth is not None and truth.level == circuit.level:
        known = dict(zip(truth.names, truth.kept.tolist(), strict=True))
        table["known"] = [known.get(name, False) for name in table["part"]]
    order = table["score"].abs().sort_values(ascending=False, kind="stable").index
    shown = table.loc[order].head(_SHOWN).reset_index(drop=True)

    def chosen() -> None:
        rows = st.session_state["table of parts"].selection.rows
        state.put("part", shown["part"][rows[0]] if rows else "")

    st.dataframe(
        shown, hide_index=True, key="table of parts", on_select=chosen, selection_mode="single-row", height=360,
        column_config={"score": st.column_config.NumberColumn(format="%.4g", help="Positive: the part supports the behaviour.")},
    )  # fmt: skip
    more = f" The {_SHOWN:,} strongest of {len(table):,} are listed." if len(table) > _SHOWN else ""
    unit = circuit.provenance.get("unit", "")
    st.caption(literal(f"Score: {unit or 'in units of the method'}. Choose a row to see it in the graph.{more}"))


def _faithfulness(asked: Asked, done: Done) -> None:
    judged = ask(asked.judging("judged", str(done.folder), controls=CONTROLS), "Judging the circuit on other examples")
    if judged is None:
        return
    curve = faithfulness_of(judged.load())
    if curve.note:
        st.warning(literal(curve.note))
    figure(
        curve.plot, curve.frame(), name="faithfulness", python=asked.judged_python(), width=720,
        caption="1: the kept parts do what the whole model does; 0: no more than nothing. Everything else is replaced. Grey: as "
                "many random parts. CPR: area under the curve by signed score; CMD: distance from 1, 0 at best.",
    )  # fmt: skip


def _without(asked: Asked, done: Done, circuit: Circuit, keep: int, part: str) -> None:
    what = state.choose("What is replaced", list(_WITHOUT), "without", show=_WITHOUT.__getitem__, kind="radio")
    kept = [name for name, stays in zip(circuit.names, circuit.kept.tolist(), strict=True) if stays]
    parts = kept
    if what == "part":
        if part in ("", "logits"):
            st.info("Click a head or a line in the graph first.")
            return
        parts = [part]
    elif what == "some":
        parts = _chosen(circuit, kept)
        if not parts:
            st.info("Choose at least one part.")
            return
    only = what == "rest"
    again = ask(
        asked.judging("taken_away_again", str(done.folder), parts=parts, keep=only), "Running the model without them"
    )
    if again is None:
        return
    table = again.table()
    before, after, nothing = table.to_dict("records")
    row = st.columns(4)
    row[0].metric("metric", f"{after['metric']:.3f}", f"{after['metric'] - before['metric']:.3f}", border=True,
                  help=f"The whole model: {before['metric']:.3f}; everything replaced: {nothing['metric']:.3f}.")  # fmt: skip
    row[1].metric("right answers", f"{after['accuracy']:.0%}", f"{100 * (after['accuracy'] - before['accuracy']):.0f} points",
                  border=True)  # fmt: skip
    row[2].metric("parts replaced", f"{after['replaced']:,}", border=True)
    st.dataframe(table, hide_index=True)
    st.caption(
        f"Mean over {asked.examples} examples that the circuit was not found on; the arrows compare with the whole model."
    )
    downloads(table, name="without", python=asked.taken_python(keep, parts, only, what in ("rest", "circuit")))


def _chosen(circuit: Circuit, kept: list[str]) -> list[str]:
    order = circuit.scores.abs().argsort(descending=True, stable=True)[:_OFFERED].tolist()
    nodes = [name.partition("->")[0] for name in circuit.names if "->" in name]
    offered = list(dict.fromkeys([*nodes, *kept, *(circuit.names[i] for i in order)]))

    def read(text: str) -> list[str] | None:
        given = [name for name in text.split(",") if name]
        return given if all(_is_part(circuit, name) and name != "logits" for name in given) else None

    none: list[str] = []
    chosen = state.held("parts", read, none, say=",".join)
    offered = list(dict.fromkeys([*offered, *chosen]))
    st.multiselect("Parts", offered, key="parts", persist_state="session",
                   help="A head or MLP stands for every connection out of it. The strongest are offered.")  # fmt: skip
    return chosen


def _methods(asked: Asked, circuit: Circuit, keep: int) -> Circuit | None:
    import workbench as wb

    able = [m.name for m in wb.methods().values()
            if asked.level in m.levels and asked.ablation in m.ablations and m.name != asked.method]  # fmt: skip
    second = state.choose("Second method", [_NONE, *able], "method2",
                          help="Methods for the same parts and replacement, with their default options.")  # fmt: skip
    if second == _NONE:
        st.info("Choose a second method: the graph then tells by colour which connections both keep.")
        return None
    done = ask(asked.by(second).job, f"Finding the circuit by {second}")
    if done is None:
        return None
    found: Circuit = done.load()
    theirs = OWN if keep == OWN and len(found) < len(found.names) else keep if keep != OWN else len(circuit)
    other = reduced(found, theirs)
    shared = wb.compare_circuits(circuit, other)
    at = shared.levels.index(circuit.level)
    row = st.columns(4)
    row[0].metric("in both", int(shared.common[at]), f"{float(shared.expected[at]):.2g} by chance", delta_color="off",
                  delta_arrow="off", border=True)  # fmt: skip
    row[1].metric(f"only by {asked.method}", int(shared.a[at] - shared.common[at]), border=True)
    row[2].metric(f"only by {second}", int(shared.b[at] - shared.common[at]), border=True)
    alike = "undefined" if shared.spearman != shared.spearman else f"{shared.spearman:.2f}"
    row[3].metric("rank correlation", alike, border=True, help="Spearman's, of the signed scores of all parts.")
    both = beside(circuit, other)
    left, right = st.columns(2)
    with left:
        figure(
            both.plot, both.frame(), name="two-methods", python=asked.beside_python(second, keep, theirs), width="stretch",
            caption="Every part, by the score of one method and of the other. Units differ between methods.",
        )  # fmt: skip
    with right:
        table = both.frame()
        st.dataframe(table[table["kept"] != "in neither"], hide_index=True, height=420, column_config={
            str(name): st.column_config.NumberColumn(format="%.4g") for name in table.select_dtypes("number")
        })  # fmt: skip
    return other


guarded(page)
