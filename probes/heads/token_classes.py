"""Which heads look at delimiters, digits, special tokens or copies of the token?

The share of a class is the mean mass that a query puts on keys of the class, over the real queries that see such a key. Classes
are read off the texts of the tokens, without their space markers:

    delimiter     only punctuation and symbols (Unicode P and S)
    newline       a line break
    digit         only digits
    capitalised   the first letter is a capital
    special       written <...>, [...] in capitals or <|...|>, or called special by the tokenizer
    same          earlier keys with the query's own token (a condition on pairs)

Null: the classes of a sequence shuffled over its positions, the first one kept, so that attention to a place (a sink) is no
attention to a class. ``even`` is the share that evenly spread attention gives: the part of visible keys that are of the class.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.maps import AttentionMap, GatedMap
from workbench.models.protocol import Tokens
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled_run
from workbench.probes.heads.kinds import identities, shuffled_tokens, token_maps
from workbench.probes.heads.weights import grouped
from workbench.probes.sources import maps_of, need_shares
from workbench.probes.tables import HeadTable
from workbench.probes.visibility import Visibility, layer_visibility
from workbench.run import Run

TokenClass = Callable[[str], bool]
_CHUNK = 2**22
_ROUNDING = 1e-12
_NEWLINES = ("\n", "\r", "Ċ", "<0x0A>", "<0x0D>")


def bare(text: str) -> str:
    """The text of a token without the marks that tokenizers put for spaces and word pieces."""
    return text.removeprefix("##").replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n").strip().removesuffix("</w>")


def is_delimiter(text: str) -> bool:
    word = bare(text)
    return bool(word) and not is_special(text) and all(unicodedata.category(c)[0] in "PS" for c in word)


def is_newline(text: str) -> bool:
    return any(mark in text for mark in _NEWLINES)


def is_digit(text: str) -> bool:
    return bare(text).isdigit()


def is_capitalised(text: str) -> bool:
    return bare(text)[:1].isupper()


def is_special(text: str) -> bool:
    word = bare(text)
    angled = len(word) > 2 and word[0] == "<" and word[-1] == ">" and word not in _NEWLINES
    return angled or (len(word) > 2 and word[0] == "[" and word[-1] == "]" and word[1:-1].isupper())


CLASSES: dict[str, TokenClass] = {
    "delimiter": is_delimiter,
    "newline": is_newline,
    "digit": is_digit,
    "capitalised": is_capitalised,
    "special": is_special,
}


def token_classes(
    run: Run,
    *,
    classes: Sequence[str] | Mapping[str, TokenClass | Tensor] | None = None,
    tokenizer: Any = None,
    shuffles: int = 16,
    per: str = "query",
    raw: bool = False,
    seed: int = 0,
) -> HeadTable:
    """Share of attention that each head gives to classes of tokens, with its null, even share and z.

    ``run`` has captured maps and labels of its tokens (a model with a tokenizer gives them). ``classes``: names of
    ``CLASSES`` and ``same``, all by default, or your own: name -> function of a token's text, or bool per token id ``[V]``.
    ``tokenizer`` names further special tokens. ``per``: ``query`` heads, or ``kv`` / ``kv-max`` for the mean / largest of the
    heads that share keys and values. Measures are ``<class>``, ``<class>_even`` and ``<class>_z`` = (share - null) / standard
    deviation of the null over ``shuffles`` draws; intervals are over sequences. A class that no query sees is NaN, and so is z
    where only the first token is of the class: place and class cannot be told apart. Gated maps count as they act, ``raw``
    inside the gate; signed maps are refused. Rows are walked in chunks, nothing of size Q x K is kept.
    """
    if not isinstance(run, Run):
        raise WorkbenchError(f"classes are read off the tokens of a run; got a {type(run).__name__}")
    if shuffles < 2:
        raise WorkbenchError(f"shuffles is at least 2; got {shuffles}")
    generator = torch.Generator().manual_seed(seed)
    maps, skipped = token_maps(maps_of(run), run.tokens, raw)
    tables = _tables(run.tokens, classes, tokenizer)
    names = list(tables)
    if not names:
        raise WorkbenchError(f"no class asked for; known: {', '.join([*CLASSES, 'same'])}")
    ids = [identities(run.tokens), *shuffled_tokens(run.tokens, shuffles, generator)]
    orders = _orders(run.tokens, shuffles, generator)
    stacked = {
        name: None if table is None else torch.stack([table.gather(1, o) for o in orders])
        for name, table in tables.items()
    }
    each: dict[str, dict[int | str, Tensor]] = {}
    single: dict[str, dict[int | str, Tensor]] = {}
    null: dict[str, dict[int | str, Tensor]] = {}
    undefined = {f"layer {name}": "no self-attention over the tokens" for name in skipped}
    for layer, amap in maps.items():
        need_shares(layer, amap, "are no shares of attention")
        mass, even = _masses(amap, layer_visibility(layer, amap, run.tokens), list(stacked.values()), ids)
        mass, even = grouped(mass, amap.kv_heads, per), grouped(even, amap.kv_heads, per)
        for i, name in enumerate(names):
            draws = mass[i, 1:].nanmean(1)
            value, middle = mass[i, 0].nanmean(0), draws.nanmean(0)
            gap = value - middle
            z = torch.where(gap.abs() < _ROUNDING, 0.0, gap / draws.std(0))
            only_first = tables[name] is not None and not _beyond_first(tables[name], run.tokens)
            if only_first and bool(value.isfinite().any()):
                z, undefined[f"{name}_z"] = torch.full_like(z, float("nan")), "only first tokens are of this class"
            if bool(value.isnan().all()):
                undefined[name] = "no query sees a key of this class"
            each.setdefault(name, {})[layer] = mass[i, 0]
            single.setdefault(f"{name}_even", {})[layer] = even[i, 0].nanmean(0)
            single.setdefault(f"{name}_z", {})[layer] = z
            null.setdefault(name, {})[layer] = middle
    units: dict[str, str] = {}
    for name in names:
        units |= dict.fromkeys((name, f"{name}_even"), "mean attention mass")
        units[f"{name}_z"] = "standard deviations of the null"
    return HeadTable.averaged(
        "Attention to classes of tokens", each, units, single=single, null=null, undefined=undefined,
        provenance=run.provenance,
    )  # fmt: skip


def _tables(
    tokens: Tokens, classes: Sequence[str] | Mapping[str, TokenClass | Tensor] | None, tokenizer: Any
) -> dict[str, Tensor | None]:
    """Which tokens ``[B, T]`` are of each class, None for ``same``."""
    chosen: dict[str, Any] = {}
    if isinstance(classes, Mapping):
        chosen = dict(classes)
    else:
        for name in [*CLASSES, "same"] if classes is None else [classes] if isinstance(classes, str) else classes:
            if name != "same" and name not in CLASSES:
                raise UnknownName("class of tokens", name, [*CLASSES, "same"])
            chosen[name] = CLASSES.get(name)
    ids, real = tokens.ids.cpu(), tokens.mask.cpu()
    special = torch.tensor(sorted(set(getattr(tokenizer, "all_special_ids", ()) or ())), dtype=ids.dtype)
    found: dict[str, Tensor | None] = {}
    for name, rule in chosen.items():
        if rule is None:
            found[name] = None
            continue
        if isinstance(rule, Tensor):
            if rule.dtype != torch.bool or rule.ndim != 1 or int(ids.max()) >= len(rule):
                raise WorkbenchError(
                    f"class {name!r} as a tensor is one bool per token id, [V]; got {rule.dtype} {list(rule.shape)}"
                )
            found[name] = rule.cpu()[ids] & real
            continue
        if not tokens.labels:
            raise WorkbenchError(
                "this run has no texts of its tokens: run a model with a tokenizer, or give classes as bool tensors [V]"
            )
        known = {text: bool(rule(text)) for row in tokens.labels for text in row}
        table = torch.tensor([[known[text] for text in row] for row in tokens.labels]) & real
        found[name] = (table | torch.isin(ids, special)) & real if name == "special" else table
    return found


def _orders(tokens: Tokens, draws: int, generator: torch.Generator) -> list[Tensor]:
    """The identity and random orders of the real positions of each row ``[B, T]``, the first one kept."""
    real = tokens.mask.cpu()
    plain = torch.arange(real.shape[1]).expand(real.shape)
    found = [plain.clone() for _ in range(draws + 1)]
    for b in range(len(real)):
        places = real[b].nonzero()[1:, 0]
        for order in found[1:]:
            order[b, places] = places[torch.randperm(len(places), generator=generator)]
    return found


def _beyond_first(table: Tensor | None, tokens: Tokens) -> bool:
    real = tokens.mask.cpu()
    later = real & (real.cumsum(1) > 1)
    return table is not None and bool((table & later).any())


def _masses(
    amap: AttentionMap, seen: Visibility, tables: list[Tensor | None], ids: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean mass and even share ``[classes, 1 + shuffles, B, H]`` in float64: one walk over the rows for all of them."""
    b, h, queries, keys = amap.shape
    draws = len(ids)
    weights = [torch.zeros(draws, b, keys) if t is None else t.float() for t in tables]
    columns = torch.stack(weights).flatten(0, 1).permute(1, 2, 0)  # [B, K, classes * draws]
    pairs = [i for i, table in enumerate(tables) if table is None]
    total, even, count = (torch.zeros(len(tables), draws, b, h, dtype=torch.float64) for _ in range(3))
    share = 1 / seen.keys().clamp(min=1)
    if isinstance(amap, GatedMap):
        share = share * amap.gate.detach().cpu().double()
    identity = torch.stack(ids)
    step = max(1, min(queries, _CHUNK // max(1, b * h * keys)))
    for lo in range(0, queries, step):
        hi = min(queries, lo + step)
        tile = seen.tile(lo, hi)
        rows = torch.where(tile, amap.rows(lo, hi).detach().cpu(), 0.0)
        hits = (tile.float() @ columns[:, None]).double()
        mass = (rows @ columns[:, None].to(rows.dtype)).double()
        mass, hits = (x.expand(b, h, hi - lo, -1).unflatten(-1, (len(tables), draws)) for x in (mass, hits))
        mass, hits = mass.clone(), hits.clone()
        for i in pairs:
            for d in range(draws):
                own = identity[d]
                earlier = torch.arange(keys) < torch.arange(lo, hi)[:, None]
                same = (own[:, lo:hi, None] == own[:, None, :]) & earlier
                mass[..., i, d] = torch.where(same[:, None], rows, 0.0).sum(-1).double()
                hits[..., i, d] = (same[:, None] & tile).sum(-1).double()
        seeing = hits > 0
        total += torch.where(seeing, mass, 0.0).sum(2).permute(2, 3, 0, 1)
        even += (hits * share[..., lo:hi, None, None]).expand_as(mass).sum(2).permute(2, 3, 0, 1)
        count += seeing.double().sum(2).permute(2, 3, 0, 1)
    none = count == 0
    mean, expected = ((x / count.clamp(min=1)).masked_fill(none, float("nan")) for x in (total, even))
    return mean, expected


ANALYSES = (
    Analysis(
        name="token-classes",
        question="Which heads look at delimiters, digits, special tokens or copies of the token?",
        function=token_classes,
        example=lambda: {"run": bundled_run(text="Mary gave John 3 apples , and John gave Mary 4 pears .", stats=())},
        paper="Clark et al. 2019 (arXiv 1906.04341), section 3",
        source="run",
        null="classes shuffled over the positions of their sequence; evenly spread attention",
        definition="our classes, read off the texts of the tokens",
    ),
)
