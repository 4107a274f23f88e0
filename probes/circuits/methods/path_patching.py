"""Path patching: how much of a behaviour travels from one node straight into the inputs of others?

Four passes (Goldowsky-Dill et al., arXiv 2304.05969; Wang et al., arXiv 2211.00593, appendix B). The model runs on the clean and
on the corrupted prompts; then on the clean ones with the outputs of all heads frozen at their clean values, except the sender's,
which is the corrupted one: MLPs are recomputed, so that the change reaches the receivers through MLPs and the residual stream and
through no other head. Last, the clean prompts run with the receivers' inputs taken from there and everything else recomputed.

    effect = (m(patched) - m(clean)) / (m(corrupted) - m(clean))

with m the mean of the metric over all examples: the share of the whole difference that this path carries. 1 is all of it,
negative means that the path works against the behaviour. A head's inputs are its query, key and value vectors, which hold
all that it reads of the stream: no split inputs are needed. Receivers written together are patched together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.graph import name_place
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.bootstrap import resampled_means
from workbench.probes.circuits.components import (
    INPUT,
    Acts,
    Edits,
    Metric,
    Setting,
    components,
    gather,
    served,
)
from workbench.probes.circuits.method import Method
from workbench.results import Result, axis
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

LOGITS = "logits"
_INPUTS = {"q": ("q", "rot_q"), "k": ("k", "rot_k"), "v": ("v",)}
_LAYER = re.compile(r"^([am])(\d+)")


@dataclass(frozen=True)
class PathEffects(Result):
    """The metric after patching each path, per example.

    ``patched`` is ``[senders, receivers, B]``, ``clean`` and ``corrupt`` are ``[B]``, all float64. ``patched`` is NaN where the
    sender comes after the receiver, so that there is no path. Receivers that were patched together are joined by ``+``.
    """

    senders: tuple[str, ...]
    receivers: tuple[str, ...]
    patched: Tensor
    clean: Tensor
    corrupt: Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def effect(self) -> Tensor:
        """Share of the difference between clean and corrupted prompts, ``[senders, receivers]``; NaN where there is no path, and
        everywhere if clean and corrupted prompts have the same mean."""
        return _ratio(self.patched.mean(-1) - self.clean.mean(), (self.corrupt - self.clean).mean())

    def interval(self, *, draws: int = 1000, seed: int = 0) -> tuple[Tensor, Tensor]:
        """95% bootstrap interval of ``effect`` over examples, low and high ``[senders, receivers]``."""
        rows = torch.cat([(self.patched - self.clean).flatten(0, 1), (self.corrupt - self.clean)[None]]).T
        means = resampled_means(rows, draws=draws, seed=seed)
        shares = _ratio(means[:, :-1], means[:, -1:]).reshape(draws, *self.patched.shape[:2])
        return shares.nanquantile(0.025, dim=0), shares.nanquantile(0.975, dim=0)

    def frame(self) -> pd.DataFrame:
        """One row per path: ``sender, receiver, effect, low, high``."""
        import pandas as pd

        low, high = self.interval()
        index = [(sender, receiver) for sender in self.senders for receiver in self.receivers]
        table = pd.DataFrame(index, columns=["sender", "receiver"])
        for name, values in (("effect", self.effect), ("low", low), ("high", high)):
            table[name] = values.flatten().numpy()
        return table

    def plot(self, ax: Axes | None = None) -> Axes:
        """Senders by receivers."""
        ax = axis(ax, 2.5 + 0.5 * len(self.receivers), 1.5 + 0.2 * len(self.senders))
        values = self.effect.numpy()
        limit = max((abs(v) for v in values.flatten() if math.isfinite(v)), default=0.0) or 1.0
        image = ax.imshow(values, aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
        ax.set_xticks(range(len(self.receivers)), list(self.receivers), rotation=90)
        ax.set_yticks(range(len(self.senders)), list(self.senders))
        ax.set(xlabel="receiver", ylabel="sender", title="Path patching")
        ax.figure.colorbar(image, ax=ax, label="share of the difference")
        return ax


def path_patching(
    model: Model,
    pairs: Pairs,
    senders: Iterable[str] | None = None,
    receivers: Iterable[str | Sequence[str]] = (LOGITS,),
    *,
    metric: Metric | None = None,
    batch: int = 16,
    positions: str = "all",
) -> PathEffects:
    """The effect of every path from one of ``senders`` to one of ``receivers``; see the module.

    Senders are ``input`` (the embeddings), heads ``a3.h5`` and MLPs ``m3``, all heads if not given; with
    ``positions="each"`` or ``"spans"`` also at a place, ``a3.h5@END``. Receivers are ``logits``, inputs of heads ``a9.h6<q>``
    (keys and values of grouped heads are ``a9.g1<k>``), MLPs ``m9``, or a sequence of those to be patched together. Outputs
    of heads are frozen and patched before ``W_O``. ``metric(logits, pairs) -> [B]`` is the logit difference unless given.
    Raises ``UnknownName`` for a node that the model does not have.
    """
    setting = Setting.of(model, pairs, metric, "counterfactual", batch, positions)
    nodes = _nodes(model)
    heads = [name for name in nodes if ".h" in name]
    chosen = tuple(heads if senders is None else senders)
    groups = [(group,) if isinstance(group, str) else tuple(group) for group in receivers]
    if not chosen or not groups or not all(groups):
        raise WorkbenchError("path patching wants at least one sender and one receiver")
    return _effects(setting, chosen, groups)


def path_search(setting: Setting, level: str, *, keep: float = 0.02, least: float = 0.01, stages: int = 12) -> Circuit:
    """The circuit of heads that backward path patching finds (Merullo et al., arXiv 2310.08744, section 3).

    Stage 1 patches every head into the logits; every further stage into the queries, the keys and the values of the heads
    that the stage before found, each of the three together. The strongest ``keep`` of all heads (at least one) per receiver
    join the circuit, until a stage finds none, or after ``stages``. A path whose effect is below ``least`` in size counts for
    nothing: a bound of ours, without which rounding would join. The authors' code averages each batch's share over batches
    of 25 and patches one position; these are shares of the means over all examples, from all positions, unless the setting
    tells places apart.

    Score: the effect that is largest in size over all receivers, positive where it supports the clean behaviour. ``kept`` is
    the circuit. Columns: ``stage`` (NaN outside of the circuit) and the strongest effect on ``logits`` and through ``q``,
    ``k`` and ``v``.
    """
    if not 0 < keep <= 1 or least < 0 or stages < 1:
        raise WorkbenchError(
            "keep is a share of the heads in (0, 1], least an effect, 0 or more, stages a number, 1 or more; "
            f"got {keep}, {least}, {stages}"
        )
    heads = [name for name in _nodes(setting.model) if ".h" in name]
    names = setting.places.of_each(heads)
    count = max(1, round(keep * len(heads)))
    strongest = {column: torch.full((len(names),), float("nan"), dtype=torch.float64) for column in (LOGITS, *_INPUTS)}
    stage_of = torch.full((len(names),), float("nan"), dtype=torch.float64)
    groups: dict[str, tuple[str, ...]] = {LOGITS: (LOGITS,)}
    for stage in range(1, stages + 1):
        found = _effects(setting, names, list(groups.values()))
        size = float((found.corrupt - found.clean).mean())
        if size == 0:
            raise Refused(
                "clean and corrupted prompts have the same mean metric, so that shares of their difference are undefined; use "
                "another corruption or metric"
            )
        effect = found.effect if size < 0 else -found.effect
        fresh: list[int] = []
        for column, values in zip(groups, effect.T, strict=True):
            strongest[column] = _larger(strongest[column], values)
            order = values.abs().nan_to_num(-1.0).argsort(descending=True, stable=True)[:count].tolist()
            fresh += [i for i in order if float(values[i].abs()) >= least and stage_of[i].isnan() and i not in fresh]
        if not fresh:
            break
        stage_of[fresh] = float(stage)
        new = list(dict.fromkeys(name_place(names[i])[0] for i in fresh))
        groups = {channel: _inputs_of(setting.model, new, channel) for channel in _INPUTS}
        if all(_layer(name) == 0 for name in new):
            break
    scores = torch.full((len(names),), float("nan"), dtype=torch.float64)
    for values in strongest.values():
        scores = _larger(scores, values)
    return Circuit("node", names, scores.nan_to_num(0.0), ~stage_of.isnan(), {}, {"stage": stage_of, **strongest})


@torch.no_grad()
def _effects(setting: Setting, senders: Sequence[str], groups: Sequence[Sequence[str]]) -> PathEffects:
    model, nodes = setting.model, _nodes(setting.model)
    parts = [_part(setting, name, nodes) for name in senders]
    inputs = [{} if tuple(group) == (LOGITS,) else _receivers(model, group, nodes) for group in groups]
    reach = torch.tensor([[_reaches(name, group) for group in groups] for name in senders])
    todo = [i for i in range(len(senders)) if bool(reach[i].any())]
    frozen = list(dict.fromkeys(site.whole for name, site in nodes.items() if ".h" in name))
    swapped = list(dict.fromkeys(site.whole for site, _ in parts))
    reads = list(dict.fromkeys(site for sites in inputs for site in sites.values()))
    wants_logits = any(not sites for sites in inputs)
    patched = torch.full((len(senders), len(groups), len(setting.pairs)), float("nan"), dtype=torch.float64)
    ends: list[list[Tensor]] = [[], []]
    start = 0
    for pairs in setting.chunks():
        clean, logits = gather(model, pairs.clean, frozen)
        other, corrupted = gather(model, pairs.corrupt, swapped)
        for values, each in zip(ends, (logits, corrupted), strict=True):
            values.append(setting.measure(each, pairs).double().cpu())
        where = setting.places.index(pairs)
        span = slice(start, start + len(pairs))
        start += len(pairs)
        for lo in range(0, len(todo), setting.at_once):
            group = todo[lo : lo + setting.at_once]
            edits = _frozen([parts[i] for i in group], clean, other, where)
            ids = pairs.clean.repeat(len(group), 1)
            third = model.run(ids, read=reads, edit=edits, logits="all" if wants_logits else None)
            for column, sites in enumerate(inputs):
                rows = [k for k, i in enumerate(group) if bool(reach[i, column])]
                if not rows:
                    continue
                copies = (
                    _chosen(third.logits, rows, len(group))
                    if not sites
                    else _fourth(
                        model,
                        pairs,
                        {site: _chosen(third.acts[site], rows, len(group)) for site in sites.values()},
                        len(rows),
                    )
                )
                for k, copy in zip(rows, copies.chunk(len(rows)), strict=True):
                    patched[group[k], column, span] = setting.measure(copy, pairs).double().cpu()
    return PathEffects(
        tuple(senders),
        tuple("+".join(group) for group in groups),
        patched,
        torch.cat(ends[0]),
        torch.cat(ends[1]),
        setting.provenance("path-patching", "node", {}),
    )


def _fourth(model: Model, pairs: Pairs, acts: Acts, copies: int) -> Tensor:
    """Logits of the clean prompts with the receivers' inputs of the third pass."""
    edits: Edits = dict(acts.items())
    logits = model.run(pairs.clean.repeat(copies, 1), edit=edits).logits
    assert logits is not None
    return logits


