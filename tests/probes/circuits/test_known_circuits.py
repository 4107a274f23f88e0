"""Methods against models whose circuit is known, at the figures that the project promises."""

import pytest

import workbench as wb
from workbench.datasets.models.compile import compiled

CASES = {
    "compiled-ioi": ("ioi", {}),
    "compiled-induction": ("induction", {"length": 12}),
    "compiled-needle": ("needle", {"length": 48}),
    "compiled-two-task": ("ioi", {}),
}
LEAST = {"patching": 1.0, "eap-ig": 0.99, "acdc": 0.95}


@pytest.fixture(scope="module", params=[(name, attention) for name in CASES for attention in ("hard", "soft")])
def case(request):
    name, attention = request.param
    model = wb.load(name) if attention == "hard" else compiled(name, attention, rotate=3)
    kind, options = CASES[name]
    task = wb.task(kind, **options)
    return model, task, task.build(seed=5, tokenizer=model.tokenizer, n=16)


@pytest.mark.parametrize("method", LEAST)
def test_edges_of_compiled_models_are_found(case, method):
    model, task, pairs = case
    found = wb.find_circuit(model, pairs, method, "edge", metric=task.metric)
    assert wb.auroc(found, model.ground_truth) >= LEAST[method]


@pytest.mark.parametrize(("method", "least"), [("patching", 0.99), ("eap-ig", 0.81), ("acdc", 0.95)])
def test_edges_of_the_trained_model_are_found(method, least):
    """Published figures on InterpBench's trained IOI model: EAP-IG .71 over inputs, .81 over activations."""
    model, task = wb.load("siit-ioi"), wb.task("ioi", split="test")
    pairs = task.build(seed=5, tokenizer=model.tokenizer, n=16)
    found = wb.find_circuit(model, pairs, method, "edge", metric=task.metric)
    assert wb.auroc(found, model.ground_truth) >= least


def test_heads_of_the_trained_model_are_found_by_codes():
    model = wb.load("siit-ioi")
    pairs = wb.task("ioi", split="test").contrast().build(seed=5, tokenizer=model.tokenizer, n=250)
    found = wb.find_circuit(model, pairs, "discrete-sae", batch=125)
    assert wb.auroc(found, model.ground_truth, signed=True) >= 0.9


def test_random_ranking_and_reset_network_are_at_chance():
    model, task = wb.load("compiled-ioi"), wb.task("ioi")
    pairs = task.build(seed=5, tokenizer=model.tokenizer, n=8)
    control = wb.reset_control(model, pairs, model.ground_truth, "eap", metric=task.metric, resets=3, truths=20)
    table = control.frame()
    assert len(table)
