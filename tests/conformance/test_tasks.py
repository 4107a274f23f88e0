"""Every task of the catalogue, with every corruption, against answers derived again from the text alone.

The cases stand in ``task_cases.py`` and ``task_cases_symbolic.py``; a task without cases and a derivation fails here.
"""

from dataclasses import FrozenInstanceError, fields

import pytest
import task_cases as language
import task_cases_symbolic as symbolic
import torch
from scipy.stats import chisquare

import workbench as wb
from workbench.datasets.catalogue import task_type
from workbench.datasets.tokenizer import base_vocabulary, vocabulary, word_tokenizer
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.pairs import Task, accuracy

CASES = language.CASES + symbolic.CASES
DERIVE = language.DERIVE | symbolic.DERIVE
SPANS = language.SPANS | symbolic.SPANS
UNIFORM = language.UNIFORM | getattr(symbolic, "UNIFORM", {})
OUTSIDE = language.OUTSIDE | getattr(symbolic, "OUTSIDE", set())
ANSWERED = language.ANSWERED | set(symbolic.INSIDE) | getattr(symbolic, "ANSWERED", set())
CHOOSING = language.CHOOSING | getattr(symbolic, "CHOOSING", set())
N = 24
TRAIN, TEST = 64, 24


def _every_corruption():
    """The cases, and the first case of each task under all its corruptions."""
    first = dict(reversed(CASES))
    more = [(name, {**o, "corruption": c}) for name, o in first.items() for c in task_type(name).corruptions]
    named = {
        (name, *sorted({"corruption": task_type(name).corruption, **options}.items())): (name, options)
        for name, options in [*more, *CASES]
    }
    return list(named.values())


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module", params=_every_corruption(), ids=lambda c: "-".join([c[0], *map(str, c[1].values())]))
def case(request):
    """Name, options, and the pairs of seed 0."""
    name, options = request.param
    return name, options, wb.task(name, **options).build(0, word_tokenizer(), N)


def _words(tokenizer, ids):
    return {tokenizer.convert_ids_to_tokens(i) for i in ids.tolist() if i >= 0}


def derived(name, tokenizer, ids, position, text=None):
    """The answers that a prompt calls for."""
    text = tokenizer.decode(ids, skip_special_tokens=True) if text is None else text
    if name in symbolic.INSIDE:
        return DERIVE[name](text, tokenizer.decode(ids[: position + 1], skip_special_tokens=True))
    return DERIVE[name](text)


def test_every_task_is_covered():
    known = set(wb.tasks())
    assert {name for name, _ in CASES} == known
    assert set(DERIVE) == known
    assert set(SPANS) == known
    assert set(UNIFORM) | ANSWERED | {name for name, _ in OUTSIDE} <= known


def test_protocol_and_shapes(case, tokenizer):
    name, options, pairs = case
    task = wb.task(name, **options)
    assert isinstance(task, Task)
    assert task.name == name
    assert task.corruption in task.corruptions
    assert task_type(name).corruption == task.corruptions[0]
    assert len(pairs) == len(pairs.texts) == N
    assert pairs.clean.shape == pairs.corrupt.shape
    assert (pairs.clean != tokenizer.unk_token_id).all()
    assert (pairs.corrupt != tokenizer.unk_token_id).all()
    assert (pairs.clean[:, 0] == tokenizer.bos_token_id).all()
    assert (pairs.clean != pairs.corrupt).any(1).all()
    assert len({(*row, at) for row, at in zip(pairs.clean.tolist(), pairs.position.tolist(), strict=True)}) == N
    assert all(len(values) == N for values in pairs.labels.values())
    if name not in symbolic.INSIDE:
        assert (pairs.position == pairs.clean.shape[1] - 1).all()
    with pytest.raises(FrozenInstanceError):
        task.name = "other"


def test_answers_follow_from_the_text_and_change(case, tokenizer):
    name, options, pairs = case
    corruption = wb.task(name, **options).corruption
    inside = 0
    for i, text in enumerate(pairs.texts):
        right, wrong = _words(tokenizer, pairs.answer[i]), _words(tokenizer, pairs.wrong[i])
        position = int(pairs.position[i])
        corrupted = derived(name, tokenizer, pairs.corrupt[i], position)
        assert right == derived(name, tokenizer, pairs.clean[i], position, text)
        assert right.isdisjoint(wrong)
        assert right
        assert wrong
        assert corrupted != right
        inside += corrupted <= wrong
    assert inside == N if (name, corruption) not in OUTSIDE else inside < N


def test_same_seed_same_pairs(case, tokenizer):
    name, options, first = case
    again, other = (wb.task(name, **options).build(seed, tokenizer, N) for seed in (0, 1))
    for field in ("clean", "corrupt", "answer", "wrong", "position"):
        assert torch.equal(getattr(first, field), getattr(again, field))
    assert first.labels == again.labels
    assert first.texts != other.texts


def test_splits_are_disjoint(case, tokenizer):
    name, options, _ = case
    seen, held = (
        {text for seed in range(3) for text in wb.task(name, **options, split=split).build(seed, tokenizer, n).texts}
        for split, n in (("train", TRAIN), ("test", TEST))
    )
    assert seen.isdisjoint(held)


