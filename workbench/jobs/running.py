"""Which cells are in the works: a file per cell, locked by the process that computes it.

The lock goes with its process, however that ends, so nothing has to be renewed or cleaned up. It keeps two drivers from
doing the same work; that a result is written once does not rest on it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from workbench.jobs.job import is_key
from workbench.jobs.store import JobStore, writing

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextmanager
def taken(store: JobStore, key: str) -> Iterator[int | None]:
    """Lock the cell for this process; gives an open file to write notes to, None if another process has it.

    On file systems without locks every process gets the cell: the work may be done twice, the result stands once."""
    path = _path(store, key)
    with writing(store.path):
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle)
        except BlockingIOError:
            os.close(handle)
            handle = -1
    if handle < 0:
        yield None
        return
    try:
        with writing(store.path):
            note(handle)
        yield handle
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        os.close(handle)


def note(handle: int, **record: Any) -> None:
    """Replace what the file says about its cell: the process, and ``begun``, ``ended`` ... as given."""
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), **record}).encode()
    os.pwrite(handle, text, 0)
    os.ftruncate(handle, len(text))


def running_keys(store: JobStore) -> list[str]:
    """Keys of the cells that a living process has."""
    try:
        names = [name for name in os.listdir(store.hidden / "running") if is_key(name)]
    except FileNotFoundError:
        return []
    return [key for key in names if is_taken(store, key)]


def is_taken(store: JobStore, key: str) -> bool:
    """Whether a living process has the cell; without locks of the file system, whether a process had it."""
    try:
        handle = os.open(_path(store, key), os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return True
        raise
    finally:
        os.close(handle)
    return False


def since(store: JobStore, key: str) -> float | None:
    """Seconds that the cell itself has taken; None while its worker starts or loads a model, or has not begun."""
    begun = _said(store, key).get("begun")
    return None if begun is None else time.time() - begun


def owner(store: JobStore, key: str) -> int | None:
    """The process that has the cell, as it wrote it down; None if nobody has it."""
    found = _said(store, key).get("pid")
    return found if found is not None and is_taken(store, key) else None


def last_words(store: JobStore, key: str) -> dict[str, Any]:
    """What a dead process wrote about its cell, if anything; forgets it."""
    found = _said(store, key)
    if not is_taken(store, key):
        with suppress(OSError):
            _path(store, key).unlink()
    return found


def _said(store: JobStore, key: str) -> dict[str, Any]:
    try:
        found = json.loads(_path(store, key).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lock(handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _path(store: JobStore, key: str) -> Path:
    return store.hidden / "running" / key
