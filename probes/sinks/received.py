"""Which tokens of a text receive attention, layer by layer?

The share of a token is the mean weight that a query which may see it gives it, as in ``probes/sinks/scores.py``, here for every
sequence by itself and averaged over heads (or over the heads asked for). ``most`` is the largest share that any of them gives, so
a sink of one head is not lost in the mean; ``mass`` is the sum over the queries, which says how much in all and favours early
tokens of causal maps. Shares of signed maps are of absolute weights, the mean signed weight stands beside them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.errors import Refused
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap, head_index
from workbench.models.protocol import Tokens
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.sinks.shares import Columns, columns
from workbench.probes.sources import Source, maps_of, provenance_of
from workbench.probes.tables import TokenTable
from workbench.run import Run

_UNITS = {
    "received": "mean weight per query",
    "most": "mean weight per query, of the head that gives most",
    "mass": "sum of weights over queries",
    "inside": "mean weight per query, inside the gate",
    "signed": "mean signed weight per query",
}


def received(
    source: Source,
    *,
    heads: Sequence[int] | None = None,
    relative: bool = False,
    mask: Mask | None = None,
) -> TokenTable:
    """Measures ``received``, ``most``, ``mass`` ``[L, B, T]``; with gated layers ``inside`` (``received`` is of the map as it
    acts), with signed layers ``signed`` (NaN in others). The null of the first is evenly spread attention.

    ``heads``: only these, of every layer; all by default. ``relative`` and ``mask`` as in ``sinks``. Tokens count from the first
    real one of each sequence, NaN where there is none; layers with fewer keys than others are NaN at the end. Column sums only,
    so nothing of size Q x K is built, but for signed and relative maps and padding queries, which are walked in row chunks.
    """
    maps = maps_of(source)
    tokens = source.tokens if isinstance(source, Run) else None
    found = {name: columns(name, amap, tokens, mask=mask, relative=relative) for name, amap in maps.items()}
    inside, undefined = _inside(maps, tokens, mask, relative)
    chosen = {
        name: list(range(m.shape[1])) if heads is None else head_index(heads, m.shape[1]) for name, m in maps.items()
    }
    width = max(amap.shape[3] for amap in maps.values())

    def stack(per_layer: dict[int | str, Tensor]) -> Tensor:
        return torch.stack([_widened(part, width) for part in per_layer.values()])

    def over_heads(name: int | str, part: Tensor) -> Tensor:
        return part[:, chosen[name]].mean(1)

    values = {
        "received": stack({name: over_heads(name, layer.share) for name, layer in found.items()}),
        "most": stack({name: layer.share[:, chosen[name]].amax(1) for name, layer in found.items()}),
        "mass": stack({name: over_heads(name, layer.mass) for name, layer in found.items()}),
    }
    if any(isinstance(amap, GatedMap) or amap.row_sum == "gate" for amap in maps.values()):
        values["inside"] = stack({name: over_heads(name, part) for name, part in inside.items()})
    if any(layer.signed is not None for layer in found.values()):
        none = float("nan")
        signed = {n: torch.full_like(c.share, none) if c.signed is None else c.signed for n, c in found.items()}
        values["signed"] = stack({name: over_heads(name, part) for name, part in signed.items()})
    if bool(values["received"].isnan().any()):
        undefined["received"] = "padding, or tokens that no query may see"
    return TokenTable(
        title="Attention that each token receives",
        values=values,
        units={name: _UNITS[name] for name in values},
        tokens=_names(list(found.values())),
        layers=tuple(maps),
        null={"received": stack({name: over_heads(name, layer.uniform) for name, layer in found.items()})},
        undefined=undefined,
        provenance=provenance_of(source),
    )


def _inside(
    maps: dict[int | str, AttentionMap], tokens: Tokens | None, mask: Mask | None, relative: bool
) -> tuple[dict[int | str, Tensor], dict[str, str]]:
    """Shares of the attention inside the gates, NaN in a layer that does not hold it, and why."""
    found: dict[int | str, Tensor] = {}
    reasons: dict[str, str] = {}
    for name, amap in maps.items():
        try:
            found[name] = columns(name, amap, tokens, raw=True, mask=mask, relative=relative).share
        except Refused as error:
            b, h, _, k = amap.shape
            found[name] = torch.full((b, h, k), float("nan"), dtype=torch.float64)
            reasons[f"inside, layer {name}"] = str(error)
    return found, reasons


def _widened(part: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(part, (0, width - part.shape[-1]), value=float("nan"))


def _names(layers: list[Columns]) -> tuple[tuple[str, ...], ...]:
    """Texts of the tokens from the first real one; none where layers disagree."""
    told = {tuple(tuple(text for text in row if text) for row in layer.pad.names) for layer in layers}
    return told.pop() if len(told) == 1 else ()


ANALYSES = (
    Analysis(
        name="received",
        question="Which tokens of a text receive attention, layer by layer?",
        function=received,
        example=lambda: {"source": random_maps(batch=2)},
        paper="Gu et al. 2024 (arXiv 2410.10781), section 3; 2512.22213 scores secondary sinks by it",
        source="maps",
        null="evenly spread attention",
        definition="averaged over heads; signed maps by absolute weights",
    ),
)