def test_metric_is_larger_for_the_answer(case, tokenizer):
    name, options, pairs = case
    task = wb.task(name, **options)
    rows, asked = torch.arange(N), pairs.position
    for chosen, sign in ((pairs.answer, 1), (pairs.wrong, -1)):
        logits = torch.zeros(*pairs.clean.shape, len(tokenizer))
        for column in chosen.T:
            logits[rows[column >= 0], asked[column >= 0], column[column >= 0]] = 9.0
        assert (task.metric(logits, pairs) * sign > 0).all()
        assert task.metric(logits, pairs).shape == (N,)
        assert (accuracy(logits, pairs) == (sign > 0)).all()


def test_spans_point_at_their_words(case, tokenizer):
    name, _, pairs = case
    assert pairs.spans["END"].tolist() == [[p, p + 1] for p in pairs.position.tolist()]
    for span, label in SPANS[name].items():
        for i, value in enumerate(pairs.labels[label]):
            where = pairs.spans[span][i] if span in pairs.spans else (-1, -1)
            at = tokenizer.convert_ids_to_tokens(pairs.clean[i, slice(*map(int, where))])
            assert at == ([] if value is None else [value])


@pytest.mark.parametrize("name", sorted(wb.tasks()))
def test_contrast_makes_negatives(name, tokenizer):
    options = next(options for known, options in CASES if known == name)
    task = wb.task(name, **options)
    negative = task.contrast()
    assert isinstance(negative, Task)
    assert negative.corruption in task.corruptions
    assert negative.contrast() == negative
    others = {field.name for field in fields(task)} - {"corruption"}
    assert all(getattr(negative, field) == getattr(task, field) for field in others)
    pairs = negative.build(0, tokenizer, N)
    assert pairs.clean.shape == pairs.corrupt.shape
    calls = [derived(name, tokenizer, ids, at) for ids, at in zip(pairs.corrupt, pairs.position.tolist(), strict=True)]
    assert all(calls) if name in ANSWERED else not any(calls)


@pytest.mark.parametrize("name", sorted(UNIFORM))
def test_labels_are_drawn_evenly(name, tokenizer):
    pairs = wb.task(name).build(0, tokenizer, 400)
    for label, values in UNIFORM[name].items():
        drawn = list(pairs.labels[label])
        assert set(drawn) <= set(values)
        assert chisquare([drawn.count(value) for value in values]).pvalue > 1e-3, (label, drawn)


@pytest.mark.parametrize("name", sorted(wb.tasks()))
def test_words_that_a_tokenizer_does_not_know_are_dropped_and_counted(name):
    task, known = wb.task(name), word_tokenizer()
    missing = sorted(_words(known, task.build(0, known, 8).clean[0, 1:]))[-1]
    poorer = word_tokenizer(tuple(token for token in vocabulary() if token != missing))
    reasons = "unknown to the tokenizer|single tokens"
    try:
        pairs = task.build(0, poorer, 8)
    except Refused:  # in every example, such as a word of the frame
        with pytest.raises(Refused, match=reasons):
            task.build(0, poorer, 8)
    else:
        assert (pairs.clean != poorer.unk_token_id).all()
        assert (pairs.corrupt != poorer.unk_token_id).all()
        assert pairs.dropped > 0 or name in CHOOSING
    with pytest.raises(Refused, match=reasons):
        task.build(0, word_tokenizer(base_vocabulary()[:3]), 8)


def test_drops_are_counted_one_by_one(tokenizer):
    """A tokenizer without one name: every example of the rounds drawn that has it is dropped, and no other."""
    from workbench.datasets.pairs import in_split, source

    task, n, missing = wb.task("ioi"), 64, "Mary"
    poorer = word_tokenizer(tuple(token for token in vocabulary() if token != missing))
    rng, seen, lost, kept = source("ioi", "train", 0), set(), 0, 0
    while kept < n:
        for example in (task.draw(rng) for _ in range(n + 16)):
            if example.clean not in seen and in_split(example.key, "train"):
                seen.add(example.clean)
                absent = missing in f"{example.clean} {example.corrupt}".replace(".", " ").replace(",", " ").split()
                lost, kept = lost + absent, kept + (not absent)
    pairs = task.build(0, poorer, n)
    assert pairs.dropped == lost > 0
    assert task.build(0, tokenizer, n).dropped == 0


def test_unknown_names_list_what_exists():
    with pytest.raises(UnknownName, match="ioi"):
        wb.task("ioy")
    with pytest.raises(WorkbenchError, match="corruption, order, split"):
        wb.task("ioi", corrupt="abc")
    for name in wb.tasks():
        for option in ("corruption", "split"):
            with pytest.raises(UnknownName):
                wb.task(name, **{option: "x"})


@pytest.mark.parametrize("name", sorted(wb.tasks()))
def test_impossible_requests_are_refused(name, tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(WorkbenchError, match="at least one"):
        wb.task(name).build(0, tokenizer, 0)
    with pytest.raises(Refused, match="fast tokenizer"):
        wb.task(name).build(0, Slow(), 4)
    with pytest.raises(WorkbenchError, match=f"task .{name}., option split: "):
        wb.task(name, split=3)
