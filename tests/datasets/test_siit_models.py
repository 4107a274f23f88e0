"""The networks trained onto the program as committed: accuracies, effects, labels, cards."""

import json
import re

import pytest
import torch

import workbench as wb
from workbench.circuits import Circuit, edge_name, edge_parts
from workbench.datasets.models.siit.__main__ import MODELS, name_of
from workbench.datasets.models.siit.audit import SHARE, held_out
from workbench.datasets.models.siit.effects import edge_effects, gap, graph_of, node_effects
from workbench.datasets.models.siit.measure import REQUIRED, measure, shares, shortfalls
from workbench.datasets.models.siit.program import VARIABLES
from workbench.datasets.models.siit.swap import COMPONENTS, components
from workbench.datasets.models.siit.train import start
from workbench.pairs import accuracy, logit_difference
from workbench.sites import Site

NAMES = [name_of(seed) for seed in range(5) if (MODELS / name_of(seed)).is_dir()]
OTHERS = [name for name in components(start(0).config) if name not in COMPONENTS.values()]


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    torch.set_num_threads(1)
    return wb.load(request.param)


@pytest.fixture(scope="module")
def first():
    return wb.load("siit-ioi")


def test_at_least_three_seeds_are_bundled_and_small():
    assert len(NAMES) >= 3
    assert set(NAMES) <= set(wb.bundled())
    for name in NAMES:
        assert (MODELS / name / "model.safetensors").stat().st_size < 1e6


def test_three_seeds_follow_the_program_in_995_of_1000():
    least = {name: min(shares(json.loads((MODELS / name / "audit.json").read_text())).values()) for name in NAMES}
    assert sum(share > 0.995 for share in least.values()) >= 3, least


def audit_of(model):
    return json.loads((MODELS / model.name / "audit.json").read_text())


def test_stored_weights_follow_the_program(model):
    """On prompts that neither training nor the audit drew."""
    found = measure(model.net, n=1000, seed=123)
    assert min(shares(found).values()) > 0.98
    assert set(found["iia"]) == set(VARIABLES)
    assert set(found["strict"]) == set(OTHERS)
    pairs = wb.task("ioi", split="test").build(99, model.tokenizer, 200)
    with torch.no_grad():
        assert accuracy(model.run(pairs.clean).logits, pairs).mean() > REQUIRED


def test_audit_is_reproduced(model):
    said, found = audit_of(model), measure(model.net)
    assert shortfalls(said) == shortfalls(found) == []
    assert said["revision"] == model.revision
    for key in ("accuracy", "accuracy_nobody"):
        assert said[key] == pytest.approx(found[key], abs=2e-3)
    for key in ("iia", "strict", "kl"):
        assert said[key] == pytest.approx(found[key], abs=2e-3)
    pairs = held_out(model)
    span = gap(model, pairs)
    effects = node_effects(model, pairs)
    assert said["gap"] == pytest.approx(span.mean().item(), abs=1e-3)
    assert said["effects"] == pytest.approx({k: v.mean().item() for k, v in effects.items()}, abs=1e-3)
    for name, leak in said["leak"].items():
        assert leak == pytest.approx((effects[name].abs().mean() / span.abs().mean()).item(), abs=1e-3)
        assert leak < 0.2
    for component in COMPONENTS.values():
        assert said["effects"][component] > 0.5 * said["gap"]


CHECKED = (
    "input->a0.h1<q>", "a0.h1->a1.h3<v>", "a1.h3->a2.h2<q>", "a0.h1->a2.h2<k>", "a0.h0->a1.h3<k>", "input->a2.h2<v>"
)  # fmt: skip


