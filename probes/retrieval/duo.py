"""Which key-value heads need all of the context, as found by training a gate per head?

DuoAttention (arXiv 2410.10819): every key-value head has a gate a in [0, 1], 1 at the start, and its output becomes

    a * full attention  +  (1 - a) * streaming attention (first and last tokens only).

The gates alone are trained, on prompts whose answer lies far back, to keep the last hidden state at the answer's tokens:

    loss = mean squared difference from the unchanged model's last hidden state  +  weight * sum of |a|.

Published: 128 first and 256 last tokens, weight 0.05, AdamW at 0.02 without decay (a ramp over the first and last fifth of 2,000
steps, gates clamped to [0, 1]), ten passkeys in 1,000 to 32,000 tokens. Heads below a quantile of the gates are made streaming.
What weight is right depends on the scale of the hidden state: a head keeps its gate near 1 - weight / (2 c) if streaming alone
costs c, and loses it if c is smaller than the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model
from workbench.pairs import Pairs
from workbench.probes.catalogue import Analysis
from workbench.probes.examples import bundled, needles
from workbench.probes.retrieval.streaming import KVHead, LayerScores, Mix, Streaming, layer_scores, streaming_edits
from workbench.probes.retrieval.trials import by_position
from workbench.probes.tables import HeadTable
from workbench.results import Result, axis
from workbench.run import Provenance

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

WEIGHT, RATE, STEPS = 0.05, 0.02, 2000
_UNIT = "gate (1: needs all of the context)"


@dataclass(frozen=True)
class DuoGates(Result):
    """``gates`` ``[L, G]`` of every key-value head, NaN in layers that cannot be made streaming (``undefined`` says why), and the
    losses of every step, ``distillation`` and ``penalty`` ``[S]``; their sum was trained."""

    gates: Tensor
    distillation: Tensor
    penalty: Tensor
    policy: Streaming
    weight: float
    undefined: dict[str, str] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=lambda: Provenance("unknown"))

    def table(self) -> HeadTable:
        """The gates as a table; its heads are key-value heads."""
        return HeadTable(
            title="Gates of key-value heads",
            values={"gate": dict(enumerate(self.gates))},
            units={"gate": _UNIT},
            undefined=self.undefined,
            provenance=self.provenance,
        )

    def cut(self, sparsity: float = 0.5) -> list[KVHead]:
        """The part ``sparsity`` of the key-value heads with the smallest gates, ``(layer, kv head)``: those to make streaming."""
        if not 0 <= sparsity <= 1:
            raise WorkbenchError(f"sparsity is the part of heads that become streaming, 0 to 1; got {sparsity}")
        ranked = self.table().top("gate")[::-1]
        return [(int(head.layer), head.head) for head in ranked[: round(sparsity * len(ranked))]]

    def top(self, n: int | None = None) -> list[KVHead]:
        """The key-value heads with the largest gates, ``(layer, kv head)``."""
        return [(int(head.layer), head.head) for head in self.table().top("gate", n)]

    def frame(self) -> pd.DataFrame:
        """One row per key-value head: ``layer, head, gate``."""
        return self.table().frame()

    def losses(self) -> pd.DataFrame:
        """One row per step: ``step, distillation, penalty, loss``."""
        import pandas as pd

        table = pd.DataFrame({"distillation": self.distillation.numpy(), "penalty": self.penalty.numpy()})
        table["loss"] = table["distillation"] + table["penalty"]
        return table.rename_axis("step").reset_index()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Layer x key-value head heat map of the gates."""
        ax = self.table().plot(ax)
        ax.set_xlabel("key-value head")
        return ax

    def plot_losses(self, ax: Axes | None = None) -> Axes:
        """Both terms of the loss over the steps."""
        ax = axis(ax, 4.8, 3.2)
        for name in ("distillation", "penalty"):
            ax.plot(getattr(self, name).numpy(), label=name)
        ax.set(xlabel="step", ylabel="loss", title=self.provenance.model)
        ax.legend()
        return ax


