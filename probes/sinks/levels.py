"""Which tokens become attention sinks along the depth of a model, from which block on, and for how long?

Published method (arXiv 2512.22213, and its authors' code), on the outputs of the blocks, the embedding left out:

- the primary sink is the position among the first three whose norm, averaged over blocks, is largest;
- its layers are from the largest increase of its norm to the largest decrease after that;
- a token is a sink at such a layer if |cos(x_token, x_primary)| > 0.9;
- the level of a token is (start, lifetime): the first block output at which it is one, and at how many it is one;
- of a model with L = 48 blocks, a token is noise up to lifetime 4, secondary below L - 15 = 33, and like the primary from there.

4 and 33 of 48 blocks are 1/12 and 11/16 of the depth, which is how they are written here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.probes.catalogue import Analysis
from workbench.probes.sinks.planted import planted_stream
from workbench.results import Result, axis
from workbench.run import Provenance, Run
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

KINDS = ("primary", "secondary", "other")
_WEAK = 2.0


@dataclass(frozen=True)
class Streams:
    """Block outputs ``[B, T, D]`` of every layer, which tokens are real ``[B, T]``, and how they are called."""

    outputs: tuple[Tensor, ...]
    real: Tensor
    labels: tuple[tuple[str, ...], ...]
    batched: bool
    provenance: Provenance

    @property
    def first(self) -> Tensor:
        """Column of the first real token of each sequence, ``[B]``."""
        return self.real.int().argmax(1)

    def layer(self, index: int) -> Tensor:
        """A block's output on the CPU in float32, or float64 if it is."""
        x = self.outputs[index].detach()
        x = x.to("cpu", working_dtype(x.dtype))
        if not bool(x[self.real].isfinite().all()):
            raise Refused(
                f"the output of block {index} holds numbers that are not finite; run the model in a wider type"
            )
        return x

    def align(self, values: Tensor) -> Tensor:
        """``values`` ``[B, T]`` with the first real token of each sequence in column 0; NaN or False on padding."""
        at = self.first[:, None] + torch.arange(values.shape[1])
        inside = at < values.shape[1]
        at = at.clamp(max=values.shape[1] - 1)
        blank = False if values.dtype == torch.bool else float("nan")
        return values.gather(1, at).masked_fill(~(inside & self.real.gather(1, at)), blank)

    def label(self, sequence: int, column: int) -> str:
        row = self.labels[sequence] if sequence < len(self.labels) else ()
        return row[column] if column < len(row) else ""


def block_outputs(source: Run | Tensor, mask: Tensor | None = None) -> Streams:
    """The residual stream behind every block of a run, or of a tensor ``[L + 1, T, D]`` or ``[L + 1, B, T, D]`` whose first
    entry, the embedding, is dropped. ``mask`` ``[B, T]`` is False on padding; a run knows its own."""
    if isinstance(source, Run):
        return _of_run(source, mask)
    if not isinstance(source, Tensor) or source.ndim not in (3, 4) or not source.is_floating_point():
        got = f"{source.dtype} {list(source.shape)}" if isinstance(source, Tensor) else type(source).__name__
        raise WorkbenchError(
            f"expected a Run, or the residual stream [L + 1, T, D] or [L + 1, B, T, D] with the embedding first; got {got}"
        )
    batched = source.ndim == 4
    stack = source if batched else source[:, None]
    if len(stack) < 2 or 0 in stack.shape:
        raise WorkbenchError(f"a residual stream has the embedding and at least one block; got {list(source.shape)}")
    real = _mask(mask, (stack.shape[1], stack.shape[2]))
    return Streams(tuple(stack[1:]), real, (), batched, Provenance("residual stream"))


