"""What does each head of a circuit do on the task: where does it look, what does it write, and through whom?

Everything is measured on the pairs. Attention is that of the clean prompts, effects are shares of the difference between clean
and corrupted prompts (``path_patching``), and candidates are the tokens that are right or wrong answers.

    role         evidence it takes
    previous     mass on the token before, over all positions
    duplicate    mass on earlier copies of the token, over the named positions
    induction    mass on what followed earlier copies of the token, over the named positions
                 each at least .3 and twice that of even attention
    mover        at the answer position at least .3 on candidates, which it copies (``own`` > 0), and ``direct`` at least .02
    negative     the same with ``own`` < 0 and ``direct`` at most -.02
    inhibition   at the answer position at least .3 on wrong candidates; ``via_q``, through the queries of movers and negative
                 movers of the circuit together, at least .02 in size and larger than its direct effect
    gatherer     the same with at least .3 on named words that are no candidates: content that tells the movers where to look
    backup       no mover; its part of the logit difference grows by at least .02 when the movers write nothing (zero: another
                 name in the output would keep asleep a backup that looks whether anything was written)

The roles are those of Wang et al. (arXiv 2211.00593) and, for gatherers, Merullo et al. (arXiv 2310.08744), where people read
them off attention and direct effects; the thresholds are ours. Several roles may hold. ``head_roles`` tells what heads do
without a task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.circuits.components import Edits, Metric, Setting, components, gather
from workbench.probes.circuits.methods.path_patching import LOGITS, path_patching
from workbench.probes.heads.kinds import KINDS
from workbench.probes.heads.weights import head_weights, unembedding
from workbench.results import Result, axis
from workbench.sites import Site

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

MASS, OVER_EVEN, EFFECT = 0.3, 2.0, 0.02
LOOKS = ("previous", "duplicate", "induction")
ROLES = (*LOOKS, "inhibition", "gatherer", "mover", "negative", "backup")
NONE = "unclassified"
_EVIDENCE = (
    *(name for kind in LOOKS for name in (kind, f"{kind}_even")),
    "on_answer",
    "on_wrong",
    "on_other",
    "own",
    "direct",
    "via_q",
    "backup",
)


@dataclass(frozen=True)
class CircuitRoles(Result):
    """The roles of the heads of a circuit and what they rest on.

    ``labels`` are the roles of each of ``heads``. ``attention`` ``[N, S]`` is the attention from the answer position to each
    of ``spans``. ``evidence`` maps a name to ``[N]``: ``previous duplicate induction`` and the same of even attention,
    ``..._even``; ``on_answer on_wrong on_other``, attention from the answer position to right and wrong candidates and to
    other named words; ``own``, what attending to candidates adds to their own logits (in logits, against the mean token, gates
    left out); ``direct``, ``via_q`` and ``backup``, shares of the difference between clean and corrupted prompts. NaN is
    undefined: a path that does not exist, the ``backup`` of a mover, and what ``undefined`` gives a reason for.
    """

    heads: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    spans: tuple[str, ...]
    attention: Tensor
    evidence: Mapping[str, Tensor]
    undefined: Mapping[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def of(self, role: str) -> tuple[str, ...]:
        """The heads with a role."""
        if role not in (*ROLES, NONE):
            raise UnknownName("role", role, (*ROLES, NONE))
        return tuple(head for head, roles in zip(self.heads, self.labels, strict=True) if role in (roles or (NONE,)))

    def frame(self) -> pd.DataFrame:
        """One row per head: ``head, roles``, the evidence, and ``to X`` for every span X."""
        import pandas as pd

        table = pd.DataFrame({"head": list(self.heads), "roles": [", ".join(roles) or NONE for roles in self.labels]})
        for name, values in self.evidence.items():
            table[name] = values.numpy()
        for name, values in zip(self.spans, self.attention.T, strict=True):
            table[f"to {name}"] = values.numpy()
        return table

    def plot(self, ax: Axes | None = None) -> Axes:
        """Attention from the answer position to the spans, per head, with its roles."""
        ax = axis(ax, 3 + 0.6 * len(self.spans), 1.5 + 0.25 * len(self.heads))
        image = ax.imshow(self.attention.numpy(), aspect="auto", vmin=0, vmax=1, interpolation="nearest")
        names = [f"{head} {', '.join(roles)}" for head, roles in zip(self.heads, self.labels, strict=True)]
        ax.set_yticks(range(len(names)), names)
        ax.set_xticks(range(len(self.spans)), list(self.spans), rotation=90)
        ax.set(xlabel="span", title="Attention from the answer position")
        ax.figure.colorbar(image, ax=ax, label="attention")
        return ax


@torch.no_grad()
def circuit_roles(
    model: Model, pairs: Pairs, circuit: Circuit | Sequence[str], *, metric: Metric | None = None, batch: int = 16
) -> CircuitRoles:
    """The roles of the kept heads of ``circuit`` (or of heads by name) on ``pairs``; see the module for what each role takes.

    ``via_q`` is undefined without movers, ``own`` and ``backup`` where the model's ``W_O`` or ``W_U`` are not known.
    """
    setting = Setting.of(model, pairs, metric, "counterfactual", batch)
    known = {unit.name: unit.site for unit in components(model) if unit.site.head is not None}
    names = [name for name in circuit.nodes if ".h" in name] if isinstance(circuit, Circuit) else list(circuit)
    for name in names:
        if name not in known:
            raise UnknownName(f"head of {model.name}", name, known)
    if not names:
        raise WorkbenchError("the circuit keeps no heads; keep some with circuit.top(n), or name them")
    heads = {name: known[name] for name in names}
    undefined: dict[str, str] = {}
    evidence, attention = _looks(setting, heads)
    for kind in LOOKS:
        if evidence[kind].isnan().all():
            undefined[kind] = "no named position of these prompts has such a key before it"
    missing = torch.full((len(heads),), float("nan"), dtype=torch.float64)
    evidence |= dict.fromkeys(("own", "via_q", "backup"), missing)
    evidence["direct"] = path_patching(model, pairs, heads, [LOGITS], metric=metric, batch=batch).effect[:, 0]
    try:
        evidence["own"] = _own(setting, heads)
    except Refused as error:
        undefined["own"] = str(error)
    holds = _writers(evidence)
    movers = [name for name, one, other in zip(heads, holds["mover"], holds["negative"], strict=True) if one or other]
    if movers:
        queries = tuple(f"{name}<q>" for name in movers)
        evidence["via_q"] = path_patching(model, pairs, heads, [queries], metric=metric, batch=batch).effect[:, 0]
        try:
            positive = [name for name, one in zip(heads, holds["mover"], strict=True) if one]
            evidence["backup"] = _backup(setting, heads, positive).masked_fill(holds["mover"], float("nan"))
        except Refused as error:
            undefined["backup"] = str(error)
    else:
        undefined["via_q"] = undefined["backup"] = "no head of the circuit is a mover"
    holds |= _readers(evidence, holds)
    labels = tuple(tuple(role for role in ROLES if bool(holds[role][i])) for i in range(len(heads)))
    ordered = {name: evidence[name] for name in _EVIDENCE}
    provenance = setting.provenance("circuit-roles", "node", {})
    return CircuitRoles(tuple(heads), labels, tuple(pairs.spans), attention, ordered, undefined, provenance)


def _writers(evidence: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Who moves candidates to the answer; where the weights are not known the direct effect alone tells the sign."""
    looks = evidence["on_answer"] + evidence["on_wrong"] >= MASS
    own = torch.where(evidence["own"].isnan(), evidence["direct"], evidence["own"])
    return {
        "mover": looks & (own > 0) & (evidence["direct"] >= EFFECT),
        "negative": looks & (own < 0) & (evidence["direct"] <= -EFFECT),
    }


