"""Which heads find the documents that a question asks for?

Query-focused retrieval heads (QRHead, EMNLP 2025). For a head and a document d, with the question's tokens Q and the tokens N
of an empty question ("N/A") in its place,

    a_k  =  mean over q in Q of A[q, k]  -  mean over q in N of A_null[q, k]         for every token k of d
    s(d) =  sum of a_k over the tokens of d; those below  mean - 2 sd  of d's own a_k are set to 0

and the head's score is the mean of s over gold documents, or the NDCG@10 of ranking the documents by s. The authors keep 16
heads. sd is that of a sample (n - 1), as theirs; a document of one token keeps it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.retrieval.documents import Documents, mean_row, readable
from workbench.probes.sources import Source, maps_of, provenance_of
from workbench.probes.tables import HeadTable

KEPT = 16
DEVIATIONS = 2.0
_ROUNDING = 1e-12


def query_heads(source: Source, prompts: Documents, null: Source, *, raw: bool = False, k: int = 10) -> HeadTable:
    """QRHead scores: ``score``, the mean of s over gold documents (weight), and ``ndcg``, NDCG@k of ranking by s.

    ``source``: a run on ``prompts.ids`` with captured maps (``model.run(prompts.ids, maps=wb.capture())``), or its maps;
    ``null``: the same on ``prompts.null_ids``. Only the rows of the question are made. Means over examples with 95% bootstrap
    intervals; nulls: the mean of s over all documents of an example, and the NDCG of a random ranking. The published selection
    is ``query_heads(...).top("score", 16)``. Gated maps count as they act, ``raw=True`` looks inside the gate; signed maps are
    refused.
    """
    if prompts.null_ids is None or prompts.null_query is None:
        raise WorkbenchError("these scores subtract an empty question: give Documents with null_ids and null_query")
    maps, empty = maps_of(source), maps_of(null)
    if list(maps) != list(empty):
        raise WorkbenchError(f"both runs need the same layers; got {list(maps)} and {list(empty)}")
    score, ndcg, by_chance = {}, {}, {}
    for name, amap in maps.items():
        asked = mean_row(readable(name, amap, prompts, raw), prompts.query)
        nothing = mean_row(readable(name, empty[name], prompts, raw, null=True), prompts.null_query)
        found = calibrated(asked, nothing, prompts.documents)  # [B, H, n]
        gold = torch.where(prompts.gold[:, None], found, float("nan"))
        score[name], by_chance[name] = gold.nanmean(-1), found.nanmean(-1)
        ndcg[name] = prompts.ndcg(found, k)
    chance = float(prompts.ndcg(torch.zeros(prompts.gold.shape), k).mean())
    return HeadTable.averaged(
        "Query-focused retrieval heads",
        {"score": score, "ndcg": ndcg},
        {"score": "attention to gold documents, beyond the empty question's", "ndcg": f"NDCG@{k}"},
        null={"score": by_chance, "ndcg": {m: torch.full_like(v[0], chance) for m, v in ndcg.items()}},
        provenance=provenance_of(source),
    )


def calibrated(asked: Tensor, nothing: Tensor, documents: Tensor) -> Tensor:
    """s of every head and document, ``[B, H, n]``, NaN for absent ones; from mean rows ``[B, H, K]`` of the question and of the
    empty one, and ranges ``[B, n, 2]``."""
    keys = min(asked.shape[-1], nothing.shape[-1])
    difference = asked[..., :keys] - nothing[..., :keys]
    out = torch.full((*asked.shape[:2], documents.shape[1]), float("nan"), dtype=torch.float64)
    for b, ranges in enumerate(documents.tolist()):
        for d, (lo, hi) in enumerate(ranges):
            if lo < 0:
                continue
            if hi > keys:
                raise WorkbenchError(
                    f"document {d} of example {b} ends at {hi}, after the {keys} tokens both prompts have"
                )
            part = difference[b, :, lo:hi]
            if hi - lo > 1:
                floor = part.mean(-1, keepdim=True) - DEVIATIONS * part.std(-1, keepdim=True)
                rounding = _ROUNDING * part.abs().amax(-1, keepdim=True)
                part = torch.where(part < floor - rounding, 0.0, part)
            out[b, :, d] = part.sum(-1)
    return out


def _example() -> dict[str, object]:
    ids = torch.zeros(2, 12, dtype=torch.long)
    ranges = torch.tensor([[[1, 4], [4, 8]]] * 2)
    gold = torch.tensor([[True, False], [False, True]])
    query = torch.tensor([[9, 12]] * 2)
    prompts = Documents(ids, ranges, gold, query, ids, query)
    return {"source": random_maps(batch=2), "prompts": prompts, "null": random_maps(batch=2, seed=9)}


ANALYSES = (
    Analysis(
        name="query-heads",
        question="Which heads find the documents that a question asks for?",
        function=query_heads,
        example=_example,
        paper="QRHead, EMNLP 2025, query-focused retrieval score",
        source="maps",
        null="all documents of an example; a random ranking",
        cause="compare_rankings",
        definition="equal weights on all tokens of a document are kept, where the published threshold would drop them all",
    ),
)
