"""The copy scores against the published loop, written out."""

from itertools import product

import pytest
import torch
from copier import Copier, prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.maps import AttentionMap
from workbench.probes.retrieval.copy_scores import Answer, beyond_induction, copied, even, recall_of, size_of
from workbench.probes.retrieval.copying import retrieval_heads

TOKENS = st.integers(0, 3)


@st.composite
def answers(draw):
    prompt = draw(st.lists(TOKENS, min_size=3, max_size=9))
    lo = draw(st.integers(0, len(prompt) - 1))
    hi = draw(st.integers(lo + 1, len(prompt)))
    written = draw(st.lists(TOKENS, min_size=1, max_size=6))
    keys = draw(
        st.lists(
            st.lists(st.integers(-1, len(prompt) + 2), min_size=4, max_size=4),
            min_size=len(written),
            max_size=len(written),
        )
    )
    return Answer(torch.tensor(prompt), (lo, hi), torch.tensor(written), torch.tensor(keys).view(-1, 2, 2))


def published(answer):
    """1 / |needle| at every step at which the largest weight lies in the needle, on the token that is written."""
    lo, hi = answer.span
    score = torch.zeros(answer.keys.shape[1:], dtype=torch.float64)
    for step, token in enumerate(answer.written.tolist()):
        for layer in range(score.shape[0]):
            for head in range(score.shape[1]):
                i = int(answer.keys[step, layer, head])
                if lo <= i < hi and int(answer.prompt[i]) == token:
                    score[layer, head] += 1 / (hi - lo)
    return score


def as_sets(answer):
    """|tokens that the head copied and that are the needle's| / |tokens of the needle|."""
    needle = set(answer.needle.tolist())
    score = torch.zeros(answer.keys.shape[1:], dtype=torch.float64)
    for layer, head in product(range(score.shape[0]), range(score.shape[1])):
        got = set()
        for step, token in enumerate(answer.written.tolist()):
            i = int(answer.keys[step, layer, head])
            if answer.span[0] <= i < answer.span[1] and int(answer.prompt[i]) == token:
                got.add(token)
        score[layer, head] = len(got & needle) / len(needle)
    return score


@settings(deadline=None)
@given(answers())
def test_both_forms_are_their_loops(answer):
    hits = answer.same & answer.on_needle
    for form, loop in (("published", published), ("unique", as_sets)):
        got = copied(hits, answer.written, size_of(answer, form), form)
        torch.testing.assert_close(got, loop(answer), atol=1e-12, rtol=0)
    assert copied(hits, answer.written, size_of(answer, "unique"), "unique").max() <= 1


@settings(deadline=None)
@given(answers())
def test_what_induction_cannot_explain_is_its_loop(answer):
    prompt, written = answer.prompt.tolist(), answer.written.tolist()
    lo, hi = answer.span
    counted = []
    for step, token in enumerate(written):
        standing = prompt[-1] if step == 0 else written[step - 1]
        places = [i for i in range(lo, hi) if prompt[i] == token]
        follows = [i for i in places if i and prompt[i - 1] == standing]
        if places and not follows:
            counted.append(step)
    total = {written[step] for step in counted}
    got = beyond_induction(answer)
    if not total:
        assert got.isnan().all()
        return
    for layer, head in product(range(2), range(2)):
        mine = {
            written[step]
            for step in counted
            if lo <= (i := int(answer.keys[step, layer, head])) < hi and prompt[i] == written[step]
        }
        assert float(got[layer, head]) == pytest.approx(len(mine) / len(total))


def test_even_looking_is_the_mean_over_all_ways_to_look():
    prompt, span, written = torch.tensor([1, 2, 2, 3, 1]), (1, 4), torch.tensor([2, 3, 2])
    rows = product(range(5), range(6), range(7))
    keys = torch.tensor(list(rows)).T.reshape(3, 1, -1)  # every head is one way to look
    answer = Answer(prompt, span, written, keys)
    for form in ("unique", "published"):
        every = copied(answer.same & answer.on_needle, written, size_of(answer, form), form)
        assert float(even(answer, form)) == pytest.approx(float(every.mean()), abs=1e-12)


def test_induction_copies_all_but_the_first_token():
    """After the first token a head that follows the repeat makes every copy; only the first one tells."""
    prompt, written = torch.tensor([9, 5, 6, 7, 8]), torch.tensor([5, 6, 7])
    retrieval, induction = torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3])
    answer = Answer(prompt, (1, 4), written, torch.stack([retrieval, induction], 1)[:, None])
    assert beyond_induction(answer).tolist() == [[1.0, 0.0]]
    assert copied(answer.same & answer.on_needle, written, 3, "unique").tolist() == [[1.0, pytest.approx(2 / 3)]]
    led = Answer(torch.tensor([9, 5, 6, 7, 9]), (1, 4), written, answer.keys)
    assert beyond_induction(led).isnan().all()


def test_recall_counts_every_token_as_often_as_it_occurs():
    assert recall_of(torch.tensor([5, 5, 5]), torch.tensor([5, 5, 6]), torch.tensor([-1])) == pytest.approx(2 / 3)
    assert recall_of(torch.tensor([4]), torch.tensor([5]), torch.tensor([4, -1])) == 1
    assert recall_of(torch.tensor([4]), torch.tensor([5]), torch.tensor([-1])) == 0


@pytest.mark.parametrize("needle", [(5, 6, 7), (5, 5, 6), (7, 7, 7, 7)])
@pytest.mark.parametrize("said", [lambda n: [*n, 49], lambda n: [*n, *n, 49], lambda n: [n[1], n[0], 3, n[0], 49]])
def test_a_sweep_gives_what_the_loop_gives(needle, said):
    """Prompt, decoding and maps run by hand: the largest weight of the last row at every step, and the loop above."""
    model, build = Copier(says=said), prompts(needle, n=2)
    pairs = build(16, 0.5, 3)
    result = retrieval_heads(model, 16, (0.5,), prompts=build, form="published", seed=3)
    for b, line in enumerate(pairs.clean.tolist()):
        text, written, keys = list(line), [], []
        for _ in range(50):
            maps = model.run(torch.tensor([text]), maps=_top1(), logits="last")
            token = int(maps.logits[0, -1].argmax())
            if token == 49:
                break
            keys.append([[int(m.dense()[0, h, -1].argmax()) for h in range(2)] for m in maps.maps.values()])
            written.append(token)
            text.append(token)
        answer = Answer(
            torch.tensor(line), tuple(pairs.spans["NEEDLE"][b].tolist()), torch.tensor(written), torch.tensor(keys)
        )
        torch.testing.assert_close(result.copied[b], published(answer), atol=1e-12, rtol=0)


def _top1():
    import workbench as wb

    return wb.capture(stats=("top1",))


def test_among_equal_weights_the_first_key_counts():
    row = torch.tensor([[[[0.1, 0.3, 0.3, 0.3]]]])
    assert AttentionMap.from_dense(row).topk(1).indices.item() == int(row.argmax()) == 1
