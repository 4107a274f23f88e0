"""Fill an activation store from a model; an interrupted filling goes on after its last whole shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from workbench.coders.sites import SiteReader
from workbench.coders.store import MANIFEST, SHARD, ActivationStore
from workbench.errors import Refused, WorkbenchError
from workbench.models.protocol import Model
from workbench.sites import Site


def store_activations(
    model: Model | Sequence[Model],
    sites: str | Site | Sequence[str | Site],
    texts: Any,
    folder: str | Path,
    *,
    rows: int | None = None,
    context: int | None = None,
    prepend_bos: bool | None = None,
    skip_first: bool = False,
    dtype: str = "float32",
    shard_rows: int = SHARD,
    seed: int = 0,
    tick: Callable[[int, int], None] | None = None,
) -> ActivationStore:
    """Run ``texts`` through the model and keep the rows of ``sites`` in the store ``folder``; arguments as in ``site_rows``.

    ``rows``: stop once there are as many (whole shards; a list of texts is read again if it is too short), else all texts are
    read once. The same call after an interruption goes on where the last shard ended: pass the texts from their beginning.
    """
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
        raise WorkbenchError(f"rows is a number of rows, at least 1; got {rows!r}")
    # The model's own values go into the store: float64 is rounded once, to the type of the store.
    reader = SiteReader(
        model, sites, texts, context=context, prepend_bos=prepend_bos, skip_first=skip_first,
        dtype=torch.float64 if dtype == "float64" else torch.float32, repeat=rows is not None,
    )  # fmt: skip
    about = {
        "model": [m.name for m in reader.models], "context": reader.context, "prepend_bos": reader.prepend_bos,
        "skip_first": skip_first, "texts": reader.told, "rows": rows,
    }  # fmt: skip
    store = _begun(Path(folder), reader, about)
    if store is None:
        first = next(reader, None)
        if first is None:
            raise Refused("the texts gave no rows")
        store = ActivationStore.create(
            folder, reader.widths, dtype=dtype, shard_rows=shard_rows, seed=seed,
            about={**about, "revision": [p["revision"] for p in reader.provenance], "run_as": list(reader.provenance)},
        )  # fmt: skip
        store.append(first, cursor=reader.state())
    elif store.complete:
        return store
    seen = store.rows
    with store:
        while rows is None or store.rows < rows:
            found = next(reader, None)
            if found is None:
                break
            store.append(found, cursor=reader.state())
            seen += len(next(iter(found.values())))
            if rows is not None and seen >= rows:
                break
            if tick is not None and rows is not None:
                tick(min(seen, rows), rows)
    return store


def _begun(folder: Path, reader: SiteReader, about: dict[str, Any]) -> ActivationStore | None:
    """The store that an earlier call began, its reader moved to where it stopped; None if there is none."""
    if not (folder / MANIFEST).is_file():
        return None
    store = ActivationStore.open(folder)
    told = {name: store.about.get(name) for name in about}
    if store.sites != tuple(reader.sites):
        raise Refused(f"{folder} holds {', '.join(store.sites)}; choose another folder for {', '.join(reader.sites)}")
    for name, value in about.items():
        if told[name] != value:
            raise Refused(f"{folder} was filled with {name}={told[name]!r}, not {value!r}; choose another folder")
    if not store.complete and store.cursor is not None:
        reader.restore(store.cursor)
    return store
