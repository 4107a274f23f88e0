"""Compiled models, whose every direction is known: the true dictionary gives the program's features, random ones do not."""

from functools import cache

import pytest
import torch
from feature_nets import axes
from sklearn.metrics import roc_auc_score

from workbench.datasets.catalogue import task
from workbench.datasets.models.compile import compiled, plan
from workbench.datasets.models.compiled.layout import rotation
from workbench.datasets.words import words
from workbench.models.load import load
from workbench.probes.features.feature_circuit import feature_circuit
from workbench.probes.features.feature_effects import feature_effects
from workbench.probes.features.feature_faithfulness import feature_faithfulness
from workbench.probes.features.splice import ERROR, place
from workbench.sites import Site

# What the program of compiled-ioi does with a name, by site: the blocks that differ between the prompts and are read later.
IOI = {
    "blocks.0.hook_resid_pre": ("token",),  # the names themselves
    "blocks.0.hook_resid_post": ("duplicate",),  # at the second mention: which name is repeated
    "blocks.1.hook_resid_post": ("inhibited",),  # everywhere: which name not to move
    "blocks.2.hook_resid_post": ("inhibited", "output"),  # the mover has written, the negative mover still reads
    "blocks.3.hook_resid_post": ("output",),
}
INDUCTION = {
    "blocks.0.hook_resid_pre": ("token",),
    "blocks.0.hook_resid_post": ("token", "before"),
    "blocks.1.hook_resid_post": ("output",),
}


def stream_sites(model):
    return ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_post" for layer in range(model.shape.layers))]


def known_rows(name):
    """Directions of all variables of the program, ``[D, D]``, one a row: row i is coordinate i of its layout."""
    return torch.eye(plan(name).blocks.width)


