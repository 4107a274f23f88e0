"""Does a sink mark the tokens that attend to it?

Catch, tag, release (Zhang et al., arXiv 2502.00919): a sink catches a segment of tokens, writes its value into each of
them as a common tag, and a later layer reads the tag. Here, for the first token as the sink s of a head:

    caught      part of the tokens that give s more than half of their attention
    tag_share   sum (z_t . v)^2 / sum |z_t|^2 over caught tokens, v the unit value of s: how much of what they get is the tag
    readable    probability that a caught token's residual stream, before the last layer, lies further along W_O v_s than
                that of a token that was not caught (AUC)

Caught tokens get the tag by construction of attention; the claim is in the other two, and in ``untag``, which removes
it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.captures import capture
from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Edit, Model
from workbench.probes.ablation import divergence
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import SENTENCE, bundled, bundled_run
from workbench.probes.sources import prompts_of, read_site
from workbench.probes.tables import HeadTable
from workbench.results import Result, axis
from workbench.run import Provenance, Run
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

READS = ("blocks.{l}.attn.hook_z", "blocks.{l}.attn.hook_v", "blocks.{l}.attn.hook_result", "blocks.{l}.hook_resid_pre")
_FEWEST = 3


def tagging(run: Run, *, more: float = 0.5, seed: int = 0) -> HeadTable:
    """Per head of all but the last layer: ``caught``, ``tag_share`` and ``readable``, over the real tokens after the
    first of all sequences together.

    ``run`` has captured maps and read ``hook_z``, ``hook_v``, ``hook_result`` and ``hook_resid_pre`` of its layers. The
    null of ``tag_share`` is that of the tokens that were not caught, that of ``readable`` the AUC along a random
    direction (turned to be at least one half). Both are NaN with fewer than three caught or uncaught tokens.
    """
    if not 0 < more < 1:
        raise WorkbenchError(f"more is the attention from which a token counts as caught, in (0, 1); got {more}")
    layers = [layer for layer in run.maps if isinstance(layer, int)]
    if len(layers) < 2:
        raise WorkbenchError(f"a tag is read by a later layer: capture two or more; this run has {list(run.maps)}")
    generator = torch.Generator().manual_seed(seed)
    later = read_site(run, "resid_pre", layers[-1]).cpu().double()
    real = run.tokens.mask.cpu()
    first = real.int().argmax(1)
    counted = real & (torch.arange(real.shape[1]) != first[:, None])
    values: dict[str, dict[int | str, Tensor]] = {name: {} for name in ("readable", "tag_share", "caught")}
    null: dict[str, dict[int | str, Tensor]] = {name: {} for name in ("readable", "tag_share")}
    undefined = {}
    for layer in layers[:-1]:
        z, v, result = (read_site(run, kind, layer).cpu().double() for kind in ("z", "v", "result"))
        marks = _caught(run, layer, first, more) & counted[:, None]
        rest = ~marks & counted[:, None]
        each = torch.arange(len(first))
        value = v[each, first].repeat_interleave(z.shape[2] // v.shape[2], 1)  # [B, H, E]
        written = result[each, first]  # the first token sees itself alone, so its output is W_O v
        share = (z * (value / value.norm(dim=-1, keepdim=True))[:, None]).sum(-1).square().transpose(1, 2)
        size = z.square().sum(-1).transpose(1, 2)
        along = torch.einsum("btd,bhd->bht", later, written)
        blind = torch.einsum(
            "btd,hd->bht", later, torch.randn(*written.shape[1:], generator=generator, dtype=torch.float64)
        )
        found: dict[str, list[float]] = {key: [] for key in ("caught", "own", "other", "auc", "chance")}
        for h in range(z.shape[2]):
            caught, others = marks[:, h], rest[:, h]
            enough = min(int(caught.sum()), int(others.sum())) >= _FEWEST
            found["caught"].append(float(caught.sum() / counted.sum()))
            found["own"].append(float(share[:, h][caught].sum() / size[:, h][caught].sum()) if enough else float("nan"))
            found["other"].append(
                float(share[:, h][others].sum() / size[:, h][others].sum()) if enough else float("nan")
            )
            found["auc"].append(_auc(along[:, h], caught, others) if enough else float("nan"))
            chance = _auc(blind[:, h], caught, others) if enough else float("nan")
            found["chance"].append(max(chance, 1 - chance))
            if not enough:
                undefined[f"{layer}.{h}"] = (
                    f"{int(caught.sum())} tokens caught, {int(others.sum())} not; three of each needed"
                )
        numbers = {key: torch.tensor(row, dtype=torch.float64) for key, row in found.items()}
        values["caught"][layer], values["tag_share"][layer] = numbers["caught"], numbers["own"]
        values["readable"][layer], null["readable"][layer] = numbers["auc"], numbers["chance"]
        null["tag_share"][layer] = numbers["other"]
    units = {"readable": "AUC", "tag_share": "part of the squared norm", "caught": "part of the tokens"}
    return HeadTable("Tags of the first token", values, units, {}, {}, null, undefined, run.provenance)


@dataclass(frozen=True)
class Untagged(Result):
    """``kl`` ``[N]``: how far the prediction of each text moves, in nats per token, without the tag of head ``head``;
    ``random`` ``[R, N]``: as far, in length, along random directions."""

    head: tuple[int, int]
    caught: int
    kl: Tensor
    random: Tensor
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    def frame(self) -> pd.DataFrame:
        """One row: ``layer, head, caught, kl, low, high, random``."""
        import pandas as pd

        low, high = interval(self.kl)
        row = {"layer": self.head[0], "head": self.head[1], "caught": self.caught, "kl": float(self.kl.mean())}
        return pd.DataFrame([row | {"low": float(low), "high": float(high), "random": float(self.random.mean())}])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Both divergences."""
        ax = axis(ax, 3.4, 3.0)
        ax.bar(
            ["tag", "random direction"], [float(self.kl.mean()), float(self.random.mean())], color=["tab:red", "0.6"]
        )
        ax.set(ylabel="KL from the model, nats", title=f"head {self.head[0]}.{self.head[1]}\n{self.provenance.model}")
        return ax


