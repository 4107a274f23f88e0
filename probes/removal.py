"""What does a model say with parts of it taken out, many variations at a time?

Removal means: ``zero``; ``mean`` (over the real tokens of the inputs); ``resample`` (the part's output on the next example of the
batch, real token by real token); ``counterfactual`` (its output on the corrupted prompt of the pair). Variations of one input
share a batch, so a small model is not called once for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Edit, Model, Tokens
from workbench.pairs import Pairs
from workbench.probes.sources import prompts_of
from workbench.run import Activations, Run
from workbench.sites import Site

ABLATIONS = ("zero", "mean", "resample", "counterfactual")
_NUMBERS = 2**24
"""Numbers of the widest tensor that variations in one batch may fill: 64 MiB in float32."""
_COPIED = {"pixel_values", "input_features", "decoder_input_ids", "decoder_attention_mask", "token_type_ids"}


@dataclass(frozen=True, order=True)
class Heads:
    """Heads of one layer that are removed together, such as the query heads of one KV group."""

    layer: int
    heads: tuple[int, ...]
    stack: str = ""

    def __post_init__(self) -> None:
        if not self.heads or len(set(self.heads)) < len(self.heads):
            raise WorkbenchError(f"heads removed together are one or more different ones; got {list(self.heads)}")

    @property
    def sites(self) -> tuple[Site, ...]:
        """``hook_z`` of every head."""
        return tuple(Site("z", self.layer, head, self.stack) for head in self.heads)

    def __str__(self) -> str:
        return f"{Site('z', self.layer, None, self.stack)}[{','.join(map(str, self.heads))}]"


Part = Site | Heads | tuple[int, int]
"""A site whose tensor is replaced, heads removed together, or ``(layer, head)`` for the head's ``hook_z``."""


def as_site(part: Site | tuple[int, int]) -> Site:
    """``(layer, head)`` is the head's output before ``W_O``."""
    if isinstance(part, Site):
        return part
    layer, head = part
    return Site("z", layer, head)


def as_part(part: Part) -> Site | Heads:
    """A site or heads of a layer, whichever way it was written."""
    return part if isinstance(part, Heads) else as_site(part)


def sites_of(part: Site | Heads) -> tuple[Site, ...]:
    """The sites that are replaced when the part is removed."""
    return part.sites if isinstance(part, Heads) else (part,)


def kv_groups(model: Model, stack: str = "") -> list[Heads]:
    """The query heads of every KV group, layer by layer."""
    size = model.shape.heads // model.shape.kv_heads
    return [
        Heads(layer, tuple(range(group * size, (group + 1) * size)), stack)
        for layer in attention_layers(model, stack)
        for group in range(model.shape.kv_heads)
    ]


def all_heads(model: Model, stack: str = "") -> list[Site]:
    """Every head of every layer that serves ``hook_z``."""
    layers = attention_layers(model, stack)
    return [Site("z", layer, head, stack) for layer in layers for head in range(model.shape.heads)]


def attention_layers(model: Model, stack: str = "") -> list[int]:
    """The layers of a stack that serve ``hook_z``."""
    served = [Site.parse(name) for name in model.manifest().sites]
    found = sorted(
        {site.layer for site in served if site.kind == "z" and site.stack == stack and site.layer is not None}
    )
    if not found:
        stacks = sorted({site.stack for site in served if site.kind == "z"})
        raise Refused(f"{model.name} serves hook_z in no layer of stack {stack!r}; stacks that do: {stacks}")
    return found


