"""A task that asks a head to do nothing most of the time: the mean of what came before at a trigger, zero everywhere else.

Rows of ``tokens`` tokens: payloads, one trigger, and the first token ``<bos>`` unless ``bos=False``. The target of the trigger is
how often each payload came before it, as parts of 1; the target of every other token is zero. Softmax weights sum to 1 wherever
they go, so a head needs a place to put them where it has nothing to say: the task provably makes softmax attention sink and ReLU
attention not (arXiv 2603.11487, of which the abstract was read; sizes and payloads are ours).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import WorkbenchError

BOS, TRIGGER, FIRST_PAYLOAD = 0, 1, 2


@dataclass(frozen=True)
class TriggerBatch:
    """``ids`` ``[B, T]``; ``target`` ``[B, T, payloads]``; ``trigger`` ``[B, T]`` is True at the trigger; ``other`` at the tokens
    that have nothing to say, without the first one, which sees only itself."""

    ids: Tensor
    target: Tensor
    trigger: Tensor

    @property
    def other(self) -> Tensor:
        found = ~self.trigger
        found[:, 0] = False
        return found


def trigger_batch(
    n: int, generator: torch.Generator, *, tokens: int = 16, payloads: int = 8, bos: bool = True
) -> TriggerBatch:
    """``n`` rows; the trigger stands anywhere from the third token on. Ids: 0 is ``<bos>``, 1 the trigger, payloads from 2."""
    if tokens < 3 or payloads < 2:
        raise WorkbenchError(f"a row has at least 3 tokens and 2 payloads; got tokens={tokens}, payloads={payloads}")
    ids = torch.randint(FIRST_PAYLOAD, FIRST_PAYLOAD + payloads, (n, tokens), generator=generator)
    at = torch.randint(2, tokens, (n,), generator=generator)
    trigger = torch.arange(tokens) == at[:, None]
    ids = ids.masked_fill(trigger, TRIGGER)
    if bos:
        ids[:, 0] = BOS
    seen = torch.nn.functional.one_hot(ids, FIRST_PAYLOAD + payloads)[..., FIRST_PAYLOAD:].float().cumsum(1)
    target = seen / seen.sum(-1, keepdim=True).clamp(min=1) * trigger[..., None]
    return TriggerBatch(ids, target, trigger)
