"""Does a text turn out differently when an anchor is changed?

The causal side of reading rhythm (Li et al., arXiv 2510.13554, section 4): one token of a response is exchanged for another, the
model writes on from there, and the tokens of both continuations are compared by the Jaccard index of their sets. Exchanging the
tokens with the largest FAI should change more (a smaller index) than exchanging those with the smallest. The published means are
.534 and .631 (Qwen3-4B-Base on GSM8K, temperature 0.7).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.captures import capture
from workbench.errors import Refused, WorkbenchError
from workbench.models.generation import generate
from workbench.models.protocol import Model, Tokens
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled
from workbench.probes.rhythm.rhythm import rhythm
from workbench.probes.sources import prompts_of
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

GROUPS = ("largest", "smallest")


@dataclass(frozen=True)
class Perturbation(Result):
    """Per exchanged token: its ``position`` in the text, its ``group`` (of those with the ``largest`` or the ``smallest`` FAI),
    its ``fai``, and the ``jaccard`` index of the continuations with and without the exchange."""

    sequence: tuple[int, ...]
    position: tuple[int, ...]
    group: tuple[str, ...]
    fai: Tensor
    jaccard: Tensor
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    def frame(self) -> pd.DataFrame:
        """One row per exchange: ``sequence, position, group, fai, jaccard``."""
        import pandas as pd

        columns = {"sequence": self.sequence, "position": self.position, "group": self.group}
        return pd.DataFrame(columns | {"fai": self.fai.numpy(), "jaccard": self.jaccard.numpy()})

    def mean(self, group: str) -> tuple[float, float, float]:
        """Mean Jaccard index of a group and its 95% interval over exchanges."""
        values = self.jaccard[torch.tensor([name == group for name in self.group])]
        low, high = interval(values)
        return float(values.mean()), float(low), float(high)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Mean Jaccard index of both groups."""
        ax = axis(ax, 3.6, 3.0)
        found = [self.mean(group) for group in GROUPS]
        spread = [[max(0.0, m - low) for m, low, _ in found], [max(0.0, high - m) for m, _, high in found]]
        ax.bar(GROUPS, [m for m, _, _ in found], yerr=spread, capsize=4, ecolor="grey", color=["tab:green", "0.6"])
        ax.set(ylabel="Jaccard index of the continuations", xlabel="FAI of the exchanged tokens", ylim=(0, 1))
        ax.set_title(self.provenance.model)
        return ax


@torch.no_grad()
def perturbation(
    model: Model,
    inputs: Any,
    *,
    steps: int = 64,
    exchanges: int = 4,
    clip: tuple[int, int] = (10, 50),
    ahead: int = 20,
) -> Perturbation:
    """Exchange the tokens of a response with the largest and the smallest FAI, one at a time, and write on greedily.

    ``inputs``: prompts, whose response of ``steps`` tokens the model writes first. ``exchanges`` tokens of each group and prompt
    are exchanged for the model's second choice at their place, the same rule for both groups, so that the change itself is no
    larger in one of them. The ``ahead`` tokens after an exchange are compared, the same number for all, and tokens with fewer
    after them are no candidates. Raises ``Refused`` if a response is too short.
    """
    if steps <= ahead or exchanges < 1 or ahead < 1:
        raise WorkbenchError(
            f"steps is larger than ahead, exchanges and ahead at least 1; got {steps=}, {exchanges=}, {ahead=}"
        )
    written = generate(model, prompts_of(inputs), steps)
    sequence, position, group, scores, found = [], [], [], [], []
    for b in range(len(written.tokens.ids)):
        ids = written.tokens.ids[b][written.tokens.mask[b]]
        prompt = int(written.tokens.mask[b, : written.prompt].sum())
        run = model.run(ids[None], maps=capture())
        assert run.logits is not None
        fai = rhythm(run, prompt=prompt, clip=clip).values["fai"][0]
        fai[max(0, len(ids) - ahead) :] = float("nan")
        order = fai.nan_to_num(float("inf")).argsort()[: int((~fai.isnan()).sum())].tolist()
        if len(order) < 2 * exchanges:
            raise Refused(
                f"response {b} has {len(order)} tokens with an FAI and {ahead} tokens after them, {2 * exchanges} are needed: "
                "ask for more steps or fewer exchanges"
            )
        chosen = order[-exchanges:] + order[:exchanges]
        second = run.logits[0, torch.tensor(chosen) - 1].topk(2).indices.cpu()
        others = torch.where(second[:, 0] == ids[chosen].cpu(), second[:, 1], second[:, 0])
        texts = [torch.cat([ids[:place].cpu(), other[None]]) for place, other in zip(chosen, others, strict=True)]
        again = generate(model, _together(texts), ahead)
        for i, place in enumerate(chosen):
            new = again.new[i][again.tokens.mask[i, again.prompt :]]
            sequence.append(b)
            position.append(place)
            group.append(GROUPS[i >= exchanges])
            scores.append(float(fai[place]))
            found.append(_jaccard(ids[place + 1 : place + 1 + ahead], new))
    weights, indices = (torch.tensor(x, dtype=torch.float64) for x in (scores, found))
    return Perturbation(tuple(sequence), tuple(position), tuple(group), weights, indices, run.provenance)


def _together(texts: list[Tensor]) -> Tokens:
    """Texts of different lengths as one batch, padded on the left."""
    longest = max(map(len, texts))
    ids = torch.stack([torch.nn.functional.pad(text, (longest - len(text), 0)) for text in texts])
    mask = torch.stack([torch.arange(longest) >= longest - len(text) for text in texts])
    return Tokens(ids, mask)


def _jaccard(one: Tensor, other: Tensor) -> float:
    a, b = set(one.tolist()), set(other.tolist())
    return len(a & b) / len(a | b) if a | b else 1.0


ANALYSES = (
    Analysis(
        name="perturbation",
        question="Does a text turn out differently when an anchor is changed?",
        function=perturbation,
        example=lambda: {
            "model": bundled(),
            "inputs": ["The clever lawyer travelled to the"],
            "steps": 40,
            "exchanges": 2,
            "clip": (2, 20),
            "ahead": 12,
        },
        paper="Li et al. 2025 (arXiv 2510.13554), section 4",
        source="model",
        null="the tokens with the smallest FAI",
        cause="is the intervention: tokens are exchanged",
        definition="the exchanged token becomes the model's second choice; continuations are greedy",
    ),
)
