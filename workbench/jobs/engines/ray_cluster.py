"""The Ray that workers run on: started on this machine for one driver, or a cluster that is there already."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from workbench.errors import WorkbenchError

INSTALL = "pip install 'attention-workbench[ray]'"
START = "ray start --head"
_CONNECT = 10.0
_OBJECT_STORE = 80 * 2**20
"""Bytes; little more than the least Ray takes. Nothing of ours goes through it, and /dev/shm of a container is small."""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_ADDRESS = re.compile(r"\[?[^\s/]+?\]?:\d{1,5}")
_QUIET = {"log_to_driver": False, "logging_level": "ERROR"}
_CLEANER = """
import glob, os, shutil, sys, time
folder = sys.argv[1]
sys.stdin.read()
for _ in range(50):
    found = set()
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        pid = link.split("/")[2]
        try:
            if os.readlink(link).startswith(folder + os.sep) and pid not in found:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    command = file.read()
                if b"ray::" in command or b"/ray/" in command:
                    os.kill(int(pid), 9)
                    found.add(pid)
        except OSError:
            pass
    if not found:
        break
    time.sleep(0.1)
shutil.rmtree(folder, ignore_errors=True)
"""
"""Waits for the driver to end, however that is; then ends what of Ray still has files open in the session's folder, and
removes it. The kernel kills Ray's main processes with the driver, but their helpers take a minute to see that."""


@dataclass(frozen=True)
class Share:
    """What one worker takes of a machine: threads, GPUs (a share of one if below 1), bytes of memory."""

    cpus: float
    gpus: float
    memory: int | None

    def __post_init__(self) -> None:
        for name, least in (("cpus", 0.001), ("gpus", 0.0), ("memory", 1)):
            value = getattr(self, name)
            if value is not None and (not value >= least or (value > 1 and value != int(value))):
                raise WorkbenchError(
                    f"{name} of a Ray worker is a whole number or a share of one, at least {least}; got {value}"
                )

    def options(self) -> dict[str, Any]:
        """What an actor asks Ray for."""
        found = {"num_cpus": self.cpus, "num_gpus": self.gpus}
        return found | ({"memory": self.memory} if self.memory is not None else {})

    def needs(self) -> dict[str, float]:
        """The same under the names that nodes use, without what is not needed."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory or 0)}
        return {name: value for name, value in asked.items() if value}

    def environment(self) -> dict[str, str]:
        """What a worker's process is told about threads; the variables that the local engine sets, too."""
        found = dict.fromkeys(_THREADS, str(max(1, int(self.cpus)))) | {"TOKENIZERS_PARALLELISM": "false"}
        return found | ({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if self.gpus else {})

    def __str__(self) -> str:
        return _amounts(self.needs())


class Cluster:
    """Ray with room for ``slots`` workers of ``share`` each; refuses if there is less.

    ``address`` is None to start Ray here, ``auto`` or ``host:port`` to join one. A process that is part of a cluster already
    uses that one.
    """

    def __init__(self, slots: int, share: Share, address: str | None) -> None:
        ray = _ray()
        self._share = share
        self._cleaner: subprocess.Popen[bytes] | None = None
        self._sigterm: Any = None
        self._ours = not ray.is_initialized()
        self.where = "this machine" if address is None else f"the Ray cluster {address}"
        if not self._ours:
            joined = ray.get_runtime_context().gcs_address
            if address not in (None, "auto", joined):
                raise WorkbenchError(
                    f"this process is part of the Ray cluster {joined} and cannot join {address}; call ray.shutdown() first"
                )
            self.where = f"the Ray cluster {joined}"
        else:
            try:
                with self._signals():
                    self._start(ray, slots) if address is None else _join(ray, address)
            except (RuntimeError, ValueError, OSError) as error:
                self.leave()
                if isinstance(error, WorkbenchError):
                    raise
                raise WorkbenchError(f"Ray does not start on this machine: {last_line(error)}") from error
            except BaseException:
                self.leave()
                raise
            ray._private.worker._worker_logs_enabled = False  # Ray prints deaths on stdout; replies tell them
        try:
            self._check_room(slots)
        except BaseException:
            self.leave()
            raise

    def room(self) -> str:
        """What the cluster has of what a worker needs, in words."""
        import ray

        nodes, names = _nodes(), self._share.needs()
        total = {name: sum(node["Resources"].get(name, 0.0) for node in nodes) for name in names}
        free = {name: ray.available_resources().get(name, 0.0) for name in names}
        return f"{_amounts(total)} on {len(nodes)} node{'s' * (len(nodes) != 1)}, of that {_amounts(free)} free"

    def leave(self) -> None:
        """End the Ray that was started here, with its folder, or the connection to the one that was joined here."""
        if not self._ours:
            return
        import ray

        self._ours = False
        ray.shutdown()
        if self._sigterm is not None and signal.getsignal(signal.SIGTERM) is self._sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._cleaner is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self._cleaner.communicate(timeout=_CONNECT)

    def _start(self, ray: Any, slots: int) -> None:
        # Not below TMPDIR: the names of Ray's sockets must stay short.
        parent = os.environ.get("RAY_TMPDIR") or ("/tmp" if os.path.isdir("/tmp") else None)
        folder = os.path.abspath(tempfile.mkdtemp(prefix="ray-workbench-", dir=parent))
        command = [sys.executable, "-I", "-S", "-c", _CLEANER, folder]
        nothing = subprocess.DEVNULL  # who reads the driver's output must not wait for the cleaner
        self._cleaner = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=nothing, stderr=nothing, cwd="/", start_new_session=True
        )
        ray.init(
            address="local",
            num_cpus=math.ceil(slots * self._share.cpus),
            num_gpus=None if self._share.gpus else 0,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE,
            _temp_dir=folder,
            **_QUIET,
        )

    def _check_room(self, slots: int) -> None:
        """Refuse more slots than the cluster has room for when it is empty."""
        free = sum(self._holds(node["Resources"]) for node in _nodes())
        if free < slots:
            smaller = f"--workers {free}" if free else "smaller workers (--threads, --memory)"
            raise WorkbenchError(
                f"{slots} Ray workers with {self._share} each do not fit {self.where}, which has room for {free}: "
                f"{self.room()}; ask for {smaller}, or add nodes"
            )

    def _holds(self, resources: Mapping[str, float]) -> int:
        return min(int(resources.get(name, 0.0) / need + 1e-9) for name, need in self._share.needs().items())

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ray takes SIGTERM for itself. A handler that was there gets it back at once; the default, which would end the
        driver without a word to the workers, once Ray is left."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGTERM)
        try:
            yield
        finally:
            now = signal.getsignal(signal.SIGTERM)
            if before == signal.SIG_DFL and callable(now):
                self._sigterm = now
                signal.signal(signal.SIGTERM, now)  # set last, else Ray prints a stack trace first
            elif before is not None:
                signal.signal(signal.SIGTERM, before)


