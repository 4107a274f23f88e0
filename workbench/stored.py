"""Maps on disk: a folder with one safetensors file per layer and ``maps.json``, which says what their tensors are.

A layer is written when it is captured and memory-mapped from then on, so that memory does not grow with the layers. Files are
written under a temporary name and renamed, the description after its tensors: a folder never names what is not there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Relative
from workbench.maps import METADATA, AttentionMap, DenseMap, GatedMap, SummaryMap, TopK, state_metadata
from workbench.patterns.explicit import ExplicitMap
from workbench.patterns.per_channel import ChannelGatedMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.run import Maps

INDEX = "maps.json"
_KIND, _FORMAT = "attention-workbench maps", 1
_ALIGNED, _BETWEEN = 64, "padding."
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.bool: "BOOL",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
_FAMILIES = {
    name: module
    for module, names in {
        "algebra": ("SumMap", "ProductMap", "HeadsMap", "KeysMap", "QueriesMap"),
        "arranged": ("PermutedMap", "LastRowsMap", "BatchMap", "SomeHeadsMap"),
        "delta": ("DeltaMap",), "diagonal": ("DiagonalMap",), "fourier": ("FourierMap",),
        "linear": ("LinearMap", "ChannelDecayMap"), "per_channel": ("PerChannelMap",), "prefix": ("PrefixSoftmaxMap",),
        "selective": ("SelectiveScanMap",), "sparse": ("SparseMap",), "state": ("StateMap",), "toeplitz": ("ToeplitzMap",),
        "union": ("UnionMap",), "windows": ("WindowsMap",),
    }.items()
    for name in names
}  # fmt: skip
"""The classes in ``workbench/patterns`` that are stored by their ``parts()``, and their modules. No other name is looked up."""


def prepare(folder: Path) -> None:
    """Make the folder and its empty description. Refuses one that holds anything else, maps of an earlier run included."""
    if folder.is_dir() and any(folder.iterdir()):
        try:
            index = _index(folder)
        except WorkbenchError:
            raise WorkbenchError(f"{folder} is not empty and holds no maps; choose a new folder to store in") from None
        if index["layers"]:
            raise WorkbenchError(
                f"{folder} holds maps of {len(index['layers'])} layers already; choose a new folder, or read them with "
                "wb.open_maps"
            )
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _describe(folder, [])


def add(folder: Path, layer: int | str, amap: AttentionMap) -> AttentionMap:
    """Write the map of a layer; returns the same map with its tensors memory-mapped, on the CPU."""
    index = _index(folder)
    if any(entry["layer"] == layer for entry in index["layers"]):
        raise WorkbenchError(f"{folder} holds layer {layer} already")
    tensors: dict[str, Tensor] = {}
    told = _record(amap, "", tensors, f"layer {layer}")
    name = f"layer-{layer}.safetensors"
    with _writing(folder):
        part = folder / f"{name}.{os.getpid()}.part"
        try:
            _save(tensors, part)
            part.replace(folder / name)
        finally:
            part.unlink(missing_ok=True)
        entry = {"layer": layer, "file": name, "map": told}
        _describe(folder, [*index["layers"], entry])
    return _read(folder, entry)


def open_maps(folder: str | Path) -> Maps:
    """The maps that ``capture(store=folder)`` wrote, by layer, with their tensors memory-mapped from its files.

    Any exact tile, row or statistic can be asked of them, in another process than the one that ran the model and without the
    model; what was computed then is there. Answers that are computed now are not written back. Raises ``WorkbenchError``
    naming the file where a folder is missing, damaged, or of another kind.
    """
    folder = Path(folder)
    return Maps({entry["layer"]: _read(folder, entry) for entry in _index(folder)["layers"]})


# ------------------------------------------------------------------ files


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkbenchError(f"cannot write maps to {folder}: {error.strerror or error}") from error


def _describe(folder: Path, layers: list[Any]) -> None:
    part = folder / f"{INDEX}.{os.getpid()}.part"
    part.write_text(json.dumps({"kind": _KIND, "format": _FORMAT, "layers": layers}, indent=1, allow_nan=False))
    part.replace(folder / INDEX)


def _index(folder: Path) -> Any:
    if not (folder / INDEX).is_file():
        raise WorkbenchError(f"{folder} holds no maps: it has no {INDEX}")
    try:
        index = json.loads((folder / INDEX).read_text())
        kind, form, layers = index["kind"], index["format"], index["layers"]
        layers = [{name: entry[name] for name in ("layer", "file", "map")} for entry in layers]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkbenchError(f"{folder / INDEX} is damaged: {type(error).__name__}: {error}") from error
    if kind != _KIND or form != _FORMAT:
        raise WorkbenchError(f"{folder / INDEX} is {kind!r} in format {form}; this version reads {_KIND!r}, {_FORMAT}")
    return {"layers": layers}


def _read(folder: Path, entry: Mapping[str, Any]) -> AttentionMap:
    from safetensors import SafetensorError, safe_open

    path = folder / Path(entry["file"]).name
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith(_BETWEEN)}  # noqa: SIM118
        return _map(entry["map"], "", tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise WorkbenchError(f"{path} is damaged or not there: {said}") from error


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file in which every tensor begins at a multiple of 64 bytes, as tensors in memory do: products of
    memory-mapped tensors are then the same to the last bit. The format allows no holes, so what lies between is named too."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    parts: list[Tensor] = []
    at = 0

    def place(name: str, tensor: Tensor) -> None:
        nonlocal at
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        parts.append(tensor)
        at += size

    for name, tensor in tensors.items():
        if at % _ALIGNED:
            place(f"{_BETWEEN}{at}", torch.zeros(-at % _ALIGNED, dtype=torch.uint8))
        place(name, tensor.detach())
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in parts:
            file.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


# ------------------------------------------------- maps as records and back


def _record(amap: AttentionMap, at: str, tensors: dict[str, Tensor], where: str) -> dict[str, Any]:
    """What is to be known of a map beside its tensors, which go to ``tensors`` under names that begin with ``at``."""
    told: dict[str, Any] = {"class": getattr(amap, "stored_as", type(amap).__name__)}
    if isinstance(amap, SoftmaxMap) and told["class"] == "SoftmaxMap":
        s = amap.scores
        if not (s.bias is None or isinstance(s.bias, Tensor | Relative)):
            raise Refused(
                f"{where}: the bias of its scores is a function, which cannot be stored; leave the layer out with "
                "layers=[...], store with keep=False, or give the bias as a tensor or a Relative table"
            )
        told |= {"scale": s.scale, "softcap": s.softcap, "mask": _mask_record(s.mask, at, tensors)}
        tensors |= {f"{at}q": s.q, f"{at}k": s.k, f"{at}lse": amap.lse}
        if s.sink is not None:
            tensors[f"{at}sink"] = s.sink
        if s.bias is not None:
            tensors[f"{at}bias"] = s.bias.table if isinstance(s.bias, Relative) else s.bias
            told["first"] = s.bias.first if isinstance(s.bias, Relative) else None
    elif isinstance(amap, GatedMap) and type(amap) in (GatedMap, ChannelGatedMap):
        tensors[f"{at}gate"] = getattr(amap, "channel_gate", amap.gate)
        told["raw"] = _record(amap.raw, f"{at}raw.", tensors, where)
    elif type(amap) in (DenseMap, ExplicitMap):
        assert isinstance(amap, DenseMap)
        tensors[f"{at}weights"] = amap.weights
        told |= {"offset": amap.offset, "kv_heads": amap.kv_heads}
        if amap.mask is not None:
            told["mask"] = _mask_record(amap.mask, at, tensors)
        if isinstance(amap, ExplicitMap):
            tensors[f"{at}lse"] = amap.lse
    elif isinstance(amap, SummaryMap):
        told |= {"shape": amap.shape, "offset": amap.offset, "kv_heads": amap.kv_heads}
        if amap.mask is not None:
            told["mask"] = _mask_record(amap.mask, at, tensors)
        if amap.lse is not None:
            tensors[f"{at}lse"] = amap.lse
    else:
        parts = amap.parts() if _keeps_all(amap, told["class"]) else None
        if parts is None:
            raise Refused(f"{where}: a {type(amap).__name__} cannot be stored; leave the layer out with layers=[...]")
        told["parts"] = {name: _part(value, f"{at}{name}", tensors, where) for name, value in parts.items()}
    told["impl"] = str(getattr(amap, "impl", ""))
    told |= {"offset": amap.offset, "channelwise": amap.channelwise}
    told["metadata"] = {name: getattr(amap, name) for name in METADATA}
    told["answers"] = []
    for i, (key, value) in enumerate(amap._memo.items()):
        told["answers"].append(list(key))
        found = {"values": value.values, "indices": value.indices} if isinstance(value, TopK) else {"": value}
        tensors |= {f"{at}answer.{i}{'.' * bool(name)}{name}": part for name, part in found.items()}
    return told


def _family(name: str) -> type[AttentionMap]:
    """The class of that name, of those that are stored by their parts."""
    if name not in _FAMILIES:
        raise ValueError(f"it describes a {name}, which this version does not know")
    found: type[AttentionMap] = getattr(import_module(f"workbench.patterns.{_FAMILIES[name]}"), name)
    return found


def _keeps_all(amap: AttentionMap, name: str) -> bool:
    """Whether the class that is stored is the map's own, or one that the map says it may be stored as."""
    if name not in _FAMILIES:
        return False
    return isinstance(amap, _family(name)) if hasattr(amap, "stored_as") else type(amap) is _family(name)


