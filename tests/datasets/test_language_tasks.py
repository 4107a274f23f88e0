"""What single language tasks promise beyond the conformance suite."""

import random
import re

import pytest

import workbench as wb
from workbench.datasets.tokenizer import word_tokenizer
from workbench.datasets.words import data, fill, words
from workbench.errors import WorkbenchError
from workbench.pairs import logit_difference

N = 24


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


def _draws(name, n=200, seed=0, **options):
    rng = random.Random(seed)
    return [wb.task(name, **options).draw(rng) for _ in range(n)]


def test_a_filled_frame_knows_its_places():
    text, places = fill("The {a} that the {b} sees, {a}", a="man", b="woman")
    assert text == "The man that the woman sees, man"
    assert text[slice(*places["b"])] == "woman"
    assert places["a"] == (29, 32)


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("ioi", ("io", "subject")),
        ("needle", ("key", "value")),
        ("docstring", ("a", "b", "c")),
        ("gendered-pronoun", ("name",)),
        ("hypernymy", ("word",)),
        ("country-capital", ("country",)),
        ("gender-bias", ("profession",)),
    ],
)
def test_splits_hold_different_facts(name, labels, tokenizer):
    options, n = ({"length": 64}, 150) if name == "needle" else ({}, 30)
    facts = []
    for split in ("train", "test"):
        pairs = wb.task(name, split=split, **options).build(0, tokenizer, n)
        facts.append({frozenset(pairs.labels[label][i] for label in labels) for i in range(n)})
    assert facts[0].isdisjoint(facts[1])


@pytest.mark.parametrize("structure", ["simple", "rc", "within_rc", "nounpp"])
def test_splits_of_agreement_hold_different_subjects_in_either_number(structure):
    lemma = {form: pair[0] for kind in ("people", "things") for pair in data("agreement")[kind] for form in pair}
    held = {
        split: {
            lemma[s]
            for s in wb.task("agreement", structure=structure, split=split)
            .build(0, word_tokenizer(), N)
            .labels["subject"]
        }
        for split in ("train", "test")
    }
    assert held["train"].isdisjoint(held["test"])


def test_spans_and_order_within_a_prompt(tokenizer):
    """What no label says: which of two equal words a span means, and which spans stand side by side."""
    for name, options in (
        ("ioi", {}),
        ("docstring", {}),
        ("greater-than", {}),
        ("colored-objects", {}),
        ("induction", {}),
        ("needle", {"length": 90}),
    ):
        pairs = wb.task(name, **options).build(0, tokenizer, N)
        for i in range(N):
            right = tokenizer.convert_ids_to_tokens([t for t in pairs.answer[i].tolist() if t >= 0])
            span = {key: where[i].tolist() for key, where in pairs.spans.items()}
            at = {key: tokenizer.convert_ids_to_tokens(pairs.clean[i, slice(*where)]) for key, where in span.items()}
            if name == "ioi":
                assert span["S1"][0] < span["S2"][0]
            if name == "docstring":
                assert span["A_DEF"][0] < span["B_DEF"][0] < span["C_DEF"][0] < span["A_DOC"][0] < span["B_DOC"][0]
            if name == "greater-than":
                assert int(at["YY"][0]) == pairs.labels["year"][i]
                assert span["XX1"][1] == span["YY"][0] < span["XX2"][0]
            if name == "colored-objects":
                assert at["COLOR"] == right
                assert span["COLOR"][1] == span["OBJECT"][0]
            if name == "induction":
                assert at["MATCH"] == at["END"]
                assert span["MATCH"][1] == span["SOURCE"][0]
                assert at["SOURCE"] == right
            if name == "needle":
                assert " ".join(at["NEEDLE"]) == f"The {at['KEY'][0]} box holds {at['VALUE'][0]} ."
                assert at["QUESTION"][0] == "Question"


def test_spans_of_names_that_begin_alike_are_whole_words():
    """Dan and Daniel are both names."""
    seen = set()
    for example in _draws("ioi", 20_000):
        io, subject = example.labels["io"], example.labels["subject"]
        if not (io.startswith(subject) or subject.startswith(io)):
            continue
        seen.add((io, example.labels["order"]))
        first, second = (at.span() for at in re.finditer(rf"{subject}(?![a-z])", example.clean))
        (other,) = (at.span() for at in re.finditer(rf"{io}(?![a-z])", example.clean))
        assert example.spans == {"IO": other, "S1": first, "S2": second}
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("corruption", "changed", "left"),
    [
        ("s2_io_flip", {"S2"}, {1, 2}),
        ("abc", {"IO", "S1"}, {1}),
        ("s1_random", {"S1"}, {1}),
        ("s2_random", {"S2"}, {1}),
        ("io_random", {"IO"}, {1, 2}),
    ],
)
def test_corruptions_of_ioi_replace_the_names_they_say(corruption, changed, left, tokenizer):
    pairs = wb.task("ioi", corruption=corruption).build(0, tokenizer, N)
    for i in range(N):
        differs = (pairs.clean[i] != pairs.corrupt[i]).nonzero()[:, 0].tolist()
        assert differs == sorted(int(pairs.spans[name][i, 0]) for name in changed)
        found = [t for t in tokenizer.convert_ids_to_tokens(pairs.corrupt[i]) if t in words("names")]
        assert {found.count(name) for name in found} == left


