"""Does the prediction survive without the tokens that importance would drop?

The least important tokens are hidden as keys in every layer and head: their attention weights are set to zero and the rest of
each row scaled up again, so that all other tokens behave as if those were not there while positions stay. The prediction at the
end is watched, beside hiding as many random tokens, and hiding the most important ones. The token whose own prediction is watched
is never hidden.

Importance is the attention ``received``, summed over heads, queries and layers (SpAtten, arXiv 2012.09852). In causal attention
that favours early tokens, which more queries see: ``relative`` importance divides by what evenly spread attention would give,
and ``asked`` counts the votes of the watched token alone, as in one step of writing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.captures import capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Edit, Model
from workbench.pairs import Pairs
from workbench.probes.ablation import Metric, named_metric
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled, needles
from workbench.probes.hidden_keys import without_keys
from workbench.probes.removal import attention_layers, variations
from workbench.probes.sources import prompts_of
from workbench.probes.visibility import visibility
from workbench.results import Result, axis
from workbench.run import Provenance, Run
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

RULES = ("received", "relative", "asked")


@dataclass(frozen=True)
class TokenPruning(Result):
    """``keep[c]``: share of the tokens that stay; ``hidden`` ``[C, N]``: how many of each of N examples are hidden. ``base``
    ``[N]``, ``least`` and ``most`` ``[C, N]``, ``random`` ``[R, C, N]``: the metric with nothing hidden, and with the least
    important, the most important, and random tokens hidden. ``sink_kept`` ``[C, N]``: whether the first token is among those that
    stay when the least important go."""

    metric: str
    keep: tuple[float, ...]
    hidden: Tensor
    base: Tensor
    least: Tensor
    most: Tensor
    random: Tensor
    sink_kept: Tensor
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    def frame(self) -> pd.DataFrame:
        """One row per share kept: ``keep, hidden, least, least_low, least_high`` (95% over examples), ``most, random`` (mean over
        draws), ``random_low, random_high`` (range over draws), ``base, sink_kept``."""
        import pandas as pd

        low, high = interval(self.least.T)
        draws = self.random.mean(2)
        return pd.DataFrame(
            {
                "keep": self.keep, "hidden": self.hidden.double().mean(1).numpy(),
                "least": self.least.mean(1).numpy(), "least_low": low.numpy(), "least_high": high.numpy(),
                "most": self.most.mean(1).numpy(), "random": draws.mean(0).numpy(),
                "random_low": draws.amin(0).numpy(), "random_high": draws.amax(0).numpy(),
                "base": float(self.base.mean()), "sink_kept": self.sink_kept.double().mean(1).numpy(),
            }
        )  # fmt: skip

    def plot(self, ax: Axes | None = None) -> Axes:
        """The metric over the share of hidden tokens; shaded: range of the random draws."""
        table = self.frame()
        ax = axis(ax, 4.8, 3.2)
        hidden = 1 - table["keep"]
        ax.plot(hidden, table["least"], marker="o", label="least important hidden")
        ax.plot(hidden, table["most"], marker="v", label="most important hidden")
        ax.plot(hidden, table["random"], linestyle="--", color="0.4", label="random hidden")
        ax.fill_between(hidden, table["random_low"], table["random_high"], color="0.4", alpha=0.2, linewidth=0)
        ax.axhline(float(self.base.mean()), color="0.7", linewidth=1)
        ax.set(xlabel="share of tokens hidden", ylabel=self.metric, title=self.provenance.model)
        ax.legend(fontsize=8)
        return ax


@torch.no_grad()
def token_pruning(
    model: Model,
    inputs: Any,
    *,
    keep: Sequence[float] = (0.9, 0.7, 0.5, 0.3),
    importance: str | Tensor = "received",
    metric: str | Metric | None = None,
    random: int = 8,
    seed: int = 0,
) -> TokenPruning:
    """Hide tokens by importance and watch the prediction at the answer, or of the last token.

    ``inputs``: ``Pairs``, or texts of a causal model. ``importance``: ``received``, ``relative`` or ``asked`` (see the module),
    or numbers ``[B, T]``; larger stays longer. ``keep``: the shares of each example's tokens that stay, rounded up. ``metric``:
    with pairs ``probability`` (default), ``accuracy`` or ``logit-difference`` of the answer; for texts the divergence of the last
    real token's prediction from the unpruned one, ``kl`` in nats. The pattern is edited: Hugging Face models need
    attn_implementation="eager".
    """
    if random < 1:
        raise WorkbenchError(f"random is the number of random choices, at least 1; got {random}")
    if not keep or not all(0 < share <= 1 for share in keep):
        raise WorkbenchError(f"keep lists shares of the tokens, in (0, 1]; got {list(keep)}")
    if not model.shape.causal:
        raise Refused(f"{model.name} has no token at the end whose prediction could be watched")
    pairs = inputs if isinstance(inputs, Pairs) else None
    if isinstance(importance, str) and importance not in RULES:
        raise UnknownName("importance", importance, RULES)
    wanted = capture(stats=("received",)) if isinstance(importance, str) else None
    plain = model.run(prompts_of(inputs), maps=wanted)
    real = plain.tokens.mask.cpu()
    batch, length = real.shape
    last = length - 1 - real.flip(1).int().argmax(1) if pairs is None else pairs.position.cpu()
    worth = _importance(plain, importance, last) if isinstance(importance, str) else importance.double().cpu()
    if tuple(worth.shape) != (batch, length):
        raise WorkbenchError(f"importance is [B, T] = {[batch, length]}; got {list(worth.shape)}")
    name, measure = _metric(metric, inputs, last)
    generator = torch.Generator().manual_seed(seed)
    orders = [worth, -worth, *(torch.rand(batch, length, generator=generator) for _ in range(random))]
    hides = [_hidden(order, real, last, share) for order in orders for share in keep]
    layers = attention_layers(model)
    edits: list[dict[Site, Edit]] = [{Site("pattern", layer): _without(hide) for layer in layers} for hide in hides]
    values = torch.stack([measure(run, plain) for run in variations(model, plain, edits)])
    values = values.unflatten(0, (2 + random, len(keep)))
    first = real.int().argmax(1)[:, None]
    least = torch.stack(hides[: len(keep)])
    return TokenPruning(
        metric=name,
        keep=tuple(keep),
        hidden=least.sum(2),
        base=measure(plain, plain),
        least=values[0],
        most=values[1],
        random=values[2:],
        sink_kept=torch.stack([~hide.gather(1, first)[:, 0] for hide in least]),
        provenance=plain.provenance,
    )


def _importance(run: Run, rule: str, last: Tensor) -> Tensor:
    """Attention received over all layers and heads by one of ``RULES``, ``[B, T]`` in float64."""
    total: Any = 0.0
    even: Any = 0.0
    for layer, amap in run.maps.items():
        if amap.sign == "signed" or tuple(amap.shape[2:]) != tuple(run.tokens.ids.shape[1:]) * 2:
            raise Refused(
                f"layer {layer!r}: {amap!r} is no attention that the tokens receive; pass importance= as numbers"
            )
        if rule == "asked":
            rows = [amap.rows(at, at + 1)[b, :, 0].double().cpu().sum(0) for b, at in enumerate(last.tolist())]
            total = total + torch.stack(rows)
            continue
        total = total + amap.received().double().cpu().sum(1)
        if rule == "relative":
            seen = visibility(amap, real=run.tokens.mask, keys=run.tokens.mask)
            keys = seen.keys()
            spread = seen.spread(torch.where(keys > 0, 1 / keys.clamp(min=1), 0.0))
            even = even + spread.expand(len(total), amap.shape[1], -1).sum(1)
    return total / even.clamp(min=1e-12) if rule == "relative" else total


def _hidden(order: Tensor, real: Tensor, last: Tensor, share: float) -> Tensor:
    """The tokens that go, ``[B, T]``: those of lowest order, but padding and the watched token."""
    may = real & (torch.arange(real.shape[1]) != last[:, None])
    count = real.sum(1) - (share * real.sum(1) - 1e-9).ceil().long()
    place = order.masked_fill(~may, float("inf")).argsort(stable=True, dim=1).argsort(dim=1)
    return may & (place < count.clamp(max=may.sum(1))[:, None])


def _without(hide: Tensor) -> Edit:
    """Softmax over the keys that are not hidden; a row that saw nothing else is zero."""
    return lambda pattern: without_keys(pattern, ~hide[:, None, None])


def _metric(metric: str | Metric | None, inputs: Any, last: Tensor) -> tuple[str, Callable[[Run, Run], Tensor]]:
    if isinstance(inputs, Pairs) or callable(metric):
        return named_metric("probability" if metric is None else metric, inputs)
    if metric not in (None, "kl"):
        raise WorkbenchError(
            f"texts are watched by 'kl' or a function of the run; {metric!r} needs the answer of pairs"
        )

    def measure(run: Run, plain: Run) -> Tensor:
        if run.logits is None or plain.logits is None:
            raise Refused(f"predictions are compared by their logits; {plain.provenance.model} gives none")
        at = torch.arange(len(last)), last
        p, q = (logits.cpu()[at].double().log_softmax(-1) for logits in (plain.logits, run.logits))
        return torch.where(p.exp() > 0, p.exp() * (p - q), 0.0).sum(-1)

    return "kl", measure


def _example() -> dict[str, Any]:
    model = bundled("compiled-needle")
    return {"model": model, "inputs": needles(model, 32, 3), "random": 2, "keep": (0.8, 0.4)}


ANALYSES = (
    Analysis(
        name="token-pruning",
        question="Does the prediction survive without the least important tokens?",
        function=token_pruning,
        example=_example,
        paper="Wang et al. 2021, SpAtten (arXiv 2012.09852)",
        source="model",
        null="as many random tokens hidden",
        cause="tokens are hidden from attention in every layer",
        definition="tokens are hidden in all layers at once; SpAtten's cascade hides them from layer to layer",
    ),
)