def test_labels_are_exact_effects(model):
    """A literal patch and cut of some edges, and the rules of ``kept`` and ``needed`` on all."""
    truth, pairs = model.ground_truth, held_out(model)
    assert isinstance(truth, Circuit)
    assert truth.names == graph_of(model).edges == wb.circuit_graph(3, 4).edges
    assert truth.provenance["revision"] == model.revision
    effect, cut = truth.columns["effect"], truth.columns["cut"]
    assert torch.equal(effect, truth.scores)
    with torch.no_grad():
        clean = logit_difference(model.run(pairs.clean).logits, pairs)
        span = (clean - logit_difference(model.run(pairs.corrupt).logits, pairs)).mean().item()
        assert truth.provenance["gap"] == pytest.approx(span, abs=1e-3)
        for name in CHECKED:
            source, target, channel = edge_parts(name)
            site = Site("resid_pre", 0) if source == "input" else Site("result", int(source[1]), int(source[-1]))
            reader = Site(f"{channel}_input", int(target[1]))
            before, other = (model.run(ids, read=[site]).acts[site] for ids in (pairs.clean, pairs.corrupt))
            for values, change in ((effect, other - before), (cut, -before)):

                def patched(x, head=int(target[-1]), change=change):
                    x = x.clone()
                    x[:, :, head] += change
                    return x

                logits = model.run(pairs.clean, edit={reader: patched}).logits
                exact = (clean - logit_difference(logits, pairs)).mean().item()
                assert values[truth.names.index(name)].item() == pytest.approx(exact, abs=1e-3), name
    least = SHARE * abs(truth.provenance["gap"])
    assert torch.equal(truth.kept, effect.abs() >= least)
    own = {"input", *COMPONENTS.values(), "logits"}
    for name, size, needed in zip(truth.names, cut.tolist(), truth.columns["needed"].tolist(), strict=True):
        assert needed == (abs(size) >= least and set(edge_parts(name)[:2]) <= own), name


def test_effects_equal_those_of_the_circuit_method(first):
    pairs = held_out(first)[:16]
    found = wb.find_circuit(first, pairs, "patching", "edge")
    assert found.names == graph_of(first).edges
    torch.testing.assert_close(edge_effects(first, pairs).mean(1), found.scores, atol=1e-4, rtol=0)
    cut = wb.find_circuit(first, pairs, "patching", "edge", ablation="zero")
    torch.testing.assert_close(edge_effects(first, pairs, "zero").mean(1), cut.scores, atol=1e-4, rtol=0)
    nodes = wb.find_circuit(first, pairs, "patching", "node")
    mine = node_effects(first, pairs)
    assert list(nodes.names) == list(mine)
    torch.testing.assert_close(torch.stack([v.mean() for v in mine.values()]), nodes.scores, atol=1e-4, rtol=0)


def test_the_chain_of_the_program_is_kept_and_needed(model):
    truth, said = model.ground_truth, audit_of(model)
    needed = {name for name, flag in zip(truth.names, truth.columns["needed"].tolist(), strict=True) if flag}
    kept = {edge_name(*edge) for edge in truth.edges}
    a, b, c = (COMPONENTS[variable] for variable in VARIABLES)
    joined = {edge_parts(name)[:2] for name in kept & needed}
    assert {("input", a), (a, b), (b, c), (c, "logits")} <= joined
    assert kept == set(said["kept"])
    assert needed == set(said["needed"])
    assert kept - needed == set(said["kept_not_needed"])
    assert said["program"] == [["input", a], [a, b], ["input", c], [b, c], [c, "logits"]]
    assert said["variables"] == COMPONENTS


def test_card_says_what_the_audit_found(model):
    card, said = (MODELS / model.name / "card.md").read_text(), audit_of(model)
    rows = dict(re.findall(r"^\| `([^`]+)` \| ([\d.]+)% \|", card, re.M))
    assert {name: float(share) / 100 for name, share in rows.items()} == pytest.approx(said["strict"], abs=1e-4)
    for variable, component in COMPONENTS.items():
        assert f"| {variable} | `{component}` | {said['iia'][variable]:.2%} |" in card
    assert all(f"| `{edge}` |" in card for edge in said["kept"])
