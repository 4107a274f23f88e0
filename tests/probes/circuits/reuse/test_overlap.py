"""The planted overlap and the planted repair, found from nothing but the two tasks."""

import pytest
import torch

import workbench as wb
from workbench.circuits import Circuit
from workbench.errors import UnknownName, WorkbenchError
from workbench.graph import edge_parts
from workbench.probes.circuits.reuse.overlap import circuit_reuse, idle_heads, repairs

TASKS = ("ioi", "colored-objects")


@pytest.fixture(scope="module")
def model():
    return wb.load("compiled-two-task")


@pytest.fixture(scope="module")
def pairs(model):
    return {name: wb.task(name).build(seed=0, tokenizer=model.tokenizer, n=5) for name in TASKS}


@pytest.fixture(scope="module")
def found(model, pairs):
    """Two heads per stage, so that the negative mover joins the mover."""
    return circuit_reuse(model, pairs, keep=0.15)


def planted(model, task):
    """Heads with an edge of the task's mechanism into or out of them, by the ground truth."""
    truth = model.ground_truth
    marks = truth.columns[task.replace("-", "_")].tolist()
    ends = {end for name, mark in zip(truth.names, marks, strict=True) if mark for end in edge_parts(name)[:2]}
    return {end for end in ends if ".h" in end}


def moved(model, pairs, heads):
    """Those of ``heads`` that write something else on the corrupted prompts: all that patching can see."""
    sites = [f"blocks.{layer}.attn.hook_z" for layer in range(model.shape.layers)]
    with torch.no_grad():
        clean, corrupt = (model.run(ids, read=sites).acts for ids in (pairs.clean, pairs.corrupt))
    return {
        name
        for name in heads
        if (clean[sites[int(name[1])]] - corrupt[sites[int(name[1])]])[:, :, int(name[-1])].abs().max() > 1e-3
    }


def test_the_planted_overlap_is_found(model, pairs, found):
    """The circuits are the planted heads that patching can see; what they share is the planted mover alone."""
    heads = {task: planted(model, task) for task in TASKS}
    assert heads["ioi"] & heads["colored-objects"] == {"a3.h1"}
    assert (len(heads["ioi"]), len(heads["colored-objects"])) == (4, 5)
    seen = {task: moved(model, pairs[task], heads[task]) for task in TASKS}
    for task in TASKS:
        assert set(found.circuits[task].nodes) == seen[task]
    assert found.shared == ("a3.h1",)
    row = found.comparison.frame().iloc[-1]
    sizes = [len(seen[task]) for task in TASKS]
    assert row.common == 1
    assert row.overlap == 1 / sizes[0] == 1 / 4  # the planted ratio: all four heads of IOI show under patching
    assert row.iou == 1 / (sum(sizes) - 1)
    assert row.expected == pytest.approx(sizes[0] * sizes[1] / 16)


def test_the_roles_and_idle_heads_lead_to_the_planted_repair(model, pairs, found):
    assert found.roles["colored-objects"].of("mover") == ("a3.h1",)
    groups = idle_heads(found)
    assert groups == {"inhibition": ("a1.h0",), "negative": ("a3.h2",)}
    more = wb.task("colored-objects").build(seed=1, tokenizer=model.tokenizer, n=16)
    done = repairs(model, more, groups, ["OTHER1", "OTHER2"], movers=["a3.h1"], controls=1)
    assert list(done) == ["inhibition + negative", "inhibition", "negative"]
    whole = done["inhibition + negative"]
    before, after = whole.accuracy[:2].tolist()
    assert before < 0.8
    assert after == 1
    assert not whole.broken[1].any()
    assert before < float(done["negative"].accuracy[1]) < after


def test_two_tasks_that_share_nothing(model, pairs):
    """Random circuits as given: the comparison is that of the judgement, and the table lists every head of either."""
    names = [f"a{layer}.h{head}" for layer in range(4) for head in range(4)]
    given = {
        "ioi": Circuit.of("node", names, names[:3]),
        "colored-objects": Circuit.of("node", names, names[3:5]),
    }
    found = circuit_reuse(model, pairs, circuits=given, roles=False)
    assert found.shared == ()
    table = found.frame()
    assert table.node.tolist() == names[:5]
    assert table["kept ioi"].tolist() == [True] * 3 + [False] * 2
    assert found.comparison.frame().iloc[-1].iou == 0
    with pytest.raises(WorkbenchError, match="no roles yet"):
        idle_heads(found)


def test_a_result_has_a_folder_and_a_plot(found, tmp_path):
    found.save(tmp_path / "reuse")
    assert found.plot() is not None
    assert list(found.frame())[:3] == ["node", "kept ioi", "score ioi"]


def test_mistakes_are_named(model, pairs, found):
    with pytest.raises(WorkbenchError, match="two tasks"):
        circuit_reuse(model, {"ioi": pairs["ioi"]})
    few = {task: each[:2] for task, each in pairs.items()}
    with pytest.raises(WorkbenchError, match="keeps every part.*pass top="):
        circuit_reuse(model, few, method="eap", roles=False)
    assert len(circuit_reuse(model, few, method="eap", top=3, roles=False).circuits["ioi"]) == 3
    with pytest.raises(UnknownName, match="role"):
        idle_heads(found, ["leader"])
    with pytest.raises(WorkbenchError, match="no heads to force"):
        repairs(model, pairs["ioi"], {}, ["S2"])
