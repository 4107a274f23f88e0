"""What the circuit page has computed beside the circuit: tasks that go with a model, faithfulness, parts taken away; and two
circuits part by part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from workbench.apps.components.graph import COMPARED
from workbench.circuits import Circuit
from workbench.errors import UnknownName, WorkbenchError
from workbench.results import Result, SavedResult, axis

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.axes import Axes

    from workbench.models.protocol import Model
    from workbench.pairs import Pairs, Task
    from workbench.probes.circuits.components import Metric
    from workbench.probes.circuits.judgement.faithfulness import FaithfulnessResult

_TRIED = 16
GROUPS = (*COMPARED, "in neither")


def known_circuit(model: str) -> Circuit | None:
    """The circuit that a model on disk is known to have, None where none is known; no weights are read."""
    from workbench.jobs.revisions import model_folder

    folder = model_folder(model)
    at = None if folder is None else folder / "ground_truth"
    return Circuit.load(at) if at is not None and at.is_dir() else None


def task_of(truth: Circuit | None) -> dict[str, Any] | None:
    """The task that a known circuit is about, as a job names it: ``name`` and options; None where it does not say."""
    if truth is None or "task" not in truth.provenance:
        return None
    return {"name": truth.provenance["task"], **truth.provenance.get("options", {})}


def fitting_tasks(model: Model) -> pd.DataFrame:
    """Tasks whose prompts the model can read, those that it answers best first: ``task``, ``accuracy`` on 16 examples of seed 0
    (0 to 1), ``tokens`` of the longest prompt."""
    import pandas as pd

    import workbench as wb

    rows = []
    for name in wb.tasks() if model.tokenizer is not None else ():
        task = wb.task(name)
        try:
            pairs = task.build(seed=0, tokenizer=model.tokenizer, n=_TRIED)
            long = int(pairs.clean.shape[1])
            if model.shape.context is not None and long > model.shape.context:
                continue
            rows.append({"task": name, "accuracy": _accuracy(model, pairs), "tokens": long})
        except WorkbenchError:
            continue  # words of the task are no single tokens of the model: that is what is asked here
    table = pd.DataFrame(rows, columns=["task", "accuracy", "tokens"])
    return table.sort_values("accuracy", ascending=False, kind="stable").reset_index(drop=True)


def _accuracy(model: Model, pairs: Pairs) -> float:
    import torch

    import workbench as wb

    with torch.no_grad():
        logits = model.run(pairs.clean).logits
    return math.nan if logits is None else float(wb.accuracy(logits, pairs).double().mean())


def judged(
    model: Model, task: Task, pairs: Pairs, circuit: str, controls: int = 5, seed: int = 0
) -> FaithfulnessResult:
    """Faithfulness of the circuit saved in the folder ``circuit``, on ``pairs`` and with the ablation that found it."""
    import workbench as wb

    found = Circuit.load(circuit)
    ablation = found.provenance.get("ablation", "counterfactual")
    return wb.faithfulness(
        model, found, pairs, ablation=ablation, metric=task.metric, controls=controls, seed=seed
    )  # fmt: skip


def faithfulness_of(saved: SavedResult) -> FaithfulnessResult:
    """What ``judged`` gave, read back from a store."""
    from workbench.probes.circuits.judgement.faithfulness import FaithfulnessResult

    if saved.type != FaithfulnessResult.__name__:
        raise WorkbenchError(f"a {saved.type} is no faithfulness; compute it again")
    given: dict[str, Any] = {}
    for field in fields(FaithfulnessResult):
        value = saved.labels[field.name]
        if isinstance(value, dict) and set(value) == {"tensor"}:
            value = saved.tensors[value["tensor"]]
        given[field.name] = math.nan if value is None else value
    return FaithfulnessResult(**given)


def taken_away(
    model: Model,
    circuit: Circuit,
    pairs: Pairs,
    parts: Sequence[str],
    *,
    keep: bool = False,
    ablation: str = "counterfactual",
    metric: Metric | None = None,
) -> pd.DataFrame:
    """The model with ``parts`` of a circuit replaced, or with all but them if ``keep``: rows ``whole model``, ``after``,
    ``nothing left``, with the mean ``metric``, ``accuracy`` (0 to 1) and ``replaced``, how many parts are.

    ``parts`` are names of the circuit; in a circuit of edges the name of a node means all edges out of it. Raises ``UnknownName``
    for others."""
    import pandas as pd
    import torch

    from workbench.probes.circuits.judgement.kept import Kept, correct

    kept = Kept.of(model, circuit, pairs, metric, ablation)
    chosen = torch.tensor(chosen_parts(circuit, parts))
    sets = [torch.ones_like(chosen), chosen if keep else ~chosen, torch.zeros_like(chosen)]
    means = kept.measure(sets, [kept.metric, correct]).mean(-1)
    return pd.DataFrame(
        {
            "model": ["whole model", "after", "nothing left"],
            "metric": means[:, 0].numpy(),
            "accuracy": means[:, 1].numpy(),
            "replaced": [int((~each).sum()) for each in sets],
        }
    )


def taken_away_again(
    model: Model, task: Task, pairs: Pairs, circuit: str, parts: list[str], keep: bool = False
) -> pd.DataFrame:
    """``taken_away`` for the circuit saved in the folder ``circuit``, with the ablation that found it."""
    found = Circuit.load(circuit)
    ablation = found.provenance.get("ablation", "counterfactual")
    return taken_away(model, found, pairs, parts, keep=keep, ablation=ablation, metric=task.metric)


def chosen_parts(circuit: Circuit, parts: Sequence[str]) -> list[bool]:
    """Which of the circuit's names ``parts`` mean; the name of a node means all edges out of it in a circuit of edges."""
    from workbench.circuits import edge_parts

    wanted = set(parts)
    sources = [edge_parts(name)[0] for name in circuit.names] if circuit.level == "edge" else list(circuit.names)
    for part in parts:
        if part not in circuit.names and part not in sources:
            known = list(dict.fromkeys(sources))
            raise UnknownName(f"{circuit.level} or node of the circuit", part, known)
    return [name in wanted or source in wanted for name, source in zip(circuit.names, sources, strict=True)]


