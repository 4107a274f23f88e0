"""The state of a training as one file, written whole or not at all; and the recipe that it belongs to.

A checkpoint is a safetensors file: tensors by name, and JSON in its header. It is written under a temporary name, forced to the
disk and renamed, so that a killed training leaves the last whole one. Tensors come back with the strides they had: optimisers
step through memory in order, and a transposed weight with moments laid out otherwise would be trained wrongly.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.errors import Refused, WorkbenchError

CHECKPOINT, RECIPE = "checkpoint.safetensors", "recipe.json"
_FORMAT = 1


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], labels: Mapping[str, Any]) -> None:
    """Put a checkpoint in the place of the one before. ``labels`` is JSON."""
    from safetensors.torch import save_file

    told = {
        "format": _FORMAT,
        "labels": labels,
        "strides": {name: list(t.stride()) for name, t in tensors.items() if not t.is_contiguous()},
    }
    kept = {name: t.detach().contiguous().cpu() for name, t in tensors.items()}
    part = path.with_name(f"{path.name}.part")
    try:
        save_file(kept, part, metadata={"workbench": json.dumps(told, allow_nan=False)})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise WorkbenchError(f"cannot write {path}: {error.strerror or error}") from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and labels of the checkpoint, None if there is none. A damaged one is refused by name."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()["workbench"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if told["format"] != _FORMAT:
            raise WorkbenchError(f"{path} has format {told['format']}; this version reads {_FORMAT}")
        for name, stride in told["strides"].items():
            found = tensors[name]
            tensors[name] = torch.empty_strided(found.shape, stride, dtype=found.dtype).copy_(found)
        return tensors, told["labels"]
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise WorkbenchError(f"{path} is damaged: {type(error).__name__}: {error}; remove it to begin anew") from error


def agree(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Make sure that a training which began in ``folder`` has this recipe."""
    path = folder / RECIPE
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WorkbenchError(f"{path} is damaged: {error}") from error
    differences = [f"{name} was {old!r} and is {new!r}" for name, old, new in _differences(before, _json(recipe))]
    if differences:
        raise Refused(
            f"{folder} holds a training by another recipe: {'; '.join(differences)}. Choose another folder, "
            "or ask for what it was"
        )


def write_recipe(folder: Path, recipe: Mapping[str, Any]) -> None:
    """Put down by which recipe the training in ``folder`` goes."""
    path = folder / RECIPE
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(json.dumps(_json(recipe), indent=1) + "\n")
        part.replace(path)
    except OSError as error:
        raise WorkbenchError(f"cannot write {path}: {error.strerror or error}") from error


def _json(recipe: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(recipe, allow_nan=False))


def _differences(before: Any, now: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            yield from _differences(before.get(name), now.get(name), f"{at}.{name}" if at else name)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _differences(old, new, f"{at}[{i}]")
    elif before != now:
        yield at, before, now


@contextlib.contextmanager
def held(folder: Path | None, *, resume: bool) -> Iterator[None]:
    """Make the folder of a training and hold it against other processes until the block ends, however it ends. A folder in which
    nothing has begun by then is taken away again."""
    if folder is None:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise WorkbenchError(f"{folder} is a file; a training wants a folder")
    some = folder.is_dir() and any(folder.iterdir())
    if some and not resume:
        raise WorkbenchError(
            f"{folder} is not empty; choose another folder, or leave resume=True to go on with its training"
        )
    if some and not {entry.name for entry in folder.iterdir()} & {RECIPE, f"{RECIPE}.part", _LOCK}:
        raise WorkbenchError(f"{folder} is not empty and holds no training; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("w")
    except OSError as error:
        raise WorkbenchError(f"cannot write to {folder}: {error.strerror or error}") from error
    with file:
        _lock(file, folder)
        try:
            yield
        finally:
            if {entry.name for entry in folder.iterdir()} == {_LOCK}:
                (folder / _LOCK).unlink()
                folder.rmdir()


_LOCK = ".lock"


def _lock(file: Any, folder: Path) -> None:
    """The system gives the lock back when the process ends, killed or not."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise Refused(f"another process is training in {folder}") from None