def last_line(error: BaseException) -> str:
    """The last line of what Ray says, which is the cause."""
    lines = [line.strip() for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise WorkbenchError(f"the engine ray wants the package ray, which is not installed; {INSTALL}") from None
    return ray


def _join(ray: Any, address: str) -> None:
    """Connect to a running cluster; one line if there is none. Ray itself would try for minutes."""
    asked = address
    if asked == "auto":
        try:
            address = ray._private.services.canonicalize_bootstrap_address("auto")
        except (ConnectionError, ValueError) as error:
            raise WorkbenchError(
                f"no Ray cluster on this machine: {last_line(error)} Start one with: {START}"
            ) from None
    if not _ADDRESS.fullmatch(address):
        raise WorkbenchError(f"--address is auto or the host:port of a Ray head ({START} prints it); got {address!r}")
    host, _, port = address.rpartition(":")
    try:
        spoken = _speaks_grpc(host.strip("[]"), int(port))
    except (OSError, OverflowError) as error:
        raise WorkbenchError(f"no Ray cluster at {address}: {error}; start one with: {START}") from None
    if not spoken:
        raise WorkbenchError(
            f"{address} is not the head of a Ray cluster; its port is 6379 unless ray start was told another"
        )
    try:
        ray.init(address=asked, **_QUIET)
    except Exception as error:
        raise WorkbenchError(
            f"cannot join the Ray cluster {address}: {last_line(error)}; the port is the head's, 6379 unless told "
            "otherwise; if the cluster wants a token, set RAY_AUTH_MODE=token"
        ) from error


def _speaks_grpc(host: str, port: int) -> bool:
    """Whether something there answers as an HTTP/2 server: with a frame of type SETTINGS. Not asked of a cluster with TLS."""
    with socket.create_connection((host, port), timeout=_CONNECT) as line:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return True
        line.settimeout(_CONNECT)
        line.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        with contextlib.suppress(TimeoutError, ConnectionError):
            return line.recv(9)[3:4] == b"\x04"
    return False


def _nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _amounts(amounts: Mapping[str, float]) -> str:
    units = {"CPU": "CPUs", "GPU": "GPUs"}
    parts = []
    for name, value in amounts.items():
        if name == "memory":
            parts.append(f"{value / 2**30:.1f} GiB")
        else:
            parts.append(f"{value:g} {name if value == 1 else units[name]}")
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
