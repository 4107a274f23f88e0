"""How sharp is a head's attention, and does it point where a rule says it should?

Measures of localist models (Localist LLMs with Recruitment Learning, 2025; follow-up arXiv 2511.03559): the entropy of
the rows in bits, H = -sum_k A log2 A, and the pointer fidelity, the weight on the keys that a rule names as the targets
of a query. Uniform attention over n keys has log2 n bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.maps import AttentionMap
from workbench.mods import Mod
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import random_maps
from workbench.probes.masses import mean_masses
from workbench.probes.sources import Source, inner, maps_of, need_shares, provenance_of, tokens_of
from workbench.probes.tables import HeadTable
from workbench.probes.visibility import layer_visibility


def pointer_fidelity(source: Source, targets: Tensor | Mod, *, raw: bool = False) -> HeadTable:
    """Per head the ``fidelity`` and the ``entropy`` in bits, means over queries and then sequences, with intervals.

    ``targets`` names the keys that a rule points at: a function (b, h, q, k) -> bool, or a tensor ``[Q]`` or ``[B, Q]``
    with the key of each query, -1 for a query without one. Fidelity is a mean over queries with a target they may see;
    its null is even attention. Entropy is a mean over queries with weight, its null log2 of the number of visible keys.
    Entropy is NaN where rows are no distributions, fidelity where no query has a target. Padding does not count;
    ``raw=True`` looks inside the gate of gated maps.
    """
    each: dict[str, dict[int | str, Tensor]] = {"fidelity": {}, "entropy": {}}
    null: dict[str, dict[int | str, Tensor]] = {"fidelity": {}, "entropy": {}}
    undefined = {}
    for name, amap in maps_of(source).items():
        asked = inner(name, amap, raw)
        need_shares(name, asked, "do not add up to a fidelity")
        seen = layer_visibility(name, asked, tokens_of(source))
        mod = _mod(targets, asked) if isinstance(targets, Tensor) else targets
        masses, even = mean_masses(asked, seen, [mod])
        try:
            weighty = seen.real[:, None] & (asked.row_sums().detach().cpu() > 0)
            found = asked.entropy().detach().cpu().double() / math.log(2)
            bits = torch.where(weighty, found, 0.0).sum(-1) / weighty.sum(-1)
            if bool(bits.isnan().any()):
                undefined[f"{name} entropy"] = "a head has no query with weight in some sequence"
        except Refused as error:
            bits = torch.full(masses.shape[1:], float("nan"), dtype=torch.float64)
            undefined[str(name)] = str(error)
        count = seen.keys()
        most = torch.where(count > 0, count.clamp(min=1).log2(), 0.0).sum(-1) / seen.real.sum(-1)[:, None]
        each["fidelity"][name], null["fidelity"][name] = masses[0], even[0]
        each["entropy"][name], null["entropy"][name] = bits, most.expand_as(bits)
        if bool(masses.isnan().all()):
            undefined[f"{name} fidelity"] = "no query has a target that it may see"
    units = {"fidelity": "mean weight on the target", "entropy": "bits"}
    return HeadTable.averaged("Pointers", each, units, null=null, undefined=undefined, provenance=provenance_of(source))


def _mod(targets: Tensor, amap: AttentionMap) -> Mod:
    b, _, queries, keys = amap.shape
    table = targets[None] if targets.ndim == 1 else targets
    if table.is_floating_point() or table.ndim != 2 or table.shape[1] != queries or len(table) not in (1, b):
        raise WorkbenchError(f"targets are keys [B, Q] = {[b, queries]}, -1 for none; got {list(targets.shape)}")
    if int(table.max()) >= keys or int(table.min()) < -1:
        raise WorkbenchError(f"targets are keys below {keys}, or -1; got {int(table.min())} to {int(table.max())}")
    table = table.expand(b, -1)

    def mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return table.to(q.device)[b, q - amap.offset] == k

    return mod


ANALYSES = (
    Analysis(
        name="pointer-fidelity",
        question="How sharp is a head's attention, and does it point where a rule says?",
        function=pointer_fidelity,
        example=lambda: {"source": random_maps(), "targets": torch.arange(12) - 1},
        paper="Localist LLMs with Recruitment Learning (2025); follow-up arXiv 2511.03559",
        source="maps",
        null="evenly spread attention over the visible keys",
    ),
)
