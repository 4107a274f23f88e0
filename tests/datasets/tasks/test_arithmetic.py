"""Addition and multiplication: the published row, the running sums, the chain that shrinks, and what a digit can act on."""

import random

import pytest
import task_cases_symbolic as cases
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.datasets.pairs import in_split
from workbench.datasets.tokenizer import word_tokenizer
from workbench.errors import UnknownName, WorkbenchError

NAMES = ("addition", "multiplication")
CHAIN = "5 5 5 6 1 + 0 0 6 4 9 0 ( 5 5 1 1 1 1 ) + 0 0 5 9 0 7 0 ( 5 5 6 0 2 8 0 ) + 0 0 0 0 6 4 9 0"
DIGITS = st.integers(2, 6).flatmap(lambda d: st.tuples(*[st.tuples(*[st.integers(0, 9)] * d)] * 2))


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def _value(digits):
    return int("".join(map(str, reversed(digits))))


def _lower(name, a, b, k):
    """What the places below k add up to."""
    if name == "addition":
        return a % 10**k + b % 10**k
    digits = [[int(digit) for digit in reversed(str(value))] for value in (a, b)]
    return sum(x * y * 10 ** (i + j) for i, x in enumerate(digits[0]) for j, y in enumerate(digits[1]) if i + j < k)


@pytest.mark.parametrize(("name", "options"), [case for case in cases.CASES if case[0] in NAMES])
def test_answers_follow_from_the_text_and_flip(name, options, tokenizer):
    task = wb.task(name, **options)
    pairs = task.build(1, tokenizer, 60)
    for i, p in enumerate(pairs.position.tolist()):
        for ids, stored in ((pairs.clean, pairs.answer), (pairs.corrupt, pairs.wrong)):
            texts = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[i], ids[i, : p + 1]))
            assert cases.DERIVE[name](*texts) == {tokenizer.convert_ids_to_tokens(stored[i, 0].item())}
        if task.corruption == "operand":
            changed = (pairs.clean[i] != pairs.corrupt[i]).nonzero().flatten()
            assert changed.tolist() == [pairs.spans["CHANGED"][i, 0].item()]
        a, b, k, total = (pairs.labels[label][i] for label in ("a", "b", "k", "sum"))
        assert total % 10 == int(pairs.labels["answer"][i]) == pairs.labels["digits"][i][k]
        assert pairs.labels["carry"][i] == _lower(name, a, b, k) // 10**k
        assert p == pairs.spans["EQUALS"][i, 0] + pairs.labels["k"][i]


def test_the_published_row_is_written():
    task = wb.task("multiplication", chain=True)
    a, b = (5, 6, 3, 2), (7, 4, 3, 4)
    assert task.render(a, b, a, b) == f"5 6 3 2 * 7 4 3 4 : {CHAIN} = 5 5 6 0 8 2 0"
    assert wb.task("multiplication").render(a, b, a, b) == "5 6 3 2 * 7 4 3 4 = 5 5 6 0 8 2 0"


@settings(max_examples=60, deadline=None)
@given(DIGITS)
def test_running_sums_give_the_digits_of_the_whole(operands):
    """The sums of analyses of multiplication: c_hat_k holds the columns from 0 to k, in units of 10^k."""
    a, b = operands
    for name, whole in (("addition", _value(a) + _value(b)), ("multiplication", _value(a) * _value(b))):
        task = wb.task(name, digits=len(a))
        sums, columns = task.running(a, b), task.columns(a, b)
        assert len(sums) == task.places
        for k, value in enumerate(sums):
            assert value == sum(c * 10**j for j, c in enumerate(columns[: k + 1])) // 10**k
            assert value % 10 == whole // 10**k % 10
        assert sums[-1] < 10


@settings(max_examples=60, deadline=None)
@given(DIGITS)
def test_the_chain_of_a_product_holds_its_partial_sums(operands):
    a, b = operands
    task = wb.task("multiplication", digits=len(a), chain=True)
    text = " ".join(task.thought(a, b))
    reached = 0
    for j, part in enumerate(text.split("+")):
        product, _, told = part.partition("(")
        reached += _value(product.split())
        assert _value(product.split()) == _value(a) * b[j] * 10**j
        assert not told or _value(told.rstrip(" )").split()) == reached
    assert reached == _value(a) * _value(b)


@settings(max_examples=60, deadline=None)
@given(DIGITS)
def test_the_chain_of_a_sum_holds_its_running_sums(operands):
    a, b = operands
    carried = 0
    for x, y, told in zip(a, b, " ".join(wb.task("addition", digits=len(a)).thought(a, b)).split(","), strict=True):
        assert _value(told.split()) == x + y + carried
        carried = (x + y + carried) // 10


@pytest.mark.parametrize("name", NAMES)
def test_the_chain_shrinks_from_the_left(name, tokenizer):
    whole = wb.task(name, chain=True).build(0, tokenizer, 8)
    tokens = len(wb.task(name, chain=True).thought((1,) * 4, (1,) * 4))
    for removed in (1, 5, tokens):
        some = wb.task(name, chain=True, removed=removed).build(0, tokenizer, 8)
        assert some.clean.shape[1] == whole.clean.shape[1] - removed
        for i in range(8):
            start = whole.spans["CHAIN"][i, 0].item()
            row = whole.clean[i].tolist()
            assert some.clean[i].tolist() == row[:start] + row[start + removed :]
        assert ("CHAIN" in some.spans) == (removed < tokens)


def test_low_digits_of_the_answer_do_not_see_high_digits():
    """The triangle: a_i and b_i act on c_k for k >= i only."""
    rng = random.Random(0)
    for name in NAMES:
        for k in range(3):
            task = wb.task(name, k=k)
            for _ in range(100):
                example = task.draw(rng)
                changed = next(
                    s for s, at in example.spans.items() if s[1:].isdigit() and at == example.spans["CHANGED"]
                )
                assert int(changed[1:]) <= k


@pytest.mark.parametrize("name", NAMES)
def test_problems_of_a_split_stay_in_it(name):
    for split in ("train", "test"):
        rng = random.Random(0)
        for corruption in ("operand", "zero"):
            task = wb.task(name, split=split, corruption=corruption)
            for _ in range(30):
                assert in_split(task.draw(rng).corrupt.split(" =")[0], split)


def test_every_digit_is_asked(tokenizer):
    pairs = wb.task("multiplication").build(0, tokenizer, 200)
    assert set(pairs.labels["k"]) == set(range(8))
    assert set(wb.task("addition", k=4).build(0, tokenizer, 20).labels["answer"]) == {"0", "1"}
    assert wb.task("addition").contrast().corruption == "zero"


def test_impossible_options_are_refused():
    for name, option, told in (
        ("multiplication", {"digits": 1}, "2 to 8 digits; got digits=1"),
        ("multiplication", {"k": 8}, "0 to 7; got k=8"),
        ("addition", {"k": 5}, "0 to 4; got k=5"),
        ("multiplication", {"removed": 1}, "0 to 0 tokens .* chain=False; got 1"),
        ("multiplication", {"removed": 47, "chain": True}, "0 to 46 tokens .* got 47"),
        ("addition", {"removed": 12, "chain": True}, "0 to 11 tokens"),
    ):
        with pytest.raises(WorkbenchError, match=told):
            wb.task(name, **option)
    with pytest.raises(UnknownName, match="operand, problem, zero"):
        wb.task("addition", corruption="digit")
