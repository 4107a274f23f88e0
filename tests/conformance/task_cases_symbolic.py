"""Cases of the symbolic tasks, their answers derived again from the text, and the words under their spans.

``INSIDE``: the tasks that ask inside a prompt. Their ``DERIVE`` takes the text and the text up to and with the asked token.
``UNIFORM``: labels that are drawn evenly, with their values.
"""

import re
from fractions import Fraction

CASES = [
    ("reverse", {}),
    ("reverse", {"corruption": "one", "place": 5, "letters": 3}),
    ("sort", {}),
    ("sort", {"corruption": "one"}),
    ("sort", {"corruption": "one", "repeats": True, "length": 6, "letters": 4}),
    ("histogram", {}),
    ("histogram", {"corruption": "one", "length": 5}),
    ("frac-prevs", {}),
    ("frac-prevs", {"corruption": "one", "length": 10}),
    ("dyck", {}),
    ("dyck", {"corruption": "one", "length": 12}),
    ("addition", {}),
    ("addition", {"corruption": "problem", "digits": 2}),
    ("addition", {"corruption": "zero", "chain": True, "removed": 4}),
    ("multiplication", {}),
    ("multiplication", {"corruption": "problem", "chain": True, "removed": 40}),
    ("multiplication", {"corruption": "zero", "digits": 2, "k": 1}),
    ("multiplication", {"corruption": "operand", "digits": 3, "chain": True}),
    ("mqar", {}),
    ("mqar", {"corruption": "keys", "pairs": 3, "length": 17}),
    ("bursty", {}),
    ("bursty", {"corruption": "absent", "pairs": 6, "burst": 3}),
    ("regression", {}),
    ("regression", {"corruption": "scatter", "examples": 3}),
]


def _row(text):
    return re.findall(r"\S", text)


def _reverse(text, before):
    return {_row(text)[-len(_row(before))]}


def _sort(text, before):
    """The token with as many before it in order as stand before the asked place."""
    row, place = _row(text), len(_row(before)) - 1
    return {t for t in row if sum(u < t for u in row) <= place < sum(u <= t for u in row)}


def _histogram(text, before):
    return {str(text.count(_row(before)[-1]))}


def _frac_prevs(_, before):
    share = Fraction(before.count("x"), len(_row(before)))
    return {f"{min(99, int(100 * share + Fraction(1, 2))):02d}"}


def _dyck(_, before):
    """Pairs are struck out kind by kind; what is left over tells."""
    verdict = "balanced"
    for kind in ("()", "{}"):
        left = "".join(c for c in before if c in kind)
        while kind in left:
            left = left.replace(kind, "")
        if kind[1] in left:
            return {"broken"}
        verdict = "legal" if left else verdict
    return {verdict}


def _arithmetic(_, before):
    """The digit that follows those after the last ``=``, from whole numbers."""
    problem, emitted = before.split(":")[0].split("=")[0], before.split("=")[1]
    a, operator, b = re.fullmatch(r"([\d ]+?) ?([*+]) ?([\d ]+?) ?", problem).groups()
    a, b = (int("".join(reversed(x.replace(" ", "")))) for x in (a, b))
    whole = a * b if operator == "*" else a + b
    return {str(whole // 10 ** len(emitted.replace(" ", "")) % 10)}


def _mqar(text):
    """What follows the earliest place of the last word, if that word is the first of a pair."""
    row = text.split()
    first = row.index(row[-1])
    return {row[first + 1]} if first < len(row) - 1 and first % 2 == 0 else set()


def _bursty(text):
    """The label that every item of the last word's kind has."""
    *context, last = text.split()
    labels = {label for item, label in zip(context[::2], context[1::2], strict=True) if item == last}
    assert len(labels) <= 1
    return labels


def _regression(text):
    """The value of the one line through all points, by Cramer's rule, if there is one."""
    *points, query = re.findall(r"(\d\d) ?: ?(\d\d)?", text)
    (x0, y0), (x1, y1), *_ = points = [(int(x), int(y)) for x, y in points]
    slope = Fraction(y1 - y0, x1 - x0)
    on_it = all(y - y0 == slope * (x - x0) for x, y in points)
    return {f"{int(y0 + slope * (int(query[0]) - x0)):02d}"} if on_it else set()


INSIDE = ("reverse", "sort", "histogram", "frac-prevs", "dyck", "addition", "multiplication")

DERIVE = {
    "reverse": _reverse,
    "sort": _sort,
    "histogram": _histogram,
    "frac-prevs": _frac_prevs,
    "dyck": _dyck,
    "addition": _arithmetic,
    "multiplication": _arithmetic,
    "mqar": _mqar,
    "bursty": _bursty,
    "regression": _regression,
}

SPANS = {
    "reverse": {"ASKED": "asked", "SOURCE": "answer", "END": "asked"},
    "sort": {"ASKED": "asked", "SOURCE": "answer"},
    "histogram": {"ASKED": "asked"},
    "frac-prevs": {"ASKED": "asked"},
    "dyck": {"ASKED": "asked"},
    "addition": {"CHANGED": "changed"},
    "multiplication": {"CHANGED": "changed"},
    "mqar": {"KEY": "key", "VALUE": "value", "END": "key"},
    "bursty": {"MATCH": "item", "SOURCE": "label", "END": "item"},
    "regression": {"QUERY": "query"},
}

UNIFORM = {
    "reverse": {"place": range(8), "answer": "abcdef"},
    "sort": {"place": range(5)},
    "histogram": {"place": range(8), "asked": "abcd"},
    "dyck": {"place": range(8)},
    "addition": {"k": range(5)},
    "multiplication": {"k": range(8)},
    "mqar": {"pair": range(4)},
    "regression": {"slope": (-4, -3, -2, -1, 1, 2, 3, 4), "x": range(20)},
}
