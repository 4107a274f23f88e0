"""Training of a cross-layer transcoder on a model: what its MLPs read and write, streamed and mixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.coders.cross_layer import CrossLayer
from workbench.coders.cross_layer_estimator import ROWS
from workbench.coders.cross_layer_kinds import make_cross_layer
from workbench.coders.cross_layer_learner import CrossLayerLearner
from workbench.coders.mixing import Mixed
from workbench.coders.sites import SiteReader
from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model
from workbench.sites import Site


def train_cross_layer(
    model: Model,
    texts: Any,
    *,
    features: int,
    kind: str = "batchtopk",
    layers: Sequence[int] | None = None,
    reads: str = "mlp_norm",
    steps: int = 1000,
    batch: int = 1024,
    block: int = 2**15,
    context: int | None = None,
    rate: float = 2e-3,
    skip: bool = False,
    dead_after: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> CrossLayer:
    """A cross-layer transcoder of ``features`` per layer for the MLPs of ``layers`` (all), of ``kind`` with its ``options``.

    It reads site kind ``reads`` (``mlp_norm``, the normed input, or ``resid_mid``, the stream before the norm) and writes
    ``mlp_out``. ``texts``: a list of texts, token ids, or an iterable of them. Rows are shuffled in blocks of ``block``; memory
    is one block of 2 L vectors per token, the coder and three times its size. A feature is dead after ``dead_after`` silent rows,
    by default a twentieth of all. ``about["recipe"]["fvu"]`` is the error of the last twentieth of the steps over the variance.
    """
    for name, number in (("steps", steps), ("batch", batch)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise WorkbenchError(f"{name} is a whole number from 1; got {number!r}")
    chosen = list(range(model.shape.layers)) if layers is None else list(layers)
    if not chosen or sorted(set(chosen)) != chosen:
        raise WorkbenchError(f"layers are different numbers in ascending order; got {chosen}")
    sources, targets = ([str(Site(kind_, layer)) for layer in chosen] for kind_ in (reads, "mlp_out"))
    given = {"k": 32, **options} if kind in ("topk", "batchtopk") else options
    width = model.shape.width
    coder = make_cross_layer(kind, len(chosen), width, features, skip=skip, seed=seed, **given)
    reader = SiteReader(model, [*sources, *targets], texts, context=context)
    batches = Mixed(reader, batch, block=block, seed=seed)
    silence = dead_after if dead_after is not None else max(1, steps * batch // 20)
    learner = CrossLayerLearner(coder, steps=steps, rate=rate, dead_after=silence)
    first = batches.peek(ROWS)
    learner.start(_stacked(first, sources), _stacked(first, targets))
    for step in range(steps):
        rows = next(batches, None)
        if rows is None:
            raise Refused(
                f"the texts ended after {step} of {steps} steps; give a list, which is read again, or fewer steps"
            )
        learner.step(_stacked(rows, sources), _stacked(rows, targets))
        if progress is not None:
            progress(step + 1, steps)
    coder = learner.finish(_stacked(first, sources))
    last = learner.losses[-max(1, steps // 20) :]
    coder.about = {
        "model": model.name, "revision": str(getattr(model, "revision", "")), "reads": sources, "writes": targets,
        "context": reader.context, "prepend_bos": reader.prepend_bos,
        "recipe": {
            "steps": steps, "batch": batch, "rate": rate, "seed": seed, "fvu": sum(last) / len(last),
            "dead": int((learner.silent >= silence).sum()),
        },
    }  # fmt: skip
    return coder


def _stacked(rows: dict[str, Tensor], sites: list[str]) -> Tensor:
    """``[N, L, D]``."""
    return torch.stack([rows[site] for site in sites], 1)
