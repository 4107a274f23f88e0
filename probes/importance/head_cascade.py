"""Which heads would SpAtten keep, and which values does a row need?

SpAtten (arXiv 2012.09852), head side: the importance of a head is the sum of the absolute values of its output, over tokens and
width, added up over the layers so far by the head's number; after every layer the best heads are kept, and a head that is dropped
is dropped in all later layers (cascade). Local value pruning: each query fetches only the values of its largest weights.

Size is no proof of use: a head may write much that nobody reads. ``ablation_curve`` with this ranking tells.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled_run, random_maps
from workbench.probes.sources import (
    Source,
    maps_of,
    need_shares,
    provenance_of,
    real_mean,
    real_tokens,
    sites_read,
    tokens_of,
    ungated,
)
from workbench.probes.tables import HeadTable
from workbench.probes.visibility import layer_visibility
from workbench.run import Run

_CHUNK = 2**21


def head_cascade(run: Run, *, keep: float = 1.0) -> HeadTable:
    """Size of every head's output, its sum over layers, and what a cascade of head pruning leaves.

    ``run`` must have read ``hook_z`` (or ``hook_result``, after W_O) of its layers. Measures: ``output``, mean absolute value per
    real token and channel of the layer's head, mean over sequences with 95% intervals; ``importance``, its sum over the layers so
    far of the heads with that number, while they are there; ``survives`` (1 or 0) after the layer. ``keep``: the share of the
    heads left that stays after each layer, rounded up. ``null`` of ``output``: the mean of the layer's heads.
    """
    if not 0 < keep <= 1:
        raise WorkbenchError(f"keep is a share of the heads, in (0, 1]; got {keep}")
    outputs = _outputs(run)
    counts = {row.shape[1] for row in outputs.values()}
    if len(counts) > 1:
        raise Refused(f"heads cascade by their number; the layers have {sorted(counts)} heads")
    heads = counts.pop()
    alive = torch.ones(heads, dtype=torch.bool)
    total = torch.zeros(heads, dtype=torch.float64)
    output, importance, survives = {}, {}, {}
    for layer, row in outputs.items():
        output[layer] = row.mean(0)
        total = total + output[layer] * alive
        count = math.ceil(int(alive.sum()) * keep - 1e-9)
        order = total.masked_fill(~alive, -1.0).argsort(descending=True, stable=True)[:count]
        alive = torch.zeros_like(alive).index_fill(0, order, True)
        importance[layer], survives[layer] = total.clone(), alive.double()
    return HeadTable.averaged(
        f"Head importance by size of the output, keeping {keep:g} per layer",
        {"output": outputs},
        {"importance": "sum of mean |output|", "output": "mean |output|", "survives": "1 if kept"},
        single={"importance": importance, "survives": survives},
        null={"output": {layer: row.mean().expand(heads) for layer, row in output.items()}},
        provenance=run.provenance,
    )


def value_pruning(source: Source, *, keep: float = 0.25) -> HeadTable:
    """Local value pruning: the share of attention that each row's largest weights hold.

    Of the n keys that a query may see, the ``keep`` share with the largest weights stays, rounded up. Measure ``mass``: what they
    hold of the row's weight, mean over real queries and sequences, with 95% intervals over sequences; ``null``: evenly spread
    attention. The row's output then errs by at most (1 - mass) times the length of the largest value. Rows are taken relative to
    their sum, inside of a gate. Refused for signed maps, whose largest weight is not the one that matters most.
    """
    if not 0 < keep <= 1:
        raise WorkbenchError(f"keep is a share of the keys, in (0, 1]; got {keep}")
    each, null, undefined = {}, {}, {}
    for layer, amap in maps_of(source).items():
        need_shares(layer, amap, "hold no mass to keep")
        inside = ungated(amap)
        seen = layer_visibility(layer, amap, tokens_of(source))
        b, h, queries, keys = inside.shape
        visible = seen.keys().expand(b, -1, -1)
        kept = (visible * keep - 1e-9).ceil()
        held = []
        step = max(1, _CHUNK // max(1, b * h * keys))
        for lo in range(0, queries, step):
            hi = min(queries, lo + step)
            rows = (inside.rows(lo, hi).double().cpu() * seen.tile(lo, hi)).sort(-1, descending=True).values.cumsum(-1)
            at = (kept[..., lo:hi, None].expand(b, h, -1, 1).long() - 1).clamp(min=0)
            held.append((rows.gather(-1, at) / rows[..., -1:])[..., 0])
        each[layer] = torch.cat(held, 2).masked_fill(visible.expand(b, h, -1) < 1, float("nan")).nanmean(2)
        null[layer] = (kept / visible).masked_fill(visible < 1, float("nan")).nanmean(2).expand(b, h)
        if bool(each[layer].isnan().any()):
            undefined[str(layer)] = "a head has no query with weight in some sequence"
    return HeadTable.averaged(
        f"Attention held by the largest {keep:g} of each row",
        {"mass": each},
        {"mass": "share of the row"},
        null={"mass": null},
        undefined=undefined,
        provenance=provenance_of(source),
    )


def _outputs(run: Run) -> dict[int | str, Tensor]:
    """Mean absolute output per sequence and head, ``[B, H]`` in float64, by layer."""
    return {
        layer: real_mean(value.double().abs().mean(-1).transpose(1, 2), real_tokens(run, value))
        for layer, value in sites_read(run, "z", "result").items()
    }


def _example() -> dict[str, Any]:
    return {"run": bundled_run(read=tuple(f"blocks.{layer}.attn.hook_z" for layer in range(4))), "keep": 0.75}


ANALYSES = (
    Analysis(
        name="head-cascade",
        question="Which heads would be kept by the size of their output?",
        function=head_cascade,
        example=_example,
        paper="Wang et al. 2021, SpAtten (arXiv 2012.09852)",
        source="run",
        null="the mean of the layer's heads",
        cause="ablation_curve with the ranking of the table",
        definition="from memory of the paper; the sum of |output| is a mean per token and channel, added up by head number",
        reads=("blocks.{l}.attn.hook_z",),
    ),
    Analysis(
        name="value-pruning",
        question="How much of its attention does each row hold on its largest weights?",
        function=value_pruning,
        example=lambda: {"source": random_maps()},
        paper="Wang et al. 2021, SpAtten (arXiv 2012.09852)",
        source="maps",
        null="evenly spread attention",
        definition="the share kept is of the keys that a query may see, rounded up",
    ),
)
