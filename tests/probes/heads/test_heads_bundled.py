"""Models whose heads are known, and a small one of another make."""

import pytest
import torch

import workbench as wb
from workbench.datasets.words import words
from workbench.errors import WorkbenchError
from workbench.pairs import Pairs
from workbench.probes.retrieval.masking import masking


@pytest.fixture(scope="module")
def needle():
    return wb.load("compiled-needle")


@pytest.fixture(scope="module")
def retrieval(needle):
    return wb.retrieval_heads(needle, lengths=(48, 96), depths=(0.2, 0.9), trials=2)


def test_the_compiled_retrieval_head_is_found_alone(retrieval):
    table = retrieval.frame()
    found = dict(zip(zip(table["layer"], table["head"], strict=True), table["score"], strict=True))
    assert found.pop((1, 1)) == 1.0
    assert set(found.values()) == {0.0}
    assert retrieval.grid()["recall"].tolist() == [1.0] * 4


def test_its_removal_and_no_other_changes_the_answer(needle, retrieval):
    table = masking(needle, retrieval, random=2, lengths=(48,)).frame().set_index("condition")
    assert table.loc["none", "accuracy"] == 1.0
    assert table.loc["top", "heads"] == "1.1"
    assert table.loc["top", "accuracy"] < 0.3
    assert table.loc["top", "probability"] < 0.1 * table.loc["none", "probability"]
    assert table.loc["random", "probability"].tolist() == pytest.approx([table.loc["none", "probability"]] * 2)


def test_compiled_induction_heads_are_found():
    model = wb.load("compiled-induction")
    result = wb.head_scores(model, batches=1, sequences=4, period=(8, 12), words=words("symbols"))
    best = result.top("induction")
    assert best[0][:2] == (1, 2)
    assert best[0].value > 0.99
    assert best[0].null < 0.2
    assert best[1].value < 0.01
    assert (0, 1) in [head[:2] for head in result.top("previous") if head.value > 0.99]


@pytest.fixture(scope="module")
def trained():
    return wb.load("tiny-softmax")


def test_induction_heads_of_the_trained_model_follow_a_previous_token_head(trained):
    result = wb.head_scores(trained, batches=1, sequences=4, period=(8, 20))
    assert result.source == "random repeats of words of the induction task"
    best, first = result.top("induction", 1)[0], result.top("previous", 1)[0]
    assert best.value > 0.4
    assert best.value > 4 * best.null
    assert first.value > 0.4
    assert first.layer < best.layer


def test_words_that_were_never_repeated_are_worth_asking_for(trained):
    result = wb.head_scores(trained, batches=1, sequences=1, period=(8, 8), words=range(600))
    assert result.source == "random repeats of given words"


def test_retrieval_heads_of_the_trained_model_are_needed(trained):
    result = wb.retrieval_heads(trained, lengths=96, depths=(0.1, 0.6), trials=4)
    assert result.grid()["recall"].min() > 0.7
    best = result.heads()[0]
    assert best.score > 0.5
    assert best.null < 0.1
    assert masking(trained, result, random=1).drop("top") > 0.3


def test_words_to_draw_are_tokens_of_the_model(needle):
    options = {"batches": 1, "sequences": 1, "period": (4, 4)}
    for words_given, said in (
        (["xylophonist"] * 9, "not one token"),
        (["royal box"], "not one token"),
        ([10**6], "lie in"),
    ):
        with pytest.raises(WorkbenchError, match=said):
            wb.head_scores(needle, words=words_given, **options)
    with pytest.raises(WorkbenchError, match="7 different tokens"):
        wb.head_scores(needle, words=words("symbols")[:7] * 2, **options)


def test_the_start_token_is_the_sink_of_a_resting_head(needle):
    run = needle.run("The royal box holds honey .", maps=wb.capture(stats=("received",)))
    result = wb.sinks(run)
    first = {(sink.layer, sink.head): sink for sink in result.strongest()}[1, 0]
    assert (first.key, first.token) == (0, "<bos>")
    assert first.share == pytest.approx(1.0, abs=1e-4)


def mistral(window):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 31, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return wb.load(MistralForCausalLM(MistralConfig(**sizes, sliding_window=window)).eval())


@pytest.mark.parametrize("window", [None, 6])
def test_cached_and_whole_runs_of_a_transformers_model_agree(window):
    """The cache of a sliding window forgets its first keys; positions are those of the text all the same."""
    model = mistral(window)

    def prompts(length, depth, seed):
        ids = torch.randint(3, 31, (3, length), generator=torch.Generator().manual_seed(seed))
        span = torch.tensor([[10, 14]] * 3)
        return Pairs(ids, ids, ids[:, 10:14], torch.full((3, 1), -1), torch.full((3,), length - 1), {"NEEDLE": span})

    options = {"lengths": (16,), "depths": 2, "prompts": prompts, "max_new_tokens": 3}
    cached, whole = wb.retrieval_heads(model, **options), wb.retrieval_heads(model, cache=False, **options)
    assert cached.looks.equal(whole.looks)
    assert cached.looks.sum() > 0
    assert cached.copied.equal(whole.copied)
    assert cached.reason.startswith("MistralForCausalLM retrieved no needle")


def test_sinks_of_a_step_count_keys_from_the_start_of_the_text():
    ids, request = torch.arange(3, 14)[None], wb.capture(stats=("received",))
    for window, forgotten in ((None, 0), (6, 5)):
        model = mistral(window)
        before = model.run(ids[:, :-1], maps=request, cache=True)
        assert wb.sinks(before).share[0].shape == (4, 10)
        step = model.run(ids[:, -1:], maps=request, cache=before.cache)
        assert wb.sinks(step).queries[0].tolist() == [0] * forgotten + [1] * (11 - forgotten)
