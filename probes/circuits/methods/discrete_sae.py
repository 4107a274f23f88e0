"""Circuits from discrete sparse autoencoders (arXiv 2405.12522): which heads use codes that only the clean prompts
have?

All heads' outputs in residual space, pooled over positions, go through one small sparse autoencoder; a head's code
on a prompt is its strongest feature; a head's score compares the codes of clean and of corrupted prompts. No gradient
and no intervention, so a score says that a head carries the difference, not that anything reads it. Pairs should be
those of ``task.contrast()``, whose corrupted prompts do not call for the behaviour.

``discrete-sae-published`` is the method as published. ``discrete-sae`` has what we found to matter: centred inputs of
known scale, a code for silence, a choice of pooling and of statistic, and scores read against permuted labels. Next to
either stand the null and two baselines without any autoencoder, the distance between the class means and a held-out
logistic probe.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from workbench.circuits import Circuit
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.graph import circuit_graph, edge_parts
from workbench.probes.circuits.codes import against, code_mass, pair_codes, pair_counts, swapped, unique_codes
from workbench.probes.circuits.components import Setting
from workbench.probes.circuits.discrete_coder import Coder, codes_of, train, trained_before
from workbench.probes.circuits.head_vectors import (
    POOLINGS,
    head_names,
    head_vectors,
    mean_difference,
    placed_vectors,
    principal,
    probe,
)
from workbench.probes.circuits.method import Method

STATISTICS = ("unique", "mass")
SCORES = ("raw", "excess", "z")


def discrete_sae(
    setting: Setting,
    level: str,
    *,
    pooling: str = "spans",
    centre: bool = True,
    normalise: bool = True,
    silent: float = 0.25,
    dimensions: int = 64,
    statistic: str = "mass",
    score: str = "excess",
    features: int = 200,
    sparsity: float = 0.02,
    epochs: int = 150,
    rate: float = 3e-3,
    examples: int = 10,
    trials: int = 3,
    relative: bool = False,
    permutations: int = 200,
    seed: int = 0,
    coder: str = "",
) -> Circuit:
    """Scores of all heads, averaged over ``trials`` autoencoders; with ``level="edge"``, of all edges between heads.

    ``pooling``: ``"mean"`` over positions (as published), ``"last"`` (the answer position), ``"concat"`` (all
    positions) or ``"spans"`` (the places that the task names). ``centre`` subtracts each head's mean over all prompts,
    which tells nothing apart. ``normalise`` scales the pooled outputs to mean norm sqrt(width), which decides how much
    the sparsity weighs. What activates no feature beyond ``silent`` sqrt(width) gets one code of its own, so that heads
    which write little do not seem to say much. ``dimensions`` principal directions of all heads' outputs enter the
    autoencoder (0: all), which keeps large models to seconds. ``statistic``: ``"unique"``, the number of codes that only
    clean prompts use (as published; ``relative`` divides it by the number of codes in use), or ``"mass"``, the total
    variation distance between the codes of clean and corrupted prompts. ``score``: the statistic itself (``"raw"``, as
    published), its excess over the mean under permuted labels, or that in standard deviations (``"z"``); 0
    where it is not above chance or the null does not vary. Labels are permuted within pairs. ``features``, ``sparsity``
    and ``examples`` (prompts that each autoencoder trains on) have the published values; published are also 500
    ``epochs`` at ``rate`` 1e-3 and 10 ``trials``. Told apart by position, each place of a head is a part with codes of
    its own, and ``pooling`` has no say.

    ``coder``: a discrete (or ReLU) autoencoder of head outputs that was trained before, as a folder or a bundled name
    (``tiny-softmax/discrete``, of outputs pooled by ``"mean"``), in the place of ``trials`` new ones. It gets the outputs as they
    are: ``centre``, ``normalise`` and ``dimensions`` do not apply, and ``silent`` is a share of their mean norm.

    Columns of nodes: ``raw null_mean null_sd z p`` (``permutations`` label permutations, at least 200),
    ``mean_difference`` and ``probe``. The score of an edge is the number of pairs of codes that its two heads show
    together on some clean and on no corrupted prompt, the same for q, k and v.
    """
    _check(setting, pooling, statistic, score, permutations)
    if dimensions < 0:
        raise WorkbenchError(f"dimensions is a number of directions, 0 for all; got {dimensions}")
    if not 0 <= silent < 1:
        raise WorkbenchError(f"silent is a share of the typical norm, from 0 to below 1; got {silent}")
    for name, value in (("features", features), ("epochs", epochs), ("examples", examples), ("trials", trials)):
        if value < 1:
            raise WorkbenchError(f"{name} is at least 1; got {value}")
    placed = len(setting.places) > 1
    vectors = placed_vectors(setting) if placed else head_vectors(setting, pooling)
    if coder:
        given = trained_before(coder, vectors.shape[-1])
        quiet = silent * float(vectors.norm(dim=-1).mean()) / vectors.shape[-1] ** 0.5
        if level == "edge":
            return _edges(setting, vectors, [given], quiet)
        return _nodes(setting, vectors, [given], quiet, statistic, score, relative, permutations, seed)
    if centre:
        vectors = vectors - vectors.mean(0)
    if 0 < dimensions < vectors.shape[-1]:
        vectors = principal(vectors, dimensions)
    if normalise:
        vectors = vectors * (vectors.shape[-1] ** 0.5 / vectors.norm(dim=-1).mean().clamp(min=1e-30))
    coders = _trained(vectors, features, sparsity, epochs, rate, examples, trials, seed)
    if level == "edge":
        return _edges(setting, vectors, coders, silent)
    return _nodes(setting, vectors, coders, silent, statistic, score, relative, permutations, seed)


def discrete_sae_published(setting: Setting, level: str, *, sparsity: float = 0.02, seed: int = 0) -> Circuit:
    """The method with every published setting: outputs averaged over all positions and not scaled, 200 features, 10
    training prompts, 10 autoencoders, and the plain count of codes that only clean prompts use. ``sparsity`` is 0.02,
    and 0.05 for the docstring task.

    A further column of nodes, ``pairs``: how often the head occurs in the better half of all pairs of heads by the
    codes that they show together, averaged over the autoencoders. The published edge figures are those of this ranking
    of heads.
    """
    _check(setting, "mean", "unique", "raw", 200)
    vectors = head_vectors(setting, "mean")
    coders = _trained(vectors, 200, sparsity, 500, 1e-3, 10, 10, seed)
    if level == "edge":
        return _edges(setting, vectors, coders, 0.0)
    circuit = _nodes(setting, vectors, coders, 0.0, "unique", "raw", False, 200, seed)
    positive = torch.arange(len(vectors)) < len(setting.pairs)
    counts = torch.stack([pair_counts(pair_codes(codes_of(coder, vectors), positive)) for coder in coders]).mean(0)
    return replace(circuit, columns={**circuit.columns, "pairs": counts})


def _trained(
    vectors: Tensor, features: int, sparsity: float, epochs: int, rate: float, examples: int, trials: int, seed: int
) -> list[Coder]:
    """Autoencoders, each trained on the heads of its own random prompts."""
    coders = []
    for trial in range(trials):
        generator = torch.Generator().manual_seed(1000 * seed + trial)
        chosen = torch.randperm(len(vectors), generator=generator)[:examples]
        coders.append(train(vectors[chosen].flatten(0, 1), features, sparsity, epochs, rate, generator))
    return coders


def _nodes(
    setting: Setting,
    vectors: Tensor,
    coders: list[Coder],
    silent: float,
    statistic: str,
    score: str,
    relative: bool,
    permutations: int,
    seed: int,
) -> Circuit:
    n = len(setting.pairs)
    positive = torch.arange(2 * n) < n
    labels = torch.cat([positive[None], swapped(n, permutations, seed)])
    values = torch.zeros(len(labels), vectors.shape[1], dtype=torch.float64)
    for coder in coders:
        codes = codes_of(coder, vectors, silent)
        values += code_mass(codes, labels) if statistic == "mass" else unique_codes(codes, labels, relative)
    raw, null = values[0] / len(coders), values[1:] / len(coders)
    found = against(raw, null)
    above = {"raw": raw, "excess": raw - found.mean, "z": found.z.nan_to_num(0.0)}[score]
    scores = above.clamp(min=0)  # less than chance is no evidence, and no evidence against
    columns = {
        "raw": raw,
        "null_mean": found.mean,
        "null_sd": found.sd,
        "z": found.z,
        "p": found.p,
        "mean_difference": mean_difference(vectors, n),
        "probe": probe(vectors, n),
    }
    names = setting.places.of_each(head_names(setting))
    return Circuit("node", names, scores, torch.ones(len(names), dtype=torch.bool), {}, columns)


def _check(setting: Setting, pooling: str, statistic: str, score: str, permutations: int) -> None:
    for what, value, known in (
        ("pooling", pooling, POOLINGS),
        ("statistic of codes", statistic, STATISTICS),
        ("score of discrete-sae", score, SCORES),
    ):
        if value not in known:
            raise UnknownName(what, value, known)
    if permutations < 200:
        raise WorkbenchError(f"the null takes at least 200 permutations; got {permutations}")
    if len(setting.pairs) < 4:
        raise WorkbenchError(f"the probe and the null need at least 4 pairs; got {len(setting.pairs)}")
    if pooling == "spans" and not setting.pairs.spans:
        raise WorkbenchError("these pairs name no spans; use pooling='mean', 'last' or 'concat'")


def _edges(setting: Setting, vectors: Tensor, coders: list[Coder], silent: float) -> Circuit:
    """The score of its two heads for every edge of the model's graph that leads from a head to a head."""
    if len(setting.places) > 1:
        raise Refused(
            "edges of discrete-sae are pairs of heads over all positions; use level='node' or positions='all'"
        )
    positive = torch.arange(len(vectors)) < len(setting.pairs)
    pairs = torch.stack([pair_codes(codes_of(coder, vectors, silent), positive) for coder in coders]).mean(0)
    heads = head_names(setting)
    shape = setting.model.shape
    at = {name: i for i, name in enumerate(heads)}
    # A key-value head is read by the query heads of its group: the edge has the strongest of their scores.
    size = shape.heads // shape.kv_heads
    names, scores = [], []
    for name in circuit_graph(shape.layers, shape.heads, shape.kv_heads).edges:
        source, target, channel = edge_parts(name)
        if source not in at or channel == "in":
            continue
        layer, index = target.split(".")
        group = range(int(index[1:]) * size, (int(index[1:]) + 1) * size) if index[0] == "g" else [int(index[1:])]
        readers = [at[f"{layer}.h{head}"] for head in group if f"{layer}.h{head}" in at]
        if readers:
            names.append(name)
            scores.append(pairs[at[source], readers].max())
    if not names:
        raise Refused(f"{setting.model.name} has no edge from a head to a head; use level='node'")
    return Circuit("edge", tuple(names), torch.stack(scores), torch.ones(len(names), dtype=torch.bool))


METHODS = (
    Method(
        "discrete-sae",
        "codes of a small sparse autoencoder that clean and corrupted prompts use differently, per head, beyond chance",
        discrete_sae,
        "after O'Neill and Bui 2024 (arXiv 2405.12522); scale, pooling, statistic and null are ours",
        levels=("edge", "node"),
        ablations=("counterfactual",),
        positions=True,
        training=True,
        contrast=True,
        unit="distance of the distributions of codes, above chance",
    ),
    Method(
        "discrete-sae-published",
        "the number of codes of a small sparse autoencoder that only the clean prompts use, as published",
        discrete_sae_published,
        "O'Neill and Bui 2024 (arXiv 2405.12522)",
        levels=("edge", "node"),
        ablations=("counterfactual",),
        training=True,
        contrast=True,
        unit="codes that only clean prompts use",
    ),
)
