"""Which heads does a published score file name?

Score files of retrieval heads are JSON: ``{"layer-head": [score of every trial]}``. Read here with every entry checked, and
counted as the published tables count: heads at or above 0.1, and heads at exactly 0.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.probes.bootstrap import interval, resampled_means
from workbench.probes.catalogue import Analysis
from workbench.probes.tables import Head, HeadTable
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd

THRESHOLD = 0.1
_NAME = re.compile(r"^(?P<layer>(?:[A-Za-z]+\.)?\d+)-(?P<head>\d+)$")


@dataclass(frozen=True)
class HeadScoreFile(HeadTable):
    """Mean score per head with its interval over trials; ``trials[layer]`` ``[R, H]`` are the scores themselves, NaN where a
    head has fewer than R."""

    trials: Mapping[int | str, Tensor] = field(kw_only=True)
    threshold: float = THRESHOLD

    def heads(self, threshold: float | None = None) -> list[Head]:
        """Heads at or above the threshold, best first; 0 lists all that have a score."""
        bar = self.threshold if threshold is None else threshold
        return [head for head in self.top("score") if head.value >= bar]

    def counts(self) -> pd.DataFrame:
        """One row: ``heads, above, share_above, low, high, zero, share_zero, undefined, threshold``; see ``counts_of``."""
        rows = max(len(part) for part in self.trials.values())
        width = max(part.shape[1] for part in self.trials.values())
        padded = [
            torch.nn.functional.pad(part, (0, width - part.shape[1], 0, rows - len(part)), value=float("nan"))
            for part in self.trials.values()
        ]
        there = [torch.arange(width) < part.shape[1] for part in self.trials.values()]
        return counts_of(torch.stack(padded, 1), self.threshold, there=torch.stack(there))


def load_scores(path: str | Path, threshold: float = THRESHOLD, model: str | None = None) -> HeadScoreFile:
    """The scores in a file ``{"layer-head": [scores]}`` (or one number per head), checked entry by entry.

    Layers are numbers, or ``encoder.0`` in models of two stacks. A head without an entry between others, an empty list and a
    list of NaN (or ``null``) are undefined, with the reason; scores are refused if they are infinite or no numbers, and so are
    names that are no ``layer-head``, heads named twice and files without a head. Scores below 0 are read: contributions of heads
    are exchanged in this form too. ``model`` names what the scores belong to, by
    default the file.
    """
    path = Path(path)
    table = _read(path)
    found: dict[int | str, dict[int, list[float]]] = {}
    for name, values in table:
        match = _NAME.match(name) if isinstance(name, str) else None
        if match is None:
            raise WorkbenchError(f"{path}: {name!r} names no head; entries are called layer-head, as in 16-19")
        layer = int(match["layer"]) if match["layer"].isdigit() else match["layer"]
        rows = found.setdefault(layer, {})
        head = int(match["head"])
        if head in rows:
            raise WorkbenchError(f"{path}: head {name} is there twice")
        rows[head] = _scores(path, name, values)
    layers = sorted(found, key=_order)
    trials = {layer: _padded(found[layer]) for layer in layers}
    undefined = {
        f"{layer}-{head}": "its scores are NaN" if rows.get(head) else "no score in the file"
        for layer, rows in ((layer, found[layer]) for layer in layers)
        for head in range(max(rows) + 1)
        if not any(math.isfinite(score) for score in rows.get(head, ()))
    }
    bounds = {layer: interval(part) for layer, part in trials.items()}
    return HeadScoreFile(
        title="Retrieval heads",
        values={"score": {layer: part.nanmean(0) for layer, part in trials.items()}},
        units={"score": "copy score"},
        low={"score": {layer: low for layer, (low, _) in bounds.items()}},
        high={"score": {layer: high for layer, (_, high) in bounds.items()}},
        undefined=undefined,
        provenance=Provenance(model or path.stem),
        trials=trials,
        threshold=threshold,
    )


def write_scores(path: str | Path, layers: Sequence[int | str], scores: Tensor) -> Path:
    """Write scores ``[R, L, H]`` as ``{"layer-head": [scores]}``. JSON has no NaN: undefined scores are left out, so a head
    without any keeps an empty list."""
    path = Path(path)
    table = {
        f"{layer}-{head}": [float(x) for x in scores[:, i, head] if bool(x.isfinite())]
        for i, layer in enumerate(layers)
        for head in range(scores.shape[2])
    }
    try:
        path.write_text(json.dumps(table))
    except OSError as error:
        raise WorkbenchError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def counts_of(
    scores: Tensor, threshold: float = THRESHOLD, null: Tensor | None = None, *, there: Tensor | None = None
) -> pd.DataFrame:
    """Counts of heads from scores of R trials ``[R, L, H]``, one row.

    ``heads``: how many have a score; ``above`` and ``share_above``: mean score at or above the threshold, with ``low`` and
    ``high``, the 95% interval of the share over resampled trials; ``zero`` and ``share_zero``: mean score exactly 0;
    ``null_above``: share whose ``null`` ``[R, L, H]`` reaches the threshold (NaN without one); ``undefined``: heads without a
    score (of those that are ``there`` ``[L, H]``). No rows if there are no trials.
    """
    import pandas as pd

    columns = ["heads", "above", "share_above", "low", "high", "null_above", "zero", "share_zero", "undefined"]
    if not len(scores):
        return pd.DataFrame(columns=[*columns, "threshold", "trials"])
    mean = scores.nanmean(0)
    known = mean.isfinite()
    heads = max(1, int(known.sum()))
    draws = (resampled_means(scores)[:, known] >= threshold).double().mean(1)
    low, high = (float(draws.quantile(q)) for q in (0.025, 0.975)) if len(scores) > 1 else (math.nan, math.nan)
    absent = int((~known & there).sum()) if there is not None else int((~known).sum())
    row: dict[str, Any] = {
        "heads": int(known.sum()),
        "above": int((mean >= threshold).sum()),
        "share_above": float((mean >= threshold).sum()) / heads,
        "low": low,
        "high": high,
        "null_above": math.nan if null is None else float((null.nanmean(0) >= threshold).sum()) / heads,
        "zero": int((mean == 0).sum()),
        "share_zero": float((mean == 0).sum()) / heads,
        "undefined": absent,
        "threshold": threshold,
        "trials": len(scores),
    }
    return pd.DataFrame([row])


def _read(path: Path) -> list[tuple[str, Any]]:
    """The entries in their order; an object's repeated names are kept, so that they can be refused."""
    try:
        table = json.loads(path.read_text(), object_pairs_hook=lambda pairs: pairs)
    except OSError as error:
        raise WorkbenchError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise WorkbenchError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, list) or not table or not all(isinstance(pair, tuple) for pair in table):
        raise WorkbenchError(f'{path} holds no head scores; expected {{"layer-head": [scores], ...}}')
    return table


