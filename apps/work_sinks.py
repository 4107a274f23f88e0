"""Jobs of the page of sinks: the same heads on several texts, and a second model on the same texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.errors import WorkbenchError
from workbench.maps import GatedMap

if TYPE_CHECKING:
    import pandas as pd

    from workbench.models.protocol import Model
    from workbench.pairs import Pairs
    from workbench.probes.sinks.scores import SinkResult

WORDS = 63
"""Words of a text: 64 tokens with the first, as in Gu et al., arXiv 2410.10781."""


def stories(texts: int, words: int = WORDS, seed: int = 0) -> list[str]:
    """``texts`` made-up texts of ``words`` words each."""
    from workbench.datasets.corpus import filler_text

    if texts < 1:
        raise WorkbenchError(f"texts counts from 1; got {texts}")
    return [filler_text(seed + i, words) for i in range(texts)]


def sinks_by_text(
    model: Model, pairs: Pairs | None = None, texts: int = 16, words: int = WORDS, seed: int = 0
) -> pd.DataFrame:
    """One row per text, layer and head: ``text, map, layer, head, first`` (share of the first token), ``even`` (the same if
    attention were even), and the head's favourite: ``position, token, share, uniform``. Gated models have every row twice, with
    ``map`` effective and raw (inside the gate); otherwise it is ``both``.

    The texts are ``texts`` stories of ``words`` words, or the clean prompts of ``pairs``, each run by itself."""
    import pandas as pd

    import workbench as wb
    from workbench.models.protocol import Tokens

    given: Sequence[Any] = stories(texts, words, seed)
    if pairs is not None:
        given = [Tokens.of(row[None], model.tokenizer) for row in pairs.clean]
    parts = []
    for number, text in enumerate(given):
        with torch.no_grad():
            run = model.run(text, maps=wb.capture(stats=("received",)), logits=None)
        gated = any(isinstance(amap, GatedMap) for amap in run.maps.values())
        for raw, kind in ((False, "effective"), (True, "raw")) if gated else ((False, "both"),):
            rows = [{"text": number, "map": kind, **row} for row in _heads(wb.sinks(run, raw=raw))]
            parts.append(pd.DataFrame(rows))
    return pd.concat(parts, ignore_index=True)


def _heads(found: SinkResult) -> Iterator[dict[str, Any]]:
    best = {(sink.layer, sink.head): sink for sink in found.strongest()}
    for layer, first in found.first.items():
        for head, share in enumerate(first[0].tolist()):
            row = {"layer": layer, "head": head, "first": share, "even": float(found.uniform[layer][head, 0])}
            sink = best.get((layer, head))
            if sink is not None:
                row |= {"position": sink.key, "token": sink.token, "share": sink.share, "uniform": sink.uniform}
            yield row


def twins(model: Model, other: str, revision: str, texts: int = 16, words: int = WORDS, seed: int = 0) -> pd.DataFrame:
    """``wb.compare_sinks`` of the model and ``other`` on the same stories: its rows by model, layer and head, told apart by the
    column ``by``. ``revision`` pins the other's weights; another than its files are is refused."""
    import pandas as pd

    import workbench as wb
    from workbench.jobs.revisions import revision_of

    revision_of(other, revision)
    given = stories(texts, words, seed)
    runs = []
    for one in (model, wb.load(other)):
        streams = [f"blocks.{layer}.hook_resid_post" for layer in range(one.shape.layers)]
        with torch.no_grad():
            runs.append(one.run(given, read=streams, maps=wb.capture(), logits=None))
    found = wb.compare_sinks(runs[0], runs[1], (Path(model.name).name, Path(other).name))
    parts = {"model": found.frame(), "layer": found.layers(), "head": found.heads()}
    return pd.concat([part.assign(by=name) for name, part in parts.items()], ignore_index=True)


def drain(model: Model, texts: int = 4, words: int = WORDS, seed: int = 0) -> Any:
    """``wb.value_drain`` on stories."""
    import workbench as wb

    kinds = ("attn.hook_v", "hook_resid_pre")
    read = [f"blocks.{layer}.{kind}" for layer in range(model.shape.layers) for kind in kinds]
    with torch.no_grad():
        return wb.value_drain(model.run(stories(texts, words, seed), read=read, maps=wb.capture(), logits=None))
