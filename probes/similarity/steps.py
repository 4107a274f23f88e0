"""Does a block get the same from outside of itself in every step?

FlashBlock keeps, between the steps of block diffusion, what the queries of a block receive from keys outside of it, because that
changes little while attention inside of the block changes a lot. With blocks of ``size`` tokens, o_i = sum_j A_ij v_j splits into
keys of i's own block and the others; each part is divided by its share of the weight, as its own softmax would give it. Per block

    change = |o' - o| / |o|,   cosine = <o, o'> / (|o| |o'|)      over the queries and channels of the block,

where o' is the later step. Beside the change stands that between a block and its neighbour in the same step: if blocks get the
same from outside anyway, stability between steps says little.

``reuse_external`` is the test of cause: the later step runs with what its blocks got from outside in the earlier one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from workbench.captures import capture
from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Edit, Model
from workbench.probes.ablation import divergence
from workbench.probes.bootstrap import interval
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import SENTENCE, bundled, bundled_run
from workbench.probes.similarity.aligned import CHUNK, Aligned
from workbench.probes.similarity.stability import both_steps
from workbench.probes.tables import HeadTable
from workbench.results import Result, axis
from workbench.run import Provenance, Run
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MEASURES = ("external", "external_cosine", "internal", "internal_cosine", "mass")
OTHER = "Mary and John went to the school . John gave a ball to"


@dataclass(frozen=True)
class StepStability(Result):
    """Measure -> layer -> ``[H, blocks]``, means over sequences; ``low high`` are 95% intervals over them. ``external`` and
    ``internal``: change of the two parts; ``..._cosine``; ``mass``: share of the weight outside of the block, before. ``null``
    measure -> layer -> ``[H, blocks]``: from a block's neighbour in the same step. NaN where a block sees nothing outside of
    itself."""

    values: Mapping[str, Mapping[int | str, Tensor]]
    low: Mapping[str, Mapping[int | str, Tensor]]
    high: Mapping[str, Mapping[int | str, Tensor]]
    null: Mapping[str, Mapping[int | str, Tensor]]
    size: int
    undefined: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("maps"))

    def frame(self) -> pd.DataFrame:
        """One row per layer, head and block: ``layer, head, block``, the measures with ``_low _high``, and ``_null`` of changes
        and cosines."""
        import pandas as pd

        parts = []
        for layer, first in self.values["external"].items():
            heads, blocks = first.shape
            columns: dict[str, Any] = {
                "layer": layer,
                "head": torch.arange(heads).repeat_interleave(blocks).numpy(),
                "block": torch.arange(blocks).repeat(heads).numpy(),
            }
            for name in MEASURES:
                for suffix, table in (
                    ("", self.values),
                    ("_low", self.low),
                    ("_high", self.high),
                    ("_null", self.null),
                ):
                    if name in table:
                        columns[name + suffix] = table[name][layer].flatten().numpy()
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)

    def heads(self) -> HeadTable:
        """Means over blocks, per head."""

        def mean(table: Mapping[str, Mapping[int | str, Tensor]]) -> dict[str, dict[int | str, Tensor]]:
            return {name: {key: part.nanmean(1) for key, part in row.items()} for name, row in table.items()}

        units = {name: "cosine" if "cosine" in name else "change over the norm before" for name in MEASURES}
        units["mass"] = "share of the weight"
        title = f"Stability of blocks of {self.size}"
        null = mean(self.null)
        return HeadTable(
            title, mean(self.values), units, null=null, undefined=self.undefined, provenance=self.provenance
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Change of the external and internal parts by block, mean over layers and heads, beside the neighbour's."""
        ax = axis(ax, 5.0, 3.2)
        for label, table, name, style in (
            ("outside the block", self.values, "external", "-"),
            ("inside the block", self.values, "internal", "-"),
            ("outside, the neighbouring block", self.null, "external", "--"),
        ):
            rows = torch.cat(list(table[name].values()))
            ax.plot(range(rows.shape[1]), rows.nanmean(0).numpy(), style, marker="o", label=label)
        ax.set(xlabel=f"block of {self.size}", ylabel="change over the norm before", title=self.provenance.model)
        ax.legend(fontsize=8)
        return ax


class _Split(NamedTuple):
    """Contributions from outside and inside of each query's block ``[B, H, Q, E]``, and the weight of each ``[B, H, Q]``."""

    outside: Tensor
    inside: Tensor
    outside_mass: Tensor
    inside_mass: Tensor


