"""Every task of the catalogue, with every corruption, against answers derived again from the text alone."""

import random
import re
from dataclasses import FrozenInstanceError

import pytest
import torch

import workbench as wb
from workbench.datasets.tokenizer import word_tokenizer
from workbench.datasets.words import words
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.pairs import Pairs, Task, accuracy

CASES = [
    ("ioi", {}),
    ("ioi", {"corruption": "abc"}),
    ("ioi", {"order": "BABA"}),
    ("greater-than", {}),
    ("colored-objects", {}),
    ("colored-objects", {"shots": 0}),
    ("docstring", {}),
    ("docstring", {"corruption": "random_doc", "prefix": 1, "suffix": 2}),
    ("docstring", {"corruption": "random_def"}),
    ("docstring", {"corruption": "random_answer"}),
    ("induction", {}),
    ("induction", {"length": 9}),
    ("needle", {"length": 96}),
    ("needle", {"length": 90, "corruption": "filler", "depth": 0.0, "distractors": 3}),
    ("needle", {"length": 60, "depth": 1.0, "distractors": 0}),
]
N = 24


def _ioi(text):
    names = [word for word in re.findall(r"\w+", text) if word in words("names")]
    once = [name for name in names if names.count(name) == 1]
    return set(once) if len(once) == 1 else set()


def _greater_than(text):
    century, year, again = re.search(r"from the year (\d\d)(\d\d) to the year (\d\d)$", text).groups()
    assert century == again
    return {f"{later:02d}" for later in range(100) if later > int(year)}


def _colored(text):
    scene, asked = re.findall(r"On the \w+, (.*?)\. What color is the (\w+)\?\nA:", text)[-1]
    colors = {thing: color for color, thing in re.findall(r"a (\w+) (\w+)", scene)}
    return {colors[asked]}


def _docstring(text):
    arguments = re.search(r"\(self, (.*?)\)", text).group(1).split(", ")
    told = re.findall(r":param (\w+):", text)
    places = [arguments.index(name) for name in told if name in arguments]
    follows = len(places) == len(told) and places == list(range(places[0], places[0] + len(told)))
    return {arguments[places[-1] + 1]} if follows else set()


def _induction(text):
    row = text.split()
    earlier = [i for i, word in enumerate(row[:-1]) if word == row[-1]]
    assert len(earlier) == 1
    return {row[earlier[0] + 1]}


def _needle(text):
    held = dict(re.findall(r"The (\w+) box holds (\w+)\.", text))
    asked = re.search(r"find in the (\w+) box\? Answer:$", text).group(1)
    return {held[asked]} if asked in held else set()


DERIVE = {
    "ioi": _ioi,
    "greater-than": _greater_than,
    "colored-objects": _colored,
    "docstring": _docstring,
    "induction": _induction,
    "needle": _needle,
}


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def case(request):
    name, options = request.param
    return name, wb.task(name, **options), wb.task(name, **options, split="test")


def _words(tokenizer, ids):
    return {tokenizer.convert_ids_to_tokens(i) for i in ids.tolist() if i >= 0}


def test_every_task_is_covered():
    assert {name for name, _ in CASES} == set(wb.tasks()) == set(DERIVE)


def test_protocol_and_shapes(case, tokenizer):
    name, task, _ = case
    pairs = task.build(0, tokenizer, N)
    assert isinstance(task, Task)
    assert task.name == name
    assert len(pairs) == len(pairs.texts) == N
    assert pairs.clean.shape == pairs.corrupt.shape
    assert (pairs.clean != tokenizer.unk_token_id).all()
    assert (pairs.clean[:, 0] == tokenizer.bos_token_id).all()
    assert (pairs.clean != pairs.corrupt).any(1).all()
    assert len({tuple(row) for row in pairs.clean.tolist()}) == N
    assert all(len(values) == N for values in pairs.labels.values())
    with pytest.raises(FrozenInstanceError):
        task.name = "other"


