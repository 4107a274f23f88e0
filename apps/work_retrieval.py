"""Jobs of the page of retrieval heads that are more than one call of an analysis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from workbench.models.protocol import Model
    from workbench.pairs import Pairs
    from workbench.probes.ablation import AblationCurve
    from workbench.probes.tables import HeadTable


def without_heads(
    model: Model,
    lengths: Sequence[int],
    depths: int = 3,
    trials: int = 2,
    random: int = 4,
    metric: str = "recall",
    seed: int = 0,
) -> AblationCurve:
    """``wb.masking_curve`` of the heads with the largest copy scores, on new prompts of the same lengths and depths; ``random``
    draws of as many other heads."""
    import workbench as wb
    from workbench.probes.retrieval.haystack import default_prompts

    found = wb.retrieval_heads(model, tuple(lengths), depths, trials=trials, seed=seed)
    return wb.masking_curve(model, found, random=random, metric=metric, prompts=default_prompts(model, trials))


def document_heads(model: Model, length: int = 96, documents: int = 8) -> HeadTable:
    """``wb.query_heads`` on prompts of ``length`` tokens whose sentences are the documents; the one with the needle is gold."""
    import workbench as wb

    docs = wb.needle_documents(model, length, documents)
    with torch.no_grad():
        asked = model.run(docs.ids, maps=wb.capture(), logits=None)
        nothing = model.run(docs.null_ids, maps=wb.capture(), logits=None)
    return wb.query_heads(asked, docs, nothing)


def early_heads(model: Model, pairs: Pairs) -> HeadTable:
    """``wb.head_kv`` on needle prompts."""
    import workbench as wb

    with torch.no_grad():
        run = model.run(pairs.clean, maps=wb.capture(), logits=None)
    return wb.head_kv(run, pairs.spans["NEEDLE"])


def echo_heads(model: Model, period: int = 64, sequences: int = 2, seed: int = 0) -> HeadTable:
    """``wb.razor_scores`` on words that the model can repeat."""
    import workbench as wb
    from workbench.probes.heads.repeats import task_words

    return wb.razor_scores(model, period, sequences=sequences, words=task_words(model), seed=seed)


def induction_or_retrieval(
    model: Model, length: int = 64, depths: int = 2, trials: int = 2, seed: int = 0
) -> HeadTable:
    """``wb.induction_or_retrieval`` with few prompts and one batch of repeats."""
    import workbench as wb

    return wb.induction_or_retrieval(
        model, length, depths, trials=trials, batches=1, sequences=4, period=(8, 12), seed=seed
    )


def streaming_gates(model: Model, pairs: Pairs, sink: int = 4, recent: int = 16, steps: int = 60, seed: int = 0) -> Any:
    """``wb.duo_gates`` with a short cache of ``sink`` first and ``recent`` last tokens."""
    import workbench as wb

    return wb.duo_gates(model, pairs, wb.Streaming(sink, recent), steps=steps, rate=0.05, seed=seed)
