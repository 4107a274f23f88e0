"""The word-level tokenizer: ids, specials, decoding, and what is on disk."""

import pytest
import torch

import workbench as wb
from workbench.datasets.corpus import count_pieces, filler_text
from workbench.datasets.tokenizer import base_vocabulary, load, pieces, save, vocabulary, word_tokenizer
from workbench.datasets.words import template, word_kinds, words
from workbench.errors import UnknownName

TEXTS = [
    "When Mary and John went to the store, John gave a ring to Mary.",
    "The war lasted from the year 1743 to the year 1799.",
    "Q: On the desk, you see a red mug, a blue pen, and a green book. What color is the pen?\nA: blue\n",
    'def load(self, size, name):\n"""old cloud\n: param size: small engine\n: param',
    "tower rope salt tower rope",
    "Question: what did they find in the royal box? Answer: honey.",
]


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def test_vocabulary_is_distinct_and_of_the_promised_size():
    tokens = vocabulary()
    assert len(set(tokens)) == len(tokens)
    base = base_vocabulary()
    assert 600 <= len(base) <= 1000
    assert tokens[: len(base)] == base
    assert len(tokens) <= 2500
    assert tokens[:3] == ("<bos>", "<pad>", "<unk>")


def test_every_word_of_every_list_is_one_token(tokenizer):
    for kind in word_kinds():
        for word in words(kind):
            assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
            assert tokenizer.convert_tokens_to_ids(word) != tokenizer.unk_token_id


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip(text, tokenizer):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.unk_token_id not in ids
    again = tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer(again)["input_ids"] == ids
    assert count_pieces(text) == len(pieces(text)) == len(ids) - 1


@pytest.mark.parametrize("name", sorted(wb.tasks()))
def test_decoded_prompts_are_readable_and_encode_to_the_same_ids(name, tokenizer):
    pairs = wb.task(name).build(0, tokenizer, 8)
    for i, text in enumerate(pairs.texts):
        decoded = tokenizer.decode(pairs.clean[i], skip_special_tokens=True)
        assert tokenizer(decoded)["input_ids"] == pairs.clean[i].tolist()
        assert "".join(decoded.split()) == "".join(text.split())
    assert tokenizer.decode(tokenizer(TEXTS[0])["input_ids"], skip_special_tokens=True) == TEXTS[0]
    assert tokenizer.decode(tokenizer(TEXTS[1])["input_ids"], skip_special_tokens=True) == TEXTS[1]


def test_unknown_words_become_unk(tokenizer):
    assert tokenizer("zyzzyva", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]


def test_padding_is_on_the_right_and_masked(tokenizer):
    both = tokenizer(["tower rope salt", "tower"], padding=True, return_tensors="pt")
    assert both["input_ids"][1, -1] == tokenizer.pad_token_id
    assert both["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_saved_tokenizer_is_the_same(tmp_path, tokenizer):
    again = load(save(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (again.bos_token, again.pad_token, again.unk_token) == ("<bos>", "<pad>", "<unk>")


def test_unknown_word_lists_and_templates_are_named():
    with pytest.raises(UnknownName, match="symbols"):
        words("symbol")
    with pytest.raises(UnknownName, match="needle"):
        template("needles")


def test_text_is_the_same_in_every_process():
    torch.manual_seed(5)
    assert filler_text(0, 12) == filler_text(0, 12)
    assert filler_text(0, 12) != filler_text(1, 12)
