import copy
from collections import Counter

import pytest
import torch

from workbench.circuits import Circuit, circuit_graph
from workbench.errors import Refused, WorkbenchError
from workbench.probes.circuits.find import find_circuit
from workbench.probes.circuits.judgement.controls import random_circuits, reset_network
from workbench.probes.circuits.judgement.reset import reset_control
from workbench.results import load_result


def kinds(circuit):
    def kind(node):
        return node.split(".")[0]

    return Counter((kind(source), kind(target), channel) for source, target, channel in circuit.edges)


def test_random_circuits_have_the_size_and_the_layers():
    graph = circuit_graph(3, 4)
    kept = graph.edges[5:200:9]
    circuit = Circuit.of("edge", graph.edges, kept)
    found = random_circuits(circuit, 20, seed=1)
    assert len(found) == 20
    assert len({tuple(other.kept.tolist()) for other in found}) > 15
    for other in found:
        assert len(other) == len(kept)
        assert kinds(other) == kinds(circuit)
        assert torch.equal(other.scores, other.kept.double())
    free = random_circuits(circuit, 20, seed=1, matched=False)
    assert {len(other) for other in free} == {len(kept)}
    assert any(kinds(other) != kinds(circuit) for other in free)
    assert [other.kept.tolist() for other in random_circuits(circuit, 20, seed=1)] == [o.kept.tolist() for o in found]


def test_random_nodes_keep_their_layers_kinds_and_places():
    names = [f"{node}@{place}" for node in ("a0.h0", "a0.h1", "a0.h2", "m0", "m1") for place in ("S", "END")]
    circuit = Circuit.of("node", names, ["a0.h1@S", "m1@END", "a0.h0@S"])
    for other in random_circuits(circuit, 10):
        kept = [name for name, flag in zip(other.names, other.kept.tolist(), strict=True) if flag]
        assert "m1@END" in kept
        assert sum(name.startswith("a0") and name.endswith("@S") for name in kept) == 2
        assert other.provenance["choices"] == 3
    assert random_circuits(circuit.top(0), 1)[0].provenance["choices"] == 1
    with pytest.raises(WorkbenchError, match="at least 0"):
        random_circuits(circuit, -1)


def test_every_random_circuit_is_equally_likely():
    circuit = Circuit.of("node", [f"a0.h{i}" for i in range(4)], ["a0.h0", "a0.h1"])
    counts = Counter(tuple(other.kept.tolist()) for other in random_circuits(circuit, 1200))
    assert len(counts) == 6
    assert all(140 < count < 260 for count in counts.values())  # 200 on average, deviation 13


def test_a_reset_network_has_the_same_weights_in_another_order(soft):
    before = copy.deepcopy(soft.net.state_dict())
    made, again, other = (reset_network(soft, seed=seed) for seed in (0, 0, 1))
    for name, value in soft.net.named_parameters():
        new = dict(made.net.named_parameters())[name]
        assert torch.equal(new.flatten().sort().values, value.flatten().sort().values)
        assert not torch.equal(new, value)
        assert torch.equal(new, dict(again.net.named_parameters())[name])
        assert not torch.equal(new, dict(other.net.named_parameters())[name])
        assert torch.equal(value, before[name])
    assert made.ground_truth is None
    assert made.name == "compiled-induction, reset 0"


def test_a_hugging_face_network_is_reset_with_tied_weights():
    from transformers import GPT2Config, GPT2LMHeadModel

    from workbench.models.hf import HFModel

    torch.manual_seed(0)
    net = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=13, n_positions=9)).eval()
    made = reset_network(HFModel(net, name="tiny"), seed=3)
    ids = torch.tensor([[1, 2, 3]])
    assert made.model.lm_head.weight is made.model.transformer.wte.weight
    assert not torch.allclose(made.run(ids).logits, net(ids).logits)
    assert torch.equal(made.model.lm_head.weight.flatten().sort().values, net.lm_head.weight.flatten().sort().values)


def test_other_models_are_refused(soft):
    class Other:
        name, net = "other", soft.net

    with pytest.raises(Refused, match="native or Hugging Face"):
        reset_network(Other())


def test_on_reset_networks_only_the_form_of_the_truth_is_found(soft, induction, tmp_path):
    result = reset_control(soft, induction, soft.ground_truth, "eap", resets=20, seed=100)
    assert result.trained == 1
    assert abs(result.excess) < 3 * result.error
    assert result.error < 0.03
    assert float(result.trained_form.mean()) < 0.8
    table = result.frame()
    assert table.network.tolist()[:2] == ["trained", "reset 0"]
    assert load_result(result.save(tmp_path / "r")).frame().equals(table)
    result.plot()


def test_nodes_are_judged_by_the_ends_of_the_true_edges_too(soft, induction):
    result = reset_control(soft, induction, soft.ground_truth, "eap", "node", resets=2, truths=10)
    assert result.level == "node"
    assert result.trained == 1
    assert result.form.shape == (2, 10)
    assert torch.isfinite(result.form).all()
    assert len(find_circuit(soft, induction, "eap", "node")) == 8
    with pytest.raises(WorkbenchError, match="at least 1"):
        reset_control(soft, induction, soft.ground_truth, resets=0)
