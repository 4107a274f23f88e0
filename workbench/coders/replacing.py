"""Coders in the place of what they imitate: their outputs take the place of the model's own in a run.

``replacement_edits`` serves every coder alike: an autoencoder replaces what it reads, a transcoder an MLP's output, a cross-layer
transcoder the outputs of all its MLPs, a Lorsa an attention layer's output. Each coder reads the run as it then is, with all
replacements before it in place. With the errors of the unchanged run added (``replacement_errors``) the unedited run is the
model's own, and an intervention on it shows what the coders predict (Ameisen et al. 2025, "local replacement model").
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.coders.coder import Coder
from workbench.coders.cross_layer import CrossLayer
from workbench.coders.lorsa import Lorsa
from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model
from workbench.run import Run
from workbench.sites import Site

Coders = Coder | CrossLayer | Lorsa | Iterable[Coder | CrossLayer | Lorsa]


class _Part(ABC):
    """One coder: what it keeps of each site it reads, and what it makes of these for each site it writes."""

    reads: tuple[Site, ...]
    writes: tuple[Site, ...]
    dtype: torch.dtype

    @abstractmethod
    def keep(self, site: Site, x: Tensor) -> Any:
        """What is needed of x ``[B, T, D]`` later on."""

    @abstractmethod
    def make(self, site: Site, kept: Mapping[Site, Any]) -> Tensor:
        """The output ``[B, T, D']`` of a written site."""


class _Plain(_Part):
    def __init__(self, coder: Coder) -> None:
        self.coder, self.dtype = coder, coder.W_dec.dtype
        self.reads, self.writes = _sites(coder, "reads"), _sites(coder, "writes")
        if len(self.reads) > 1 or len(self.writes) > 1:
            raise Refused(
                f"a crosscoder of {len(self.reads)} sites reads some behind others that it writes; it cannot take their place in "
                "one run"
            )

    def keep(self, site: Site, x: Tensor) -> Tensor:
        return x

    def make(self, site: Site, kept: Mapping[Site, Tensor]) -> Tensor:
        found: Tensor = self.coder(kept[self.reads[0]])
        return found


class _Attention(_Part):
    def __init__(self, lorsa: Lorsa, padding: Tensor | None) -> None:
        self.lorsa, self.padding, self.dtype = lorsa, padding, lorsa.W_O.dtype
        self.reads, self.writes = _sites(lorsa, "reads"), _sites(lorsa, "writes")

    def keep(self, site: Site, x: Tensor) -> Tensor:
        return x

    def make(self, site: Site, kept: Mapping[Site, Tensor]) -> Tensor:
        found: Tensor = self.lorsa(kept[self.reads[0]], self.padding)
        return found


class _CrossLayer(_Part):
    def __init__(self, coder: CrossLayer) -> None:
        self.coder, self.dtype = coder, coder.b_dec.dtype
        self.reads, self.writes = _sites(coder, "reads"), _sites(coder, "writes")
        if len(self.reads) != coder.layers or len(self.writes) != coder.layers:
            raise WorkbenchError(
                f"a cross-layer transcoder of {coder.layers} layers names as many sites in about['reads'] and about['writes']; "
                f"got {len(self.reads)} and {len(self.writes)}"
            )

    def keep(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor]:
        layer = self.reads.index(site)
        return self.coder.encode(layer, x), self.coder.skip(layer, x)

    def make(self, site: Site, kept: Mapping[Site, tuple[Tensor, Tensor]]) -> Tensor:
        layer = self.writes.index(site)
        before = [kept[read] for read in self.reads[: layer + 1]]
        return self.coder.decode_at(layer, [code for code, _ in before]) + before[-1][1]


def replacement_edits(
    coders: Coders, *, padding: Tensor | None = None, errors: Mapping[Site, Tensor] | None = None
) -> dict[Site | str, Callable[[Tensor], Tensor]]:
    """Edits for ``model.run(edit=...)`` that put the coders' outputs in the place of the model's.

    Coders say in ``about["reads"]`` and ``about["writes"]`` where they belong. ``padding`` ``[B, T]`` bool, False on tokens that
    are none, is for attention layers; a batch with padding on the left needs it. ``errors`` by written site are added. Edits
    hold what a run went through until the next one; they serve one run at a time. Refuses two coders that write one site.
    """
    parts = _parts(coders, padding)
    kept: list[dict[Site, Any]] = [{} for _ in parts]
    writer: dict[Site, int] = {}
    for i, part in enumerate(parts):
        for site in part.writes:
            if site in writer:
                raise WorkbenchError(f"two coders write {site}; leave one of them out")
            writer[site] = i

    def at(site: Site) -> Callable[[Tensor], Tensor]:
        def edit(value: Tensor) -> Tensor:
            new = value
            if site in writer:
                i = writer[site]
                part = parts[i]
                if site in part.reads:  # an autoencoder
                    kept[i][site] = part.keep(site, _flat(value, part.dtype))
                try:
                    made = part.make(site, kept[i])
                except KeyError as error:
                    raise WorkbenchError(f"{site} is written before {error.args[0]} is read in this model") from None
                if errors is not None and site in errors:
                    made = made + errors[site].to(made)
                new = made.to(value.dtype).view(value.shape)
            for i, part in enumerate(parts):
                if site in part.reads and writer.get(site) != i:
                    kept[i][site] = part.keep(site, _flat(new, part.dtype))
            return new

        return edit

    sites = [site for part in parts for site in (*part.reads, *part.writes)]
    return {site: at(site) for site in dict.fromkeys(sites)}


@torch.no_grad()
def replacement_errors(model: Model, coders: Coders, tokens: Any) -> dict[Site, Tensor]:
    """What the coders leave of the unchanged run: y - y^ ``[B, T, D]`` by written site, in the coders' own types."""
    given = list(_listed(coders))
    sites = [site for part in _parts(given, None) for site in (*part.reads, *part.writes)]
    run = model.run(tokens, read=list(dict.fromkeys(sites)), logits=None)
    found = {}
    for part in _parts(given, run.tokens.mask if run.tokens.mask.numel() else None):
        kept = {site: part.keep(site, _flat(run.acts[site], part.dtype)) for site in part.reads}
        for site in part.writes:
            found[site] = _flat(run.acts[site], part.dtype) - part.make(site, kept)
    return found


def spliced(
    model: Model,
    coders: Coders,
    tokens: Any,
    *,
    error: bool = False,
    read: Iterable[Site | str] = (),
    logits: str | None = "all",
) -> Run:
    """A run of the model with the coders in place; with ``error`` what they leave of the unchanged run is added, and the run is
    the model's own up to rounding."""
    given = list(_listed(coders))
    plain = model.run(tokens, logits=None)
    mask = plain.tokens.mask if plain.tokens.mask.numel() else None
    errors = replacement_errors(model, given, tokens) if error else None
    return model.run(tokens, read=read, edit=replacement_edits(given, padding=mask, errors=errors), logits=logits)


def _listed(coders: Coders) -> Iterable[Coder | CrossLayer | Lorsa]:
    return (coders,) if isinstance(coders, Coder | CrossLayer | Lorsa) else coders


def _parts(coders: Coders, padding: Tensor | None) -> list[_Part]:
    found: list[_Part] = []
    for coder in _listed(coders):
        if isinstance(coder, Lorsa):
            found.append(_Attention(coder, padding))
        elif isinstance(coder, CrossLayer):
            found.append(_CrossLayer(coder))
        elif isinstance(coder, Coder):
            found.append(_Plain(coder))
        else:
            raise WorkbenchError(
                f"a coder is a Coder, a CrossLayer or a Lorsa (an estimator's coder_); got a {type(coder).__name__}"
            )
    if not found:
        raise WorkbenchError("no coder given")
    return found


def _sites(coder: Coder | CrossLayer | Lorsa, which: str) -> tuple[Site, ...]:
    told = coder.about.get(which, coder.about.get("reads") if which == "writes" else None)
    if not told:
        raise WorkbenchError(
            f"this {type(coder).__name__} does not say where it belongs; set coder.about[{which!r}] to site texts, such as "
            "['blocks.1.hook_mlp_out']"
        )
    return tuple(Site.parse(site) for site in ([told] if isinstance(told, str | Site) else told))


def _flat(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``[B, T, D]`` with heads concatenated."""
    return value.flatten(2).to(dtype)
