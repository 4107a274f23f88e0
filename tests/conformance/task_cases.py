"""Cases of the language tasks, their answers derived again from the text, and the words under their spans.

A derivation takes a text and gives the set of answers that it calls for, empty if it calls for none. ``UNIFORM`` names the
labels that are drawn evenly, with their values. ``OUTSIDE`` names corruptions after which the text calls for something that is
not among the wrong tokens, ``ANSWERED`` the tasks whose contrast still calls for an answer, ``CHOOSING`` those
that draw from the words that a tokenizer has, so that none need be dropped.
"""

import re

from workbench.datasets.words import data, words

CASES = [
    ("ioi", {}),
    ("ioi", {"order": "BABA"}),
    ("greater-than", {}),
    ("colored-objects", {}),
    ("colored-objects", {"shots": 0}),
    ("docstring", {}),
    ("docstring", {"corruption": "random_doc", "prefix": 1, "suffix": 2}),
    ("induction", {}),
    ("induction", {"length": 9}),
    ("needle", {"length": 96}),
    ("needle", {"length": 90, "corruption": "filler", "depth": 0.0, "distractors": 3}),
    ("needle", {"length": 60, "depth": 1.0, "distractors": 0}),
    ("gendered-pronoun", {}),
    ("agreement", {}),
    ("agreement", {"structure": "simple"}),
    ("agreement", {"structure": "within_rc"}),
    ("agreement", {"structure": "nounpp"}),
    ("agreement", {"structure": "nounpp", "corruption": "unmarked"}),
    ("hypernymy", {}),
    ("country-capital", {}),
    ("gender-bias", {}),
]


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
    return {colors[asked]} if asked in colors else set()


def _docstring(text):
    arguments = re.search(r"\(self, (.*?)\)", text).group(1).split(", ")
    told = re.findall(r": ?param (\w+):", text)
    places = [arguments.index(name) for name in told if name in arguments]
    follows = len(places) == len(told) and places == list(range(places[0], places[0] + len(told)))
    return {arguments[places[-1] + 1]} if follows else set()


def _induction(text):
    row = text.split()
    earlier = [i for i, word in enumerate(row[:-1]) if word == row[-1]]
    assert len(earlier) <= 1
    return {row[i + 1] for i in earlier}


def _needle(text):
    held = dict(re.findall(r"The (\w+) box holds (\w+)\.", text))
    asked = re.search(r"find in the (\w+) box\? Answer:$", text).group(1)
    return {held[asked]} if asked in held else set()


def _pronoun(text):
    table = data("gendered-pronoun")
    (first,) = re.findall(r"(?:So|That) (\w+) is ", text)
    return {pronoun for pronoun in table["pronouns"] if first in table[pronoun]}


def _agreement(text):
    """The subject is the noun after the last "the" if a clause ends there, else the one after the first."""
    table = data("agreement")
    nouns = re.findall(r"[Tt]he (\w+)", text)
    ends_with_noun = text.split()[-1] == nouns[-1]
    subject = nouns[-1] if " that " in text and ends_with_noun else nouns[0]
    pairs = table["people"] + table["things"]
    return {
        verb[number] for number in (0, 1) if any(subject == pair[number] for pair in pairs) for verb in table["verbs"]
    }


def _hypernymy(text):
    (word,) = re.findall(r", (\w+) and other$", text)
    (names,) = [kind["names"] for kind in data("hypernymy")["classes"].values() if word in kind["words"]] or [[]]
    return set(names)


def _country(text):
    (city,) = re.findall(r"(\w+),", text)
    return {country for country, capital in data("country-capital")["capitals"] if capital == city}


def _bias(text):
    table = data("gender-bias")
    who = re.match(r"The (\w+) ", text).group(1)
    return {
        pronoun
        for pronoun, person in zip(table["pronouns"], table["persons"], strict=True)
        if who == person or who in table[pronoun]
    }


DERIVE = {
    "ioi": _ioi,
    "greater-than": _greater_than,
    "colored-objects": _colored,
    "docstring": _docstring,
    "induction": _induction,
    "needle": _needle,
    "gendered-pronoun": _pronoun,
    "agreement": _agreement,
    "hypernymy": _hypernymy,
    "country-capital": _country,
    "gender-bias": _bias,
}

SPANS = {
    "ioi": {"IO": "io", "S1": "subject", "S2": "subject"},
    "greater-than": {"EVENT": "event", "XX1": "century", "XX2": "century"},
    "colored-objects": {"OBJECT": "object", "QUERY": "object"},
    "docstring": {"A_DEF": "a", "B_DEF": "b", "C_DEF": "c", "A_DOC": "a", "B_DOC": "b"},
    "induction": {},
    "needle": {"KEY": "key", "VALUE": "value", "QUERY": "key"},
    "gendered-pronoun": {"NAME": "name", "ROLE": "role"},
    "agreement": {"SUBJECT": "subject", "OTHER": "other"},
    "hypernymy": {"WORD": "word"},
    "country-capital": {"CITY": "city"},
    "gender-bias": {"WHO": "profession"},
}

UNIFORM = {
    "ioi": {"order": ("ABBA", "BABA"), "template": range(15)},
    "greater-than": {"year": range(2, 99), "century": [str(century) for century in range(11, 19)]},
    "colored-objects": {"slot": range(3)},
    "induction": {"period": range(12, 23)},
    "gendered-pronoun": {"pronoun": ("he", "she")},
    "agreement": {"number": ("singular", "plural"), "other_number": ("singular", "plural")},
    "gender-bias": {"pronoun": ("he", "she")},
}

OUTSIDE = {("ioi", "io_random"), ("greater-than", "start_01")}
ANSWERED = {"greater-than"}
CHOOSING = {"induction", "mqar"}
