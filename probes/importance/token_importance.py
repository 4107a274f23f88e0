"""Which tokens does attention keep coming back to, and what would be lost without the others?

SpAtten's rule (arXiv 2012.09852): the importance of a token is the attention it has received from all queries of all heads,
summed over the layers so far; each layer keeps a share of the tokens that are left, by importance, and dropped ones never
come back. The simulation runs over captured maps: it says which tokens survive and what share of each layer's attention went
to survivors. That is mass, not the model's loss, which ``token_pruning`` measures. Importance by received mass always keeps
attention sinks, which receive much and say little: a token is flagged if it is the first, or receives more than half of all
attention of some head. In causal attention early tokens receive more because more queries see them: ``null`` is what a token
would receive if every query spread its weight evenly. While a model writes, importance is added up over the steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.captures import capture
from workbench.errors import Refused, WorkbenchError
from workbench.models.generation import generate
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import SENTENCE, bundled, random_maps
from workbench.probes.sources import Source, maps_of, provenance_of
from workbench.probes.tables import TokenTable
from workbench.probes.visibility import visibility
from workbench.results import Result, axis
from workbench.run import Generation, Provenance, Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class TokenImportance(Result):
    """``importance`` ``[L, K]``: mass received up to each layer, from all heads and queries; ``survives`` ``[L, K]``: whether
    the token is still there after the layer; ``recall`` ``[L]``: the share of the layer's attention that goes to tokens that
    were there before it; ``null`` ``[L, K]``: importance under evenly spread attention; ``heads`` layer -> ``[H]``: mean absolute
    output of each head, where the run read ``z``; ``sink`` ``[K]``."""

    importance: Tensor
    survives: Tensor
    recall: Tensor
    sink: Tensor
    null: Tensor
    layers: tuple[int | str, ...]
    tokens: tuple[str, ...]
    heads: Mapping[int | str, Tensor] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def frame(self) -> pd.DataFrame:
        """One row per layer and token: ``layer, position, token, importance, importance_null, survives, sink,
        recall``."""
        import pandas as pd

        return pd.DataFrame(
            {
                "layer": layer, "position": j, "token": self.tokens[j] if self.tokens else "",
                "importance": float(self.importance[i, j]), "importance_null": float(self.null[i, j]),
                "survives": bool(self.survives[i, j]), "sink": bool(self.sink[j]), "recall": float(self.recall[i]),
            }
            for i, layer in enumerate(self.layers)
            for j in range(self.importance.shape[1])
        )  # fmt: skip

    def plot(self, ax: Axes | None = None) -> Axes:
        """Importance by layer and token, on a logarithmic scale; what is dropped is empty."""
        ax = axis(ax, 1.5 + 0.2 * self.importance.shape[1], 1.4 + 0.35 * len(self.layers))
        shown = self.importance.clamp(min=1e-6).log10().masked_fill(~self.survives, float("nan"))
        image = ax.imshow(shown.numpy(), aspect="auto", cmap="magma", interpolation="nearest")
        ax.set_yticks(range(len(self.layers)), [str(x) for x in self.layers])
        ax.set(xlabel="token", ylabel="layer")
        ax.figure.colorbar(image, ax=ax, label="log10 of mass received so far")
        return ax


def token_importance(source: Source, *, keep: float = 1.0) -> TokenImportance:
    """Importance and cascade pruning over the layers of a run of one sequence, or of its maps.

    After every layer the ``keep`` best of the tokens that are left survive, rounded up; queries that are dropped stop voting.
    Refused for batches, padding, signed and channel maps. Maps are walked by rows: nothing of size Q x K is held.
    """
    _check_keep(keep)
    maps = maps_of(source)
    run = source if isinstance(source, Run) else None
    layers = tuple(maps)
    keys = {maps[layer].shape[2:] for layer in layers}
    first = maps[layers[0]]
    n = first.shape[3]
    padded = run is not None and run.tokens.ids.shape[1] and not bool(run.tokens.mask.all())
    if first.shape[0] != 1 or padded:
        raise Refused(f"importance is that of one sequence without padding; this run has a batch of {first.shape[0]}")
    if len(keys) != 1 or first.shape[2] != n:
        raise Refused(f"pruning cascades over one set of tokens; maps are {sorted(map(list, keys))}")
    alive = torch.ones(n, dtype=torch.bool)
    total = torch.zeros(n, dtype=torch.float64)
    sink = torch.zeros(n, dtype=torch.bool)
    sink[0] = True
    even = torch.zeros(n, dtype=torch.float64)
    importance, survives, recall, null = [], [], [], []
    for layer, amap in maps.items():
        _check_map(layer, amap)
        kept = amap.mass(alive.to(torch.float64))[0].double().cpu()
        recall.append(float(kept[:, alive].sum() / amap.row_sums()[0].double().cpu()[:, alive].sum().clamp(min=1e-300)))
        received = _columns(amap, alive.double())
        sink |= (received / alive.sum() > 0.5).any(0)
        total = total + received.sum(0) * alive
        even = even + _even(amap, alive) * alive
        importance.append(total.clone())
        null.append(even.clone())
        count = math.ceil(int(alive.sum()) * keep - 1e-9)
        order = total.masked_fill(~alive, -1.0).argsort(descending=True, stable=True)[:count]
        alive = torch.zeros_like(alive).index_fill(0, order, True)
        survives.append(alive.clone())
    served = {str(site) for site in run.acts} if run is not None else set()
    heads = {
        layer: run.acts[f"blocks.{layer}.attn.hook_z"][0].double().abs().mean((0, 2)).cpu()
        for layer in layers
        if run is not None and f"blocks.{layer}.attn.hook_z" in served
    }
    labels = run.tokens.labels[0] if run is not None and run.tokens.labels else ()
    shares = torch.tensor(recall, dtype=torch.float64)
    numbers = torch.stack(importance), torch.stack(survives), shares, sink, torch.stack(null)
    return TokenImportance(*numbers, layers, labels, heads, provenance_of(source))


def generated_importance(
    generation: Generation, *, keep: float = 1.0, start: TokenImportance | None = None
) -> TokenTable:
    """Importance of the tokens of a prompt and its continuation, added up over the steps of writing.

    At every step the rows of all layers and heads vote, as captured, for the keys that are left; then the ``keep`` share of the
    tokens so far that are best stays, rounded up, and dropped ones never come back. Measures, each ``[B, T + S]`` (the last token
    was never a key: NaN): ``importance``; ``dropped``, the step (from 1) at which the token went, NaN if it stayed; ``sink``, 1
    for the first real token and those with more than half of a head's attention over all steps. ``start``: the importance of the
    prompt's own tokens, from ``token_importance`` of a run of it (one sequence), to which the steps add. ``null``: every row
    spread evenly over the keys it still sees.
    """
    _check_keep(keep)
    if not generation.maps:
        raise WorkbenchError("this generation captured no attention; generate again with maps=wb.capture()")
    batch, length = generation.tokens.ids.shape
    keys, steps = length - 1, length - generation.prompt
    real = generation.tokens.mask.cpu()
    total, even = (torch.zeros(batch, keys, dtype=torch.float64) for _ in range(2))
    if start is not None:
        if batch != 1 or start.importance.shape[1] != generation.prompt:
            raise WorkbenchError(
                f"start is the importance of the prompt's {generation.prompt} tokens, for a batch of one; got "
                f"{start.importance.shape[1]} tokens and a batch of {batch}"
            )
        total[0, : generation.prompt], even[0, : generation.prompt] = start.importance[-1], start.null[-1]
    written = real[:, generation.prompt :]
    votes = torch.zeros(batch, steps, keys, dtype=torch.float64)
    sink = torch.arange(keys) == real.int().argmax(1)[:, None]
    for layer, amap in generation.maps.items():
        _check_map(layer, amap)
        if tuple(amap.shape[2:]) != (steps, keys):
            raise Refused(
                f"layer {layer!r} holds {list(amap.shape[2:])} rows and keys; {steps} steps over {keys} keys vote"
            )
        rows = (
            amap.rows(0, steps).detach().double().cpu() * written[:, None, :, None]
        )  # a text that has ended does not vote
        votes += rows.sum(1)
        sink |= (rows.sum(2) / written.sum(1)[:, None, None] > 0.5).any(1)
    voters = sum(amap.shape[1] for amap in generation.maps.values())
    alive = real[:, :keys].clone()
    dropped = torch.full((batch, length), float("nan"), dtype=torch.float64)
    for step in range(steps):
        so_far = torch.arange(keys) < generation.prompt + step
        voting = written[:, step, None]
        here = alive & so_far
        total += votes[:, step] * here
        even += here / here.sum(1, keepdim=True).clamp(min=1) * voters * voting
        count = (keep * (real[:, :keys] & so_far).sum(1) - 1e-9).ceil().long()
        place = total.masked_fill(~here, -1.0).argsort(stable=True, dim=1, descending=True).argsort(dim=1)
        gone = here & (place >= count[:, None]) & voting
        dropped[:, :keys][gone] = step + 1
        alive &= ~gone
    blank = torch.full((batch, 1), float("nan"), dtype=torch.float64)
    hidden = ~real[:, :keys]
    measures = {
        "importance": total.masked_fill(hidden, float("nan")),
        "sink": sink.double().masked_fill(hidden, float("nan")),
    }
    values = {name: torch.cat([value, blank], 1) for name, value in measures.items()}
    return TokenTable(
        title=f"Token importance while writing, keeping {keep:g}",
        values={"importance": values["importance"], "dropped": dropped, "sink": values["sink"]},
        units={"importance": "attention received", "dropped": "step", "sink": "1 if a sink"},
        tokens=generation.tokens.labels,
        null={"importance": torch.cat([even.masked_fill(hidden, float("nan")), blank], 1)},
        undefined={"importance": "the last token was never a key", "dropped": "the token stayed"},
        provenance=generation.provenance,
    )


def _check_keep(keep: float) -> None:
    if not 0 < keep <= 1:
        raise WorkbenchError(f"keep is a share of the tokens, in (0, 1]; got {keep}")


def _check_map(layer: int | str, amap: AttentionMap) -> None:
    if amap.sign == "signed" or amap.domain in ("channel", "frequency"):
        raise Refused(f"layer {layer!r}: tokens receive no mass in a {amap.sign} {amap.domain} map")


def _even(amap: AttentionMap, alive: Tensor) -> Tensor:
    """What each key would receive from all heads if the queries that vote spread their weight evenly, ``[K]``."""
    seen = visibility(amap, real=alive[None])
    keys = seen.keys()
    spread = seen.spread(torch.where(keys > 0, 1 / keys.clamp(min=1), 0.0)).expand(1, amap.shape[1], -1)
    return spread[0].sum(0)


def _columns(amap: AttentionMap, voters: Tensor) -> Tensor:
    """Mass each key receives from the voting queries ``[Q]``, ``[H, K]``."""
    weight = voters.view(1, 1, -1, 1)
    total: Tensor | None = None
    for lo, hi, rows in amap._chunks():
        part = (rows.double() * weight[:, :, lo:hi].to(rows.device)).sum(2)[0].cpu()
        total = part if total is None else total + part
    assert total is not None
    return total


def _example() -> dict[str, Any]:
    model = bundled()
    return {"generation": generate(model, SENTENCE, 4, maps=capture()), "keep": 0.7}


ANALYSES = (
    Analysis(
        name="token-importance",
        question="Which tokens does attention keep coming back to?",
        function=token_importance,
        example=lambda: {"source": random_maps(), "keep": 0.7},
        paper="Wang et al. 2021, SpAtten (arXiv 2012.09852)",
        source="maps",
        null="evenly spread attention",
        cause="token_pruning hides the tokens that are dropped",
        definition="from memory of the paper: attention received, summed over heads, queries, layers; flags of sinks are ours",
    ),
    Analysis(
        name="generated-importance",
        question="Which tokens of the prompt does a model come back to while it writes?",
        function=generated_importance,
        example=_example,
        paper="Wang et al. 2021, SpAtten (arXiv 2012.09852)",
        source="model",
        null="evenly spread attention",
        definition="as token-importance, added up over steps; the share kept is of all tokens so far",
    ),
)
