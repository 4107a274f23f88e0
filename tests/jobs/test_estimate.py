"""What a grid will cost: from finished cells, from a calibration, and said to be unknown elsewhere."""

from __future__ import annotations

import math

import pytest
from job_cells import sleepers, write_cell

from workbench.jobs import estimate as module
from workbench.jobs.estimate import Cost, Estimate, Kind, calibrate, estimate, kind_of
from workbench.jobs.job import Job
from workbench.jobs.spec import Grid
from workbench.jobs.store import JobStore


def circuit(method: str, seed: int = 0, model: str = "tiny-softmax", **args: object) -> Job:
    return Job("find_circuit", model=model, task="ioi", args={"method": method, **args}, seed=seed)


def grid(*jobs: Job) -> Grid:
    return Grid("test", jobs)


def finished(store: JobStore, job: Job, seconds: float, memory: int = 10**8) -> float:
    """A finished cell; gives the bytes of its files."""
    write_cell(store, job, seconds=seconds, peak_bytes=memory, started="2026-01-01T00:00:00+00:00")
    return float(sum(size for size, _ in store.provenance(job.key)["files"].values()))


def only(found: Estimate, *kind: str | None) -> Kind:
    (one,) = (k for k in found.kinds if (k.model, k.probe, k.method) == kind)
    return one


def test_an_empty_store_without_calibration_knows_nothing(store):
    found = estimate(grid(circuit("eap"), circuit("eap-ig")), store, workers=2, budget=0)
    assert (found.cells, found.done, found.failed, found.missing, found.unknown) == (2, 0, 0, 2, 2)
    assert [k.source for k in found.kinds] == ["unknown", "unknown"]
    assert all(math.isnan(value) for value in (found.seconds, found.bytes, found.memory))
    assert not store.path.exists()


def test_finished_cells_of_the_kind_tell_and_others_do_not(store):
    sizes = [
        finished(store, circuit("eap", seed=0), 2.0, memory=5 * 10**8),
        finished(store, circuit("eap", seed=1), 4.0, memory=6 * 10**8),
    ]
    finished(store, circuit("eap", seed=2, model="compiled-ioi"), 100.0)
    jobs = [circuit("eap", seed=i) for i in range(10)]
    found = estimate(grid(*jobs, circuit("acdc")), store, workers=4, budget=0)
    kind = only(found, "tiny-softmax", "find_circuit", "eap")
    assert (kind.cells, kind.done, kind.missing, kind.source, kind.measured) == (10, 2, 8, "store", 2)
    assert kind.seconds == pytest.approx(3.0)
    assert kind.bytes == pytest.approx(sum(sizes) / 2)
    assert kind.memory == 6 * 10**8
    near = only(found, "tiny-softmax", "find_circuit", "acdc")
    assert (near.source, near.measured) == ("same probe", 2)
    assert near.seconds == pytest.approx(3.0)
    assert found.states == ("done", "done", *["missing"] * 9)


def test_cells_that_differ_in_the_seed_alone_tell_before_others(store):
    finished(store, circuit("eap", seed=0, steps=1), 1.0)
    finished(store, circuit("eap", seed=0, steps=100), 99.0)
    jobs = [circuit("eap", seed=i, steps=100) for i in range(1, 4)]
    assert only(estimate(grid(*jobs), store, budget=0), "tiny-softmax", "find_circuit", "eap").seconds == 99.0
    other = circuit("eap", seed=0, steps=7)
    assert only(estimate(grid(other), store, budget=0), "tiny-softmax", "find_circuit", "eap").seconds == 50.0


def test_the_total_is_shared_by_the_workers_and_no_shorter_than_a_cell(store):
    for seed in range(2):
        finished(store, circuit("eap", seed=seed), 3.0)
    jobs = grid(*(circuit("eap", seed=i) for i in range(2, 14)))
    assert estimate(jobs, store, workers=1, budget=0).seconds == pytest.approx(36.0)
    assert estimate(jobs, store, workers=4, budget=0).seconds == pytest.approx(9.0)
    assert estimate(jobs, store, workers=500, budget=0).seconds == pytest.approx(3.0)
    assert estimate(jobs, store, workers=4, budget=0).bytes == pytest.approx(12 * estimate(jobs, store).kinds[0].bytes)


def test_starting_a_worker_counts_once_per_worker_and_model():
    kinds = tuple(Kind(name, "sinks", None, 10, 0, 0, 10, 1.0, 0.0, 0.0, "calibration", 1) for name in "abc")
    made = Estimate("test", 2, kinds, (), start=5.0)
    assert made.seconds == pytest.approx((30 + 3 * 5) / 2)
    assert Estimate("test", 6, kinds, (), start=5.0).seconds == pytest.approx((30 + 6 * 5) / 6)


