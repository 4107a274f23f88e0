"""What the circuit page asks for: the job of a circuit, and the code that finds, judges and cuts the same circuit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from workbench.apps.screen.need import job

if TYPE_CHECKING:
    from workbench.circuits import Circuit
    from workbench.jobs.job import Job

_HEADS = re.compile(r"a(\d+)\.([hg])(\d+)")
OWN = 0
"""Instead of a number of parts: those that the method keeps by itself."""
CONTROLS = 5


@dataclass(frozen=True)
class Asked:
    """How a circuit is found. ``task`` is a name, or a mapping with ``name`` and options."""

    model: str
    task: str | Mapping[str, Any]
    method: str
    level: str
    ablation: str
    examples: int
    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def job(self) -> Job:
        """The cell that holds the circuit; raises ``WorkbenchError`` for what the method cannot do."""
        return job(
            "find_circuit", self.model, self.task, seed=self.seed, method=self.method, level=self.level, ablation=self.ablation,
            examples=self.examples, options=dict(self.options) or None,
        )  # fmt: skip

    def by(self, method: str) -> Asked:
        """The same by another method, with its default options."""
        return replace(self, method=method, options={})

    @property
    def title(self) -> str:
        return f"{self.model}, {self.task if isinstance(self.task, str) else self.task['name']}, {self.method}"

    def judging(self, probe: str, folder: str, **args: Any) -> Job:
        """A cell that looks at the circuit in ``folder`` on examples it was not found on."""
        return job(
            f"workbench.apps.work_circuit:{probe}", self.model, self.task, seed=self.seed + 1, circuit=folder,
            examples=self.examples, **args,
        )  # fmt: skip

    def python(self, keep: int, name: str = "circuit") -> str:
        """Code that finds the circuit and calls it ``name``; ``keep`` is a number of parts or ``OWN``."""
        import workbench as wb

        given = {} if isinstance(self.task, str) else {k: v for k, v in self.task.items() if k != "name"}
        task = self.task if isinstance(self.task, str) else self.task["name"]
        method = wb.methods()[self.method]
        options = ({"seed": self.seed} if "seed" in method.options else {}) | dict(self.options)
        said = "".join(f", {key}={value!r}" for key, value in options.items())
        top = f".top({keep})" if keep != OWN else ""
        source = "task.contrast()" if method.contrast else "task"
        return (
            f"import workbench as wb\n\nmodel = wb.load({self.model!r})\n"
            f"task = wb.task({', '.join([repr(task), *(f'{key}={value!r}' for key, value in given.items())])})\n"
            f"pairs = {source}.build(seed={self.seed}, tokenizer=model.tokenizer, n={self.examples})\n"
            f"{name} = wb.find_circuit(\n    model, pairs, {self.method!r}, {self.level!r}, {self.ablation!r}, "
            f"metric=task.metric{said}\n){top}\n"
        )

    @property
    def held_out(self) -> str:
        """Code that builds the examples on which the circuit is judged."""
        return f"held_out = task.build(seed={self.seed + 1}, tokenizer=model.tokenizer, n={self.examples})\n"

    def judged_python(self) -> str:
        return (
            self.python(OWN) + self.held_out + "curve = wb.faithfulness(\n    model, circuit, held_out, "
            f"ablation={self.ablation!r}, metric=task.metric, controls={CONTROLS}, seed={self.seed + 1}\n)\n"
            "curve.plot()\ncurve.frame()\n"
        )

    def taken_python(self, keep: int, parts: Sequence[str], only: bool, whole: bool) -> str:
        """Code for parts taken away; ``whole`` says that they are the circuit's kept parts."""
        kept = "[name for name, stays in zip(circuit.names, circuit.kept.tolist()) if stays]"
        said = kept if whole else repr(list(parts))
        return (
            self.python(keep if whole else OWN)
            + self.held_out
            + "from workbench.apps.work_circuit import taken_away\n\n"
            + f"parts = {said}\ntable = taken_away(\n    model, circuit, held_out, parts, keep={only}, "
            f"ablation={self.ablation!r}, metric=task.metric\n)\nprint(table)\n"
        )

    def beside_python(self, other: str, keep: int, keep_other: int) -> str:
        return (
            self.python(keep, "first")
            + self.by(other).python(keep_other, "second").replace("import workbench as wb\n\n", "")
            + "from workbench.apps.work_circuit import beside\n\nboth = beside(first, second)\n"
            "print(wb.compare_circuits(first, second).frame())\nboth.plot()\nboth.frame()\n"
        )


def reduced(circuit: Circuit, keep: int) -> Circuit:
    """The ``keep`` parts with the largest absolute scores, all of them if there are fewer; the method's own set for ``OWN``."""
    return circuit if keep == OWN else circuit.top(min(keep, len(circuit.names)))


def options_of(text: str) -> dict[str, Any]:
    """Options of a method written as ``steps=10 rule=left``."""
    from workbench.apps.inputs import assignments

    found: dict[str, Any] = assignments(text.split(), "options of the method")
    return found


def head_of(part: str, circuit: Circuit) -> tuple[int, int] | None:
    """(layer, head) whose map tells about a part: the head that an edge leads into, else the one that it comes from; None where
    neither end is a head. For a key-value head, the first head that reads it."""
    known = {found for name in circuit.names for found in _HEADS.findall(name)}
    heads, shared = (1 + max((int(i) for _, kind, i in known if kind == what), default=-1) for what in ("h", "g"))
    source, _, target = part.partition("->")
    for end in (target, source):
        if match := _HEADS.match(end):
            layer, kind, index = match.groups()
            return int(layer), int(index) * (heads // shared if kind == "g" else 1)
    return None
