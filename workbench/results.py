"""What every analysis returns: numbers and labels, drawn later."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.errors import WorkbenchError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


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
        """
        from safetensors.torch import save_file

        path = Path(path)
        if path.exists():
            raise WorkbenchError(f"{path} exists already; choose another name or remove it")
        part = path.with_name(path.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir(parents=True)
        except OSError as error:
            raise WorkbenchError(f"cannot write {path}: {error.strerror or error}") from error
        self.frame().to_parquet(part / "table.parquet")
        tensors, labels = {}, {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, torch.Tensor):
                tensors[field.name] = value.detach().contiguous().cpu()
            else:
                labels[field.name] = _jsonable(value)
        save_file(tensors, part / "tensors.safetensors")
        (part / "result.json").write_text(json.dumps({"type": type(self).__name__, **labels}, indent=1, default=str))
        part.rename(path)
        return path

    def _repr_html_(self) -> str:
        return self.frame().head(60).to_html(escape=True, float_format=lambda x: f"{x:.4g}")


def _jsonable(value: Any) -> Any:
    if hasattr(value, "dict") and callable(value.dict):
        return value.dict()
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if isinstance(value, np.generic):
        return value.item()
    return value


def axis(ax: Axes | None, width: float = 6.0, height: float = 4.0) -> Axes:
    """``ax``, or the axis of a new figure that no global state owns."""
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained").subplots()
