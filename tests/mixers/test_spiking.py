"""Spiking self-attention counts coincidences; neurons against a loop over numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.mixers import spiking

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def eighths_of_coincidences(op: Operator) -> None:
    given = {name: x > 0 for name, x in example_tensors(3, torch.float64, **dict.fromkeys("qkv", (2, 3, 7, 8))).items()}
    wanted = torch.zeros(2, 3, 7, 7).double()
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(x) for x in (2, 3, 7, 7))).tolist():
        both = given["q"][b, h, i] & given["k"][b, h, j]
        wanted[b, h, i, j] = int(both.sum()) / 8
    out, found = op(**{name: x.double() for name, x in given.items()})
    torch.testing.assert_close(found.dense(), wanted, rtol=0, atol=0)
    torch.testing.assert_close(out, wanted @ given["v"].double())
    assert not (8 * found.dense() % 1).any()


IDENTITIES: dict[str, Callable[[Operator], None]] = {"spiking-self-attention": eighths_of_coincidences}


def test_neurons_leak_fire_and_start_again() -> None:
    current = example_tensors(2, torch.float64, x=(20, 3))["x"] + 1
    for tau, threshold in ((2.0, 1.0), (1.0, 0.5), (3.0, 0.5)):
        fired = spiking.lif(current, tau=tau, threshold=threshold)
        for neuron in range(3):
            potential = 0.0
            for t in range(20):
                potential += (float(current[t, neuron]) - potential) / tau
                assert float(fired[t, neuron]) == (potential >= threshold)
                potential = 0.0 if potential >= threshold else potential
    assert 0 < float(fired.mean()) < 1


def test_the_gradient_of_firing_is_the_surrogates() -> None:
    x = torch.tensor([[0.3, 2.0, 5.0]], dtype=torch.float64, requires_grad=True)
    spiking.lif(x).sum().backward()
    above = x.detach() / 2 - 1
    torch.testing.assert_close(x.grad, 0.5 / (1 + (math.pi * above) ** 2))


def test_wrong_arguments_are_named() -> None:
    q = torch.ones(1, 2, 3, 4)
    with pytest.raises(WorkbenchError, match="k holds spikes, zeros and ones; got numbers from 0.5 to 0.5"):
        spiking.spiking_self_attention(q, q / 2, q)
    with pytest.raises(WorkbenchError, match="tau is at least 1"):
        spiking.lif(q, tau=0.5)
