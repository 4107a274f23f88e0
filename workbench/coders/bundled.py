"""The coders that come with the package, by the bundled model that they were trained on."""

from __future__ import annotations

from pathlib import Path

from workbench.coders.coder import Coder
from workbench.errors import UnknownName

_FOLDER = Path(__file__).parents[1] / "datasets" / "coders"
_TRANSCODER = "mlp-"


def bundled_coders() -> dict[str, Path]:
    """Folders of the coders that come with the package, by ``model/name``: ``tiny-softmax/z-1`` reads the heads of layer 1,
    ``tiny-softmax/mlp-1`` is the transcoder of its MLP, ``tiny-softmax/discrete`` a discrete code of head outputs."""
    found = sorted(path.parent for path in _FOLDER.glob("*/*/cfg.json"))
    return {f"{path.parent.name}/{path.name}": path for path in found}


def coder_folder(name: str | Path) -> Path:
    """The folder ``name``, or that of the bundled coder which is called so."""
    path = Path(name)
    if path.exists():
        return path
    known = bundled_coders()
    if str(name) not in known:
        raise UnknownName("coder folder or bundled coder", name, known)
    return known[str(name)]


def bundled_transcoders(model: str) -> dict[int, Coder]:
    """The transcoder of every MLP of a bundled model, by layer, as ``attribution_graph`` takes them."""
    import torch

    from workbench.coders.folder import load_coder

    prefix = f"{model}/{_TRANSCODER}"
    found = {name.removeprefix(prefix): path for name, path in bundled_coders().items() if name.startswith(prefix)}
    if not found:
        models = {name.split("/")[0] for name in bundled_coders() if f"/{_TRANSCODER}" in name}
        raise UnknownName("bundled model with transcoders", model, sorted(models))
    return {int(layer): load_coder(path, dtype=torch.float32) for layer, path in found.items()}
