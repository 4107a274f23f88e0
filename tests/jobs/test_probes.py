"""The registry, the trivial cells, and that tables depend on the job alone."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workbench.errors import UnknownName, WorkbenchError
from workbench.jobs.job import LARGEST_SEED, Job
from workbench.jobs.probes import NEEDS, REQUIRED, Cell, Outcome, Probe, probes, resolve

SEEDS = st.integers(0, LARGEST_SEED)
HEAVY = "[m for m in ('torch', 'pandas', 'pydantic', 'transformers') if m in sys.modules]"


def call(job: Job) -> Outcome:
    def load() -> Any:
        raise AssertionError("this cell has no use for a model")

    probe = resolve(job.probe)
    probe.check(job)
    return probe.call(Cell(job, load))


def refused(job: Job) -> str:
    with pytest.raises(WorkbenchError) as caught:
        resolve(job.probe).check(job)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def python(code: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-c", code, *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=timeout)


FAIL = """
import sys
from workbench.jobs.job import Job
from workbench.jobs.probes import Cell, resolve
job = Job("fail", args={"how": sys.argv[1], **({"marker": sys.argv[2]} if len(sys.argv) > 2 else {})})
resolve("fail").check(job)
"""
DO = "print(resolve('fail').call(Cell(job, None)).table.num_rows)"


# the registry


def test_trivial_cells_import_nothing_heavy() -> None:
    done = python(
        "import sys\nfrom workbench.jobs.job import Job\nfrom workbench.jobs.probes import Cell, resolve\n"
        "job = Job('sleep', args={'rows': 3})\nresolve('fail').check(Job('fail'))\nresolve('sleep').check(job)\n"
        f"print(resolve('sleep').call(Cell(job, None)).table.num_rows, {HEAVY})"
    )
    assert done.stdout.split(maxsplit=1) == ["3", "[]\n"], done.stderr


def test_every_probe_is_told() -> None:
    import workbench as wb

    known = probes()
    assert {"sleep", "fail", "find_circuit", "circuit_score", "train_sae", "capture", *wb.analyses()} == set(known)
    for name, probe in known.items():
        assert isinstance(probe, Probe)
        assert probe.name == name
        assert probe.description
        assert {probe.needs_model, probe.needs_task} <= set(NEEDS)
        assert probe.arguments is not None
        assert "seed" not in probe.arguments
    assert known["eviction"].arguments["window"] is REQUIRED


def test_an_unknown_probe_lists_those_there_are() -> None:
    with pytest.raises(
        UnknownName, match="no probe 'find_circiut'; known: sleep, fail, .*nearest: find_circuit"
    ) as caught:
        resolve("find_circiut")
    assert "module:function" in str(caught.value)
    assert "retrieval-heads" in str(caught.value)


def test_analyses_are_found_by_the_name_of_their_function() -> None:
    assert resolve("retrieval_heads").name == "retrieval-heads"
    assert resolve("retrieval_heads") is resolve("retrieval-heads")


def test_a_cell_loads_its_model_once_and_says_what_it_lacks() -> None:
    loads: list[int] = []
    cell = Cell(Job("sleep", model="m"), lambda: loads.append(1))
    assert cell.model is cell.model is None
    assert loads == [1]
    bare = Cell(Job("sleep"), lambda: loads.append(1))
    assert bare.task is None
    with pytest.raises(WorkbenchError, match="names none; add model:"):
        _ = bare.model
    with pytest.raises(WorkbenchError, match="names no task; add task:"):
        bare.pairs(2)
    assert loads == [1]


def test_pairs_are_those_of_the_jobs_task_and_seed() -> None:
    import workbench as wb

    model = wb.load("compiled-ioi")
    cell = Cell(Job("sleep", model="compiled-ioi", task={"name": "ioi", "split": "test"}, seed=3), lambda: model)
    want = wb.task("ioi", split="test")
    for seed in (None, 5):
        built = want.build(seed=3 if seed is None else seed, tokenizer=model.tokenizer, n=4)
        assert cell.pairs(4, seed).clean.equal(built.clean)


# sleep


@given(SEEDS, st.integers(0, 8), st.integers(0, 8))
def test_rows_of_sleep_depend_on_seed_and_row_alone(seed: int, few: int, more: int) -> None:
    a, b = (call(Job("sleep", args={"rows": rows}, seed=seed)).table.to_pydict() for rows in (few, few + more))
    assert b["value"][:few] == a["value"]
    assert b["row"] == list(range(few + more))
    assert all(0 <= value < 1 for value in b["value"])
    assert len(set(b["value"])) == few + more


def test_sleep_gives_these_numbers_on_every_machine() -> None:
    table = call(Job("sleep", args={"rows": 3}, seed=0)).table
    assert table.to_pydict() == {
        "row": [0, 1, 2],
        "value": [0.5079605879681605, 0.4224192380508798, 0.37718133861678727],
    }
    assert call(Job("sleep", seed=LARGEST_SEED)).table["value"][0].as_py() != table["value"][0].as_py()


def test_sleep_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    call(Job("sleep", args={"seconds": 2.5}))
    assert waited == [2.5]


@pytest.mark.parametrize(
    ("probe", "args", "said"),
    [
        ("sleep", {"second": 1}, "no argument of sleep 'second'; known: seconds, rows; nearest: seconds"),
        ("sleep", {"seconds": -1}, "argument seconds of sleep is a number from 0; got -1"),
        ("sleep", {"seconds": True}, "a number from 0; got True"),
        ("sleep", {"seconds": "long"}, "got 'long'"),
        ("sleep", {"rows": 1.5}, "argument rows of sleep is a whole number from 0; got 1.5"),
        ("sleep", {"rows": -1}, "got -1"),
        ("fail", {"how": "loudly"}, "no way to fail 'loudly'; known: error, exit, kill, memory, loop, hold, once"),
        ("fail", {"how": "once"}, "wants marker"),
        ("fail", {"marker": "x"}, "wants marker"),
        ("fail", {"how": "once", "marker": 3}, "argument marker of fail: Input should be a valid string; got 3"),
    ],
)
def test_trivial_cells_refuse_what_they_do_not_take(probe: str, args: dict[str, Any], said: str) -> None:
    assert said in refused(Job(probe, args=args))


# fail


def test_fail_raises() -> None:
    with pytest.raises(RuntimeError, match=r"on purpose \(seed 4\)"):
        call(Job("fail", seed=4))


@pytest.mark.parametrize(("how", "code"), [("exit", 3), ("kill", -signal.SIGKILL)])
def test_fail_ends_its_process(how: str, code: int) -> None:
    assert python(FAIL + DO, how).returncode == code


def test_fail_takes_memory_until_there_is_none() -> None:
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
    done = python(FAIL + limited + DO, "memory")
    assert done.returncode == 1
    assert "MemoryError" in done.stderr


@pytest.mark.parametrize(("how", "others_run"), [("loop", True), ("hold", False)])
def test_fail_never_ends_with_or_without_other_threads(how: str, others_run: bool) -> None:
    """Whether a thread that wants to end the process after a moment ever gets to do so."""
    watched = FAIL + (
        "import os, threading, time\n"
        "def end():\n    while not begun: pass\n    time.sleep(0.2)\n    os._exit(7)\n"
        "begun = []\nthreading.Thread(target=end, daemon=True).start()\nbegun.append(1)\n"
    )
    if others_run:
        assert python(watched + DO, how).returncode == 7
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            python(watched + DO, how, timeout=3)


def test_fail_once_works_the_second_time(tmp_path: Path) -> None:
    marker = tmp_path / "failed"
    assert python(FAIL + DO, "once", str(marker)).returncode == -signal.SIGKILL
    assert marker.exists()
    assert python(FAIL + DO, "once", str(marker)).stdout == "1\n"


# the heart of it

SITE = {"site": "blocks.1.attn.hook_z", "features": 64, "steps": 10, "batch": 256, "k": 8, "judged": 4, "context": 64}
SAME: dict[str, dict[str, Any]] = {
    "eap": {"probe": "find_circuit", "model": "tiny-softmax", "task": "ioi", "args": {"method": "eap", "examples": 4}},
    "eap-ig": {"probe": "find_circuit", "model": "compiled-ioi", "task": "ioi", "args": {"examples": 8}, "seed": 1},
    "score": {
        "probe": "circuit_score",
        "model": "compiled-ioi",
        "task": "ioi",
        "args": {"method": "eap", "examples": 4, "top": 8, "controls": 2},
    },
    "masks": {
        "probe": "find_circuit",
        "model": "compiled-ioi",
        "task": "ioi",
        "args": {"method": "ugs", "steps": 5, "examples": 8},
    },
    "retrieval": {
        "probe": "retrieval-heads",
        "model": "tiny-softmax",
        "args": {"lengths": 64, "depths": 2, "trials": 1},
    },
    "sinks": {"probe": "sinks", "model": "tiny-softmax", "task": "ioi", "args": {"examples": 2}},
    "coder": {"probe": "train_sae", "model": "tiny-softmax", "args": SITE},
}
DIGESTS = """
import hashlib, json, random, sys
import numpy as np, pyarrow as pa, torch
import workbench as wb
from workbench.jobs.job import Job
from workbench.jobs.probes import Cell, resolve
from workbench.results import uniform_columns

