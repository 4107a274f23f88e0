"""What a task is: prompts in clean and corrupted pairs, answers, and where the words stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from workbench.errors import WorkbenchError


@dataclass(frozen=True)
class Pairs:
    """Clean and corrupted prompts of one length.

    ``clean`` and ``corrupt`` are ids ``[B, T]``. ``answer`` and ``wrong`` are id sets ``[B, A]`` and ``[B, W]``, padded with
    -1: the tokens that are right and wrong after ``position`` (``[B]``, usually T - 1). ``spans`` names word positions:
    name -> ``[B, 2]`` half-open ranges, -1 where absent. ``labels`` holds anything else worth grouping by, one entry
    per example. ``dropped`` counts examples that were generated and refused (unequal lengths).
    """

    clean: Tensor
    corrupt: Tensor
    answer: Tensor
    wrong: Tensor
    position: Tensor
    spans: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    texts: tuple[str, ...] = ()
    dropped: int = 0

    def __post_init__(self) -> None:
        if self.clean.shape != self.corrupt.shape:
            raise WorkbenchError(
                f"clean and corrupted prompts must have one length; got {list(self.clean.shape)} and {list(self.corrupt.shape)}"
            )
        n = len(self.clean)
        for name in ("answer", "wrong"):
            value = getattr(self, name)
            if value.ndim != 2 or len(value) != n:
                raise WorkbenchError(f"pairs.{name} is [B, tokens] with B={n}; got {list(value.shape)}")
        if self.position.shape != (n,):
            raise WorkbenchError(f"pairs.position is [B] with B={n}; got {list(self.position.shape)}")
        if n and not bool(((self.position >= 0) & (self.position < self.clean.shape[1])).all()):
            raise WorkbenchError(
                f"pairs.position is a place in prompts of {self.clean.shape[1]} tokens, from 0; got {self.position.tolist()[:8]}"
            )

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, index: slice) -> Pairs:
        """A slice of the examples."""
        if not isinstance(index, slice):
            raise WorkbenchError(f"pairs are taken by slices, pairs[i : i + 1] for example i; got {index!r}")
        return self.take(range(len(self))[index])

    def take(self, indices: Iterable[int] | Tensor) -> Pairs:
        """The examples with these numbers, in this order; a number may occur several times."""
        chosen = [int(i) for i in indices]
        outside = next((i for i in chosen if not 0 <= i < len(self)), None)
        if outside is not None:
            raise WorkbenchError(f"there are {len(self)} pairs, numbered from 0; got {outside}")
        at = torch.tensor(chosen, dtype=torch.int64)
        return Pairs(
            self.clean[at],
            self.corrupt[at],
            self.answer[at],
            self.wrong[at],
            self.position[at],
            {name: span[at] for name, span in self.spans.items()},
            {name: tuple(values[i] for i in chosen) for name, values in self.labels.items()},
            tuple(self.texts[i] for i in chosen) if self.texts else (),
            self.dropped,
        )

    def __repr__(self) -> str:
        return f"Pairs({len(self):,} pairs of {self.clean.shape[1]:,} tokens)"

    def _repr_html_(self) -> str:
        from workbench.summaries import pairs_html

        return pairs_html(self)


@runtime_checkable
class Task(Protocol):
    """A frozen config that builds pairs. ``tests/conformance/test_tasks.py`` is its suite.

    ``corruption``, one of ``corruptions``, says how the corrupted prompt differs. ``contrast()`` is the same task with
    the corruption that makes negatives: prompts of the same form in which the behaviour is not called for, as methods
    that only look at activations compare them. After some corruptions (two names exchanged) the behaviour is still
    there, with another answer.
    """

    @property
    def name(self) -> str: ...

    @property
    def corruption(self) -> str: ...

    @property
    def corruptions(self) -> tuple[str, ...]: ...

    def contrast(self) -> Task: ...

    def build(self, seed: int, tokenizer: Any, n: int) -> Pairs:
        """``n`` examples; the same seed gives the same examples. ``split`` of the config keeps train and test disjoint."""
        ...

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Per example ``[B]``, from logits ``[B, T, V]``; larger means more of the clean behaviour."""
        ...


def at_answer(logits: Tensor, pairs: Pairs) -> Tensor:
    """Logits ``[B, V]`` at the answer position."""
    return logits[torch.arange(len(pairs), device=logits.device), pairs.position.to(logits.device)]


def logit_difference(logits: Tensor, pairs: Pairs) -> Tensor:
    """Mean logit of the answers minus mean logit of the wrong tokens, ``[B]``."""
    last = at_answer(logits, pairs)
    return _mean_over(last, pairs.answer) - _mean_over(last, pairs.wrong)


def probability_difference(logits: Tensor, pairs: Pairs) -> Tensor:
    """Summed probability of the answers minus that of the wrong tokens, ``[B]``."""
    p = at_answer(logits, pairs).softmax(-1)
    return _sum_over(p, pairs.answer) - _sum_over(p, pairs.wrong)


def accuracy(logits: Tensor, pairs: Pairs) -> Tensor:
    """1 where the largest logit is one of the answers, ``[B]``."""
    best = at_answer(logits, pairs).argmax(-1, keepdim=True)
    return (best == pairs.answer.to(best.device)).any(-1).float()


def divergence(full: Tensor, other: Tensor, pairs: Pairs) -> Tensor:
    """KL(full || other) of the next-token distribution at the answer position, in nats, ``[B]``."""
    p, q = (at_answer(logits, pairs).log_softmax(-1) for logits in (full, other))
    return (p.exp() * (p - q)).sum(-1)


def _sum_over(values: Tensor, ids: Tensor) -> Tensor:
    ids = ids.to(values.device)
    return torch.where(ids >= 0, values.gather(1, ids.clamp(min=0)), 0).sum(-1)


def _mean_over(values: Tensor, ids: Tensor) -> Tensor:
    return _sum_over(values, ids) / (ids.to(values.device) >= 0).sum(-1).clamp(min=1)
