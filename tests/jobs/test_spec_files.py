import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import WorkbenchError
from workbench.jobs import spec_files
from workbench.jobs.spec_files import marked, read


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def reading(content, name="spec.yaml"):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return read(Path(name))


def refusal(content, name="spec.yaml"):
    with pytest.raises(WorkbenchError) as found:
        reading(content, name)
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        *(
            (text, text)
            for text in (
                "yes",
                "no",
                "on",
                "off",
                "Yes",
                "NO",
                "y",
                "n",
                "tRue",
                "nullish",
                "=",
                "eap-ig",
                "a:b",
                "1.2.3",
            )
        ),
        *((text, True) for text in ("true", "True", "TRUE")),
        *((text, False) for text in ("false", "False", "FALSE")),
        *((text, None) for text in ("null", "~", "Null", "NULL")),
        *(
            (text, json.loads(text))
            for text in ("0", "7", "-3", "1e-3", "1e5", "2.5E+3", "1.0", "-0.5", "9223372036854775807")
        ),
        ("+4", 4),
        (".5", 0.5),
        ("1.", 1.0),
        ("'1e-3'", "1e-3"),
        ('"010"', "010"),
        ("'2020-01-01'", "2020-01-01"),
        ('"true"', "true"),
        ("''", ""),
        ('"\\u00e9\\ud83d\\ude00"', "é😀"),
        ("|\n  two\n  lines", "two\nlines"),
        (">-\n  one\n  line", "one line"),
        ("! 12", 12),
    ],
)
def test_scalars_are_read_by_the_rules_of_yaml_1_2(written, read):
    value = reading(f"x: {written}").value["x"].value
    assert (value, type(value)) == (read, type(read))


@pytest.mark.parametrize(
    "written",
    ["010", "-007", "00.5", "0x1F", "0o17", "0b11", "1_000", "1_0.5", "1.5_0", "1:30", "12:30:45", "190:20:30.15", "2020-01-01",
     "2020-1-1", "2020-01-01T10:00:00Z", "2020-01-01 10:00:00"],
)  # fmt: skip
def test_what_versions_of_yaml_read_differently_is_refused(written):
    assert refusal(f"a: 1\nx:\n  - {written}\n") == (
        f"spec.yaml:3: versions of YAML read {written} differently; write a plain number such as 1000, or a text in quotes"
    )


@pytest.mark.parametrize(
    "written", [".inf", "-.Inf", "+.INF", ".nan", ".NaN", "NaN", "Infinity", "-Infinity", "inf", "nan", "1e999"]
)
def test_numbers_that_are_not_finite_are_refused(written):
    for text, name in ((f"a: 1\nx: {written}\n", "spec.yaml"), (f'{{"a": 1,\n"x": {written}}}', "spec.json")):
        said = refusal(text, name)
        assert said.startswith(f"{name}:2: numbers of a grid are finite; got {written}") or "not valid JSON" in said


