"""Saved results."""

from __future__ import annotations

import streamlit as st

from workbench.apps.screen.need import guarded


def page() -> None:
    st.title("Saved results")


guarded(page)
