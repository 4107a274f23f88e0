"""Training of a Lorsa on what one attention layer of a model reads and writes, sequences streamed through the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from workbench.coders.coder import Progress
from workbench.coders.documents import Documents, Passes
from workbench.coders.lorsa import Lorsa
from workbench.coders.lorsa_model import sites_of
from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model, Tokens

_WARM, _COOL = 0.02, 0.2


def train_lorsa(
    model: Model,
    layer: int,
    texts: Any,
    *,
    features: int,
    k: int,
    steps: int = 1000,
    tokens: int = 2048,
    context: int = 128,
    rate: float = 2e-3,
    train_patterns: bool = True,
    dead_after: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Lorsa:
    """A Lorsa of ``features`` rank-1 heads, k of them per token, for attention layer ``layer``; it starts from the layer's heads.

    ``texts``: a list of texts, token ids ``[T]`` or ``[B, T]``, or an iterable of them; every step runs the model on about
    ``tokens`` tokens in pieces of ``context`` and keeps nothing. Adam at ``rate``, with a warm-up over the first fiftieth and a
    linear decay over the last fifth of the steps. ``train_patterns``: queries and keys are learned too, at a tenth of the rate.
    A feature is dead after ``dead_after`` silent tokens, by default a twentieth of all. ``about["recipe"]["fvu"]`` is the share
    of the output's variance left unexplained in the last twentieth of the training.
    """
    for name, number in (("steps", steps), ("tokens", tokens), ("context", context)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise WorkbenchError(f"{name} is a whole number from 1; got {number!r}")
    lorsa = Lorsa.from_model(model, layer, features=features, k=k, seed=seed)
    reads = Passes(model, Documents(texts), context=context, budget=max(tokens, context), prepend_bos=None)
    silence = dead_after if dead_after is not None else max(1, steps * tokens // 20)
    patterns = list(lorsa.qk.parameters())
    own = [lorsa.W_V, lorsa.b_V, lorsa.W_O, lorsa.b_O]
    for parameter in patterns:
        parameter.requires_grad_(train_patterns)
    optimiser = torch.optim.Adam(
        [{"params": own, "peak": rate}, *([{"params": patterns, "peak": rate / 10}] if train_patterns else [])]
    )
    silent = torch.zeros(features, device=lorsa.W_V.device)
    scale = torch.ones(())
    left: list[float] = []
    with torch.enable_grad():
        for step in range(steps):
            given = next(reads, None)
            if given is None:
                raise Refused(
                    f"the texts ended after {step} of {steps} steps; give a list, which is read again, or fewer steps"
                )
            x, y, padding = _sequences(model, layer, given, lorsa.W_V.dtype)
            if step == 0:
                scale = _begin(lorsa, x, y, padding)
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * _schedule(step, steps)
            terms = lorsa.objective(x, y * scale, Progress(step, steps, silent, silence), padding)
            if not bool(torch.isfinite(terms.loss)):
                raise WorkbenchError(f"the loss of step {step} is {float(terms.loss.detach())}: lower rate={rate}")
            optimiser.zero_grad()
            terms.loss.backward()
            torch.nn.utils.clip_grad_norm_(lorsa.parameters(), 1.0)
            optimiser.step()
            _unit_rows(lorsa)
            count = int(x.shape[0] * x.shape[1] if padding is None else padding.sum())
            silent = torch.where(terms.active > 0, 0.0, silent + count)
            if step >= steps - max(1, steps // 20):
                left.append(float(terms.parts["error"]) / float(spread(y * scale, padding)))
            if progress is not None:
                progress(step + 1, steps)
    with torch.no_grad():
        for parameter in (lorsa.W_V, lorsa.b_V, lorsa.b_O):
            parameter.div_(scale)
    lorsa.requires_grad_(False)
    lorsa.about["recipe"] = {
        "steps": steps, "tokens": tokens, "context": context, "rate": rate, "train_patterns": train_patterns, "seed": seed,
        "fvu": sum(left) / len(left), "dead": int((silent >= silence).sum()),
    }  # fmt: skip
    return lorsa


def spread(y: Tensor, padding: Tensor | None) -> Tensor:
    """Squared distance of the rows of y ``[B, T, D]`` to their mean, mean over rows."""
    rows = y.flatten(0, 1) if padding is None else y[padding]
    return (rows - rows.mean(0)).square().sum(-1).mean()


@torch.no_grad()
def _sequences(model: Model, layer: int, given: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the layer reads and writes on one batch, and which tokens are real (None: all)."""
    read, write = sites_of(layer)
    run = model.run(given, read=[read, write], logits=None)
    tokens: Tokens = run.tokens
    return run.acts[read].to(dtype), run.acts[write].to(dtype), None if bool(tokens.mask.all()) else tokens.mask


@torch.no_grad()
def _begin(lorsa: Lorsa, x: Tensor, y: Tensor, padding: Tensor | None) -> Tensor:
    """Bring the start to the size of the outputs: returns the scale that gives them mean square 1, and fits one factor of all
    codes and the bias by least squares."""
    rows = y.flatten(0, 1) if padding is None else y[padding]
    if not bool(rows.var() > 0):
        raise WorkbenchError("the layer's output does not vary on these texts: there is nothing to learn")
    scale = rows.square().mean().rsqrt()
    for parameter in (lorsa.W_V, lorsa.b_V, lorsa.b_O):
        parameter.mul_(scale)
    made = lorsa.encode(x, padding) @ lorsa.W_O
    made = made.flatten(0, 1) if padding is None else made[padding]
    wanted = rows * scale
    centred = made - made.mean(0)
    factor = ((centred * (wanted - wanted.mean(0))).sum() / centred.square().sum().clamp(min=1e-30)).clamp(min=1e-3)
    lorsa.W_V.mul_(factor)
    lorsa.b_V.mul_(factor)
    lorsa.b_O.copy_(wanted.mean(0) - factor * made.mean(0))
    return scale


@torch.no_grad()
def _unit_rows(lorsa: Lorsa) -> None:
    lorsa.W_O.div_(lorsa.decoder_norms().clamp(min=1e-12)[:, None])


def _schedule(step: int, steps: int) -> float:
    warm, cool = max(1.0, _WARM * steps), max(1.0, _COOL * steps)
    return min(1.0, (step + 1) / warm, (steps - step) / cool)
