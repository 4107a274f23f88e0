"""Prompts of documents and a question: where the documents stand, which answer it, and the same prompt with an empty question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.sources import inner, need_shares

_CHUNK = 2**22


@dataclass(frozen=True)
class Documents:
    """``ids`` ``[B, T]`` hold n documents and a question; ``documents`` ``[B, n, 2]`` are their half-open ranges (-1 where an
    example has fewer), ``gold`` ``[B, n]`` which of them answer, ``query`` ``[B, 2]`` the question's range. ``null_ids`` and
    ``null_query``: the same documents with a question that asks nothing."""

    ids: Tensor
    documents: Tensor
    gold: Tensor
    query: Tensor
    null_ids: Tensor | None = None
    null_query: Tensor | None = None

    def __post_init__(self) -> None:
        b = len(self.ids)
        if self.documents.ndim != 3 or self.documents.shape[0] != b or self.documents.shape[2] != 2:
            raise WorkbenchError(f"documents are ranges [B, n, 2] with B={b}; got {list(self.documents.shape)}")
        if self.gold.shape != self.documents.shape[:2] or self.gold.dtype != torch.bool:
            want = list(self.documents.shape[:2])
            raise WorkbenchError(f"gold is bool {want}; got {self.gold.dtype} {list(self.gold.shape)}")
        for name in ("query", "null_query"):
            part = getattr(self, name)
            if part is not None and (part.shape != (b, 2) or bool((part[:, 0] >= part[:, 1]).any())):
                raise WorkbenchError(f"{name} is a range [lo, hi) per example, [{b}, 2]; got {part.tolist()}")
        there, gold = self.there, self.gold
        if bool((self.documents[..., 1] <= self.documents[..., 0])[there].any()) or bool((gold & ~there).any()):
            raise WorkbenchError("a document is a range [lo, hi) of one token or more, or (-1, -1) and not gold")
        if not bool(gold.any(1).all()) or not bool((there & ~gold).any(1).all()):
            raise WorkbenchError(
                "every example needs a gold document and one that is not: else there is nothing to rank"
            )

    @property
    def there(self) -> Tensor:
        """Which documents exist, bool ``[B, n]``."""
        return self.documents[..., 0] >= 0

    def ndcg(self, scores: Tensor, k: int = 10) -> Tensor:
        """NDCG@k of rankings by ``scores`` ``[B, ..., n]``: ``[B, ...]``. Ties count with their mean; constant scores give what a
        random ranking gives on average."""
        from sklearn.metrics import ndcg_score

        out = torch.empty(scores.shape[:-1], dtype=torch.float64)
        for b in range(len(scores)):
            known = self.there[b]
            rows = scores[b][..., known].detach().double().cpu().reshape(-1, int(known.sum()))
            gold = self.gold[b][known].double()[None].numpy()
            # one by one: the mean over rows is not asked for
            found = [
                float("nan") if bool(row.isnan().any()) else float(ndcg_score(gold, row[None].numpy(), k=k))
                for row in rows
            ]
            out[b] = torch.tensor(found, dtype=torch.float64).reshape(scores.shape[1:-1])
        return out


def needle_documents(
    model: Model, length: int = 96, n: int = 8, *, null: str = "N/A", seed: int = 0, **options: object
) -> Documents:
    """Prompts of the needle task with every sentence before the question as a document; the one with the needle is gold.

    The empty question has the asked key replaced by ``null``. ``options`` go to ``wb.task("needle")``.
    """
    import workbench as wb

    pairs = wb.task("needle", length=length, split="test", **options).build(seed, model.tokenizer, n)
    tokenizer = model.tokenizer
    empty = tokenizer(null, add_special_tokens=False)["input_ids"]
    stop = tokenizer("a.", add_special_tokens=False)["input_ids"][-1]
    return _sentences(pairs, stop, empty)


def _sentences(pairs: Pairs, stop: int, empty: Sequence[int]) -> Documents:
    found, gold, blanks = [], [], []
    for b in range(len(pairs)):
        row = pairs.clean[b]
        start, end = pairs.spans["QUESTION"][b].tolist()
        ends = [i + 1 for i in range(start) if int(row[i]) == stop]
        ranges = list(zip([1, *ends[:-1]], ends, strict=True))
        lo, hi = pairs.spans["NEEDLE"][b].tolist()
        found.append(ranges)
        gold.append([begin <= lo and hi <= until for begin, until in ranges])
        key, after = pairs.spans["QUERY"][b].tolist()
        blanks.append(torch.cat([row[:key], torch.tensor(empty).to(row), row[after:end]]))
    width = max(map(len, found))
    documents = torch.tensor([ranges + [(-1, -1)] * (width - len(ranges)) for ranges in found])
    marked = torch.tensor([flags + [False] * (width - len(flags)) for flags in gold])
    query = pairs.spans["QUESTION"]
    shift = len(blanks[0]) - pairs.clean.shape[1]
    return Documents(pairs.clean, documents, marked, query, torch.stack(blanks), query + torch.tensor([0, shift]))


def mean_row(amap: AttentionMap, ranges: Tensor) -> Tensor:
    """Mean over the queries of each example's range ``[B, 2]`` (absolute positions) of the weights, ``[B, H, K]`` in float64.

    Only those rows are made, in chunks.
    """
    b, h, queries, keys = amap.shape
    if ranges.shape != (b, 2):
        raise WorkbenchError(f"query ranges are [B, 2] with B={b}; got {list(ranges.shape)}")
    local = ranges - amap.offset
    if bool((local < 0).any()) or bool((local > queries).any()) or bool((local[:, 0] >= local[:, 1]).any()):
        raise WorkbenchError(
            f"query ranges {ranges.tolist()} leave the map's queries {amap.offset}-{amap.offset + queries}"
        )
    total = torch.zeros(b, h, keys, dtype=torch.float64)
    first, last = int(local[:, 0].min()), int(local[:, 1].max())
    step = max(1, _CHUNK // max(1, b * h * keys))
    for lo in range(first, last, step):
        hi = min(last, lo + step)
        at = torch.arange(lo, hi)
        inside = (at >= local[:, :1]) & (at < local[:, 1:])
        rows = amap.rows(lo, hi).detach().double().cpu()
        total += torch.where(inside[:, None, :, None], rows, 0.0).sum(2)
    return total / (local[:, 1] - local[:, 0])[:, None, None]


def document_sums(values: Tensor, documents: Tensor) -> Tensor:
    """Sums of ``values`` ``[B, ..., K]`` over every document ``[B, n, 2]``: ``[B, ..., n]``, NaN for absent ones."""
    running = torch.nn.functional.pad(values.cumsum(-1), (1, 0))
    parts = []
    for b, ranges in enumerate(documents):
        lo, hi = ranges.clamp(min=0).unbind(-1)
        part = running[b][..., hi] - running[b][..., lo]
        parts.append(part.masked_fill(ranges[:, 0] < 0, float("nan")))
    return torch.stack(parts)


def readable(name: int | str, amap: AttentionMap, prompts: Documents, raw: bool, *, null: bool = False) -> AttentionMap:
    """The map that is asked: checked against the prompts, without its gate if ``raw``; signed and channel maps are refused."""
    ids = prompts.null_ids if null else prompts.ids
    asked = inner(name, amap, raw)
    need_shares(name, asked, "are no shares of attention to a document")
    if ids is None or (asked.shape[0], asked.shape[3]) != tuple(ids.shape):
        got = None if ids is None else list(ids.shape)
        raise WorkbenchError(
            f"layer {name}: the map has B={asked.shape[0]} and {asked.shape[3]} keys, the prompts are {got}; run the model on "
            f"{'prompts.null_ids' if null else 'prompts.ids'} with maps=wb.capture()"
        )
    return asked
