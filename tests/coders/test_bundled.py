"""The coders that come with the package do what their card says."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from workbench.coders.bundled import coder_folder
from workbench.errors import Refused, UnknownName, WorkbenchError


def test_names_say_what_there_is() -> None:
    names = list(wb.bundled_coders())
    wanted = [f"tiny-softmax/{kind}-{layer}" for kind in ("mlp", "z") for layer in range(4)]
    assert names == ["tiny-softmax/discrete", *wanted]
    with pytest.raises(UnknownName, match="bundled coder 'tiny-softmax/z-9'; known: .*nearest: tiny-softmax/z-"):
        coder_folder("tiny-softmax/z-9")
    with pytest.raises(UnknownName, match="transcoders 'tiny-gated'; known: tiny-softmax"):
        wb.bundled_transcoders("tiny-gated")


def test_transcoders_stand_in_for_the_mlps() -> None:
    model = wb.load("tiny-softmax")
    coders = wb.bundled_transcoders("tiny-softmax")
    assert sorted(coders) == [0, 1, 2, 3]
    pairs = wb.task("ioi").build(seed=3, tokenizer=model.tokenizer, n=8)
    with torch.no_grad():
        run = model.run(pairs.clean)
        replaced = model.run(pairs.clean, edit=wb.replacement_edits(coders.values()))
        silent = model.run(pairs.clean, edit={f"blocks.{layer}.hook_mlp_out": torch.zeros_like for layer in range(4)})

    def distance(other: wb.Run) -> float:
        own, its = (r.logits.log_softmax(-1) for r in (run, other))
        return float((own.exp() * (own - its)).sum(-1).mean())

    assert distance(replaced) < 0.2 * distance(silent)


def test_coders_of_heads_explain_them() -> None:
    model = wb.load("tiny-softmax")
    text = "Mary and John went to the store . John gave a book to"
    for layer in range(4):
        name = f"blocks.{layer}.attn.hook_z"
        z = model.run(text, read=[name]).acts[name][0].flatten(1)
        coder = wb.load_coder(coder_folder(f"tiny-softmax/z-{layer}"), dtype=torch.float32)
        left = (coder(z) - z).pow(2).sum() / (z - z.mean(0)).pow(2).sum()
        assert float(left) < 0.5
        assert coder.about["reads"] == [name]


def test_the_discrete_method_takes_a_trained_coder() -> None:
    model, task = wb.load("tiny-softmax"), wb.task("ioi").contrast()
    pairs = task.build(seed=0, tokenizer=model.tokenizer, n=8)
    given = {"coder": "tiny-softmax/discrete", "pooling": "mean"}
    found = wb.find_circuit(model, pairs, method="discrete-sae", level="node", **given)
    again = wb.find_circuit(model, pairs, method="discrete-sae", level="node", **given, seed=5)
    assert torch.equal(found.columns["raw"], again.columns["raw"])  # nothing is trained
    assert float(found.scores.abs().max()) > 0
    with pytest.raises(Refused, match="is a topk coder"):
        wb.find_circuit(model, pairs, method="discrete-sae", level="node", **given | {"coder": "tiny-softmax/z-1"})
    other = wb.load("compiled-ioi")
    its = task.build(seed=0, tokenizer=other.tokenizer, n=8)
    with pytest.raises(WorkbenchError, match="reads width 128; outputs of heads here have width .*pooling='mean'"):
        wb.find_circuit(other, its, method="discrete-sae", level="node", **given)