def _chosen(value: Tensor | None, rows: list[int], copies: int) -> Tensor:
    """The batches ``rows`` of ``copies`` that share the first axis."""
    if value is None:
        raise Refused("the model gives no logits; path patching measures them")
    return value.unflatten(0, (copies, -1))[rows].flatten(0, 1)


def _frozen(group: list[tuple[Site, int | None]], clean: Acts, other: Acts, where: Tensor) -> Edits:
    """Every head at its clean value; copy k of the batch has its sender at the corrupted one, at the tokens of its place."""

    def at(site: Site) -> Callable[[Tensor], Tensor]:
        def edit(value: Tensor) -> Tensor:
            value = value.clone()
            copies = value.unflatten(0, (len(group), -1))
            if site in clean:
                copies.copy_(clean[site].expand_as(copies))
            for copy, (sender, place) in zip(copies, group, strict=True):
                if sender.whole == site:
                    here = torch.ones_like(where, dtype=torch.bool) if place is None else where == place
                    here = here.to(value.device)
                    head = slice(None) if sender.head is None else sender.head
                    part, new = (
                        (copy, other[site]) if sender.head is None else (copy[:, :, head], other[site][:, :, head])
                    )
                    part[here] = new[here]
            return value

        return edit

    return {site: at(site) for site in dict.fromkeys([*clean, *(sender.whole for sender, _ in group)])}


