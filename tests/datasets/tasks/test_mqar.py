"""Multi-query associative recall: prompts with one question, and dense rows that ask every key."""

import pytest
import task_cases_symbolic as cases
import torch

import workbench as wb
from workbench.datasets.mqar import IGNORED, mqar_batch
from workbench.datasets.tokenizer import word_tokenizer
from workbench.errors import UnknownName, WorkbenchError


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.mark.parametrize("options", [options for name, options in cases.CASES if name == "mqar"])
def test_answers_follow_from_the_text_and_flip(options, tokenizer):
    pairs = wb.task("mqar", **options).build(1, tokenizer, 60)
    assert pairs.clean.shape[1] == options.get("length", 24) + 1
    for i, text in enumerate(pairs.texts):
        other = cases.DERIVE["mqar"](tokenizer.decode(pairs.corrupt[i], skip_special_tokens=True))
        wrong = set(tokenizer.convert_ids_to_tokens(pairs.wrong[i].tolist()))
        assert cases.DERIVE["mqar"](text) == {pairs.labels["value"][i]}
        assert other <= wrong
        assert (other == set()) == (options.get("corruption") == "keys")


def test_every_key_is_asked_once_more(tokenizer):
    pairs = wb.task("mqar", pairs=5, length=40).build(0, tokenizer, 50)
    for text in pairs.texts:
        row = text.split()
        keys, values, tail = row[:10:2], row[1:10:2], row[10:]
        assert all(tail.count(key) == 1 for key in keys)
        assert all(tail.index(key) % 2 == 0 for key in keys if key != tail[-1])
        assert not set(tail) & set(values)
    assert set(pairs.labels["pair"]) == set(range(5))


def test_gaps_follow_the_exponent(tokenizer):
    """With exponent 1 every slot is as likely; with .01 the first one has 1 / (1 + 1/2^.99 + ...) of the queries."""
    for exponent in (0.01, 1.0):
        pairs = wb.task("mqar", pairs=2, length=20, exponent=exponent).build(0, tokenizer, 600)
        first = sum(text.split()[4] in text.split()[:4:2] for text in pairs.texts) / 600
        weights = torch.arange(1.0, 8.0) ** (exponent - 1)
        p = (weights[0] / weights.sum()).item()
        assert abs(first - p) < 4 * (p * (1 - p) / 600) ** 0.5


def test_impossible_options_are_refused():
    for option in ({"pairs": 1}, {"pairs": 30}, {"pairs": 4, "length": 14}, {"exponent": 0.0}):
        with pytest.raises(WorkbenchError, match="got"):
            wb.task("mqar", **option)
    with pytest.raises(UnknownName, match="values, keys"):
        wb.task("mqar", corruption="swap")
    assert wb.task("mqar").contrast().corruption == "keys"
    for option in (
        {"length": 15},
        {"length": 14},
        {"pairs": 0},
        {"vocabulary": 63},
        {"vocabulary": 64},
        {"exponent": -1.0},
    ):
        with pytest.raises(WorkbenchError, match="got"):
            mqar_batch(2, torch.Generator(), **option)


@pytest.mark.parametrize(("length", "pairs", "vocabulary"), [(64, 4, 8192), (128, 8, 8192), (24, 6, 64)])
def test_dense_rows_against_a_dictionary(length, pairs, vocabulary):
    batch = mqar_batch(40, torch.Generator().manual_seed(0), pairs=pairs, length=length, vocabulary=vocabulary)
    assert batch.ids.shape == batch.labels.shape == (40, length)
    assert batch.ids.min() >= 0
    assert batch.ids.max() < vocabulary
    for ids, labels in zip(batch.ids.tolist(), batch.labels.tolist(), strict=True):
        held = dict(zip(ids[: 2 * pairs : 2], ids[1 : 2 * pairs : 2], strict=True))
        assert len(held) == len(set(held.values())) == pairs
        assert all(1 <= key < vocabulary // 2 <= value for key, value in held.items())
        assert labels[: 2 * pairs] == [IGNORED] * 2 * pairs
        for at in range(2 * pairs, length):
            assert labels[at] == held.get(ids[at], IGNORED)
            assert ids[at] not in held.values()
            assert ids[at] not in held or at % 2 == 0
        assert sum(label != IGNORED for label in labels) == pairs


def test_dense_rows_repeat_and_are_scored():
    one, two = (mqar_batch(8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.ids, two.ids)
    assert not torch.equal(one.ids, mqar_batch(8, torch.Generator().manual_seed(4)).ids)
    logits = torch.zeros(8, 64, 8192)
    logits.scatter_(2, one.labels.clamp(min=0)[..., None], 1.0)
    assert one.accuracy(logits) == 1
    row, at = one.asked.nonzero()[0]
    logits[row, at] = 0
    assert one.accuracy(logits) == pytest.approx(1 - 1 / (8 * 4))


def test_gaps_of_dense_rows_follow_the_exponent():
    for exponent in (0.01, 1.0):
        batch = mqar_batch(
            4000, torch.Generator().manual_seed(0), pairs=1, length=64, vocabulary=128, exponent=exponent
        )
        weights = torch.arange(1.0, 32.0) ** (exponent - 1)
        found = batch.asked[:, 2::2].float().mean(0)
        p = weights / weights.sum()
        assert ((found - p).abs() < 5 * (p * (1 - p) / 4000).sqrt()).all()