torch.set_num_threads(1)
models, found = {}, {}
for name, record in json.loads(sys.argv[1]):
    job = Job.of(record)
    random.seed(job.seed), np.random.seed(job.seed), torch.manual_seed(job.seed)
    load = lambda: models.setdefault(job.model, None) or models.update({job.model: wb.load(job.model)}) or models[job.model]
    table = pa.Table.from_pandas(uniform_columns(resolve(job.probe).call(Cell(job, load)).table), preserve_index=False)
    with pa.BufferOutputStream() as out:
        with pa.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table)
        found[name] = hashlib.sha256(out.getvalue()).hexdigest()
print(json.dumps(found))
"""


def test_tables_depend_on_the_job_alone_whatever_ran_before_in_the_process() -> None:
    """Two fresh processes that do the cells in opposite orders, the second with others in between, give the same bytes."""
    between = [
        "head",
        {"probe": "head-scores", "model": "tiny-softmax", "args": {"batches": 1, "sequences": 2}, "seed": 9},
    ]
    forward = [[name, record] for name, record in SAME.items()]
    backward = [each for cell in reversed(forward) for each in (between, cell)]
    running = [
        subprocess.Popen([sys.executable, "-c", DIGESTS, json.dumps(cells)], stdout=subprocess.PIPE, text=True)
        for cells in (forward, backward)
    ]
    first, second = (json.loads(process.communicate(timeout=300)[0]) for process in running)
    second.pop("head")
    assert set(first) == set(SAME)
    assert first == second
