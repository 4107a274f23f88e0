"""Transcoders of all layers from one folder, as attribution graphs take them."""

from __future__ import annotations

import re
from pathlib import Path

from workbench.coders.coder import Coder
from workbench.coders.cross_layer import CrossLayer
from workbench.coders.folder import load_coder, load_transcoders
from workbench.errors import WorkbenchError

_SITE = re.compile(r"blocks\.(\d+)\.")
_NAME = re.compile(r"(\d+)")


def load_replacement(folder: str | Path) -> dict[int, Coder] | CrossLayer:
    """``{layer: transcoder}``, or the cross-layer transcoder, in a folder.

    The folder is itself a coder, holds one folder per layer (the coder itself or what a training left), or is one of
    circuit-tracer (``layer_0.safetensors`` ...). The layer of a coder is that of the site it says it writes; of a folder whose
    coder says nothing, the only number in its name. Folders that hold no coder are passed over; two coders of one layer are
    refused.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise WorkbenchError(f"no folder {folder} with transcoders")
    if (folder / "layer_0.safetensors").is_file():
        return dict(enumerate(load_transcoders(folder)))
    if (folder / "cfg.json").is_file():
        coder = load_coder(folder)
        return coder if isinstance(coder, CrossLayer) else {_layer(coder, folder): coder}
    found: dict[int, Coder] = {}
    for each in sorted(path.parent for depth in range(1, 4) for path in folder.glob("*/" * depth + "cfg.json")):
        coder = load_coder(each)
        layer = _layer(coder, each)
        if layer in found:
            raise WorkbenchError(
                f"{folder} holds two coders of layer {layer}; keep the one of {each.name} or the other"
            )
        found[layer] = coder
    if not found:
        raise WorkbenchError(
            f"{folder} holds no transcoders: neither cfg.json, folders with one, nor layer_0.safetensors"
        )
    return found


def _layer(coder: object, folder: Path) -> int:
    if not isinstance(coder, Coder):
        raise WorkbenchError(f"{folder} holds a {type(coder).__name__}; attribution graphs take transcoders")
    layers = set(_SITE.findall(str(coder.about.get("writes", ""))))
    layers = layers or set(_NAME.findall(folder.name))
    if len(layers) != 1:
        raise WorkbenchError(
            f"{folder}: the layer of its coder is not known; about['writes'] or the folder's name tells it"
        )
    return int(layers.pop())
