"""The scores of the page of known heads, each in a sentence, and what a role is measured by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from workbench.apps.screen.charts import draw_bars
from workbench.apps.screen.questions import Question

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_WORK = "workbench.apps.work_heads"
_PAIRS = 20

LOOKS = {
    "induction": "weight on what followed earlier copies",
    "previous": "weight on the token before",
    "duplicate": "weight on earlier copies of the token",
    "first": "weight on the first token",
    "current": "weight on the token itself",
}


def _reads(frame: pd.DataFrame) -> Axes:
    best = strongest_pairs(frame)
    names = [
        f"{one.writer_layer}.{one.writer_head}→{one.reader_layer}.{one.reader_head} {one.channel}"
        for one in best.itertuples()
    ]
    ax = draw_bars(names, {"composition": best["value"], "random matrices": best["null"]}, unit="part that is read")
    ax.tick_params(axis="x", rotation=75)
    return ax


def strongest_pairs(frame: pd.DataFrame, count: int = _PAIRS) -> pd.DataFrame:
    """The pairs of heads furthest above their null, of a table of ``wb.composition``."""
    return frame.sort_values("z", ascending=False, kind="stable").head(count)


SCORES = {
    "Where it looks": Question(
        "Mean weight on the keys that a condition names, on random words that are repeated after a random period. An induction "
        "head looks behind the last copy of its token.",
        f"{_WORK}:looks",
        {},
        f"from {_WORK} import looks\nfound = looks(model)",
        heads=LOOKS,
        chance="the same keys where nothing repeats",
        frame="found",
    ),
    "Position or content": Question(
        "The part of a head's pattern that is the same whatever the tokens are: 1 for a head that looks at a place, 0 for one "
        "that follows what stands there.",
        f"{_WORK}:positions",
        {},
        f"from {_WORK} import positions\nfound = positions(model)",
        heads={"positional": "part that position explains", "content": "the rest"},
        chance="rows shuffled",
    ),
    "Follows a moved token": Question(
        "All tokens but the last are put in another order: does the weight go with the token, or stay with its place?",
        "moved-tokens",
        {"sequences": 8},
        "found = wb.moved_tokens(model, sequences=8)",
        heads={"follows": "part that goes with the token", "stays": "part that stays with the place"},
        chance="another order",
    ),
    "Holds a copy back": Question(
        "Copy suppression: where the model already predicts a token of the text, does the head look at it and lower its logit? "
        "Effect is what replacing the head by its mean adds to the log probability.",
        "copy-suppression",
        {"sequences": 4},
        "found = wb.copy_suppression(model, sequences=4)",
        heads={"attention": "weight on the predicted token", "own_logit": "logits added to it", "effect": "nats"},
        chance="another token of the text",
    ),
    "By its weights alone": Question(
        "Without running the model: would the head raise what it looks at (copying above 0) or lower it, and does it look for "
        "its own token (matching)?",
        "weight-circuits",
        {},
        "found = wb.weight_circuits(model)",
        heads={
            "copying": "eigenvalue share of OV",
            "matching": "eigenvalue share of QK",
            "copied": "part of the tokens that it copies",
            "suppressed": "part of the tokens that it suppresses",
        },
        chance="identities of the tokens shuffled",
    ),
    "Kinds of tokens": Question(
        "Mean weight on delimiters, digits, special tokens and copies, on made-up stories, over the queries that see one.",
        f"{_WORK}:classes",
        {},
        f"from {_WORK} import classes\nfound = classes(model)",
        heads={
            "delimiter": "weight on delimiters",
            "capitalised": "weight on capitalised words",
            "digit": "weight on digits",
            "special": "weight on special tokens",
            "same": "weight on earlier copies",
        },
        chance="classes shuffled over the text",
    ),
    "Which head reads which": Question(
        "How much of what an earlier head writes a later one reads into its queries, keys or values, by the weights: the "
        f"{_PAIRS} pairs furthest above random matrices.",
        "composition",
        {},
        "found = wb.composition(model)",
        draw=_reads,
    ),
}

ROLE_SCORE: Mapping[str, str] = {
    "content": "positional",
    "suppressing": "copying",
    "copy-suppression": "own_logit",
    "unclassified": "previous",
}
"""The score that a role is judged by, where it is not the role's own name."""


def role_table(frame: pd.DataFrame, role: str) -> pd.DataFrame:
    """``layer, head, value, null, roles, has it`` of a table of ``wb.head_roles``: the score that ``role`` is judged by."""
    score = ROLE_SCORE.get(role, role)
    found = frame[["layer", "head", score, f"{score}_null", "roles"]].rename(
        columns={score: "value", f"{score}_null": "null"}
    )
    return found.assign(**{"has it": [role in text.split(", ") for text in frame["roles"]]})


def role_counts(frame: pd.DataFrame) -> pd.DataFrame:
    """``role, heads, which``: how many heads have each role, and which, the role of most heads first."""
    import pandas as pd

    names: dict[str, list[str]] = {}
    for layer, head, text in zip(frame["layer"], frame["head"], frame["roles"], strict=True):
        for role in text.split(", "):
            names.setdefault(role, []).append(f"{layer}.{head}")
    rows = [{"role": role, "heads": len(heads), "which": " ".join(heads)} for role, heads in names.items()]
    return pd.DataFrame(rows, columns=["role", "heads", "which"]).sort_values("heads", ascending=False, kind="stable")
