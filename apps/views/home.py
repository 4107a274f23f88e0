"""Home."""

from __future__ import annotations

import streamlit as st

from workbench.apps.screen.need import guarded


def page() -> None:
    st.title("Attention workbench")
    st.page_link("views/sinks.py", label="See a sink")


guarded(page)
