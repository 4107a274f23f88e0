"""Coders spliced into a model: every spliced tensor becomes features times directions, plus a bias, plus an error.

x = sum_i f_i d_i + b + eps at every spliced site (Marks et al., arXiv 2403.19647, eq. 1), with f the code of x, d the rows of
``W_dec`` and eps what the coder leaves. Nothing is left out, so the run's output is the model's own to the last bit, and
gradients lead to f and eps as to any other variable. The error is a variable of its own: no gradient goes through it back to x.
What does go back is one of two things:

- passed through (``cut=False``): x gets the gradient of what takes its place, unchanged. Features of early sites then get the
  gradient of the whole model, as the paper's node effects use it.
- ``cut=True``: nothing. The gradient of what is computed behind a site ends there, so that the gradient of one site's code at
  another site's features is the direct effect, without the paths through the sites in between: the stopped gradients of the
  paper's edge effects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Model, Tokens
from workbench.probes.circuits.components import Edits, served
from workbench.sites import Site

ORDER = (
    "embed", "pos_embed", "resid_pre", "attn_norm", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_in", "mlp_norm",
    "mlp_pre", "mlp_post", "mlp_out", "resid_post", "final_norm",
)  # fmt: skip
"""Kinds of sites that can be spliced, in the order of computation within a block. Heads are concatenated."""
ERROR = -1
"""The index of the error term where others are features."""


class Dictionary(Protocol):
    """What splicing needs of a coder: code ``[..., F]`` of ``[..., D]``, and back; ``W_dec`` ``[F, D]``, ``b_dec`` ``[D]``."""

    @property
    def features(self) -> int: ...

    @property
    def W_dec(self) -> Tensor: ...

    @property
    def b_dec(self) -> Tensor: ...

    def encode(self, x: Tensor) -> Tensor: ...


Coders = Mapping[Any, Any] | Sequence[Any]
"""Coders by site (``Site`` or its text), or coders that say in ``about["reads"]`` where they belong."""
Change = Callable[[Site, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(site, features ``[B, T, F]``, error ``[B, T, D]``) to what takes their place."""


@dataclass(frozen=True)
class Spliced:
    """One site of a spliced run. ``features`` ``[B, T, F]`` and ``error`` ``[B, T, D]`` are leaves if gradients are enabled,
    ``output`` ``[B, T, D]`` is what the model went on with. ``encoded`` and ``left`` are the same numbers as ``features`` and
    ``error`` with the graph of how they came about."""

    features: Tensor
    error: Tensor
    output: Tensor
    encoded: Tensor
    left: Tensor


@dataclass(frozen=True)
class SplicedRun:
    """Logits ``[B, T, V]`` of a spliced run, and its sites in the order of computation."""

    logits: Tensor | None
    sites: Mapping[Site, Spliced]


@dataclass(frozen=True)
class Splice:
    """A model with coders at some of its sites, in the order of computation; build it with ``splice``."""

    model: Model
    coders: Mapping[Site, Dictionary]

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(self.coders)

    def run(self, tokens: Any, change: Change | None = None, *, cut: bool = False) -> SplicedRun:
        """One forward pass. ``change`` replaces features and errors on the way, site by site; without it (or if it returns what
        it was given) logits are those of the plain run, bit by bit."""
        found: dict[Site, Spliced] = {}

        def at(site: Site) -> Callable[[Tensor], Tensor]:
            def edit(value: Tensor) -> Tensor:
                found[site] = self._splice(site, value, change, cut)
                # A tensor of its own, so that what the model does to its input in place does not reach the output.
                return found[site].output.view(value.shape).clone()

            return edit

        edits: Edits = {site: at(site) for site in self.coders}
        run = self.model.run(tokens, edit=edits)
        return SplicedRun(run.logits, found)

    @torch.no_grad()
    def values(self, tokens: Any) -> dict[Site, Tensor]:
        """The tensors at all sites, ``[B, T, D]``, heads concatenated, in the type of their coder."""
        acts = self.model.run(tokens, read=self.sites, logits=None).acts
        return {site: self.rows(site, acts[site].detach()) for site in self.coders}

    def rows(self, site: Site, value: Tensor) -> Tensor:
        """The tensor of a site as its coder reads it; refuses another width and numbers that are not finite."""
        weight = self.coders[site].W_dec
        rows = value.flatten(2)
        if rows.shape[-1] != weight.shape[1]:
            raise Refused(
                f"the coder at {site} is for width {weight.shape[1]}, and {self.model.name} has {rows.shape[-1]} there; "
                "take the coder that was trained at this site"
            )
        if not bool(torch.isfinite(rows).all()):
            raise WorkbenchError(
                f"{site} of {self.model.name} has numbers that are not finite; there is no code of them"
            )
        return rows.to(weight)

    def coded(self, site: Site, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, T, F]`` and error ``[B, T, D]`` of a site's tensor ``[B, T, D]``."""
        coder = self.coders[site]
        features = coder.encode(rows)
        if not bool(torch.isfinite(features).all()):
            raise WorkbenchError(f"the coder at {site} gives numbers that are not finite; train or load it again")
        return features, rows - self.decoded(site, features)

    def decoded(self, site: Site, features: Tensor) -> Tensor:
        """What the features ``[..., F]`` stand for, bias included, ``[..., D]``."""
        coder = self.coders[site]
        return features @ coder.W_dec.detach() + coder.b_dec.detach()

    def _splice(self, site: Site, value: Tensor, change: Change | None, cut: bool) -> Spliced:
        rows, own = self.rows(site, value), value.flatten(2)
        base = own.detach() if cut else own
        encoded, left = self.coded(site, rows if cut else rows.detach())
        features, error = encoded.detach(), left.detach()
        if torch.is_grad_enabled():
            features.requires_grad_(), error.requires_grad_()
        new, rest = (features, error) if change is None else change(site, features, error)
        # Differences to the values themselves: where nothing changes they are exactly 0, and only gradients pass.
        moved = (new - features.detach()) @ self.coders[site].W_dec.detach() + (rest - error.detach())
        return Spliced(features, error, base + moved.to(base), encoded, left)


