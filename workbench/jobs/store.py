"""The store of a grid: one folder per finished cell, complete or not there at all.

``STORE/<key>/`` holds ``result.parquet`` (the table), ``job.json``, ``provenance.json`` and, where the probe gives more than a
table, ``saved/`` in the format of its type. ``STORE/.jobs/`` holds the rest: ``grids/`` (what was asked for), ``failed/``
(one file per failed cell), ``running/`` (one locked file per cell in the works), ``part/`` (cells being written) and
``index/`` (what queries read, made again from the cells whenever it is lost).
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import WorkbenchError
from workbench.jobs.job import Job, is_key

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from workbench.jobs.status import Status

TABLE, JOB, PROVENANCE, SAVED = "result.parquet", "job.json", "provenance.json", "saved"
HIDDEN = ".jobs"
_FORMAT = 1


class Unwritable(WorkbenchError):
    """The store cannot be written: full, read-only, or gone. The run stops; what is stored stays."""


class JobStore:
    """The folder ``path`` as a store of cells. Opening makes nothing; the first write does.

    A folder that exists and holds something else is fine: only names of the form of a key are taken for cells.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"JobStore({str(self.path)!r})"

    def _repr_html_(self) -> str:
        from workbench.summaries import store_html

        return store_html(self)

    @cached_property
    def hidden(self) -> Path:
        """Where everything but the finished cells stands."""
        return self.path / HIDDEN

    @property
    def uploads(self) -> Path:
        """Where files stand that jobs name by their content."""
        return self.path / "uploads"

    def open_for_writing(self) -> None:
        """Make the folders and refuse a store that cannot be written or has another format, before long work."""
        if self.path.exists() and not self.path.is_dir():
            raise WorkbenchError(f"{self.path} is a file; --store wants a folder")
        with writing(self.path):
            for name in ("grids", "failed", "running", "part", "index"):
                (self.hidden / name).mkdir(parents=True, exist_ok=True)
            mark = self.hidden / "format.json"
            if not mark.exists():
                put(mark, json.dumps({"format": _FORMAT}).encode())
            with tempfile.TemporaryFile(dir=self.hidden / "part") as probe:
                probe.write(b"x")
        self.check_format()

    def check_format(self) -> None:
        """Refuse a store that another version of the format wrote."""
        mark = self.hidden / "format.json"
        try:
            found = json.loads(mark.read_text())["format"]
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WorkbenchError(f"{mark} is damaged: {type(error).__name__}: {error}") from error
        if found != _FORMAT:
            raise WorkbenchError(f"{self.path} has store format {found}; this version reads {_FORMAT}")

    # cells

    def folder(self, key: str) -> Path:
        return self.path / key

    def keys(self) -> list[str]:
        """Keys that have a folder, complete as every folder with its final name is unless somebody changed it since."""
        try:
            with os.scandir(self.path) as entries:
                return [e.name for e in entries if is_key(e.name)]
        except FileNotFoundError:
            return []

    def is_done(self, key: str) -> bool:
        """Whether the cell's folder holds the three files with the sizes that its provenance names."""
        return not self.damage(key)

    def damage(self, key: str) -> str:
        """What is wrong with the cell's folder in words; empty if it is whole."""
        at = self.folder(key)
        try:
            sizes = json.loads((at / PROVENANCE).read_bytes())["files"]
            for name, (size, _) in sizes.items():
                if os.stat(at / name).st_size != size:
                    return f"{at / name} has not the size it was written with"
            if TABLE not in sizes or JOB not in sizes:
                return f"{at / PROVENANCE} does not name {TABLE} and {JOB}"
        except FileNotFoundError as error:
            return f"{error.filename} is missing"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"{at / PROVENANCE} is damaged: {type(error).__name__}: {error}"
        return ""

    def job(self, key: str) -> Job:
        return Job.of(self._json(key, JOB))

    def provenance(self, key: str) -> dict[str, Any]:
        """How the cell came about: code, versions, model, data, hardware, time, and the digest of every file."""
        return self._json(key, PROVENANCE)

    def table(self, key: str) -> pa.Table:
        """The result table as the worker wrote it; a damaged one raises and is named."""
        import pyarrow.parquet as pq

        self._refuse_damaged(key)
        try:
            return pq.read_table(self.folder(key) / TABLE)
        except Exception as error:
            raise WorkbenchError(f"{self.folder(key) / TABLE} is damaged: {type(error).__name__}: {error}") from error

    def load(self, key: str) -> Any:
        """What the probe gave beside the table, read back by its type: a circuit, a saved result, a run with its
        maps, or a coder."""
        at = self.folder(key) / SAVED
        self._refuse_damaged(key)
        if not at.is_dir():
            raise WorkbenchError(f"cell {key} saved a table only; read it with table({key!r})")
        if (at / "circuit.json").is_file():
            from workbench.circuits import Circuit

            return Circuit.load(at)
        if (at / "result.json").is_file():
            from workbench.results import load_result

            return load_result(at)
        if (at / "run.json").is_file():
            from workbench.stored_run import open_run

            return open_run(at)
        from workbench.coders.folder import load_coder

        return load_coder(at)

    # all cells

    def status(self, grid: str | None = None) -> Status:
        """How many cells of ``grid``, of all grids that ran here, are done, failed, running and missing."""
        from workbench.jobs.status import status

        return status(self, grid)

    def cells(self) -> pd.DataFrame:
        """One row per finished cell: what it computed, by what code, where, when, and how long it took."""
        from workbench.jobs.index import cells

        return cells(self)

    def frame(self, where: str | Mapping[str, Any] | None = None, probe: str | None = None) -> pd.DataFrame:
        """One row per result row, the fields of the cell's job as columns; ``workbench.jobs.index.frame``."""
        from workbench.jobs.index import frame

        return frame(self, where, probe)

    def sql(self, query: str) -> pd.DataFrame:
        """The answer to a query over the views ``cells``, ``results``, ``failures``, ``grids`` and one per probe;
        ``workbench.jobs.index.sql``."""
        from workbench.jobs.index import sql

        return sql(self, query)

    def _refuse_damaged(self, key: str) -> None:
        if reason := self.damage(key):
            raise WorkbenchError(f"no complete result {key}: {reason}")

    def _json(self, key: str, name: str) -> Any:
        try:
            return json.loads((self.folder(key) / name).read_bytes())
        except FileNotFoundError:
            raise WorkbenchError(f"no result {key} in {self.path}") from None
        except ValueError as error:
            raise WorkbenchError(f"{self.folder(key) / name} is damaged: {error}") from error

    def scratch(self, job: Job) -> Path:
        """A name for a folder that a cell may write to while it is computed."""
        return self.hidden / "part" / f"{job.key}.scratch.{socket.gethostname()}.{os.getpid()}"

    @contextmanager
    def new_cell(self, job: Job) -> Iterator[Path]:
        """A temporary folder for the files of ``job``'s result; leaves it to ``finish`` to give it its name. It is gone
        after the block."""
        part = self.hidden / "part" / f"{job.key}.{socket.gethostname()}.{os.getpid()}"
        with writing(self.path):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def finish(self, job: Job, part: Path, table: bytes, provenance: Mapping[str, Any]) -> bool:
        """Write the table, the job and the provenance beside what the probe saved in ``part``, make all of it durable, and
        rename. False if another process was first: its result stays and this one is dropped."""
        with writing(self.path):
            files: dict[str, list[Any]] = {}
            for path in sorted(p for p in part.rglob("*") if p.is_file()):
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                    os.fsync(file.fileno())
                files[str(path.relative_to(part))] = [path.stat().st_size, digest]
            for name, content in ((TABLE, table), (JOB, encoded(job.dict()))):
                write_durably(part / name, content)
                files[name] = [len(content), hashlib.sha256(content).hexdigest()]
            write_durably(part / PROVENANCE, encoded({**provenance, "files": files}))
            for folder in {part, *(p for p in part.rglob("*") if p.is_dir())}:
                sync(folder)
            final = self.folder(job.key)
            won = self._rename(part, final)
            if not won and self.damage(job.key):
                spoiled = self.hidden / "part" / f"{job.key}.damaged.{socket.gethostname()}.{os.getpid()}"
                with suppress(FileNotFoundError):
                    final.rename(spoiled)
                shutil.rmtree(spoiled, ignore_errors=True)
                won = self._rename(part, final)
            with suppress(FileNotFoundError):
                (self.hidden / "failed" / f"{job.key}.json").unlink()
        return won

    def _rename(self, part: Path, final: Path) -> bool:
        try:
            part.rename(final)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
        return True

    # failures

    def fail(self, job: Job, record: Mapping[str, Any]) -> None:
        """Record that ``job`` failed: ``kind`` (error, died, timeout, memory), ``message``, ``traceback``, ``attempts`` ..."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with writing(self.path):
            put(self.hidden / "failed" / f"{job.key}.json", encoded({"job": job.dict(), "when": now, **record}))

    def failed_keys(self) -> list[str]:
        try:
            with os.scandir(self.hidden / "failed") as entries:
                return [e.name[:-5] for e in entries if e.name.endswith(".json") and is_key(e.name[:-5])]
        except FileNotFoundError:
            return []

    def failure(self, key: str) -> dict[str, Any]:
        try:
            return json.loads((self.hidden / "failed" / f"{key}.json").read_bytes())
        except FileNotFoundError:
            raise WorkbenchError(f"no failure {key} is recorded in {self.path}") from None
        except ValueError as error:
            raise WorkbenchError(f"the record of failure {key} in {self.path} is damaged: {error}") from error

    def forgive(self, keys: Iterable[str]) -> None:
        """Forget failures, so that the cells are missing and run again."""
        with writing(self.path):
            for key in keys:
                with suppress(FileNotFoundError):
                    (self.hidden / "failed" / f"{key}.json").unlink()


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Errors of the file system in the block become ``Unwritable``, with the store's name."""
    try:
        yield
    except OSError as error:
        raise Unwritable(
            f"cannot write to the store {where}: {error.strerror or error}; nothing that is stored is lost, run again when it "
            "can be written"
        ) from error


def encoded(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode()


def put(path: Path, content: bytes) -> None:
    """Replace a file in one step."""
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}")
    try:
        write_durably(part, content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
