import json
import math
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import WorkbenchError
from workbench.jobs.job import Job
from workbench.jobs.spec import RESERVED, merged, read_bytes, read_grid

LEADERBOARD = """name: leaderboard
model: [tiny-softmax, compiled-ioi]
task: [ioi, induction]
probe: find_circuit
method: [eap, eap-ig]
seed: [0, 1]
"""


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def spec(text, name="spec.yaml"):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def refusal(source, **options):
    with pytest.raises(WorkbenchError) as found:
        read_grid(source, **options)
    assert "\n" not in str(found.value)
    return str(found.value)


# cells


def test_lists_multiply_in_the_order_written_the_last_one_fastest():
    grid = read_grid(spec(LEADERBOARD))
    assert grid.name == "leaderboard"
    said = [(job.model, job.task, job.args["method"], job.seed) for job in grid.jobs]
    assert len(said) == 16
    assert said[:5] == [
        ("tiny-softmax", "ioi", "eap", 0),
        ("tiny-softmax", "ioi", "eap", 1),
        ("tiny-softmax", "ioi", "eap-ig", 0),
        ("tiny-softmax", "ioi", "eap-ig", 1),
        ("tiny-softmax", "induction", "eap", 0),
    ]
    assert {job.probe for job in grid.jobs} == {"find_circuit"}


def test_what_is_one_value_and_what_is_several():
    text = "probe: sleep\nlengths: [[128, 192]]\nboth: [[1], [2, 3]]\nbox: {a: [1, 2]}\n"
    text += "task: [ioi, {name: needle, length: 192}]\n"
    jobs = read_grid(spec(text)).jobs
    assert [dict(job.args) for job in jobs[::2]] == [
        {"lengths": [128, 192], "both": both, "box": {"a": [1, 2]}} for both in ([1], [2, 3])
    ]
    assert [job.dict()["task"] for job in jobs[:2]] == ["ioi", {"name": "needle", "length": 192}]


TEXTS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029\ufffe\uffff"), max_size=8
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXTS,
    st.dictionaries(TEXTS, st.integers(0, 9), max_size=2),
    st.lists(st.integers(0, 9), max_size=2),
)
ARGUMENTS = st.dictionaries(
    st.sampled_from(["method", "top", "lr", "steps", "häuser"]),
    st.lists(VALUES, min_size=1, max_size=4, unique_by=lambda v: json.dumps(v, sort_keys=True)),
    max_size=4,
)


@settings(deadline=None, max_examples=60)
@given(arguments=ARGUMENTS, seeds=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3, unique=True))
def test_a_grid_is_the_product_of_its_lists_however_it_is_written(arguments, seeds):
    asked = {"probe": "x:y", **arguments, "seed": seeds}
    grid = read_grid(asked, name="spec")
    assert len(grid.jobs) == math.prod(map(len, arguments.values())) * len(seeds)
    assert len({job.key for job in grid.jobs}) == len(grid.jobs)
    assert [job.seed for job in grid.jobs][: len(seeds)] == seeds
    places = [[json.dumps(v, sort_keys=True) for v in values] for values in arguments.values()]
    order = [
        [
            at.index(json.dumps(job.dict()["args"][name], sort_keys=True))
            for name, at in zip(arguments, places, strict=True)
        ]
        for job in grid.jobs
    ]
    assert order == sorted(order)
    for name, text in {
        "spec.json": json.dumps(asked, indent="\t"),
        "wide.json": json.dumps(asked, ensure_ascii=False),
        "spec.yaml": json.dumps(asked, ensure_ascii=False, indent=2),
    }.items():
        assert read_grid(spec(text, name)).jobs == grid.jobs


def test_a_cell_that_is_asked_for_twice_is_one_cell_of_its_first_block():
    text = "probe: sleep\nseed: [0, 0, 1]\ngrids:\n  - {}\n  - seed: [1, 2]\n"
    grid = read_grid(spec(text))
    assert [job.seed for job in grid.jobs] == [0, 1, 2]
    assert [grid.lines[job.key] for job in grid.jobs] == ["spec.yaml:4", "spec.yaml:4", "spec.yaml:5"]


def test_python_lists_hold_mappings_and_jobs():
    job = Job("sleep", args={"seconds": 1})
    grid = read_grid([{"probe": "sleep", "seed": (1, 2)}, job, {"probe": "fail", "seed": range(3)}], name="mine")
    assert grid.name == "mine"
    assert [j.seed for j in grid.jobs] == [1, 2, 0, 0, 1, 2]
    assert grid.jobs[2] is job
    assert set(grid.lines.values()) == {""}
    assert grid.place(job, "seconds") == ""
    assert read_grid([job]).name == "grid"
    over = read_grid([job, {"probe": "sleep"}], overrides={"seed": [4, 5], "name": "n"})
    assert over.name == "n"
    assert [j.seed for j in over.jobs] == [4, 5, 4, 5]
    assert over.jobs[0].args == {"seconds": 1}


