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


def test_an_analysis_of_one_map_takes_the_layer_that_is_named(workbench, model):
    got = workbench("analyse", "waad", model, "--text", TEXT, "--layer", "1", "--json").json
    want = wb.waad(wb.load(model).run(TEXT, maps=wb.capture()).maps[1])
    assert [row["value"] for row in got["rows"]] == pytest.approx(want.flatten().tolist())
    said = workbench("analyse", "waad", model, "--text", TEXT).mistake()
    assert "looks at one map: choose it with --layer, one of 0, 1" in said


def test_a_run_reads_what_the_analysis_needs(workbench, model):
    got = workbench("analyse", "sink-levels", model, "--text", TEXT, "--json").json
    assert got["analysis"] == "sink-levels"
    assert got["provenance"]["model"] == "random"


def test_a_model_that_makes_its_own_prompts_needs_no_text(workbench):
    got = workbench(
        "analyse", "head-scores", "tiny-softmax", "--option", "batches=1", "--option", "sequences=2", "--json"
    )
    assert {row["kind"] for row in got.json["rows"]} >= {"previous", "induction"}


def test_options_that_must_be_given_can_be_written(workbench, model):
    said = workbench("analyse", "eviction", model, "--text", TEXT).mistake()
    assert "eviction needs window: give --option window=..." in said
    got = workbench(
        "analyse", "eviction", model, "--text", TEXT, "--option", "window=6", "--option", "random=2", "--json"
    )
    assert got.json["rows"]
    said = workbench("analyse", "masking", model, "--text", TEXT).mistake()
    assert "masking needs result, which the command line cannot make; call workbench.probes.retrieval.masking" in said


@pytest.mark.parametrize("name", ["zeroable", "coding-rates", "layer-sharing-replaced", "sink-removal", "perturbation"])
def test_what_runs_a_model_takes_the_prompts_of_a_task(workbench, name):
    options = {
        "zeroable": ["counts=[1,2]", "random=1"],
        "layer-sharing-replaced": ["exchanges=[[1,0]]"],
        "sink-removal": ["random=1"],
        "perturbation": ["steps=24", "exchanges=1"],
    }.get(name, [])
    written = [word for option in options for word in ("--option", option)]
    assert workbench("analyse", name, "tiny-softmax", "--task", "induction", "-n", "2", *written, "--json").json["rows"]


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