def _of_run(run: Run, mask: Tensor | None) -> Streams:
    sites = [s for s in map(_site, run.acts) if s is not None and s.kind == "resid_post"]
    call = 'model.run(text, read=[f"blocks.{l}.hook_resid_post" for l in range(model.shape.layers)])'
    stacks = sorted({s.stack for s in sites})
    if len(stacks) != 1:
        why = f"those of {' and '.join(stacks)}: read one stack" if stacks else "none"
        raise WorkbenchError(f"levels are read off the outputs of all blocks; this run read {why}, as in {call}")
    layers = sorted(s.layer for s in sites if s.layer is not None)
    known = [layer for layer in run.maps if isinstance(layer, int)]
    wanted = max([*layers, *known]) + 1
    missing = sorted(set(range(wanted)) - set(layers))
    if missing:
        raise WorkbenchError(f"the output of block {missing[0]} was not read; read all of them: {call}")
    outputs = tuple(run.acts[Site("resid_post", layer, None, stacks[0])] for layer in layers)
    if outputs[0].ndim != 3:
        raise WorkbenchError(f"block outputs are [B, T, D]; this run read {list(outputs[0].shape)}")
    shape = (outputs[0].shape[0], outputs[0].shape[1])
    own = run.tokens.mask.cpu() if tuple(run.tokens.mask.shape) == shape and stacks[0] != "decoder" else None
    labels = run.tokens.labels if own is not None else ()
    return Streams(outputs, _mask(own if mask is None else mask, shape), labels, True, run.provenance)


def _site(key: Site | str) -> Site | None:
    try:
        return Site.parse(key)
    except WorkbenchError:
        return None


def _mask(mask: Tensor | None, shape: tuple[int, int]) -> Tensor:
    if mask is None:
        return torch.ones(shape, dtype=torch.bool)
    real = torch.as_tensor(mask).bool().cpu()
    real = real[None] if real.ndim == 1 else real
    if tuple(real.shape) != shape:
        raise WorkbenchError(f"the mask of these streams is [B, T] = {list(shape)}; got {list(real.shape)}")
    if not bool(real.any(1).all()):
        raise WorkbenchError("a row of the batch is nothing but padding")
    return real


