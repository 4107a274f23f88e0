"""Tasks answered at every position: the drawn rows, the asked place, and what is asked inside a prompt at all."""

import random
from collections import Counter

import pytest
import task_cases_symbolic as cases
import torch

import workbench as wb
from workbench.datasets.pairs import Example, collect, in_split
from workbench.datasets.tasks.frac_prevs import percent
from workbench.datasets.tokenizer import SPECIAL, word_tokenizer
from workbench.errors import Refused, UnknownName, WorkbenchError

NAMES = ("reverse", "sort", "histogram", "frac-prevs", "dyck")


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.mark.parametrize(("name", "options"), [case for case in cases.CASES if case[0] in NAMES])
def test_answers_follow_from_the_text_and_flip(name, options, tokenizer):
    task = wb.task(name, **options)
    pairs = task.build(1, tokenizer, 60)

    def right_at(ids, p):
        texts = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids[: p + 1]))
        return cases.DERIVE[name](*texts)

    for i, p in enumerate(pairs.position.tolist()):
        ids, other = pairs.clean[i], pairs.corrupt[i]
        right = {tokenizer.convert_ids_to_tokens(pairs.answer[i, 0].item())}
        wrong = set(tokenizer.convert_ids_to_tokens(pairs.wrong[i].tolist()))
        assert p == pairs.labels["place"][i] + 1
        assert right == right_at(ids, p) == {pairs.labels["answer"][i]}
        assert right_at(other, p) <= wrong
        assert right | wrong == set(task.possible)
        if task.corruption == "one":
            assert (ids != other).sum() == 1


def test_published_examples():
    """Those of the doc strings of Tracr's library."""
    assert wb.task("reverse").answers("hello") == list("olleh")
    assert wb.task("histogram").answers("abac") == ["2", "1", "2", "1"]
    assert wb.task("sort", repeats=True).answers("2412") == ["1", "2", "2", "4"]
    assert wb.task("frac-prevs").answers("hexxo") == ["00", "00", "33", "50", "40"]
    assert wb.task("dyck").answers("({)}")[-1] == "balanced"
    assert wb.task("dyck").answers("(){)}")[-1] == "broken"


def test_shares_of_a_row_have_tokens_of_their_own_which_the_nearest_chooses():
    possible = [int(token) for token in wb.task("frac-prevs", length=10).possible]
    shares = {j / i for i in range(1, 11) for j in range(i + 1)}
    assert len(possible) == len(shares)
    for i in range(1, 11):
        for j in range(i + 1):
            f = 100 * j / i
            assert max(possible, key=lambda c: 2 * c * f - c * c) == int(percent(j, i))


@pytest.mark.parametrize(("name", "place"), [("reverse", 2), ("histogram", 3), ("frac-prevs", 4), ("dyck", 5)])
def test_answers_are_even(name, place, tokenizer):
    task, rng = wb.task(name, length=8, place=place), random.Random(0)
    found = Counter(task.answers(task.row(rng, place))[place] for _ in range(2000))
    possible = {"frac-prevs": {percent(j, place + 1) for j in range(place + 2)}}.get(name, set(task.possible))
    assert set(found) == possible
    assert max(found.values()) < 1.3 * 2000 / len(possible)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_split_stay_in_it(name):
    for split in ("train", "test"):
        task, rng = wb.task(name, split=split), random.Random(0)
        assert all(in_split(task.draw(rng).corrupt, split) for _ in range(50))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_its_own_needs_no_other_tokens(name):
    task = wb.task(name)
    small = word_tokenizer((*SPECIAL, *task.tokens))
    pairs = task.build(0, small, 40)
    assert len(small) == 3 + len(task.tokens)
    assert pairs.dropped == 0
    assert set(pairs.answer.unique().tolist()) <= set(small.convert_tokens_to_ids(list(task.possible)))


def test_impossible_options_are_refused():
    for name, option in (
        ("reverse", {"letters": 1}),
        ("reverse", {"letters": 9}),
        ("reverse", {"length": 0}),
        ("reverse", {"place": 8}),
        ("sort", {"length": 8}),
        ("histogram", {"length": 10}),
        ("histogram", {"length": 1}),
        ("frac-prevs", {"length": 11}),
        ("frac-prevs", {"letters": 0}),
        ("dyck", {"place": -1}),
    ):
        with pytest.raises(WorkbenchError, match="got|repeats=True"):
            wb.task(name, **option)
    with pytest.raises(UnknownName, match="resample, one"):
        wb.task("dyck", corruption="two")
    with pytest.raises(Refused, match="longer rows"):
        wb.task("histogram", length=2, letters=2, corruption="one", split="test").build(0, word_tokenizer(), 4)


def _ask(clean, corrupt, asked, answer=" c", wrong=" d"):
    return lambda rng: Example(clean, corrupt, (answer,), (wrong,), "key 1", {"A": (0, 1)}, asked=asked)


def _one(draw, tokenizer):
    return collect("asked", draw, seed=0, split="train", tokenizer=tokenizer, n=1)


def test_an_example_asks_inside_its_prompt(tokenizer):
    """Position and END are the last token of the asked range; the answer need not be what follows."""
    last, inside = (_one(_ask("a b c d", "b b c d", asked), tokenizer) for asked in (None, (2, 5)))
    assert last.position.tolist() == [4]
    assert inside.position.tolist() == [3]
    assert inside.spans["END"].tolist() == [[3, 4]]
    assert torch.equal(last.clean, inside.clean)
    assert torch.equal(last.answer, inside.answer)
    assert inside.answer.tolist() == [[tokenizer.convert_tokens_to_ids("c")]]
    whole = _one(_ask("a b c d", "b b c d", (0, 7)), tokenizer)
    assert torch.equal(whole.position, last.position)


def test_answers_inside_a_prompt_are_single_tokens_too(tokenizer):
    with pytest.raises(Refused, match="an answer that is not one token"):
        _one(_ask("a b c d", "b b c d", (2, 3), answer=" c d"), tokenizer)
