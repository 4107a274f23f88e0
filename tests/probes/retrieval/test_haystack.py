import pytest
import torch
from copier import Copier
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import WorkbenchError
from workbench.probes.retrieval.haystack import haystack_prompts, locate_needle


@pytest.fixture
def words():
    from tokenizers import Tokenizer as Words
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    text = "the cat sat on a mat . it slept code is blue green ? Based content of book , Question : Answer what"
    vocab = {word: i for i, word in enumerate(["<unk>", "<bos>", *dict.fromkeys(text.split())])}
    tokenizer = Words(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<bos>")


def test_needles_of_your_own_are_put_between_sentences(words):
    model = Copier()
    model.tokenizer = words
    build = haystack_prompts(model, [("the code is blue .", "what is the code ?")], "the cat sat on a mat . it slept .")
    for depth in (0.0, 0.3, 1.0):
        pairs = build(50, depth, seed=1)
        assert pairs.clean.shape == pairs.corrupt.shape == (1, 50)
        (lo, hi), line = pairs.spans["NEEDLE"][0].tolist(), words.convert_ids_to_tokens(pairs.clean[0])
        assert line[0] == "<bos>"
        assert line[lo:hi] == ["the", "code", "is", "blue", "."]
        assert line[-1] == ":"
        assert line[lo - 1] in (".", "<bos>") or depth == 1.0
        assert "code" not in words.convert_ids_to_tokens(pairs.corrupt[0])[: hi + 5]
        assert {*pairs.answer[0].tolist()} == {*pairs.clean[0, lo:hi].tolist()}
    assert build(50, 0.0, 1).spans["NEEDLE"][0, 0] == 1
    deep = build(50, 1.0, 1)
    assert (
        deep.clean[0, int(deep.spans["NEEDLE"][0, 1]) :].tolist()
        == deep.corrupt[0, int(deep.spans["NEEDLE"][0, 1]) :].tolist()
    )


def test_unfit_needles_are_refused(words):
    model = Copier()
    model.tokenizer = words
    with pytest.raises(WorkbenchError, match="contains the needle already"):
        haystack_prompts(model, [("the cat sat", "?")], "the cat sat on a mat .")
    with pytest.raises(WorkbenchError, match="haystack is empty"):
        haystack_prompts(model, [("the code is blue .", "?")], " ")
    with pytest.raises(WorkbenchError, match="does not know every word of the needle 'the code is xyz'"):
        haystack_prompts(model, [("the code is xyz", "?")], "the cat")
    with pytest.raises(WorkbenchError, match="pairs"):
        haystack_prompts(model, [], "the cat")
    build = haystack_prompts(model, [("the code is blue .", "what is the code ?")], "the cat sat .")
    with pytest.raises(WorkbenchError, match="leave no room"):
        build(10, 0.5, 0)
    model.tokenizer = None
    with pytest.raises(WorkbenchError, match="no tokenizer"):
        haystack_prompts(model, [("a", "b")], "c")


FACTS = [
    ("the code is blue .", "what is the code ?", "blue"),
    ("the mat is green .", "what is the mat ?", "green"),
    ("a cat slept on it .", "Question what ?", "it"),
]


def text_of(words, ids, span):
    return words.convert_ids_to_tokens(ids[span[0] : span[1]].tolist())


def test_every_needle_may_have_a_haystack_of_its_own(words):
    model = Copier()
    model.tokenizer = words
    hays = [["the cat sat .", "it sat ."], ["a book of content ."]]
    pairs = haystack_prompts(model, FACTS[:2], hays)(60, 0.5, 0)
    first, second = (set(words.convert_ids_to_tokens(row[:40].tolist())) for row in pairs.clean)
    assert "sat" in first - second
    assert "content" in second - first
    assert [text_of(words, row, span) for row, span in zip(pairs.clean, pairs.spans["VALUE"], strict=True)] == [
        ["blue"],
        ["green"],
    ]
    assert text_of(words, pairs.clean[0], pairs.spans["NEEDLE"][0]) == ["the", "code", "is", "blue", "."]
    assert pairs.answer.tolist() == [[words.convert_tokens_to_ids("blue")], [words.convert_tokens_to_ids("green")]]
    with pytest.raises(WorkbenchError, match="got 1 lists for 2 needles"):
        haystack_prompts(model, FACTS[:2], [["the cat sat ."]])
    with pytest.raises(WorkbenchError, match="one haystack"):
        haystack_prompts(model, FACTS[:2], hays, together=True)


@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_together_only_the_question_changes(words, depth):
    model = Copier()
    model.tokenizer = words
    pairs = haystack_prompts(model, FACTS, "the cat sat . it sat . a book .", together=True)(120, depth, 1)
    assert pairs.clean.shape == (3, 120)
    values = [fact[2] for fact in FACTS]
    for i, row in enumerate(pairs.clean):
        others = [text_of(words, row, pairs.spans[f"OTHER.{j}"][i]) for j in range(2)]
        assert text_of(words, row, pairs.spans["VALUE"][i]) == [values[i]]
        assert others == [[value] for j, value in enumerate(values) if j != i]
    ends = pairs.spans["NEEDLE"][:, 1].max()
    assert (pairs.clean[:, :ends] == pairs.clean[0, :ends]).all()
    assert len({tuple(row.tolist()) for row in pairs.clean}) == 3
    for i, row in enumerate(pairs.corrupt):
        line = " ".join(words.convert_ids_to_tokens(row.tolist()))
        assert FACTS[i][0] not in line
        assert all(FACTS[j][0] in line for j in range(3) if j != i)


def test_an_answer_is_a_part_of_its_fact(words):
    model = Copier()
    model.tokenizer = words
    with pytest.raises(WorkbenchError, match="'green' is no part of the needle"):
        haystack_prompts(model, [("the code is blue .", "what ?", "green")], "the cat sat .")


def published_span(prompt, needle):
    """The authors' search, written out."""
    for i in range(len(prompt)):
        window = set(prompt[i : i + len(needle)])
        if len(window & set(needle)) / len(set(needle)) > 0.9:
            return i, i + len(needle)
    return -1, -1


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=30),
    st.lists(st.integers(0, 12), min_size=1, max_size=14),
    st.integers(0, 30),
    st.booleans(),
)
def test_needles_are_found_as_published(hay, needle, at, there):
    prompt = hay[:at] + needle + hay[at:] if there else hay
    lo, hi = published_span(prompt, needle)
    if lo < 0:
        with pytest.raises(WorkbenchError, match="was the needle encoded by the prompt's tokenizer"):
            locate_needle(torch.tensor(prompt), needle)
    else:
        assert locate_needle(torch.tensor(prompt), torch.tensor(needle)) == (lo, min(hi, len(prompt)))


def test_a_long_needle_may_be_found_a_token_early():
    """Eleven different tokens: ten of them are more than .9, as in the authors' search."""
    needle = list(range(11))
    assert locate_needle([99, 98, *needle, 97], needle) == (1, 12)
    assert locate_needle([99, 98, *needle, 97], needle, overlap=0.95) == (2, 13)
    assert locate_needle([99, 98, *needle[:10], 97], needle[:10]) == (2, 12)
    with pytest.raises(WorkbenchError, match="at least one token"):
        locate_needle([1], [])