def test_answers_follow_from_the_text_and_flip(case, tokenizer):
    name, task, _ = case
    pairs = task.build(1, tokenizer, N)
    derive = DERIVE[name]
    for i, text in enumerate(pairs.texts):
        right, wrong = _words(tokenizer, pairs.answer[i]), _words(tokenizer, pairs.wrong[i])
        corrupted = derive(tokenizer.decode(pairs.corrupt[i], skip_special_tokens=True).replace(": param", ":param"))
        assert right == derive(text)
        assert right.isdisjoint(wrong)
        assert wrong
        assert corrupted != right
        if corrupted and name != "greater-than":
            assert corrupted <= wrong


def test_same_seed_same_pairs(case, tokenizer):
    _, task, _ = case
    first, again, other = (task.build(seed, tokenizer, N) for seed in (3, 3, 4))
    for field in ("clean", "corrupt", "answer", "wrong", "position"):
        assert torch.equal(getattr(first, field), getattr(again, field))
    assert first.texts != other.texts


def test_splits_are_disjoint(case, tokenizer):
    _, train, test = case
    seen = {text for seed in range(3) for text in train.build(seed, tokenizer, 64).texts}
    held = {text for seed in range(3) for text in test.build(seed, tokenizer, 64).texts}
    assert seen.isdisjoint(held)


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("ioi", lambda pairs, i: frozenset((pairs.labels["io"][i], pairs.labels["subject"][i]))),
        ("needle", lambda pairs, i: (pairs.labels["key"][i], pairs.labels["value"][i])),
        ("docstring", lambda pairs, i: (pairs.labels["a"][i], pairs.labels["b"][i], pairs.labels["c"][i])),
    ],
)
def test_splits_hold_different_facts(name, fact, tokenizer):
    options = {"length": 64} if name == "needle" else {}
    facts = []
    for split in ("train", "test"):
        pairs = wb.task(name, split=split, **options).build(0, tokenizer, 150)
        facts.append({fact(pairs, i) for i in range(len(pairs))})
    assert facts[0].isdisjoint(facts[1])


def test_metric_is_larger_for_the_answer(case, tokenizer):
    _, task, _ = case
    pairs = task.build(0, tokenizer, N)
    rows, last = torch.arange(N), pairs.position
    for chosen, sign in ((pairs.answer, 1), (pairs.wrong, -1)):
        logits = torch.zeros(*pairs.clean.shape, len(tokenizer))
        for column in chosen.T:
            logits[rows[column >= 0], last[column >= 0], column[column >= 0]] = 9.0
        assert (task.metric(logits, pairs) * sign > 0).all()
        assert task.metric(logits, pairs).shape == (N,)
        assert (accuracy(logits, pairs) == (sign > 0)).all()


SPANS = {
    "ioi": {"IO": "io", "S1": "subject", "S2": "subject"},
    "greater-than": {"EVENT": "event", "XX1": "century", "XX2": "century"},
    "colored-objects": {"OBJECT": "object", "QUERY": "object"},
    "docstring": {"A_DEF": "a", "B_DEF": "b", "C_DEF": "c", "A_DOC": "a", "B_DOC": "b"},
    "induction": {},
    "needle": {"KEY": "key", "VALUE": "value", "QUERY": "key"},
}