def step_stability(
    before: Run,
    after: Run,
    size: int = 64,
    *,
    values: tuple[Mapping[int | str, Tensor], Mapping[int | str, Tensor]] | None = None,
) -> StepStability:
    """Change and cosine of what the queries of each block get from outside and from inside of it, between two steps.

    ``before`` and ``after``: runs on inputs of one shape with captured maps that have read ``blocks.{l}.attn.hook_v``, or any two
    sources of maps (lists, mappings) with ``values``, for each step layer -> ``[B, G, K, E]``. Blocks count from the first real
    token; queries and blocks of padding do not count. Gated maps count as they act. Refuses maps over channels, and maps whose
    coefficients differ between channels. Signed maps are refused: their parts have no share of weight to be divided by.
    """
    if size < 1:
        raise WorkbenchError(f"a block has at least one token; got size={size}")
    first, second = (_values(before), _values(after)) if values is None else values
    found: dict[str, dict[int | str, Tensor]] = {name: {} for name in MEASURES}
    null: dict[str, dict[int | str, Tensor]] = {name: {} for name in MEASURES[:-1]}
    undefined = {}
    for name, (one, two) in both_steps(before, after).items():
        if one.amap.sign == "signed" or two.amap.sign == "signed":
            raise Refused(f"layer {name!r}: a signed map has no share of weight outside of a block; see map_stability")
        block = _blocks_of(one, size)
        early, late = _split(one, _lookup(first, name), block, size), _split(two, _lookup(second, name), block, size)
        neighbour = _neighbour(one, size)
        for part, label in ((0, "external"), (1, "internal")):
            mean, later = _normalised(early, part), _normalised(late, part)
            change, cosine = _compared(mean, later, block)
            found[label][name], found[f"{label}_cosine"][name] = change, cosine
            at = neighbour.clamp(min=0)[:, None, :, None].expand_as(mean)
            other = mean.gather(2, at).masked_fill((neighbour < 0)[:, None, :, None], float("nan"))
            change, cosine = _compared(mean, other, block)
            null[label][name], null[f"{label}_cosine"][name] = change.nanmean(0), cosine.nanmean(0)
        weight = _sums(early.outside_mass[..., None], block), _sums(early.inside_mass[..., None], block)
        found["mass"][name] = weight[0] / (weight[0] + weight[1])
        if bool(found["external"][name].isnan().any()):
            undefined[str(name)] = "a block that sees nothing outside of itself gets nothing from there"
    bounds = {key: {name: interval(part) for name, part in row.items()} for key, row in found.items()}
    return StepStability(
        {key: {name: part.nanmean(0) for name, part in row.items()} for key, row in found.items()},
        {key: {name: pair[0] for name, pair in row.items()} for key, row in bounds.items()},
        {key: {name: pair[1] for name, pair in row.items()} for key, row in bounds.items()},
        null,
        size,
        undefined,
        before.provenance if isinstance(before, Run) else Provenance("maps"),
    )


@dataclass(frozen=True)
class Reuse(Result):
    """Mean KL divergence in nats of the later step's prediction from its own, ``[L, N]`` over N sequences, if a layer's blocks
    get from outside what they got in the earlier step (``reused``), what their neighbours get now (``neighbour``), or nothing
    (``nothing``)."""

    layers: tuple[int, ...]
    reused: Tensor
    neighbour: Tensor
    nothing: Tensor
    size: int
    provenance: Provenance = field(default_factory=lambda: Provenance("model"))

    def frame(self) -> pd.DataFrame:
        """One row per layer: ``layer, reused, reused_low, reused_high, neighbour, nothing``; 95% interval over sequences."""
        import pandas as pd

        low, high = interval(self.reused.T)
        columns = {"reused": self.reused.mean(1), "reused_low": low, "reused_high": high}
        columns |= {"neighbour": self.neighbour.mean(1), "nothing": self.nothing.mean(1)}
        return pd.DataFrame({"layer": self.layers} | {name: part.numpy() for name, part in columns.items()})

    def plot(self, ax: Axes | None = None) -> Axes:
        """The cost of each exchange by layer."""
        table = self.frame()
        ax = axis(ax, 4.8, 3.2)
        for name in ("reused", "neighbour", "nothing"):
            ax.plot(range(len(table)), table[name], marker="o", label=name)
        ax.set_xticks(range(len(table)), [str(layer) for layer in self.layers])
        ax.set(xlabel="layer", ylabel="KL from the later step, nats", title=self.provenance.model)
        ax.legend()
        return ax