def _readers(evidence: Mapping[str, Tensor], holds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    steers = (evidence["via_q"].abs() >= EFFECT) & (evidence["via_q"].abs() > evidence["direct"].abs())
    found = {
        kind: (evidence[kind] >= MASS) & (evidence[kind] >= OVER_EVEN * evidence[f"{kind}_even"]) for kind in LOOKS
    }
    found["inhibition"] = steers & (evidence["on_wrong"] >= MASS)
    found["gatherer"] = steers & (evidence["on_other"] >= MASS)
    found["backup"] = ~holds["mover"] & (evidence["backup"] >= EFFECT)
    return found


def _looks(setting: Setting, heads: Mapping[str, Site]) -> tuple[dict[str, Tensor], Tensor]:
    """Attention of the heads on the clean prompts, ``[N]`` by name, and from the answer position to the spans ``[N, S]``."""
    layers = list(dict.fromkeys(site.layer for site in heads.values()))
    rows = torch.tensor([layers.index(site.layer) for site in heads.values()])
    index = torch.tensor([site.head for site in heads.values()])
    total: dict[str, Tensor] = {}
    for pairs in setting.chunks():
        acts, _ = gather(setting.model, pairs.clean, [Site("pattern", layer) for layer in layers])
        pattern = torch.stack([acts[Site("pattern", layer)].double().cpu() for layer in layers])[rows, :, index]
        for name, values in _masses(pairs, pattern, setting.model.shape.causal).items():
            total[name] = torch.cat([total[name], values], 1) if name in total else values
    means = {name: values.nanmean(1) for name, values in total.items()}
    spans = [means.pop(f"to {name}") for name in setting.pairs.spans]
    return means, torch.stack(spans, 1) if spans else torch.zeros(len(heads), 0, dtype=torch.float64)


def _masses(pairs: Pairs, pattern: Tensor, causal: bool) -> dict[str, Tensor]:
    """Masses per head and example, ``[N, B]``, of ``pattern`` ``[N, B, Q, K]``; NaN where no query has such a key."""
    size, length = pairs.clean.shape
    q, k = torch.arange(length)[:, None], torch.arange(length)
    b, h = torch.arange(size)[:, None, None], torch.zeros(1, dtype=torch.int64)
    visible = (k <= q) if causal else torch.ones(length, length, dtype=torch.bool)
    spans = {name: (k >= where[:, :1]) & (k < where[:, 1:]) for name, where in pairs.spans.items()}
    named = torch.stack(list(spans.values())).any(0) if spans else torch.ones(size, length, dtype=torch.bool)
    found: dict[str, Tensor] = {}
    for kind in LOOKS:
        keys = (KINDS[kind](pairs.clean)(b, h, q, k) & visible).expand(size, length, length)
        asked = keys.any(-1) & (named | (kind == "previous"))
        count = torch.where(asked.any(1), asked.sum(1), float("nan"))
        even = keys.double().sum(-1) / visible.sum(-1)
        found[kind] = ((pattern * keys).sum(-1) * asked).sum(-1) / count
        found[f"{kind}_even"] = ((even * asked).sum(-1) / count).expand(len(pattern), -1)
    last = pattern[:, torch.arange(size), pairs.position]
    right, wrong = ((pairs.clean[:, :, None] == ids[:, None]).any(-1) for ids in (pairs.answer, pairs.wrong))
    other = named & ~right & ~wrong & (k != pairs.position[:, None])
    for name, keys in {"on_answer": right, "on_wrong": wrong, "on_other": other}.items():
        found[name] = (last * keys).sum(-1)
    return found | {f"to {name}": (last * keys).sum(-1) for name, keys in spans.items()}


@torch.no_grad()
def _own(setting: Setting, heads: Mapping[str, Site]) -> Tensor:
    """What attending to candidates from the answer position adds to their own logits, mean over examples, ``[N]``."""
    model = setting.model
    out, layers = unembedding(model), list(dict.fromkeys(site.layer for site in heads.values()))
    weights = {layer: head_weights(model, layer) for layer in layers if layer is not None}
    end = Site("resid_post", model.shape.layers - 1)
    sites = [Site(kind, layer) for layer in layers for kind in ("pattern", "v")]
    total = torch.zeros(len(heads), dtype=torch.float64)
    for pairs in setting.chunks():
        acts, _ = gather(model, pairs.clean, [*sites, end])
        rows = torch.arange(len(pairs))
        candidates = torch.cat([pairs.answer, pairs.wrong], 1)
        chosen = (pairs.clean[:, :, None] == candidates[:, None]).any(-1)
        columns = out.matrix.T[pairs.clean.to(out.matrix.device)]
        size = out.size(acts[end][rows, pairs.position])
        for i, site in enumerate(heads.values()):
            assert site.layer is not None
            assert site.head is not None
            group = int(weights[site.layer].groups[site.head])
            row = acts[Site("pattern", site.layer)][rows, site.head, pairs.position]
            written = acts[Site("v", site.layer)][:, :, group] @ weights[site.layer].o[site.head]
            logit = (written * columns).sum(-1) / size[:, None]
            total[i] += float((row * chosen.to(row) * logit).sum())
    return total / len(setting.pairs)


@torch.no_grad()
def _backup(setting: Setting, heads: Mapping[str, Site], movers: Sequence[str]) -> Tensor:
    """Growth of each head's part of the logit difference when ``movers`` write nothing, as a share, ``[N]``."""
    model, out = setting.model, unembedding(setting.model)
    layers = list(dict.fromkeys(site.layer for site in heads.values()))
    weights = {layer: head_weights(model, layer) for layer in layers if layer is not None}
    sites, end = [Site("z", layer) for layer in layers], Site("resid_post", model.shape.layers - 1)
    growth, ends = torch.zeros(len(heads), dtype=torch.float64), 0.0
    for pairs in setting.chunks():
        corrupted = model.run(pairs.corrupt).logits
        silent: Edits = {heads[name]: torch.zeros_like for name in movers}
        direction = _mean(out.matrix, pairs.answer) - _mean(out.matrix, pairs.wrong)
        for sign, edits in ((-1, {}), (1, silent)):
            run = model.run(pairs.clean, read=[*sites, end], edit=edits)
            rows = torch.arange(len(pairs))
            size = out.size(run.acts[end][rows, pairs.position])
            for i, site in enumerate(heads.values()):
                assert site.layer is not None
                z = run.acts[site.whole][rows, pairs.position, site.head]
                part = ((z @ weights[site.layer].o[site.head]) * direction).sum(-1) / size
                growth[i] += sign * float(part.sum())
            if not edits:
                change = setting.measure(run.logits, pairs) - setting.measure(corrupted, pairs)
                ends += float(change.double().sum())
    return growth / ends if ends else torch.full_like(growth, float("nan"))


def _mean(matrix: Tensor, ids: Tensor) -> Tensor:
    """Mean column of a set of tokens per example, ``[B, D]``."""
    ids = ids.to(matrix.device)
    real = (ids >= 0)[..., None]
    return (matrix.T[ids.clamp(min=0)] * real).sum(1) / real.sum(1).clamp(min=1)