def duo_gates(
    model: Model,
    pairs: Pairs | Sequence[Pairs],
    policy: Streaming | None = None,
    *,
    steps: int = STEPS,
    rate: float = RATE,
    weight: float = WEIGHT,
    batch: int = 4,
    seed: int = 0,
) -> DuoGates:
    """Train the gates on prompts whose answers need what stands far back (``wb.task("needle")`` builds some).

    ``pairs``: prompts; the hidden state is compared at each one's answer position. ``policy`` by default 128 first and 256 last
    tokens. ``steps``, ``rate``, ``weight``: see the page's top; the defaults are the published ones. Every step takes the next
    ``batch`` prompts of one length, in an order drawn from ``seed``. The model itself is not changed. Layers that are not plain
    causal softmax attention keep no gate; a model without any other is refused.
    """
    policy = policy or Streaming()
    if steps < 1 or batch < 1:
        raise WorkbenchError(f"steps and batch count from 1; got {steps} and {batch}")
    if not rate > 0 or weight < 0:
        raise WorkbenchError(f"rate is positive and weight not negative; got {rate} and {weight}")
    groups = [part[i : i + batch] for part in by_position(pairs) for i in range(0, len(part), batch)]
    layers, refused = layer_scores(model, groups[0].clean)
    if not layers:
        reasons = "; ".join(f"layer {layer}: {why}" for layer, why in refused.items())
        raise Refused(f"no layer of {model.name} can be made streaming: {reasons}")
    prompts = [part.clean[:, : int(part.position[0]) + 1] for part in groups]
    with torch.no_grad():
        wanted = [_hidden(model, ids, layers, policy, None) for ids in prompts]
    gates = torch.ones(len(layers), model.shape.kv_heads, device=wanted[0].device, requires_grad=True)
    optimiser = torch.optim.AdamW([gates], lr=rate, weight_decay=0.0)
    ramp = max(1, steps // 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, max((step + 1) / ramp, 0.1), max((steps - step) / ramp, 0.1))
    )
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    terms = []
    for _ in range(steps):
        order = order or torch.randperm(len(prompts), generator=generator).tolist()
        i = order.pop()
        with torch.enable_grad():
            got = _hidden(model, prompts[i], layers, policy, gates)
            distillation = (got - wanted[i]).square().mean(-1).mean()
            penalty = weight * gates.abs().sum()
            (gates.grad,) = torch.autograd.grad(distillation + penalty, [gates])
        terms.append((float(distillation.detach()), float(penalty.detach())))
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            gates.clamp_(0, 1)
    every = torch.full((model.shape.layers, model.shape.kv_heads), float("nan"), dtype=torch.float64)
    every[list(layers)] = gates.detach().double().cpu()
    losses = torch.tensor(terms, dtype=torch.float64)
    with torch.no_grad():
        provenance = model.run(prompts[0][:, :1], logits=None).provenance
    return DuoGates(
        every,
        losses[:, 0],
        losses[:, 1],
        policy,
        weight,
        {f"layer {layer}": why for layer, why in refused.items()},
        provenance,
    )


def _hidden(
    model: Model, ids: Tensor, layers: dict[int, LayerScores], policy: Streaming, gates: Tensor | None
) -> Tensor:
    """The last hidden state at the last token ``[B, D]``, in float32 or more."""
    mix: dict[int, Mix] = {}
    if gates is not None:
        group = model.shape.heads // model.shape.kv_heads
        mix = {layer: _gated(gates[i].repeat_interleave(group)) for i, layer in enumerate(layers)}
    run = model.run(ids, edit=streaming_edits(layers, policy, mix), logits=None)
    if run.output is None:
        raise Refused(f"{model.name} gives no last hidden state to keep")
    hidden = run.output[:, -1]
    return hidden if hidden.dtype == torch.float64 else hidden.float()


def _gated(gate: Tensor) -> Mix:
    def mix(full: Tensor, near: Tensor) -> Tensor:
        a = gate.to(full)[:, None]
        return a * full + (1 - a) * near

    return mix


ANALYSES = (
    Analysis(
        name="duo-gates",
        question="Which key-value heads need all of the context?",
        function=duo_gates,
        example=lambda: {
            "model": bundled("compiled-needle"),
            "pairs": needles(bundled("compiled-needle")),
            "policy": Streaming(2, 8),
            "steps": 40,
            "rate": 0.05,
            "weight": 0.0005,
        },
        paper="DuoAttention 2024 (arXiv 2410.10819)",
        source="model",
        null="as many random key-value heads made streaming (streaming_effect)",
        cause="streaming_effect",
        definition="the hidden state is compared where the answer is about to be written",
    ),
)