def test_no_result_depends_on_the_run_settings():
    with_run = read_grid(
        spec(LEADERBOARD + "run: {workers: 2, memory: 1.5GiB, timeout: 2.5, engine: ray, address: auto}\n")
    )
    assert with_run.jobs == read_grid(spec(LEADERBOARD)).jobs
    assert with_run.run == {"workers": 2, "memory": 3 * 2**29, "timeout": 2.5, "engine": "ray", "address": "auto"}


def test_merged_keeps_lines_and_makes_equal_jobs_one_cell():
    grid = read_grid(spec("probe: sleep\nseed: [0, 1]\n"))
    one = merged(grid, [Job("sleep", seed=7), Job("sleep", seed=7)])
    assert [job.seed for job in one.jobs] == [7]
    assert one.lines == {one.jobs[0].key: "spec.yaml:1"}


# blocks, extends, overrides, names


def test_blocks_are_laid_over_the_other_values():
    text = (
        "model: a\nseed: [0, 1]\nprobe: sleep\ngrids:\n  - seed: 5\n    x: 1\n  - model: [b, null]\n    probe: fail\n"
    )
    jobs = read_grid(spec(text)).jobs
    assert [(j.probe, j.model, j.seed, dict(j.args)) for j in jobs] == [
        ("sleep", "a", 5, {"x": 1}),
        ("fail", "b", 0, {}),
        ("fail", "b", 1, {}),
        ("fail", None, 0, {}),
        ("fail", None, 1, {}),
    ]


def test_a_spec_overrides_what_it_extends():
    spec(
        "name: base\nprobe: sleep\nseed: [0, 1]\nrows: 3\nrun: {workers: 4, threads: 2}\ngrids:\n  - rows: 4\n",
        "deep/base.yaml",
    )
    spec("extends: base.yaml\nseed: 9\nrun: {threads: null, attempts: 1}\n", "deep/middle.yaml")
    grid = read_grid(spec("extends: deep/middle.yaml\nseconds: [1, 2]\n", "top.yaml"))
    assert grid.name == "top"
    assert grid.run == {"workers": 4, "attempts": 1}
    assert [(j.seed, dict(j.args)) for j in grid.jobs] == [(9, {"rows": 4, "seconds": s}) for s in (1, 2)]
    assert grid.lines[grid.jobs[0].key] == "deep/base.yaml:7"
    other = read_grid(spec("extends: deep/middle.yaml\ngrids: [{rows: 5}, {rows: 6}]\n", "top.yaml"))
    assert [j.args["rows"] for j in other.jobs] == [5, 6]


def test_specs_that_extend_each_other_are_refused_with_the_chain():
    spec("extends: sub/b.yaml\n", "a.yaml")
    spec("probe: sleep\nextends: ../c.yaml\n", "sub/b.yaml")
    spec("extends: a.yaml\n", "c.yaml")
    chain = "a.yaml -> sub/b.yaml -> sub/../c.yaml -> sub/../a.yaml"
    assert refusal("a.yaml") == f"sub/../c.yaml:1: specs extend each other: {chain}"
    assert refusal(spec("extends: spec.yaml")) == "spec.yaml:1: specs extend each other: spec.yaml -> spec.yaml"


def test_mistakes_of_an_extended_spec_have_its_line():
    spec("probe: sleep\nseed: [0, x]\nmodel: 3\n", "base.yaml")
    assert refusal(spec("extends: base.yaml\nmodel: a\n")).startswith("base.yaml:2: seed of a job is")
    assert refusal(spec("extends: base.yaml\nseed: 1\n")).startswith("base.yaml:3: model of a job is a text; got 3")
    assert refusal(spec("extends: none.yaml")) == "spec.yaml:1: extends none.yaml, which is no file that can be read"
    for odd in ("a" * 5000, '"a\\0b"', "spec.yaml/x"):
        assert refusal(spec(f"extends: {odd}")).endswith("which is no file that can be read")
    assert "extends is the path of one spec; got a list" in refusal(spec("extends: [a.yaml, b.yaml]"))


