"""Activations on disk: a folder of shards, one safetensors file each, and ``manifest.json``, which says what is in it.

Rows of a shard are shuffled when it is written. A shard is written under a temporary name, renamed, and only then entered in
the manifest, itself replaced in one step: a reader, also in another process while the store still grows, sees whole shards
and nothing else. A file that the manifest does not name is what an interrupted writer left; it is written over. A shard that
is not what the manifest says is refused by name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from workbench.coders.mixing import joined, permutation
from workbench.coders.store_batches import StoreBatches
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.run import versions

MANIFEST = "manifest.json"
SHARD = 65_536
"""Rows of a shard, where nothing else is said."""
_KIND, _FORMAT = "attention-workbench activations", 1
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class ActivationStore:
    """Rows of one or several sites in a folder. ``create`` makes one, ``open`` opens one; both can append and read.

    ``append`` gathers rows and writes a shard whenever ``shard_rows`` have come together, ``close`` (or the end of a ``with``
    block) writes the rest. ``about`` holds what is known of the rows: model, revision, context, prepend_bos, versions.
    Memory: one shard while writing; ``mix`` shards while reading.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self._manifest = folder, manifest
        self._pending: list[dict[str, Tensor]] = []
        self._held = 0
        self._cursor: Any = manifest["cursor"]

    @classmethod
    def create(
        cls,
        folder: str | Path,
        widths: Mapping[str, int],
        *,
        dtype: str = "float32",
        shard_rows: int = SHARD,
        seed: int = 0,
        about: Mapping[str, Any] | None = None,
    ) -> ActivationStore:
        """An empty store for rows of ``widths`` (site -> D), kept as ``dtype``. ``seed`` shuffles; ``about`` is JSON."""
        folder = Path(folder)
        if dtype not in _DTYPES:
            raise UnknownName("type of stored activations", dtype, _DTYPES)
        if not widths or any(isinstance(w, bool) or not isinstance(w, int) or w < 1 for w in widths.values()):
            raise WorkbenchError(f"widths says for each site how wide its rows are; got {dict(widths)}")
        if isinstance(shard_rows, bool) or not isinstance(shard_rows, int) or shard_rows < 1:
            raise WorkbenchError(f"shard_rows is a number of rows, at least 1; got {shard_rows!r}")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise WorkbenchError(
                f"{folder} exists already; open it with ActivationStore.open, or choose another folder"
            )
        manifest = {
            "kind": _KIND, "format": _FORMAT, "sites": {str(site): width for site, width in widths.items()}, "dtype": dtype,
            "shard_rows": shard_rows, "seed": seed, "rows": 0, "shards": [], "complete": False, "cursor": None,
            "about": {"versions": versions(), **(about or {})},
        }  # fmt: skip
        store = cls(folder, manifest)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WorkbenchError(f"cannot make {folder}: {error.strerror or error}") from error
        store._write(manifest)
        return store

    @classmethod
    def open(cls, folder: str | Path) -> ActivationStore:
        """The store in a folder, as far as it is written. Raises naming the file where it is missing or damaged."""
        return cls(Path(folder), _manifest(Path(folder)))

    # ------------------------------------------------------------------ what is in it

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(self._manifest["sites"])

    @property
    def widths(self) -> dict[str, int]:
        return dict(self._manifest["sites"])

    @property
    def rows(self) -> int:
        """Rows of the shards on disk; those that wait for a full shard not counted."""
        return int(self._manifest["rows"])

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self._manifest["dtype"]]

    @property
    def complete(self) -> bool:
        """Whether the writer has closed the store."""
        return bool(self._manifest["complete"])

    @property
    def about(self) -> dict[str, Any]:
        return dict(self._manifest["about"])

    @property
    def cursor(self) -> Any:
        """Where the reading of the model had got to after the last shard on disk, if the writer said so."""
        return self._manifest["cursor"]

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the shard files."""
        return tuple(shard["file"] for shard in self._manifest["shards"])

    @property
    def fingerprint(self) -> str:
        """Hash of the first shard, which tells stores apart; empty while there is none."""
        shards = self._manifest["shards"]
        return str(shards[0]["sha256"]) if shards else ""

    def refresh(self) -> ActivationStore:
        """Look at the manifest again: what another process has written since. Returns the store itself."""
        if self._held:
            raise Refused(f"{self.folder} is being written here; rows that wait for their shard would be lost")
        self._manifest = _manifest(self.folder)
        self._cursor = self._manifest["cursor"]
        return self

    # ------------------------------------------------------------------ writing

    def append(self, rows: Mapping[str, Tensor], *, cursor: Any = None) -> None:
        """Add rows ``[N, D]`` of every site. ``cursor`` (JSON): where the source stands after them, for going on later."""
        rows = {str(site): value for site, value in rows.items()}
        for site in rows:
            if site not in self.widths:
                raise UnknownName(f"site of {self.folder}", site, self.sites)
        counts = set()
        for site, width in self.widths.items():
            if site not in rows:
                raise WorkbenchError(
                    f"rows of {site} are missing; the store holds {', '.join(self.sites)} side by side"
                )
            value = rows[site]
            if value.ndim != 2 or value.shape[1] != width:
                raise WorkbenchError(f"{site} has rows [N, {width}] in {self.folder}; got {list(value.shape)}")
            counts.add(len(value))
        if len(counts) > 1:
            told = ", ".join(f"{site}: {len(value)}" for site, value in rows.items())
            raise WorkbenchError(f"every site has the same rows; got {told}")
        kept = {site: rows[site].detach().to("cpu", self.dtype, copy=True) for site in self.sites}
        for site, value in kept.items():
            finite = torch.isfinite(value).all(1)
            if not bool(finite.all()):
                at = int((~finite).nonzero()[0])
                fits = bool(torch.isfinite(rows[site][at]).all())
                raise Refused(
                    f"row {self.rows + self._held + at} of {site} is not finite{' as ' * fits}{self._manifest['dtype'] * fits}; "
                    "nothing of this call was stored"
                )
        if self.complete:
            self._write({**self._manifest, "complete": False})
        if counts != {0}:
            self._pending.append(kept)
            self._held += counts.pop()
        if cursor is not None:
            self._cursor = cursor
        if self._held >= self._manifest["shard_rows"]:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait as a shard of their own."""
        if not self._held:
            return
        number = len(self._manifest["shards"])
        rows = joined(self._pending)
        order = permutation(self._held, self._manifest["seed"], number)
        rows = {site: value[order] for site, value in rows.items()}
        name = f"shard-{number:06d}.safetensors"
        shard = {"file": name, "rows": self._held, **self._saved(rows, name)}
        self._write(
            {
                **self._manifest,
                "shards": [*self._manifest["shards"], shard],
                "rows": self.rows + self._held,
                "cursor": self._cursor,
            }
        )
        self._pending, self._held = [], 0

    def close(self) -> None:
        """Write what waits, and mark the store as complete. It can be appended to again later."""
        self.flush()
        if not self.complete:
            self._write({**self._manifest, "complete": True})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def _saved(self, rows: dict[str, Tensor], name: str) -> dict[str, Any]:
        from safetensors.torch import save_file

        part = self.folder / f"{name}.{os.getpid()}.part"
        try:
            save_file(rows, part)
            _synced(part)
            told = {"bytes": part.stat().st_size, "sha256": _digest(part)}
            part.replace(self.folder / name)
        except OSError as error:
            raise WorkbenchError(f"cannot write {self.folder / name}: {error.strerror or error}") from error
        finally:
            part.unlink(missing_ok=True)
        return told

    def _write(self, manifest: dict[str, Any]) -> None:
        path = self.folder / MANIFEST
        if path.exists() and len(_manifest(self.folder)["shards"]) != len(self._manifest["shards"]):
            raise Refused(f"{self.folder} is written by another process at the same time; one store has one writer")
        part = self.folder / f"{MANIFEST}.{os.getpid()}.part"
        try:
            part.write_text(json.dumps(manifest, indent=1, allow_nan=False))
            _synced(part)
            part.replace(path)
        except OSError as error:
            raise WorkbenchError(f"cannot write {path}: {error.strerror or error}") from error
        finally:
            part.unlink(missing_ok=True)
        self._manifest = manifest

    # ------------------------------------------------------------------ reading

    def batches(
        self,
        size: int,
        seed: int = 0,
        start: Mapping[str, Any] | None = None,
        *,
        sites: Sequence[str] | None = None,
        mix: int = 4,
        epochs: int | None = 1,
        dtype: torch.dtype = torch.float32,
    ) -> StoreBatches:
        """Batches of ``size`` rows in an order that ``seed`` alone decides, from the cursor ``start`` on (``state()`` of an
        earlier iterator). Shards are shuffled and ``mix`` of them at a time are read and mixed. ``epochs``: how often all rows
        are read, None without end; ``sites``: these alone. The shards that exist when an epoch begins are read in it.
        """
        found = StoreBatches(self, size, seed, sites=sites, mix=mix, epochs=epochs, dtype=dtype)
        if start is not None:
            found.restore(start)
        return found

    def read(self, number: int, sites: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The rows of a shard as they are stored. Refuses, by name, a file that is not what was written."""
        from safetensors import SafetensorError, safe_open

        shard = self._manifest["shards"][number]
        path = self.folder / shard["file"]
        try:
            size = path.stat().st_size
            if size != shard["bytes"]:
                raise WorkbenchError(f"{path} is damaged: it has {size} bytes, {shard['bytes']} were written")
            if _digest(path) != shard["sha256"]:
                raise WorkbenchError(f"{path} is damaged: its contents are not what was written")
            with safe_open(path, framework="pt") as file:
                rows = {site: file.get_tensor(site) for site in (self.sites if sites is None else sites)}
        except (OSError, SafetensorError) as error:
            raise WorkbenchError(f"{path} is damaged or not there: {type(error).__name__}: {error}") from error
        for site, value in rows.items():
            if value.shape != (shard["rows"], self.widths[site]) or value.dtype != self.dtype:
                raise WorkbenchError(
                    f"{path} holds {value.dtype} {list(value.shape)} of {site}; the manifest says {self._manifest['dtype']} "
                    f"{[shard['rows'], self.widths[site]]}"
                )
        return rows

    def check(self) -> None:
        """Read every shard; raises naming the first that is damaged."""
        for number in range(len(self.shards)):
            self.read(number)

    def __repr__(self) -> str:
        state = "complete" if self.complete else "growing"
        told = ", ".join(f"{site}: {width}" for site, width in self.widths.items())
        return f"ActivationStore({self.folder}, {self.rows:,} rows of {told}, {len(self.shards)} shards, {state})"


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise WorkbenchError(f"{folder} holds no activations: it has no {MANIFEST}")
    try:
        found = json.loads(path.read_text())
        kind, form = found["kind"], found["format"]
        shards = [(shard["file"], shard["rows"], shard["bytes"], shard["sha256"]) for shard in found["shards"]]
        for name in ("sites", "dtype", "shard_rows", "seed", "complete", "cursor", "about"):
            found[name]
        if any(Path(name).name != name for name, *_ in shards) or sum(rows for _, rows, *_ in shards) != found["rows"]:
            raise ValueError("its shards do not add up")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkbenchError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if kind != _KIND or form != _FORMAT:
        raise WorkbenchError(f"{path} is {kind!r} in format {form}; this version reads {_KIND!r}, {_FORMAT}")
    return dict(found)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _synced(path: Path) -> None:
    """Have the file on the disk itself before it gets its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
