"""The pages of the app by group: file in ``views/``, title, icon."""

from __future__ import annotations

PAGES = {
    "": [("home", "Home", ":material/home:")],
    "See": [
        ("sinks", "Sinks", ":material/vertical_align_bottom:"),
    ],
    "Work": [
        ("jobs", "Jobs", ":material/lists:"),
        ("results", "Saved results", ":material/folder_open:"),
        ("report", "Report", ":material/description:"),
    ],
}
