"""Docstring: the next documented argument is the next argument of the signature (Heimersheim & Janiak 2023).

::

    clean    <bos> def load(self, size, list, path, flag, mode, text): \"\"\" old cloud
             :param path: small tree   :param flag: new river   :param  ->  mode
    corrupt  random_random:  def load(self, size, list, width, host, node, text): ... :param limit: ... :param count: ...
             random_doc:     def load(self, size, list, path, flag, mode, text): ... :param limit: ... :param count: ...
             random_def:     def load(self, size, list, width, host, mode, text): ... :param path: ... :param flag: ...
             random_answer:  def load(self, size, list, path, flag, node, text): ... :param path: ... :param flag: ...
             random_order:   def load(self, size, list, path, flag, mode, text): ... :param flag: ... :param path: ...

As in ACDC's generator: ``random_random`` replaces A, B, C in the signature and the documented A and B, each by other names;
``random_doc`` only the documented ones, ``random_def`` only A and B of the signature, ``random_answer`` only C there;
``random_order`` documents B before A.
The signature has ``prefix`` arguments, then A B C, then ``suffix`` arguments; A and B are documented, C is the answer. Wrong:
every other argument of the clean signature (and what replaces C under ``random_answer``). Spans: ``A_DEF``, ``B_DEF``,
``C_DEF``, ``A_DOC``, ``B_DOC``, ``END``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from workbench.datasets.pairs import SPLITS, Example, collect, one_of
from workbench.datasets.words import template, words
from workbench.errors import WorkbenchError
from workbench.pairs import Pairs, logit_difference

CORRUPTIONS = ("random_random", "random_doc", "random_def", "random_answer", "random_order")


@dataclass(frozen=True)
class Docstring:
    """The task. Splits hold different triples A B C."""

    corruptions: ClassVar[tuple[str, ...]] = CORRUPTIONS
    corruption: str = "random_random"
    prefix: int = 2
    suffix: int = 1
    split: str = "train"
    name: str = field(default="docstring", init=False)

    def __post_init__(self) -> None:
        one_of("corruption of docstring", self.corruption, CORRUPTIONS)
        one_of("split", self.split, SPLITS)
        if min(self.prefix, self.suffix) < 0 or self.prefix + self.suffix + 9 > len(words("arguments")):
            raise WorkbenchError(
                f"prefix and suffix are 0 or more arguments, at most {len(words('arguments')) - 9} together; "
                f"got {self.prefix} and {self.suffix}"
            )

    def build(self, seed: int, tokenizer: Any, n: int) -> Pairs:
        """``n`` pairs; labels ``a``, ``b``, ``c``."""
        return collect(self.name, self.draw, seed=seed, split=self.split, tokenizer=tokenizer, n=n)

    def contrast(self) -> Docstring:
        """The task whose corrupted prompts document arguments that the signature does not have."""
        return replace(self, corruption="random_random")

    def metric(self, logits: Tensor, pairs: Pairs) -> Tensor:
        """Logit of C minus the mean logit of the other arguments, ``[B]``."""
        return logit_difference(logits, pairs)

    def draw(self, rng: random.Random) -> Example:
        """One example in text."""
        names = rng.sample(words("arguments"), self.prefix + self.suffix + 8)
        before, names = names[: self.prefix], names[self.prefix :]
        after, names = names[: self.suffix], names[self.suffix :]
        (a, b, c), other_def, other_doc = names[:3], names[3:6], names[6:8]
        head = template("docstring")
        text = {
            "method": rng.choice(words("methods")),
            "d0": rng.choice(words("descriptions")),
            "t0": rng.choice(words("things")),
        }
        told = [f"{rng.choice(words('descriptions'))} {rng.choice(words('things'))}" for _ in range(2)]

        def render(in_def: list[str], in_doc: list[str]) -> str:
            start = head.format(arguments=", ".join([*before, *in_def, *after]), **text)
            return start + "".join(f"    :param {n}: {t}\n" for n, t in zip(in_doc, told, strict=True)) + "    :param"

        corrupt = {
            "random_random": render(other_def, other_doc),
            "random_doc": render([a, b, c], other_doc),
            "random_def": render([*other_def[:2], c], [a, b]),
            "random_answer": render([a, b, other_def[2]], [a, b]),
            "random_order": render([a, b, c], [b, a]),
        }[self.corruption]
        clean = render([a, b, c], [a, b])
        wrong = [*before, a, b, *after] + ([other_def[2]] if self.corruption == "random_answer" else [])
        spans = {f"{k}_DEF": _after(clean, n, ("(self, ", ", "), 0) for k, n in zip("ABC", (a, b, c), strict=True)}
        spans |= {
            f"{k}_DOC": _after(clean, n, (":param ",), clean.index('"""')) for k, n in zip("AB", (a, b), strict=True)
        }
        return Example(
            clean=clean,
            corrupt=corrupt,
            answer=(f" {c}",),
            wrong=tuple(f" {name}" for name in wrong),
            key=f"{a} {b} {c}",
            spans=spans,
            labels={"a": a, "b": b, "c": c},
        )


def _after(text: str, word: str, leads: tuple[str, ...], start: int) -> tuple[int, int]:
    """Where ``word`` stands directly after one of ``leads``, from character ``start`` on."""
    at = min(i + len(lead) for lead in leads if (i := text.find(lead + word, start)) >= 0)
    return at, at + len(word)


TASKS = {"docstring": (Docstring, "the next argument to document")}
