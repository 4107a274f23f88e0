"""Sinks: the tokens that collect attention whatever the query asks for."""

from __future__ import annotations

import streamlit as st

from workbench.apps.screen import runs, state
from workbench.apps.screen.need import guarded
from workbench.apps.screen.shown import figure


def page() -> None:
    st.title("Sinks")
    st.caption("A sink is a token to which many heads give most of their attention, whatever the query is about.")
    run = runs.current()
    epsilon = state.fraction(
        "A first token with a larger share counts as a sink", 0.05, 0.95, "epsilon", default=0.3, step=0.05
    )
    import workbench as wb

    found = wb.sinks(runs.opened(run), epsilon=epsilon)
    python = f"{run.python}\nfound = wb.sinks(run, epsilon={epsilon})\nfound.plot()\nfound.frame()"
    figure(
        found.plot, found.frame(), name="sinks", python=python, caption="Mean share of attention on the first token."
    )


guarded(page)
