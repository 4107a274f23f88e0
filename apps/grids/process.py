"""A grid's run as a process of its own, which outlives whoever started it.

``STORE/.app/`` holds what such a run needs: its specs, its log, and ``run.json``, who it is. The process and its workers keep
the log open and locked, so that the lock tells whether it lives, whatever became of its starter.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.jobs.store import put, writing

FOLDER = ".app"
_TAIL = 40_000
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@dataclass(frozen=True)
class Run:
    """A run that lives: its process on ``host``, since when, and the words it was started with."""

    pid: int
    host: str
    began: str
    words: tuple[str, ...]


def spec_path(store: Path, grid: str) -> Path:
    """Where the spec of a grid is kept that was started from here."""
    return store / FOLDER / f"{grid}.yaml"


def keep_spec(store: Path, grid: str, text: str) -> Path:
    """Write the spec beside the store's other things; gives its path."""
    path = spec_path(store, grid)
    with writing(store):
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path, text.encode())
    return path


def start(store: Path, words: Sequence[str]) -> Run:
    """Run ``workbench jobs WORDS`` in a session of its own. Refused while an earlier one lives; raises ``Unwritable`` where the
    log cannot be written."""
    log, now = _log(store), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with writing(store):
        log.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        if _locked(handle, store):
            raise WorkbenchError(f"a run is under way on {store}; stop it first, or wait until it ends")
        with writing(store):
            os.write(handle, f"{now} workbench jobs {' '.join(words)}\n".encode())
        process = subprocess.Popen(
            [sys.executable, "-m", "workbench", "jobs", *words],
            stdin=subprocess.DEVNULL,
            stdout=handle,
            stderr=handle,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
    finally:
        os.close(handle)
    threading.Thread(target=process.wait, name=f"run {process.pid}", daemon=True).start()  # so that no zombie stays
    run = Run(process.pid, socket.gethostname(), now, tuple(words))
    with writing(store):
        put(_who(store), json.dumps(run.__dict__).encode())
    return run


def under_way(store: Path) -> Run | None:
    """The run that lives on the store, if one was started from here."""
    try:
        handle = os.open(_log(store), os.O_RDONLY)
    except OSError:
        return None
    try:
        alive = _locked(handle, store, fcntl.LOCK_SH)
    finally:
        os.close(handle)
    said = _said(store)
    if not alive:
        return None
    return Run(said.get("pid", 0), said.get("host", ""), said.get("began", ""), tuple(said.get("words", ())))


def stop(store: Path) -> None:
    """Ask the run to end (SIGTERM): cells in the works are given up, what is done stays. Nothing happens where none lives."""
    run = under_way(store)
    if run is None:
        return
    if run.host != socket.gethostname() or run.pid < 2:
        raise WorkbenchError(f"the run on {store} belongs to {run.host or 'an unknown machine'}; stop it there")
    with suppress(ProcessLookupError):
        os.kill(run.pid, signal.SIGTERM)


def log(store: Path) -> str:
    """The end of what the runs on the store have told."""
    try:
        with open(_log(store), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _locked(handle: int, store: Path, kind: int = fcntl.LOCK_EX) -> bool:
    """Whether another process holds the log; without locks of the file system, whether the process of ``run.json`` is there."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    said = _said(store)
    return said.get("host") == socket.gethostname() and Path(f"/proc/{said.get('pid')}").exists()


def _said(store: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(_who(store).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _log(store: Path) -> Path:
    return store / FOLDER / "log.txt"


def _who(store: Path) -> Path:
    return store / FOLDER / "run.json"