def test_overrides_replace_values_in_all_blocks():
    text = "probe: sleep\nseed: [0, 1]\nmodel: a\ngrids:\n  - {seed: 3, rows: 1}\n  - {model: b}\n"
    grid = read_grid(spec(text), overrides={"seed": [7, 8], "rows": 2, "name": "other"})
    assert grid.name == "other"
    assert [(j.model, j.seed, j.args["rows"]) for j in grid.jobs] == [(m, s, 2) for m in "ab" for s in (7, 8)]
    assert grid.lines[grid.jobs[0].key] == "spec.yaml:5"
    assert grid.place(grid.jobs[0], "rows") == "override rows"
    assert refusal("spec.yaml", overrides={"seed": [-1]}).startswith("override seed: seed of a job")
    assert read_grid({"model": "a"}, overrides={"probe": "sleep"}).jobs == (Job("sleep", model="a"),)
    for name in ("run", "grids", "extends"):
        assert refusal("spec.yaml", overrides={name: {}}).startswith(f"{name} cannot be overridden")


def test_names_of_grids():
    assert read_grid(spec("probe: sleep", "a-b_c.1.yaml")).name == "a-b_c.1"
    assert read_grid("a-b_c.1.yaml", name="mine").name == "mine"
    assert read_grid({"probe": "sleep", "name": "x"}).name == "x"
    assert read_grid({"probe": "sleep"}).name == "grid"
    for bad in ("a/b", "''", "..", ".a", "-a", "2024", "[a]", "a" * 101, "ä", "null"):
        assert refusal(spec(f"probe: sleep\nname: {bad}\n")).startswith(
            "spec.yaml:2: a grid's name has 1 to 100 letters"
        )
    assert refusal(spec("probe: sleep", "my grid.yaml")).endswith("got 'my grid'; add name: to the spec")
    assert "got 'a b'" in refusal([{"probe": "sleep"}], name="a b")


# places


def test_every_value_has_its_place():
    text = """model:
  - a
  - b
grids:
  - probe: find_circuit
    method: [eap,
      eap-ig, eap,
      eap-ig]
    task:
      - ioi
      - name: needle
        length: 192
      - {name: mqar}
  - probe: sleep
    method: eap
"""
    grid = read_grid(spec(text))
    of = {(j.probe, j.model, j.task_name, j.args["method"]): j for j in grid.jobs}
    circuit = of["find_circuit", "b", "needle", "eap-ig"]
    at = {
        name: grid.place(circuit, name)
        for name in ("", "model", "method", "task", "task.length", "task.depth", "seed", "no")
    }
    assert at == {
        "": "spec.yaml:5",
        "model": "spec.yaml:3",
        "method": "spec.yaml:7",
        "task": "spec.yaml:11",
        "task.length": "spec.yaml:12",
        "task.depth": "spec.yaml:11",
        "seed": "spec.yaml:5",
        "no": "spec.yaml:5",
    }
    assert grid.place(of["find_circuit", "a", "mqar", "eap"], "task") == "spec.yaml:13"
    assert grid.place(of["sleep", "a", None, "eap"], "method") == "spec.yaml:15"
    assert grid.place(of["sleep", "a", None, "eap"]) == "spec.yaml:14"


def test_without_blocks_the_place_of_a_cell_is_its_probe():
    grid = read_grid(spec("# a remark\nname: x\nseed: 1\nprobe: sleep\n", "sub/spec.yaml"))
    assert set(grid.lines.values()) == {"sub/spec.yaml:4"}


