"""Published constants of the retrieval analyses, and what removing heads does to the trained model."""

import inspect

import pytest

import workbench as wb
from workbench.probes.retrieval import copying, duo, haystack, headkv, masking, query_heads, razor
from workbench.probes.retrieval.streaming import Streaming


@pytest.mark.parametrize(
    ("function", "name", "published"),
    [
        (copying.retrieval_heads, "threshold", 0.1),
        (haystack.locate_needle, "overlap", 0.9),
        (headkv.head_kv, "window", 8),
        (headkv.cache_budget, "beta", 1.2),
        (razor.razor_scores, "repeats", 4),
        (razor.razor_scores, "echo", 0.01),
        (razor.razor_scores, "induction", 0.14),
        (duo.duo_gates, "steps", 2000),
        (duo.duo_gates, "rate", 0.02),
        (duo.duo_gates, "weight", 0.05),
        (Streaming, "sink", 128),
        (Streaming, "recent", 256),
        (duo.DuoGates.cut, "sparsity", 0.5),
        (query_heads.query_heads, "k", 10),
    ],
)
def test_published_constants_are_the_defaults(function, name, published):
    assert inspect.signature(function).parameters[name].default == published


def test_published_numbers_that_are_no_parameters():
    assert (copying.RECALL, copying.STEPS) == (0.5, 50)
    assert (masking.OUTSIDE, max(masking.KS)) == (100, 30)
    assert (query_heads.KEPT, query_heads.DEVIATIONS) == (16, 2)
    assert razor.PERIOD == 2500
    for tokens, local in ((1000, 4000), (20_000, 4000), (20_005, 4001), (100_000, 20_000)):
        policy = razor.razor_policy(tokens)
        assert (policy.recent, policy.compensate) == (local, True)


def test_the_trained_model_needs_its_retrieval_heads_together_and_no_single_one():
    """Eight heads of one layer share the work: recall survives the best one, and is gone without all of them; as many random
    heads of other layers leave most of it."""
    model = wb.load("tiny-softmax")
    result = wb.retrieval_heads(model, lengths=96, depths=(0.1, 0.6), trials=2)
    best = result.heads()[:8]
    assert {head.layer for head in best} == {1}
    assert min(head.score for head in best) > 0.9
    table = masking.masking_curve(model, result, ks=(1, 8), random=2).frame()
    assert table["base"].tolist() == [1, 1]
    assert table["ranked"].tolist() == [1, 0]
    assert table["random"][1] > 0.4