@torch.no_grad()
def reuse_external(
    model: Model, before: Any, after: Any, size: int = 64, *, layers: Sequence[int] | None = None
) -> Reuse:
    """What it costs if one layer's blocks get from outside, in the step ``after``, what they got in the step ``before``.

    Both are inputs of ``model.run`` with tokens of one shape. The output of each head (``hook_z``) becomes its fresh part from
    inside of the block plus the kept part from outside, each with the weight it had in its own step; a layer at a time, all
    others as they are. Beside it the same with the neighbouring block's part, and with none.
    """
    chosen = tuple(range(model.shape.layers)) if layers is None else tuple(layers)
    read = [Site("v", layer) for layer in chosen]
    first, second = (model.run(x, read=read, maps=capture(layers=chosen)) for x in (before, after))
    rows = []
    for name, (one, two) in both_steps(first, second).items():
        block = _blocks_of(one, size)
        early = _split(one, _lookup(_values(first), name), block, size)
        late = _split(two, _lookup(_values(second), name), block, size)
        neighbour = _neighbour(one, size)
        at = neighbour.clamp(min=0)[:, None, :, None].expand_as(late.outside)
        other = late.outside.gather(2, at).masked_fill((neighbour < 0)[:, None, :, None], 0.0)
        outputs = (late.inside + early.outside, late.inside + other, late.inside)
        runs = [model.run(after, edit={Site("z", int(name)): _placed(two, output)}) for output in outputs]
        rows.append(torch.stack([divergence(run, second) for run in runs]))
    found = torch.stack(rows)
    return Reuse(chosen, found[:, 0], found[:, 1], found[:, 2], size, second.provenance)


def _placed(layer: Aligned, output: Tensor) -> Edit:
    """An edit that puts aligned outputs ``[B, H, Q, E]`` where the real queries are and leaves padding alone."""
    width = layer.amap.shape[2]
    at = torch.arange(width) - layer.query_start[:, None]
    inside = (at >= 0) & (at < layer.shape[2])
    at = at.clamp(0, layer.shape[2] - 1)
    inside &= layer.real_queries.gather(1, at)
    moved = output.transpose(1, 2).gather(1, at[:, :, None, None].expand(-1, -1, *output.shape[1::2]))
    return lambda z: torch.where(inside[:, :, None, None].to(z.device), moved.to(z), z)


def _values(run: object) -> dict[int | str, Tensor]:
    if not isinstance(run, Run):
        raise WorkbenchError("two runs, or two sources of maps with values=({layer: [B, G, K, E]}, {...})")
    found: dict[int | str, Tensor] = {}
    for layer in run.maps:
        site = (
            Site("v", layer)
            if isinstance(layer, int)
            else Site("v", int(layer.split(".")[1]), None, layer.split(".")[0])
        )
        if site not in run.acts and str(site) not in run.acts:
            raise WorkbenchError(f"this run read no {site}; run it again with read=[{str(site)!r}, ...]")
        found[layer] = run.acts[site].transpose(1, 2)
    return found


def _lookup(values: Mapping[int | str, Tensor], name: int | str) -> Tensor:
    if name not in values:
        raise WorkbenchError(f"no values of layer {name!r}; there are: {', '.join(map(str, values))}")
    return values[name]


