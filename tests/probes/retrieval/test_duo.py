import pytest
import torch
from builders import hugging_face, native
from random_nets import ids

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.pairs import Pairs
from workbench.probes.examples import needles
from workbench.probes.retrieval.duo import duo_gates
from workbench.probes.retrieval.streaming import Streaming, layer_scores, streaming_edits, streaming_effect
from workbench.results import load_result


def random_pairs(n=4, length=12):
    text = ids(n, length)
    return Pairs(text, text, text[:, :1], text[:, :1], torch.full((n,), length - 1))


@pytest.fixture(scope="module")
def compiled():
    model = wb.load("compiled-needle")
    return model, duo_gates(model, needles(model, 64, 8), Streaming(2, 8), steps=50, rate=0.05, weight=0.0005)


def test_the_copying_head_keeps_its_gate_and_the_others_lose_theirs(compiled):
    _, found = compiled
    assert found.top(1) == [(1, 1)]
    assert found.gates[1, 1] > 0.9
    rest = found.gates.flatten().tolist()
    rest.remove(float(found.gates[1, 1]))
    assert max(rest) < 0.05
    assert found.penalty[0] == pytest.approx(8 * 0.0005)
    assert found.losses()["loss"].iloc[-1] < found.losses()["loss"].iloc[0] / 4


def test_cutting_by_the_gates_keeps_the_answer_and_the_top_gate_loses_it(compiled):
    model, found = compiled
    assert len(found.cut(0.5)) == 4
    assert (1, 1) not in found.cut(0.75)
    effect = streaming_effect(
        model,
        needles(model, 96, 6),
        {"half": found.cut(), "most": found.cut(0.875), "top": found.top(1)},
        found.policy,
        random=3,
        metrics=("accuracy", "probability"),
    )
    table = effect.frame().set_index(["condition", "random"])
    assert table.loc[("half", False), "accuracy"] == 1
    assert table.loc[("most", False), "accuracy"] == 1
    assert table.loc[("most", True), "probability"] < 0.02
    assert table.loc[("top", False), "probability"] < 0.02
    assert table.loc[("top", True), "accuracy"] == 1


def test_a_penalty_above_what_a_head_is_worth_takes_its_gate():
    model = wb.load("compiled-needle")
    found = duo_gates(model, needles(model, 48, 4), Streaming(2, 8), steps=40, rate=0.05)
    assert found.weight == 0.05
    assert found.gates.max() < 0.05


@pytest.mark.slow
def test_the_published_penalty_finds_the_trained_layer():
    model = wb.load("tiny-softmax")
    pairs = wb.task("needle", length=96, split="train").build(0, model.tokenizer, 16)
    found = duo_gates(model, pairs, Streaming(4, 16), steps=100)
    assert {layer for layer, _ in found.top(5)} == {1}
    assert found.gates[[0, 2, 3]].max() < 0.1
    sets = {"cut": found.cut(0.75), "kept": found.top(8)}
    effect = streaming_effect(model, needles(model, 96, 8), sets, found.policy, random=6, metrics=("accuracy",))
    accuracy = effect.frame().set_index(["condition", "random"])["accuracy"]
    # 24 of 32 heads leave no 24 others: random ones are drawn from all heads. 8 random others are of other layers.
    assert accuracy["cut", False] == 1
    assert accuracy["cut", True] < 0.9
    assert accuracy["kept", False] < 0.5
    assert accuracy["kept", True] == 1


@pytest.mark.parametrize("make", [native, lambda: hugging_face("llama"), lambda: native(mixer="gated-softmax")])
def test_one_step_is_the_published_one(make):
    """Gradient of the loss by finite differences, and one step of AdamW from it."""
    model, pairs, policy, weight = make().model, random_pairs(), Streaming(1, 2), 0.001
    layers, _ = layer_scores(model, pairs.clean)
    plain = model.run(pairs.clean).output[:, -1].detach()

    @torch.no_grad()
    def loss(gates):
        def mixed(row):
            a = row.repeat_interleave(2)[:, None]
            return lambda full, near: a * full + (1 - a) * near

        edits = streaming_edits(layers, policy, {i: mixed(gates[i]) for i in range(2)})
        out = model.run(pairs.clean, edit=edits).output[:, -1]
        return float((out - plain).square().mean(-1).mean() + weight * gates.abs().sum())

    start = torch.ones(2, 2, dtype=torch.float64)
    expected = start.clone()
    for layer in range(2):
        for group in range(2):
            step = torch.zeros_like(start)
            step[layer, group] = 1e-4
            slope = (loss(start + step) - loss(start - step)) / 2e-4
            expected[layer, group] -= 0.01 * slope / (abs(slope) + 1e-8)  # Adam's first step
    found = duo_gates(model, pairs, policy, steps=1, rate=0.01, weight=weight)
    torch.testing.assert_close(found.gates, expected.clamp(max=1), atol=2e-5, rtol=0)
    assert found.distillation[0] == pytest.approx(0, abs=1e-12)
    assert found.penalty[0] == pytest.approx(4 * weight)


def test_without_a_penalty_nothing_moves_and_the_model_is_left_alone():
    model = native().model
    before = {name: value.clone() for name, value in model.net.state_dict().items()}
    found = duo_gates(model, random_pairs(), Streaming(1, 2), steps=3, weight=0.0)
    assert (found.gates > 0.9).all()
    assert all(value.equal(before[name]) for name, value in model.net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.net.parameters())


def test_gates_do_not_depend_on_the_callers_gradient_mode():
    model, pairs = native().model, random_pairs()
    options = {"steps": 5, "weight": 0.01, "batch": 2}
    with torch.no_grad():
        quiet = duo_gates(model, pairs, Streaming(1, 2), **options)
    assert quiet.gates.equal(duo_gates(model, pairs, Streaming(1, 2), **options).gates)


def test_layers_with_windows_have_no_gate():
    model = hugging_face("gemma3").model  # every second layer sees a window
    pairs = random_pairs()
    layers, refused = layer_scores(model, pairs.clean)
    assert layers
    assert refused
    found = duo_gates(model, pairs, Streaming(1, 2), steps=2)
    assert found.gates[list(refused)].isnan().all()
    assert found.gates[list(layers)].isfinite().all()
    assert "window" in found.undefined[f"layer {next(iter(refused))}"]
    assert len(found.cut(1.0)) == 2 * len(layers)
    with pytest.raises(Refused, match="no layer of mistral"):
        duo_gates(hugging_face("mistral").model, pairs)


def test_results_are_drawn_and_saved(compiled, tmp_path):
    _, found = compiled
    assert found.plot().get_xlabel() == "key-value head"
    assert [line.get_label() for line in found.plot_losses().lines] == ["distillation", "penalty"]
    saved = load_result(found.save(tmp_path / "gates"))
    assert saved.tensors["gates"].equal(found.gates)
    assert found.frame()["gate"].tolist() == found.gates.flatten().tolist()
    assert found.losses()["step"].tolist() == list(range(50))


def test_what_cannot_be_trained_is_refused(compiled):
    model, found = compiled
    pairs = needles(model, 48, 2)
    for options in ({"steps": 0}, {"batch": 0}, {"rate": 0.0}, {"weight": -1.0}):
        with pytest.raises(WorkbenchError, match="got"):
            duo_gates(model, pairs, **options)
    with pytest.raises(WorkbenchError, match="sparsity"):
        found.cut(1.5)
