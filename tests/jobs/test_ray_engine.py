"""The Ray engine, on a real cluster of a head and two nodes on this machine, and on the Ray that it starts itself."""

from __future__ import annotations

import http.server
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

from ray_cluster import NODE, is_alive, ray_cluster, until

from workbench.errors import WorkbenchError
from workbench.jobs.engines import ray as ray_engine
from workbench.jobs.engines.protocol import Reply
from workbench.jobs.engines.ray import RayEngine

pytestmark = pytest.mark.slow
WORK = "ray_cluster:work"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_cluster(nodes=2) as found:
        yield found


@pytest.fixture
def make(cluster: Any) -> Iterator[Callable[..., RayEngine]]:
    """Engines on the cluster, closed after the test."""
    made: list[RayEngine] = []

    def engine(slots: int = 2, work: str = WORK, **options: Any) -> RayEngine:
        made.append(RayEngine(slots, address=cluster.address, work=work, **options))
        return made[-1]

    yield engine
    for one in made:
        one.close()


def replies(engine: RayEngine, number: int, seconds: float = 60.0) -> list[Reply]:
    """That many replies by slot, or as many as came in time."""
    found: list[Reply] = []
    end = time.monotonic() + seconds
    while len(found) < number and time.monotonic() < end:
        found += engine.wait(0.2)
    return sorted(found, key=lambda reply: reply.slot)


def ask(engine: RayEngine, slot: int, **order: Any) -> Reply:
    engine.submit(slot, order)
    (reply,) = replies(engine, 1)
    return reply


def pid_of(reply: Reply) -> int:
    assert reply.answer is not None, reply
    return reply.answer["pid"]


def test_workers_keep_their_process_between_orders(make: Callable[..., RayEngine]) -> None:
    engine = make()
    order = {"do": "say", "say": {"text": "é", "numbers": [1, 2.5, None, True], "deep": {"a": []}}}
    for slot in (0, 1):
        engine.submit(slot, order)
    first = replies(engine, 2)
    assert [reply.slot for reply in first] == [0, 1]
    assert [reply.answer["said"] for reply in first if reply.answer] == [order["say"]] * 2
    assert pid_of(first[0]) != pid_of(first[1])
    again = ask(engine, 1, do="say")
    assert again.answer == {"pid": pid_of(first[1]), "orders": 2, "said": None}
    assert engine.pids() == {reply.slot: [pid_of(reply)] for reply in first}
    assert engine.wait(0.0) == []


