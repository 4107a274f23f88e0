"""What flows through sites of a model, as rows: one row per token, heads concatenated, padding left out.

All sites are read in one forward pass, of one model or of several that see the same tokens. Nothing is kept: rows of a pass
are handed on before the next pass runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.coders.documents import Documents, Passes, plain_ids
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Model, Tokens
from workbench.sites import Site

CONTEXT = 128
"""Tokens of a piece of text, where nothing else is said and the model takes as many."""
_COMPARED = ("The quick brown fox, 1923.", " a b c", "naïve\n")


def site_rows(
    model: Model | Sequence[Model],
    sites: str | Site | Sequence[str | Site],
    texts: Any,
    *,
    context: int | None = None,
    prepend_bos: bool | None = None,
    skip_first: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Iterator[dict[str, Tensor]]:
    """Rows ``[N, D]`` of each site, one mapping per forward pass; row i of every site is the same token.

    ``z`` and other sites with heads give all heads concatenated, ``[N, H * E]``: head h is columns ``h * E`` to ``(h + 1) * E``;
    a site with a head, ``blocks.1.attn.hook_z[3]``, gives that head. With several models a site is written with the number of
    its model, ``1:blocks.2.hook_resid_post``. ``texts`` is a list of texts, token ids ``[B, T]``, or an iterable of texts or ids,
    which is read once and not kept; longer ones are cut into pieces of ``context`` tokens. ``skip_first`` leaves out the first
    token of each piece. Raises with the model's own list for sites that it does not serve.
    """
    return SiteReader(
        model, sites, texts, context=context, prepend_bos=prepend_bos, skip_first=skip_first, dtype=dtype, repeat=False
    )


class SiteReader:
    """Iterator behind ``site_rows``, with a cursor: ``state()`` is JSON, ``restore(state)`` goes on from there.

    A list of texts begins again when it ends unless ``repeat`` is False. ``widths[site]`` is known once a pass has run.
    """

    def __init__(
        self,
        model: Model | Sequence[Model],
        sites: str | Site | Sequence[str | Site],
        texts: Any,
        *,
        context: int | None = None,
        prepend_bos: bool | None = None,
        skip_first: bool = False,
        dtype: torch.dtype = torch.float32,
        repeat: bool = True,
        budget: int = 8192,
    ) -> None:
        self.models = models_of(model)
        if not self.models:
            raise WorkbenchError("no model given")
        self.sites = named(sites, len(self.models))
        self._reads = [
            [(site, key) for site, (at, key) in self.sites.items() if at == i] for i in range(len(self.models))
        ]
        for i, reads in enumerate(self._reads):
            if not reads:
                raise WorkbenchError(f"no site of model {i} is asked for; leave the model out")
        _same_tokens(self.models)
        self._documents = Documents(texts, repeat=repeat)
        self._passes = Passes(
            self.models[0],
            self._documents,
            context=_context(self.models) if context is None else context,
            budget=budget,
            prepend_bos=prepend_bos,
        )
        self.context, self.skip_first, self.dtype = self._passes.context, skip_first, dtype
        self.widths: dict[str, int] = {}
        self.provenance: tuple[dict[str, Any], ...] = ()
        """Model, revision, dtype and versions of each model, once a pass has run."""

    @property
    def prepend_bos(self) -> bool | None:
        return self._passes.prepend_bos

    @property
    def epochs(self) -> float | None:
        """How often the list of texts has been read; None where the data are not a list."""
        return self._passes.epochs

    @property
    def told(self) -> dict[str, Any]:
        """What is known of the texts without reading them all: JSON."""
        return self._documents.told

    @property
    def empty(self) -> int:
        """Texts without a token, which were left out."""
        return self._passes.empty

    def state(self) -> dict[str, Any]:
        """Where the next pass begins: JSON."""
        return self._passes.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state()`` of an earlier reader; this one must be fresh, its texts the same from the beginning."""
        self._passes.restore(state)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        given = next(self._passes)
        found: dict[str, Tensor] = {}
        provenance = []
        for model, reads in zip(self.models, self._reads, strict=True):
            with torch.no_grad():
                run = model.run(given, read=[key for _, key in reads], logits=None)
            provenance.append(run.provenance.dict())
            for site, key in reads:
                found[site] = rows_of(run.acts[key], key, run.tokens, skip_first=self.skip_first).to(self.dtype)
        counts = {site: len(rows) for site, rows in found.items()}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{site}: {count}" for site, count in counts.items())
            raise Refused(f"these sites have different numbers of rows in one pass ({told}); read them apart")
        self.provenance = tuple(provenance)
        self.widths = {site: rows.shape[1] for site, rows in found.items()}
        return found


