"""Roles of planted heads, and the evidence against loops over tokens."""

import pytest
import torch

import workbench as wb
from workbench.circuits import Circuit
from workbench.errors import UnknownName, WorkbenchError
from workbench.pairs import Pairs, logit_difference
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.methods.path_patching import path_patching
from workbench.probes.circuits.reuse.roles import circuit_roles
from workbench.sites import Site


@pytest.fixture(scope="module")
def two_task():
    return wb.load("compiled-two-task")


def all_heads(model):
    return [f"a{layer}.h{head}" for layer in range(model.shape.layers) for head in range(model.shape.heads)]


def test_the_planted_roles_of_ioi(two_task):
    pairs = wb.task("ioi").build(seed=0, tokenizer=two_task.tokenizer, n=12)
    found = circuit_roles(two_task, pairs, all_heads(two_task))
    assert found.of("duplicate") == ("a0.h0",)
    assert found.of("inhibition") == ("a1.h0",)
    assert found.of("mover") == ("a3.h1",)
    assert found.of("negative") == ("a3.h2",)
    assert "a0.h1" in found.of("previous")
    assert found.of("gatherer") == found.of("backup") == found.of("induction") == ()
    table = found.frame().set_index("head")
    assert table["to S2"]["a1.h0"] == pytest.approx(1, abs=1e-3)
    assert table["to IO"]["a3.h1"] == pytest.approx(1, abs=1e-3)
    assert table.own["a3.h1"] == pytest.approx(5, abs=0.1)  # the logit of a token that is copied with weight 1
    assert table.own["a3.h2"] == pytest.approx(-0.35 * 5, abs=0.1)


def test_the_planted_roles_of_colored_objects(two_task):
    pairs = wb.task("colored-objects").build(seed=0, tokenizer=two_task.tokenizer, n=6)
    found = circuit_roles(two_task, pairs, ["a1.h0", "a1.h1", "a2.h0", "a2.h1", "a3.h1", "a3.h2"])
    assert found.of("mover") == ("a3.h1",)
    assert found.of("gatherer") == ("a2.h0",)
    assert found.of("inhibition") == found.of("negative") == ()
    assert "a1.h0" in found.of("unclassified")
    assert found.frame().set_index("head")["to QUERY"]["a2.h0"] == pytest.approx(1, abs=1e-3)


def test_the_planted_backup_is_told_from_the_movers():
    model = wb.load("compiled-ioi")
    pairs = wb.task("ioi").build(seed=0, tokenizer=model.tokenizer, n=12)
    found = circuit_roles(model, pairs, all_heads(model))
    planted = {"duplicate": "a0.h1", "inhibition": "a1.h2", "mover": "a2.h0", "negative": "a3.h1", "backup": "a3.h2"}
    assert {role: found.of(role) for role in planted} == {role: (head,) for role, head in planted.items()}
    assert found.of("gatherer") == ()


def test_the_induction_circuit_by_its_circuit(hard, induction):
    circuit = find_circuit(hard, induction, "path-patching")
    found = circuit_roles(hard, induction, circuit)
    assert found.heads == ("a0.h1", "a1.h2")
    assert found.labels == (("previous",), ("induction", "mover"))
    assert found.evidence["backup"][1].isnan()
    assert found.evidence["via_q"][1].isnan()


def spanned(make_pairs, n=3):
    pairs = make_pairs(n=n)
    pairs.clean[:, 4] = pairs.clean[:, 1]
    pairs.clean[:, 2] = pairs.answer[:, 0]
    pairs.clean[0, 3] = pairs.wrong[0, 0]
    spans = {"A": (2, 3), "B": (3, 5), "END": (5, 6)}
    where = {name: torch.tensor([span] * n) for name, span in spans.items()}
    return Pairs(pairs.clean, pairs.corrupt, pairs.answer, pairs.wrong, pairs.position, where)


def test_attention_equals_loops_over_tokens(make, make_pairs):
    model, pairs = make(layers=2), spanned(make_pairs)
    names = ["a0.h0", "a1.h2", "a1.h3"]
    found = circuit_roles(model, pairs, names, batch=2)
    with torch.no_grad():
        run = model.run(pairs.clean, read=[Site("pattern", 0), Site("pattern", 1)])
    ids = pairs.clean.tolist()
    rows = {
        kind: [] for kind in ("previous", "duplicate", "duplicate_even", "induction", "on_answer", "on_wrong", "to B")
    }
    rows["on_other"] = []
    for name in names:
        pattern = run.acts[Site("pattern", int(name[1]))][:, int(name[-1])]
        mean = {kind: [] for kind in rows}
        for b in range(len(ids)):
            row = pattern[b]
            mean["previous"].append(sum(float(row[q, q - 1]) for q in range(1, 6)) / 5)
            for kind, shift in (("duplicate", 0), ("induction", 1)):
                masses, even = [], []
                for q in (2, 3, 4, 5):
                    keys = [k + shift for k in range(q) if ids[b][k] == ids[b][q]]
                    if keys:
                        masses.append(sum(float(row[q, k]) for k in keys))
                        even.append(len(keys) / (q + 1))
                if masses:
                    mean[kind].append(sum(masses) / len(masses))
                    if kind == "duplicate":
                        mean["duplicate_even"].append(sum(even) / len(even))
            right, wrong = int(pairs.answer[b, 0]), int(pairs.wrong[b, 0])
            mean["on_answer"].append(sum(float(row[5, k]) for k in range(6) if ids[b][k] == right))
            mean["on_wrong"].append(sum(float(row[5, k]) for k in range(6) if ids[b][k] == wrong))
            mean["on_other"].append(sum(float(row[5, k]) for k in (2, 3, 4) if ids[b][k] not in (right, wrong)))
            mean["to B"].append(float(row[5, 3] + row[5, 4]))
        for kind, values in mean.items():
            rows[kind].append(sum(values) / len(values))
    table = found.frame()
    for kind, values in rows.items():
        assert table[kind].tolist() == pytest.approx(values, rel=1e-9), kind


