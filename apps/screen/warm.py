"""Load what every page but the first needs while the first is read, and keep it out of the way of what runs then."""

from __future__ import annotations

import gc
import sys
import threading

import streamlit as st

_LATER = 1.5
"""Seconds that the first page gets to be drawn by itself; imports beside it make it a third slower or more."""
_GROWN = 50
"""Modules that were imported since the last time, from which on it is worth it."""
_put_aside = 0


@st.cache_resource
def warm() -> bool:
    """Import torch and the analyses in the background, once per server, when the first page is on its way."""
    later = threading.Timer(_LATER, _imports)
    later.daemon = True
    later.start()
    return True


def put_aside() -> None:
    """Take what was imported out of garbage collection. Streamlit collects after every run of a script or a fragment, with the
    interpreter to itself: 200 ms with torch and transformers, which nobody lets go of. To be called where a run begins, when
    there is no garbage that would be kept with them."""
    global _put_aside
    if len(sys.modules) >= _put_aside + _GROWN:
        gc.freeze()
        _put_aside = len(sys.modules)


def _imports() -> None:
    import torch

    # Pages compute for milliseconds, beside a browser and a worker that need the cores: waiting for a second thread to get one
    # takes longer than the whole computation.
    torch.set_num_threads(1)
    import matplotlib.figure  # noqa: F401

    import workbench.probes.atlas
    import workbench.stored_run
    import workbench.zooming  # noqa: F401
