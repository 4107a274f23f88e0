"""What a worker process does: one order at a time, with the model of the last cell kept for the next.

The table of a cell depends on its job alone: seeds are set before each cell, the number of threads is fixed by the order,
and a model that a cell changed is loaded anew.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import hashlib
import io
import os
import platform
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.errors import WorkbenchError
from workbench.jobs import running
from workbench.jobs.guard import Guard, die_first
from workbench.jobs.job import Job
from workbench.jobs.store import SAVED, JobStore, Unwritable

LIGHT = ("sleep", "fail")
"""Probes that need neither numbers nor models: their cells do not import torch."""
_LOG = 20_000
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
_guard: Guard | None = None
_handle: int | None = None


def work(order: Mapping[str, Any]) -> dict[str, Any]:
    """Carry out one order. ``{"do": "cell", "store", "job", "threads", "device", "memory", "parent", "engine"}`` computes a cell
    and answers with ``state``: ``done``, ``stood`` (it was there), ``elsewhere`` (another process has it), ``failed`` (recorded,
    with ``kind`` and ``message``) or ``unwritable``. ``{"do": "index", "store", "keys"}`` packs finished cells."""
    begin(order)
    store = JobStore(order["store"])
    try:
        if order["do"] == "index":
            from workbench.jobs.index import pack

            pack(store, order["keys"])
            return {"state": "done"}
        return _cell(store, Job.of(order["job"]), order)
    except Unwritable as error:
        return {"state": "unwritable", "message": str(error)}


def begin(order: Mapping[str, Any]) -> None:
    """Make this process a worker, once: Ctrl-C is the driver's, a guard watches memory and the driver."""
    global _guard
    if _guard is None:
        with contextlib.suppress(ValueError):  # not in the main thread: Ray's actors, which get no Ctrl-C
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        die_first()
        _guard = Guard(order.get("parent"), _last_words)
        _guard.start()
    _guard.limit = order.get("memory")


def _last_words(used: int) -> None:
    if _handle is not None:
        running.note(_handle, ended="memory", used=used, limit=_guard.limit if _guard else None)


def _counting() -> None:
    """The cell's own time begins, or begins again."""
    if _handle is not None:
        running.note(_handle, begun=time.time())


def _not_counting() -> None:
    if _handle is not None:
        running.note(_handle)


def _cell(store: JobStore, job: Job, order: Mapping[str, Any]) -> dict[str, Any]:
    global _handle
    with running.taken(store, job.key) as handle:
        if handle is None:
            return {"state": "elsewhere"}
        if store.is_done(job.key):
            return {"state": "stood"}
        _handle = handle
        try:
            return _compute(store, job, order)
        finally:
            _handle = None


def _compute(store: JobStore, job: Job, order: Mapping[str, Any]) -> dict[str, Any]:
    assert _guard is not None
    _guard.reset()
    started, clock = datetime.datetime.now(datetime.UTC), time.perf_counter()
    log, loading, scratch = _Tail(), 0.0, store.scratch(job)
    model: _Loaded | None = None

    def load() -> Any:
        nonlocal model, loading
        before = time.perf_counter()
        _not_counting()
        model = _loaded(job, order)
        _counting()
        loading += time.perf_counter() - before
        return model.model

    def seconds() -> float:
        return round(time.perf_counter() - clock - loading, 4)

    def facts() -> dict[str, Any]:
        _guard.measure() if _guard else None
        return {
            **_facts(job, order, model),
            "started": started.isoformat(timespec="milliseconds"),
            "seconds": seconds(),
            "loading_seconds": round(loading, 4),
            "peak_bytes": _guard.peak if _guard else 0,
            "log": log.text(),
        }

    try:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            from workbench.jobs.probes import Cell, resolve

            probe = resolve(job.probe)
            _prepare(job, order)
            loading = time.perf_counter() - clock
            _counting()
            outcome = probe.call(Cell(job, load, scratch, store.uploads))
            table = _parquet(outcome.table)
        with store.new_cell(job) as part:
            if outcome.saved is not None:
                _save(outcome.saved, part / SAVED, store)
            rows = len(outcome.table)
            won = store.finish(job, part, table, {**facts(), "rows": rows, "note": outcome.note})
        _keep_if_untouched(model)
        return {"state": "done" if won else "stood", "seconds": seconds()}
    except Unwritable:
        raise
    except BaseException as error:
        _forget_model()
        kind = "memory" if isinstance(error, MemoryError) or "out of memory" in str(error).lower() else "error"
        message = str(error) if isinstance(error, WorkbenchError) else f"{type(error).__name__}: {error}"
        record = {
            "kind": kind,
            "message": message,
            "traceback": _trace(error),
            "attempts": order.get("attempt", 1),
            **facts(),
        }
        store.fail(job, record)
        return {"state": "failed", "kind": kind, "message": message, "seconds": seconds()}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _save(saved: Any, path: Path, store: JobStore) -> None:
    """What the probe gave beside the table. A full or failing disk is the store's trouble, not the cell's."""
    try:
        saved.save(path)
    except (OSError, WorkbenchError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError) and cause.errno in _DISK:
            raise Unwritable(
                f"cannot write to the store {store.path}: {cause.strerror or cause}; nothing that is stored is lost"
            ) from error
        raise


def _prepare(job: Job, order: Mapping[str, Any]) -> None:
    """The same start for every cell, whatever ran before it in this process. What is slow only once comes first: it is not
    the cell's time."""
    import pyarrow.parquet  # noqa: F401

    from workbench.jobs.revisions import code_version, data_digest

    code_version(), data_digest(), _versions(job.probe in LIGHT)
    random.seed(job.seed)
    if job.probe in LIGHT:
        return
    import numpy as np
    import torch

    torch.set_num_threads(order.get("threads", 1))
    if str(order.get("device", "cpu")).startswith("cuda"):
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    np.random.seed(job.seed)
    torch.manual_seed(job.seed)


