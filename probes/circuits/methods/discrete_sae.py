"""Circuits from discrete sparse autoencoders (arXiv 2405.12522): which heads use codes that only the clean prompts
have?

All heads' outputs in residual space, pooled over positions, go through one small sparse autoencoder; a head's code
on a prompt is its strongest feature; a head's score is the number of codes that clean prompts use and corrupted
ones do not. No gradient and no intervention. Next to the score stand its null under permuted labels and two
baselines without any autoencoder: the distance between the class means, and a held-out logistic probe. Without
beating those a score says little.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.circuits.codes import against, permuted, unique_codes
from workbench.probes.circuits.components import Setting, gather, served
from workbench.probes.circuits.method import Method
from workbench.sites import Site

POOLINGS = ("mean", "last", "concat")


def discrete_sae(
    setting: Setting,
    level: str,
    *,
    pooling: str = "mean",
    normalise: bool = True,
    features: int = 200,
    sparsity: float = 0.02,
    epochs: int = 500,
    rate: float = 1e-3,
    examples: int = 10,
    trials: int = 3,
    relative: bool = False,
    permutations: int = 200,
    seed: int = 0,
) -> Circuit:
    """Node scores of all heads: class-unique codes, averaged over ``trials`` autoencoders.

    ``pooling``: ``"mean"`` over positions (as published), ``"last"`` (the answer position) or ``"concat"`` (all
    positions). ``normalise`` scales the pooled outputs to mean norm sqrt(width), which decides how much the
    sparsity weighs; ``False`` is as published. ``features``, ``sparsity``, ``epochs``, ``rate`` and ``examples``
    (prompts that each autoencoder trains on) have the published values. ``relative`` divides a score by the number
    of codes in use.

    Columns: ``null_mean null_sd z p`` (``permutations`` label permutations, at least 200), ``mean_difference``
    (distance of the class means) and ``probe`` (held-out AUROC of a logistic probe, pairs kept together).
    """
    if pooling not in POOLINGS:
        raise UnknownName("pooling", pooling, POOLINGS)
    if permutations < 200:
        raise WorkbenchError(f"the null takes at least 200 permutations; got {permutations}")
    for name, value in (("features", features), ("epochs", epochs), ("examples", examples), ("trials", trials)):
        if value < 1:
            raise WorkbenchError(f"{name} is at least 1; got {value}")
    if len(setting.pairs) < 4:
        raise WorkbenchError(f"the probe and the null need at least 4 pairs; got {len(setting.pairs)}")
    names, vectors = head_vectors(setting, pooling)
    if normalise:
        vectors = vectors * (vectors.shape[-1] ** 0.5 / vectors.norm(dim=-1).mean().clamp(min=1e-30))
    n = len(setting.pairs)
    positive = torch.arange(2 * n) < n
    labels = permuted(positive, permutations, seed)
    scores, null = (
        torch.zeros(len(names), dtype=torch.float64),
        torch.zeros(permutations, len(names), dtype=torch.float64),
    )
    for trial in range(trials):
        generator = torch.Generator().manual_seed(1000 * seed + trial)
        chosen = torch.randperm(2 * n, generator=generator)[:examples]
        coder = train(vectors[chosen].flatten(0, 1), features, sparsity, epochs, rate, generator)
        codes = encode(coder, vectors).argmax(-1)
        scores += unique_codes(codes, positive, relative)
        null += unique_codes(codes, labels, relative)
    scores, null = scores / trials, null / trials
    found = against(scores, null)
    columns = {
        "null_mean": found.mean,
        "null_sd": found.sd,
        "z": found.z,
        "p": found.p,
        "mean_difference": (vectors[positive].mean(0) - vectors[~positive].mean(0)).norm(dim=-1),
        "probe": probe(vectors, n),
    }
    return Circuit(level, tuple(names), scores, torch.ones(len(names), dtype=torch.bool), {}, columns)


def head_vectors(setting: Setting, pooling: str) -> tuple[list[str], Tensor]:
    """Pooled outputs of all heads in residual space, ``[2N, H_total, D or T*D]``: clean prompts, then corrupted
    ones."""
    model = setting.model
    sites = [Site("result", layer) for layer in range(model.shape.layers) if Site("result", layer) in served(model)]
    if not sites:
        raise Refused(f"{model.name} does not serve hook_result (head outputs in residual space); use method='eap-ig'")
    names = [f"a{site.layer}.h{head}" for site in sites for head in range(model.shape.heads)]
    sides = []
    for which in ("clean", "corrupt"):
        parts = []
        for pairs in setting.chunks():
            acts, _ = gather(model, getattr(pairs, which), sites)
            outputs = torch.cat([acts[site].float() for site in sites], dim=2)  # [B, T, H_total, D]
            if pooling == "mean":
                pooled = outputs.mean(1)
            elif pooling == "last":
                pooled = outputs[torch.arange(len(pairs)), pairs.position]
            else:
                pooled = outputs.transpose(1, 2).flatten(2)
            parts.append(pooled.cpu())
        sides.append(torch.cat(parts))
    return names, torch.cat(sides)


class Coder:
    """A ReLU autoencoder f = ReLU((x - b) W_e + b_e), y = f W_d + b with unit rows in W_d ``[F, D]``."""

    def __init__(self, width: int, features: int, generator: torch.Generator) -> None:
        decoder = torch.randn(features, width, generator=generator)
        self.W_d = decoder / decoder.norm(dim=1, keepdim=True)
        self.W_e = self.W_d.T.clone()
        self.b_e, self.b = torch.zeros(features), torch.zeros(width)

    def parameters(self) -> list[Tensor]:
        return [self.W_d, self.W_e, self.b_e, self.b]


def encode(coder: Coder, x: Tensor) -> Tensor:
    """Feature activations ``[..., F]``."""
    return torch.relu((x - coder.b) @ coder.W_e + coder.b_e)


@torch.enable_grad()
def train(x: Tensor, features: int, sparsity: float, epochs: int, rate: float, generator: torch.Generator) -> Coder:
    """Full-batch Adam on mean((y - x)^2) + sparsity * mean(|f|), decoder rows projected to norm 1 after every step."""
    coder = Coder(x.shape[1], features, generator)
    optimiser = torch.optim.Adam([p.requires_grad_() for p in coder.parameters()], lr=rate)
    for _ in range(epochs):
        f = encode(coder, x)
        loss = (f @ coder.W_d + coder.b - x).pow(2).mean() + sparsity * f.abs().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            coder.W_d /= coder.W_d.norm(dim=1, keepdim=True).clamp(min=1e-12)
    for parameter in coder.parameters():
        parameter.requires_grad_(False)
    return coder


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


METHODS = (
    Method(
        "discrete-sae",
        "codes of a small sparse autoencoder that only the clean prompts use, per head, with a permutation null",
        discrete_sae,
        "O'Neill and Bui 2024 (arXiv 2405.12522)",
        levels=("node",),
        ablations=("counterfactual",),
        training=True,
    ),
)
