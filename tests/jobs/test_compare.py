"""Comparisons against numbers worked out by hand, and refusals of everything that would be averaged unsaid."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import torch
from job_cells import sleepers, write_cell

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs.compare import Comparison, compare, differences
from workbench.jobs.job import Job
from workbench.jobs.store import JobStore
from workbench.results import load_result


@pytest.fixture(scope="module", autouse=True)
def no_fsync() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def write(
    store: JobStore, rows: Any, model: str = "m", seed: int = 0, probe: str = "p", task: Any = "ioi", **args: Any
) -> Job:
    """A cell with the table ``rows``; a number stands for one row of ``score``."""
    job = Job(probe, model, revision=f"of {model}", task=task, args=args, seed=seed)
    table = rows if isinstance(rows, pa.Table) else pa.table({"score": [rows]})
    write_cell(store, job, table, seconds=0.5 + seed, peak_bytes=100 * (seed + 1))
    return job


@pytest.fixture
def scores(store: JobStore) -> JobStore:
    table = {
        ("m", "a"): [1.0, 2.0, 6.0],
        ("m", "b"): [4.0, 4.0, 4.0],
        ("n", "a"): [0.5, math.nan, 0.5],
        ("n", "b"): [0.25, 0.5, 0.75],
    }
    for (model, method), values in table.items():
        for seed, value in enumerate(values):
            write(store, value, model, seed, method=method)
    return store


def test_means_deviations_and_the_best(scores: JobStore) -> None:
    found = compare(scores, value="score", columns="method", best="max")
    assert (found.labels, found.rows, found.groups) == (("a", "b"), ("model",), (("m",), ("n",)))
    assert found.mean.tolist() == [[3.0, 4.0], [0.5, 0.5]]
    assert found.sd.tolist() == [[pytest.approx(math.sqrt(7)), 0.0], [0.0, 0.25]]
    assert found.n.tolist() == [[3, 3], [2, 3]]
    assert found.winners == ("b", "a = b")
    assert found.frame().to_dict("records")[0] == {
        "model": "m",
        "a": 3.0,
        "b": 4.0,
        "best": "b",
        "a sd": pytest.approx(math.sqrt(7)),
        "b sd": 0.0,
        "a n": 3,
        "b n": 3,
    }
    assert compare(scores, value="score", columns="method", best="min").winners[0] == "a"
    plain = compare(scores, value="score", columns="method")
    assert "best" not in plain.frame()
    assert plain.winners == ("", "")


def test_other_groups(scores: JobStore) -> None:
    found = compare(scores, value="score", columns="model", rows=["method", "seed"], over=[], best="max")
    assert found.groups == tuple((method, seed) for method in ("a", "b") for seed in range(3))
    assert found.mean[1].tolist()[0] == 2.0
    assert math.isnan(found.mean[1].tolist()[1])
    assert found.winners[1] == "m"
    assert math.isnan(found.sd[0, 0])
    pooled = compare(scores, value="score", columns="method", over=["seed", "model"])
    assert (pooled.rows, pooled.groups, pooled.n.tolist()) == ((), ((),), [[5, 6]])
    assert pooled.mean[0, 0] == 2.0
    assert compare(scores, value="score", columns="seed", over=(), where={"model": "m", "method": "a"}).labels == (
        "0",
        "1",
        "2",
    )


def test_nothing_is_averaged_unsaid(scores: JobStore) -> None:
    with pytest.raises(
        WorkbenchError, match=r"also differ in model \(m, n\): name it in rows= or over=, or choose one by where="
    ):
        compare(scores, value="score", columns="method", rows=[])
    with pytest.raises(WorkbenchError, match=r"also differ in seed \(0, 1, 2\)"):
        compare(scores, value="score", columns="method", rows=["model"], over=[])
    with pytest.raises(WorkbenchError, match="model is named more than once"):
        compare(scores, value="score", columns="model", rows=["model"])


def test_arguments_that_only_some_have_stand_aside(store: JobStore) -> None:
    for task in ("ioi", "induction"):
        write(store, 1.0, task=task, method="eap")
        write(store, 2.0, task=task, method="eap-ig", steps=5)
    found = compare(store, value="score", columns="method", best="max")
    assert (found.rows, found.aside, found.mean.tolist()) == (("task",), ("steps",), [[1.0, 2.0], [1.0, 2.0]])
    write(store, 3.0, method="eap-ig", steps=10)
    found = compare(store, value="score", columns="method")
    assert (found.rows, found.aside) == (("task", "steps"), ())
    assert found.groups == (("induction", 5), ("induction", None), ("ioi", 5), ("ioi", 10), ("ioi", None))
    assert found.n.tolist() == [[0, 1], [1, 0], [0, 1], [0, 1], [1, 0]]


def test_a_setting_that_differs_with_the_compared_one_is_not_hidden(store: JobStore) -> None:
    write(store, 1.0, method="a", steps=5)
    write(store, 2.0, method="b", steps=10)
    assert compare(store, value="score", columns="method").groups == ((5,), (10,))


def test_a_second_revision_of_a_model_is_told_apart(store: JobStore) -> None:
    write(store, 1.0, method="a")
    write_cell(store, Job("p", "m", "other", "ioi", {"method": "a"}), pa.table({"score": [3.0]}))
    assert compare(store, value="score", columns="method").rows == ("revision",)
    with pytest.raises(WorkbenchError, match="also differ in revision"):
        compare(store, value="score", columns="method", rows=["model"])


def heads(*values: float | None) -> pa.Table:
    return pa.table({"layer": [0, 0, 1, 1][: len(values)], "head": [0, 1, 0, 1][: len(values)], "score": list(values)})


def test_several_rows_per_cell(store: JobStore) -> None:
    write(store, heads(1.0, 2.0, 3.0, None), method="a")
    write(store, heads(5.0, 5.0, 5.0, 9.0), method="b")
    with pytest.raises(
        WorkbenchError, match=r"cell \w{12} has 4 rows of score: say reduce= one of mean, median.*rows="
    ):
        compare(store, value="score", columns="method")
    with pytest.raises(WorkbenchError, match="has 2 rows of score"):
        compare(store, value="score", columns="method", rows=["layer"])
    wanted = {"mean": [2.0, 6.0], "median": [2.0, 5.0], "min": [1.0, 5.0], "max": [3.0, 9.0], "sum": [6.0, 24.0]}
    for reduce, numbers in wanted.items():
        found = compare(store, value="score", columns="method", reduce=reduce)
        assert (found.mean.tolist(), found.n.tolist()) == ([numbers], [[1, 1]])
    found = compare(store, value="score", columns="method", rows=["layer", "head"])
    assert found.groups == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert found.mean[:, 1].tolist() == [5.0, 5.0, 5.0, 9.0]
    assert found.n[:, 0].tolist() == [1, 1, 1, 0]
    found = compare(store, value="score", columns="layer", rows=["method"], reduce="sum")
    assert found.mean.tolist() == [[3.0, 3.0], [10.0, 14.0]]
    nothing = pa.table({"layer": [0], "head": [0], "score": pa.array([None], pa.float64())})
    write(store, nothing, method="c")
    assert compare(store, value="score", columns="method", reduce="sum").n.tolist() == [[1, 1, 0]]


def test_time_and_memory_of_cells(store: JobStore) -> None:
    for seed in range(2):
        write(store, heads(1.0, 2.0), seed=seed, method="a")
    found = compare(store, value="seconds", columns="method")
    assert (found.mean.tolist(), found.n.tolist()) == ([[1.0]], [[2]])
    assert compare(store, value="peak_bytes", columns="seed", over=()).mean.tolist() == [[100.0, 200.0]]
    write(store, pa.table({"seconds": [7.0]}), probe="q", method="a")
    assert compare(store, value="seconds", columns="method", probe="q").mean.tolist() == [[7.0]]


def test_cells_of_other_probes_do_not_count_and_undefined_ones_are_seen(store: JobStore) -> None:
    write(store, 1.0, method="a")
    write(store, math.nan, method="b")
    write(store, pa.table({"loss": [1.0]}), probe="q", method="c", lr=0.1)
    found = compare(store, value="score", columns="method", best="max")
    assert (found.labels, found.n.tolist(), found.winners) == (("a", "b"), [[1, 0]], ("a",))


def test_truth_values_and_whole_numbers_are_numbers(store: JobStore) -> None:
    for seed, truth in enumerate([True, False, True, True]):
        write(store, pa.table({"right": [truth], "count": [seed]}), seed=seed, method=None if seed % 2 else "a")
    assert compare(store, value="right", columns="probe", over=("seed", "method")).mean.tolist() == [[0.75]]
    found = compare(store, value="count", columns="method")
    assert (found.labels, found.mean.tolist()) == (("a", "none"), [[1.0, 2.0]])


def test_infinite_numbers(store: JobStore) -> None:
    for seed, value in enumerate([math.inf, -math.inf, 1e308, 1e308]):
        write(store, value, seed=seed, method="a" if seed < 2 else "b")
    assert math.isnan(compare(store, value="score", columns="method").mean[0, 0])


def test_names_that_do_not_exist(scores: JobStore) -> None:
    write(scores, pa.table({"word": ["x"]}), probe="q", method="c")
    for words, said in (
        ({"value": "skore"}, "no result 'skore'; known: .*score.*seconds, peak_bytes; nearest: score"),
        ({"value": "word"}, "word is not a number: it holds 'x'"),
        ({"value": "seed"}, "seed is a setting of the jobs; compare a result: .*score"),
        ({"columns": "metod"}, "no column 'metod'; known: key, .*nearest: method"),
        ({"rows": ["nosuch"]}, "no column 'nosuch'"),
        ({"over": ["nosuch"]}, "no column 'nosuch'"),
        ({"best": "most"}, "no best 'most'; known: max, min"),
        ({"reduce": "avg"}, "no reduction 'avg'; known: mean, median"),
        ({"where": {"model": "zz"}}, "no model 'zz'; known: m, n"),
        ({"probe": "zz"}, "no probe with finished cells 'zz'; known: p, q"),
        ({"where": "seed > 77"}, "no finished cell that was chosen has a score"),
        ({"where": "nosuch > 77"}, "Binder Error"),
    ):
        with pytest.raises(WorkbenchError, match=said) as error:
            compare(scores, **{"value": "score", "columns": "method", **words})
        assert "\n" not in str(error.value)
        assert isinstance(error.value, UnknownName) == ("; known: " in str(error.value))


def test_it_is_a_result(scores: JobStore, tmp_path: Path) -> None:
    found = compare(scores, value="score", columns="method", best="max")
    ax = found.plot()
    assert [text.get_text() for text in ax.get_yticklabels()] == ["m", "n"]
    assert [line.get_label() for line in ax.containers] == ["a", "b"]
    read = load_result(found.save(tmp_path / "comparison"))
    assert read.type == "Comparison"
    assert torch.equal(read.tensors["mean"], found.mean)
    pd.testing.assert_frame_equal(read.frame(), found.frame())
    assert "<table" in found._repr_html_()


def test_names_of_columns_that_are_also_values() -> None:
    number = torch.ones(1, 2)
    found = Comparison(
        "x", "method", ("model", "best"), ("model",), (("m",),), number, number, number.long(), ("seed",), best="max"
    )
    assert list(found.frame().columns)[:4] == ["model", "method=model", "method=best", "best"]


# two stores


def pair(tmp_path: Path, ours: pa.Table, theirs: pa.Table) -> dict[str, Any]:
    first, second = JobStore(tmp_path / "1"), JobStore(tmp_path / "2")
    for store, table in ((first, ours), (second, theirs)):
        write_cell(store, sleepers(1)[0], table)
    return differences(first, second).iloc[0].to_dict()


def test_equal_stores_have_no_differences(tmp_path: Path) -> None:
    for name in "12":
        for job in sleepers(3):
            write_cell(JobStore(tmp_path / name), job, pa.table({"x": [math.nan, None, 0.1]}), seconds=float(name))
    found = differences(JobStore(tmp_path / "1"), JobStore(tmp_path / "2"))
    assert found.empty
    assert list(found.columns) == ["key", "title", "what", "column", "row", "first", "second"]


def test_cells_of_one_store_only(tmp_path: Path) -> None:
    jobs = sleepers(3)
    for name, chosen in (("1", jobs[:2]), ("2", jobs[1:])):
        for job in chosen:
            write_cell(JobStore(tmp_path / name), job)
    found = differences(JobStore(tmp_path / "1"), JobStore(tmp_path / "2")).set_index("key")
    assert found["what"].to_dict() == {jobs[0].key: "only in first", jobs[2].key: "only in second"}
    assert found["title"][jobs[2].key] == jobs[2].title


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({"x": [1.0, 2.0]}, {"x": [1.0, 2.0000000000000004]}, ("values", "x", 1, "2.0", "2.0000000000000004")),
        ({"x": [0.0]}, {"x": [-0.0]}, ("values", "x", 0, "0.0", "-0.0")),
        ({"y": ["b", "a"]}, {"y": ["b", None]}, ("values", "y", 1, "'a'", "None")),
        ({"l": [[1.0, math.nan], [0.0]]}, {"l": [[1.0, math.nan], [1.0]]}, ("values", "l", 1, "[0.0]", "[1.0]")),
        ({"x": [1]}, {"x": [1.0]}, ("types", "x", None, "int64", "double")),
        ({"x": [1]}, {"y": [1]}, ("columns", None, None, "x", "y")),
        ({"x": [1]}, {"x": [1, 2]}, ("rows", None, None, "1", "2")),
    ],
)
def test_the_first_difference(tmp_path: Path, ours: Any, theirs: Any, said: tuple[Any, ...]) -> None:
    found = pair(tmp_path, pa.table(ours), pa.table(theirs))
    told = [None if pd.isna(found[name]) else found[name] for name in ("what", "column", "row", "first", "second")]
    assert tuple(told) == said


def test_files_that_differ_in_nothing_that_is_read(tmp_path: Path) -> None:
    table = pa.table({"x": [1.0]})
    assert pair(tmp_path, table, table.replace_schema_metadata({"a": "b"}))["what"] == "bytes"