def _scores(path: Path, name: str, values: Any) -> list[float]:
    listed = values if isinstance(values, list) else [values]
    scores = []
    for value in listed:
        if value is None:
            value = math.nan
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise WorkbenchError(f"{path}: scores of head {name} are numbers; got {value!r}")
        if math.isinf(value):
            raise WorkbenchError(f"{path}: scores of head {name} are finite or NaN; got {value!r}")
        scores.append(float(value))
    return scores


def _padded(rows: Mapping[int, Sequence[float]]) -> Tensor:
    """Scores ``[R, H]`` of the heads of one layer, NaN where a head has fewer than R or none."""
    longest = max(1, *(len(scores) for scores in rows.values()))
    out = torch.full((longest, max(rows) + 1), float("nan"), dtype=torch.float64)
    for head, scores in rows.items():
        out[: len(scores), head] = torch.tensor(scores, dtype=torch.float64)
    return out


def _order(layer: int | str) -> tuple[str, int]:
    if isinstance(layer, int):
        return "", layer
    stack, number = layer.rsplit(".", 1)
    return stack, int(number)


def _example() -> dict[str, Any]:
    """A file of two layers with known counts, in a temporary folder."""
    import tempfile

    path = Path(tempfile.gettempdir()) / f"workbench-head-scores-{os.getpid()}.json"
    write_scores(path, (0, 1), torch.tensor([[[0.0, 0.2], [0.9, 0.0]], [[0.0, 0.1], [1.0, 0.1]]], dtype=torch.float64))
    return {"path": path, "model": "planted"}


ANALYSES = (
    Analysis(
        name="head-score-file",
        question="Which heads does a published score file name?",
        function=load_scores,
        example=_example,
        paper="Wu et al. 2024 (arXiv 2404.15574), head_score files of the authors' repository",
        source="tensors",
        null="none of its own: the scores are read as they were written",
        definition="a head without a defined score is undefined, not 0",
    ),
)
