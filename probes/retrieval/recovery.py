"""Does a head bring back the answer?

The prompt without the needle is run with one head's output (``hook_z``) replaced by what that head gave on the
prompt with the needle (causal recovery, LOCOS, arXiv 2607.01002):

    recovered(h) = m(without needle, head h from the clean run) - m(without needle)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName
from workbench.models.protocol import Edit, Model
from workbench.pairs import Pairs
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled
from workbench.probes.retrieval.trials import by_position
from workbench.probes.tables import HeadTable
from workbench.run import Provenance
from workbench.sites import Site

PLACES = ("answer", "all")
MEASURES = ("log_probability", "logit", "share")
_UNIT = {
    "log_probability": "log probability recovered (nats)",
    "logit": "logit difference recovered",
    "share": "part of the lost log probability recovered",
}
_LOST = 1e-3
NOTHING_LOST = "the answer is no less probable without the needle in any example, so that there is nothing to recover"


@torch.no_grad()
def recovery(model: Model, pairs: Pairs | Sequence[Pairs], *, place: str = "answer") -> HeadTable:
    """What patching one head's clean output into the run on ``pairs.corrupt`` brings back, mean over examples with 95% intervals.

    ``log_probability``: of the accepted answers together, in nats (the published measure). ``logit``: mean logit of the answers
    minus the largest other logit of the corrupted run. ``share``: recovered log probability as a part of what the corruption
    took; 1 is all of it, examples that lost less than 0.001 nats are left out. ``place``: patch at the answer's position
    (``answer``) or at every position (``all``, as published). The null of a head is the mean over the other heads of its layer:
    a random head of the same layer. One run per head.
    """
    if place not in PLACES:
        raise UnknownName("place of the patch", place, PLACES)
    layers = range(model.shape.layers)
    sites = [Site("z", layer) for layer in layers]
    heads = model.shape.heads
    rows: list[Tensor] = []
    provenance = Provenance("unknown")
    for part in by_position(pairs):
        at = int(part.position[0])
        clean_ids, corrupt_ids = part.clean[:, : at + 1], part.corrupt[:, : at + 1]
        clean = model.run(clean_ids, read=sites, logits="last")
        corrupt = model.run(corrupt_ids, logits="last")
        provenance = clean.provenance
        rival = _logits(corrupt.logits).masked_fill(_accepted(part, corrupt.logits), float("-inf")).argmax(-1)
        base = _measures(corrupt.logits, part, rival)  # [B, 2]
        lost = _measures(clean.logits, part, rival) - base
        found = torch.empty(len(part), len(MEASURES), len(layers), heads, dtype=torch.float64)
        for layer in layers:
            for head in range(heads):
                edit: dict[Site | str, Edit | Tensor] = {
                    Site("z", layer, head): _patch(clean.acts[Site("z", layer)][:, :, head], place)
                }
                gained = _measures(model.run(corrupt_ids, edit=edit, logits="last").logits, part, rival) - base
                share = torch.where(lost[:, 0] > _LOST, gained[:, 0] / lost[:, 0].clamp(min=_LOST), float("nan"))
                found[:, :, layer, head] = torch.cat([gained, share[:, None]], 1)
        rows.append(found)
    values = torch.cat(rows)
    mean = values.nanmean(0)
    others = (mean.sum(-1, keepdim=True) - mean) / (heads - 1) if heads > 1 else torch.full_like(mean, float("nan"))

    return HeadTable.averaged(
        "Recovery of the answer by one head",
        {name: {layer: values[:, i, layer] for layer in layers} for i, name in enumerate(MEASURES)},
        _UNIT,
        null={name: {layer: others[i, layer] for layer in layers} for i, name in enumerate(MEASURES)},
        undefined={"share": NOTHING_LOST} if bool(mean[2].isnan().all()) else {},
        provenance=provenance,
    )


def _patch(clean: Tensor, place: str) -> Edit:
    def edit(output: Tensor) -> Tensor:
        if place == "all":
            return clean.to(output)
        patched = output.clone()
        patched[:, -1] = clean[:, -1].to(output)
        return patched

    return edit


def _logits(logits: Tensor | None) -> Tensor:
    if logits is None:
        raise Refused("recovery compares logits; this model gives none")
    return logits[:, -1].detach().double().cpu()


def _accepted(pairs: Pairs, logits: Tensor | None) -> Tensor:
    """Which tokens are accepted answers, bool ``[B, V]``."""
    vocab = _logits(logits).shape[1]
    answer = pairs.answer.cpu()
    answer = answer.masked_fill(answer < 0, vocab)
    return torch.zeros(len(pairs), vocab + 1, dtype=torch.bool).scatter(1, answer, True)[:, :vocab]


def _measures(logits: Tensor | None, pairs: Pairs, rival: Tensor) -> Tensor:
    """Log probability of the answers and their mean logit above the rival's, ``[B, 2]``."""
    last, accepted = _logits(logits), _accepted(pairs, logits)
    logp = last.log_softmax(-1).masked_fill(~accepted, float("-inf")).logsumexp(-1)
    mean = (last * accepted).sum(-1) / accepted.sum(-1)
    return torch.stack([logp, mean - last.gather(1, rival[:, None])[:, 0]], 1)


def _without_needle() -> Pairs:
    import workbench as wb

    model = bundled("compiled-needle")
    return wb.task("needle", length=64, depth=0.5, corruption="filler", split="test").build(0, model.tokenizer, 4)


ANALYSES = (
    Analysis(
        name="recovery",
        question="Which heads bring back the answer in a prompt without the needle?",
        function=recovery,
        example=lambda: {"model": bundled("compiled-needle"), "pairs": _without_needle()},
        paper="LOCOS 2026 (arXiv 2607.01002), causal retrieval importance",
        source="model",
        null="a random head of the same layer",
        cause="recovery",
        definition="the patch is at the answer's position by default (published: everywhere)",
    ),
)
