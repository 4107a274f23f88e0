"""What happens when the sink is evicted?

The causal test of StreamingLLM (Xiao et al., arXiv 2309.17453): a query sees the first ``sinks`` tokens and the last
``window - sinks`` ones, and the loss is compared with and without the first. If attention to them is a place to put
what no token needs, evicting them ruins the model though their content says nothing (Llama-2-13B on PG19: perplexity
5158 with 0 + 1024 tokens, 5.40 with 4 + 1020). The null keeps as many other early tokens in their place.

A row loses the weight of evicted keys and is divided by what is left of its denominator, which is softmax over the keys that
stay (and the learned sink of a layer that has one).
Positions stay those of the text; the re-indexing of the paper's cache is not done, so that only visibility changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Edit, Model
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import SENTENCE, bundled
from workbench.probes.hidden_keys import without_keys
from workbench.probes.sources import prompts_of
from workbench.results import Result, axis
from workbench.run import Provenance, Run
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_LIMIT = 2**28


@dataclass(frozen=True)
class Eviction(Result):
    """``loss`` ``[S, N]``: mean loss in nats of N texts, over the tokens that a window evicts something from, with
    ``sinks[s]`` first tokens kept; ``null`` ``[S, R, N]`` with as many other early tokens, NaN for none; ``base``
    ``[N]`` with all."""

    sinks: tuple[int, ...]
    window: int
    loss: Tensor
    null: Tensor
    base: Tensor
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    def frame(self) -> pd.DataFrame:
        """One row per number of sinks: ``sinks, window, loss, low, high, perplexity, null, base``; the interval is over
        texts."""
        import pandas as pd

        low, high = interval(self.loss.T)
        return pd.DataFrame(
            {
                "sinks": self.sinks,
                "window": self.window,
                "loss": self.loss.mean(1).numpy(),
                "low": low.numpy(),
                "high": high.numpy(),
                "perplexity": self.loss.mean(1).exp().numpy(),
                "null": self.null.mean((1, 2)).numpy(),
                "base": float(self.base.mean()),
            }
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Loss by number of kept first tokens, beside other early tokens and the whole text."""
        table = self.frame()
        ax = axis(ax, 4.6, 3.2)
        places = range(len(self.sinks))
        ax.plot(places, table["loss"], marker="o", label="first tokens kept")
        ax.plot(places, table["null"], marker="x", linestyle="--", color="0.5", label="other early tokens kept")
        ax.axhline(float(self.base.mean()), color="0.7", label="everything kept")
        ax.set_xticks(list(places), [str(s) for s in self.sinks])
        ax.set(xlabel=f"kept, of a window of {self.window} tokens", ylabel="loss, nats", title=self.provenance.model)
        ax.legend()
        return ax


@torch.no_grad()
def eviction(
    model: Model,
    inputs: Any,
    *,
    window: int,
    sinks: Sequence[int] = (0, 1, 2, 4),
    random: int = 4,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> Eviction:
    """Loss with a window of ``window`` tokens of which the first of the text take ``sinks`` places.

    ``inputs`` are texts longer than the window. The null keeps, in ``random`` draws, as many tokens drawn between the
    first largest number of sinks and the first evicted query. Needs a model whose pattern can be edited: native softmax
    mixers, Hugging Face models in eager attention. ``layers`` restricts where tokens are evicted. The patterns are as
    large as the square of the text.
    """
    kept = tuple(sinks)
    if not kept or min(kept) < 0 or window <= max(kept):
        raise WorkbenchError(f"sinks are numbers of tokens from 0 on, all fewer than the window; got {kept}, {window=}")
    if not model.shape.causal:
        raise Refused(f"{model.name} sees the next token; its loss says nothing")
    plain = model.run(prompts_of(inputs))
    tokens = plain.tokens
    length = tokens.ids.shape[1]
    if int(tokens.mask.sum(1).min()) <= window + 1:
        raise WorkbenchError(
            f"a window of {window} tokens evicts nothing from a text of {int(tokens.mask.sum(1).min())}"
        )
    shape = model.shape
    if len(tokens.ids) * shape.heads * length**2 > _LIMIT:
        raise Refused(f"patterns of {length} tokens are too large to edit; use fewer or shorter texts")
    first = tokens.mask.int().argmax(1)
    place = torch.arange(length) - first[:, None]  # position from the first real token
    chosen = range(shape.layers) if layers is None else layers
    generator = torch.Generator().manual_seed(seed)

    def loss(keep: Tensor, count: int) -> Tensor:
        """Mean loss with ``keep`` ``[B, T]`` always visible, in a window with ``count`` places less."""
        apart = place[:, :, None] - place[:, None]
        seen = (apart < window - count) | keep[:, None]

        def edit(pattern: Tensor) -> Tensor:
            return without_keys(pattern, seen[:, None])

        edits: dict[Site | str, Edit | Tensor] = {Site("pattern", layer): edit for layer in chosen}
        return _late_loss(model.run(tokens, edit=edits), place, window)

    found, nulls = [], []
    for count in kept:
        found.append(loss((place >= 0) & (place < count), count))
        draws = []
        for _ in range(random):
            noise = torch.rand(place.shape, generator=generator)
            others = (place >= max(kept)) & (place <= window)
            order = noise.masked_fill(~others, 2.0).argsort(1).argsort(1)
            draws.append(loss(others & (order < count), count) if count else torch.full((len(place),), float("nan")))
        nulls.append(torch.stack(draws).double())
    base = _late_loss(plain, place, window)
    return Eviction(kept, window, torch.stack(found), torch.stack(nulls), base, plain.provenance)


def _late_loss(run: Run, place: Tensor, window: int) -> Tensor:
    """Mean loss of each text over predictions by queries that something was evicted from."""
    if run.logits is None:
        raise Refused("eviction is measured by the loss; this model gives no logits")
    ids = run.tokens.ids[:, 1:].to(run.logits.device)
    each = -run.logits[:, :-1].float().log_softmax(-1).gather(-1, ids[..., None].long())[..., 0].double().cpu()
    late = (place[:, :-1] >= window) & run.tokens.mask[:, 1:].cpu()
    return (each * late).sum(1) / late.sum(1)


ANALYSES = (
    Analysis(
        name="eviction",
        question="What happens to the loss when the sink is evicted?",
        function=eviction,
        example=lambda: {"model": bundled(), "inputs": [SENTENCE], "window": 6, "sinks": (0, 1), "random": 2},
        paper="Xiao et al. 2023 (arXiv 2309.17453), section 3",
        source="model",
        null="as many other early tokens kept in the place of the first",
        cause="is the intervention: keys are hidden",
        definition="positions stay those of the text, where the paper numbers the tokens of its cache anew",
    ),
)
