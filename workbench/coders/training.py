"""One training under way: learners side by side, fed with the same rows; its metrics and its checkpoints."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.coders.checkpoints import CHECKPOINT, read_checkpoint, write_checkpoint
from workbench.coders.coder import Coder
from workbench.coders.feeds import Feed
from workbench.coders.learner import Learner
from workbench.coders.metrics import METRICS, Elsewhere, Logger, MetricsFile
from workbench.coders.specs import CoderSpec, plain
from workbench.coders.start import ROWS
from workbench.errors import Refused, WorkbenchError
from workbench.run import versions


def names_of(specs: Sequence[CoderSpec]) -> list[str]:
    """A name for every coder: the first site that it reads; numbered where there are several."""
    return [spec.reads[0] if len(specs) == 1 else f"{i}-{spec.reads[0]}" for i, spec in enumerate(specs)]


def places_of(folder: Path | None, specs: Sequence[CoderSpec]) -> list[Path]:
    """Folders of the trained coders in the folder of the training; none without one."""
    if folder is None:
        return []
    if len(specs) == 1:
        return [folder / "coder"]
    return [folder / "coders" / name.replace("/", "-").replace(":", "-") for name in names_of(specs)]


def _made_with() -> dict[str, Any]:
    """What has to be the same for the same bits."""
    return {**versions(), "threads": torch.get_num_threads()}


def _tell_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]
    if changed:
        warnings.warn(
            f"this training goes on with another setting than before, so that its last bits may differ: {', '.join(changed)}",
            stacklevel=4,
        )


class Training:
    """One training under way: learners, feed, files."""

    def __init__(
        self,
        specs: tuple[CoderSpec, ...],
        feed: Feed,
        recipe: Mapping[str, Any],
        folder: Path | None,
        steps: int,
        batch: int,
        options: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> None:
        self.specs, self.feed, self.recipe, self.folder = specs, feed, recipe, folder
        self.steps, self.batch, self.options, self.dtype = steps, batch, options, dtype
        self.names = names_of(specs)
        self.at = 0
        self.learners: list[Learner] = []
        self.file: MetricsFile | None = None
        self.loggers: list[Logger] = []
        self.widths: dict[str, int] = {}
        self.told: dict[str, Any] = {}
        """What the feed said when the checkpoint was written."""

    def begin(self, loggers: Sequence[str]) -> None:
        """Learners as they start, or as the checkpoint left them."""
        found = None if self.folder is None else read_checkpoint(self.folder / CHECKPOINT)
        if found is not None:
            _tell_changes(found[1]["made_with"], _made_with())
            self.feed.batches.restore(found[1]["data"])
            self.at, self.widths, self.told = int(found[1]["step"]), found[1]["widths"], found[1]["about"]
        first = self.feed.batches.peek(max(self.batch, ROWS)) if self.at < self.steps else {}
        if not first and found is None:
            raise Refused("there are no rows to train on: the texts hold no token that is kept")
        if first:
            self.widths = {site: rows.shape[1] for site, rows in first.items()}
            self._check(first)
        device = next(iter(first.values())).device if first else torch.device("cpu")
        for i, spec in enumerate(self.specs):
            widths = [[self.widths[site] for site in sites] for sites in (spec.reads, spec.writes)]
            coder = spec.make(*widths, seed=self.options["seed"]).to(device, self.dtype)
            learner = Learner(coder, steps=self.steps, rows=self.batch, start=spec.begins, **self.options)
            if found is None:
                learner.start(*spec.rows(first))
            else:
                prefix = f"{i}."
                tensors = {n.removeprefix(prefix): t for n, t in found[0].items() if n.startswith(prefix)}
                learner.restore(tensors, found[1]["learners"][i])
            self.learners.append(learner)
        if self.folder is not None and "jsonl" in loggers:
            self.file = MetricsFile(self.folder / METRICS, found[1]["metrics"] if found else 0)
            self.loggers.append(self.file)
        self.loggers += [Elsewhere(name, self.recipe, self.folder) for name in loggers if name != "jsonl"]

    def run(self, every: int, tick: Callable[[int, int], None] | None) -> None:
        """The steps that are left."""
        began, first = time.perf_counter(), self.at
        if tick is not None:
            tick(self.at, self.steps)
        while self.at < self.steps:
            try:
                rows = next(self.feed.batches)
            except StopIteration:
                raise Refused(
                    f"the texts ended after {self.at} of {self.steps} steps ({self.at * self.batch} rows); give more, give a "
                    f"list, which is read again, or begin anew with steps={self.at}"
                ) from None
            self._check(rows)
            found = [self._step(i, rows) for i in range(len(self.specs))]
            self.at += 1
            speed = (self.at - first) * self.batch / (time.perf_counter() - began)
            common: dict[str, Any] = {"tokens": self.at * self.batch}
            if self.feed.batches.epochs is not None:
                common["epoch"] = round(self.feed.batches.epochs, 4)
            for name, metrics in zip(self.names, found, strict=True):
                line = {
                    "step": self.at,
                    "coder": name,
                    **common,
                    **metrics,
                    "tokens_per_s": round(speed, 1),
                }
                for logger in self.loggers:
                    logger.log(line)
            if self.at % every == 0 or self.at == self.steps:
                self.save()
            if tick is not None:
                tick(self.at, self.steps)

    def _step(self, i: int, rows: Mapping[str, Tensor]) -> dict[str, float]:
        try:
            return self.learners[i].step(*self.specs[i].rows(rows))
        except WorkbenchError as error:
            raise WorkbenchError(f"{self.names[i]}: {error}") from None

    def _check(self, rows: Mapping[str, Tensor]) -> None:
        for site, value in rows.items():
            if not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all()):
                raise Refused(f"step {self.at + 1}: the activations of {site} hold NaN or infinities; training stops")

    @property
    def about(self) -> dict[str, Any]:
        """What the feed has found out while it ran."""
        return {**self.told, **{name: value for name, value in self.feed.about().items() if value}}

    def save(self) -> None:
        """Write the checkpoint, where there is a folder."""
        if self.folder is None:
            return
        tensors: dict[str, Tensor] = {}
        labels = []
        for i, learner in enumerate(self.learners):
            held_tensors, told = learner.state()
            tensors |= {f"{i}.{name}": value for name, value in held_tensors.items()}
            labels.append(told)
        state = {
            "step": self.at, "widths": self.widths, "data": self.feed.batches.state(), "learners": labels,
            "metrics": self.file.settled() if self.file is not None else 0, "about": self.about,
            "made_with": _made_with(),
        }  # fmt: skip
        write_checkpoint(self.folder / CHECKPOINT, tensors, state)

    def finish(self, places: Sequence[Path]) -> tuple[Coder, ...]:
        """The trained coders, saved if there is a folder; the checkpoint has served its purpose then."""
        for logger in self.loggers:
            logger.close()
        coders = []
        for spec, learner in zip(self.specs, self.learners, strict=True):
            coder = learner.finish()
            coder.about = {
                "reads": list(spec.reads), "writes": list(spec.writes), "kind": spec.kind, "options": plain(coder.options),
                "tokens": self.steps * self.batch, **{n: v for n, v in self.recipe.items() if n != "coders"},
                **self.about, "start": spec.begins, "rate": learner.rate, "versions": versions(),
            }  # fmt: skip
            coders.append(coder)
        for coder, place in zip(coders, places, strict=False):
            if not place.exists():
                coder.save(place)
        if self.folder is not None:
            (self.folder / CHECKPOINT).unlink(missing_ok=True)
        return tuple(coders)