def models_of(model: Model | Sequence[Model]) -> tuple[Model, ...]:
    """One model or several as a tuple."""
    return tuple(model) if isinstance(model, Sequence) else (model,)


def rows_of(value: Tensor, site: Site | str, tokens: Tokens, *, skip_first: bool = False) -> Tensor:
    """The tensor of a site ``[B, T, ...]`` as rows ``[N, D]``, in the order of the batch, real positions alone."""
    kind = site.kind if isinstance(site, Site) else ""
    if value.ndim < 3 or (isinstance(site, Site) and site.whole.head_axis != 2):
        raise Refused(
            f"{site} is no vector per token ({kind or 'a hook'} of shape {list(value.shape)}); read a site such as "
            "blocks.<layer>.attn.hook_z or blocks.<layer>.hook_resid_post"
        )
    value = value.detach().flatten(2)
    mask = _mask(site, tokens)
    if not mask.shape[1]:
        mask = torch.ones(value.shape[:2], dtype=torch.bool)
    if mask.shape != value.shape[:2]:
        if not bool(mask.all()):
            raise Refused(
                f"{site} has {value.shape[1]} positions and the padded input {mask.shape[1]}: which of them are padding is "
                "unknown; pass inputs without padding"
            )
        mask = torch.ones(value.shape[:2], dtype=torch.bool)
    if skip_first:
        mask = mask & (mask.long().cumsum(1) != 1)
    if bool(mask.all()):
        return value.flatten(0, 1)
    return value[mask.to(value.device)]


def _mask(site: Site | str, tokens: Tokens) -> Tensor:
    """Which positions are real in the stack of the site."""
    if not (isinstance(site, Site) and site.stack in ("decoder", "cross")):
        return tokens.mask
    given = tokens.inputs.get("decoder_attention_mask")
    if given is not None and given.ndim == 2:
        return given.bool().cpu()
    return torch.zeros(len(tokens.mask), 0, dtype=torch.bool)


def named(sites: str | Site | Sequence[str | Site], models: int) -> dict[str, tuple[int, Site | str]]:
    """Sites by the name that rows have: the number of the model and its key. Names of bridge hooks stay as they are."""
    found: dict[str, tuple[int, Site | str]] = {}
    for given in [sites] if isinstance(sites, str | Site) else sites:
        text, at = str(given), 0
        if models > 1:
            number, colon, rest = text.partition(":")
            if not colon or not number.isdigit():
                raise WorkbenchError(
                    f"with {models} models a site is written with the number of its model, such as 0:{text}; got {text!r}"
                )
            if int(number) >= models:
                raise UnknownName("model", number, range(models))
            text, at = rest, int(number)
        try:
            key: Site | str = Site.parse(text)
        except UnknownName:
            key = text  # a bridge has hooks that are no site; every model refuses what it does not know
        name = f"{at}:{key}" if models > 1 else str(key)
        if name in found:
            raise WorkbenchError(f"site {name} is given twice")
        found[name] = (at, key)
    if not found:
        raise WorkbenchError("no site given")
    return found


def _context(models: Sequence[Model]) -> int:
    longest = [c for model in models for c in (model.shape.context, model.shape.trained) if c is not None]
    return min([CONTEXT, *longest])


def _same_tokens(models: Sequence[Model]) -> None:
    """Refuse models that would cut the same text differently: row i must be the same token everywhere."""
    first, *others = models
    for other in others:
        if first.shape.vocab != other.shape.vocab:
            raise Refused(
                f"{first.name} has {first.shape.vocab} tokens and {other.name} has {other.shape.vocab}: models that are read "
                "together see the same tokens"
            )
        pair = (first.tokenizer, other.tokenizer)
        if all(t is not None for t in pair) and plain_ids(pair[0], list(_COMPARED)) != plain_ids(
            pair[1], list(_COMPARED)
        ):
            raise Refused(f"the tokenizers of {first.name} and {other.name} cut the same text differently")
