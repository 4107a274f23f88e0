"""What the page of retrieval heads knows of needle tests: sizes to choose from, tables, what a test will take, other scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.apps.screen import place
from workbench.apps.screen.questions import Question
from workbench.errors import WorkbenchError
from workbench.results import axis

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from workbench.jobs.job import Job
    from workbench.results import SavedResult

LENGTHS = ((32, 64), (64, 128), (64, 128, 256), (128, 256, 512), (256, 512, 1024), (512, 1024, 2048), (1024, 2048, 4096),
           (4096, 8192, 16384))  # fmt: skip
PROBE = "retrieval-heads"


def depths(count: int) -> tuple[float, ...]:
    """``count`` depths, evenly from the start (0) to the end (1)."""
    return tuple(i / (count - 1) for i in range(count)) if count > 1 else (0.5,)


def recall_grid(found: SavedResult) -> pd.DataFrame:
    """``length, depth, recall, trials`` of a saved needle test: the mean recall of every cell of the grid."""
    import pandas as pd

    columns = {name: found.tensors[name].numpy() for name in ("length", "depth", "recall")}
    cells = pd.DataFrame(columns).groupby(["length", "depth"], as_index=False)
    return cells.agg(recall=("recall", "mean"), trials=("recall", "size"))


def of_score(frame: pd.DataFrame, score: str) -> pd.DataFrame:
    """One score of a table of ``wb.retrieval_heads`` as ``layer, head, value``, and its ``null, low, high`` where it has them."""
    ends = {"score": ("null", "low", "high"), "looks": ("looks_null",), "beyond": ()}[score]
    names = {score: "value", "looks_null": "null"}
    return frame[["layer", "head", score, *ends]].rename(columns=names)


def draw_spread(frame: pd.DataFrame, threshold: float = 0.1, ax: Axes | None = None) -> Axes:
    """The scores of all heads from the largest to the smallest, with their intervals, the null, and the published threshold."""
    ranked = frame.sort_values("score", ascending=False, kind="stable")
    ax = axis(ax, 5.0, 3.4)
    at = np.arange(1, len(ranked) + 1)
    ax.fill_between(at, ranked["low"], ranked["high"], alpha=0.25, linewidth=0, label="95% interval over prompts")
    ax.plot(at, ranked["score"], marker=".", label="copy score")
    ax.plot(at, ranked["null"], linestyle="--", color="0.5", label="positions outside the needle")
    ax.axhline(threshold, linestyle=":", color="C3", label=f"threshold {threshold}")
    ax.set(xlabel="heads, the largest score first", ylabel="copy score", ylim=(0, None))
    ax.legend()
    return ax


def work_of(job: Job) -> float:
    """How much a needle test computes, in tokens that are read: for models whose cost grows with the length."""
    args = job.args
    places = args["depths"] if isinstance(args["depths"], int) else len(args["depths"])
    return float(sum(args["lengths"]) * places * args["trials"])


def seconds(wanted: Job) -> float | None:
    """What a needle test will take, from those of this model that ran before; None before the first.

    The time of the one with the nearest amount of work, by the ratio of the work and of the longest length: an upper bound, as
    only the attention grows with the square."""
    cells, known = place.cells(), []
    for key in cells.keys():  # noqa: SIM118
        try:
            one = cells.job(key)
            if one.probe == wanted.probe and one.model == wanted.model and "lengths" in one.args:
                known.append((work_of(one), max(one.args["lengths"]), float(cells.provenance(key)["seconds"])))
        except (OSError, KeyError, WorkbenchError):
            continue  # being written, or damaged
    if not known:
        return None
    work, longest = work_of(wanted), max(wanted.args["lengths"])
    done, length, took = min(known, key=lambda one: abs(one[0] - work))
    return took * work / done * max(1.0, longest / length)


def fitting(context: int | None, trained: Sequence[tuple[int, ...]] = LENGTHS) -> list[str]:
    """The choices of lengths that a model accepts, as they stand in the address: ``64-128-256``."""
    kept = [lengths for lengths in trained if context is None or max(lengths) <= context]
    return ["-".join(map(str, lengths)) for lengths in kept or trained[:1]]


_NEEDLES: Mapping[str, Any] = {"name": "needle", "length": 96, "corruption": "filler", "split": "test"}
_PAIRS = "pairs = wb.task('needle', length=96, corruption='filler', split='test').build(0, model.tokenizer, 6)\n"
_WORK = "workbench.apps.work_retrieval"

SCORES = {
    "Writes the answer": Question(
        "What a head adds to the logit of the answer out of the needle, minus what it adds out of as many other tokens: the "
        "direct path to the output.",
        "contributions",
        {"examples": 6},
        f"{_PAIRS}found = wb.contributions(model, pairs)",
        heads={
            "contribution": "logits beyond chance",
            "attention": "weight beyond chance",
            "total": "logits of all keys",
        },
        chance="windows as long elsewhere",
        task=_NEEDLES,
    ),
    "Brings the answer back": Question(
        "A prompt without the needle is run with one head's output from the prompt with it: the part of the lost log "
        "probability that comes back.",
        "recovery",
        {"examples": 6},
        f"{_PAIRS}found = wb.recovery(model, pairs)",
        heads={"share": "part of what was lost", "log_probability": "nats", "logit": "logits"},
        chance="a random head of the layer",
        task=_NEEDLES,
    ),
    "Finds the document": Question(
        "Query heads (QRHead): attention from the question to the sentence that holds the answer, minus that of a question that "
        "asks nothing; and how well a head ranks the sentences.",
        f"{_WORK}:document_heads",
        {},
        f"from {_WORK} import document_heads\nfound = document_heads(model)",
        heads={"score": "attention to the right sentence", "ndcg": "NDCG at 10"},
        chance="other sentences; a random ranking",
    ),
    "Right one of several needles": Question(
        "Several facts in one context, asked for in turn: the part of a head's looks at any needle that go to the one asked for.",
        "needle-choice",
        {"lengths": 96, "depths": [0.2, 0.8], "trials": 2},
        "found = wb.needle_choice(model, 96, (0.2, 0.8), trials=2)",
        heads={
            "right": "part of its looks at needles",
            "asked": "looks at the one asked for",
            "others": "looks at the others",
        },
        chance="1 / needles, a head that ignores the question",
    ),
    "Looks before it answers": Question(
        "HeadKV: the largest attention to the needle from the last 8 tokens of the prompt, before anything is written.",
        f"{_WORK}:early_heads",
        {"examples": 6},
        f"from {_WORK} import early_heads\n{_PAIRS}found = early_heads(model, pairs)",
        heads={"importance": "attention to the needle"},
        chance="stretches as long elsewhere",
        task=_NEEDLES,
    ),
    "Echo and induction (Razor)": Question(
        "RazorAttention: on random tokens that repeat, the attention to the same token one period back (echo) and to the token "
        "behind it (induction). The strongest heads keep a whole cache.",
        f"{_WORK}:echo_heads",
        {},
        f"from {_WORK} import echo_heads\nfound = echo_heads(model)",
        heads={
            "echo": "attention one period back",
            "induction": "attention behind the last copy",
            "kept": "1 where it keeps all",
        },
        chance="the same places where nothing repeats",
    ),
    "Needs the whole context (Duo)": Question(
        "DuoAttention: every key-value head gets a gate between all of the context and the first and last tokens only; what a "
        "short training leaves open needs the whole context.",
        f"{_WORK}:streaming_gates",
        {"examples": 4},
        f"from {_WORK} import streaming_gates\n{_PAIRS}found = streaming_gates(model, pairs[:4])",
        heads={"gate": "1: all of the context"},
        task=_NEEDLES,
    ),
    "Retrieval or induction": Question(
        "Both light up where text repeats. Copies count as retrieval only where following a repeat of the current token would "
        "not lead to them.",
        f"{_WORK}:induction_or_retrieval",
        {},
        f"from {_WORK} import induction_or_retrieval\nfound = induction_or_retrieval(model)",
        heads={"retrieval": "part of the needle copied", "induction": "attention behind earlier copies"},
        chance="random positions; keys of other words",
    ),
}
"""Other published scores of retrieval heads, with sizes that take some seconds on the bundled models."""
