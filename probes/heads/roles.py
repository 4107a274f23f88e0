"""What does each head do: one row per head with every score, its null, its z, and the roles that follow from them?

Roles and what they take, z in standard deviations of the null:

    previous, duplicate, induction       the score of that name (``head_scores``) at least .3 and z at least 3
    first, current                       at least .5 and z at least 3
    positional, content                  positional share at least .8; at most .3 and the head not even (``positional_share``)
    copying, suppressing                 the OV eigenvalue share at least .5 with z >= 3; at most -.5 with z <= -3
    copy-suppression                     the weights suppress, attention to predicted tokens that stand in the text is at least
                                         .2 and twice its null, and own_logit lies below 0 with its whole interval

Several roles may hold; where none does the head is unclassified. The thresholds are ours. A role says what a head looks at and
writes on these inputs, not that the model needs it: ``role_ablation`` removes the heads of a role.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from workbench.captures import capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Model
from workbench.probes.ablation import AblationCurve, ablation_curve
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled
from workbench.probes.heads.circuits import weight_circuits
from workbench.probes.heads.kinds import KINDS, HeadScores, head_scores
from workbench.probes.heads.positional import positional_share, random_texts
from workbench.probes.heads.repeats import repeats, task_words
from workbench.probes.heads.suppression import copy_suppression
from workbench.probes.tables import HeadTable
from workbench.results import Result, head_map
from workbench.run import Provenance, Run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

Z = 3.0
MASS = {"previous": 0.3, "duplicate": 0.3, "induction": 0.3, "first": 0.5, "current": 0.5}
POSITIONAL, CONTENT = 0.8, 0.3
EIGENVALUES = 0.5
PREDICTED = 0.2
ROLES = (*MASS, "positional", "content", "copying", "suppressing", "copy-suppression")
NONE = "unclassified"
SCORES = (*KINDS, "positional", "copying", "copied", "matching", "predicted", "own_logit")


class Role(NamedTuple):
    """A head and one of its scores."""

    layer: int | str
    head: int
    value: float


@dataclass(frozen=True)
class HeadRoles(Result):
    """``value null z``: score -> layer -> ``[H]``, NaN where undefined; ``labels``: layer -> the roles of each head.

    ``z`` of scores whose null is one number is NaN. ``undefined`` says which scores are missing, and why.
    """

    value: Mapping[str, Mapping[int | str, Tensor]]
    null: Mapping[str, Mapping[int | str, Tensor]]
    z: Mapping[str, Mapping[int | str, Tensor]]
    labels: Mapping[int | str, tuple[tuple[str, ...], ...]]
    source: str
    undefined: Mapping[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    def frame(self) -> pd.DataFrame:
        """One row per head: ``layer, head, roles``, then each score with its ``_null`` and ``_z``."""
        import pandas as pd

        parts = []
        for layer, roles in self.labels.items():
            columns: dict[str, object] = {
                "layer": layer,
                "head": range(len(roles)),
                "roles": [", ".join(r) or NONE for r in roles],
            }
            for score in self.value:
                for name, part in ((score, self.value), (f"{score}_null", self.null), (f"{score}_z", self.z)):
                    columns[name] = part[score][layer].double().numpy()
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)

    def heads(self, role: str) -> list[Role]:
        """The heads with a role, those with the strongest score first."""
        if role not in (*ROLES, NONE):
            raise UnknownName("role", role, (*ROLES, NONE))
        score = {
            "content": "positional",
            "suppressing": "copying",
            "copy-suppression": "own_logit",
            NONE: "previous",
        }.get(role, role)
        sign = -1 if role in ("content", "suppressing", "copy-suppression") else 1
        found = [
            Role(layer, h, float(self.value[score][layer][h]))
            for layer, roles in self.labels.items()
            for h, own in enumerate(roles)
            if role in (own or (NONE,))
        ]
        return sorted(found, key=lambda head: -sign * head.value if not math.isnan(head.value) else math.inf)

    def plot(self, ax: Axes | None = None, score: str = "induction") -> Axes:
        """Layer x head heat map of one score."""
        if score not in self.value:
            raise UnknownName("score", score, self.value)
        rows = list(self.value[score].values())
        known = torch.cat([row[row.isfinite()] for row in rows])
        limits = (min(0.0, float(known.min())), max(1e-9, float(known.max()))) if len(known) else (0.0, 1.0)
        title = f"{score.replace('_', ' ').capitalize()} of each head\n{self.provenance.model}"
        return head_map(ax, rows, list(self.labels), title=title, unit=score.replace("_", " "), limits=limits)


def head_roles(
    model: Model,
    *,
    batches: int = 2,
    sequences: int = 8,
    length: int = 48,
    words: Sequence[int | str] | None = None,
    scores: HeadScores | None = None,
    per: str = "query",
    raw: bool = False,
    seed: int = 0,
) -> HeadRoles:
    """Every score of every head, and the roles that follow (see the module).

    Attention scores come from random repeats, the positional share from random tokens, copying and matching from the weights
    (``weight_circuits``), attention to predicted tokens from random repeats (``copy_suppression``). ``words`` are what to draw
    from, as in ``head_scores``; circuits run between the same words. Parts that a model cannot answer (no W_U, no plain
    projections) are NaN and named in ``undefined``. ``scores``: attention scores of all kinds that were already measured, with
    the same ``per``. ``raw`` looks inside the gate of gated maps, but for ``predicted``.
    """
    if scores is None:
        scores = head_scores(
            model,
            kinds=tuple(KINDS),
            per=per,
            batches=batches,
            sequences=sequences,
            words=words,
            raw=raw,
            seed=seed,
        )
    missing = [kind for kind in KINDS if kind not in scores.kinds]
    if missing:
        raise WorkbenchError(f"scores of all kinds are needed; missing: {', '.join(missing)}")
    words = task_words(model) if words is None else words
    undefined = dict(scores.undefined)
    nothing = {layer: torch.full_like(value[0], float("nan")) for layer, value in scores.value.items()}
    value: dict[str, dict[int | str, Tensor]] = {name: dict(nothing) for name in SCORES}
    null: dict[str, dict[int | str, Tensor]] = {name: dict(nothing) for name in SCORES}
    z: dict[str, dict[int | str, Tensor]] = {name: dict(nothing) for name in SCORES}
    for i, kind in enumerate(scores.kinds):
        for store, part in ((value, scores.value), (null, scores.null), (z, scores.z)):
            store[kind].update({layer: row[i] for layer, row in part.items()})

    def take(score: str, table: HeadTable, measure: str) -> None:
        for layer, row in table.values[measure].items():
            if layer in nothing and len(row) == len(nothing[layer]):
                value[score][layer] = row
                if measure in table.null:
                    null[score][layer] = table.null[measure][layer]
                if f"{measure}_z" in table.values:
                    z[score][layer] = table.values[f"{measure}_z"][layer]

    if per == "query":
        try:
            generator = torch.Generator().manual_seed(seed)
            room = length if model.shape.context is None else min(length, model.shape.context - 1)
            ids = random_texts(model, 2 * sequences, room, words, generator)
            with torch.no_grad():
                take("positional", positional_share(model.run(ids, maps=capture(), logits=None), raw=raw), "positional")
        except WorkbenchError as error:
            undefined["positional"] = str(error)
    else:
        undefined["positional"] = "measured per query head"
    try:
        circuits = weight_circuits(model, words=words, per=per, seed=seed, lowest=_lowest(words, model))
        for name in ("copying", "copied", "matching"):
            take(name, circuits, name)
        undefined |= {k: v for k, v in circuits.undefined.items() if k in ("copying", "copied", "matching")}
    except WorkbenchError as error:
        undefined["copying"] = undefined["matching"] = str(error)
    whole: Mapping[int | str, Tensor] = nothing
    try:
        held = copy_suppression(model, words=words, sequences=sequences, cause=False, per=per, seed=seed)
        take("predicted", held, "attention")
        take("own_logit", held, "own_logit")
        whole = {**nothing, **held.high["own_logit"]}
        undefined |= {"predicted": held.undefined["attention"]} if "attention" in held.undefined else {}
    except WorkbenchError as error:
        undefined["predicted"] = undefined["own_logit"] = str(error)
    labels = {layer: _roles(layer, value, null, z, whole[layer]) for layer in nothing}
    return HeadRoles(value, null, z, labels, scores.source, undefined, scores.provenance)


def _lowest(words: Sequence[int | str] | None, model: Model) -> int:
    count = len(words) if words is not None else model.shape.vocab or 0
    return max(1, min(10, count // 8))


def _roles(
    layer: int | str,
    value: Mapping[str, Mapping[int | str, Tensor]],
    null: Mapping[str, Mapping[int | str, Tensor]],
    z: Mapping[str, Mapping[int | str, Tensor]],
    high: Tensor,
) -> tuple[tuple[str, ...], ...]:
    """The roles of each head of a layer; comparisons with NaN are False."""
    v = {name: part[layer] for name, part in value.items()}
    gap = {name: part[layer] for name, part in z.items()}
    suppressing = (v["copying"] <= -EIGENVALUES) & (gap["copying"] <= -Z)
    holds = {kind: (v[kind] >= least) & (gap[kind] >= Z) for kind, least in MASS.items()}
    holds["positional"] = v["positional"] >= POSITIONAL
    holds["content"] = v["positional"] <= CONTENT
    holds["copying"] = (v["copying"] >= EIGENVALUES) & (gap["copying"] >= Z)
    holds["suppressing"] = suppressing
    looks = (v["predicted"] >= PREDICTED) & (v["predicted"] >= 2 * null["predicted"][layer])
    holds["copy-suppression"] = suppressing & looks & (v["own_logit"] < 0) & (high < 0)
    return tuple(tuple(role for role in ROLES if bool(holds[role][h])) for h in range(len(v["previous"])))


def role_ablation(
    model: Model,
    roles: HeadRoles,
    role: str = "induction",
    *,
    n: int | None = None,
    sequences: int = 8,
    period: tuple[int, int] = (16, 32),
    words: Sequence[int | str] | None = None,
    ablation: str = "mean",
    random: int = 8,
    seed: int = 0,
) -> AblationCurve:
    """Loss on repeated random tokens as the heads of a role are removed, strongest first, beside random heads of their layers.

    The loss is over the second half from its second token on, which the first half tells. ``n`` of the heads at most. Refused
    where no head has the role, and for scores of groups of heads.
    """
    found = roles.heads(role)[:n]
    if any(len(own) != model.shape.heads for own in roles.labels.values()):
        raise Refused("roles of groups of heads cannot be removed head by head: measure them with per='query'")
    if not found:
        raise Refused(f"{model.name}: no head is {role}; roles found: {', '.join(_present(roles)) or 'none'}")
    generator = torch.Generator().manual_seed(seed)
    words = task_words(model) if words is None else words
    ids = next(repeats(model, 1, sequences, period, generator, words))[0]
    start = _repeat_start(ids)

    def repeated_loss(run: Run) -> Tensor:
        assert run.logits is not None
        logp = run.logits[:, start:-1].float().log_softmax(-1)
        return -logp.gather(-1, ids[:, start + 1 :, None].to(logp.device))[..., 0].double().mean(1)

    ranking = [(head.layer, head.head) for head in found if isinstance(head.layer, int)]
    return ablation_curve(model, ids, ranking, metric=repeated_loss, ablation=ablation, random=random, seed=seed)


def _repeat_start(ids: Tensor) -> int:
    """The first position of the second half."""
    period = ids.shape[1] // 2
    return ids.shape[1] - period


def _present(roles: HeadRoles) -> list[str]:
    return [role for role in ROLES if any(role in own for layer in roles.labels.values() for own in layer)]


def _example() -> dict[str, object]:
    model = bundled("compiled-induction")
    return {"model": model, "roles": head_roles(model, batches=1, sequences=4, length=24), "sequences": 4, "random": 3}


ANALYSES = (
    Analysis(
        name="head-roles",
        question="What does each head do?",
        function=head_roles,
        example=lambda: {"model": bundled("compiled-induction"), "batches": 1, "sequences": 4, "length": 24},
        paper="Olsson et al. 2022 (arXiv 2209.11895); Elhage et al. 2021; McDougall et al. 2023 (arXiv 2310.04625)",
        source="model",
        null="that of each score",
        cause="role_ablation",
        definition="the thresholds of the roles are ours",
    ),
    Analysis(
        name="role-ablation",
        question="Does the model need the heads of a role to repeat what it has seen?",
        function=role_ablation,
        example=_example,
        paper="Olsson et al. 2022 (arXiv 2209.11895), argument 3",
        source="model",
        null="random heads of the same layers",
        cause="the heads' outputs replaced by their means",
    ),
)
