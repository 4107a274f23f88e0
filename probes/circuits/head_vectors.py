"""Outputs of all heads in residual space, pooled over positions; and what a comparison of two sets of prompts can say
about a head without any autoencoder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from workbench.errors import Refused, UnknownName
from workbench.pairs import Pairs
from workbench.probes.circuits.components import Setting, gather, served
from workbench.probes.circuits.places import Places
from workbench.sites import Site

POOLINGS = ("mean", "last", "concat", "spans")


def head_names(setting: Setting) -> list[str]:
    """Every head whose output in residual space the model serves."""
    return [f"a{site.layer}.h{head}" for site in _sites(setting) for head in range(setting.model.shape.heads)]


def head_vectors(setting: Setting, pooling: str) -> Tensor:
    """Pooled outputs ``[2N, H_total, D or n * D]``: clean prompts, then corrupted ones.

    ``pooling``: ``"mean"`` over all positions, ``<bos>`` included; ``"last"``, the answer position; ``"concat"``, all
    positions side by side; ``"spans"``, the means over the places that the task names, side by side, so that words in
    the same role meet wherever they stand.
    """
    if pooling not in POOLINGS:
        raise UnknownName("pooling", pooling, POOLINGS)
    places = Places.of("spans", setting.pairs) if pooling == "spans" else None
    return _pooled(setting, lambda outputs, pairs: _pool(outputs, pairs, pooling, places))


def placed_vectors(setting: Setting) -> Tensor:
    """Outputs averaged over each of the setting's places, ``[2N, H_total * places, D]``, places innermost."""
    return _pooled(setting, lambda outputs, pairs: _by_place(outputs, pairs, setting.places).flatten(1, 2))


def _sites(setting: Setting) -> list[Site]:
    model, known = setting.model, served(setting.model)
    found = [Site("result", layer) for layer in range(model.shape.layers) if Site("result", layer) in known]
    if not found:
        raise Refused(f"{model.name} does not serve hook_result (head outputs in residual space); use method='eap-ig'")
    return found


def _pooled(setting: Setting, pool: object) -> Tensor:
    assert callable(pool)
    sites, sides = _sites(setting), []
    for which in ("clean", "corrupt"):
        parts = []
        for pairs in setting.chunks():
            acts, _ = gather(setting.model, getattr(pairs, which), sites)
            parts.append(pool(torch.cat([acts[site].float() for site in sites], dim=2), pairs).cpu())
        sides.append(torch.cat(parts))
    return torch.cat(sides)


def _pool(outputs: Tensor, pairs: Pairs, pooling: str, places: Places | None) -> Tensor:
    """``outputs`` ``[B, T, H_total, D]`` to ``[B, H_total, D or n * D]``."""
    if pooling == "mean":
        return outputs.mean(1)
    if pooling == "last":
        return outputs[torch.arange(len(pairs)), pairs.position]
    if places is None:
        return outputs.transpose(1, 2).flatten(2)
    return _by_place(outputs, pairs, places).flatten(2)


def _by_place(outputs: Tensor, pairs: Pairs, places: Places) -> Tensor:
    """Means over places ``[B, H_total, places, D]``; a place that an example does not have is zero there."""
    member = torch.nn.functional.one_hot(places.index(pairs), len(places)).to(outputs)  # [B, T, places]
    share = member / member.sum(1, keepdim=True).clamp(min=1)
    return torch.einsum("btp,bthd->bhpd", share, outputs)


def principal(vectors: Tensor, dimensions: int) -> Tensor:
    """Vectors ``[N, H, D]`` in their first ``dimensions`` principal directions about the origin, those with the largest
    mean square."""
    flat = vectors.flatten(0, 1).double()
    _, directions = torch.linalg.eigh(flat.T @ flat)  # ascending
    return (flat @ directions[:, -dimensions:]).to(vectors.dtype).unflatten(0, vectors.shape[:2])


def mean_difference(vectors: Tensor, n: int) -> Tensor:
    """Distance between the mean of the first ``n`` prompts (clean) and that of the others, per head."""
    return (vectors[:n].mean(0) - vectors[n:].mean(0)).norm(dim=-1).double()


def probe(vectors: Tensor, n: int) -> Tensor:
    """Held-out AUROC per head of a logistic probe that tells clean from corrupted: trained on one half of the
    pairs, tested on the other, and the other way round."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    halves = np.arange(2 * n) % n < n // 2
    labels = np.arange(2 * n) < n
    found = []
    for head in range(vectors.shape[1]):
        x = vectors[:, head].numpy()
        areas = []
        for half in (halves, ~halves):
            shift, scale = x[half].mean(0), x[half].std() or 1.0
            model = LogisticRegression(max_iter=200).fit((x[half] - shift) / scale, labels[half])
            areas.append(roc_auc_score(labels[~half], model.decision_function((x[~half] - shift) / scale)))
        found.append(float(np.mean(areas)))
    return torch.tensor(found, dtype=torch.float64)
