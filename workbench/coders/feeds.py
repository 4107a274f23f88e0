"""Where the rows of a training come from: a model that runs, or a store on disk; and what a recipe says of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.coders.mixing import Batches, Mixed
from workbench.coders.sites import SiteReader, models_of
from workbench.coders.store import ActivationStore
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Model


@dataclass(frozen=True)
class Feed:
    """``batches`` of rows; ``recipe``: what decides about them; ``reader``: the reader of a model, None for a store. All JSON."""

    batches: Batches
    recipe: Mapping[str, Any]
    reader: SiteReader | None = None

    def about(self) -> dict[str, Any]:
        """What is known once passes have run: how the model ran, texts without tokens."""
        if self.reader is None:
            return {}
        run_as = [{name: p[name] for name in ("dtype", "device", "attention")} for p in self.reader.provenance]
        return {"run_as": run_as, "empty_texts": self.reader.empty}


def feed_of(
    model: Model | Sequence[Model] | None,
    sites: Sequence[str],
    texts: Any,
    store: ActivationStore | None,
    *,
    batch: int,
    seed: int,
    context: int | None,
    prepend_bos: bool | None,
    skip_first: bool,
    block: int,
    dtype: torch.dtype,
    device: str | torch.device | None,
) -> Feed:
    """The feed of a training; refuses texts and a store together, and a store of another model or without the sites."""
    if store is None:
        if model is None or texts is None:
            raise WorkbenchError("rows come from a model and texts, or from store=; give texts to run the model on")
        reader = SiteReader(
            model, sites, texts, context=context, prepend_bos=prepend_bos, skip_first=skip_first, dtype=dtype
        )
        models = reader.models
        recipe = {
            **_models([m.name for m in models], [getattr(m, "revision", "") for m in models]), "context": reader.context,
            "prepend_bos": reader.prepend_bos, "skip_first": skip_first, "block": block, "data": reader.told,
        }  # fmt: skip
        return Feed(Mixed(reader, batch, block=block, seed=seed, device=device), recipe, reader)
    if texts is not None:
        raise WorkbenchError("rows come from texts or from a store; got both")
    for name, given in (("context", context), ("prepend_bos", prepend_bos), ("skip_first", skip_first or None)):
        if given is not None and given != store.about.get(name):
            raise Refused(f"{store.folder} was filled with {name}={store.about.get(name)}; got {name}={given}")
    for site in sites:
        if site not in store.widths:
            raise UnknownName(f"site of {store.folder}", site, store.sites)
    told = store.about
    names, revisions = _listed(told.get("model", "")), _listed(told.get("revision", ""))
    if model is not None:
        given_names = [m.name for m in models_of(model)]
        if names != given_names:
            raise Refused(
                f"{store.folder} holds activations of {', '.join(names)}; got the model {', '.join(given_names)}"
            )
    recipe = {
        **_models(names, revisions), **{name: told.get(name) for name in ("context", "prepend_bos", "skip_first")},
        "data": {"store": store.folder.name, "begin": store.fingerprint, "texts": told.get("texts")},
    }  # fmt: skip
    batches: Batches = store.batches(batch, seed, sites=list(sites), epochs=None, dtype=dtype)
    return Feed(batches if device is None else _Moved(batches, torch.device(device)), recipe)


def _models(names: Sequence[str], revisions: Sequence[str]) -> dict[str, Any]:
    """One model by its name, several as lists."""
    one = len(names) == 1
    return {"model": names[0] if one else list(names), "revision": revisions[0] if one else list(revisions)}


def _listed(given: Any) -> list[str]:
    return [str(one) for one in given] if isinstance(given, list | tuple) else [str(given)]


class _Moved:
    """``Batches`` on another device."""

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self._batches, self._device = batches, device

    @property
    def epochs(self) -> float | None:
        return self._batches.epochs

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        return self._to(next(self._batches))

    def peek(self, rows: int) -> dict[str, Tensor]:
        return self._to(self._batches.peek(rows))

    def state(self) -> dict[str, Any]:
        return self._batches.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._batches.restore(state)

    def _to(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return {site: value.to(self._device) for site, value in rows.items()}