def test_spans_point_at_their_words(case, tokenizer):
    name, task, _ = case
    pairs = task.build(0, tokenizer, N)
    assert pairs.spans["END"].tolist() == [[p, p + 1] for p in pairs.position.tolist()]
    for i in range(N):
        at = {
            span: tokenizer.convert_ids_to_tokens(pairs.clean[i, slice(*where[i].tolist())])
            for span, where in pairs.spans.items()
        }
        for span, label in SPANS[name].items():
            assert at[span] == [pairs.labels[label][i]]
        if name == "ioi":
            assert pairs.spans["S1"][i, 0] < pairs.spans["S2"][i, 0]
        if name == "docstring":
            assert pairs.spans["A_DEF"][i, 0] < pairs.spans["A_DOC"][i, 0]
        if name == "greater-than":
            assert int(at["YY"][0]) == pairs.labels["year"][i]
        if name == "colored-objects":
            assert at["COLOR"] == list(_words(tokenizer, pairs.answer[i]))
            assert pairs.spans["COLOR"][i, 1] == pairs.spans["OBJECT"][i, 0]
        if name == "induction":
            assert at["MATCH"] == at["END"]
            assert pairs.spans["MATCH"][i, 1] == pairs.spans["SOURCE"][i, 0]
            assert at["SOURCE"] == list(_words(tokenizer, pairs.answer[i]))
        if name == "needle":
            assert " ".join(at["NEEDLE"]) == f"The {at['KEY'][0]} box holds {at['VALUE'][0]} ."
            assert at["QUESTION"][0] == "Question"


def test_spans_of_names_that_begin_alike_are_whole_words():
    """Dan and Daniel are both names."""
    task, rng, seen = wb.task("ioi"), random.Random(0), set()
    for _ in range(20_000):
        example = task.draw(rng)
        io, subject = example.labels["io"], example.labels["subject"]
        if not (io.startswith(subject) or subject.startswith(io)):
            continue
        seen.add((io, example.labels["order"]))
        first, second = (at.span() for at in re.finditer(rf"{subject}(?![a-z])", example.clean))
        (other,) = (at.span() for at in re.finditer(rf"{io}(?![a-z])", example.clean))
        assert example.spans == {"IO": other, "S1": first, "S2": second}
    assert len(seen) == 4


def test_needle_cannot_be_solved_by_induction(tokenizer):
    pairs = wb.task("needle", length=80).build(0, tokenizer, N)
    for i in range(N):
        before = pairs.clean[i, pairs.spans["VALUE"][i, 0] - 1]
        assert before not in pairs.clean[i, slice(*pairs.spans["QUESTION"][i].tolist())]


@pytest.mark.parametrize("length", [64, 127])
def test_needle_has_the_asked_length_and_depth(length, tokenizer):
    for depth in (0.0, 0.5, 1.0):
        pairs = wb.task("needle", length=length, depth=depth, distractors=0).build(0, tokenizer, 8)
        assert pairs.clean.shape == (8, length)
        start, question = pairs.spans["NEEDLE"][:, 0], pairs.spans["QUESTION"][:, 0]
        reached = (start - 1) / (question - 1 - 6)
        assert (reached - depth).abs().max() < 6 / (question.min() - 7) + 1e-6


def test_unknown_names_list_what_exists():
    with pytest.raises(UnknownName, match="ioi"):
        wb.task("ioy")
    with pytest.raises(WorkbenchError, match="corruption, order, split"):
        wb.task("ioi", corrupt="abc")
    for name, option in (("ioi", {"corruption": "x"}), ("docstring", {"corruption": "x"}), ("needle", {"split": "x"})):
        with pytest.raises(UnknownName):
            wb.task(name, **option)
    for name, option in (
        ("needle", {"depth": 1.5}),
        ("needle", {"distractors": -1}),
        ("induction", {"length": 2}),
        ("colored-objects", {"shots": -1}),
        ("docstring", {"prefix": -1}),
    ):
        with pytest.raises(WorkbenchError):
            wb.task(name, **option)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("needle", {"length": float("inf")}),
        ("needle", {"distractors": 1.5}),
        ("needle", {"depth": "0.5"}),
        ("induction", {"length": True}),
        ("colored-objects", {"shots": "1"}),
        ("ioi", {"split": 3}),
    ],
)
def test_options_of_another_type_are_refused(name, options):
    with pytest.raises(WorkbenchError, match=f"task .{name}., option {next(iter(options))}: "):
        wb.task(name, **options)


def test_impossible_requests_are_refused(tokenizer):
    with pytest.raises(WorkbenchError, match="at least one"):
        wb.task("ioi").build(0, tokenizer, 0)
    with pytest.raises(WorkbenchError, match="need"):
        wb.task("needle", length=20).build(0, tokenizer, 4)