def random_rows(width, seed=0):
    rows = torch.randn(width, width, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def coordinates(name, block, values=None):
    """Indices of (some values of) a variable in ``known_rows``."""
    picked = plan(name).blocks.pick(block).T.argmax(1)
    return set((picked if values is None else picked[values]).tolist())


def scores(circuit, sites, features):
    """``|effect|`` of every feature of every site, ``[S, F]``, 0 where never active."""
    table, nodes = torch.zeros(len(sites), features, dtype=torch.float64), circuit.effects
    for name, feature, effect in zip(nodes.site.tolist(), nodes.feature.tolist(), nodes.effect.tolist(), strict=True):
        if feature != ERROR:
            table[sites.index(nodes.sites[name]), feature] = abs(effect)
    return table


@cache
def ioi():
    model = load("compiled-ioi")
    pairs = task("ioi").build(seed=0, tokenizer=model.tokenizer, n=12)
    coder = axes(known_rows("compiled-ioi"))
    return model, pairs, coder, feature_circuit(model, dict.fromkeys(stream_sites(model), coder), pairs)


def used(names, program, sites, width, values):
    """``[S, 2 D]``: the features that the program uses: + directions of these values of its blocks, at its sites."""
    table = torch.zeros(len(sites), 2 * width, dtype=torch.bool)
    for site, blocks in program.items():
        for block in blocks:
            table[sites.index(site), sorted(coordinates(names, block, values))] = True
    return table


def test_ioi_is_exactly_the_features_of_the_program():
    """Nodes above .1 are the blocks of ``IOI`` for the names of the prompts, each of them and no other of 2,180 features."""
    model, pairs, _, circuit = ioi()
    sites = stream_sites(model)
    known = words("names")
    values = sorted({known.index(name) for label in ("io", "subject") for name in pairs.labels[label]})
    truth = used("compiled-ioi", IOI, sites, model.shape.width, values)
    # The negative mover writes minus what it moves, but the mover has written more: `output` never turns negative.
    found = scores(circuit, sites, 2 * model.shape.width)
    assert truth.sum() == 6 * len(values)
    assert torch.equal(found >= circuit.node_threshold, truth)
    assert ERROR not in circuit.nodes.feature
    assert roc_auc_score(truth.flatten(), found.flatten()) == 1.0


def test_ioi_circuit_alone_is_the_model_and_the_model_without_it_is_the_corrupted_one():
    model, pairs, coder, circuit = ioi()
    coders = dict.fromkeys(stream_sites(model), coder)
    found = feature_faithfulness(
        model, coders, circuit, pairs, ablation="counterfactual", sizes=[len(circuit)], neurons=False, controls=3
    )
    assert found.own == pytest.approx(1, abs=1e-3)
    assert found.own_completeness == pytest.approx(0, abs=1e-3)
    assert found.random.abs().max() < 0.1
    assert found.full == pytest.approx(3.5, abs=1e-2)


def test_random_dictionaries_do_not_find_it():
    """As many random directions: as many nodes of theirs keep nothing of the behaviour, and which of them score says nothing
    about what the program uses (AUROC of the direction of the program that each is nearest to)."""
    model, pairs, _, circuit = ioi()
    sites, width = stream_sites(model), model.shape.width
    rows = random_rows(width)
    coder = axes(rows)
    coders = dict.fromkeys(sites, coder)
    drawn = feature_circuit(model, coders, pairs)
    judged = feature_faithfulness(
        model, coders, drawn, pairs, ablation="counterfactual", sizes=[len(circuit)], neurons=False, controls=0
    )
    assert judged.faithfulness.abs().max() < 0.1
    known = words("names")
    values = sorted({known.index(name) for label in ("io", "subject") for name in pairs.labels[label]})
    truth = used("compiled-ioi", IOI, sites, width, values)
    nearest = coder.W_dec.argmax(1)  # the + direction of the program with the largest cosine
    labels = truth[:, nearest]
    assert 0.35 < roc_auc_score(labels.flatten(), scores(drawn, sites, 2 * width).flatten()) < 0.75
    assert len(drawn) > 2 * len(circuit)


def test_induction_against_exact_effects():
    """Against the features whose exact replacement has an effect (AUROC at least .95): all of them in the program's blocks."""
    model = load("compiled-induction")
    pairs = task("induction", length=12).build(seed=0, tokenizer=model.tokenizer, n=4)
    coders = dict.fromkeys(stream_sites(model), axes(known_rows("compiled-induction")))
    circuit = feature_circuit(model, coders, pairs)
    exact = feature_effects(model, coders, pairs, method="exact")
    assert exact.names == circuit.effects.names
    labels = exact.effect.abs() > 0.1
    assert roc_auc_score(labels, circuit.effects.effect.abs()) >= 0.95
    for nodes in (circuit.nodes, exact.take(labels.nonzero()[:, 0])):
        for site, feature in zip(nodes.site.tolist(), nodes.feature.tolist(), strict=True):
            blocks = INDUCTION[nodes.sites[site]]
            assert feature in set().union(*(coordinates("compiled-induction", block) for block in blocks))
    # The copied word: all that the program says about it is one feature per prompt and side in the output.
    out = circuit.nodes.of("blocks.1.hook_resid_post")
    assert float(out.effect.sum()) == pytest.approx(10, abs=1e-2)


def test_edges_follow_the_program_of_a_soft_and_rotated_model():
    """Attention that is not saturated lets gradients through to queries and keys: edges run duplicate -> inhibited -> output ->
    output -> metric, and none has an end in a variable that carries no name."""
    model = compiled("compiled-ioi", "soft", rotate=3)
    pairs = task("ioi").build(seed=0, tokenizer=model.tokenizer, n=6)
    coders = dict.fromkeys(stream_sites(model), axes(known_rows("compiled-ioi") @ rotation(model.shape.width, 3)))
    circuit = feature_circuit(model, coders, pairs)
    width = model.shape.width
    layout = {}
    for block in ("token", "bos", "always", "position", "duplicate", "inhibited", "output", "scratch"):
        layout |= dict.fromkeys(coordinates("compiled-ioi", block), block)

    def variable(name):
        site, _, feature = name.partition("/")
        return "metric" if name == "metric" else f"{layout[int(feature) % width]} {place(Site.parse(site))[0]}"

    names = circuit.names
    ends = {
        (variable(names[u]), variable(names[d]))
        for u, d in zip(circuit.source.tolist(), circuit.target.tolist(), strict=True)
    }
    assert {
        ("duplicate 0", "inhibited 1"),
        ("inhibited 1", "output 2"),
        ("inhibited 1", "inhibited 2"),
        ("inhibited 2", "output 3"),
        ("output 2", "output 3"),
        ("output 3", "metric"),
    } <= ends
    assert not any(end.startswith(("scratch", "position", "bos", "always")) for pair in ends for end in pair)
