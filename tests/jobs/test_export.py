"""What leaves a store: tables to the last bit, circuits in other tools' files, nothing half-written, nothing overwritten."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from job_cells import parquet, sleepers, write_cell

from workbench.circuits import Circuit, circuit_graph
from workbench.errors import UnknownName, WorkbenchError
from workbench.interchange import read_eap_json, read_graph_json
from workbench.jobs import export as exporting
from workbench.jobs import index
from workbench.jobs.export import export
from workbench.jobs.job import Job
from workbench.jobs.store import SAVED, JobStore

GRAPH = circuit_graph(2, 2)


@pytest.fixture(scope="module", autouse=True)
def no_fsync() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


def write_circuit(store: JobStore, job: Job, circuit: Circuit | None = None) -> None:
    kept = GRAPH.edges[job.seed : job.seed + 3]
    circuit = circuit or Circuit.of("edge", GRAPH.edges, kept, width=8, model=job.model)
    table = pa.Table.from_pandas(circuit.frame(), preserve_index=False)
    store.open_for_writing()
    with store.new_cell(job) as part:
        circuit.save(part / SAVED)
        store.finish(job, part, parquet(table), {})


def found(model: str = "m", task: Any = "ioi", method: str = "eap", seed: int = 0) -> Job:
    return Job("find_circuit", model, task=task, args={"method": method}, seed=seed)


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


# tables


@pytest.fixture
def table_store(store: JobStore) -> JobStore:
    chance = random.Random(3)
    for i in range(5):
        values = [struct.unpack("<d", chance.randbytes(8))[0] for _ in range(20)]
        texts = ['a "b", c\nd', None] * 10
        write_cell(store, Job("a", args={"n": i}, seed=i), pa.table({"x": values, "t": texts, "l": [[i], None] * 10}))
    return store


def test_parquet_is_the_frame(table_store: JobStore, tmp_path: Path) -> None:
    assert export(table_store, tmp_path / "new" / "t.parquet") == tmp_path / "new" / "t.parquet"
    read = pd.read_parquet(tmp_path / "new" / "t.parquet")
    wanted = index.frame(table_store)
    assert list(read.columns) == list(wanted.columns)
    assert read["x"].to_numpy().tobytes() == wanted["x"].to_numpy().tobytes()
    assert read["key"].tolist() == wanted["key"].tolist()
    assert [None if v is None else list(v) for v in read["l"]] == [None if v is None else list(v) for v in wanted["l"]]
    assert files(tmp_path / "new") == ["t.parquet"]


def test_csv_reads_back_to_the_last_bit(table_store: JobStore, tmp_path: Path) -> None:
    export(table_store, tmp_path / "t.csv")
    read = pd.read_csv(tmp_path / "t.csv", float_precision="round_trip")
    wanted = index.frame(table_store)
    assert read["x"].to_numpy().tobytes() == wanted["x"].to_numpy().tobytes()
    assert read["t"].fillna("").tolist() == wanted["t"].fillna("").tolist()
    assert read["l"].dropna().map(json.loads).tolist() == [list(v) for v in wanted["l"] if v is not None]


def test_a_table_does_not_depend_on_how_it_was_packed(
    table_store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_ROWS", 7)
    export(table_store, tmp_path / "one.parquet")
    for key in table_store.keys()[:3]:
        index.pack(table_store, [key])
    export(table_store, tmp_path / "two.parquet")
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    assert len(pd.read_parquet(tmp_path / "two.parquet")) == 100


def test_pieces_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "_ROWS", 7)
    table = pa.table({"x": list(range(31))})
    batches = [batch for start, size in ((0, 3), (3, 18), (21, 10)) for batch in table.slice(start, size).to_batches()]
    found = list(exporting._even(pa.RecordBatchReader.from_batches(table.schema, batches)))
    assert [piece.num_rows for piece in found] == [7, 7, 7, 7, 3]
    assert pa.concat_tables(found).equals(table)


def test_a_selection(table_store: JobStore, tmp_path: Path) -> None:
    write_cell(table_store, Job("b"), pa.table({"y": [1]}))
    export(table_store, tmp_path / "a.parquet", probe="a", where={"n": [1, 2]})
    read = pd.read_parquet(tmp_path / "a.parquet")
    assert (sorted(set(read["n"])), "y" in read) == ([1, 2], False)
    export(table_store, tmp_path / "b", form="csv", where="probe = 'b'")
    assert len(pd.read_csv(tmp_path / "b")) == 1
    with pytest.raises(WorkbenchError, match="nothing to export: no result row .*where n > 9; `workbench jobs status`"):
        export(table_store, tmp_path / "c.csv", where="n > 9")
    with pytest.raises(WorkbenchError, match="Binder Error"):
        export(table_store, tmp_path / "c.csv", where="nosuch > 9")
    assert files(tmp_path) == sorted([*("a.parquet", "b"), *(f for f in files(tmp_path) if f.startswith("store"))])


def test_bytes_are_hexadecimal_in_csv(store: JobStore, tmp_path: Path) -> None:
    write_cell(store, Job("a"), pa.table({"b": [b"\x01\xff", None], "s": [{"k": 1}, None]}))
    export(store, tmp_path / "t.csv")
    read = pd.read_csv(tmp_path / "t.csv", dtype=str)
    assert (read["b"][0], read["s"][0]) == ("01ff", '{"k": 1}')


def test_forms_and_existing_targets(table_store: JobStore, tmp_path: Path) -> None:
    with pytest.raises(
        WorkbenchError, match=r"form of .*t\.txt is not told.*\.parquet or \.csv.*mib, neuronpedia, eap-json"
    ):
        export(table_store, tmp_path / "t.txt")
    with pytest.raises(UnknownName, match="no form of export 'mibb'; known: .*nearest: mib"):
        export(table_store, tmp_path / "t", form="mibb")
    target = tmp_path / "t.csv"
    target.write_text("mine")
    with pytest.raises(WorkbenchError, match="exists already"):
        export(table_store, target)
    assert target.read_text() == "mine"
    export(table_store, target, force=True)
    assert target.read_text() != "mine"
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(WorkbenchError, match="is a folder"):
        export(table_store, tmp_path / "folder.csv", force=True)
    with pytest.raises(WorkbenchError, match="cannot write"):
        export(table_store, target / "below.csv")


def test_an_export_that_fails_leaves_the_old_file_and_nothing_else(
    table_store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out" / "t.parquet"
    export(table_store, target)
    before = target.read_bytes()

    def full(batches: Any) -> Iterator[pa.Table]:
        yield batches.read_next_batch() and pa.table({"x": [1]})

    monkeypatch.setattr(exporting, "_even", full)
    with pytest.raises(ValueError):
        export(table_store, target, force=True)
    assert target.read_bytes() == before
    assert files(target.parent) == ["t.parquet"]


# circuits


def test_mib_with_one_cell_per_task_and_model(store: JobStore, tmp_path: Path) -> None:
    write_circuit(store, found("org/qwen2.5"))
    write_circuit(store, found("gpt2", {"name": "greater_than", "split": "test"}))
    export(store, tmp_path / "mib", form="mib")
    assert files(tmp_path / "mib") == ["greater-than_gpt2/importances.json", "ioi_qwen2.5/importances.json"]
    read = read_eap_json(tmp_path / "mib" / "ioi_qwen2.5" / "importances.json")
    assert set(read.edges) == set(store.load(found("org/qwen2.5").key).edges)


def test_mib_with_several_cells_per_task_and_model(store: JobStore, tmp_path: Path) -> None:
    for method in ("eap", "eap-ig"):
        for seed in (0, 1):
            write_circuit(store, found(method=method, seed=seed))
    write_circuit(store, found("a/m", seed=0))
    seen: list[tuple[int, int]] = []
    export(store, tmp_path / "mib", form="mib", where={"method": ["eap", "eap-ig"]}, tick=lambda *now: seen.append(now))
    assert seen == [(i, 5) for i in range(1, 6)]
    assert files(tmp_path / "mib") == [
        "method-eap-ig-seed-0/ioi_m/importances.json",
        "method-eap-ig-seed-1/ioi_m/importances.json",
        "method-eap-seed-0/ioi_a-m/importances.json",
        "method-eap-seed-0/ioi_m/importances.json",
        "method-eap-seed-1/ioi_m/importances.json",
    ]


def test_graphs_per_cell(store: JobStore, tmp_path: Path) -> None:
    jobs = [found(seed=0), found(seed=1), found(method="eap/ig", task=None)]
    for job in jobs:
        write_circuit(store, job)
    export(store, tmp_path / "np", form="neuronpedia")
    assert files(tmp_path / "np") == [
        "m-ioi-method-eap-seed-0.json",
        "m-ioi-method-eap-seed-1.json",
        "m-method-eap-ig-seed-0.json",
    ]
    read = read_graph_json(tmp_path / "np" / "m-ioi-method-eap-seed-1.json")
    assert set(read.edges) == set(store.load(jobs[1].key).edges)
    export(store, tmp_path / "eap", form="eap-json", where={"seed": 1})
    assert files(tmp_path / "eap") == ["m-ioi.json"]
    assert set(read_eap_json(tmp_path / "eap" / "m-ioi.json").edges) == set(store.load(jobs[1].key).edges)


def test_names_that_would_be_the_same_get_the_key(store: JobStore, tmp_path: Path) -> None:
    jobs = [found(task={"name": "ioi", "x": "a b"}), found(task={"name": "ioi", "x": "a-b"})]
    for job in jobs:
        write_circuit(store, job)
    export(store, tmp_path / "np", form="neuronpedia")
    assert files(tmp_path / "np") == sorted(f"m-ioi-task-x-a-b-{job.key[:12]}.json" for job in jobs)
    export(store, tmp_path / "mib", form="mib")
    assert files(tmp_path / "mib") == sorted(f"task-x-a-b-{job.key[:12]}/ioi_m/importances.json" for job in jobs)


def test_cells_without_a_circuit_are_refused(store: JobStore, tmp_path: Path) -> None:
    write_circuit(store, found())
    for job in sleepers(2):
        write_cell(store, job)
    with pytest.raises(
        WorkbenchError, match=r"2 of 3 cells saved no circuit, the first: sleep .*; choose .* probe= or where="
    ):
        export(store, tmp_path / "np", form="neuronpedia")
    assert not (tmp_path / "np").exists()
    export(store, tmp_path / "np", form="neuronpedia", probe="find_circuit")
    with pytest.raises(WorkbenchError, match="nothing to export: no finished cell"):
        export(store, tmp_path / "no", form="mib", where="seed = 77")


def test_a_circuit_that_a_form_cannot_hold_is_named(store: JobStore, tmp_path: Path) -> None:
    nodes = Circuit.of("node", ["a0.h0", "m0"], ["m0"], width=8)
    write_circuit(store, found(), nodes)
    said = rf"cell {found().key[:12]} \(find_circuit m ioi method=eap seed=0\): .*level='edge'"
    for form in ("mib", "neuronpedia", "eap-json"):
        with pytest.raises(WorkbenchError, match=said):
            export(store, tmp_path / "out", form=form)
        assert [name for name in os.listdir(tmp_path) if name != "store"] == []


def test_a_folder_is_replaced_only_if_it_is_an_export(store: JobStore, tmp_path: Path) -> None:
    write_circuit(store, found())
    target = export(store, tmp_path / "np", form="neuronpedia")
    with pytest.raises(WorkbenchError, match="exists already"):
        export(store, target, form="neuronpedia")
    write_circuit(store, found(seed=1))
    export(store, target, form="neuronpedia", force=True)
    assert len(files(target)) == 2
    (target / "notes.txt").write_text("mine")
    with pytest.raises(WorkbenchError, match=r"no earlier export .*notes\.txt"):
        export(store, target, form="mib", force=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WorkbenchError, match="no earlier export"):
        export(store, tmp_path / "file", form="mib", force=True)
    assert len(files(target)) == 3
    with pytest.raises(WorkbenchError, match="no earlier export"):
        export(store, store.path, form="mib", force=True)
