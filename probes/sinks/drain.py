"""Which heads look at a sink because there is nothing there to read?

Guo et al. (arXiv 2410.13835) find that a head goes dormant by giving its weight to a token whose value is close to
zero: in layers where a token is a sink its value shrinks while its residual stream grows,

    r_v = |v_s| / mean_t |v_t|,     r_x = |x_s| / mean_t |x_t|.

A head is dormant on a text if the sink takes more than ``mass`` of its attention and r_v is below ``drained``. A sink
without drained values is no dormancy, and a drained value that nobody looks at is none either: both numbers stand in
the table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.models.protocol import Tokens
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled_run
from workbench.probes.sinks.shares import shares
from workbench.probes.sources import read_site
from workbench.probes.tables import HeadTable
from workbench.run import Run

READS = ("blocks.{l}.attn.hook_v", "blocks.{l}.hook_resid_pre")


def value_drain(run: Run, *, key: int = 0, mass: float = 0.5, drained: float = 0.3) -> HeadTable:
    """Per head: ``sink_mass`` (mean weight that a query gives the sink), ``r_v``, ``r_x`` (one per layer, repeated),
    and ``dormant`` (1 or 0, from the means over sequences), with intervals over sequences.

    ``run`` has captured maps and read ``hook_v`` and ``hook_resid_pre`` of its layers. ``key`` counts from the first
    real token. The nulls of r_v and r_x are the same ratio for the other tokens (its median over them), that of
    ``sink_mass`` is even attention. Norms of queries that share a value head are the group's. Layers without a value
    tensor that was read are refused.
    """
    if key < 0 or not 0 < mass < 1 or drained <= 0:
        raise WorkbenchError(f"key is 0 or more, mass in (0, 1), drained positive; got {key=}, {mass=}, {drained=}")
    if not run.maps:
        raise WorkbenchError("this run captured no attention; run it again with maps=wb.capture()")
    each: dict[str, dict[int | str, Tensor]] = {name: {} for name in ("sink_mass", "r_v", "r_x")}
    null: dict[str, dict[int | str, Tensor]] = {name: {} for name in each}
    dormant: dict[int | str, Tensor] = {}
    for layer, amap in run.maps.items():
        v, x = (read_site(run, kind, layer).cpu().double() for kind in ("v", "resid_pre"))
        heads, groups = amap.shape[1], v.shape[2]
        found = shares(layer, amap, run.tokens, token=key)
        own_v, other_v = _ratios(v.norm(dim=-1).transpose(1, 2), run.tokens, key)
        own_x, other_x = _ratios(x.norm(dim=-1)[:, None], run.tokens, key)
        each["sink_mass"][layer] = found.first
        each["r_v"][layer] = own_v.repeat_interleave(heads // groups, 1)
        each["r_x"][layer] = own_x.expand(-1, heads)
        null["sink_mass"][layer] = found.uniform[:, min(key, found.uniform.shape[1] - 1)]
        null["r_v"][layer] = other_v.repeat_interleave(heads // groups, 1)
        null["r_x"][layer] = other_x.expand(-1, heads)
        quiet = (found.first.nanmean(0) > mass) & (each["r_v"][layer].nanmean(0) < drained)
        dormant[layer] = quiet.double()
    units = {"dormant": "1 or 0", "sink_mass": "mean weight", "r_v": "of the mean norm", "r_x": "of the mean norm"}
    return HeadTable.averaged(
        "Value drain", each, units, single={"dormant": dormant}, null=null, provenance=run.provenance
    )


def _ratios(norms: Tensor, tokens: Tokens, key: int) -> tuple[Tensor, Tensor]:
    """Of norms ``[B, G, T]``: that of the key over the mean of all real tokens ``[B, G]``, and the median over the
    others."""
    real = tokens.mask.cpu()
    if real.shape[1] != norms.shape[2]:
        real = torch.ones(norms.shape[0], norms.shape[2], dtype=torch.bool)
    place = real.int().argmax(1) + key
    if int(real.sum(1).min()) < key + 2:
        raise WorkbenchError(f"key {key} and others to compare it with need texts of {key + 2} tokens or more")
    ratio = (norms / (norms * real[:, None]).sum(-1, keepdim=True) * real.sum(1)[:, None, None]).masked_fill(
        ~real[:, None], float("nan")
    )
    at = place[:, None, None].expand(*ratio.shape[:2], 1)
    return ratio.gather(-1, at)[..., 0], ratio.scatter(-1, at, float("nan")).nanmedian(-1).values


ANALYSES = (
    Analysis(
        name="value-drain",
        question="Which heads look at a sink because there is nothing there to read?",
        function=value_drain,
        example=lambda: {
            "run": bundled_run(read=tuple(site.replace("{l}", str(i)) for i in range(4) for site in READS))
        },
        paper="Guo et al. 2024 (arXiv 2410.13835)",
        source="run",
        null="the same ratios for the other tokens of the text, even attention",
        cause="workbench.probes.sinks.inactive.zeroable",
        definition="the thresholds of dormant, more than half of the attention and less than 0.3 of the mean norm, are ours",
        reads=READS,
    ),
)