def splice(model: Model, coders: Coders) -> Splice:
    """Check coders against a model and put them in the order of computation.

    ``coders``: a mapping from sites (``"blocks.3.hook_resid_post"``) to autoencoders, or autoencoders that know their site. Any
    site of shape ``[B, T, D]`` and, heads concatenated, ``hook_z`` (and q, k, v). Refused: a site that the model has not, a
    site named twice, transcoders and crosscoders, which do not write what they read. Another width is refused when a run
    meets it.
    """
    chosen: dict[Site, Dictionary] = {}
    known = served(model)
    for key, coder in _items(coders):
        site = Site.parse(key)
        if site.kind not in ORDER or site.head is not None:
            raise Refused(
                f"coders are spliced into whole tensors [B, T, D] or hook_z with its heads concatenated; got {site}; "
                f"kinds that can be spliced: {', '.join(ORDER)}"
            )
        if site not in known:
            raise UnknownName(f"site of {model.name}", site, sorted(map(str, known)))
        if site in chosen:
            raise Refused(f"two coders at {site}: a tensor is spliced once; leave one out")
        _check(site, coder)
        chosen[site] = coder
    if not chosen:
        raise WorkbenchError('there are no coders; pass {"blocks.0.hook_resid_post": coder}')
    return Splice(model, {site: chosen[site] for site in sorted(chosen, key=place)})


def place(site: Site) -> tuple[int, int]:
    """Where a site stands in the order of computation."""
    last = site.kind == "final_norm"
    layer = 2**31 if last else -1 if site.layer is None else site.layer
    return layer, ORDER.index(site.kind)


def given(ids: Tensor, mask: Tensor | None) -> Tokens:
    """Ids ``[B, T]`` with their padding as the tokens of a run."""
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask)


def _items(coders: Coders) -> list[tuple[Any, Any]]:
    if isinstance(coders, Mapping):
        return list(coders.items())
    if not isinstance(coders, Sequence) or isinstance(coders, str):
        raise WorkbenchError(f"coders are a mapping from sites or a list; got {type(coders).__name__}")
    found = []
    for coder in coders:
        sites = _named(coder, "reads")
        if len(sites) != 1:
            raise WorkbenchError('this coder does not say where it belongs; pass {"blocks.0.hook_resid_post": coder}')
        found.append((sites[0], coder))
    return found


def _check(site: Site, coder: Any) -> None:
    for name in ("encode", "W_dec", "b_dec", "features"):
        if not hasattr(coder, name):
            raise WorkbenchError(f"at {site} stands a {type(coder).__name__}, which is no coder: it has no {name}")
    widths = getattr(coder, "reads", None)
    reads, writes = _named(coder, "reads"), _named(coder, "writes")
    if widths is not None and (len(widths) != 1 or tuple(widths) != tuple(coder.writes)):
        raise Refused(
            f"the coder at {site} reads {list(widths)} and writes {list(coder.writes)}; only autoencoders are spliced"
        )
    if (reads and writes and reads != writes) or getattr(coder, "W_skip", None) is not None:
        raise Refused(
            f"the coder at {site} is a transcoder: it does not write what it reads, so that its error is not this tensor's; "
            "make an attribution graph with it"
        )


def _named(coder: Any, which: str) -> list[str]:
    """The sites that a coder says it ``reads`` or ``writes``; empty where it does not say."""
    sites = (getattr(coder, "about", None) or {}).get(which) or []
    return [sites] if isinstance(sites, str) else list(sites)
