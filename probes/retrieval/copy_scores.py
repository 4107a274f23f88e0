"""The copy-paste score of one answer, from the keys that the heads looked at (Wu et al., arXiv 2404.15574).

At step s the model stands at token c_s and writes w_s; head h looks at key i_s(h), the largest weight of its last row. It
copies if i_s lies in the needle k and prompt[i_s] = w_s.

    published   sum over copies of 1 / |k|, |k| the needle's length in tokens: repeats count, so it may exceed 1
                (the authors' code)
    unique      |set of w_s that h copied| / |set of tokens of k|: at most 1, repeats count once (the paper's formula)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FORMS = ("unique", "published")
_CONTROLS = 16


class Answer(NamedTuple):
    """One answer: ``prompt`` ``[T]``, the needle's span ``[lo, hi)`` in it, ``written`` ``[S]`` and ``keys`` ``[S, L, H]``, -1
    for a row without weight."""

    prompt: Tensor
    span: tuple[int, int]
    written: Tensor
    keys: Tensor

    @property
    def needle(self) -> Tensor:
        """Tokens of the needle."""
        return self.prompt[self.span[0] : self.span[1]]

    @property
    def inside(self) -> Tensor:
        """Whether the key is a token of the prompt, bool ``[S, L, H]``."""
        return (self.keys >= 0) & (self.keys < len(self.prompt))

    @property
    def on_needle(self) -> Tensor:
        """Whether the key lies in the needle, bool ``[S, L, H]``."""
        return (self.keys >= self.span[0]) & (self.keys < self.span[1])

    @property
    def same(self) -> Tensor:
        """Whether the key holds the token that is written, bool ``[S, L, H]``."""
        at = self.keys.clamp(0, len(self.prompt) - 1)
        return self.inside & (self.prompt[at] == self.written[:, None, None])


def copied(hits: Tensor, written: Tensor, size: int, form: str) -> Tensor:
    """Copy score ``[L, H]`` from the steps that copied, bool ``[S, L, H]``, and the tokens ``[S]`` written at them."""
    if form == "published":
        return hits.sum(0, dtype=torch.float64) / size
    found = torch.zeros(hits.shape[1:], dtype=torch.float64)
    for token in written.unique():
        found += hits[written == token].any(0)
    return found / size


def size_of(answer: Answer, form: str) -> int:
    """What a perfect copy counts: tokens of the needle, different ones in the unique form."""
    return len(answer.needle) if form == "published" else len(answer.needle.unique())


def trial(answer: Answer, form: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Of one answer, ``[L, H]`` each: the copy score ``copied`` and its ``null``, ``looks`` and ``looks_null``, ``beyond``; and
    ``uniform`` ``[]``.

    ``null``: the score for as many random positions outside the needle, mean over draws. ``looks``: part of the steps whose key
    lies in the needle, ``looks_null`` the same for random positions. ``beyond``: see ``beyond_induction``. ``uniform``: what a
    head scores that looks anywhere in the text evenly.
    """
    lo, hi = answer.span
    length, size = len(answer.prompt), size_of(answer, form)
    same, needle = answer.same, answer.on_needle
    others = torch.cat([torch.arange(lo), torch.arange(hi, length)])
    at = answer.keys.clamp(0, length - 1)
    nulls = []
    for _ in range(_CONTROLS if len(others) >= hi - lo else 0):
        chosen = torch.zeros(length, dtype=torch.bool)
        chosen[others[torch.randperm(len(others), generator=generator)[: hi - lo]]] = True
        nulls.append(copied(same & chosen[at], answer.written, size, form))
    null = torch.stack(nulls).mean(0) if nulls else torch.full(at.shape[1:], float("nan"), dtype=torch.float64)
    return {
        "copied": copied(same & needle, answer.written, size, form),
        "null": null,
        "looks": needle.double().mean(0),
        "looks_null": (answer.inside & ~needle).double().mean(0) * min(1.0, (hi - lo) / max(1, len(others))),
        "beyond": beyond_induction(answer),
        "uniform": even(answer, form),
    }


def even(answer: Answer, form: str) -> Tensor:
    """Expected copy score ``[]`` of a head that looks at every visible key with equal chance.

    At step s it copies with chance p_s = (needle tokens equal to w_s) / (tokens so far): sum_s p_s / |k| in the published form,
    sum over tokens of 1 - prod (1 - p_s) over the steps that write it, by the number of different needle tokens, in the other.
    """
    steps = torch.arange(len(answer.written))
    chance = (answer.needle == answer.written[:, None]).sum(1).double() / (len(answer.prompt) + steps)
    size = size_of(answer, form)
    if form == "published":
        return chance.sum() / size
    ever = [1 - (1 - chance[answer.written == token]).prod() for token in answer.written.unique()]
    return torch.stack(ever).sum() / size if ever else chance.sum()


def beyond_induction(answer: Answer) -> Tensor:
    """Part ``[L, H]`` of the needle's tokens copied at steps where following a repeat would not have led there.

    An induction head that stands at c_s looks behind an earlier c_s. Steps at which some needle position holds w_s right after
    a copy of c_s are left out: there both kinds of head look alike. Of the different needle tokens written at the remaining
    steps, this is the part that the head copied there; NaN if there are none.
    """
    lo, hi = answer.span
    standing = torch.cat([answer.prompt[-1:], answer.written])[: len(answer.written)]
    needle, before = answer.needle, torch.cat([answer.prompt.new_full((1,), -1), answer.prompt])[lo:hi]
    right = needle == answer.written[:, None]
    alike = (right & (before == standing[:, None])).any(1)
    counted = right.any(1) & ~alike
    total = len(answer.written[counted].unique())
    if not total:
        return torch.full(answer.keys.shape[1:], float("nan"), dtype=torch.float64)
    hits = answer.same & answer.on_needle & counted[:, None, None]
    return copied(hits, answer.written, total, "unique")


def recall_of(written: Tensor, needle: Tensor, answers: Tensor) -> float:
    """Part of the needle's tokens that were written, each as often as it occurs (ROUGE-1 recall over tokens); for a needle of
    one token, whether it or one of the accepted ``answers`` (-1: none) was written."""
    said, wanted = written.tolist(), needle.tolist()
    if len(wanted) == 1:
        return float(bool({*wanted, *(a for a in answers.tolist() if a >= 0)} & set(said)))
    return sum(min(said.count(token), wanted.count(token)) for token in set(wanted)) / len(wanted)
