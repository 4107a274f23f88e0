"""Report."""

from __future__ import annotations

import streamlit as st

from workbench.apps.screen.need import guarded


def page() -> None:
    st.title("Report")


guarded(page)
