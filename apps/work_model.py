"""What is known about a model once it is loaded: sizes, layers, sites. Computed in a job, read by the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.apps.memory import SHORTEST, memory_plot
from workbench.errors import WorkbenchError
from workbench.models.protocol import Manifest, Model, Shape
from workbench.probes.vision.grid import Grid, grid_of
from workbench.results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_BUNDLED = Path(__file__).parents[1] / "datasets" / "models"


@dataclass(frozen=True)
class ModelFacts(Result):
    """``shape`` and ``manifest`` of a model; ``parameters`` how many numbers it has, ``dtype`` their type, ``kind`` the class
    that runs it, ``grid`` where the patches lie if it reads images."""

    name: str
    kind: str
    dtype: str
    parameters: int
    shape: Shape
    manifest: Manifest
    grid: Grid | None = None

    def frame(self) -> pd.DataFrame:
        """One row per attention layer: ``layer, mixer, route, exactness, missing``."""
        return self.manifest.frame()

    def plot(self, ax: Axes | None = None) -> Axes:
        """What its attention takes in memory by the length of the input."""
        return memory_plot(self.shape, SHORTEST, ax, dtype=self.dtype)


def model_facts(model: Model) -> ModelFacts:
    """The facts of a loaded model; nothing is run."""
    net: Any = next(
        (found for name in ("net", "model", "bridge") if (found := getattr(model, name, None)) is not None), None
    )
    weights = [] if net is None else list(net.parameters())
    return ModelFacts(
        name=model.name,
        kind=type(net if net is not None else model).__name__,
        dtype=str(weights[0].dtype).removeprefix("torch.") if weights else "float32",
        parameters=sum(weight.numel() for weight in weights),
        shape=model.shape,
        manifest=model.manifest(),
        grid=_grid(model),
    )


def _grid(model: Model) -> Grid | None:
    try:
        return grid_of(model)
    except WorkbenchError:
        return None  # it reads text, or images whose patches do not lie in one grid


def shape_of(labels: Mapping[str, Any]) -> Shape:
    """The shape of facts that were read back from their cell."""
    return Shape(**labels["shape"])


def card(name: str) -> str:
    """What a bundled model says about itself, in Markdown; empty for a model that has no card."""
    path = _BUNDLED / name / "card.md"
    if name != Path(name).name or not path.is_file():
        return ""
    return path.read_text(encoding="utf-8")
