"""What every analysis returns: numbers and labels, drawn later.

A saved result is a folder of three files: ``table.parquet`` (the frame), ``tensors.safetensors`` (every tensor,
named by its field) and ``result.json`` (everything else). ``load_result`` reads it back as plain data, without
importing the analysis.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

FILES = ("table.parquet", "tensors.safetensors", "result.json")
_FORMAT = 1
_REASONS, _FIRST = 20, 5


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the name ``path`` when the block ends, and is gone if it raises.

    Refuses an existing path and a folder that cannot be written."""
    if path.exists() or path.is_symlink():
        raise WorkbenchError(f"{path} exists already; choose another name or remove it")
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        part.rename(path)
    except OSError as error:
        raise WorkbenchError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@dataclass(frozen=True)
class Result(ABC):
    """Base of result dataclasses. Subclasses are frozen, hold tensors and labels, and define ``frame`` and ``plot``."""

    @abstractmethod
    def frame(self) -> pd.DataFrame:
        """The result as a table, one row per labelled number."""

    @abstractmethod
    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the result on a matplotlib axis; nothing is recomputed."""

    def save(self, path: str | Path) -> Path:
        """Write ``table.parquet``, ``tensors.safetensors`` and ``result.json`` into the new folder ``path``.

        The folder is written under a temporary name and renamed, so a half-written result never has the final name.
        Refuses an existing path, a folder that cannot be written, and a field that is neither numbers nor labels.
        """
        path = Path(path)
        with new_folder(path) as part:
            tensors: dict[str, torch.Tensor] = {}
            labels = {field.name: _plain(getattr(self, field.name), field.name, tensors) for field in fields(self)}
            text = json.dumps({"format": _FORMAT, "type": type(self).__name__, **labels}, indent=1, allow_nan=False)
            _write(part, uniform_columns(self.frame()), tensors, text)
        return path

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """One line and the first rows, where a notebook or IPython shows text."""
        frame = self.frame()
        printer.text(f"{type(self).__name__}: {len(frame):,} rows\n{frame.head(_FIRST).to_string()}")

    def _repr_html_(self) -> str:
        """The figure, the table, and why what is undefined is so; a figure that fails is one line that says why."""
        from workbench.figure_html import picture
        from workbench.fragments import facts, table_view

        name = type(self).__name__
        reasons = getattr(self, "undefined", None)
        told = facts({f"undefined: {what}": why for what, why in list(reasons.items())[:_REASONS]}) if reasons else ""
        return table_view(self.frame(), name, picture(self.plot, name), told)


@dataclass(frozen=True)
class SavedResult:
    """A result read back from its folder: the table, the tensors by name, and the labels. It knows no model."""

    type: str
    table: pd.DataFrame
    tensors: Mapping[str, torch.Tensor]
    labels: Mapping[str, Any]

    def frame(self) -> pd.DataFrame:
        """The table as it was saved."""
        return self.table.copy()

    def _repr_html_(self) -> str:
        from workbench.fragments import facts, table_view

        tensors = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.tensors.items())
        return table_view(self.table, self.type, facts({"tensors": tensors}))


def load_result(path: str | Path) -> SavedResult:
    """Read a folder written by ``Result.save``. A missing, half-written or damaged folder raises and names the file."""
    import pandas as pd
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_dir():
        raise WorkbenchError(f"no result folder {path}")
    if (path / "circuit.json").is_file():
        raise WorkbenchError(f"{path} holds a circuit, which workbench.Circuit.load reads")
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        raise WorkbenchError(f"{path} is not a complete result: {', '.join(missing)} missing")
    name = ""
    try:
        name = "result.json"
        labels = json.loads((path / name).read_text())
        form, kind = labels.pop("format", None), labels.pop("type")
        if form != _FORMAT:
            raise WorkbenchError(f"{path} has result format {form}; this version reads {_FORMAT}")
        name = "tensors.safetensors"
        tensors = load_file(path / name)
        name = "table.parquet"
        table = pd.read_parquet(path / name)
    except WorkbenchError:
        raise
    except Exception as error:
        raise WorkbenchError(f"{path / name} is damaged: {type(error).__name__}: {error}") from error
    return SavedResult(kind, table, tensors, labels)


def axis(ax: Axes | None, width: float = 6.0, height: float = 4.0) -> Axes:
    """``ax``, or the axis of a new figure that no global state owns."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").subplots()


def head_map(
    ax: Axes | None,
    values: Sequence[torch.Tensor],
    layers: Sequence[int | str],
    *,
    title: str,
    unit: str,
    limits: tuple[float | None, float | None] = (0.0, None),
) -> Axes:
    """Heat map of one number per head: ``values[i]`` ``[H]`` belongs to ``layers[i]``; undefined heads are left
    blank."""
    heads = max((len(row) for row in values), default=0)
    if not heads:
        raise WorkbenchError("a head map needs at least one layer with one head")
    grid = np.full((len(values), heads), np.nan)
    for i, row in enumerate(values):
        grid[i, : len(row)] = row.detach().double().cpu().numpy()
    width, height = max(4.8, 2.5 + 0.32 * heads), max(2.6, 1.8 + 0.32 * len(values))
    ax = axis(ax, width, height)
    image = ax.imshow(grid, aspect="auto", cmap="viridis", vmin=limits[0], vmax=limits[1], interpolation="nearest")
    step = max(1, len(values) // 16)
    ax.set_yticks(range(0, len(values), step), [str(layer) for layer in list(layers)[::step]])
    ax.set_xticks(range(0, heads, max(1, heads // 16)))
    ax.set(xlabel="head", ylabel="layer", title=wrapped(title, 0.75 * width))
    ax.figure.colorbar(image, ax=ax, label=wrapped(unit, height - 0.8))
    return ax


def wrapped(text: str, inches: float) -> str:
    """A label in lines that fit on ``inches`` of a figure, at matplotlib's own size; its own line breaks are kept."""
    width = max(12, int(inches * 10))
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, width) or [""])


def _write(folder: Path, frame: pd.DataFrame, tensors: dict[str, torch.Tensor], text: str) -> None:
    from safetensors.torch import save_file

    frame.to_parquet(folder / "table.parquet")
    save_file(tensors, folder / "tensors.safetensors")
    (folder / "result.json").write_text(text)


def uniform_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns of mixed Python types as text: Parquet columns have one type (layers are ``0`` or ``"encoder.0"``)."""
    frame = frame.copy()
    for name in frame.columns:
        if frame[name].dtype == object and frame[name].map(type).nunique() > 1:
            frame[name] = frame[name].astype(str)
    return frame


def _plain(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """``value`` as JSON; tensors move into ``tensors`` and leave ``{"tensor": name}`` behind. NaN becomes null."""
    if isinstance(value, torch.Tensor | np.ndarray):
        tensors[name] = torch.as_tensor(value).detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{name}.{k}", tensors) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{name}.{i}", tensors) for i, v in enumerate(value)]
    if isinstance(value, set | frozenset):
        return [_plain(v, f"{name}.{i}", tensors) for i, v in enumerate(sorted(value, key=str))]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), f"{name}.{f.name}", tensors) for f in fields(value)}
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    raise WorkbenchError(
        f"field {name!r} of a result holds a {type(value).__name__}; results hold tensors, numbers, texts, "
        "lists and mappings"
    )
