"""The pages of the app by group: file in ``views/``, title, icon; and what each is for, in a sentence."""

from __future__ import annotations

PAGES = {
    "": [("home", "Home", ":material/home:")],
    "See": [
        ("model", "Model", ":material/deployed_code:"),
        ("capture", "Capture", ":material/photo_camera:"),
        ("atlas", "Atlas", ":material/apps:"),
        ("head", "Head", ":material/grid_on:"),
        ("sinks", "Sinks", ":material/vertical_align_bottom:"),
        ("retrieval", "Retrieval", ":material/search:"),
        ("heads", "Known heads", ":material/badge:"),
        ("rhythm", "Rhythm", ":material/waves:"),
    ],
    "Explain": [
        ("circuit", "Circuit", ":material/account_tree:"),
        ("features", "Features", ":material/scatter_plot:"),
        ("attribution", "Attribution graph", ":material/hub:"),
    ],
    "Other models": [
        ("vision", "Vision", ":material/image:"),
        ("state", "Linear and state-space", ":material/timeline:"),
        ("variants", "Variants", ":material/compare:"),
    ],
    "Work": [
        ("jobs", "Jobs", ":material/lists:"),
        ("results", "Saved results", ":material/folder_open:"),
        ("report", "Report", ":material/description:"),
    ],
}
SENTENCES = {
    "home": "What can be done here.",
    "model": "What a model is made of, what can be captured of it, and what that takes.",
    "capture": "Run a model on a text, a task or an image and keep what its heads attended to.",
    "atlas": "A small picture of every head, sorted by what you look for.",
    "head": "One head from its whole map down to single weights, with its text, beside another run.",
    "sinks": "Tokens that collect attention whatever the query asks for.",
    "retrieval": "Heads that fetch a fact from far back, with the effect of switching them off.",
    "heads": "Previous-token, duplicate, induction and other known kinds of heads, with nulls.",
    "rhythm": "How far back heads look, and which tokens later ones come back to, along the text.",
    "circuit": "Which connections carry a behaviour, how much of it, and how methods differ.",
    "features": "What the features of a sparse autoencoder stand for, and the heads that write them.",
    "attribution": "How features lead from a prompt to the next token.",
    "vision": "Where the patches of an image look.",
    "state": "Effective attention of linear, delta-rule and state-space layers, with its decay.",
    "variants": "The same input through any two of the attention mechanisms of the catalogue.",
    "jobs": "Many cells at once: define a grid, watch it, repeat what failed, compare.",
    "results": "What was saved by commands and by the demo.",
    "report": "One HTML file with figures, numbers and where they come from.",
}


def titles() -> dict[str, tuple[str, str]]:
    """Title and icon of every page, in the menu's order."""
    return {name: (title, icon) for members in PAGES.values() for name, title, icon in members}
