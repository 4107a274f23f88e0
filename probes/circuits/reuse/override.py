"""Forcing attention: what does a model do when given heads attend where they are told to?

The softmax row of a head at one query of every prompt is replaced by a given distribution w over the keys (Merullo et al.,
arXiv 2310.08744): the head's output there becomes sum_k w_k v_k with the values it has in the same pass, times its gate where
it has one. It is put in at ``hook_z``, which comes to the same as editing the pattern, works where no pattern is built, and
leaves the bits of every other row, head and earlier layer as they are. The map of the layer is made from queries and keys and
does not show the forced row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Edit, Model, Tokens
from workbench.probes.circuits.components import Acts, components, served
from workbench.run import Run
from workbench.sites import Site

_GATED = "gated-softmax"
_SUM = 1e-4


def attention_override(
    model: Model,
    inputs: Any,
    forced: Mapping[str, Tensor],
    queries: Tensor | None = None,
    *,
    read: Iterable[Site | str] = (),
    logits: str | None = "all",
) -> Run:
    """One run over ``inputs`` with the attention of heads ``forced`` at one query per prompt.

    ``forced`` maps a head ``a12.h3`` to a distribution over keys, ``[B, T]`` or ``[T]``, or to the keys themselves as
    booleans, which share the weight evenly. ``queries`` ``[B]`` are positions, the last real token of each prompt if not
    given. Refused for heads that are no softmax over keys, for weight on padding or on keys after the query, and for a row
    that does not sum to 1. A window of the layer does not bind the forced row.
    """
    tokens = inputs if isinstance(inputs, Tokens) else _tokens(model, inputs)
    at = _last(tokens.mask) if queries is None else queries
    return model.run(tokens, read=read, edit=override_edits(model, tokens, forced, at), logits=logits)


def override_edits(
    model: Model, tokens: Tokens, forced: Mapping[str, Tensor], queries: Tensor
) -> dict[Site | str, Edit | Tensor]:
    """The edits of one such run; they hold the values of the pass, so each run needs its own."""
    known = {unit.name: unit.site for unit in components(model) if unit.site.head is not None}
    if queries.shape != tokens.mask.shape[:1]:
        raise WorkbenchError(f"queries are one position per prompt, [{len(tokens.mask)}]; got {list(queries.shape)}")
    rows: dict[int, dict[int, Tensor]] = {}
    for name, target in forced.items():
        if name not in known:
            raise UnknownName(f"head of {model.name}", name, known)
        site = known[name]
        assert site.layer is not None
        assert site.head is not None
        rows.setdefault(site.layer, {})[site.head] = _distribution(model, name, target, tokens.mask, queries)
    edits: dict[Site | str, Edit | Tensor] = {}
    for layer, heads in rows.items():
        _check_softmax(model, layer)
        edits |= _layer_edits(model, layer, heads, queries)
    return edits


def _layer_edits(
    model: Model, layer: int, heads: Mapping[int, Tensor], queries: Tensor
) -> dict[Site | str, Edit | Tensor]:
    held: Acts = {}

    def hold(site: Site) -> Callable[[Tensor], Tensor]:
        def look(value: Tensor) -> Tensor:
            held[site] = value
            return value

        return look

    value_site, gate_site, z_site = Site("v", layer), Site("gate", layer), Site("z", layer)

    def force(z: Tensor) -> Tensor:
        values = held[value_site]
        if z.shape[2] % values.shape[2]:
            raise Refused(f"{model.name} has {z.shape[2]} heads and {values.shape[2]} values in layer {layer}")
        rows, at = torch.arange(len(z), device=z.device), queries.to(z.device)
        new = z.clone()
        for head, weights in heads.items():
            mixed = torch.einsum("bk,bke->be", weights.to(z), values[:, :, head * values.shape[2] // z.shape[2]])
            if gate_site in held:
                mixed = mixed * held[gate_site][rows, at, head, None]
            new[rows, at, head] = mixed
        return new

    followed = [value_site, *([gate_site] if gate_site in served(model) else [])]
    return {**{site: hold(site) for site in followed}, z_site: force}


def _distribution(model: Model, name: str, target: Tensor, mask: Tensor, queries: Tensor) -> Tensor:
    """The row of one head, ``[B, T]`` in float64."""
    size, length = mask.shape
    if target.shape not in ((length,), (size, length)):
        raise WorkbenchError(f"{name} is forced onto keys [{size}, {length}] or [{length}]; got {list(target.shape)}")
    row = target.expand(size, length).cpu()
    weights = row.double()
    if row.dtype == torch.bool:
        weights = weights / weights.sum(1, keepdim=True)
    elif not row.is_floating_point():
        raise WorkbenchError(f"{name} is forced onto a distribution or a boolean choice of keys; got {row.dtype}")
    bad = ~weights.isfinite().all(1) | (weights < 0).any(1) | ((weights.sum(1) - 1).abs() > _SUM)
    if bad.any():
        why = "no key" if row.dtype == torch.bool else f"weights that sum to {float(weights[bad][0].sum()):.4g}"
        raise WorkbenchError(
            f"{name} is given {why} in prompt {int(bad.nonzero()[0])}; a row holds weights >= 0 with sum 1"
        )
    hidden = ~mask.cpu()
    if model.shape.causal:
        hidden = hidden | (torch.arange(length) > queries.cpu()[:, None])
    if (weights[hidden] > 0).any():
        prompt = int(((weights > 0) & hidden).any(1).nonzero()[0])
        raise WorkbenchError(
            f"{name} is forced onto a key that query {int(queries[prompt])} of prompt {prompt} does not see"
        )
    return weights


def _check_softmax(model: Model, layer: int) -> None:
    sites = served(model)
    for site in (Site("v", layer), Site("z", layer)):
        if site not in sites:
            raise Refused(f"{model.name} does not serve {site}, which forcing its attention needs")
    record = next(record for record in model.manifest().layers if record.layer == layer)
    gated = "output gate" in f"{record.mixer} {record.missing}"
    if gated or not (record.mixer.startswith("softmax") or (record.mixer == _GATED and Site("gate", layer) in sites)):
        what = f"{record.mixer}, {record.missing}" if gated else record.mixer
        raise Refused(
            f"layer {layer} of {model.name} is {what}: only heads whose output is a softmax row times its values can be forced"
        )


def _tokens(model: Model, inputs: Any) -> Tokens:
    if isinstance(inputs, Tensor):
        return Tokens.of(inputs, model.tokenizer)
    if isinstance(inputs, Mapping):
        plain = Tokens.of(torch.as_tensor(inputs["input_ids"]), model.tokenizer)
        mask = inputs.get("attention_mask")
        return plain if mask is None else Tokens(plain.ids, torch.as_tensor(mask).bool(), plain.labels)
    return model.tokens(inputs)


def _last(mask: Tensor) -> Tensor:
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
