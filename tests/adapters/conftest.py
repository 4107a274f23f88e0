"""Other libraries as the tests use them.

fla comes without its models, which register themselves with transformers. timm imports torchvision, of which its attention
modules use nothing; where no torchvision fits the installed torch, empty modules stand in for it while timm is imported.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

TORCHVISION = (
    "torchvision", "torchvision.ops", "torchvision.ops.misc", "torchvision.models", "torchvision.models.feature_extraction",
    "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets", "torchvision.utils",
)  # fmt: skip


class _Names(type):
    """A class in which every name is that name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Empty(ModuleType):
    """A module in which every name is an empty class."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {})


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """timm with the models that the tests take apart."""
    names = ("vision_transformer", "swin_transformer", "convit", "volo", "efficientvit_msra", "davit", "eva")
    absent = not _imports("torchvision")
    if absent:
        for name in TORCHVISION:
            sys.modules[name] = _Empty(name)
            parent, _, last = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], last, sys.modules[name])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            timm = pytest.importorskip("timm")
            for name in names:
                importlib.import_module(f"timm.models.{name}")
    finally:
        for name in TORCHVISION if absent else ():
            del sys.modules[name]
    return timm


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError):  # a torchvision for another build of torch
        for part in [part for part in sys.modules if part.partition(".")[0] == name]:
            del sys.modules[part]
        return False
    return True


@pytest.fixture(scope="session")
def fla() -> Iterator[ModuleType]:
    """flash-linear-attention; its kernels in Triton's interpreter, where an autotuner has nothing to measure."""
    pytest.importorskip("triton")
    sys.modules["fla.models"] = None  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fla = pytest.importorskip("fla", reason="flash-linear-attention is not installed")
            pytest.importorskip("fla.layers", reason="flash-linear-attention is not installed")
    finally:
        del sys.modules["fla.models"]
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            from triton.runtime.autotuner import Autotuner

            patch.setattr(Autotuner, "_bench", lambda *_, **__: [0.0, 0.0, 0.0])
        yield fla
