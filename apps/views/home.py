"""Home: what can be done here, in a sentence each, and what was done so far."""

from __future__ import annotations

from dataclasses import dataclass

import streamlit as st

from workbench.apps.screen import place, runs
from workbench.apps.screen.need import guarded, work
from workbench.apps.screen.pages import SENTENCES, titles
from workbench.apps.screen.text import literal

_SHOWN = 12


@dataclass(frozen=True)
class Start:
    """A first step: a question, what its answer looks like, and the page that gives it."""

    question: str
    says: str
    page: str
    label: str
    icon: str
    model: str = ""


STARTS = (
    Start(
        "Where does attention go to rest?",
        "A sink is a token, often the first, that heads attend to when they have nothing to fetch.",
        "sinks",
        "Show me a sink",
        ":material/vertical_align_bottom:",
    ),
    Start(
        "Who finds the needle?",
        "A retrieval head looks at a fact far back in the text at the moment the model repeats it.",
        "retrieval",
        "Show me a retrieval head",
        ":material/search:",
        "tiny-softmax",
    ),
    Start(
        "How do heads work together?",
        "A circuit is the few connections between heads that carry a behaviour; the rest can be taken away.",
        "circuit",
        "Show me a circuit",
        ":material/account_tree:",
        "compiled-ioi",
    ),
)


def page() -> None:
    st.title("Attention workbench")
    st.markdown("See what attention does inside a model, explain it, and check the explanation by intervening.")
    for column, start in zip(st.columns(len(STARTS)), STARTS, strict=True):
        with column.container(border=True, height="stretch"):
            st.markdown(f"**{start.question}**")
            st.markdown(start.says)
            query = {"model": start.model} if start.model else None  # whatever model was looked at before
            st.page_link(f"views/{start.page}.py", label=start.label, icon=start.icon, query_params=query)
    _all_pages()
    _done()


def _all_pages() -> None:
    """Every other page in a sentence."""
    names = [name for name in titles() if name not in ("home", *(start.page for start in STARTS))]
    for column, part in zip(st.columns(3), (names[0::3], names[1::3], names[2::3]), strict=True):
        with column:
            for name in part:
                title, icon = titles()[name]
                st.page_link(f"views/{name}.py", label=f"**{title}**", icon=icon)
                st.caption(SENTENCES[name])


def _done() -> None:
    """Runs, jobs under way, and the disk they take."""
    st.subheader("Runs")
    found = runs.captured()
    waiting = work().queue()
    if waiting:
        st.caption(literal(f"under way: {', '.join(job.probe for job in waiting)}"))
    if not found:
        st.info("Nothing was captured yet; the buttons above do it for you.", icon=":material/info:")
        return
    for run in found[:_SHOWN]:
        with st.container(horizontal=True, vertical_alignment="center"):
            query = {"run": run.key}
            st.page_link("views/atlas.py", label=literal(run.title), icon=":material/apps:", query_params=query)
            for name in ("head", "sinks"):
                title, icon = titles()[name]
                st.page_link(f"views/{name}.py", label=title, icon=icon, query_params=query)
    if len(found) > _SHOWN:
        st.caption(f"and {len(found) - _SHOWN:,} more: choose one in the sidebar of Atlas or Head")
    size, number = runs.disk_use()
    st.caption(literal(f"{number:,} cells in {place.cells().path}: {size / 1e6:,.1f} MB"))


guarded(page)
