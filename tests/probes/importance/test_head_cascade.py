"""Heads by the size of their output, values by the size of their weights: planted, literal, padded, refused."""

import math

import pytest
import torch
from builders import native
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.maps import AttentionMap, GatedMap
from workbench.models.protocol import Tokens
from workbench.probes.examples import random_maps, random_rows
from workbench.probes.importance.head_cascade import head_cascade, value_pruning
from workbench.run import Activations, Run
from workbench.sites import Site


def run_of(*outputs, mask=None):
    batch, length = outputs[0].shape[:2]
    ids = torch.zeros(batch, length, dtype=torch.int64)
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    return Run(Tokens(ids, mask), acts=Activations({Site("z", i): z for i, z in enumerate(outputs)}))


def outputs(layers=3, heads=4, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 6, heads, 5, generator=generator, dtype=torch.float64) for _ in range(layers)]


def test_dead_heads_are_dropped_first_and_stay_dropped():
    made = outputs()
    for z in made:
        z[:, :, 2] = 0
    made[1][:, :, 0] *= 0.01
    found = head_cascade(run_of(*made), keep=0.75)
    assert found.values["survives"][0].tolist() == [1, 1, 0, 1]
    assert all(found.values["survives"][layer][2] == 0 for layer in range(3))
    for layer, left in zip(range(3), (3, 3, 3), strict=True):
        assert int(found.values["survives"][layer].sum()) == left
    assert float(found.values["output"][0][2]) == 0


def test_the_cascade_is_literal():
    made = outputs(4, 5)
    found = head_cascade(run_of(*made), keep=0.6)
    alive, total = set(range(5)), [0.0] * 5
    for layer, z in enumerate(made):
        for head in range(5):
            size = sum(float(x.abs()) for x in z[:, :, head].flatten()) / z[:, :, head].numel()
            assert float(found.values["output"][layer][head]) == pytest.approx(size)
            total[head] += size if head in alive else 0
        assert found.values["importance"][layer].tolist() == pytest.approx(total)
        kept = sorted(alive, key=lambda head: -total[head])[: math.ceil(len(alive) * 0.6)]
        alive = set(kept)
        assert set(found.values["survives"][layer].nonzero()[:, 0].tolist()) == alive


def test_padding_and_batches_leave_the_size_alone():
    made = outputs()
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    padded = [z.clone() for z in made]
    for z in padded:
        z[1, 4:] = 100
    found = head_cascade(run_of(*padded, mask=mask))
    one, two = head_cascade(run_of(*[z[:1] for z in made])), head_cascade(run_of(*[z[1:, :4] for z in made]))
    for layer in range(3):
        wanted = (one.values["output"][layer] + two.values["output"][layer]) / 2
        torch.testing.assert_close(found.values["output"][layer], wanted)
        torch.testing.assert_close(found.null["output"][layer], wanted.mean().expand(4))


def test_on_a_model_either_side_of_the_output_projection():
    case = native()
    for kind in ("z", "result"):
        with torch.no_grad():
            run = case.model.run(case.inputs, read=[Site(kind, layer) for layer in range(2)])
        found = head_cascade(run)
        value = run.acts[Site(kind, 1)].abs().mean((0, 1, 3))
        torch.testing.assert_close(found.values["output"][1], value)


def test_what_cannot_cascade_is_refused():
    made = outputs()
    with pytest.raises(WorkbenchError, match="a share of the heads"):
        head_cascade(run_of(*made), keep=0)
    with pytest.raises(WorkbenchError, match="read no hook_z or hook_result"):
        head_cascade(Run(Tokens.of(torch.zeros(1, 3, dtype=torch.int64))))
    with pytest.raises(Refused, match="cascade by their number"):
        head_cascade(run_of(made[0], made[1][:, :, :2]))


def literal_mass(weights, keep):
    """Causal rows, by hand."""
    total = []
    for q in range(weights.shape[0]):
        row = sorted(weights[q, : q + 1].tolist(), reverse=True)
        total.append(sum(row[: math.ceil(keep * (q + 1) - 1e-9)]) / sum(row))
    return sum(total) / len(total)


@given(st.integers(0, 10**6), st.sampled_from([0.1, 0.25, 0.5, 0.9, 1.0]))
@settings(max_examples=15, deadline=None)
def test_the_mass_on_the_largest_weights_row_by_row(seed, keep):
    rows = random_rows(2, 3, 9, seed=seed)
    found = value_pruning(AttentionMap.from_dense(rows), keep=keep)
    for head in range(3):
        wanted = sum(literal_mass(rows[b, head], keep) for b in range(2)) / 2
        assert float(found.values["mass"][0][head]) == pytest.approx(wanted)
        assert float(found.null["mass"][0][head]) <= wanted + 1e-12
    if keep == 1:
        assert found.values["mass"][0].tolist() == pytest.approx([1, 1, 1])


def test_uniform_attention_is_its_own_null_and_one_hot_needs_one_key():
    even = torch.ones(1, 1, 8, 8, dtype=torch.float64).tril()
    even = even / even.sum(-1, keepdim=True)
    found = value_pruning(AttentionMap.from_dense(even), keep=0.25)
    torch.testing.assert_close(found.values["mass"][0], found.null["mass"][0])
    eye = torch.eye(8, dtype=torch.float64)[None, None]
    assert float(value_pruning(AttentionMap.from_dense(eye), keep=0.01).values["mass"][0]) == 1


def test_a_gate_does_not_matter_and_chunks_do_not_either(monkeypatch):
    rows = random_rows(2, 2, 12, seed=3)
    plain = value_pruning(AttentionMap.from_dense(rows)).values["mass"][0]
    gated = GatedMap(AttentionMap.from_dense(rows), torch.rand(2, 2, 12, dtype=torch.float64))
    torch.testing.assert_close(value_pruning(gated).values["mass"][0], plain)
    monkeypatch.setattr("workbench.probes.importance.head_cascade._CHUNK", 1)
    torch.testing.assert_close(value_pruning(AttentionMap.from_dense(rows)).values["mass"][0], plain)


def test_a_padded_batch_is_its_texts_one_by_one():
    model = wb.load("tiny-softmax")
    texts = ["Mary and John went to the store .", "John gave a book"]
    with torch.no_grad():
        runs = [model.run(text, maps=wb.capture()) for text in (texts, *texts)]
    together, *alone = (value_pruning(run) for run in runs)
    for layer in range(4):
        wanted = sum(one.values["mass"][layer] for one in alone) / 2
        torch.testing.assert_close(together.values["mass"][layer], wanted, atol=1e-5, rtol=1e-5)


def test_wrong_shares_and_signed_maps_are_refused():
    with pytest.raises(WorkbenchError, match="a share of the keys"):
        value_pruning(random_maps(), keep=1.5)
    signed = AttentionMap.from_dense(torch.randn(1, 1, 4, 4))
    with pytest.raises(Refused, match="signed"):
        value_pruning(signed)
