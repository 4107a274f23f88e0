"""A run on disk: its tokens, its attention maps and where they come from, for another process than the one that ran the model.

``FOLDER/run.json`` and ``tokens.safetensors`` stand beside the folder ``maps`` (``workbench.stored``); maps inside a gate are in
``raw``, so that both views of a gated head are at hand.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from workbench import stored
from workbench.errors import WorkbenchError
from workbench.maps import GatedMap
from workbench.models.protocol import Tokens
from workbench.results import new_folder
from workbench.run import Maps, Provenance, Run

DESCRIPTION, TOKENS, MAPS, RAW = "run.json", "tokens.safetensors", "maps", "raw"
_FORMAT = 1


@dataclass(frozen=True)
class StoredRun:
    """A run to be saved. ``about`` is plain JSON that goes with it; ``maps`` is a folder that ``capture(store=...)`` wrote, which
    moves into the saved folder, or None to write the run's own maps. ``blocks``: the maps inside a gate get block maps of that
    size before they are written."""

    run: Run
    about: Mapping[str, Any] = field(default_factory=dict)
    maps: Path | None = None
    blocks: int | None = None

    def save(self, path: str | Path) -> Path:
        """Write the new folder ``path``; half-written it never has that name. Acts and logits are not written."""
        from safetensors.torch import save_file

        path, run = Path(path), self.run
        with new_folder(path) as part:
            if self.maps is not None:
                shutil.move(self.maps, part / MAPS)
            else:
                _write_maps(part / MAPS, run.maps)
            gated = {layer: amap.raw for layer, amap in run.maps.items() if isinstance(amap, GatedMap)}
            if gated:
                for raw in gated.values() if self.blocks else ():
                    raw.blocks(self.blocks or 1, "sum")
                    raw.blocks(self.blocks or 1, "max")
                _write_maps(part / RAW, gated)
            tensors = {"ids": run.tokens.ids, "mask": run.tokens.mask}
            tensors |= {f"inputs.{name}": tensor for name, tensor in run.tokens.inputs.items()}
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part / TOKENS)
            told = {
                "format": _FORMAT,
                "labels": run.tokens.labels,
                "provenance": run.provenance.dict(),
                "about": dict(self.about),
            }
            (part / DESCRIPTION).write_text(json.dumps(told, allow_nan=False), encoding="utf-8")
        return path

    def _repr_html_(self) -> str:
        from workbench.summaries import stored_html

        return stored_html(self)


def open_run(folder: str | Path) -> Run:
    """The run that stands in ``folder``: tokens, provenance and memory-mapped maps, which every analysis of maps takes.

    A cell of the ``capture`` probe saves one (``STORE/<key>/saved``), and so does ``workbench capture --keep``. Raises
    ``WorkbenchError`` naming the file where the folder is missing, half-written or damaged."""
    from safetensors.torch import load_file

    folder = Path(folder)
    told = _told(folder)
    maps = dict(stored.open_maps(folder / MAPS))
    if (folder / RAW).is_dir():
        for layer, raw in stored.open_maps(folder / RAW).items():
            gated = maps.get(layer)
            if not isinstance(gated, GatedMap):
                raise WorkbenchError(
                    f"{folder / RAW} holds layer {layer}, which {folder / MAPS} does not have as gated"
                )
            gated.raw._memo.update(raw._memo)
    try:
        tensors = load_file(folder / TOKENS)
        labels = tuple(tuple(map(str, row)) for row in told["labels"])
        inputs = {name.removeprefix("inputs."): t for name, t in tensors.items() if name.startswith("inputs.")}
        tokens = Tokens(tensors["ids"], tensors["mask"].to(torch.bool), labels, inputs)
        provenance = Provenance(**told["provenance"])
    except Exception as error:
        raise WorkbenchError(f"the run in {folder} is damaged: {type(error).__name__}: {error}") from error
    return Run(tokens, maps=Maps(maps), provenance=provenance)


def about_run(folder: str | Path) -> dict[str, Any]:
    """What was written down with the run in ``folder``, without opening its maps."""
    found: dict[str, Any] = _told(Path(folder))["about"]
    return found


def _told(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise WorkbenchError(f"{folder} holds no run: it has no {DESCRIPTION}")
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        form = told["format"]
        told["about"], told["labels"], told["provenance"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkbenchError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if form != _FORMAT:
        raise WorkbenchError(f"{path} has format {form}; this version reads {_FORMAT}")
    return told


def _write_maps(folder: Path, maps: Mapping[int | str, Any]) -> None:
    stored.prepare(folder)
    for layer, amap in maps.items():
        stored.add(folder, layer, amap)
