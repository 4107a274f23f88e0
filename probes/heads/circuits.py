"""What would each head copy, suppress and match, by its weights alone?

From one token to another a head's two circuits (Elhage et al. 2021) are the V x V matrices

    OV   W_E W_V W_O W_U       what attending to a token adds to every logit
    QK   W_E W_Q W_K^T W_E^T   how much one token looks for another

They are never built: their non-zero eigenvalues are those of the small matrices W_O W_U W_E W_V and W_K^T W_E^T W_E W_Q, and
their rows are made for a sample of tokens.

    copying        sum of the OV eigenvalues / sum of their absolute values: 1 copies, -1 suppresses
    copied         share of tokens whose own logit is the largest that attending to them adds
    copied_top     share of tokens whose own logit is among the ``top`` largest
    suppressed     share of tokens whose own logit is among the ``lowest`` smallest (McDougall et al., arXiv 2310.04625)
    matching       the eigenvalue share of QK: 1 looks for the same token
    matched        share of tokens that look for no token more than for themselves
    previous       share of positions q >= 1 whose learned position looks for no position k <= q more than for q - 1

Nulls: the same with the tokens' identities shuffled on the side of the output (of the keys, of the positions). Norms are folded
in and the size of an embedding is not divided out (``weights.py``); that changes no ``copied`` or ``suppressed``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled
from workbench.probes.heads.repeats import vocabulary
from workbench.probes.heads.weights import (
    HeadWeights,
    embedding,
    grouped,
    positions,
    unembedding,
    weight_layers,
)
from workbench.probes.tables import HeadTable
from workbench.run import Provenance

_SHARE, _EIGEN = "share of tokens", "sum of eigenvalues / sum of their sizes"
UNITS = {
    "copying": _EIGEN, "copied": _SHARE, "copied_top": _SHARE, "suppressed": _SHARE,
    "matching": _EIGEN, "matched": _SHARE, "previous": "share of positions",
}  # fmt: skip
_WRITTEN = ("copying", "copied", "copied_top", "suppressed")
_POSITIONS = 256
_CHUNK = 2**25
_ROUNDING = 1e-6
"""Products smaller than this part of what their factors could make are zero but for rounding."""


@torch.no_grad()
def weight_circuits(
    model: Model,
    *,
    words: Sequence[int | str] | None = None,
    embed: str = "direct",
    top: int = 5,
    lowest: int = 10,
    tokens: int = 1024,
    shuffles: int = 8,
    per: str = "query",
    seed: int = 0,
) -> HeadTable:
    """Copying, suppression and matching of every head by its weights, beside shuffled identities.

    ``words``: the tokens (ids or texts) between which the circuits run, by default all. ``embed``: what stands for a token,
    ``direct`` W_E or ``effective``, what the first MLP makes of it (use it where W_E and W_U are tied and there is an MLP:
    McDougall et al.). ``tokens``: how many source tokens the shares are measured on (all, if there are no more). ``per``:
    ``query`` heads, or ``kv`` / ``kv-max`` for the mean / largest of the heads that share keys and values.
    The table has a null for every measure and ``<measure>_z``: (value - null) / standard deviation of the null over
    ``shuffles`` draws. ``previous`` is NaN without learned positions. Attention itself, rotary positions and biases play no part.
    """
    for name, number in (("top", top), ("lowest", lowest), ("tokens", tokens), ("shuffles", shuffles - 1)):
        if number < 1:
            raise WorkbenchError(f"{name} is at least {1 + (name == 'shuffles')}; got {number + (name == 'shuffles')}")
    layers, undefined = weight_layers(model)
    out, table = unembedding(model).matrix, embedding(model, embed)
    if len(table) != out.shape[1]:
        raise Refused(f"{model.name} reads {len(table)} tokens and predicts {out.shape[1]}: they are not the same")
    if words is not None:
        ids = vocabulary(model, words)[1].to(table.device)
        table, out = table[ids], out[:, ids] - out[:, ids].mean(1, keepdim=True)
    vocab = len(table)
    if max(top, lowest) >= vocab:
        raise WorkbenchError(f"top and lowest are below the {vocab} tokens; got {top} and {lowest}")
    generator = torch.Generator().manual_seed(seed)
    perms = [torch.arange(vocab), *(torch.randperm(vocab, generator=generator) for _ in range(shuffles))]
    sample = torch.randperm(vocab, generator=generator)[:tokens].sort().values
    keys = table - table.mean(0)  # what all keys share no softmax sees
    crossed, gram = [_cross(out[:, p].T, table) for p in perms], [_cross(keys[p], table) for p in perms]
    places = positions(model, _POSITIONS)
    values: dict[str, dict[int | str, Tensor]] = {}
    null: dict[str, dict[int | str, Tensor]] = {}
    for layer, weights in layers.items():
        found = _eigenvalue_shares(weights, crossed, gram)
        found |= _token_shares(weights, table, out, sample, perms, top, lowest)
        found["previous"] = _previous(weights, places, shuffles, generator)
        for name in UNITS:
            draws = grouped(found[name], len(weights.k), per)
            mean = draws[1:].mean(0)
            gap = draws[0] - mean
            values.setdefault(name, {})[layer] = draws[0]
            null.setdefault(name, {})[layer] = mean
            values.setdefault(f"{name}_z", {})[layer] = torch.where(gap == 0, 0.0, gap / draws[1:].std(0))
    if places is None:
        undefined["previous"] = "this model has no learned positions, or none that are known here"
    undefined |= {
        name: f"some heads {'write to no logit' if name in _WRITTEN else 'score no token'}: the product of their weights is zero"
        for name in ("copying", "copied", "copied_top", "suppressed", "matching", "matched")
        if any(bool(row.isnan().any()) for row in values[name].values())
    }
    units = {name: UNITS.get(name, "standard deviations of the null") for name in values}
    return HeadTable(
        "Circuits of weights", values, units, null=null, undefined=undefined, provenance=provenance_of_weights(model)
    )


def eigenvalue_share(matrix: Tensor, scale: Tensor | float = 0.0) -> Tensor:
    """Sum of the eigenvalues / sum of their absolute values of square matrices ``[..., E, E]``; NaN for matrices that are zero,
    or rounding beside ``scale``."""
    share = torch.diagonal(matrix, dim1=-2, dim2=-1).sum(-1) / torch.linalg.eigvals(matrix).abs().sum(-1)
    return share.masked_fill(matrix.norm(dim=(-2, -1)) <= _ROUNDING * scale, float("nan"))


def _cross(a: Tensor, b: Tensor) -> Tensor:
    """a^T b ``[D, D]`` in float64 for tables ``[V, D]``, some tokens at a time."""
    total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    step = max(1, _CHUNK // (a.shape[1] + b.shape[1]))
    for lo in range(0, len(a), step):
        total += a[lo : lo + step].double().T @ b[lo : lo + step].double()
    return total


def _eigenvalue_shares(weights: HeadWeights, crossed: list[Tensor], gram: list[Tensor]) -> dict[str, Tensor]:
    """``copying`` and ``matching`` ``[1 + shuffles, H]``."""
    at = weights.groups
    q, k, v, o = (x.double() for x in (weights.q, weights.k[at], weights.v[at], weights.o))
    found = {}
    for name, left, right, middles in (("copying", o, v, crossed), ("matching", k.transpose(1, 2), q, gram)):
        scale = left.norm(dim=(1, 2)) * right.norm(dim=(1, 2))
        found[name] = torch.stack([eigenvalue_share(left @ m @ right, scale * m.norm()) for m in middles]).cpu()
    return found


def _token_shares(
    weights: HeadWeights, table: Tensor, out: Tensor, sample: Tensor, perms: list[Tensor], top: int, lowest: int
) -> dict[str, Tensor]:
    """Shares of the sampled tokens ``[1 + shuffles, H]``: where the own token (its shuffled twin) stands in each row."""
    at = weights.groups
    targets = torch.stack(perms)[:, sample].T.to(table.device)
    found: dict[str, list[Tensor]] = {"copied": [], "copied_top": [], "suppressed": [], "matched": []}
    for h in range(len(weights.q)):
        v, o, q, k = weights.v[at[h]], weights.o[h], weights.q[h], weights.k[at[h]]
        moved, writes = table[sample] @ v, o @ out
        largest, smallest = _extremes(moved, writes, targets, (1, top), (lowest,))
        written = writes.norm() * moved.norm() > _ROUNDING * table.norm() * v.norm() * o.norm() * out.norm()
        asked, sought = table[sample] @ q, k.T @ table.T
        (matched,), _ = _extremes(asked, sought, targets, (1,), ())
        scored = asked.norm() * sought.norm() > _ROUNDING * table.norm() ** 2 * q.norm() * k.norm()
        for name, share, known in zip(
            found, (*largest, *smallest, matched), (written, written, written, scored), strict=True
        ):
            found[name].append(share if known else torch.full_like(share, float("nan")))
    return {name: torch.stack(parts, 1) for name, parts in found.items()}


def _extremes(
    left: Tensor, right: Tensor, targets: Tensor, top: tuple[int, ...], lowest: tuple[int, ...]
) -> tuple[list[Tensor], list[Tensor]]:
    """Share of the rows of ``left @ right`` whose targets ``[N, draws]`` are among the largest and smallest, ``[draws]``."""
    hits = [torch.zeros(targets.shape[1], dtype=torch.float64) for _ in (*top, *lowest)]
    step = max(1, _CHUNK // right.shape[1])
    for lo in range(0, len(left), step):
        rows = left[lo : lo + step] @ right
        own = rows.gather(1, targets[lo : lo + step])
        wanted = [(k, True) for k in top] + [(k, False) for k in lowest]
        for i, (k, largest) in enumerate(wanted):
            edge = rows.topk(k, largest=largest).values[:, -1:]
            hits[i] += ((own >= edge) if largest else (own <= edge)).sum(0).cpu()
    shares = [hit / len(left) for hit in hits]
    return shares[: len(top)], shares[len(top) :]


def _previous(weights: HeadWeights, places: Tensor | None, shuffles: int, generator: torch.Generator) -> Tensor:
    """``[1 + shuffles, H]``; the null shuffles the positions on the side of the keys."""
    heads = len(weights.q)
    if places is None or len(places) < 2:
        return torch.full((1 + shuffles, heads), float("nan"), dtype=torch.float64)
    count = len(places)
    q, k = places @ weights.q, (places @ weights.k)[weights.groups]
    later = torch.ones(count, count, dtype=torch.bool, device=places.device).triu(1)
    before = torch.arange(count - 1, device=places.device)
    draws = []
    for draw in range(1 + shuffles):
        keys = k if not draw else k[:, torch.randperm(count, generator=generator).to(k.device)]
        best = (q @ keys.transpose(1, 2)).masked_fill(later, float("-inf")).argmax(-1)
        draws.append((best[:, 1:] == before).double().mean(1).cpu())
    return torch.stack(draws)


def provenance_of_weights(model: Model) -> Provenance:
    weight = embedding(model)
    dtype = str(weight.dtype).removeprefix("torch.")
    return Provenance(model.name, getattr(model, "revision", ""), dtype, str(weight.device))


ANALYSES = (
    Analysis(
        name="weight-circuits",
        question="What would each head copy, suppress and match, by its weights alone?",
        function=weight_circuits,
        example=lambda: {"model": bundled("tiny-softmax"), "tokens": 128, "shuffles": 4},
        paper="Elhage et al. 2021, A Mathematical Framework for Transformer Circuits; McDougall et al. 2023 (arXiv 2310.04625)",
        source="model",
        null="identities of the tokens shuffled on one side",
        cause="copy_suppression and role_ablation remove the heads",
        definition="shares over a sample of tokens; norms folded in, sizes of embeddings not divided out",
    ),
)
