"""The app: its pages and what they share.

Run by ``workbench app --store results``. A page is a thin view over the public API; heavy work runs in a worker process
(``screen.work``).
"""

from __future__ import annotations

import streamlit as st

from workbench.apps.screen import state
from workbench.apps.screen.look import ICON, STYLE
from workbench.apps.screen.pages import PAGES
from workbench.apps.screen.warm import warm


def main() -> None:
    """Choose the page by the address and draw it."""
    st.set_page_config(page_title="attention workbench", page_icon=ICON, layout="wide")
    st.html(STYLE)
    pages = {
        group: [
            st.Page(f"views/{name}.py", title=title, icon=icon, url_path=name, default=name == "home")
            for name, title, icon in members
        ]
        for group, members in PAGES.items()
    }
    chosen = st.navigation(pages, expanded=True)
    warm()
    state.turn_to(chosen.url_path)
    chosen.run()


main()