@torch.no_grad()
def untag(
    model: Model, inputs: Any, head: tuple[int, int], *, more: float = 0.5, random: int = 8, seed: int = 0
) -> Untagged:
    """Take the part along the first token's value out of the head's output at the tokens it caught.

    The random control takes as much away along random directions of the head's space. Raises ``Refused`` if no token is
    caught.
    """
    layer, h = head
    site, values = Site("z", layer), Site("v", layer)
    plain = model.run(prompts_of(inputs), read=[site, values], maps=capture(layers=layer))
    first = plain.tokens.mask.cpu().int().argmax(1)
    counted = plain.tokens.mask.cpu() & (torch.arange(plain.tokens.mask.shape[1]) != first[:, None])
    marks = _caught(plain, layer, first, more)[:, h] & counted
    if not bool(marks.any()):
        raise Refused(
            f"head {layer}.{h} catches no token: none gives the first one more than {more:g} of its attention"
        )
    z, v = plain.acts[site][:, :, h], plain.acts[values]
    group = h * v.shape[2] // model.shape.heads
    tag = torch.nn.functional.normalize(v[torch.arange(len(first)), first, group].float(), dim=-1)
    part = (z.float() * tag[:, None]).sum(-1, keepdim=True) * marks[..., None].to(z.device)
    generator = torch.Generator().manual_seed(seed)

    def moved(direction: Tensor) -> Tensor:
        def edit(output: Tensor) -> Tensor:
            return output - (part * direction[:, None]).to(output.dtype)

        edits: dict[Site | str, Edit | Tensor] = {Site("z", layer, h): edit}
        return divergence(model.run(plain.tokens, edit=edits), plain)

    others = []
    for _ in range(random):
        noise = torch.randn(tag.shape, generator=generator).to(tag.device)
        others.append(moved(torch.nn.functional.normalize(noise, dim=-1)))
    return Untagged((layer, h), int(marks.sum()), moved(tag), torch.stack(others), plain.provenance)


def _caught(run: Run, layer: int, first: Tensor, more: float) -> Tensor:
    """Which tokens give the first real one more than ``more`` of their attention, ``[B, H, T]``."""
    amap = run.maps[layer]
    weights = torch.zeros(amap.shape[0], amap.shape[3], dtype=torch.float64)
    weights[torch.arange(len(first)), first] = 1.0
    return amap.mass(weights).detach().cpu() > more


def _auc(score: Tensor, caught: Tensor, others: Tensor) -> float:
    from sklearn.metrics import roc_auc_score

    values = torch.cat([score[caught], score[others]])
    return float(roc_auc_score([1] * int(caught.sum()) + [0] * int(others.sum()), values.numpy()))


ANALYSES = (
    Analysis(
        name="tagging",
        question="Does a sink mark the tokens that attend to it?",
        function=tagging,
        example=lambda: {"run": bundled_run(read=tuple(s.replace("{l}", str(i)) for i in range(4) for s in READS))},
        paper="Zhang et al. 2025 (arXiv 2502.00919), abstract",
        source="run",
        null="tokens that were not caught, a random direction",
        cause="workbench.probes.sinks.tagging.untag",
        definition="the three numbers are ours; the sink is the first token, and the layer that reads is the last",
        reads=READS,
    ),
    Analysis(
        name="untag",
        question="Does the output need the tag that a head writes?",
        function=untag,
        example=lambda: {"model": bundled(), "inputs": [SENTENCE], "head": (1, 0), "random": 2},
        paper="Zhang et al. 2025 (arXiv 2502.00919), abstract",
        source="model",
        null="as much taken away along random directions",
        cause="is the intervention: the tag is taken out of the head's output",
        definition="the intervention is ours",
    ),
)