@dataclass(frozen=True)
class Beside(Result):
    """Two circuits part by part: ``first`` and ``second`` ``[N]`` are scores in units of their methods, NaN where a circuit does
    not score the part; ``group`` ``[N]`` indexes ``GROUPS``. ``labels`` name the circuits."""

    names: tuple[str, ...]
    first: torch.Tensor
    second: torch.Tensor
    group: torch.Tensor
    labels: tuple[str, str]

    def frame(self) -> pd.DataFrame:
        """One row per part: ``part``, a score per circuit (named by the circuit), ``kept``."""
        import pandas as pd

        one, two = self.labels if self.labels[0] != self.labels[1] else ("first", "second")
        return pd.DataFrame(
            {
                "part": list(self.names),
                one: self.first.numpy(),
                two: self.second.numpy(),
                "kept": [GROUPS[i] for i in self.group.tolist()],
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The scores of one against those of the other; marks tell by colour and shape who keeps a part."""
        ax = axis(ax, 5.2, 4.4)
        looks = (("#1f6f8b", "s"), ("#c1502e", "^"), ("#7a3fa0", "D"), ("#8a8f98", "."))
        for group in reversed(range(len(GROUPS))):
            here = self.group == group
            colour, mark = looks[group]
            label = f"{GROUPS[group]} ({int(here.sum()):,})"
            ax.scatter(
                self.first[here].numpy(), self.second[here].numpy(), s=26, color=colour, marker=mark, label=label
            )
        for line in (ax.axhline, ax.axvline):
            line(0.0, color="grey", linewidth=0.5)
        ax.set(xlabel=f"score of {self.labels[0]}", ylabel=f"score of {self.labels[1]}")
        ax.legend(fontsize="small")
        return ax


def beside(first: Circuit, second: Circuit) -> Beside:
    """Two circuits of one level, over all positions; the labels are their methods."""
    import torch

    if first.level != second.level:
        raise WorkbenchError(f"a circuit of {first.level}s and one of {second.level}s have no parts in common")
    one, two = first.over_positions(), second.over_positions()
    names = tuple(dict.fromkeys((*one.names, *two.names)))
    scores, kept = [], []
    for circuit in (one, two):
        known = dict(zip(circuit.names, zip(circuit.scores.tolist(), circuit.kept.tolist(), strict=True), strict=True))
        pairs = [known.get(name, (math.nan, False)) for name in names]
        scores.append(torch.tensor([score for score, _ in pairs], dtype=torch.float64))
        kept.append([keep for _, keep in pairs])
    group = [2 if a and b else 0 if a else 1 if b else 3 for a, b in zip(*kept, strict=True)]
    labels = tuple(
        str(circuit.provenance.get("method", what)) for circuit, what in ((first, "first"), (second, "second"))
    )
    return Beside(names, scores[0], scores[1], torch.tensor(group), (labels[0], labels[1]))


def sizes(parts: int) -> list[int]:
    """Numbers of parts to choose from: all of 1 to 6, then steps of about a quarter, up to all."""
    found = list(range(1, min(parts, 6) + 1))
    while found[-1] < parts:
        found.append(min(parts, round(found[-1] * 1.25)))
    return found


def fitting_models(names: Sequence[str]) -> list[str]:
    """Models with a tokenizer: tasks are texts."""
    from workbench.jobs.revisions import model_folder

    found = []
    for name in names:
        folder = model_folder(name)
        if folder is None or any((folder / file).is_file() for file in _TOKENIZERS):
            found.append(name)
    return found


_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
