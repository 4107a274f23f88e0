"""Do some layers rank the documents by what the question's last tokens attend to?

BlockRank (arXiv 2510.05396) observes in models that rank documents in their context that (1) tokens of a document attend to
their own document and hardly to others, and (2) attention from certain tokens of the question to a document, in middle layers,
follows its relevance. Here

    relevance(d) = mean over heads and over the last ``last`` question tokens of  (mass on d / mass on all documents),

which sums to 1 over the documents; layers are added up. Training sharpens it by a contrastive loss at temperature tau,

    loss = - log( sum over gold d of exp(relevance(d) / tau)  /  sum over all d of exp(relevance(d) / tau) ).

The abstract names the tokens and layers only as "certain" and "middle": the last two tokens and the middle third are our choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
from workbench.mods import Mod
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.masses import mean_masses
from workbench.probes.retrieval.documents import Documents, document_sums, readable
from workbench.probes.sources import Source, maps_of, provenance_of, tokens_of
from workbench.probes.tables import LayerTable
from workbench.probes.visibility import layer_visibility

LAST = 2
TEMPERATURE = 0.05
TOGETHER = "together"
BLIND = "the question's last tokens pay no attention to any document in any example of a layer, so that it ranks none"
ALONE = "no token of a document may see another document"


def block_rank(
    source: Source,
    prompts: Documents,
    layers: Sequence[int | str] | None = None,
    last: int = LAST,
    *,
    raw: bool = False,
    k: int = 10,
) -> LayerTable:
    """Per layer, and for all of them ``together``: ``ndcg`` of the documents ranked by relevance, ``relevance`` of the gold ones
    (part of all document mass), and ``across``, the mass that tokens of a document put on other documents.

    ``source``: a run on ``prompts.ids`` with captured maps, or its maps. ``layers``: by default the middle third of the captured
    ones. Means over examples with 95% bootstrap intervals. Nulls: a random ranking; the gold documents' part of all document
    tokens; evenly spread attention. Question rows are made for ``ndcg`` and ``relevance``, all rows in chunks for ``across``.
    Examples without mass on any document are left out. Gated maps count as they act (``raw=True``: inside the gate), signed ones
    are refused.
    """
    maps = _chosen(maps_of(source), layers)
    found = {name: _relevance(readable(name, amap, prompts, raw), prompts, last) for name, amap in maps.items()}
    rows: dict[int | str, Tensor] = {**found, TOGETHER: torch.stack(list(found.values())).mean(0)}
    tokens = tokens_of(source)
    across = [_across(name, readable(name, amap, prompts, raw), prompts, tokens) for name, amap in maps.items()]
    across.append(
        (torch.stack([mean for mean, _ in across]).mean(0), torch.stack([even for _, even in across]).mean(0))
    )
    gold = {name: torch.where(prompts.gold, part, 0.0).sum(-1) for name, part in rows.items()}  # [B]
    sizes = torch.where(prompts.there, prompts.documents[..., 1] - prompts.documents[..., 0], 0).double()
    part = (sizes * prompts.gold).sum(-1) / sizes.sum(-1)
    chance = prompts.ndcg(torch.zeros(prompts.gold.shape), k)
    blind = any(bool(each.isnan().all()) for each in gold.values())
    undefined = dict.fromkeys(("ndcg", "relevance"), BLIND) if blind else {}
    if any(bool(mean.isnan().all()) for mean, _ in across):
        undefined["across"] = ALONE
    return LayerTable.averaged(
        "Documents ranked by attention",
        {
            "ndcg": {name: prompts.ndcg(each, k) for name, each in rows.items()},
            "relevance": gold,
            "across": {name: mean for name, (mean, _) in zip(rows, across, strict=True)},
        },
        {
            "ndcg": f"NDCG@{k}",
            "relevance": "part of the document mass on gold documents",
            "across": "mass on other documents",
        },
        null={
            "ndcg": dict.fromkeys(rows, chance),
            "relevance": dict.fromkeys(rows, part),
            "across": {name: even for name, (_, even) in zip(rows, across, strict=True)},
        },
        undefined=undefined,
        provenance=provenance_of(source),
    )


def block_relevance(
    source: Source,
    prompts: Documents,
    layers: Sequence[int | str] | None = None,
    last: int = LAST,
    *,
    raw: bool = False,
) -> Tensor:
    """Relevance of every document, ``[B, n]`` in float64, mean over the layers (see ``block_rank``); NaN for absent documents.

    Its order is the ranking: ``block_relevance(run, prompts).argsort(descending=True)``."""
    maps = _chosen(maps_of(source), layers)
    return torch.stack([_relevance(readable(n, amap, prompts, raw), prompts, last) for n, amap in maps.items()]).mean(0)


def contrastive_loss(relevance: Tensor, gold: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """The contrastive loss of relevances ``[B, n]`` (NaN for absent documents), mean over examples; differentiable.

    ``gold`` ``[B, n]`` bool. 0 is best; log n where relevance is even and one document is gold.
    """
    if not temperature > 0:
        raise WorkbenchError(f"a temperature is positive; got {temperature}")
    if relevance.shape != gold.shape or not bool(gold.any(-1).all()):
        raise WorkbenchError(
            f"gold marks one document or more per example, {list(relevance.shape)}; got {list(gold.shape)}"
        )
    absent = relevance.isnan()
    logits = (relevance / temperature).masked_fill(absent, float("-inf"))
    return (logits.logsumexp(-1) - logits.masked_fill(~gold, float("-inf")).logsumexp(-1)).mean()


def _chosen(maps: dict[int | str, AttentionMap], layers: Sequence[int | str] | None) -> dict[int | str, AttentionMap]:
    names = list(maps)
    if layers is None:
        first = len(names) // 3
        names = names[first : max(first + 1, len(names) - first)]
    else:
        for name in layers:
            if name not in maps:
                raise UnknownName("captured layer", name, maps)
        names = list(layers)
    if not names:
        raise WorkbenchError("layers names no layer; leave it out for the middle third")
    return {name: maps[name] for name in names}


def _relevance(amap: AttentionMap, prompts: Documents, last: int) -> Tensor:
    """``[B, n]``; NaN for absent documents, and all NaN without mass on any document."""
    if last < 1:
        raise WorkbenchError(f"last is a number of question tokens, at least 1; got {last}")
    ends = prompts.query[:, 1] - amap.offset
    if bool((ends > amap.shape[2]).any()) or bool((prompts.query[:, 0] < amap.offset).any()):
        raise WorkbenchError(f"the question {prompts.query.tolist()} leaves the map's {amap.shape[2]} queries")
    parts = []
    for b, (begin, end) in enumerate(zip((prompts.query[:, 0] - amap.offset).tolist(), ends.tolist(), strict=True)):
        rows = amap.rows(max(begin, end - last), end)[b : b + 1].detach().double().cpu()
        mass = document_sums(rows, prompts.documents[b : b + 1])[0]  # [H, q, n]
        part = mass / mass.nansum(-1, keepdim=True).clamp(min=1e-300)
        part = torch.where(mass.nansum(-1, keepdim=True) > 0, part, float("nan"))
        parts.append(part.flatten(0, 1).nanmean(0))
    return torch.stack(parts)


def _across(name: int | str, amap: AttentionMap, prompts: Documents, tokens: Tokens | None) -> tuple[Tensor, Tensor]:
    """Mass of document tokens on other documents, and the same if attention were even: ``[B]`` each, mean over heads."""
    numbers = torch.full(prompts.ids.shape, -1)
    for b, ranges in enumerate(prompts.documents.tolist()):
        for d, (lo, hi) in enumerate(ranges):
            if lo >= 0:
                numbers[b, lo:hi] = d
    mean, even = mean_masses(amap, layer_visibility(name, amap, tokens), [_others(numbers)])
    return mean[0].nanmean(-1), even[0].nanmean(-1)


def _others(numbers: Tensor) -> Mod:
    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own, other = numbers[b, q], numbers[b, k]
        return (own >= 0) & (other >= 0) & (own != other)

    return mod


def _example() -> dict[str, object]:
    ids = torch.zeros(2, 12, dtype=torch.long)
    ranges = torch.tensor([[[1, 4], [4, 8]]] * 2)
    gold = torch.tensor([[True, False], [False, True]])
    return {
        "source": random_maps(batch=2),
        "prompts": Documents(ids, ranges, gold, torch.tensor([[9, 12]] * 2)),
        "layers": (0, 1),
    }


ANALYSES = (
    Analysis(
        name="block-rank",
        question="Do some layers rank the documents by what the question's last tokens attend to?",
        function=block_rank,
        example=_example,
        paper="BlockRank 2025 (arXiv 2510.05396), abstract",
        source="maps",
        null="a random ranking; even attention",
        definition="the question's last two tokens in the middle third of the layers, mass as a part of all document mass",
    ),
)
