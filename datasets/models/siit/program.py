"""The causal model that a network is trained onto: indirect object identification in three variables.

::

    slots      first     second                        third      end
    prompt     Mary  and  John  went to the store,     John  gave a ring to   ->  Mary
    duplicate                                          second
    inhibition                                                           second
    mover                                                                {Mary}

``duplicate`` (0 nobody, 1 first, 2 second): the slot whose name the third name repeats. ``inhibition``: the same, moved to the
last token. ``mover``: the names of the first two slots that are not inhibited; with nobody inhibited both, equally likely. The
output is the mover's. An intervention gives one variable the value that it has in another prompt; slots, not names, are handed
on by the first two variables, so that their values mean something in any prompt.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.datasets.pairs import in_split, one_of
from workbench.datasets.tasks.ioi import IOI
from workbench.datasets.tokenizer import SPECIAL, pieces, word_tokenizer
from workbench.datasets.words import template, words
from workbench.errors import WorkbenchError

VARIABLES = ("duplicate", "inhibition", "mover")
NOBODY = 0.3


@dataclass(frozen=True)
class Prompts:
    """Prompts of the task as the program sees them.

    ``ids`` ``[N, T]``, padded on the right; ``names`` ``[N, 3]``: ids of the three names; ``places`` ``[N, 4]``: positions of
    the three names and of the last token.
    """

    ids: Tensor
    names: Tensor
    places: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor | slice) -> Prompts:
        return Prompts(self.ids[rows], self.names[rows], self.places[rows])

    @property
    def end(self) -> Tensor:
        """Position of the last token ``[N]``."""
        return self.places[:, 3]

    @classmethod
    def of(cls, ids: Tensor, tokenizer: Any) -> Prompts:
        """Prompts from token ids ``[N, T]``; each holds three names. Raises ``WorkbenchError`` where one does not."""
        found = torch.isin(ids, name_ids(tokenizer))
        wrong = found.sum(1) != 3
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise WorkbenchError(
                f"the program reads prompts with three names; row {row} has {int(found[row].sum())}: "
                f"{tokenizer.decode(ids[row])!r}. Build them with task('ioi')"
            )
        at = found.nonzero()[:, 1].reshape(-1, 3)
        end = (ids != tokenizer.pad_token_id).sum(1, keepdim=True) - 1
        return cls(ids, ids.gather(1, at), torch.cat([at, end], 1))


def tokens() -> tuple[str, ...]:
    """The vocabulary in id order: specials, then the pieces of the task's templates, names, places and gifts."""
    frames = (piece for frame in template("ioi") for piece in pieces(re.sub(r"\{\w+\}", " ", frame)))
    listed = (word for kind in ("names", "places", "gifts") for word in words(kind))
    return tuple(dict.fromkeys((*SPECIAL, *frames, *listed)))


def vocabulary() -> Any:
    """The tokenizer over ``tokens()``."""
    return word_tokenizer(tokens())


def name_ids(tokenizer: Any) -> Tensor:
    """Ids of all names."""
    return torch.tensor(tokenizer.convert_tokens_to_ids(list(words("names"))))


def duplicate(prompts: Prompts) -> Tensor:
    """Slot whose name comes again ``[N]``: 0 nobody, 1 first, 2 second."""
    first, second, third = prompts.names.unbind(1)
    return torch.where(third == first, 1, torch.where(third == second, 2, 0))


def mover(prompts: Prompts, inhibited: Tensor) -> Tensor:
    """Names of the first two slots ``[N, 2]``, -1 in the place of the inhibited one."""
    slots = torch.tensor([1, 2])
    return torch.where(inhibited[:, None] == slots, -1, prompts.names[:, :2])


def answers(prompts: Prompts, source: Prompts | None = None, variable: Tensor | None = None) -> Tensor:
    """What the program says: the set of names ``[N, 2]``, padded with -1 as in ``Pairs.answer``.

    With ``source`` row n runs with variable ``VARIABLES[variable[n]]`` as it is in row n of the source, or plainly if
    ``variable[n]`` is -1.
    """
    slot = duplicate(prompts)
    if source is None or variable is None:
        return mover(prompts, slot)
    other = duplicate(source)
    moved = variable == VARIABLES.index("mover")
    slot = torch.where((variable >= 0) & ~moved, other, slot)
    return torch.where(moved[:, None], mover(source, other), mover(prompts, slot))


def targets(names: Tensor, vocab: int, known: Tensor, smoothing: float) -> Tensor:
    """Distributions ``[N, V]``: even over the set ``names``, of which a share ``smoothing`` is spread over all ``known``."""
    chosen = torch.zeros(len(names), vocab + 1).scatter_(1, names % (vocab + 1), 1.0)[:, :vocab]
    every = torch.zeros(vocab)
    every[known] = 1 / len(known)
    return (1 - smoothing) * chosen / chosen.sum(1, keepdim=True) + smoothing * every


def draw(tokenizer: Any, *, seed: int, n: int, split: str = "train", nobody: float = NOBODY) -> Prompts:
    """``n`` prompts of ``task("ioi")`` of one split; in a share ``nobody`` of them no name comes twice."""
    one_of("split", split, ("train", "test"))
    rng, task = random.Random(f"siit/{split}/{seed}"), IOI(corruption="abc")
    texts: list[str] = []
    while len(texts) < n:
        example = task.draw(rng)
        if in_split(example.key, split):
            texts.append(example.corrupt if rng.random() < nobody else example.clean)
    return encoded(texts, tokenizer)


def encoded(texts: Sequence[str], tokenizer: Any) -> Prompts:
    """Prompts from texts."""
    ids = tokenizer(list(texts), padding=True, return_tensors="pt")["input_ids"]
    return Prompts.of(ids, tokenizer)


class Sources:
    """Draws for every prompt of a pool another one whose names and last token stand at the same positions."""

    def __init__(self, pool: Prompts) -> None:
        _, layout = torch.unique(pool.places, dim=0, return_inverse=True)
        self.order = layout.argsort(stable=True)
        self.size = torch.bincount(layout)
        self.start = self.size.cumsum(0) - self.size
        self.layout = layout

    def __call__(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Rows of the pool ``[N]``, one for each of ``rows``."""
        layout = self.layout[rows]
        at = torch.rand(len(rows), generator=generator, dtype=torch.float64) * self.size[layout]
        return self.order[self.start[layout] + at.long()]