def _blocks_of(layer: Aligned, size: int) -> Tensor:
    """The block of each aligned query, ``[B, Q]``, in blocks of aligned keys; -1 for padding."""
    place = torch.arange(layer.shape[2]) + (layer.query_start + layer.amap.offset - layer.key_start)[:, None]
    return (place // size).masked_fill(~layer.real_queries, -1)


def _split(layer: Aligned, values: Tensor, block: Tensor, size: int) -> _Split:
    amap = layer.amap
    if amap.domain != "token" or amap.channelwise:
        raise Refused(f"layer {layer.name!r}: blocks are of tokens, and {amap!r} has no one coefficient per token")
    b, h, queries, keys = layer.shape
    if values.ndim != 4 or values.shape[0] != b or values.shape[2] != amap.shape[3] or h % values.shape[1]:
        raise WorkbenchError(
            f"layer {layer.name!r}: values are [B, G, K, E] = {[b, amap.kv_heads, amap.shape[3], 'E']}; got "
            f"{list(values.shape)}"
        )
    v = values.detach().cpu().double()
    at = (torch.arange(keys) + layer.key_start[:, None]).clamp(max=v.shape[2] - 1)
    v = v.gather(2, at[:, None, :, None].expand(b, v.shape[1], keys, v.shape[3]))
    v = v.masked_fill(~layer.real_keys[:, None, :, None], 0.0).repeat_interleave(h // v.shape[1], 1)
    columns = torch.arange(keys) // size
    parts: list[list[Tensor]] = [[], [], [], []]
    step = max(1, min(queries, CHUNK // max(1, 3 * b * h * keys)))
    for lo in range(0, queries, step):
        rows = layer.rows(lo, min(queries, lo + step))
        own = (block[:, lo : lo + step, None] == columns)[:, None]
        for i, part in enumerate((rows.masked_fill(own, 0.0), rows.masked_fill(~own, 0.0))):
            parts[i].append(part @ v)
            parts[i + 2].append(part.sum(-1))
    return _Split(*(torch.cat(part, 2) for part in parts))


def _normalised(split: _Split, part: int) -> Tensor:
    """The mean value of one part, ``[B, H, Q, E]``; NaN where it has no weight."""
    output, mass = split[part], split[part + 2]
    return (output / mass[..., None]).masked_fill(mass[..., None] == 0, float("nan"))


def _neighbour(layer: Aligned, size: int) -> Tensor:
    """For each aligned query that of the block after, ``[B, Q]``; where there is none, of the block before; -1 without either."""
    batch, _, queries, _ = layer.shape
    place = torch.arange(queries)
    found = torch.full((batch, queries), -1)
    for other in (place - size, place + size):
        inside = (other >= 0) & (other < queries)
        real = layer.real_queries[:, other.clamp(0, queries - 1)] & layer.real_queries & inside
        found = torch.where(real, other, found)
    return found


def _sums(values: Tensor, block: Tensor) -> Tensor:
    """Sums over channels and the queries of each block, ``[B, H, blocks]``; NaN does not count. Blocks count from the first one
    with a query."""
    b, h = values.shape[:2]
    real = block >= 0
    least = block.masked_fill(~real, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
    at = (block - least).clamp(min=0)
    out = torch.zeros(b, h, int(at.masked_fill(~real, 0).max()) + 1, dtype=torch.float64)
    each = values.nan_to_num(0.0).sum(-1).masked_fill(~real[:, None], 0.0)
    return out.scatter_add_(2, at[:, None].expand(b, h, -1), each)


def _compared(one: Tensor, two: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Change and cosine per block over the queries that have both, ``[B, H, blocks]``; NaN without any."""
    both = ~(one.isnan() | two.isnan())
    one, two = one.masked_fill(~both, 0.0), two.masked_fill(~both, 0.0)
    square, other, inner, apart = (
        _sums(part, block) for part in (one.square(), two.square(), one * two, (two - one).square())
    )
    size = (square * other).sqrt()
    change = (apart / square).sqrt().masked_fill(square == 0, float("nan"))
    return change, (inner / size).masked_fill(size == 0, float("nan"))


def _example() -> dict[str, Any]:
    read = tuple(f"blocks.{layer}.attn.hook_v" for layer in range(4))
    return {"before": bundled_run(read=read), "after": bundled_run(text=OTHER, read=read), "size": 4}


ANALYSES = (
    Analysis(
        name="step-stability",
        question="Does a block get the same from outside of itself in every step?",
        function=step_stability,
        example=_example,
        paper="FlashBlock 2026, abstract",
        source="run",
        null="the neighbouring block's output in the same step",
        cause="probes.similarity.steps.reuse_external",
        definition="Each part is divided by its weight, as its own softmax would give it; norms run over the queries and "
        "channels of a block.",
        reads=("blocks.{l}.attn.hook_v",),
    ),
    Analysis(
        name="reuse-external",
        question="What does it cost to keep what blocks got from outside in an earlier step?",
        function=reuse_external,
        example=lambda: {"model": bundled(), "before": SENTENCE, "after": OTHER, "size": 4, "layers": [0]},
        paper="FlashBlock 2026, abstract",
        source="model",
        null="the neighbouring block's output, and none",
        cause="itself an intervention",
        definition="The kept part has the weight of its own step; the published method also rescales by both denominators.",
    ),
)
