"""Load what every page but the first needs, while the first is read."""

from __future__ import annotations

import threading

import streamlit as st


@st.cache_resource
def warm() -> bool:
    """Import torch and the analyses in the background, once per server."""
    threading.Thread(target=_imports, name="warm", daemon=True).start()
    return True


def _imports() -> None:
    import matplotlib.figure  # noqa: F401

    import workbench.probes.atlas
    import workbench.stored_run
    import workbench.zooming  # noqa: F401