@pytest.fixture(scope="module")
def byte_tokenizers():
    """Byte-level BPE in which the tasks' words are single tokens, one that splits them, one that splits all but the answers,
    and one that closes prompts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    texts = [f" {word}" for word in word_tokenizer().get_vocab() for _ in range(3)]

    kinds = ("names", "colors", "arguments", "symbols", "values")
    answers = [f" {word}" for kind in kinds for word in words(kind) for _ in range(9)]

    def made(size, closing=False, texts=texts):
        inner = Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        inner.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
        )
        pairs = [f"17{year:02d}" for year in range(100)]
        inner.train_from_iterator([*texts, *(f"{n:02d}" for n in range(100) for _ in range(9)), *pairs], trainer)
        if closing:
            inner.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
        return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<end>")

    return {
        "whole": made(4000),
        "split": made(300),
        "answers": made(1100, texts=answers),
        "closed": made(4000, closing=True),
    }


@pytest.mark.parametrize("name", ["ioi", "colored-objects", "docstring", "induction", "needle"])
def test_works_with_a_byte_level_tokenizer(name, byte_tokenizers):
    tokenizer = byte_tokenizers["whole"]
    pairs = wb.task(name).build(0, tokenizer, 8)
    assert pairs.clean.shape == pairs.corrupt.shape
    for i, text in enumerate(pairs.texts):
        assert tokenizer.decode(pairs.clean[i]) == text
        right = {tokenizer.decode([t]).strip() for t in pairs.answer[i].tolist() if t >= 0}
        assert right == DERIVE[name](text)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["ioi", "colored-objects", "docstring", "needle"])
def test_words_of_several_tokens_are_covered_whole(name, split, byte_tokenizers):
    tokenizer, options = byte_tokenizers["answers"], {"length": 140} if name == "needle" else {}
    pairs = wb.task(name, split=split, **options).build(0, tokenizer, 24)
    for i, text in enumerate(pairs.texts):
        assert tokenizer.decode(pairs.clean[i]) == text
        for span, label in SPANS[name].items():
            found = tokenizer.decode(pairs.clean[i, slice(*pairs.spans[span][i].tolist())])
            assert found.strip(" (") == str(pairs.labels[label][i])
    if name not in ("ioi", "docstring"):
        assert any((where[:, 1] - where[:, 0] > 1).any() for where in pairs.spans.values())


@pytest.mark.parametrize("name", sorted(wb.tasks()))
def test_refuses_a_tokenizer_that_cannot_express_it(name, byte_tokenizers):
    with pytest.raises(Refused, match="single tokens|one token"):
        wb.task(name).build(0, byte_tokenizers["split"], 8)


@pytest.mark.parametrize("name", sorted(set(wb.tasks()) - {"induction"}))
def test_refuses_a_tokenizer_that_closes_prompts(name, byte_tokenizers):
    options = {"length": 128} if name == "needle" else {}
    with pytest.raises(Refused, match="ends every prompt with '<end>'"):
        wb.task(name, **options).build(0, byte_tokenizers["closed"], 8)


def test_pairs_are_taken_by_slices(tokenizer):
    pairs = wb.task("ioi").build(0, tokenizer, 4)
    assert pairs[1:3].texts == pairs.texts[1:3]
    assert pairs[3:].labels["io"] == pairs.labels["io"][3:]
    with pytest.raises(WorkbenchError, match=r"pairs\[i : i \+ 1\] for example i; got 2"):
        pairs[2]


def test_drops_are_counted(byte_tokenizers):
    assert wb.task("ioi").build(0, word_tokenizer(), 16).dropped == 0
    assert isinstance(wb.task("docstring").build(0, byte_tokenizers["whole"], 8), Pairs)


def test_slow_tokenizers_are_refused():
    class Slow:
        is_fast = False

    for name in ("ioi", "needle"):
        with pytest.raises(Refused, match="fast tokenizer"):
            wb.task(name).build(0, Slow(), 4)
