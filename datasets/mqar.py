"""Dense rows of multi-query associative recall for training (Zoology, arXiv 2312.04927; its generator was read).

::

    ids      12 4711 | 7 5005 |  831 4096  12 77   7 902 ...        keys from 1 to V/2 - 1, values from V/2 to V - 1
    labels    .  .     .  .       .   .  4711  .  5005 . ...        -100 at every dot

``pairs`` keys with their values come first, both drawn without replacement. Each key is asked once more in one of
(length - 2 pairs) / 2 slots of two tokens, slot i with weight p(i) ~ i^(exponent - 1); the label of an asked key is its value,
at that token. The published sweep is (length, pairs) = (64, 4), (128, 8), (256, 16), (512, 64) with 8192 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import WorkbenchError

IGNORED = -100


@dataclass(frozen=True)
class MQARBatch:
    """``ids`` and ``labels`` ``[B, T]``; a label is the value of the key at the same token, -100 where no key is asked."""

    ids: Tensor
    labels: Tensor

    @property
    def asked(self) -> Tensor:
        """True at the asked keys, ``[B, T]``."""
        return self.labels != IGNORED

    def accuracy(self, logits: Tensor) -> Tensor:
        """Share of the asked keys whose value has the largest of the logits ``[B, T, V]``, a scalar."""
        return (logits.argmax(-1) == self.labels)[self.asked].float().mean()


def mqar_batch(
    n: int,
    generator: torch.Generator,
    *,
    pairs: int = 4,
    length: int = 64,
    vocabulary: int = 8192,
    exponent: float = 0.01,
) -> MQARBatch:
    """``n`` rows. The published generator fills empty places with any token, now and then one of the row's own keys, which is
    then asked without a label; here they are any tokens but the row's keys and values."""
    if pairs < 1 or length % 2 or length < 4 * pairs:
        raise WorkbenchError(
            f"a row has an even length of at least 4 tokens per pair; got length={length}, pairs={pairs}"
        )
    if vocabulary % 2 or vocabulary <= length or vocabulary // 2 - 1 < pairs:
        raise WorkbenchError(
            f"the vocabulary is even, larger than a row and holds {pairs} keys in its lower half; got {vocabulary}"
        )
    if not exponent > 0:
        raise WorkbenchError(f"the exponent of the gaps is above 0; got {exponent}")
    half, context = vocabulary // 2, 2 * pairs
    keys = 1 + _distinct(torch.ones(half - 1), n, pairs, generator)
    values = half + _distinct(torch.ones(half), n, pairs, generator)
    space = (length - context) // 2
    slots = context + 2 * _distinct(torch.arange(1.0, space + 1) ** (exponent - 1), n, pairs, generator)
    own = torch.cat([keys, values], 1)
    ids = torch.randint(vocabulary, (n, length), generator=generator)
    while (taken := (ids[..., None] == own[:, None]).any(-1)).any():
        ids[taken] = torch.randint(vocabulary, (int(taken.sum()),), generator=generator)
    ids[:, :context] = torch.stack([keys, values], 2).flatten(1)
    ids.scatter_(1, slots, keys)
    labels = torch.full((n, length), IGNORED).scatter_(1, slots, values)
    return MQARBatch(ids, labels)


def _distinct(weights: Tensor, n: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different indices per row, ``[n, count]``, drawn one after another by ``weights``."""
    return torch.multinomial(weights.expand(n, -1), count, generator=generator)
