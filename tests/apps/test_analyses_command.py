"""``workbench analyses`` and ``workbench analyse``: any analysis from the command line."""

import pytest

import workbench as wb
from workbench.probes.catalogue import GROUPS
from workbench.results import load_result

TEXT = "When Mary and John went to the store, John gave a ring to"


def test_all_analyses_are_listed_with_what_they_ask(workbench):
    rows = workbench("analyses", "--json").json["rows"]
    assert [row["name"] for row in rows] == list(wb.analyses())
    assert {row["group"] for row in rows} <= set(GROUPS)
    assert all(row["question"].endswith("?") for row in rows)
    some = workbench("analyses", "--group", "sinks", "--json").json["rows"]
    assert 0 < len(some) < len(rows)
    assert {row["group"] for row in some} == {"sinks"}


def test_one_analysis_tells_its_source_and_runs_its_example(workbench):
    got = workbench("analyses", "sinks", "--json").json
    assert "Gu et al." in got["from"]
    assert got["compared with"]
    assert got["example"]
    shown = workbench("analyses", "sinks", "--rows", "2").out
    assert "first 2 of" in shown
    assert "Shares of the keys" in shown


def test_an_analysis_of_maps_runs_on_a_model(workbench, model, tmp_path):
    got = workbench(
        "analyse", "sinks", model, "--text", TEXT, "--option", "epsilon=0.2", "--out", tmp_path / "r", "--json"
    )
    run = wb.load(model).run(TEXT, maps=wb.capture())
    want = wb.sinks(run, epsilon=0.2).frame()
    assert [row["share"] for row in got.json["rows"]] == pytest.approx(want["share"].tolist())
    assert load_result(tmp_path / "r").type == "SinkResult"
    assert got.json["provenance"]["model"] == "random"


def test_prompts_may_come_from_a_task(workbench, model):
    got = workbench("analyse", "sinks", model, "--task", "induction", "-n", "3", "--json").json
    assert all(row["error"] is not None for row in got["rows"] if row["key"] == 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("analyses", "nosuch"), "no analysis 'nosuch'; known: "),
        (("analyses", "--group", "nosuch"), "no group of analyses 'nosuch'; known: sinks"),
        (("analyse", "nosuch", "MODEL", "--text", TEXT), "no analysis 'nosuch'"),
        (("analyse", "sinks", "MODEL"), "give --text, --file or --task"),
        (("analyse", "sinks", "MODEL", "--text", TEXT, "--task", "ioi"), "got both"),
        (("analyse", "sinks", "MODEL", "--text", TEXT, "--option", "epsilom=1"), "no option of sinks 'epsilom'"),
        (("analyse", "sinks", "MODEL", "--text", TEXT, "--option", "epsilon=high"), "option epsilon"),
        (("analyse", "sinks", "MODEL", "--text", TEXT, "--option", "epsilon=2"), "between 0 and 1; got 2"),
        (("analyse", "sinks", "MODEL", "--text", TEXT, "--task-option", "n=1"), "--task-option belongs to --task"),
        (("analyse", "sinks", "nosuch-model", "--text", TEXT), "no bundled model 'nosuch-model'"),
    ],
)
def test_mistakes_are_one_line(workbench, model, words, said):
    assert said in workbench(*(model if word == "MODEL" else word for word in words)).mistake()
