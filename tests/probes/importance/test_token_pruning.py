"""Importance while writing and hidden tokens: literal votes, planted tokens, what sinks do."""

import math

import pytest
import torch
from builders import hugging_face

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
from workbench.pairs import Pairs
from workbench.probes.examples import needles, random_rows
from workbench.probes.importance.token_importance import generated_importance, token_importance
from workbench.probes.importance.token_pruning import _hidden, token_pruning
from workbench.results import load_result
from workbench.run import Generation, Run
from workbench.sites import Site


def generation_of(weights, prompt=6, mask=None):
    batch, _, steps, keys = weights[0].shape
    ids = torch.zeros(batch, keys + 1, dtype=torch.int64)
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    assert steps == keys + 1 - prompt
    return Generation(Tokens(ids, mask), prompt, maps={i: AttentionMap.from_dense(w) for i, w in enumerate(weights)})


def written(layers=2, heads=3, prompt=6, steps=4, seed=0):
    keys = prompt + steps - 1
    return [random_rows(1, heads, steps, keys=keys, seed=seed + i) for i in range(layers)]


@pytest.mark.parametrize("keep", [1.0, 0.7, 0.4])
def test_votes_add_up_over_steps_and_the_least_go(keep):
    weights = written()
    found = generated_importance(generation_of(weights), keep=keep)
    total, alive, gone = [0.0] * 9, set(range(9)), {}
    for step in range(4):
        here = [j for j in range(6 + step) if j in alive]
        for j in here:
            total[j] += sum(float(w[0, :, step, j].sum()) for w in weights)
        count = math.ceil(keep * (6 + step) - 1e-9)
        for j in sorted(here, key=lambda j: -total[j])[count:]:
            alive.discard(j)
            gone[j] = step + 1
    torch.testing.assert_close(found.values["importance"][0, :9], torch.tensor(total, dtype=torch.float64))
    assert found.values["importance"][0, 9].isnan()
    for j in range(9):
        value = float(found.values["dropped"][0, j])
        assert value == gone[j] if j in gone else math.isnan(value)
    assert bool(gone) == (keep < 1)


def test_a_dead_token_goes_first_and_a_sink_is_kept_and_flagged():
    weights = written(steps=3)
    for w in weights:
        w[..., 2] = 0
        w[..., 4] += 3 * w.sum(-1)
        w /= w.sum(-1, keepdim=True)
    found = generated_importance(generation_of(weights), keep=0.7)
    assert float(found.values["dropped"][0, 2]) == 1
    assert found.values["dropped"][0, 4].isnan()
    assert found.values["sink"][0, :8].nonzero()[:, 0].tolist() == [0, 4]


def test_the_null_is_evenly_spread_attention():
    weights = [torch.ones(1, 2, 3, 7, dtype=torch.float64).tril(4) for _ in range(2)]
    weights = [w / w.sum(-1, keepdim=True) for w in weights]
    found = generated_importance(generation_of(weights, prompt=5))
    torch.testing.assert_close(found.null["importance"], found.values["importance"], equal_nan=True)


def test_the_prompt_may_vote_before():
    model = wb.load("tiny-softmax")
    text = "Mary and John went to the store ."
    with torch.no_grad():
        before = token_importance(model.run(text, maps=wb.capture()))
        after = wb.generate(model, text, 3, maps=wb.capture())
    alone, both = generated_importance(after), generated_importance(after, start=before)
    n = before.importance.shape[1]
    wanted = alone.values["importance"][0, :n] + before.importance[-1]
    torch.testing.assert_close(both.values["importance"][0, :n], wanted)
    torch.testing.assert_close(both.null["importance"][0, :n], alone.null["importance"][0, :n] + before.null[-1])
    with pytest.raises(WorkbenchError, match="start is the importance of the prompt"):
        generated_importance(after, start=token_importance(model.run(text + " Mary", maps=wb.capture())))


def test_padding_never_receives():
    model = wb.load("tiny-softmax")
    texts = ["Mary and John went to the store .", "John gave a book"]
    together = generated_importance(wb.generate(model, texts, 3, maps=wb.capture()), keep=0.6)
    alone = generated_importance(wb.generate(model, texts[1], 3, maps=wb.capture()), keep=0.6)
    n = alone.values["importance"].shape[1]
    padded = together.values["importance"].shape[1] - n
    assert together.values["importance"][1, :padded].isnan().all()
    for name in ("importance", "dropped", "sink"):
        torch.testing.assert_close(
            together.values[name][1:, padded:], alone.values[name], atol=1e-4, rtol=1e-4, equal_nan=True
        )


def test_causal_null_of_token_importance_is_closed_form():
    even = torch.ones(1, 2, 5, 5, dtype=torch.float64).tril()
    even = even / even.sum(-1, keepdim=True)
    found = token_importance([AttentionMap.from_dense(even)] * 2)
    wanted = [2 * 2 * sum(1 / (q + 1) for q in range(j, 5)) for j in range(5)]
    assert found.null[-1].tolist() == pytest.approx(wanted)
    torch.testing.assert_close(found.importance, found.null)