def test_workers_are_set_up_before_they_import_anything(
    make: Callable[..., RayEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    (tmp_path / "mine.py").write_text("import ray_cluster\ndef work(order): return ray_cluster.facts(order)\n")
    answer = ask(make(1, work="mine:work", cpus=2), 0).answer
    assert answer is not None
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "2")
    assert answer["environment"].items() >= {**threads, "TOKENIZERS_PARALLELISM": "false"}.items()
    assert all(threads <= 2 for threads in answer["threads"])
    assert answer["folder"] == str(tmp_path)
    assert answer["interrupt"]


@pytest.mark.parametrize(("how", "said"), [("die", "killed or crashed"), ("exit", "exit code 3")])
def test_a_death_ends_one_order_only(make: Callable[..., RayEngine], tmp_path: Path, how: str, said: str) -> None:
    engine = make()
    before = pid_of(ask(engine, 0, do="say"))
    engine.submit(1, {"do": "wait", "for": str(tmp_path / "go")})
    dead = ask(engine, 0, do=how)
    assert (dead.slot, dead.answer) == (0, None)
    assert said in dead.died
    assert pid_of(ask(engine, 0, do="say")) != before
    (tmp_path / "go").touch()
    (other,) = replies(engine, 1)
    assert (other.slot, other.died) == (1, "")


@pytest.mark.parametrize("what", ["wait", "loop", "hang-in-c"])
def test_kill_ends_whatever_a_worker_does(make: Callable[..., RayEngine], tmp_path: Path, what: str) -> None:
    engine = make()
    other = pid_of(ask(engine, 1, do="say"))
    began = tmp_path / "began"
    engine.submit(0, {"do": what, "began": str(began), "for": str(tmp_path / "never")})
    assert until(lambda: not engine.wait(0.1) and began.exists() and began.read_text())
    engine.kill(0)
    assert replies(engine, 1) == [Reply(0, None, "killed")]
    assert until(lambda: not is_alive(int(began.read_text())))
    assert pid_of(ask(engine, 0, do="say")) != int(began.read_text())
    assert pid_of(ask(engine, 1, do="say")) == other
    assert replies(engine, 1, 0.5) == []


def test_kill_of_a_worker_that_was_done_gives_the_answer_and_a_new_worker(make: Callable[..., RayEngine]) -> None:
    engine = make(1)
    ask(engine, 0, do="say")
    engine.submit(0, {"do": "say", "say": "done"})
    assert until(lambda: not engine._heard.empty())
    engine.kill(0)
    (reply,) = replies(engine, 1)
    assert reply.answer is not None
    assert reply.answer["said"] == "done"
    assert pid_of(ask(engine, 0, do="say")) != reply.answer["pid"]
    engine.kill(0)  # idle: no order, so no reply
    assert replies(engine, 1, 0.5) == []


def test_a_second_order_for_a_busy_slot_is_refused(make: Callable[..., RayEngine]) -> None:
    engine = make(1)
    engine.submit(0, {"do": "sleep", "seconds": 30})
    with pytest.raises(WorkbenchError, match="slot 0 .* has an order already"):
        engine.submit(0, {"do": "say"})


def test_work_that_raises_ends_its_order(make: Callable[..., RayEngine]) -> None:
    engine = make(1)
    reply = ask(engine, 0, do="raise")
    assert (reply.answer, reply.died) == (None, "ValueError: not like this")
    assert ask(engine, 0, do="say").answer


def test_a_worker_that_cannot_start_stops_the_run(make: Callable[..., RayEngine]) -> None:
    engine = make(1, work="ray_cluster:no_such_work")
    engine.submit(0, {})
    with pytest.raises(WorkbenchError, match="a Ray worker cannot start: .*no_such_work") as caught:
        replies(engine, 1)
    assert "\n" not in str(caught.value)


def test_more_than_the_cluster_has_is_refused_with_numbers(make: Callable[..., RayEngine], cluster: Any) -> None:
    for slots, share, room in [
        (5, {}, "5 Ray workers with 1 CPU each .* has room for 4: 4 CPUs on 3 nodes, .* --workers 4"),
        (3, {"cpus": 2}, "3 Ray workers with 2 CPUs each .* has room for 2: .* --workers 2"),
        (1, {"cpus": 3}, "1 Ray workers with 3 CPUs each .* has room for 0: 4 CPUs .* smaller workers"),
        (1, {"gpus": 1}, "1 CPU and 1 GPU each .* room for 0: 4 CPUs and 0 GPUs"),
        (1, {"memory": 2**50}, r"1 CPU and 1048576\.0 GiB each .* room for 0"),
    ]:
        with pytest.raises(WorkbenchError, match=room):
            make(slots, **share)
    for wrong in ({"cpus": 0}, {"cpus": 1.5}, {"gpus": -1}, {"memory": 0}):
        with pytest.raises(WorkbenchError, match="of a Ray worker is a whole number or a share of one"):
            make(1, **wrong)
    with pytest.raises(WorkbenchError, match="at least one slot; got 0"):
        make(0)


def test_orders_that_find_no_room_are_told(
    make: Callable[..., RayEngine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = make(2)
    assert ask(engine, 0, do="say").answer
    engine.kill(0)
    import ray

    class Rival:
        """Another user's actor, here so that Ray sends its code along."""

        def hello(self) -> str:
            return "hello"

    rivals = [ray.remote(num_cpus=1)(Rival).remote() for _ in range(4)]
    ray.get([rival.hello.remote() for rival in rivals])
    monkeypatch.setattr(ray_engine, "PATIENCE", 0.5)
    engine.submit(0, {"do": "wait", "for": str(tmp_path / "go")})
    with pytest.raises(
        WorkbenchError, match=r"1 of 2 Ray workers do not start .* 4 CPUs on 3 nodes, of that 0 CPUs free"
    ):
        replies(engine, 1, 20)
    ray.kill(rivals[0])
    monkeypatch.setattr(ray_engine, "PATIENCE", 60)
    assert until(lambda: not engine.wait(0.1) and engine.pids())
    engine.submit(1, {"do": "say"})
    time.sleep(0.6)
    monkeypatch.setattr(ray_engine, "PATIENCE", 0.5)
    with pytest.warns(UserWarning, match="1 of 2 Ray workers do not start"):
        engine.wait(0.1)
    monkeypatch.setattr(ray_engine, "PATIENCE", 60)
    (tmp_path / "go").touch()
    assert replies(engine, 1)[0].slot == 0
    ray.kill(rivals[1])
    assert replies(engine, 1)[0].slot == 1
    for rival in rivals[2:]:
        ray.kill(rival)


def test_nodes_come_and_go_while_orders_run(make: Callable[..., RayEngine], cluster: Any, tmp_path: Path) -> None:
    extra = cluster.add_node(**NODE)
    engine = make(6)
    for slot in range(6):
        engine.submit(slot, {"do": "wait", "for": str(tmp_path / "go"), "began": str(tmp_path / f"{slot}")})
    assert until(lambda: not engine.wait(0.1) and all((tmp_path / f"{slot}").exists() for slot in range(6)))
    cluster.remove_node(extra, allow_graceful=False)
    dead = replies(engine, 2)
    assert [reply.answer for reply in dead] == [None, None]
    assert all(re.search("its node died|process was killed|connection .* was lost", reply.died) for reply in dead), dead
    for reply in dead:
        engine.submit(reply.slot, {"do": "say"})  # no room until there is a node again
    assert replies(engine, 1, 2) == []
    cluster.add_node(**NODE)
    assert [(reply.slot, reply.died) for reply in replies(engine, 2)] == [(reply.slot, "") for reply in dead]
    (tmp_path / "go").touch()
    done = replies(engine, 4)
    assert {reply.slot for reply in dead} | {reply.slot for reply in done} == set(range(6))
    assert [reply.died for reply in done] == [""] * 4
    cluster.remove_node(next(iter(cluster.worker_nodes)))


def test_each_worker_sees_its_own_gpu(make: Callable[..., RayEngine], cluster: Any) -> None:
    """Ray believes that the node has GPUs; that the workers are told of one each needs none."""
    node = cluster.add_node(**NODE | {"num_gpus": 2})
    engine = make(2, work="ray_cluster:facts", gpus=1)
    for slot in (0, 1):
        engine.submit(slot, {})
    seen = [reply.answer["environment"] for reply in replies(engine, 2) if reply.answer]
    assert sorted(environment["CUDA_VISIBLE_DEVICES"] for environment in seen) == ["0", "1"]
    assert {environment["CUBLAS_WORKSPACE_CONFIG"] for environment in seen} == {":4096:8"}
    with pytest.raises(WorkbenchError, match="3 Ray workers with 1 CPU and 1 GPU each .* has room for 2"):
        make(3, gpus=1)
    engine.close()
    cluster.remove_node(node)


def test_close_ends_every_worker_and_leaves_the_cluster(make: Callable[..., RayEngine], tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    engine = make(3)
    for slot, what in enumerate(("hang-in-c", "loop", "wait")):
        engine.submit(slot, {"do": what, "began": str(tmp_path / f"{slot}"), "for": str(tmp_path / "never")})
    begun = [tmp_path / f"{slot}" for slot in range(3)]
    assert until(lambda: not engine.wait(0.1) and all(path.exists() and path.read_text() for path in begun))
    pids = [int((tmp_path / f"{slot}").read_text()) for slot in range(3)]
    engine.close()
    assert until(lambda: not any(map(is_alive, pids)))
    engine.close()
    assert signal.getsignal(signal.SIGTERM) is before
    assert ask(make(4), 3, do="say").answer


def test_a_cluster_that_is_not_there_is_one_line(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    web = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    try:
        for address, said in [
            (f"127.0.0.1:{port}", f"no Ray cluster at 127.0.0.1:{port}: .*refused; start one with: ray start --head"),
            (f"127.0.0.1:{web.server_port}", "is not the head of a Ray cluster; its port is 6379"),
            ("ray://127.0.0.1:10001", "--address is auto or the host:port of a Ray head"),
            ("somewhere", "--address is auto or the host:port of a Ray head"),
        ]:
            with pytest.raises(WorkbenchError, match=said) as caught:
                RayEngine(1, address=address)
            assert "\n" not in str(caught.value)
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        with pytest.raises(WorkbenchError, match=f"no Ray cluster at .*:{port}: "):
            RayEngine(1, address="auto")
    finally:
        web.shutdown()


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WorkbenchError, match=re.escape("pip install 'attention-workbench[ray]'")):
        RayEngine(1)


def test_importing_the_engine_does_not_import_ray() -> None:
    code = "import sys, workbench.jobs.engines.ray; sys.exit('ray' in sys.modules or 'psutil' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


DRIVER = """
import sys
from workbench.jobs.engines.ray import RayEngine
engine = RayEngine(4, work="ray_cluster:work")
replies = 0
engine.submit(0, {"do": "die"})
while not engine.wait(1.0):
    pass
for slot, what in enumerate(["hang-in-c", "loop", "wait", "say"]):
    engine.submit(slot, {"do": what, "began": f"{sys.argv[1]}/{slot}", "for": "never"})
while not engine.wait(1.0):
    pass
try:
    print("ready", flush=True)
    while True:
        engine.wait(1.0)
finally:
    engine.close()
    print("closed", flush=True)
"""


def children(pid: int) -> list[int]:
    import psutil

    return [process.pid for process in psutil.Process(pid).children(recursive=True)]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_everything_that_a_driver_started_ends_with_it(tmp_path: Path, end: signal.Signals) -> None:
    """Also worker processes that are stuck, and the folder of Ray's session. More slots than cores are fine; what happens to
    workers is not printed."""
    folder = Path("/tmp", f"ray-test-{os.getpid()}-{end}")
    folder.mkdir()
    environment = {
        **os.environ,
        "RAY_TMPDIR": str(folder),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "ready\n"
        assert until(lambda: all((tmp_path / f"{slot}").exists() for slot in range(4)))
        started = [int((tmp_path / f"{slot}").read_text()) for slot in range(4)] + children(driver.pid)
        assert list(folder.iterdir())
        if end == signal.SIGINT:  # as a terminal does: every process of the group gets it
            os.killpg(driver.pid, end)
        else:
            driver.send_signal(end)
        printed, complaints = driver.communicate(timeout=60)
        assert printed == ("" if end == signal.SIGKILL else "closed\n"), complaints
        assert "SIGTERM received" not in complaints
        assert until(lambda: not any(map(is_alive, started)))
        assert until(lambda: not list(folder.iterdir()))
    finally:
        driver.kill()
        for left in folder.iterdir():
            print("left:", left)
        folder.rmdir()
