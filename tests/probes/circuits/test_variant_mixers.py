"""Circuits, patching and sinks on native models whose mixers are variants of every family."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from workbench.datasets.tokenizer import word_tokenizer
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet

TOKENIZER = word_tokenizer()
MIXERS = (
    "sliding-window-attention",
    "alibi",
    "sigmoid-attention",
    "elementwise-gated-attention",
    "native-sparse-attention",
    "landmark-attention",
    "lightning-attention",
    "rwkv-4",
    "mamba",
    "mamba-2",
    "gated-deltanet",
    "kimi-delta-attention",
    "titans-linear-memory",
    "yaad",
    "hyena",
)


def model(mixer: str) -> NativeModel:
    torch.manual_seed(0)
    config = NativeConfig(
        layers=2, heads=2, width=16, head_width=8, vocab=len(TOKENIZER), context=512, positions="none", mixer=mixer
    )
    return NativeModel(NativeNet(config).eval(), TOKENIZER, name=mixer)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_circuit_is_found_and_the_whole_of_it_is_faithful(mixer: str) -> None:
    m = model(mixer)
    pairs = wb.task("induction").build(seed=0, tokenizer=TOKENIZER, n=2)
    circuit = wb.find_circuit(m, pairs, method="eap")
    scores = torch.tensor(circuit.frame()["score"].to_numpy())
    assert torch.isfinite(scores).all()
    assert bool((scores != 0).any())
    curve = wb.faithfulness(m, circuit, pairs).frame()
    assert float(curve[curve["fraction"] == 1.0]["faithfulness"].iloc[0]) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("mixer", MIXERS)
def test_sinks_are_the_mean_weights_of_the_map(mixer: str) -> None:
    m = model(mixer)
    run = m.run("Mary and John went to the store .", maps=wb.capture())
    table = wb.sinks(run).frame()
    assert set(table["layer"]) == {0, 1}
    weights = run.maps[1].dense()[0, 1].double()
    if run.maps[1].sign == "signed":  # shares of signed maps are of absolute weights
        weights = (weights.abs() / weights.abs().sum(-1, keepdim=True)).nan_to_num(0.0)
    n = min(len(weights), 8) if mixer == "sliding-window-attention" else len(weights)  # its recipe has a window of 8
    first = table.query("layer == 1 and head == 1 and key == 0")["share"]
    assert float(first.iloc[0]) == pytest.approx(float(weights[:, 0].sum() / n), abs=1e-5)
