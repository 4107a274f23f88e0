"""Names and tokens as text: Streamlit reads Markdown, and none of it may be theirs."""

from __future__ import annotations

_SPECIAL = frozenset("\\`*_{}[]()#+-.!|<>~$:&")
_LONGEST = 2000


def literal(text: str) -> str:
    """``text`` so that Markdown shows it as it is, in one line; what is longer than 2,000 characters is cut and says so."""
    cut = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ... ({len(text):,} characters)"
    return "".join(f"\\{c}" if c in _SPECIAL else " " if c in "\r\n" else c for c in cut)


def readable(token: str) -> str:
    """A token for people: markers of words become spaces, and what cannot be seen becomes a sign."""
    text = token.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n")
    return text.replace("\n", "⏎").replace("\t", "⇥") or "∅"