def test_effects_and_writing_equal_their_definitions(make, make_pairs):
    """Without a norm the parts of the logit difference are exact, and so is what removing the movers does to them."""
    model, pairs = make(norm="none", mlp_width=0), spanned(make_pairs)
    names = all_heads(model)
    found = circuit_roles(model, pairs, names, batch=2)
    torch.testing.assert_close(found.evidence["direct"], path_patching(model, pairs, names).effect[:, 0])
    w_u, w_o = model.net.W_U.detach(), [block.attn.W_O.detach() for block in model.net.blocks]
    relative = w_u - w_u.mean(1, keepdim=True)
    with torch.no_grad():
        run = model.run(pairs.clean, read=[Site(kind, layer) for layer in range(2) for kind in ("pattern", "v")])
    for i, name in enumerate(names):
        layer, head = int(name[1]), int(name[-1])
        total = 0.0
        for b in range(len(pairs)):
            for k, token in enumerate(pairs.clean[b].tolist()):
                if token in (int(pairs.answer[b, 0]), int(pairs.wrong[b, 0])):
                    vector = run.acts[Site("v", layer)][b, k, head // 2] @ w_o[layer][head]
                    total += float(run.acts[Site("pattern", layer)][b, head, 5, k] * (vector @ relative[:, token]))
        assert float(found.evidence["own"][i]) == pytest.approx(total / len(pairs), rel=1e-8)


def test_a_backup_grows_when_the_movers_fall_silent(make, make_pairs):
    """The change of the logit difference without the movers is their own loss and the growth of all other heads."""
    from workbench.probes.circuits.components import Setting
    from workbench.probes.circuits.reuse.roles import _backup

    model, pairs = make(norm="none", mlp_width=0, layers=2), spanned(make_pairs)
    heads = {name: Site("z", int(name[1]), int(name[-1])) for name in all_heads(model)}
    growth = _backup(Setting.of(model, pairs, batch=2), heads, ["a0.h1"])
    with torch.no_grad():
        other = model.run(pairs.corrupt)
        silent = model.run(pairs.clean, edit={Site("z", 0, 1): torch.zeros_like})
        clean, corrupt, without = (
            float(logit_difference(logits, pairs).mean())
            for logits in (model.run(pairs.clean).logits, other.logits, silent.logits)
        )
    # Embeddings do not move, so the heads' parts account for the whole change.
    assert float(growth.sum()) == pytest.approx((without - clean) / (clean - corrupt), rel=1e-9)
    assert growth[4:].abs().max() > 1e-3
    assert growth[[0, 2, 3]].abs().max() < 1e-12


def test_without_movers_the_rest_is_undefined(two_task, tmp_path):
    pairs = wb.task("ioi").build(seed=0, tokenizer=two_task.tokenizer, n=4)
    found = circuit_roles(two_task, pairs, ["a0.h0", "a1.h0"])
    assert set(found.undefined) == {"via_q", "backup"}
    assert found.evidence["via_q"].isnan().all()
    assert found.labels == (("duplicate",), ())
    found.save(tmp_path / "roles")
    assert found.plot().get_xlabel() == "span"


def test_a_bridge_has_no_weights_and_says_so(make_pairs):
    import builders

    case = builders.bridged("gpt2")
    pairs = make_pairs(vocab=20)
    found = circuit_roles(case.model, pairs, ["a0.h0", "a1.h1"])
    assert "own" in found.undefined
    assert found.evidence["direct"].isfinite().all()


def test_mistakes_are_named(two_task):
    pairs = wb.task("ioi").build(seed=0, tokenizer=two_task.tokenizer, n=2)
    with pytest.raises(UnknownName, match=r"a7\.h0"):
        circuit_roles(two_task, pairs, ["a7.h0"])
    empty = Circuit.of("node", ["a0.h0", "m0"], [])
    with pytest.raises(WorkbenchError, match="keeps no heads"):
        circuit_roles(two_task, pairs, empty)
    with pytest.raises(UnknownName, match="role"):
        circuit_roles(two_task, pairs, ["a0.h0"]).of("leader")
