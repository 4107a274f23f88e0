"""What sinks do, and what a model loses without them: the interventions of the page of sinks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from workbench.apps.screen.charts import draw_bars, draw_curve
from workbench.apps.screen.questions import Question
from workbench.apps.work_sinks import stories

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_TEXTS, _WORDS, _WINDOW, _COUNTS = 4, 80, 24, (1, 2, 4, 8, 16)
_GIVEN = {"text": stories(_TEXTS, _WORDS)}
_STORIES = (
    f"from workbench.datasets.corpus import filler_text\ntexts = [filler_text(i, {_WORDS}) for i in range({_TEXTS})]\n"
)


def _evicted(frame: pd.DataFrame) -> Axes:
    named = frame.rename(columns={"low": "loss_low", "high": "loss_high"})
    return draw_curve(
        named, "sinks", {"loss": "first tokens kept", "null": "other early tokens kept"}, base="base",
        labels=(f"tokens kept, of a window of {_WINDOW}", "loss, nats"), level="everything kept",
    )  # fmt: skip


def _removed(frame: pd.DataFrame) -> Axes:
    parts = {
        "nothing taken away": "lifetime",
        "its writer": "lifetime_removed",
        "other layers": "lifetime_other_layer",
        "other tokens": "lifetime_other_token",
    }
    tokens = frame["token"] if "token" in frame else frame["position"]  # a model without a tokenizer has only places
    names = [f"{token}, text {text}" for token, text in zip(tokens, frame["sequence"], strict=True)]
    return draw_bars(names, {label: frame[column] for label, column in parts.items()}, unit="block outputs as a sink")


def _massive(frame: pd.DataFrame) -> Axes:
    rows = frame[frame["intervention"] != "none"]
    ends = {"change": (rows["change_low"].tolist(), rows["change_high"].tolist())}
    return draw_bars(
        rows["intervention"].tolist(), {"change": rows["change"]}, unit="change of the loss, nats", ends=ends
    )


CAUSES = {
    "Hide the first tokens": Question(
        f"A query sees the last tokens of a window of {_WINDOW} and none, one, two or four of the first of the text. If the "
        "model leans on its sink, the loss is high where no first token is kept and other early tokens do not help.",
        "eviction",
        {**_GIVEN, "window": _WINDOW, "random": 2},
        f"{_STORIES}found = wb.eviction(model, texts, window={_WINDOW}, random=2)",
        draw=_evicted,
    ),
    "Switch off heads that sink": Question(
        "Heads are set to zero, those with the most attention on the first token first. If they only rest there, the loss stays "
        "while as many random heads of the same layers raise it.",
        "zeroable",
        {**_GIVEN, "score": "first_token", "counts": list(_COUNTS), "random": 2},
        f"{_STORIES}found = wb.zeroable(model, texts, score='first_token', counts={_COUNTS}, random=2)",
        draw=partial(
            draw_curve, x="removed", lines={"ranked": "heads that sink first", "random": "random heads"}, base="base",
            labels=("heads set to zero", "loss, nats"),
        ),
    ),
    "Is there anything to read?": Question(
        "Value drain: the length of the sink's value over the mean length (r_v), and of its residual stream (r_x). A head that "
        "gives most of its attention to a value of nearly no length is dormant: it rests there.",
        "workbench.apps.work_sinks:drain",
        {},
        "from workbench.apps.work_sinks import drain\nfound = drain(model)",
        heads={
            "r_v": "length of the sink's value over the mean",
            "sink_mass": "attention to the sink",
            "r_x": "length of its stream over the mean",
            "dormant": "1 where the head is dormant",
        },
        chance="other tokens; even attention for the mass",
    ),
    "Take away what writes it": Question(
        "The output of the layer that writes the sink's direction is taken away at that one token: how many block outputs does "
        "it stay a sink for? Beside it other layers at this token, and the same layer at other tokens.",
        "sink-removal",
        {**_GIVEN, "random": 2},
        f"{_STORIES}found = wb.sink_removal(model, texts, random=2)",
        draw=_removed,
    ),
    "Massive activations": Question(
        "The largest numbers of the residual stream (over 20 times the layer's median) are set to zero, or to their mean: a "
        "model that needs them as constants loses nothing with the mean. Beside it as many random numbers.",
        "massive-effect",
        {**_GIVEN, "ratio": 20, "least": 1, "random": 2},
        f"{_STORIES}found = wb.massive_effect(model, texts, ratio=20, least=1, random=2)",
        draw=_massive,
    ),
}  # fmt: skip
"""Each with sizes that take some seconds on the bundled models."""