def test_failed_cells_count_as_missing_only_to_be_tried_again(store):
    finished(store, circuit("eap", seed=0), 2.0)
    store.fail(circuit("eap", seed=1), {"kind": "error", "message": "no"})
    jobs = grid(*(circuit("eap", seed=i) for i in range(3)))
    found = estimate(jobs, store, budget=0)
    assert (found.done, found.failed, found.missing) == (1, 1, 1)
    assert found.states == ("done", "failed", "missing")
    assert estimate(jobs, store, retry=True, budget=0).states == ("done", "missing", "missing")


def test_a_finished_grid_costs_nothing(store):
    finished(store, circuit("eap"), 2.0)
    found = estimate(grid(circuit("eap")), store)
    assert (found.seconds, found.bytes, found.memory, found.unknown, found.missing) == (0.0, 0.0, 0.0, 0, 0)


def test_a_calibration_computes_one_cell_of_each_kind_and_leaves_the_store_alone(store):
    jobs = [*sleepers(20, seconds=0.05), *(Job("fail", seed=i) for i in range(5))]
    ticks: list[tuple[int, int]] = []
    found = estimate(grid(*jobs), store, workers=2, budget=60, tick=lambda *now: ticks.append(now))
    assert not store.path.exists()
    sleep, fail = only(found, None, "sleep", None), only(found, None, "fail", None)
    assert (sleep.source, sleep.measured, sleep.missing, sleep.note) == ("calibration", 1, 20, "")
    assert sleep.seconds >= 0.05
    assert sleep.bytes > 100
    assert sleep.memory > 10**6
    assert (fail.source, fail.measured) == ("unknown", 0)
    assert "RuntimeError" in fail.note
    assert found.start > 0
    assert found.unknown == 5
    assert found.seconds > 1.0 / 2
    assert ticks[-1] == (3, 3)


def test_a_calibration_ends_with_its_budget(monkeypatch):
    """Cells that would begin in the second half of the budget do not, and their kinds say why nothing is known."""
    asked = {}

    def run_jobs(grid, store, *, watch, **settings):
        from workbench.jobs.events import Counts, Event

        asked.update(settings)
        for i, job in enumerate(grid.jobs):
            write_cell(store, job, peak_bytes=7)
            watch(Event("started", Counts(9, 0, 0, 1, 0), 4.0 * i, 0, job))
            watch(Event("done", Counts(9, 0, 0, 1, 0), 4.0 * i + 4.0, 0, job))

    monkeypatch.setattr("workbench.jobs.driver.run_jobs", run_jobs)
    jobs = [circuit(f"method-{i}", seed=s) for i in range(5) for s in range(3)]
    costs, start, notes = calibrate(jobs, 20.0, {"threads": 2, "workers": 9, "device": None, "timeout": 1})
    assert [kind_of(cost.job)[2] for cost in costs] == ["method-0", "method-1"]
    assert [cost.seconds for cost in costs] == [4.0, 4.0]
    assert start == 0.0
    assert {kind[2]: note for kind, note in notes.items()} == {
        f"method-{i}": "not measured within 20 s" for i in (2, 3, 4)
    }
    assert asked == {"workers": 1, "engine": "local", "attempts": 1, "timeout": 10.0, "threads": 2}


def test_the_first_cell_of_a_model_takes_the_start_of_the_worker():
    jobs = [circuit("eap", seed=s) for s in range(3)] + [circuit("acdc", seed=s) for s in range(3)]
    first, picked = module._sample(jobs)
    assert [(job.args["method"], job.seed) for job in picked] == [("eap", 0), ("eap", 1), ("acdc", 1)]
    assert list(first.values()) == [jobs[0].key]
    first, picked = module._sample([circuit("eap"), circuit("acdc", model="compiled-ioi")])
    assert len(picked) == len(first) == 2


def test_the_frame_has_a_row_per_kind_the_most_costly_first_and_it_saves(store, tmp_path):
    finished(store, circuit("eap"), 1.0)
    finished(store, circuit("acdc"), 50.0)
    found = estimate(grid(*(circuit(m, seed=s) for m in ("eap", "acdc") for s in range(4))), store, budget=0)
    frame = found.frame()
    assert frame["method"].tolist() == ["acdc", "eap"]
    assert frame["total_seconds"].tolist() == [150.0, 3.0]
    assert [bar.get_width() for bar in found.plot().patches] == [2.5, 0.05]
    from workbench.results import load_result

    saved = load_result(found.save(tmp_path / "estimate"))
    assert saved.table["seconds"].tolist() == [50.0, 1.0]


def test_costs_of_a_kind_are_means_and_the_largest_memory():
    costs = [Cost(circuit("eap"), 1.0, 10.0, 5.0), Cost(circuit("eap"), 3.0, 30.0, 9.0)]
    assert module._mean(costs) == (2.0, 20.0, 9.0)
