"""Filler and hidden facts: exact lengths, places and answers."""

import random
import re

import pytest

from workbench.datasets.corpus import count_pieces, filler_sentences, filler_text, hide, needle_text
from workbench.datasets.tokenizer import word_tokenizer
from workbench.errors import WorkbenchError


@pytest.mark.parametrize("tokens", [1, 2, 7, 63, 1000])
def test_filler_has_exactly_the_asked_length(tokens):
    tokenizer = word_tokenizer()
    ids = tokenizer(filler_text(3, tokens), add_special_tokens=False)["input_ids"]
    assert len(ids) == tokens
    assert tokenizer.unk_token_id not in ids


def test_filler_holds_no_key_and_no_value():
    from workbench.datasets.words import words

    said = set(re.findall(r"\w+", filler_text(0, 5000)))
    assert said.isdisjoint(words("keys"))
    assert said.isdisjoint(words("values"))


@pytest.mark.parametrize("question", [True, False])
def test_long_needle_text(question):
    made = needle_text(0, tokens=8192, needles=3, question=question)
    tokenizer = word_tokenizer()
    assert len(tokenizer(made.text)["input_ids"]) == 8192
    assert [made.text[f.start : f.end] for f in made.facts] == [f.text for f in made.facts]
    held = dict(re.findall(r"The (\w+) box holds (\w+)\.", made.text))
    assert held == {f.key: f.value for f in made.facts}
    assert len(held) == 3
    assert made.text.endswith("Answer:") == question
    asked = re.search(r"in the (\w+) box\? Answer:$", made.text)
    assert (asked.group(1) == made.facts[0].key) if question else asked is None
    assert made.answer == f" {made.facts[0].value}"
    assert sorted(round(f.depth, 2) for f in made.facts) == pytest.approx([1 / 6, 1 / 2, 5 / 6], abs=0.01)


def test_needle_texts_differ_by_seed_only():
    assert needle_text(1, 300) == needle_text(1, 300)
    assert needle_text(1, 300) != needle_text(2, 300)


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_facts_stand_at_their_depth(depth):
    made = hide(random.Random(0), 500, [("royal", "honey", depth)], count_pieces)
    before = count_pieces(made.text[: made.facts[0].start])
    room = 500 - count_pieces(made.facts[0].text) - count_pieces(made.text[made.text.index("Question") :])
    assert abs(before / room - depth) < 13 / room
    assert made.facts[0].depth == pytest.approx(before / room)


def test_several_facts_may_share_a_place():
    made = hide(random.Random(0), 200, [("royal", "honey", 0.5), ("inner", "rice", 0.5)], count_pieces)
    assert count_pieces(made.text) == 200
    assert made.facts[0].end <= made.facts[1].start


def test_too_short_texts_are_refused():
    with pytest.raises(WorkbenchError, match="need"):
        needle_text(0, tokens=20)
    with pytest.raises(WorkbenchError, match="at least one"):
        filler_text(0, 0)


def test_filler_sentences_follow_another_count():
    def double(text):
        return 2 * count_pieces(text)

    assert sum(map(double, filler_sentences(random.Random(0), 200, double))) == 200
