"""Which heads of a layer repeat each other?

The redundancy of a head is the mean cosine of its flattened map with those of the other heads of its layer (EfficientViT, arXiv
2305.07027). It says that heads look at the same places, not that they say the same; for
that, ``output_redundancy`` compares what heads write: the cosine of their outputs in residual space, after W_O, and linear CKA,
which does not depend on the basis of either,

    CKA(X, Y) = |X^T Y|^2 / (|X^T X| |Y^T Y|),   X, Y tokens x channels, centred over tokens.

If a head repeats others, the model should do without it: ``redundancy_curve`` removes heads by redundancy, beside random ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.errors import UnknownName, WorkbenchError
from workbench.probes.ablation import AblationCurve, ablation_curve
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import SENTENCE, bundled, bundled_run, random_maps
from workbench.probes.similarity.aligned import aligned_layers
from workbench.probes.similarity.head_sharing import cosines
from workbench.probes.sources import Source, provenance_of, real_tokens, sites_read
from workbench.probes.tables import HeadTable
from workbench.run import Run

if TYPE_CHECKING:
    from workbench.models.protocol import Model

ALONE = "the only head of its layer has no others to repeat"
DEAD = "a head without weight, or with constant output, resembles nothing"


def head_redundancy(source: Source, *, raw: bool = False) -> HeadTable:
    """``cosine``: mean cosine of a head's flattened map with those of the other heads of its layer; ``nearest``: the largest one,
    with ``partner``, whose it is. Means over sequences with 95% intervals.

    The null is the mean over all shuffles of the other head's visible keys, row by row. Gated maps count as they act,
    ``raw=True`` looks inside the gate; signed maps have cosines between -1 and 1. A layer of one head, and heads without weight,
    are NaN. Rows are walked once, in chunks.
    """
    found = {}
    for name, layer in aligned_layers(source, raw=raw).items():
        each, chance = cosines(layer, layer)
        found[name] = {"cosine": (each, (chance + chance.mT) / 2)}
    return _table("Redundancy of heads, by maps", found, source, {"cosine": "mean cosine with the other heads"})


def output_redundancy(run: Run, *, site: str = "result") -> HeadTable:
    """The same of head outputs: ``cosine`` (mean with the others of the layer, outputs flattened over real tokens), ``nearest``,
    ``partner``, and ``cka`` (mean linear CKA with the others).

    ``run`` must have read ``blocks.{l}.attn.hook_result`` of the layers (outputs in residual space, after W_O), or
    ``blocks.{l}.attn.hook_z`` with ``site="z"``: before W_O the channels of two heads mean different things, so cosines of z are
    not reported, only CKA. Nulls are means over all shuffles of the other head's tokens; for CKA that is
    |X|^2 |Y|^2 / ((n - 1) |X^T X| |Y^T Y|). NaN with fewer than three real tokens for CKA.
    """
    if site not in ("result", "z"):
        raise UnknownName("site of head outputs", site, ("result", "z"))
    found: dict[int | str, dict[str, tuple[Tensor, Tensor]]] = {}
    for layer, tensor in sites_read(run, site).items():
        z, real = tensor.cpu().double().transpose(1, 2), real_tokens(run, tensor)
        z = z.masked_fill(~real[:, None, :, None], 0.0)
        count = real.sum(1).double()[:, None, None]
        parts = {"cosine": _output_cosines(z, count)} if site == "result" else {}
        found[layer] = {**parts, "cka": _cka(z, real, count)}
    units = {"cosine": "mean cosine with the other heads", "cka": "mean linear CKA with the other heads"}
    return _table("Redundancy of heads, by outputs", found, run, units)


def redundancy_curve(
    model: Model, inputs: Any, found: HeadTable, *, measure: str | None = None, **options: Any
) -> AblationCurve:
    """What removing heads costs, most redundant first, beside random heads of the same layers: ``ablation_curve`` by a measure
    of ``head_redundancy`` or ``output_redundancy``; ``options`` go to it (``metric``, ``ablation``, ``counts``, ``random``)."""
    best = found.top(measure)
    ranking = [(head.layer, head.head) for head in best if isinstance(head.layer, int)]
    if len(ranking) < len(best):
        raise WorkbenchError("heads are removed from layers with a number; this table names layers of two stacks")
    return ablation_curve(model, inputs, ranking, **options)


def _output_cosines(z: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    flat, total = z.flatten(2), z.sum(2)
    size = flat.norm(dim=-1)
    size = size[:, :, None] * size[:, None]
    return flat @ flat.mT / size, total @ total.mT / count / size


def _cka(z: Tensor, real: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    z = (z - z.sum(2, keepdim=True) / count[..., None]) * real[:, None, :, None]
    cross = torch.einsum("bhte,bgtf->bhgef", z, z) if z.shape[-1] <= z.shape[2] else None
    if cross is None:  # fewer tokens than channels: the same number from the Gram matrices of tokens
        gram = (z @ z.mT).flatten(2)
        inner = gram @ gram.mT
    else:
        inner = cross.square().sum((-2, -1))
    own = inner.diagonal(dim1=-2, dim2=-1).sqrt()
    size = own[:, :, None] * own[:, None]
    square = z.square().sum((-2, -1))
    chance = square[:, :, None] * square[:, None] / (count - 1) / size
    few = (count < 3) | (own == 0)[:, :, None] | (own == 0)[:, None]
    return (inner / size).masked_fill(few, float("nan")), chance.masked_fill(few, float("nan"))


def _table(
    title: str, found: dict[int | str, dict[str, tuple[Tensor, Tensor]]], source: object, units: dict[str, str]
) -> HeadTable:
    """``found`` layer -> measure -> the numbers of every two heads and their null, ``[B, H, H]``."""
    numbers: dict[str, dict[int | str, Tensor]] = {}
    partner: dict[int | str, Tensor] = {}
    null: dict[str, dict[int | str, Tensor]] = {}
    undefined = {}
    for name, measures in found.items():
        for measure, (each, chance) in measures.items():
            own = torch.eye(each.shape[1], dtype=torch.bool)
            each, chance = (part.masked_fill(own, float("nan")) for part in (each, chance))
            rows = {measure: (each.nanmean(2), chance.nanmean(2))}
            if measure == "cosine":
                best = each.nanmean(0).nan_to_num(-2.0).argmax(1)
                pick = best[None, :, None].expand(len(each), -1, 1)
                rows["nearest"] = each.gather(2, pick)[..., 0], chance.gather(2, pick)[..., 0]
                partner[name] = best.double().masked_fill(each.nanmean(0).isnan().all(1), float("nan"))
            for label, (part, by_chance) in rows.items():
                numbers.setdefault(label, {})[name] = part
                null.setdefault(label, {})[name] = by_chance
            if bool(numbers[measure][name].nanmean(0).isnan().any()):
                undefined[str(name)] = ALONE if len(own) == 1 else DEAD
    known = units | {"nearest": "cosine", "partner": "head"}
    return HeadTable.averaged(
        title,
        numbers,
        {name: known[name] for name in ("cosine", "cka", "nearest", "partner") if name in known},
        single={"partner": partner} if partner else {},
        null=null,
        undefined=undefined,
        provenance=provenance_of(source),
    )


ANALYSES = (
    Analysis(
        name="head-redundancy",
        question="Which heads of a layer attend alike?",
        function=head_redundancy,
        example=lambda: {"source": random_maps(batch=2, heads=3)},
        paper="EfficientViT 2023 (arXiv 2305.07027), abstract",
        source="maps",
        null="the other head's visible keys shuffled, mean over all shuffles",
        cause="probes.similarity.redundancy.redundancy_curve",
        definition="Cosine of flattened maps, mean over the other heads and over sequences.",
    ),
    Analysis(
        name="output-redundancy",
        question="Which heads of a layer write alike?",
        function=output_redundancy,
        example=lambda: {"run": bundled_run(read=tuple(f"blocks.{layer}.attn.hook_result" for layer in range(4)))},
        paper="EfficientViT 2023 (arXiv 2305.07027), abstract; Kornblith et al. 2019 (arXiv 1905.00414), linear CKA",
        source="run",
        null="the other head's tokens shuffled, mean over all shuffles",
        cause="probes.similarity.redundancy.redundancy_curve",
        definition="Outputs in residual space, after W_O; cosines of z would compare unrelated channels.",
        reads=("blocks.{l}.attn.hook_result",),
    ),
    Analysis(
        name="redundancy-curve",
        question="Does the model do without the heads that repeat others?",
        function=redundancy_curve,
        example=lambda: {
            "model": bundled(),
            "inputs": SENTENCE,
            "found": head_redundancy(bundled_run()),
            "counts": [4, 8],
            "random": 2,
        },
        paper="EfficientViT 2023 (arXiv 2305.07027), abstract",
        source="model",
        null="random heads of the same layers removed",
        cause="itself an intervention",
        definition="Heads are removed by replacing their output before W_O, most redundant first; no head is retrained.",
    ),
)
