"""Coders in folders: written in the layout of SAELens, read from that and from the files of other tools.

A coder that SAELens can run is written as SAELens writes it, and opens there; one that it cannot (crosscoders, cross-layer
transcoders, attention layers) is written in the same layout under an architecture of our own, which SAELens refuses. Nothing is
pickled, and no file that is read can run code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.coders.coder import Coder
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.results import new_folder

if TYPE_CHECKING:
    from workbench.models.protocol import Model

Found = Coder | Any
"""A coder, or one of the two replacement layers that are no ``Coder``: ``CrossLayer`` and ``Lorsa``."""


@dataclass(frozen=True)
class Format:
    """A layout of files: what it ``needs`` in a folder, and who reads it."""

    name: str
    needs: tuple[str, ...]
    holds: str
    read: Callable[[Path, float | None], Found]


def save_coder(coder: Coder, folder: str | Path) -> Path:
    """Write the new folder ``folder``: ``cfg.json`` and ``sae_weights.safetensors``, and ``workbench.safetensors`` where our
    kind has more than SAELens's.

    Written under a temporary name and renamed. Refuses an existing folder, NaN, and an ``about`` that is no JSON.
    """
    from workbench.coders.formats.saelens_write import write_saelens

    folder = Path(folder)
    if not isinstance(coder, Coder):
        own = getattr(coder, "save", None)
        if own is None:
            raise WorkbenchError(f"save_coder writes coders; got a {type(coder).__name__}")
        own(folder)
        return folder
    with new_folder(folder) as part:
        write_saelens(coder, part)
    return folder


def load_coder(
    path: str | Path,
    format: str | None = None,
    *,
    model: Model | None = None,
    input_scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> Found:
    """The coder in a folder or file, whoever wrote it; ``coder_formats()`` lists the layouts that are known by their files.

    ``format`` names the layout where the files do not tell. ``model``: warn of what does not fit it (``coder_warnings``).
    ``input_scale``: the factor that brought activations to norm sqrt(D_in) in a SAELens training that has not folded it into the
    weights; it is folded here. ``dtype``: of the weights, else that of the file. ``about["format"]`` says what was read, unless
    it is our own. Refuses files that are damaged, that do not fit their settings or hold NaN, and settings that would change
    numbers and are not modelled. A folder of one transcoder per layer holds several coders: ``load_transcoders``.
    """
    path = Path(path)
    chosen = _format(path, format)
    if input_scale is not None and chosen.name != "saelens":
        raise WorkbenchError(f"input_scale belongs to SAELens folders; {path} is {chosen.name}")
    coder = chosen.read(path, input_scale)
    if dtype is not None:
        coder = coder.to(dtype)
    if model is not None:
        from workbench.coders.use import check_use

        check_use(coder, model, stacklevel=4)
    return coder


def coder_formats() -> dict[str, Format]:
    """The layouts that ``load_coder`` reads, by name."""
    return {known.name: known for known in _FORMATS}


def _format(path: Path, name: str | None) -> Format:
    known = coder_formats()
    if name is not None:
        if name not in known:
            raise UnknownName("format of coders", name, known)
        return known[name]
    if not path.exists():
        raise WorkbenchError(f"there is no {path}")
    fitting = [one for one in known.values() if _fits(path, one)]
    if not fitting:
        looked = "; ".join(f"{one.name}: {' and '.join(one.needs)}" for one in known.values())
        raise WorkbenchError(f"{path} holds no coder that is known by its files. Looked for {looked}")
    return fitting[0]


def _fits(path: Path, one: Format) -> bool:
    if path.is_file():
        return len(one.needs) == 1 and path.match(one.needs[0])
    return path.is_dir() and all(any(path.glob(name)) for name in one.needs)


def _saelens(path: Path, scale: float | None) -> Found:
    from workbench.coders.formats.own import ARCHITECTURES, read_own
    from workbench.coders.formats.saelens import CFG
    from workbench.coders.formats.saelens_read import read_saelens
    from workbench.coders.tensor_files import read_json

    architecture = read_json(path / CFG).get("architecture")
    if architecture == "workbench-cross-layer":
        from workbench.coders.cross_layer import CrossLayer

        return CrossLayer.load(path)
    if architecture == "workbench-lorsa":
        from workbench.coders.lorsa import Lorsa

        return Lorsa.load(path)
    if architecture in ARCHITECTURES:
        return read_own(path)
    return read_saelens(path, scale)


def _dictionary_learning(path: Path, scale: float | None) -> Coder:
    from workbench.coders.formats.dictionary_learning import read_dictionary_learning

    return read_dictionary_learning(path)


def _sparsify(path: Path, scale: float | None) -> Coder:
    from workbench.coders.formats.sparsify import read_sparsify

    return read_sparsify(path)


def _cross_layer(path: Path, scale: float | None) -> Found:
    from workbench.coders.formats.circuit_tracer import read_cross_layer

    return read_cross_layer(path)


def _per_layer(path: Path, scale: float | None) -> Coder:
    from workbench.coders.formats.circuit_tracer import read_transcoder

    if path.is_dir():
        raise Refused(f"{path} holds a transcoder for each layer; load_transcoders({str(path)!r}) reads them all")
    return read_transcoder(path)


def _gemma_scope(path: Path, scale: float | None) -> Coder:
    from workbench.coders.formats.gemma_scope import read_gemma_scope

    return read_gemma_scope(path)


_FORMATS = (
    Format("saelens", ("cfg.json", "sae_weights.safetensors"), "SAELens 3 to 6, and our own", _saelens),
    Format("sparsify", ("cfg.json", "sae.safetensors"), "EleutherAI sparsify", _sparsify),
    Format("dictionary_learning", ("config.json", "ae.pt"), "saprmarks/dictionary_learning", _dictionary_learning),
    Format(
        "circuit_tracer_clt", ("W_enc_*.safetensors", "W_dec_*.safetensors"), "a cross-layer transcoder", _cross_layer
    ),
    Format("circuit_tracer", ("layer_*.safetensors",), "transcoders of circuit-tracer, one file per layer", _per_layer),
    Format("gemma_scope", ("params.npz",), "Gemma Scope", _gemma_scope),
    Format("gemma_scope_2", ("params.safetensors",), "Gemma Scope 2", _gemma_scope),
)


def told(coder: Coder, format: str, **facts: Any) -> Coder:
    """``coder`` with what its files say about where it belongs; None is left out."""
    coder.about = {name: value for name, value in {"format": format, **facts}.items() if value is not None}
    return coder


def load_transcoders(folder: str | Path) -> list[Coder]:
    """The transcoders of all layers in a folder of circuit-tracer (``layer_0.safetensors`` ... and ``config.yaml``), in order."""
    from workbench.coders.formats.circuit_tracer import read_transcoders

    return read_transcoders(Path(folder))
