"""Which recorder knows which module class: one line each. Subclasses of a listed class are recorded in the same way."""

from __future__ import annotations

from torch import nn

from workbench.models.recorders.base import Recorder
from workbench.models.recorders.softmax import Bloom, Falcon, Mpt

RECORDERS: dict[str, type[Recorder]] = {
    "FalconAttention": Falcon,
    "BloomAttention": Bloom,
    "MptAttention": Mpt,
}


def is_recorded(module: nn.Module) -> bool:
    return any(cls.__name__ in RECORDERS for cls in type(module).__mro__)


def recorder_of(module: nn.Module) -> type[Recorder]:
    """The recorder of a module for which ``is_recorded``."""
    return RECORDERS[next(cls.__name__ for cls in type(module).__mro__ if cls.__name__ in RECORDERS)]
