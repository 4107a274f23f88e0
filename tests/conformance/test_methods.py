"""Every circuit method: the same answer twice, nothing changed, nothing left behind, and every level, ablation and mixer
that its record promises."""

import contextlib
import copy

import pytest
import torch

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet
from workbench.pairs import Pairs, logit_difference

METHODS = wb.methods()
QUICK = {
    "discrete-sae": {"pooling": "mean", "epochs": 20, "trials": 1, "silent": 0.0, "features": 16, "score": "raw"},
    "edge-pruning": {"steps": 6},
    "ibcircuit": {"steps": 6},
    "subnetwork-probing": {"steps": 6},
    "ugs": {"steps": 6},
}
CASES = [(name, level) for name, method in METHODS.items() for level in method.levels]


REFUSED = {
    ("atp-star", "linear-attention"),
    ("relp", "sigmoid-attention"),
    ("relp", "linear-attention"),
}
"""Methods whose maths needs a softmax."""


def model(mixer="softmax", seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"layers": 2, "heads": 4, "kv_heads": 2, "width": 16, "head_width": 4, "vocab": 13, "mlp_width": 8}
    net = NativeNet(NativeConfig(**{**sizes, "mixer": mixer, **options}))
    for parameter in net.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.4)
    return NativeModel(net.eval(), name=f"random {mixer}")


def pairs(n=6, length=6, vocab=13):
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(vocab, (n, length), generator=generator)
    corrupt = clean.clone()
    corrupt[:, 1:4] = torch.randint(vocab, (n, 3), generator=generator)
    ends = torch.stack([torch.randperm(vocab, generator=generator)[:2] for _ in range(n)])
    spans = {"A": torch.tensor([[1, 3]] * n), "END": torch.tensor([[length - 1, length]] * n)}
    return Pairs(clean, corrupt, ends[:, :1], ends[:, 1:], torch.full((n,), length - 1), spans)


def find(name, level, where=None, **options):
    ablation = METHODS[name].ablations[0]
    return wb.find_circuit(
        where or model(), pairs(), name, level, **{"ablation": ablation, **QUICK.get(name, {}), **options}
    )


@pytest.mark.parametrize(("name", "level"), CASES)
def test_found_twice_is_bit_identical_and_changes_nothing(name, level):
    made, given = model(), pairs()
    before = copy.deepcopy(made.net.state_dict())
    logits = made.run(given.clean).logits
    torch.manual_seed(5)
    state = torch.get_rng_state()
    ablation = METHODS[name].ablations[0]
    first = wb.find_circuit(made, given, name, level, ablation, **QUICK.get(name, {}))
    assert torch.equal(torch.get_rng_state(), state), "draws from the global random numbers"
    torch.manual_seed(99)
    second = wb.find_circuit(made, given, name, level, ablation, **QUICK.get(name, {}))
    assert first.names == second.names
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.kept, second.kept)
    for column, values in first.columns.items():
        assert torch.equal(values.nan_to_num(7.0), second.columns[column].nan_to_num(7.0)), column
    assert all(torch.equal(value, before[key]) for key, value in made.net.state_dict().items())
    assert all(parameter.grad is None for parameter in made.net.parameters())
    assert all(parameter.requires_grad for parameter in made.net.parameters())
    assert torch.equal(made.run(given.clean).logits, logits)
    assert not any(point.fwd_hooks or point.bwd_hooks for point in made.net.hook_dict.values())


@pytest.mark.parametrize(("name", "level"), CASES)
def test_parts_are_those_of_the_model(name, level):
    found = find(name, level)
    graph = wb.circuit_graph(2, 4, 2)
    known = graph.edges if level == "edge" else graph.nodes
    assert set(found.names) <= set(known)
    assert found.provenance["method"] == name
    replaced = found.provenance["ablation"]
    assert replaced == METHODS[name].ablations[0] or (name, replaced) == ("ifr", "none")
    assert found.provenance["options"].keys() == METHODS[name].options.keys()
    assert len(found.scores.unique()) > 2, "a ranking needs scores that differ"


@pytest.mark.parametrize(("name", "level"), CASES)
def test_hooks_are_gone_after_an_exception(name, level):
    made, calls = model(), []

    def fails(logits, given):
        calls.append(0)
        if len(calls) >= 2:
            raise ZeroDivisionError
        return logit_difference(logits, given)

    options = {"objective": "metric"} if "objective" in METHODS[name].options else {}
    with contextlib.suppress(ZeroDivisionError):
        find(name, level, made, metric=fails, **options)
    assert not any(point.fwd_hooks or point.bwd_hooks for point in made.net.hook_dict.values())
    assert all(parameter.grad is None for parameter in made.net.parameters())


@pytest.mark.parametrize(
    ("name", "level", "ablation"),
    [(name, level, ablation) for name, level in CASES for ablation in METHODS[name].ablations[1:]],
)
def test_every_ablation_is_served(name, level, ablation):
    found = find(name, level, ablation=ablation)
    assert found.provenance["ablation"] == ("none" if name == "ifr" else ablation)
    assert torch.isfinite(found.scores).all()


@pytest.mark.parametrize(("name", "level"), [case for case in CASES if METHODS[case[0]].positions])
@pytest.mark.parametrize("positions", ["spans", "each"])
def test_places_are_told_apart(name, level, positions):
    options = {} if (name, level) != ("discrete-sae", "edge") else None
    if options is None:
        with pytest.raises(Refused, match="level='node'"):
            find(name, level, positions=positions)
        return
    found = find(name, level, positions=positions)
    places = {part.split("@")[1] for part in found.names}
    assert places == ({"A", "END", "rest"} if positions == "spans" else set(map(str, range(6))))
    assert set(found.over_positions().names) == set(find(name, level).names)


@pytest.mark.parametrize(("name", "level"), CASES)
@pytest.mark.parametrize("mixer", ["gated-softmax", "sigmoid-attention", "linear-attention"])
def test_other_mixers_are_served_or_refused_with_a_reason(name, level, mixer):
    made = model(mixer, kv_heads=None)
    if (name, mixer) in REFUSED:
        with pytest.raises(Refused, match=mixer):
            find(name, level, made)
    else:
        assert torch.isfinite(find(name, level, made).scores).all()


@pytest.mark.parametrize(("name", "level"), CASES)
def test_judging_changes_neither_circuit_nor_model(name, level):
    made, given = model(), pairs()
    found = find(name, level, made)
    scores, kept = found.scores.clone(), found.kept.clone()
    try:
        result = wb.faithfulness(made, found, given, controls=1)
    except Refused:
        assert name.startswith("discrete-sae"), "all others score every part"
        return
    assert float(result.faithfulness[-1]) == pytest.approx(1.0, abs=1e-4)
    assert float(wb.faithfulness(made, found, given, fractions=(0.0, 1.0)).faithfulness[0]) == pytest.approx(
        0, abs=1e-4
    )
    assert torch.equal(found.scores, scores)
    assert torch.equal(found.kept, kept)
    assert not any(point.fwd_hooks for point in made.net.hook_dict.values())


@pytest.mark.parametrize("name", sorted(METHODS))
def test_records_say_what_they_are(name):
    method = METHODS[name]
    assert method.paper
    assert method.description[0].islower() or method.description[0] == '"'
    assert not method.description.endswith(".")
    wrong = {option: object() for option in list(method.options)[:1]}
    for option, value in wrong.items():
        with pytest.raises(WorkbenchError, match=f"option {option}"):
            wb.find_circuit(model(), pairs(), name, ablation=method.ablations[0], **{option: value})