def _nodes(model: Model) -> dict[str, Site]:
    """Everything that can send, in the order of computation."""
    first = {"input": INPUT} if INPUT in served(model) else {}
    return first | {unit.name: unit.site for unit in components(model)}


def _part(setting: Setting, name: str, nodes: dict[str, Site]) -> tuple[Site, int | None]:
    """The site and the place of a sender; without a place it sends from all positions."""
    node, place = name_place(name)
    if node not in nodes:
        raise UnknownName(f"sender of {setting.model.name}", node, nodes)
    if place and place not in setting.places.names:
        raise UnknownName("place", place, [p for p in setting.places.names if p])
    return nodes[node], setting.places.names.index(place) if place else None


def _receivers(model: Model, group: Sequence[str], nodes: dict[str, Site]) -> dict[str, Site]:
    """The site that holds what each receiver of a group reads."""
    sites, shape = served(model), model.shape
    known: dict[str, Site] = {name: site for name, site in nodes.items() if name.startswith("m")}
    for layer in range(shape.layers):
        for channel, kinds in _INPUTS.items():
            kind = next((kind for kind in kinds if Site(kind, layer) in sites), None)
            if kind is None or Site("z", layer) not in sites:
                continue
            shared = channel != "q" and shape.kv_heads != shape.heads
            letter, count = ("g", shape.kv_heads) if shared else ("h", shape.heads)
            known |= {f"a{layer}.{letter}{i}<{channel}>": Site(kind, layer, i) for i in range(count)}
    for name in group:
        if name == LOGITS and len(group) > 1:
            raise WorkbenchError("logits are read after everything else; make them a receiver of their own")
        if name not in known:
            raise UnknownName(f"receiver of {model.name}", name, [LOGITS, *known])
    return {name: known[name] for name in group}


