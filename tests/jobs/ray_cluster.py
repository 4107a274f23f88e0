"""A small Ray cluster in this process, and work for its actors that needs nothing of the workbench."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NODE = {"num_cpus": 2, "num_gpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
_orders = 0


@contextmanager
def ray_cluster(nodes: int = 2) -> Iterator[Any]:
    """A head without CPUs and ``nodes`` nodes with two each; its files are in a folder of its own, which is removed."""
    folder = tempfile.mkdtemp(prefix="ray-test-", dir="/tmp")  # sockets have names of at most 107 letters
    before = os.environ.get("RAY_TMPDIR")
    os.environ["RAY_TMPDIR"] = folder
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    try:
        for _ in range(nodes):
            cluster.add_node(**NODE)
        yield cluster
    finally:
        cluster.shutdown()
        if before is None:
            del os.environ["RAY_TMPDIR"]
        else:
            os.environ["RAY_TMPDIR"] = before
        shutil.rmtree(folder, ignore_errors=True)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Any, seconds: float = 30.0) -> bool:
    """Whether ``condition()`` comes true; the time is only there to end the test."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def work(order: dict[str, Any]) -> dict[str, Any]:
    """Does what the order says, after writing its process number to ``order["began"]``."""
    global _orders
    _orders += 1
    if "began" in order:
        Path(order["began"]).write_text(str(os.getpid()))
    match order["do"]:
        case "sleep":
            time.sleep(order["seconds"])
        case "wait":
            while not Path(order["for"]).exists():
                time.sleep(0.01)
        case "loop":
            while True:
                pass
        case "hang-in-c":
            ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            sys.exit(3)
        case "raise":
            raise ValueError("not like this")
    return {"pid": os.getpid(), "orders": _orders, "said": order.get("say")}


def facts(order: dict[str, Any]) -> dict[str, Any]:
    """What a worker sees."""
    names = (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "TOKENIZERS_PARALLELISM",
        "CUDA_VISIBLE_DEVICES",
        "CUBLAS_WORKSPACE_CONFIG",
    )
    import numpy  # noqa: F401
    import threadpoolctl

    return {
        "environment": {name: os.environ.get(name) for name in names},
        "threads": [pool["num_threads"] for pool in threadpoolctl.threadpool_info()],
        "folder": os.getcwd(),
        "interrupt": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
    }
