"""What the frame of every page looks like: its icon, and less empty space than Streamlit leaves by itself."""

from __future__ import annotations

import base64

_ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#1b7f9e"/>
<path d="M3 3v10h10z" fill="#fff"/><path d="M3 3h2v10h-2z" fill="#ffc857"/></svg>"""
ICON = f"data:image/svg+xml;base64,{base64.b64encode(_ICON.encode()).decode()}"
"""A causal map with a sink, part of the page: an icon by name would be fetched from elsewhere."""
STYLE = """<style>
.stMainBlockContainer { padding-top: 3.2rem; padding-bottom: 3rem; }
.stMainBlockContainer h1 { font-size: 2rem; padding: 0 0 .2rem; }
.stMainBlockContainer h3 { font-size: 1.25rem; }
[data-testid="stSidebarNavItems"] li { margin: 0; }
[data-testid="stSidebarHeader"] { height: 2.5rem; }
</style>"""