def test_hidden_tokens_are_those_of_lowest_order_but_never_the_watched_one():
    real = torch.tensor([[True] * 5, [True, True, True, False, False]])
    order = torch.tensor([[5.0, 1, 2, 3, 0], [9, 8, 7, 0, 0]])
    hide = _hidden(order, real, torch.tensor([4, 2]), 0.4)
    assert hide.tolist() == [[False, True, True, True, False], [False, True, False, False, False]]
    assert not _hidden(order, real, torch.tensor([4, 2]), 1.0).any()


@pytest.fixture(scope="module")
def tiny():
    return wb.load("tiny-softmax")


def test_hiding_is_what_a_literal_pattern_gives(tiny):
    pairs = needles(tiny, 40, 3)
    worth = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    found = token_pruning(tiny, pairs, keep=(0.6,), importance=worth, random=1)
    hide = _hidden(worth.double(), torch.ones(3, 40, dtype=torch.bool), pairs.position, 0.6)

    def without(pattern):
        out = pattern.clone()
        for b in range(3):
            out[b, :, :, hide[b]] = 0
        sums = out.sum(-1, keepdim=True)
        return torch.where(sums > 0, out / sums.clamp(min=1e-30), 0)

    with torch.no_grad():
        run = tiny.run(pairs.clean, edit={Site("pattern", layer): without for layer in range(4)})
    p = run.logits[torch.arange(3), pairs.position].double().softmax(-1)
    wanted = p.gather(1, pairs.answer.clamp(min=0)).masked_fill(pairs.answer < 0, 0).sum(1)
    torch.testing.assert_close(found.least[0], wanted, atol=1e-5, rtol=1e-4)
    assert found.hidden.tolist() == [[16, 16, 16]]


def test_the_needle_cannot_be_hidden(tiny):
    pairs = needles(tiny, 40, 4)
    assert isinstance(pairs, Pairs)
    lo, hi = pairs.spans["NEEDLE"].unbind(1)
    worth = torch.ones(4, 40)
    for b in range(4):
        worth[b, lo[b] : hi[b]] = 0
    found = token_pruning(tiny, pairs, keep=(1 - float((hi - lo).max()) / 40,), importance=worth, random=4)
    assert float(found.base.mean()) > 0.9
    assert float(found.least.mean()) < 0.3
    assert float(found.random.mean()) > float(found.least.mean())


def test_what_the_watched_token_asks_for_matters_and_sinks_are_kept(tiny):
    pairs = wb.task("ioi").build(0, tiny.tokenizer, 12)
    found = token_pruning(tiny, pairs, keep=(0.7,), importance="asked", random=6)
    table = found.frame()
    assert table["least"][0] > table["random_high"][0] > table["most"][0]
    assert token_pruning(tiny, pairs, keep=(0.3,), random=1).sink_kept.all()


def test_texts_are_watched_at_their_last_real_token(tiny):
    texts = ["Mary and John went to the store .", "John gave a book"]
    both = token_pruning(tiny, texts, keep=(0.5,), random=1)
    alone = token_pruning(tiny, texts[1:], keep=(0.5,), random=1)
    assert both.metric == "kl"
    assert (both.base == 0).all()
    torch.testing.assert_close(both.least[:, 1:], alone.least, atol=1e-5, rtol=1e-4)
    for rule in ("relative", "asked"):
        options = dict(keep=(0.5,), random=1, importance=rule)
        one, two = token_pruning(tiny, texts, **options), token_pruning(tiny, texts[1:], **options)
        torch.testing.assert_close(one.least[:, 1:], two.least, atol=1e-5, rtol=1e-4)


def test_on_a_model_of_transformers_that_builds_the_pattern(tmp_path):
    eager = hugging_face("llama", "eager")
    found = token_pruning(eager.model, eager.inputs, keep=(0.8, 0.4), random=2)
    assert (found.random >= 0).all()
    assert found.plot().get_ylabel() == "kl"
    assert load_result(found.save(tmp_path / "pruning")).type == "TokenPruning"
    fused = hugging_face("llama")
    with pytest.raises(Refused, match="attn_implementation"):
        token_pruning(fused.model, fused.inputs, keep=(0.5,), random=1)


def test_what_makes_no_sense_is_refused(tiny):
    text = "Mary and John went to the store ."
    for options in (
        dict(keep=()),
        dict(keep=(0,)),
        dict(random=0),
        dict(importance=torch.ones(1, 2)),
        dict(metric="loss"),
    ):
        with pytest.raises(WorkbenchError):
            token_pruning(tiny, text, **options)
    with pytest.raises(UnknownName):
        token_pruning(tiny, text, importance="size")
    bert = hugging_face("bert")
    with pytest.raises(Refused, match="no token at the end"):
        token_pruning(bert.model, bert.inputs)
    with pytest.raises(WorkbenchError, match="captured no attention"):
        generated_importance(Generation(Tokens.of(torch.zeros(1, 3, dtype=torch.int64)), 2))
    with pytest.raises(Refused, match="signed"):
        generated_importance(generation_of([-w for w in written()]))
    assert isinstance(tiny.run(text), Run)
