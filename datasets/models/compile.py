"""Hand-compiled models: transformers whose every weight is written down, so that their circuits are known exactly.

``python -m workbench.datasets.models.compile`` writes the bundled ones, or those that are named. The residual stream is a
direct sum of blocks, one per variable (token, position, previous token, output, scratch); a head is a bilinear query-key form
between blocks and a copy from one block to another; an MLP is a table of thresholds. Attention is ``hard`` (weights are 0 or 1
up to 1e-8, gradients vanish) or ``soft``. ``rotate`` multiplies the residual stream by a random orthogonal matrix, absorbed in
all weights, so that no analysis can read the blocks off the axes. Decoy heads attend to something and write into the scratch
block, which nothing reads: their effect is exactly zero.

Each model is a ``Plan`` in a module of ``datasets/models/compiled``; ``assemble`` makes the weights.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from workbench.circuits import Circuit
from workbench.datasets.catalogue import task
from workbench.datasets.models.compiled.assemble import assemble
from workbench.datasets.models.compiled.backup import backup
from workbench.datasets.models.compiled.effects import edge_effects
from workbench.datasets.models.compiled.greater_than import greater_than
from workbench.datasets.models.compiled.induction import induction
from workbench.datasets.models.compiled.ioi import ioi
from workbench.datasets.models.compiled.needle import needle
from workbench.datasets.models.compiled.parts import Plan
from workbench.datasets.models.compiled.tracr import dyck, frac_prevs, histogram, reverse, sort
from workbench.datasets.models.compiled.two_task import two_task
from workbench.errors import UnknownName
from workbench.models.native import NativeModel

HERE = Path(__file__).resolve().parent
COMPILERS: dict[str, Callable[..., Plan]] = {
    "compiled-induction": induction,
    "compiled-needle": needle,
    "compiled-two-task": two_task,
    "compiled-ioi": ioi,
    "compiled-greater-than": greater_than,
    "compiled-backup": backup,
    "compiled-reverse": reverse,
    "compiled-sort": sort,
    "compiled-histogram": histogram,
    "compiled-frac-prevs": frac_prevs,
    "compiled-dyck": dyck,
}


def plan(name: str, attention: str = "hard", **options: Any) -> Plan:
    """The plan of a compiled model; ``options`` are those of its function in ``COMPILERS``."""
    if name not in COMPILERS:
        raise UnknownName("compiled model", name, COMPILERS)
    return COMPILERS[name](attention, **options)


def compiled(
    name: str,
    attention: str = "hard",
    *,
    rotate: int | None = None,
    norm: str = "none",
    kv_heads: int | None = None,
    **options: Any,
) -> NativeModel:
    """A hand-compiled model by name, built in memory; ``.ground_truth`` is its circuit.

    ``rotate``, ``norm`` and ``kv_heads`` change the weights and not the function, see ``assemble``. ``options`` are those of the
    model's own function in ``COMPILERS``.
    """
    return assemble(plan(name, attention, **options), rotate, norm, kv_heads)


def labels(truth: Circuit, name: str, corruption: str, least: float = 0.01) -> Circuit:
    """The truth of a bundled model under another task or corruption: edges by their exact effect, as it was measured.

    Scores are the effects; kept is what reaches ``least`` times the largest. Raises ``UnknownName`` with what was measured.
    """
    column = _column(name, corruption)
    if column not in truth.columns:
        known = [c.removeprefix("effect_") for c in truth.columns if c.startswith("effect_")]
        raise UnknownName("measured effects", column.removeprefix("effect_"), known)
    effects = truth.columns[column]
    return replace(truth, scores=effects, kept=effects.abs() >= least * effects.abs().max())


def measured(model: NativeModel, made: Plan, n: int = 16) -> Circuit:
    """The truth of a model with a column ``effect_<task>_<corruption>`` of exact effects for every task that it is made for."""
    truth = model.ground_truth
    assert truth is not None
    columns = dict(truth.columns)
    for name, options in made.tasks:
        first = task(name, **options)
        for corruption in first.corruptions:
            chosen = task(name, **{**options, "corruption": corruption})
            pairs = chosen.build(seed=0, tokenizer=model.tokenizer, n=n)
            columns[_column(name, corruption)] = edge_effects(model, chosen, pairs)
    return replace(truth, columns=columns)


def _column(name: str, corruption: str) -> str:
    return f"effect_{name}_{corruption}".replace("-", "_")


def write(name: str, folder: Path) -> Path:
    """Compile ``name`` and write its folder: config, weights (float16), tokenizer, ground truth and card."""
    made = plan(name)
    model = assemble(made)
    model.save(folder, dtype=made.store)
    shutil.rmtree(folder / "ground_truth", ignore_errors=True)
    measured(model, made).save(folder / "ground_truth")
    (folder / "card.md").write_text(_card(model, made))
    return folder


def _card(model: NativeModel, made: Plan) -> str:
    truth = model.ground_truth
    assert truth is not None
    needed = truth.columns["needed"].tolist()
    rows = "\n".join(
        f"| `{name}` | {'yes' if kept else 'no'} |"
        for name, kept, used in zip(truth.names, truth.kept.tolist(), needed, strict=True)
        if used
    )
    shape, hidden = model.shape, model.net.config.mlp_width
    doc = (COMPILERS[model.name].__doc__ or "").strip()
    about = "\n".join(line.strip() for line in doc.splitlines()).replace("``", "`")
    mlp = f"MLPs of {hidden}" if hidden else "no MLP"
    return f"""# {model.name}

{about}

Compiled, not trained: {shape.layers} layers, {shape.heads} heads of {shape.head_width}, width {shape.width}, {mlp}, no norm,
learned positions up to {shape.context} tokens, hard attention. It solves `{_call(made)}` with accuracy 1.

| edge that the computation needs | its single patch has an effect |
|-|-|
{rows}

`load("{model.name}").ground_truth` keeps the edges with an effect; its column `needed` marks all of the table. An edge without
an effect carries what clean and corrupted prompts share (positions, the query), which no patching can see. All other heads
are decoys: they write into a block that nothing reads.

Made by `python -m workbench.datasets.models.compile` in a few seconds. `compiled("{model.name}", "soft")` has soft attention,
`rotate=seed` a rotated residual stream.
"""


def _call(made: Plan) -> str:
    name, options = made.tasks[0]
    given = "".join(f", {key}={value!r}" for key, value in options.items()).replace("'", '"')
    return f'task("{name}"{given})'


def main(names: list[str] | None = None) -> None:
    """Write the folders of the compiled models, all or those named."""
    for name in names or COMPILERS:
        folder = write(name, HERE / name)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder}  {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main(sys.argv[1:])