@dataclass(frozen=True)
class Removal:
    """A model on inputs, and what stands in for its parts. ``plain`` is the run with nothing removed; ``instead`` holds per
    site what replaces it: one vector for all tokens, or a tensor of the site's shape."""

    model: Model
    ablation: str
    plain: Run
    instead: Mapping[Site, Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: Model, inputs: Any, parts: Sequence[Site | Heads], ablation: str) -> Removal:
        """Runs the model once, and on the corrupted prompts for ``counterfactual``."""
        if ablation not in ABLATIONS:
            raise UnknownName("ablation", ablation, ABLATIONS)
        sites = list(dict.fromkeys(site.whole for part in parts for site in sites_of(part)))
        named = [*sites, *(site for part in parts for site in sites_of(part))]  # a head that is none is refused here
        if ablation == "counterfactual":
            if not isinstance(inputs, Pairs):
                raise WorkbenchError(f"a counterfactual is the corrupted prompt of pairs; got {type(inputs).__name__}")
            other = model.run(inputs.corrupt, read=named, logits=None).acts
            return cls(model, ablation, model.run(inputs.clean), {site: other[site] for site in sites})
        tokens = prompts_of(inputs)
        run = model.run(tokens, read=() if ablation == "zero" else named)
        if ablation == "zero":
            return cls(model, ablation, run, {})
        if ablation == "resample" and len(run.tokens.mask) < 2:
            raise WorkbenchError("resampling takes the output on another example: give two or more")
        make = _means if ablation == "mean" else _others
        instead = {site: make(site, run.acts[site], run.tokens.mask) for site in sites}
        return cls(model, ablation, replace(run, acts=Activations({})), instead)

    def edit(self, site: Site) -> Edit:
        """What stands in for a site, as an edit."""
        if self.ablation == "zero":
            return torch.zeros_like
        whole = self.instead[site.whole]
        axis = 0 if self.ablation == "mean" else site.head_axis
        value = whole if site.head is None else whole.select(axis, site.head)
        return lambda output: value.to(output).expand_as(output)

    def runs(self, removals: Sequence[Sequence[Site | Heads]]) -> Iterator[Run]:
        """A run per set of removed parts, in order."""
        edits = [{site: self.edit(site) for part in parts for site in sites_of(part)} for parts in removals]
        return variations(self.model, self.plain, edits)


def variations(model: Model, plain: Run, edits: Sequence[Mapping[Site, Edit]]) -> Iterator[Run]:
    """The inputs of ``plain`` run once per set of edits, as many copies in a batch as fit: runs with logits and output."""
    tokens = plain.tokens
    at_once = _at_once(model, plain)
    for lo in range(0, len(edits), at_once):
        group = edits[lo : lo + at_once]
        if len(group) == 1:
            one: dict[Site | str, Edit | Tensor] = dict(group[0].items())
            yield model.run(tokens, edit=one)
            continue
        sites = dict.fromkeys(part.whole for each in group for part in each)
        run = model.run(_copies(tokens, len(group)), edit={site: _together(site, group) for site in sites})
        parts = [None if x is None else x.chunk(len(group)) for x in (run.logits, run.output)]
        for i in range(len(group)):
            logits, output = (None if part is None else part[i] for part in parts)
            yield Run(tokens, logits=logits, output=output, provenance=run.provenance)


def _together(site: Site, group: Sequence[Mapping[Site, Edit]]) -> Edit:
    """Copy k of the batch gets the k-th set of edits."""

    def edit(value: Tensor) -> Tensor:
        value = value.clone(memory_format=torch.contiguous_format)
        for copy, edits in zip(value.unflatten(0, (len(group), -1)), group, strict=True):
            for part, change in edits.items():
                if part.whole == site:
                    piece = copy if part.head is None else copy.select(site.head_axis, part.head)
                    piece.copy_(change(piece))
        return value

    return edit


def _at_once(model: Model, plain: Run) -> int:
    tokens = plain.tokens
    batch = len(tokens.ids)
    if not set(tokens.inputs) <= _COPIED or any(len(x) != batch for x in tokens.inputs.values()):
        return 1
    shape = model.shape
    length = tokens.ids.shape[1] or (1 if plain.output is None else plain.output[0].numel() // plain.output.shape[-1])
    return max(1, _NUMBERS // max(1, batch * length * max(shape.vocab or 0, shape.heads * shape.width)))


def _copies(tokens: Tokens, n: int) -> Tokens:
    inputs = {name: x.repeat(n, *[1] * (x.ndim - 1)) for name, x in tokens.inputs.items()}
    return Tokens(tokens.ids.repeat(n, 1), tokens.mask.repeat(n, 1), tokens.labels * n, inputs)


def _means(site: Site, values: Tensor, real: Tensor) -> Tensor:
    """Mean over real tokens, ``[...]`` from ``[B, T, ...]``."""
    if site.head_axis != 2:
        raise Refused(f"{site} has no axis of tokens to average over; remove it with zero or resample")
    kept = values[real.to(values.device)] if real.shape == values.shape[:2] else values.flatten(0, 1)
    return kept.mean(0)


def _others(site: Site, values: Tensor, real: Tensor) -> Tensor:
    """The values on the next example: its t-th real token for the t-th real token, starting again where it is shorter."""
    if real.shape != values.shape[:2] or bool(real.all()):
        return values.roll(len(values) // len(real), 0)  # windows of one image stand together
    out = values.clone()
    for b in range(len(values)):
        mine, theirs = real[b].nonzero()[:, 0], real[b - 1].nonzero()[:, 0]
        out[b, mine] = values[b - 1, theirs[torch.arange(len(mine)) % len(theirs)]]
    return out
