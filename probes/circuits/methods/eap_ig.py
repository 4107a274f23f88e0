"""EAP with gradients from more places than the clean run (arXiv 2403.17806, section 3 and the authors' code).

Everything but the place of the gradient is as in ``eap``: score = (clean - replacement) . mean gradient, summed over
positions, mean over examples.

- ``eap-ig``: the gradient is averaged over runs whose embeddings lie on the line from the replacement to the clean
  prompt, e(t) = e' + t (e - e'), eq. 2. Scores over a cut of the graph sum to m(clean) - m(corrupted) as the steps
  grow, where the cut is the input's outgoing edges, or where what lies before the cut is linear in the embeddings.
- ``clean-corrupted``: mean of the gradients at the two ends of that line.
- ``eap-ig-activations``: instead of embeddings, outputs inside the model move: one site at a time - the input, or all
  heads of one layer together, or one MLP - is held at o(t) = o' + t (o - o'), for all tokens, while the rest of the
  model answers to it. Nothing before a held site gets a gradient through it. (1 + layers x 2) x steps runs per batch.
"""

from __future__ import annotations

from collections.abc import Iterator

from workbench.circuits import Circuit
from workbench.errors import UnknownName, WorkbenchError
from workbench.probes.circuits.attribution import Steps, attribute
from workbench.probes.circuits.components import INPUT, Acts, Setting
from workbench.probes.circuits.method import Method

_RULES = {"left": 0.0, "midpoint": 0.5, "right": 1.0}
RULES = tuple(_RULES)
AVERAGES = ("all", "own")


def points(steps: int, rule: str) -> list[float]:
    """Where on the line from 0 to 1 the gradient is taken: (k + shift) / steps for k = 0 .. steps-1, with shift 0, 1/2 or
    1 for ``left``, ``midpoint`` and ``right``."""
    if steps < 1:
        raise WorkbenchError(f"steps is a whole number of points on the path, at least 1; got {steps!r}")
    if rule not in _RULES:
        raise UnknownName("integration rule", rule, RULES)
    return [(k + _RULES[rule]) / steps for k in range(steps)]


def eap_ig(setting: Setting, level: str, *, steps: int = 5, rule: str = "left") -> Circuit:
    """Mean gradient at t = k/steps, k = 0 .. steps-1 (``rule="left"``, as published), t = (k + 1/2)/steps
    (``"midpoint"``) or t = (k + 1)/steps (``"right"``).

    ``steps`` forward and backward passes per batch, besides the two forward passes of the outputs.
    """
    at = points(steps, rule)

    def path(clean: Acts, instead: Acts) -> list[Steps]:
        line = clean[INPUT] - instead[INPUT]
        return [Steps(tuple({INPUT: instead[INPUT] + t * line} for t in at))]

    return attribute(setting, level, path)


def clean_corrupted(setting: Setting, level: str) -> Circuit:
    """Mean of the gradients on the clean prompt and with its embeddings replaced: for ``counterfactual``, on the corrupted
    prompt, with the metric's answers those of the clean one."""

    def path(clean: Acts, instead: Acts) -> list[Steps]:
        return [Steps(({INPUT: clean[INPUT]}, {INPUT: instead[INPUT]}))]

    return attribute(setting, level, path)


def eap_ig_activations(
    setting: Setting, level: str, *, steps: int = 5, rule: str = "right", average: str = "all"
) -> Circuit:
    """Mean gradient over the moves of sites one at a time, t = (k + 1)/steps as in the authors' code unless ``rule``.

    ``average`` says over which moves: ``"all"``, as in the authors' code, takes for every part the mean over the moves of
    all sites, in most of which the part itself stays clean. ``"own"`` takes the moves of the part's own site: then the
    scores of all parts of a site sum to the exact effect of replacing them together as ``steps`` grow; an MLP's node score
    is its exact effect.
    """
    at = points(steps, rule)
    if average not in AVERAGES:
        raise UnknownName("average of eap-ig-activations", average, AVERAGES)

    def path(clean: Acts, instead: Acts) -> Iterator[Steps]:
        own = average == "own"
        for site in clean:
            if own and site == INPUT and level == "node":
                continue  # the input is no node
            line = clean[site] - instead[site]
            held = tuple({site: instead[site] + t * line} for t in at)
            yield Steps(held, site, 1.0) if own else Steps(held, None, 1 / len(clean))

    return attribute(setting, level, path)


METHODS = (
    Method(
        "eap-ig",
        "first-order effect from gradients averaged between replacement and clean embeddings",
        eap_ig,
        "Hanna et al. 2024 (arXiv 2403.17806), eq. 2",
        positions=True,
    ),
    Method(
        "clean-corrupted",
        "first-order effect from the mean of the gradients at the clean and at the replaced embeddings",
        clean_corrupted,
        "Hanna et al. 2024 (arXiv 2403.17806), authors' code",
        positions=True,
    ),
    Method(
        "eap-ig-activations",
        "first-order effect from gradients averaged while outputs move from replacement to clean, one site at a time",
        eap_ig_activations,
        "Hanna et al. 2024 (arXiv 2403.17806), authors' code; Marks et al. 2024 (arXiv 2403.19647) for average='own'",
        positions=True,
    ),
)
