"""How well a network follows the program: the accuracies that it must pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from workbench.datasets.models.siit.program import VARIABLES, Sources, answers, draw, duplicate, vocabulary
from workbench.datasets.models.siit.swap import COMPONENTS, components, plain, swapped
from workbench.models.native_net import NativeNet

REQUIRED = 0.99


@torch.no_grad()
def measure(net: NativeNet, n: int = 1000, seed: int = 7, split: str = "test") -> dict[str, Any]:
    """Accuracy, intervention and strict accuracy on ``n`` prompts of a split.

    ``accuracy``: share of prompts whose largest logit is in the program's answer. ``iia``: the same with a variable's
    component from a source, against the program's answer under that intervention, over those prompts whose answer it changes.
    ``strict``: with another component from a source, against the answer to the base; ``kl``: mean KL divergence, in nats, of
    that run from the run without a swap.
    """
    base = draw(vocabulary(), seed=seed, n=n, split=split)
    source = base[Sources(base)(torch.arange(n), torch.Generator().manual_seed(seed))]
    before, _ = plain(net, base.ids, base.end)
    _, wrote = plain(net, source.ids, source.end)
    names, said, logp = components(net.config), answers(base), before.log_softmax(-1)

    def hits(logits: Tensor, sets: Tensor) -> Tensor:
        return (logits.argmax(-1, keepdim=True) == sets).any(-1).double()

    right, nobody = hits(before, said), duplicate(base) == 0
    found: dict[str, Any] = {
        "accuracy": right[~nobody].mean().item(),
        "accuracy_nobody": right[nobody].mean().item(),
        "iia": {},
        "strict": {},
        "kl": {},
    }
    variable_of = {component: variable for variable, component in COMPONENTS.items()}
    for index, name in enumerate(names):
        logits = swapped(net, base.ids, base.end, wrote, torch.full((n,), index))
        if name in variable_of:
            variable = VARIABLES.index(variable_of[name])
            wanted = answers(base, source, torch.full((n,), variable))
            changed = (wanted != said).any(1)
            found["iia"][variable_of[name]] = hits(logits, wanted)[changed].mean().item()
        else:
            found["strict"][name] = hits(logits, said).mean().item()
            found["kl"][name] = nn.functional.kl_div(
                logits.log_softmax(-1), logp, log_target=True, reduction="batchmean"
            ).item()
    found["iia"] = {variable: found["iia"][variable] for variable in VARIABLES}
    return found


def shares(found: dict[str, Any]) -> dict[str, float]:
    """Every accuracy that ``measure`` found, in words."""
    return {
        "accuracy": found["accuracy"],
        "accuracy with nobody named twice": found["accuracy_nobody"],
        **{f"interchange accuracy of {name}": value for name, value in found["iia"].items()},
        **{f"strict accuracy of {name}": value for name, value in found["strict"].items()},
    }


def shortfalls(found: dict[str, Any]) -> list[str]:
    """Accuracies not above ``REQUIRED``, as readable text; none for a network that may be bundled."""
    return [f"{name} {value:.4f}" for name, value in shares(found).items() if not value > REQUIRED]
