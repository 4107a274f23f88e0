"""Every task with byte-level BPE tokenizers: one that knows its words, one that splits them, one that closes prompts."""

import re

import pytest
import task_cases as language
import task_cases_symbolic as symbolic
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import workbench as wb
from workbench.datasets.tasks.greater_than import CENTURIES, two_token_years
from workbench.datasets.tokenizer import vocabulary, word_tokenizer
from workbench.datasets.words import data
from workbench.errors import Refused

LANGUAGE = sorted(language.DERIVE)
YEARS = [text for _ in range(60) for century in CENTURIES for text in (f"{century}", f" {century}")]
NUMBERS = [f"{number:02d}" for number in range(100) for _ in range(9)]


def _bpe(size, texts, closing=False):
    """A tokenizer as GPT-2's: words with the space before them, digits in whatever pieces were frequent."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    inner.train_from_iterator([*texts, *YEARS, *NUMBERS], trainer)
    if closing:
        inner.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<end>")


def _answers():
    """Words that are answers or wrong tokens of language tasks, with their space."""
    known = word_tokenizer()
    for name in LANGUAGE:
        pairs = wb.task(name).build(0, known, 64)
        ids = {i for row in (*pairs.answer.tolist(), *pairs.wrong.tolist()) for i in row if i >= 0}
        yield from (f" {token}" for token in known.convert_ids_to_tokens(sorted(ids)))
    yield from (f" {word}" for text in wb.task("induction").build(0, known, 64).texts for word in text.split())
    yield from (f" {country}" for country, _ in data("country-capital")["capitals"])


@pytest.fixture(scope="module")
def whole():
    return _bpe(9000, [f" {word}" for word in vocabulary() for _ in range(3)])


@pytest.fixture(scope="module")
def closed():
    return _bpe(9000, [f" {word}" for word in vocabulary() for _ in range(3)], closing=True)


@pytest.fixture(scope="module")
def answers():
    return _bpe(2400, [word for word in set(_answers()) for _ in range(9)])


def _length(name):
    return {"length": 150} if name == "needle" else {}


@pytest.mark.parametrize("name", sorted(wb.tasks()))
def test_byte_level(name, whole):
    pairs = wb.task(name, **_length(name)).build(0, whole, 8)
    assert pairs.clean.shape == pairs.corrupt.shape
    for i, text in enumerate(pairs.texts):
        assert whole.decode(pairs.clean[i]) == text
        right = {whole.decode([t]).strip() for t in pairs.answer[i].tolist() if t >= 0}
        if name in symbolic.INSIDE:
            before = whole.decode(pairs.clean[i, : pairs.position[i] + 1])
            assert right == symbolic.DERIVE[name](text, before)
        else:
            assert right == (language.DERIVE | symbolic.DERIVE)[name](text)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", sorted(set(LANGUAGE) - {"greater-than"}))
def test_words_of_several_tokens_are_covered_whole(name, split, answers):
    pairs = wb.task(name, split=split, **_length(name)).build(0, answers, 6)
    for i, text in enumerate(pairs.texts):
        assert answers.decode(pairs.clean[i]) == text
        for span, label in language.SPANS[name].items():
            found = answers.decode(pairs.clean[i, slice(*pairs.spans[span][i].tolist())])
            assert found.strip(" (") == str(pairs.labels[label][i])
    if name not in ("ioi", "docstring", "induction"):
        assert any((where[:, 1] - where[:, 0] > 1).any() for where in pairs.spans.values())


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_tokenizer_that_cannot_express_the_answers_is_refused(name):
    bytes_only = _bpe(257, [])
    with pytest.raises(Refused, match="single tokens|one token"):
        wb.task(name).build(0, bytes_only, 8)


@pytest.mark.parametrize("name", sorted(set(wb.tasks())))
def test_a_tokenizer_that_closes_prompts_is_refused(name, closed):
    with pytest.raises(Refused, match="ends every prompt with '<end>'"):
        wb.task(name).build(0, closed, 8)


def test_years_are_those_that_the_tokenizer_splits(whole):
    """Counted again, year by year; numbers that are merged elsewhere make gaps, as in GPT-2's tokenizer."""
    merged = [" 1743", " 1801", " 1802", " 1699", " 154"]
    gaps = _bpe(9000, [f" {word}" for word in vocabulary() for _ in range(3)] + merged * 99)
    for tokenizer, missing in ((whole, {}), (gaps, {"17": 43, "16": 98, "15": 45})):
        found = two_token_years(tokenizer)
        for century, years in found.items():
            split = [
                year
                for year in range(100)
                if tokenizer.tokenize(f"in {century}{year:02d}")[-2:] == [f"\u0120{century}", f"{year:02d}"]
            ]
            assert list(years) == [year for year in split[1:-1] if 2 <= year <= 98]
        assert all(year not in found[century] for century, year in missing.items())
    assert set(two_token_years(word_tokenizer()).values()) == {tuple(range(2, 99))}
    assert set(two_token_years(whole)) == set(CENTURIES)
    assert set(two_token_years(gaps)) == set(CENTURIES) - {"18"}
    pairs = wb.task("greater-than").build(0, gaps, 48)
    years = [re.findall(r"\d+", text) for text in pairs.texts]
    assert all(year != "1743" and not year.startswith("18") for year, _ in years)