# mistakes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\n", "1: no probe is named; add one"),
        ("seed: 1\ngrids:\n  - probe: sleep\n  - x: 1\n", "4: no probe is named"),
        ("probe:\n  - sleep\n  - 3\n", "3: probe of a job is a text; got 3; a text stands in quotes"),
        ("probe: null\n", "1: probe of a job is a text; got None"),
        ("probe: sleep\nmodel: [a, [b]]\n", "2: model of a job is a text; got ['b']"),
        (
            "probe: sleep\nrevision:\n  12345e7\n",
            "2: revision of a job is a text; got 123450000000.0; a text stands in quotes",
        ),
        ("probe: sleep\ndtype: true\n", "2: dtype of a job is a text; got True"),
        ("probe: sleep\nseed: [0,\n  -1]\n", "3: seed of a job is a whole number from 0 to 4294967295; got -1"),
        ("probe: sleep\nseed: 1.0\n", "2: seed of a job is a whole number"),
        ("probe: sleep\nseed: yes\n", "2: seed of a job is a whole number from 0 to 4294967295; got 'yes'"),
        ("probe: sleep\nseed: null\n", "2: seed of a job is a whole number"),
        ("probe: sleep\ntask:\n  - {length: 3}\n", "3: a task with options has a name"),
        ("probe: sleep\ntask: 3\n", "2: task of a job is a name"),
        ("probe: sleep\nseed: []\n", "2: seed is an empty list, which makes no cells"),
        ("probe: sleep\nargs: {seconds: 1}\n", "2: arguments of the probe stand beside the other keys"),
        ("probe: sleep\nmax steps: 1\n", "2: arguments of a probe are names such as method; got 'max steps'"),
        ("probe: sleep\ngrids: []\n", "2: grids is a list of blocks, each a mapping; got an empty list"),
        ("probe: sleep\ngrids: {seed: 1}\n", "2: grids is a list of blocks, each a mapping; got a mapping"),
        (
            "probe: sleep\ngrids:\n  - {}\n  - sleep\n",
            "4: a block of grids is a mapping, as in {task: ioi}; got 'sleep'",
        ),
        *(
            (f"probe: sleep\ngrids:\n  - seed: 1\n    {key}: x\n", f"4: {key} stands at the top level of a spec")
            for key in ("name", "extends", "grids", "run")
        ),
        ("probe: sleep\nrun: 3\n", "2: run maps settings to values, as in {workers: 2}; got 3"),
        (
            "probe: sleep\nrun:\n  worker: 3\n",
            "3: no setting of a run 'worker'; known: workers, engine, threads, timeout",
        ),
        *(
            (f"probe: sleep\nrun: {{{name}: {bad}}}\n", f"2: {name} of a run is ")
            for name, bads in {
                "workers": ("0", "1.5", "true", "two", "[1, 2]"),
                "threads": ("0",),
                "attempts": ("-1",),
                "timeout": ("0", "-1", "true", "soon"),
                "address": ("3", "''"),
            }.items()
            for bad in bads
        ),
        ("probe: sleep\nrun: {engine: slurm}\n", "2: no engine 'slurm'; known: local, ray"),
        *((f"probe: sleep\nrun: {{device: {bad}}}\n", "2: no device ") for bad in ("tpu", "0", "'cuda:0'", "[cpu]")),
        ("probe: sleep\nrun: {engine: [local]}\n", "2: no engine "),
        ("probe: sleep\nrun: {memory: 4}\n", "2: an amount of memory is a number and a unit"),
        (
            "probe: sleep\n" + "".join(f"x{i}: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]\n" for i in range(7)),
            "1: the grid has 10,000,000 cells, more than 1,000,000",
        ),
    ],
)
def test_mistakes_are_told_with_their_line(text, said):
    assert refusal(spec(text)).startswith(f"spec.yaml:{said}")


def test_mistakes_of_python_values_are_told_without_a_line():
    assert refusal({"probe": "sleep", "seed": {1}}).startswith("seed of a job is a whole number")
    assert refusal({"probe": "sleep", 3: 1}) == "names are texts; got 3"
    assert refusal({"probe": "sleep", "x": math.nan}) == "x: numbers of a job are finite; got nan"
    assert refusal({"probe": "sleep", "x": [object()]}).startswith("x: a job holds texts, numbers")
    assert refusal([{"probe": "sleep"}, {"probe": "sleep", "seed": -1}]).startswith("item 1 of the list: seed of a job")
    assert refusal([{"probe": "sleep"}, "sleep"]).startswith(
        "item 1 of the list: a grid is a list of mappings and jobs; got"
    )
    assert refusal([{"probe": "sleep", "run": {}}]).startswith("item 0 of the list: run stands at the top level")
    assert refusal([]) == "the grid has no cells: the list is empty"
    for odd in (None, 3, b"probe: sleep"):
        assert "a grid is read from the path of a spec" in refusal(odd)


def test_amounts_of_memory():
    said = {"4GB": 4 * 10**9, "512 MB": 512 * 10**6, "1.5gib": 3 * 2**29, "100B": 100, " 2KiB ": 2048, "1TB": 10**12}
    assert {text: read_bytes(text) for text in said} == said
    for bad in ("4", "GB", "-1GB", "4 apples", "0.1B", "0GB", "4GBit", "1e3MB", "", 4, None, "٣GB", "9" * 30 + "GB"):
        with pytest.raises(WorkbenchError, match="an amount of memory is"):
            read_bytes(bad)


def test_reserved_keys_are_those_that_are_documented():
    assert set(RESERVED) == {"name", "extends", "grids", "run", "model", "revision", "dtype", "task", "probe", "seed"}


def test_the_readme_example_reads_the_same_with_every_yaml_reader():
    grid = read_grid(spec(LEADERBOARD))
    assert read_grid(yaml.safe_load(LEADERBOARD)).jobs == grid.jobs
    assert os.listdir() == ["spec.yaml"]