@pytest.mark.parametrize("written", ["9223372036854775808", "-99999999999999999999", "9" * 5000])
def test_numbers_that_no_table_holds_are_refused(written):
    assert refusal(f"a: 1\nx: {written}\n").startswith("spec.yaml:2: whole numbers of a grid fit in 64 bits")
    assert refusal(f'{{"x":\n{written}}}', "spec.json").startswith(
        "spec.json:2: whole numbers of a grid fit in 64 bits"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: 1\nb: 2\na: 3\n", "spec.yaml:3: 'a' is given twice; first on line 1"),
        ("a: 1\n'a': 3\n", "spec.yaml:2: 'a' is given twice; first on line 1"),
        ("a:\n  - b: {c: 1,\n      c: 2}\n", "spec.yaml:3: 'c' is given twice; first on line 2"),
        ("a: 1\r\nb: 2\r\na: 3\r\n", "spec.yaml:3: 'a' is given twice; first on line 1"),
        ("a: 1\n1: 2\n", "spec.yaml:2: names are texts; got '1'"),
        ("a: 1\ntrue: 2\n", "spec.yaml:2: names are texts; got 'true'"),
        ("a: 1\n? [b]\n: 2\n", "spec.yaml:2: names are texts; got a list"),
        ("a: 1\n<<: {b: 2}\n", "spec.yaml:2: merge keys (<<) are not read; use extends: for another file"),
        ("a: 1\nb: !!python/object/apply:os.system ['exit']\n", "spec.yaml:2: tags are not read; got !!python/object/apply:os"),
        ("a: 1\nb: !!str 3\n", "spec.yaml:2: tags are not read; got !!str; put a text in quotes"),
        ("!!map {a: 1}\n", "spec.yaml:1: tags are not read; got !!map"),
        ("a: !mine {b: 1}\n", "spec.yaml:1: tags are not read; got !mine"),
        ("!!python/name:os.system a: 1\n", "spec.yaml:1: tags are not read; got !!python/name:os.system"),
        ("a: 1\nb: &x\n  - *x\n", "spec.yaml:2: an alias stands inside what it names"),
        ("&x\na: 1\nb: {c: *x}\n", "spec.yaml:3: an alias stands inside what it names"),
        ("a: *nothing\n", "spec.yaml:1: not valid YAML: found undefined alias 'nothing'"),
        ("a: 1\nb:\n", "spec.yaml:2: nothing stands here; write null for no value"),
        ("a: 1\nb:\n  -\n  - 1\n", "spec.yaml:3: nothing stands here"),
        ("a:\n\t- 1\n", "spec.yaml:2: not valid YAML: a tab stands where YAML takes spaces only"),
        ("a: 1\nb: {c: 1,\n\td: 2}\n", "spec.yaml:3: not valid YAML: a tab stands where YAML takes spaces only"),
        ("a: 1\nb: [1, 2\n", "spec.yaml:3: not valid YAML: expected ',' or ']', but got '<stream end>' while parsing a flow "
         "sequence, which begins on line 2"),
        ("a: b: c\n", "spec.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n b: 2\n", "spec.yaml:2: not valid YAML: "),
        ("a: 1\nb: 'x\n", "spec.yaml:3: not valid YAML: found unexpected end of stream while scanning a quoted scalar, which "
         "begins on line 2"),
        ("a: 1\n---\nb: 2\n", "spec.yaml:2: a spec is one document; a second one begins here"),
        ("%YAML 2.0\n---\na: 1\n", "spec.yaml:1: not valid YAML: found incompatible YAML document"),
        ("a: 1\nb: \"\\ud83d\"\n", "spec.yaml:2: '\\ud83d' holds half of a character"),
        ("- a: 1\n", "spec.yaml:1: a spec maps names to values, as in `probe: sleep`; got a list"),
        ("sleep\n", "spec.yaml:1: a spec maps names to values, as in `probe: sleep`; got 'sleep'"),
        ("''\n", "spec.yaml:1: a spec maps names to values"),
        *((nothing, "spec.yaml is empty") for nothing in ("", "\n\n", "# a remark\n", "---\n", "\ufeff")),
        (b"a: 1\nb: \xff\n", "spec.yaml:2: a spec is UTF-8 text; got byte 0xff"),
        ("a: 1\n".encode("utf-16"), "spec.yaml:1: a spec is UTF-8 text; got byte 0xff"),
        ("a: 1\nb: \0\n", "spec.yaml:2: a spec is text; got the character U+0000"),
        ("a: 1\nb: '\x1b[0m'\n", "spec.yaml:2: a spec is text; got the character U+001B; write it as an escape in quotes"),
        ("a: 1\nb: x\u2028y\n", "spec.yaml:2: a spec is text; got the character U+2028"),
        ("a: " + "[" * 5000, "spec.yaml is nested too deeply"),
        ("a: " + "{a: " * 5000, "spec.yaml is nested too deeply"),
    ],
)  # fmt: skip
def test_what_is_no_spec_is_refused_with_its_line(content, said):
    assert refusal(content).startswith(said)


