"""The catalogue of analyses: what a record must say, and that every module's records are found once."""

import sys
import types

import pytest

import workbench as wb
from workbench.errors import UnknownName, WorkbenchError
from workbench.probes import catalogue
from workbench.probes.catalogue import GROUPS, SOURCES, Analyses, Analysis, analyses


def answer(x=1):
    return x


def record(**options):
    given = dict(
        name="a-name",
        question="What?",
        function=answer,
        example=lambda: {"x": 3},
        paper="Someone 2024",
        source="maps",
        null="chance",
    )
    return Analysis(**{**given, **options})


def test_a_record_is_called_as_its_function():
    found = record()
    assert found() == 1
    assert found(5) == 5
    assert found(**found.example()) == 3
    assert found.call == f"{__name__}.answer"


@pytest.mark.parametrize(
    "wrong",
    [{"source": "rows"}, {"question": "What"}, {"question": ""}, {"paper": ""}, {"null": ""}],
    ids=lambda wrong: f"{next(iter(wrong))}={next(iter(wrong.values()))!r}",
)
def test_a_record_that_says_too_little_is_refused(wrong):
    with pytest.raises(WorkbenchError, match="a-name"):
        record(**wrong)


def test_a_name_that_is_none_lists_those_there_are():
    found = Analyses({"sinks": record(name="sinks")})
    assert list(found) == ["sinks"]
    assert len(found) == 1
    with pytest.raises(UnknownName, match="sinks"):
        found["sink"]
    assert "missing" not in found
    assert "sinks" in found


def test_all_records_are_in_a_group_and_unique():
    found = analyses()
    assert found is analyses()
    assert len(found) > 0
    places = [GROUPS.index(one.group) for one in found.values()]
    assert places == sorted(places)
    for name, one in found.items():
        assert one.name == name
        assert one.source in SOURCES
        assert f".probes.{one.group}." in one.function.__module__


def test_the_table_has_a_row_per_analysis_and_html():
    table = wb.analyses().frame()
    assert table["name"].tolist() == list(analyses())
    assert {"question", "call", "null", "cause", "paper", "definition"} <= set(table.columns)
    assert "<table" in analyses()._repr_html_()


def test_functions_that_are_called_exist_by_that_name():
    import importlib

    for one in analyses().values():
        module, name = one.call.rsplit(".", 1)
        assert getattr(importlib.import_module(module), name) is one.function


def test_two_of_one_name_are_refused(monkeypatch):
    module = types.ModuleType("workbench.probes.sinks.twice")
    module.ANALYSES = (record(name="twice"), record(name="twice"))
    monkeypatch.setitem(sys.modules, module.__name__, module)

    class Folder:
        def __truediv__(self, other):
            return self if other != "sinks" else Sinks()

        def glob(self, pattern):
            return []

    class Sinks(Folder):
        def glob(self, pattern):
            return [types.SimpleNamespace(stem="twice")]

    class Here:
        def __init__(self, path):
            self.parent = Folder()

    monkeypatch.setattr(catalogue, "Path", Here)
    monkeypatch.setattr(catalogue, "sorted", list, raising=False)
    with pytest.raises(WorkbenchError, match="two analyses are called 'twice'"):
        catalogue.analyses.__wrapped__()


def test_asking_for_an_analysis_that_is_not_there_is_no_error():
    known = wb.analyses()
    assert known.get("nosuch") is None
    assert known.get("nosuch", 3) == 3
    assert "nosuch" not in known
    assert known.get("sinks") is known["sinks"]
    with pytest.raises(UnknownName, match="no analysis 'nosuch'; known: "):
        known["nosuch"]
