"""Vectors of classes with labels in context, bursty or not, novel or not (Reddy, arXiv 2312.03002; the generator was read).

::

    row       item_1 label_1 item_2 label_2 ... item_N label_N target        each [2 * longest + 1 places | D values]
    item      (mu_k + eps * eta) / sqrt(1 + eps^2), mu_k and eta normal with variance 1 / D; class k has label k mod L
    place     one-hot, from a place drawn for the row

A bursty context (a share ``bursty`` of the rows) holds N / B classes B times each and the target is one of them; the others
draw every item and the target for themselves. Classes are drawn with p(k) ~ k^-alpha, k from 1. A share ``novel`` of the rows
is about classes that never come again, always in bursts, drawn evenly: only the context tells their labels. The three published
measures are ``MEASURES``, to be passed on::

    iwl     no bursts: what the weights know of the classes
    icl     novel classes in bursts: what is read off the context
    icl2    known classes in bursts whose labels are moved on by one, in the context and as the right answer
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.errors import WorkbenchError

MEASURES: dict[str, dict[str, Any]] = {
    "iwl": {"bursty": 0.0, "novel": 0.0},
    "icl": {"bursty": 1.0, "novel": 1.0},
    "icl2": {"bursty": 1.0, "novel": 0.0, "swapped": True},
}


@dataclass(frozen=True)
class Classes:
    """The world that stays the same from batch to batch: ``items`` ``[K, D]``, the mu_k, and ``labels`` ``[L, D]``."""

    items: Tensor
    labels: Tensor

    def label(self, k: Tensor) -> Tensor:
        """The label of class ``k``: k mod L."""
        return k % len(self.labels)


@dataclass(frozen=True)
class BurstyBatch:
    """``inputs`` ``[B, 2N + 1, 2 * longest + 1 + D]``; ``label`` ``[B]``, the right one for the target. ``classes``
    ``[B, N + 1]`` are those of the items and, last, of the target (-1 where novel), ``labels`` ``[B, N]`` the labels in the
    context and ``match`` ``[B, N]`` True where an item is of the target's class."""

    inputs: Tensor
    label: Tensor
    classes: Tensor
    labels: Tensor
    match: Tensor


def bursty_classes(generator: torch.Generator, *, classes: int = 1024, labels: int = 32, width: int = 64) -> Classes:
    """Classes and label vectors of variance 1 / ``width`` per value; ``classes`` is a multiple of ``labels``."""
    if labels < 2 or classes < labels or classes % labels:
        raise WorkbenchError(f"classes are a multiple of 2 or more labels; got classes={classes}, labels={labels}")
    if width < 1:
        raise WorkbenchError(f"vectors have at least one value; got width={width}")
    return Classes(_normal((classes, width), generator), _normal((labels, width), generator))


def bursty_batch(
    n: int,
    generator: torch.Generator,
    classes: Classes,
    *,
    pairs: int = 8,
    burst: int = 4,
    bursty: float = 1.0,
    novel: float = 0.0,
    alpha: float = 0.0,
    eps: float = 0.1,
    swapped: bool = False,
    longest: int | None = None,
) -> BurstyBatch:
    """``n`` rows with contexts of ``pairs`` items. ``longest``: items of the longest context that the places leave room for,
    ``pairs`` by default; ``swapped`` moves the labels of known classes on by one. Which values of K, alpha, B, p_B and p_C make
    which figure of the paper was not looked up: the defaults are ours. So is that every novel class is in one row only; the
    published code draws them from as many classes as a batch has rows, or from 128 when it tests."""
    if burst < 1 or pairs % burst or burst >= pairs:
        raise WorkbenchError(f"a context holds each of 2 or more classes burst times; got pairs={pairs}, burst={burst}")
    if not (0 <= bursty <= 1 and 0 <= novel <= 1):
        raise WorkbenchError(f"bursty and novel are shares from 0 to 1; got {bursty} and {novel}")
    if alpha < 0 or eps < 0:
        raise WorkbenchError(f"alpha and eps are 0 or more; got alpha={alpha}, eps={eps}")
    longest = pairs if longest is None else longest
    if longest < pairs:
        raise WorkbenchError(f"places for contexts of {longest} items leave no room for {pairs}; set longest={pairs}")
    known, count = len(classes.items), len(classes.labels)
    weights = torch.arange(1.0, known + 1) ** -alpha

    in_bursts = torch.rand(n, generator=generator) < bursty
    is_novel = torch.rand(n, generator=generator) < novel
    drawn = torch.multinomial(weights, n * (pairs + 1), replacement=True, generator=generator).view(n, pairs + 1)
    bursts = _in_bursts(drawn[:, : pairs // burst], burst, generator)
    k = torch.where(in_bursts[:, None], bursts, drawn)
    label = classes.label(k + int(swapped))
    mu = classes.items[k]
    # One novel class for each of a row's bursts, with a label of its own draw: none comes again in another row.
    fresh = _in_bursts(torch.arange(n * (pairs // burst)).view(n, -1), burst, generator)
    new_label = torch.randint(count, (n * (pairs // burst),), generator=generator)
    new_mu = _normal((n * (pairs // burst), classes.items.shape[1]), generator)
    mu = torch.where(is_novel[:, None, None], new_mu[fresh], mu)
    label = torch.where(is_novel[:, None], new_label[fresh], label)
    match = torch.where(is_novel[:, None], fresh == fresh[:, -1:], k == k[:, -1:])[:, :-1]

    items = (mu + eps * _normal(tuple(mu.shape), generator)) / (1 + eps**2) ** 0.5
    values = torch.stack([items, classes.labels[label]], 2).flatten(1, 2)[:, :-1]
    shift = torch.randint(2 * (longest - pairs) + 1, (n, 1), generator=generator)
    places = torch.nn.functional.one_hot(shift + torch.arange(2 * pairs + 1), 2 * longest + 1).float()
    return BurstyBatch(
        inputs=torch.cat([places, values], -1),
        label=label[:, -1],
        classes=k.masked_fill(is_novel[:, None], -1),
        labels=label[:, :-1],
        match=match,
    )


def _in_bursts(few: Tensor, burst: int, generator: torch.Generator) -> Tensor:
    """Rows of ``few`` with every entry ``burst`` times in a drawn order, and then the target, one of them."""
    all_ = few.repeat(1, burst)
    order = torch.rand(all_.shape, generator=generator).argsort(1)
    target = torch.randint(all_.shape[1], (len(all_), 1), generator=generator)
    return torch.cat([all_.gather(1, order), all_.gather(1, target)], 1)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal vectors of expected length 1."""
    return torch.randn(shape, generator=generator) / shape[-1] ** 0.5