def _parquet(table: Any) -> bytes:
    """The table as Parquet, without anything that differs between two writings of the same numbers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not isinstance(table, pa.Table):
        from workbench.results import uniform_columns

        table = pa.Table.from_pandas(uniform_columns(table), preserve_index=False)
    out = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(None), out, compression="zstd")
    return bytes(out.getvalue())


class _Loaded:
    """A model kept between cells, and what tells that nobody changed it."""

    def __init__(self, identity: tuple[Any, ...], model: Any) -> None:
        import torch

        self.identity, self.model = identity, model
        self.modules = [v for v in vars(model).values() if isinstance(v, torch.nn.Module)]
        self.state = self.measured()

    def measured(self) -> list[Any]:
        """Version counters, places and flags of all weights, the mode and the number of hooks of all modules."""
        found: list[Any] = []
        for top in self.modules:
            for module in top.modules():
                hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
                found.append((module.training, *(len(h) for h in hooks)))
            for tensor in (*top.parameters(), *top.buffers()):
                grad = tensor.grad is None if tensor.is_leaf else True
                found.append((tensor._version, tensor.data_ptr(), tensor.requires_grad, grad))
        return found


_kept: _Loaded | None = None


def _loaded(job: Job, order: Mapping[str, Any]) -> _Loaded:
    global _kept
    if job.model is None:
        raise WorkbenchError(f"{job.probe} asks for a model, and the job names none")
    device = order.get("device") or "cpu"
    identity = (job.model, job.revision, job.dtype, device)
    if _kept is None or _kept.identity != identity:
        _forget_model()
        import workbench as wb
        from workbench.jobs.revisions import is_digest, revision_of

        options: dict[str, Any] = {"dtype": job.dtype} if job.dtype else {}
        if device != "cpu":
            options["device"] = device
        if job.revision and is_digest(job.revision):
            found = revision_of(job.model, None)
            if found != job.revision:
                raise WorkbenchError(
                    f"the files of {job.model} are {found} on {socket.gethostname()}; the cell is about {job.revision}"
                )
        elif job.revision:
            options["revision"] = job.revision
        _kept = _Loaded(identity, wb.load(job.model, **options))
    return _kept


def _keep_if_untouched(model: _Loaded | None) -> None:
    if model is not None and model.measured() != model.state:
        _forget_model()


def _forget_model() -> None:
    global _kept
    if _kept is not None:
        _kept = None
        import gc

        gc.collect()


def _facts(job: Job, order: Mapping[str, Any], loaded: _Loaded | None) -> dict[str, Any]:
    """Where the numbers come from. ``seconds`` is the cell's own time, ``loading_seconds`` what its start and model took."""
    from workbench.jobs.revisions import code_version, data_digest

    about = None
    if loaded is not None:
        shape = loaded.model.shape
        about = {
            "name": loaded.model.name,
            "revision": getattr(loaded.model, "revision", "") or job.revision,
            "digest": job.revision,
            "dtype": _dtype(loaded),
            "device": str(order.get("device") or "cpu"),
            "attention": _attention(loaded),
            "layers": shape.layers,
            "heads": shape.heads,
            "parameters": sum(p.numel() for top in loaded.modules for p in top.parameters()),
        }
    return {
        "format": 1,
        "code": code_version(),
        "versions": _versions(job.probe in LIGHT),
        "model": about,
        "data": {"digest": data_digest(), "inputs": _inputs(job)},
        "seed": job.seed,
        "threads": order.get("threads", 1),
        "hardware": _hardware(str(order.get("device") or "cpu")),
        "engine": order.get("engine", ""),
    }


def _inputs(job: Job) -> dict[str, str]:
    """SHA-256 of what a cell reads that its key does not know: files that its arguments name, the module of a function."""
    named = [value for value in job.args.values() if isinstance(value, str) and len(value) < 4096]
    if ":" in job.probe:
        named += [getattr(sys.modules.get(job.probe.partition(":")[0]), "__file__", None) or ""]
    found = {}
    for name in named:
        with contextlib.suppress(OSError, ValueError):
            if name and os.path.isfile(name):
                with open(name, "rb") as content:
                    found[name] = hashlib.file_digest(content, "sha256").hexdigest()
    return found


def _dtype(loaded: _Loaded) -> str:
    first = next((p for top in loaded.modules for p in top.parameters()), None)
    return str(first.dtype).removeprefix("torch.") if first is not None else ""


def _attention(loaded: _Loaded) -> str:
    for top in loaded.modules:
        config = getattr(top, "config", None)
        found = getattr(config, "_attn_implementation", None) or getattr(config, "mixer", None)
        if found:
            return str(found)
    return ""


@functools.cache
def _versions(light: bool) -> dict[str, str]:
    if light:
        from workbench import __version__

        return {"python": platform.python_version(), "attention-workbench": __version__}
    from workbench.run import versions

    return versions()


@functools.cache
def _hardware(device: str) -> dict[str, Any]:
    from workbench.jobs.guard import total_memory

    found: dict[str, Any] = {
        "host": socket.gethostname(),
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory": total_memory(),
    }
    if device.startswith("cuda"):
        torch = sys.modules["torch"]
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-_LOG:]


class _Tail(io.TextIOBase):
    """What a cell prints, its end only."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._size = 0

    def write(self, text: str) -> int:
        self._parts.append(text)
        self._size += len(text)
        if self._size > 4 * _LOG:
            self._parts = [self.text()]
            self._size = len(self._parts[0])
        return len(text)

    def writable(self) -> bool:
        return True

    def text(self) -> str:
        return "".join(self._parts)[-_LOG:]