def test_files_that_cannot_be_read(tmp_path):
    Path("folder.yaml").mkdir()
    for path, said in {
        "folder.yaml": "folder.yaml is a folder; a spec is a YAML or JSON file",
        "a" * 5000: f"cannot read '{'a' * 5000}': File name too long",
        "none.yaml": "cannot read 'none.yaml': No such file or directory",
        "a\0b": "cannot read 'a\\x00b': ",
        "spec.yaml/x.yaml": "cannot read 'spec.yaml/x.yaml': Not a directory",
    }.items():
        Path("spec.yaml").write_text("a: 1")
        with pytest.raises(WorkbenchError) as found:
            read(Path(path))
        assert str(found.value).startswith(said)


def test_aliases_are_laid_out_where_they_are_used():
    found = reading("a: &x [1, 2]\nb: *x\nc: &y {d: *x}\ne: [*y, *y]\n")
    assert found.plain() == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}, "e": [{"d": [1, 2]}] * 2}
    assert found.value["b"].at == "spec.yaml:2"
    assert found.value["b"].value[0].at == "spec.yaml:1"


def test_aliases_of_aliases_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(spec_files, "_MOST_VALUES", 10_000)
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert refusal("\n".join(lines)).endswith("the file holds more than 10,000 values once its aliases are laid out")


def test_values_stand_on_the_line_of_their_key_and_items_on_their_own():
    found = reading("# remark\na: 1\nb:\n  c:\n    2\n  d:\n    - 3\n    - [4,\n       5]\n")
    inner = found.value["b"].value
    assert found.at == "spec.yaml:2"
    assert {name: found.value[name].at for name in "ab"} == {"a": "spec.yaml:2", "b": "spec.yaml:3"}
    assert {name: inner[name].at for name in "cd"} == {"c": "spec.yaml:4", "d": "spec.yaml:6"}
    assert [item.at for item in inner["d"].value] == ["spec.yaml:7", "spec.yaml:8"]
    assert [item.at for item in inner["d"].value[1].value] == ["spec.yaml:8", "spec.yaml:9"]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
PRINTABLE = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029\ufffe\uffff"), max_size=10
)


def mappings(texts):
    scalars = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63) + 1, 2**63 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        texts,
    )
    values = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
        max_leaves=12,
    )
    return st.dictionaries(texts, values, min_size=1, max_size=4)


LAYOUTS = {
    "indent": st.sampled_from([None, 1, "\t", "\t \t"]),
    "separators": st.sampled_from([None, (",", ":"), (" ,\n", " :\t")]),
}


@settings(deadline=None, max_examples=80)
@given(value=mappings(TEXTS), layout=st.fixed_dictionaries(LAYOUTS))
def test_json_is_read_as_json(value, layout):
    assert reading(json.dumps(value, **layout), "spec.json").plain() == value


@settings(deadline=None, max_examples=80)
@given(value=mappings(PRINTABLE), layout=st.fixed_dictionaries(LAYOUTS))
def test_json_with_all_letters_is_read_as_json(value, layout):
    assert reading(json.dumps(value, ensure_ascii=False, **layout), "spec.json").plain() == value


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"a": 1,\n"a": 2}', "spec.json:2: 'a' is given twice; first on line 1"),
        ('{"a": 1,\n}', "spec.json:2: not valid JSON: "),
        ('{"a": 1}\n# remark', "spec.json:2: not valid JSON: Extra data"),
        ("a: 1\n", "spec.json:1: not valid JSON: "),
        ('{"a":\n"x\ty"}', "spec.json:2: not valid JSON: Invalid control character"),
        ("[1]", "spec.json:1: a spec maps names to values"),
        (" \n", "spec.json is empty"),
        ('{"a": ' + "[" * 5000, "spec.json is nested too deeply"),
        ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", "spec.json is nested too deeply"),
    ],
)
def test_a_json_file_holds_json(content, said):
    assert refusal(content, "spec.json").startswith(said)


def test_a_mark_at_the_beginning_of_a_file_is_no_part_of_it():
    assert reading("\ufeffa: 1", "spec.yaml").plain() == reading('\ufeff{"a": 1}', "spec.json").plain() == {"a": 1}


def test_marked_values_of_python_have_one_place():
    found = marked({"a": (1, [2]), "b": range(2), "c": "xy", "d": {}}, "here")
    assert found.plain() == {"a": [1, [2]], "b": [0, 1], "c": "xy", "d": {}}
    assert found.value["a"].value[1].at == "here"