def _part(value: Any, at: str, tensors: dict[str, Tensor], where: str) -> dict[str, Any]:
    """A part of a map: what kind it is, beside its tensors, whose names begin with ``at``."""
    if isinstance(value, Tensor):
        tensors[at] = value
        return {"is": "tensor"}
    if isinstance(value, AttentionMap):
        return {"is": "map", "map": _record(value, f"{at}.", tensors, where)}
    if isinstance(value, torch.dtype):
        return {"is": "dtype", "dtype": _DTYPES[value]}
    if isinstance(value, tuple):
        return {"is": "tuple", "items": [_part(one, f"{at}.{i}", tensors, where) for i, one in enumerate(value)]}
    return {"is": "value", "value": value}


def _part_of(told: Mapping[str, Any], at: str, tensors: Mapping[str, Tensor]) -> Any:
    if told["is"] == "tensor":
        return tensors[at]
    if told["is"] == "map":
        return _map(told["map"], f"{at}.", tensors)
    if told["is"] == "dtype":
        return {name: dtype for dtype, name in _DTYPES.items()}[told["dtype"]]
    if told["is"] == "tuple":
        return tuple(_part_of(one, f"{at}.{i}", tensors) for i, one in enumerate(told["items"]))
    return told["value"]


def _map(told: Mapping[str, Any], at: str, tensors: Mapping[str, Tensor]) -> AttentionMap:
    def held(name: str) -> Tensor | None:
        return tensors.get(f"{at}{name}")

    kind, metadata = told["class"], told["metadata"]
    mask = _mask(told["mask"], at, tensors) if "mask" in told else None
    amap: AttentionMap
    if kind == "SoftmaxMap":
        assert mask is not None
        bias: Any = held("bias")
        if bias is not None and told["first"] is not None:
            bias = Relative(bias, told["first"])
        q, k = tensors[f"{at}q"], tensors[f"{at}k"]
        options = {"mask": mask, "scale": told["scale"], "softcap": told["softcap"]}
        amap = SoftmaxMap(q, k, tensors[f"{at}lse"], sink=held("sink"), bias=bias, **options)
        amap.impl = told["impl"]
    elif kind in ("GatedMap", "ChannelGatedMap"):
        gated = ChannelGatedMap if kind == "ChannelGatedMap" else GatedMap
        amap = gated(_map(told["raw"], f"{at}raw.", tensors), tensors[f"{at}gate"])
        ran: Any = amap._fast or amap.raw
        if "impl" in vars(ran):
            ran.impl = told["impl"]
    elif kind == "ExplicitMap":
        where = {"offset": told["offset"], "kv_heads": told["kv_heads"]}
        amap = ExplicitMap(tensors[f"{at}weights"], tensors[f"{at}lse"], **where)
    elif kind == "DenseMap":
        where = {"offset": told["offset"], "kv_heads": told["kv_heads"]}
        amap = DenseMap(tensors[f"{at}weights"], **where, mask=mask, **metadata)
    elif kind == "SummaryMap":
        b, h, q_length, k_length = told["shape"]
        amap = SummaryMap.told(
            (b, h, q_length, k_length), told["kv_heads"], told["offset"], metadata, held("lse"), mask, told["impl"]
        )
    else:
        family = _family(kind)
        amap = family.of_parts(**{name: _part_of(part, f"{at}{name}", tensors) for name, part in told["parts"].items()})
        if "impl" in vars(amap):
            vars(amap)["impl"] = told["impl"]
    state_metadata(amap, metadata)
    amap.offset, amap.channelwise = told.get("offset", amap.offset), told.get("channelwise", amap.channelwise)
    for i, key in enumerate(told["answers"]):
        value: Any = held(f"answer.{i}")
        if value is None:
            value = TopK(tensors[f"{at}answer.{i}.values"], tensors[f"{at}answer.{i}.indices"])
        amap._memo[tuple(key)] = value
    return amap


def _mask_record(mask: Mask, at: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    plain = {}
    for field in fields(mask):
        value = getattr(mask, field.name)
        if isinstance(value, Tensor):
            tensors[f"{at}mask.{field.name}"] = value
        else:
            plain[field.name] = value
    return plain


def _mask(plain: Mapping[str, Any], at: str, tensors: Mapping[str, Tensor]) -> Mask:
    parts = {name.removeprefix(f"{at}mask."): part for name, part in tensors.items() if name.startswith(f"{at}mask.")}
    return Mask(**{**plain, **parts})
