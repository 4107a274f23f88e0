"""One head of width 32 that learns the trigger task, with any mixer: ``train_trigger("softmax")`` takes two seconds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from workbench.datasets.trigger import FIRST_PAYLOAD, TriggerBatch, trigger_batch
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet

RELU = "relu"
"""ReLU attention, which is no variant of the catalogue: max(0, s_ij) over the number of keys that query i sees."""


class ReluMixer(nn.Module):
    """z_i = sum_j max(0, s_ij) v_j / n_i, n_i the keys that query i sees (arXiv 2309.08586): every weight by itself."""

    ignores: tuple[str, ...] = ()
    keeps_inputs = False
    steps = False

    def __init__(self, config: NativeConfig) -> None:
        super().__init__()
        self.scale = config.head_width**-0.5

    def forward(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Mask, xk: Tensor | None = None
    ) -> tuple[Tensor, AttentionMap]:
        allowed = mask.tile(slice(0, q.shape[2]), slice(0, k.shape[2]), q.device)
        if allowed is None:
            allowed = torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)
        weights = (q @ k.transpose(-1, -2) * self.scale).relu() * allowed / allowed.sum(-1, keepdim=True).clamp(min=1)
        return weights @ v, AttentionMap.from_dense(weights, row_sum="free")


def train_trigger(
    mixer: str = "softmax",
    *,
    bos: bool = True,
    steps: int = 600,
    tokens: int = 16,
    payloads: int = 8,
    batch: int = 64,
    rate: float = 1e-2,
    seed: int = 0,
) -> NativeModel:
    """A model of 1 layer and 1 head of width 32, without norms, positions and MLP, after ``steps`` Adam steps of ``batch`` rows.

    ``mixer``: ``relu``, or what ``NativeConfig`` takes (``softmax``, ``gated-softmax``, ``softmax-off-by-one``, ``sink-logits``,
    ``sigmoid-attention`` ...). Its logits, from the third on, are the outputs; the loss is the squared error summed over
    payloads and averaged over tokens. ``steps=0`` gives the untrained model. The same seed gives the same model.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = _net(mixer, payloads)
    generator = torch.Generator().manual_seed(seed + 1)
    optimiser = torch.optim.Adam(net.parameters(), rate)
    for _ in range(steps):
        rows = trigger_batch(batch, generator, tokens=tokens, payloads=payloads, bos=bos)
        loss = _error(net(rows.ids), rows)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return NativeModel(net.eval(), name=f"trigger-{mixer}")


@torch.no_grad()
def trigger_loss(model: NativeModel, rows: TriggerBatch) -> float:
    """The part of the squared target that a model leaves unexplained: 0 is perfect, 1 is as good as answering 0."""
    logits = model.run(rows.ids).logits
    assert logits is not None
    return float(_error(logits, rows) / rows.target.square().sum(-1).mean())


def _net(mixer: str, payloads: int) -> NativeNet:
    config = NativeConfig(
        layers=1, heads=1, width=32, head_width=32, vocab=FIRST_PAYLOAD + payloads, norm="none", positions="none"
    )
    if mixer != RELU:
        return NativeNet(replace(config, mixer=mixer))
    net = NativeNet(config)
    block: Any = net.blocks[0]
    block.attn.mixer = ReluMixer(config)
    net.hook_dict = {name: point for name, point in net.hook_dict.items() if ".mixer." not in name}
    return net


def _error(logits: Tensor, rows: TriggerBatch) -> Tensor:
    return (logits[..., FIRST_PAYLOAD:] - rows.target).square().sum(-1).mean()
