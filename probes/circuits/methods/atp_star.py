"""AtP*: attribution patching of nodes without its two blind spots (arXiv 2403.00745; constants and details: our reading).

QK fix. Where attention is saturated, the gradient at queries and keys is 0 whatever their effect. Therefore the output of a
head is computed again with the query of the replacement, its key, and its value, one at a time, everything else clean, and
only from there on the effect is first-order: score_c = (z - z[c replaced]) . dm/dz. With the pattern A of the head this is
(A - A_patched) . dm/dA for queries and keys, since dm/dA_ij = v_j . dm/dz_i. The head's score is q + k + v.

GradDrop. Effects through later layers can cancel in the gradient. Once for each layer l the gradient through its sublayers
(attention and MLP of block l) is set to 0; then the scores' magnitudes are averaged, sum_l |score_l| / (L - 1): a node of
layer l has no gradient when l is dropped, hence L - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from workbench.catalogue import variants
from workbench.circuits import Circuit
from workbench.errors import Refused
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.circuits.components import INPUT, Acts, Component, Edits, Setting, components, gather, served
from workbench.probes.circuits.method import Method
from workbench.probes.circuits.replacements import Replacements
from workbench.sites import Site

CHANNELS = ("q", "k", "v")


def atp_star(setting: Setting, level: str, *, drop: bool = True) -> Circuit:
    """Magnitude of the effect of every node, at least 0; ``drop=False`` leaves out GradDrop and gives signed scores.

    Columns: ``q``, ``k`` and ``v``, which sum to a head's score (NaN for MLPs), and ``signed``, the score without GradDrop.
    Magnitudes are taken per example and part before anything is averaged. A part at several positions is replaced at all of
    them together. Passes per batch: 2 + 3 x places forward, one of them backward too, 1 + L times. Refused for mixers other
    than softmax attention, and with ``drop`` for a single layer.
    """
    units, sites = components(setting.model), _sites(setting.model)
    layers = setting.model.shape.layers
    if drop and layers < 2:
        raise Refused(f"GradDrop averages over the other layers, and {setting.model.name} has one; use drop=False")
    inputs = [site for channel in CHANNELS for site in sites[channel]]
    outputs = [*sites["z"], *sites["mlp_out"]]
    replacements = Replacements(setting, [*inputs, *sites["mlp_out"]])
    signed, sizes = ({site: torch.zeros((), dtype=torch.float64) for site in outputs} for _ in range(2))
    for pairs in setting.chunks():
        clean, _ = gather(setting.model, pairs.clean, [*inputs, *outputs], logits=None)
        lost = _losses(setting, pairs, clean, replacements.of(pairs, clean), sites)
        backward = _graph(setting, pairs, outputs)
        for site, effect in _effects(lost, backward(None)).items():
            signed[site] = signed[site] + effect.sum(2)
        for layer in range(layers) if drop else ():
            for site, effect in _effects(lost, backward(layer)).items():
                sizes[site] = sizes[site] + effect.abs().sum(2) / (layers - 1)
    parts = _of_units(units, sizes if drop else signed) / len(setting.pairs)
    plain = _of_units(units, signed) / len(setting.pairs)
    columns = dict(zip(CHANNELS, parts, strict=False))  # the fourth row is that of the MLPs
    columns["signed"] = plain.nansum(0)
    names = setting.places.of_each([unit.name for unit in units])
    return Circuit(level, names, parts.nansum(0), torch.ones(len(names), dtype=torch.bool), columns=columns)


def _sites(model: Model) -> dict[str, list[Site]]:
    """Sites of queries, keys, values, head outputs and MLP outputs."""
    families = {variant.name: variant.family for variant in variants()}
    for record in model.manifest().layers:
        kind = families.get(record.mixer, record.mixer)
        if "softmax" not in kind:
            raise Refused(
                f"atp-star computes the softmax of attention again, and layer {record.layer} of {model.name} is "
                f"{record.mixer}; use method='atp'"
            )
    known = served(model)
    found = {kind: [Site(kind, layer) for layer in range(model.shape.layers)] for kind in (*CHANNELS, "z")}
    missing = [str(site) for of_kind in found.values() for site in of_kind if site not in known]
    if missing:
        raise Refused(f"atp-star edits queries, keys and values, and {model.name} does not serve {missing[0]}")
    return {**found, "mlp_out": [s for layer in range(model.shape.layers) if (s := Site("mlp_out", layer)) in known]}


@torch.no_grad()
def _losses(setting: Setting, pairs: Pairs, clean: Acts, instead: Acts, sites: dict[str, list[Site]]) -> Acts:
    """What outputs lose, clean - replaced: of heads when a channel is replaced at a place, ``[channels, places, B, T, H, E]``;
    of MLPs ``[1, places, B, T, D]``."""
    index, places = setting.places.index(pairs), range(len(setting.places))
    found: dict[Site, list[Tensor]] = {site: [] for site in sites["z"]}
    for channel in CHANNELS:
        for place in places:
            edits: Edits = {site: _swapped(index == place, instead[site]) for site in sites[channel]}
            edits |= {site: _recorded(found[site], clean[site]) for site in sites["z"]}
            setting.model.run(pairs.clean, edit=edits, logits=None)
    lost = {site: torch.stack(values).unflatten(0, (len(CHANNELS), -1)) for site, values in found.items()}
    for site in sites["mlp_out"]:
        change = clean[site] - instead[site]
        here = torch.stack([index == place for place in places])[..., None]
        lost[site] = (change * here.to(change))[None]
    return lost


def _swapped(here: Tensor, instead: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda value: torch.where(here[..., None, None].to(value.device), instead.to(value), value)


def _recorded(lost: list[Tensor], clean: Tensor) -> Callable[[Tensor], Tensor]:
    """Keeps what the output lost and hands on the clean one, so that later layers are clean."""

    def edit(value: Tensor) -> Tensor:
        lost.append(clean - value)
        return clean.to(value)

    return edit


def _graph(setting: Setting, pairs: Pairs, sites: list[Site]) -> Callable[[int | None], Acts]:
    """One run on the clean prompts, and the gradient of its summed metric at ``sites`` as often as it is asked for; with a
    layer, without what flows through the sublayers of that layer."""
    ends: dict[Site, torch.autograd.graph.GradientEdge] = {}
    zeros: Acts = {}
    dropped: list[int | None] = [None]

    def at(site: Site) -> Callable[[Tensor], Tensor]:
        def edit(value: Tensor) -> Tensor:
            inner = value.view_as(value) if value.grad_fn is not None else value.detach().requires_grad_().clone()
            ends[site], zeros[site] = get_gradient_edge(inner), torch.zeros_like(inner.detach())
            if site == INPUT:
                return inner
            outer = inner.view_as(inner)
            outer.register_hook(lambda grad: torch.zeros_like(grad) if dropped[0] == site.layer else grad)
            return outer

        return edit

    with torch.enable_grad():
        run = setting.model.run(pairs.clean, edit={site: at(site) for site in (INPUT, *sites)})
        total = setting.measure(run.logits, pairs).sum()
    if not total.requires_grad:
        raise Refused(f"the metric of {setting.model.name} has no gradient; use method='patching'")

    def backward(layer: int | None) -> Acts:
        dropped[0] = layer
        grads = torch.autograd.grad(total, [ends[site] for site in sites], retain_graph=True, allow_unused=True)
        return {site: zeros[site] if grad is None else grad for site, grad in zip(sites, grads, strict=True)}

    return backward


def _effects(lost: Acts, slope: Acts) -> Acts:
    """lost . slope of every example: ``[channels, places, B, H]`` of heads, ``[1, places, B, 1]`` of MLPs."""
    products = {site: (value.double() * slope[site].double()).sum((3, -1)).cpu() for site, value in lost.items()}
    return {site: value if value.ndim == 4 else value[..., None] for site, value in products.items()}


def _of_units(units: Sequence[Component], totals: Acts) -> Tensor:
    """``[channels, units x places]``; an MLP, which has no channels, has its score in a fourth row."""
    rows = []
    for unit in units:
        of_unit = totals[unit.site.whole][..., unit.site.head or 0]  # [channels or 1, places]
        empty = torch.full_like(of_unit[:1], torch.nan)
        rows.append(
            torch.cat([of_unit, empty] if len(of_unit) == len(CHANNELS) else [*[empty] * len(CHANNELS), of_unit])
        )
    return torch.stack(rows, 1).flatten(1)


METHODS = (
    Method(
        "atp-star",
        "attribution patching with the softmax computed again and without cancelling gradients (QK fix, GradDrop)",
        atp_star,
        "Kramár et al. 2024 (arXiv 2403.00745)",
        levels=("node",),
        ablations=("counterfactual", "zero", "mean"),
        positions=True,
    ),
)
