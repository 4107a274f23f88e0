"""Tensors and settings in files that others wrote: read without running code, checked before they are believed."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workbench.coders.coder import Coder
from workbench.errors import Refused, WorkbenchError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    if not path.is_file():
        raise WorkbenchError(f"{path.parent} is no complete coder: {path.name} is missing")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise WorkbenchError(f"{path} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise WorkbenchError(f"{path} holds a {type(found).__name__}, not the settings of a coder")
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise WorkbenchError(f"{path.parent} is no complete coder: {path.name} is missing")
    try:
        return load_file(path)
    except Exception as error:
        raise WorkbenchError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.pt`` file.

    Such a file is a pickle, which runs code when it is read. Torch's reader with ``weights_only=True`` knows tensors and
    containers and nothing else, and runs no code; whatever it does not know is refused, and there is no other way in.
    """
    if not path.is_file():
        raise WorkbenchError(f"{path.parent} is no complete coder: {path.name} is missing")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error that may follow says it
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise Refused(
            f"{path} is damaged or holds more than tensors, and is not read: {type(error).__name__}: {first}"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise Refused(f"{path} holds something else than named tensors, and is not read")
    return {str(name): value for name, value in found.items()}


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of a ``.npz`` file as tensors; object arrays, which are pickles, are refused."""
    if not path.is_file():
        raise WorkbenchError(f"no file {path}")
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: torch.from_numpy(found[name]) for name in found.files}
    except Exception as error:
        raise WorkbenchError(f"{path} is damaged or holds more than numbers: {type(error).__name__}: {error}") from None


def check_tensors(
    tensors: Mapping[str, Tensor],
    forms: Mapping[str, Sequence[str | int]],
    where: Path,
    sizes: Mapping[str, int] | None = None,
    optional: Sequence[str] = (),
) -> dict[str, int]:
    """The sizes D, F ... of tensors whose shapes are given by letters; those in ``sizes`` are what the settings announce.

    Refuses tensors that are missing, unknown, of another shape or type, or hold NaN or infinity, and names the first.
    """
    found = dict(sizes or {})
    missing = [name for name in forms if name not in tensors and name not in optional]
    strange = sorted(set(tensors) - set(forms))
    if missing or strange:
        said = [f"has no {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(strange)} too"] * bool(strange)
        raise WorkbenchError(f"{where} {' and '.join(said)}; this kind of coder has {', '.join(forms)}")
    for name in (name for name in forms if name in tensors):
        tensor = tensors[name]
        if not tensor.is_floating_point() and forms[name]:
            raise WorkbenchError(f"{where}: {name} is {tensor.dtype}, not a tensor of fractions")
        form = forms[name]
        due = [found.get(size, -1) if isinstance(size, str) else size for size in form]
        fits = tensor.ndim == len(form) and all(a in (-1, b) for a, b in zip(due, tensor.shape, strict=True))
        if not fits:
            shape = ", ".join(f"{size}={n}" if n >= 0 else str(size) for size, n in zip(form, due, strict=True))
            raise WorkbenchError(f"{where}: {name} has shape {list(tensor.shape)} where [{shape}] is due")
        for size, n in zip(form, tensor.shape, strict=True):
            if isinstance(size, str):
                found[size] = n
        if not bool(torch.isfinite(tensor).all()):
            raise WorkbenchError(f"{where}: {name} holds NaN or infinity")
    return found


def filled(
    cls: type[Coder],
    tensors: Mapping[str, Tensor],
    *,
    centred: bool,
    reads: Sequence[int] | None = None,
    writes: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Coder:
    """A coder of the kind with these weights, in their dtype; no random start is drawn for it.

    ``tensors`` are named as in the coder's ``state_dict``: ``W_enc [D_in, F]``, ``W_dec [F, D_out]`` ...
    """
    d_in, features = tensors["W_enc"].shape
    arguments: dict[str, Any] = {
        "d_out": tensors["W_dec"].shape[1], "skip": "W_skip" in tensors, "centred": centred, "reads": reads, "writes": writes,
        **{name: _as_default(cls, name, value) for name, value in (options or {}).items()},
    }  # fmt: skip
    with torch.device("meta"):
        coder = cls(d_in, features, **arguments)
    for name, due in coder.state_dict().items():
        if name in tensors and tensors[name].shape != due.shape:
            raise WorkbenchError(
                f"{name} of a {cls.kind} coder is {list(due.shape)} here; the file has {list(tensors[name].shape)}"
            )
    strange = sorted(set(tensors) - set(coder.state_dict()))
    if strange:
        raise WorkbenchError(f"a {cls.kind} coder has no {', '.join(strange)}")
    state = dict(tensors)
    state["W_enc"] = state["W_enc"].t().contiguous().t()
    unset = sorted(set(coder.state_dict()) - set(state))
    if any(name in dict(coder.named_parameters()) for name in unset):
        raise WorkbenchError(f"the file lacks {', '.join(unset)} of a {cls.kind} coder")
    if unset:  # buffers that a kind counts in and that are not in the file
        fresh = cls(
            1, features, **{**arguments, "d_out": 1, "centred": False, "reads": None, "writes": None}
        ).state_dict()
        state |= {name: fresh[name].to(state["W_enc"].dtype) for name in unset}
    coder.load_state_dict(state, assign=True)
    for parameter in coder.parameters():
        parameter.requires_grad_(True)
    return coder


def _as_default(cls: type[Coder], name: str, value: Any) -> Any:
    """JSON has no tuples and no difference between 1 and 1.0."""
    default = cls.defaults.get(name)
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(value)
    return float(value) if isinstance(default, float) and type(value) is int else value


def digest(module: nn.Module) -> str:
    """A fingerprint of all weights, bit by bit."""
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        total.update(f"{name} {plain.dtype} {list(plain.shape)}".encode())
        total.update(memoryview(plain.reshape(-1).view(torch.uint8).numpy()))
    return total.hexdigest()
