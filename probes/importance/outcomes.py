"""How good is a prediction, and how far has it moved?

Three kinds of inputs: ``Pairs`` are judged by the answer at the answer position, texts by the next token at every real token,
images (or texts) with ``labels`` by the class. The distance between two predictions is the Jensen-Shannon divergence
JS(p, q) = KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2, in nats, at most ln 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs, at_answer
from workbench.probes.ablation import over_tokens, precise, predicted
from workbench.run import Run

MEASURES = ("probability", "loss", "accuracy")


@dataclass(frozen=True)
class Judge:
    """What counts as right: the answers of pairs, class ``labels`` ``[B]``, or (neither) the next token."""

    pairs: Pairs | None = None
    labels: Tensor | None = None

    @classmethod
    def of(cls, model: Model, inputs: Any, labels: Tensor | None = None) -> Judge:
        """Refuses labels beside pairs, and texts of models that see the next token."""
        if isinstance(inputs, Pairs):
            if labels is not None:
                raise WorkbenchError("pairs have answers of their own; leave labels out")
            return cls(inputs)
        if labels is not None:
            labels = torch.as_tensor(labels)
            if labels.ndim != 1 or labels.is_floating_point():
                raise WorkbenchError(
                    f"labels are one class per example, integers [B]; got {labels.dtype} {list(labels.shape)}"
                )
            return cls(None, labels)
        if not model.shape.causal:
            raise Refused(f"{model.name} sees the next token, so it predicts none; pass labels= of a classifier")
        return cls()

    def scores(self, run: Run) -> dict[str, Tensor]:
        """``probability`` of what is right, ``loss`` (its negative log, nats) and ``accuracy``, each ``[B]`` on the CPU; the loss
        keeps its graph. Of texts the mean over tokens that have a next one."""
        logits = run.logits
        if logits is None:
            raise Refused(f"importance is measured on predictions; {run.provenance.model} gives no logits")
        if self.pairs is not None:
            return _of_answer(
                precise(at_answer(logits, self.pairs)).log_softmax(-1), self.pairs.answer.to(logits.device)
            )
        if self.labels is not None:
            self._check(logits, self.labels)
            return _of_answer(precise(logits).log_softmax(-1), self.labels[:, None].to(logits.device))
        return _of_next(run, logits)

    def moved(self, run: Run, plain: Run) -> Tensor:
        """Jensen-Shannon divergence of two runs' predictions, ``[B]`` in nats: at the answer, of the class, or mean over real
        tokens."""
        if self.pairs is None:
            return over_tokens(plain, run, jensen_shannon)
        if run.logits is None or plain.logits is None:
            raise Refused(f"importance is measured on predictions; {run.provenance.model} gives no logits")
        p, q = (at_answer(x, self.pairs).double().log_softmax(-1).cpu() for x in (plain.logits, run.logits))
        return jensen_shannon(p, q)

    @staticmethod
    def _check(logits: Tensor, labels: Tensor) -> None:
        if logits.ndim != 2 or len(logits) != len(labels):
            raise WorkbenchError(
                f"labels are classes of a classifier, [B] for logits [B, classes]; got {len(labels)} for {list(logits.shape)}"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
            raise WorkbenchError(
                f"labels lie in [0, {logits.shape[1]}); got {int(labels.min())} to {int(labels.max())}"
            )


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """Of log probabilities ``[..., V]``, in nats: 0 where they are equal, ln 2 where they share nothing."""
    middle = torch.logaddexp(p, q) - math.log(2)
    parts = [torch.where(x.exp() > 0, x.exp() * (x - middle), 0.0).sum(-1) for x in (p, q)]
    return ((parts[0] + parts[1]) / 2).clamp(min=0)


def _of_answer(logp: Tensor, answer: Tensor) -> dict[str, Tensor]:
    """Of log probabilities ``[B, V]`` and the ids ``[B, A]`` that are right (-1: none)."""
    each = logp.gather(1, answer.clamp(min=0)).masked_fill(answer < 0, -math.inf)
    right = each.logsumexp(1).double().cpu()
    hit = (logp.argmax(-1, keepdim=True) == answer).any(1)
    return {"probability": right.detach().exp(), "loss": -right, "accuracy": hit.double().cpu()}


def _of_next(run: Run, logits: Tensor) -> dict[str, Tensor]:
    ids, real = predicted(run)
    if logits.ndim != 3 or ids.shape[1] != logits.shape[1] or ids.shape[1] < 2:
        raise Refused(
            f"texts are judged by the next of two tokens or more; got logits {list(logits.shape)}: pass labels= of a classifier"
        )
    found: dict[str, list[Tensor]] = {name: [] for name in MEASURES}
    for row, wanted, mask in zip(logits, ids, real, strict=True):
        logp = precise(row[:-1]).log_softmax(-1)
        next_id = wanted[1:].long().to(logp.device)
        right = logp.gather(-1, next_id[:, None])[:, 0].double().cpu()
        at = (mask[1:] & mask[:-1]).cpu()
        hit = (logp.argmax(-1) == next_id).double().cpu()
        for name, value in zip(MEASURES, (right.detach().exp(), -right, hit), strict=True):
            found[name].append(value[at].mean())
    return {name: torch.stack(values) for name, values in found.items()}
