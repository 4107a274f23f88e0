import pytest
from copier import Copier

from workbench.errors import WorkbenchError
from workbench.probes.retrieval.haystack import haystack_prompts


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