@dataclass(frozen=True)
class SinkLevels(Result):
    """Sinks and their levels; S of them in B sequences.

    ``sequence position start lifetime`` ``[S]``: position from the first real token, start and lifetime in block outputs, 0 being
    the output of block 0. ``kind[s]`` is ``primary`` (the primary sink itself, and tokens that live as long as one),
    ``secondary``, or ``other`` (shorter lived). ``primary`` ``[B]`` is the position of the primary sink, ``span`` ``[B, 2]`` its
    layers ``[from, to)``, ``strength`` ``[B]`` its norm over the median token's where that is largest. ``alive`` ``[L, B, T]``
    tells at which block outputs a token is a sink, over columns of the batch; the first real one is ``first`` ``[B]``.
    ``chance`` ``[B]``: how many tokens would pass if an ordinary token stood in for the primary sink. ``blocks`` is L.
    """

    sequence: Tensor
    position: Tensor
    start: Tensor
    lifetime: Tensor
    kind: tuple[str, ...]
    tokens: tuple[str, ...]
    primary: Tensor
    span: Tensor
    strength: Tensor
    alive: Tensor
    first: Tensor
    chance: Tensor
    threshold: float
    batched: bool
    undefined: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("residual stream"))

    @property
    def blocks(self) -> int:
        return len(self.alive)

    def frame(self) -> pd.DataFrame:
        """One row per sink: ``position, start, lifetime, kind``; of a batch or a run with ``sequence`` before them, and with
        ``token`` where the text is known. Tokens that are a sink nowhere have no row."""
        import pandas as pd

        columns: dict[str, object] = {"sequence": self.sequence.numpy()} if self.batched else {}
        columns |= {"position": self.position.numpy()}
        if any(self.tokens):
            columns["token"] = list(self.tokens)
        columns |= {"start": self.start.numpy(), "lifetime": self.lifetime.numpy(), "kind": list(self.kind)}
        return pd.DataFrame(columns)

    def levels(self) -> pd.DataFrame:
        """One row per level, most frequent first: ``start, lifetime, kind, tokens`` (how many tokens have it), ``sequences``
        (in how many)."""
        import pandas as pd

        members: dict[tuple[int, int, str], list[int]] = {}
        starts, lifetimes = self.start.tolist(), self.lifetime.tolist()
        for sequence, start, lifetime, kind in zip(self.sequence.tolist(), starts, lifetimes, self.kind, strict=True):
            members.setdefault((start, lifetime, kind), []).append(sequence)
        rows = [(*level, len(found), len(set(found))) for level, found in members.items()]
        table = pd.DataFrame(rows, columns=["start", "lifetime", "kind", "tokens", "sequences"])
        return table.sort_values(by=["tokens", "start"], ascending=[False, True], kind="stable", ignore_index=True)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Lifetime over start, a disc per level, its area by the number of tokens."""
        ax = axis(ax, 4.8, 3.4)
        table = self.levels()
        for kind in KINDS:
            part = table[table["kind"] == kind]
            if len(part):
                ax.scatter(part["start"], part["lifetime"], s=30 + 12 * part["tokens"], alpha=0.7, label=kind)
        ax.set(
            xlabel="block whose output is the first",
            ylabel="block outputs as a sink",
            xlim=(-0.5, self.blocks - 0.5),
            ylim=(0, self.blocks + 1),
            title=f"Sink levels\n{self.provenance.model}",
        )
        if len(table):
            ax.legend()
        return ax


@torch.no_grad()
def sink_levels(
    source: Run | Tensor,
    *,
    mask: Tensor | None = None,
    threshold: float = 0.9,
    candidates: int = 3,
    short: float = 1 / 12,
    long: float = 11 / 16,
    drop: float = 0.25,
) -> SinkLevels:
    """Tokens that align with the primary sink, since which block, and over how many.

    ``source``: the residual stream ``[L + 1, T, D]`` or ``[L + 1, B, T, D]``, the embedding first, or a run that read
    ``hook_resid_post`` of all layers. ``mask`` ``[B, T]`` is False on padding. ``threshold`` of |cos| with the primary sink;
    ``candidates``: among how many first tokens the primary is looked for; ``short`` and ``long``: fractions of the depth L. A
    lifetime above ``short`` L is secondary, from ``long`` L on like the primary, and ``other`` up to ``short`` L.

    What the published method leaves open is settled so. A norm at block 0 rises from that of the median other token, so that a
    primary sink can be there from the start (published: never before block 1). It lives to the last block if no later decrease is
    ``drop`` of its rise (published: the largest decrease ends it, be it noise). Tokens before the primary count like those after
    it. A text whose first tokens are hardly larger than the median one has no sinks, no row, and a reason in ``undefined``. As
    published, a token that is no sink for some layers in between has one level: its first layer, and how many it has.
    """
    for name, value in (("threshold", threshold), ("short", short), ("long", long), ("drop", drop)):
        if not 0 <= value <= 1:
            raise WorkbenchError(f"{name} lies between 0 and 1; got {value!r}")
    if short > long:
        raise WorkbenchError(f"a secondary sink lives longer than short and less than long; got {short} and {long}")
    if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates < 1:
        raise WorkbenchError(
            f"candidates is how many first tokens may be the primary sink, at least 1; got {candidates!r}"
        )
    streams = block_outputs(source, mask)
    real, first = streams.real, streams.first
    norms = torch.stack([streams.layer(i).norm(dim=-1) for i in range(len(streams.outputs))]).double()
    batch = torch.arange(len(real))
    primary = _primary(norms, real, first, candidates)
    start, end, rises = _span(norms, real, primary, drop)
    depth = torch.arange(len(norms))[:, None]
    inside = (depth >= start) & (depth < end)
    aligned = _aligned(streams, primary, inside, threshold)
    others = real.clone()
    others[batch, primary] = False
    typical = _median(norms, others)
    strength = (norms[:, batch, primary] / typical).where(inside, float("nan")).nan_to_num(-1.0).amax(0)
    strength = strength.masked_fill(strength < 0, float("nan"))

    # Directions of ordinary tokens are no sinks: without a primary one nothing is at a level.
    alive = aligned & ~(strength < _WEAK)[None, :, None]
    lifetime = alive.sum(0)
    sequence, column = lifetime.nonzero(as_tuple=True)
    begun, lived = alive.int().argmax(0)[sequence, column], lifetime[sequence, column]
    kinds = [
        "primary"
        if column_ == int(primary[s]) or count >= long * len(norms) - 1e-9
        else "secondary"
        if count > short * len(norms) + 1e-9
        else "other"
        for s, column_, count in zip(sequence.tolist(), column.tolist(), lived.tolist(), strict=True)
    ]
    return SinkLevels(
        sequence=sequence,
        position=column - first[sequence],
        start=begun,
        lifetime=lived,
        kind=tuple(kinds),
        tokens=tuple(streams.label(s, c) for s, c in zip(sequence.tolist(), column.tolist(), strict=True)),
        primary=primary - first,
        span=torch.stack([start, end], 1),
        strength=strength,
        alive=alive,
        first=first,
        chance=_chance(streams, aligned, inside, threshold),
        threshold=threshold,
        batched=streams.batched,
        undefined=_reasons(rises, strength),
        provenance=streams.provenance,
    )


def _primary(norms: Tensor, real: Tensor, first: Tensor, candidates: int) -> Tensor:
    """Column of the primary sink, ``[B]``."""
    columns = torch.arange(real.shape[1])
    eligible = real & (columns < first[:, None] + candidates)
    return norms.mean(0).masked_fill(~eligible, -1.0).argmax(1)


def _span(norms: Tensor, real: Tensor, primary: Tensor, drop: float) -> tuple[Tensor, Tensor, Tensor]:
    """First layer of the primary sink, the layer after its last, and how much its norm rises; all ``[B]``. Without a rise the
    two layers are the same."""
    batch = torch.arange(len(real))
    others = real.clone()
    others[batch, primary] = False
    before = _median(norms[:1], others)[0].nan_to_num(0.0)
    steps = torch.diff(torch.cat([before[None], norms[:, batch, primary]]), dim=0)
    rise, start = steps.max(0)
    later = torch.arange(len(steps))[:, None] > start
    fall, at = (-steps).masked_fill(~later, float("-inf")).max(0)
    ends = (fall > 0) & (fall >= drop * rise)
    end = torch.where(ends, at, len(steps))
    return start, torch.where(rise > 0, end, start), rise


def _median(norms: Tensor, chosen: Tensor) -> Tensor:
    """Median over the chosen tokens, ``[L, B]``; NaN without one."""
    return norms.masked_fill(~chosen, float("nan")).nanmedian(-1).values


def _aligned(streams: Streams, reference: Tensor, inside: Tensor, threshold: float) -> Tensor:
    """Whether |cos| with the token in column ``reference`` ``[B]`` passes, at the layers ``inside`` ``[L, B]``: ``[L, B, T]``."""
    found = torch.zeros(len(inside), *streams.real.shape, dtype=torch.bool)
    for layer in range(len(inside)):
        if inside[layer].any():
            passes = cosines(streams.layer(layer), reference).abs() > threshold
            found[layer] = passes & streams.real & inside[layer][:, None]
    return found


def cosines(x: Tensor, reference: Tensor) -> Tensor:
    """Cosine of every token of x ``[B, T, D]`` with the one in column ``reference`` ``[B]``: ``[B, T]``."""
    unit = torch.nn.functional.normalize(x, dim=-1, eps=torch.finfo(x.dtype).tiny)
    return (unit @ unit[torch.arange(len(x)), reference][..., None])[..., 0]


def _chance(streams: Streams, alive: Tensor, inside: Tensor, threshold: float) -> Tensor:
    """How many tokens align with the middle one of those that are never a sink, ``[B]``; NaN without such tokens."""
    plain = streams.real & ~alive.any(0)
    count = plain.sum(1)
    middle = (plain.cumsum(1) == (count[:, None] + 1) // 2) & plain
    reference = middle.int().argmax(1)
    aligned = _aligned(streams, reference, inside, threshold).any(0)
    aligned[torch.arange(len(reference)), reference] = False
    return torch.where(count > 0, aligned.sum(1).double(), float("nan"))


def _reasons(rises: Tensor, strength: Tensor) -> dict[str, str]:
    found = {}
    for s, (rise, ratio) in enumerate(zip(rises.tolist(), strength.tolist(), strict=True)):
        if not rise > 0:
            found[f"sequence {s}"] = "the norm of none of the first tokens rises: there is no primary sink"
        elif ratio < _WEAK:
            found[f"sequence {s}"] = (
                f"the largest norm of the first tokens is {ratio:.2g} times the median token's, hardly a token of its own: there "
                "is no primary sink"
            )
    return found


ANALYSES = (
    Analysis(
        name="sink-levels",
        question="Which tokens become sinks along the depth, from which block on, and for how long?",
        function=sink_levels,
        example=lambda: {"source": planted_stream()},
        paper="On the Existence and Behaviour of Secondary Attention Sinks, 2025 (arXiv 2512.22213)",
        source="run",
        null="how many tokens align with an ordinary token in the place of the primary sink",
        cause="workbench.probes.sinks.removal.sink_removal",
        definition="constants 4 and L - 15 of a model of 48 blocks as fractions of depth; a rise at block 0 counts from the "
        "median token's norm; without a real decrease the primary sink lives to the last block",
        reads=("blocks.{l}.hook_resid_post",),
    ),
)