def _inputs_of(model: Model, heads: Sequence[str], channel: str) -> tuple[str, ...]:
    """The receivers that are one channel of ``heads``; heads that share keys and values are one receiver."""
    size = model.shape.heads // model.shape.kv_heads
    if channel == "q" or size == 1:
        return tuple(f"{head}<{channel}>" for head in heads)
    names = []
    for head in heads:
        layer, number = head.split(".h")
        names.append(f"{layer}.g{int(number) // size}<{channel}>")
    return tuple(dict.fromkeys(names))


def _reaches(sender: str, group: Sequence[str]) -> bool:
    """Whether the sender is computed before one of the receivers."""
    return any(_depth(sender) < _depth(receiver) for receiver in group)


def _depth(name: str) -> float:
    """The order of computation: attention of layer l at l, its MLP half a step later."""
    match = _LAYER.match(name)
    if match is None:
        return math.inf if name == LOGITS else -1.0
    return int(match[2]) + 0.5 * (match[1] == "m")


def _layer(name: str) -> int:
    return math.floor(_depth(name))


def _larger(a: Tensor, b: Tensor) -> Tensor:
    """Whichever is larger in size; NaN only where both are."""
    return torch.where(b.abs() > a.abs().nan_to_num(-1.0), b, a)


def _ratio(change: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole == 0, torch.full_like(change, float("nan")), change / whole) + 0.0  # no zero has a sign


METHODS = (
    Method(
        "path-patching",
        "what goes from each head straight into the logits, then into the inputs of the heads found so far",
        path_search,
        "Merullo et al. 2023 (arXiv 2310.08744); Wang et al. 2022 (arXiv 2211.00593)",
        levels=("node",),
        ablations=("counterfactual",),
        positions=True,
        unit="share of the difference between clean and corrupted prompts",
    ),
)