def test_corruptions_of_docstring_are_those_of_its_source():
    """ACDC's generator: what stays of A, B, C in the signature and of A, B in the documentation."""
    stays = {
        "random_random": ("___", "__"),
        "random_doc": ("abc", "__"),
        "random_def": ("__c", "ab"),
        "random_answer": ("ab_", "ab"),
        "random_order": ("abc", "ba"),
    }
    assert tuple(stays) == wb.task("docstring").corruptions
    for corruption, (signature, documented) in stays.items():
        for example in _draws("docstring", 20, corruption=corruption):
            names = {example.labels[k]: k for k in "abc"}
            arguments = re.search(r"\(self, (.*?)\)", example.corrupt).group(1).split(", ")[2:5]
            told = re.findall(r":param (\w+):", example.corrupt)
            assert "".join(names.get(word, "_") for word in arguments) == signature
            assert "".join(names.get(word, "_") for word in told) == documented


def test_an_absent_object_occurs_nowhere():
    for example in _draws("colored-objects", corruption="absent", shots=4):
        asked = re.findall(r"What color is the (\w+)\?", example.corrupt)[-1]
        assert len(re.findall(rf"\b{asked}\b", example.corrupt)) == 1
    with pytest.raises(WorkbenchError, match="more than 4 shots"):
        wb.task("colored-objects", corruption="absent", shots=5)
    wb.task("colored-objects", shots=5)


@pytest.mark.parametrize(
    "name",
    sorted(
        set(wb.tasks())
        & {
            "ioi",
            "docstring",
            "induction",
            "colored-objects",
            "gendered-pronoun",
            "agreement",
            "hypernymy",
            "country-capital",
            "gender-bias",
        }
    ),
)
def test_clean_prompts_are_the_same_under_every_corruption(name):
    corruptions = wb.task(name).corruptions
    assert len({tuple(e.clean for e in _draws(name, corruption=c)) for c in corruptions}) == 1


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


def test_only_the_subject_of_agreement_changes(tokenizer):
    for structure, words_changed in (("simple", 1), ("rc", 1), ("within_rc", 1), ("nounpp", 1)):
        pairs = wb.task("agreement", structure=structure).build(0, tokenizer, N)
        differs = pairs.clean != pairs.corrupt
        assert (differs.sum(1) == words_changed).all()
        assert (differs.float().argmax(1) == pairs.spans["SUBJECT"][:, 0]).all()
        assert ("OTHER" in pairs.spans) == (structure != "simple")
        if structure != "simple":
            both = set(zip(pairs.labels["number"], pairs.labels["other_number"], strict=True))
            assert len(both) == 4, "the other noun is singular and plural with either subject"
        assert logit_difference(
            pairs.clean.new_zeros(N, pairs.clean.shape[1], len(tokenizer)).float(), pairs
        ).shape == (N,)


def test_lists_have_no_word_twice():
    table = data("hypernymy")
    listed = [word for kind in table["classes"].values() for word in kind["words"]] + table["unlisted"]
    assert len(set(listed)) == len(listed)
    for name, kinds in (("gendered-pronoun", ("he", "she")), ("gender-bias", ("he", "she", "neutral", "persons"))):
        both = [word for kind in kinds for word in data(name)[kind]]
        assert len(set(both)) == len(both)
    capitals = [word for pair in data("country-capital")["capitals"] for word in pair]
    assert len(set(capitals)) == len(capitals)
    forms = [form for kind in ("people", "things", "verbs") for pair in data("agreement")[kind] for form in pair]
    assert len(set(forms + data("agreement")["unmarked"])) == len(forms) + len(data("agreement")["unmarked"])


def test_some_facts_that_are_known():
    capitals = {city: country for country, city in data("country-capital")["capitals"]}
    known = {
        "Paris": "France",
        "Canberra": "Australia",
        "Ottawa": "Canada",
        "Nairobi": "Kenya",
        "Lima": "Peru",
        "Hanoi": "Vietnam",
    }
    assert {city: capitals[city] for city in known} == known


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("needle", {"depth": 1.5}),
        ("needle", {"distractors": -1}),
        ("needle", {"length": float("inf")}),
        ("needle", {"distractors": 1.5}),
        ("needle", {"depth": "0.5"}),
        ("induction", {"length": 2}),
        ("induction", {"length": True}),
        ("colored-objects", {"shots": -1}),
        ("colored-objects", {"shots": "1"}),
        ("docstring", {"prefix": -1}),
        ("agreement", {"structure": "relative"}),
    ],
)
def test_wrong_options_are_refused(name, option):
    with pytest.raises(WorkbenchError, match=next(iter(option))):
        wb.task(name, **option)


def test_a_needle_too_long_for_its_prompt_is_refused(tokenizer):
    with pytest.raises(WorkbenchError, match="need"):
        wb.task("needle", length=20).build(0, tokenizer, 4)


def test_pairs_are_taken_by_slices(tokenizer):
    pairs = wb.task("ioi").build(0, tokenizer, 4)
    assert pairs[1:3].texts == pairs.texts[1:3]
    assert pairs[3:].labels["io"] == pairs.labels["io"][3:]
    with pytest.raises(WorkbenchError, match=r"pairs\[i : i \+ 1\] for example i; got 2"):
        pairs[2]


@pytest.mark.parametrize(
    "name", ["agreement", "country-capital", "gender-bias", "gendered-pronoun", "hypernymy", "ioi"]
)
def test_nothing_is_dropped_where_every_word_is_one_token(name, tokenizer):
    for corruption in wb.task(name).corruptions:
        assert wb.task(name, corruption=corruption).build(0, tokenizer, 64).dropped == 0
