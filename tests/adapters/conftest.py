"""Other libraries, for the tests of one file at a time.

`make test` puts them into a folder of their own (the Makefile says why). They are imported from there and forgotten again, as
other code behaves differently where it can import them. timm imports torchvision, of which its attention modules use nothing:
where no torchvision fits the installed torch, empty modules stand in for it. fla comes without its models, which would register
themselves with transformers.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch

LIBRARIES = Path(sys.prefix) / "libraries"
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


@contextmanager
def borrowed(name: str, *parts: str) -> Iterator[ModuleType]:
    """The library with these of its modules, or a skipped test; nothing of it is left in ``sys.modules`` afterwards."""
    sys.path.append(str(LIBRARIES))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = pytest.importorskip(name)
            for part in parts:
                importlib.import_module(f"{name}.{part}")
        yield found
    finally:
        sys.path.remove(str(LIBRARIES))
        _forget(name)


def _forget(name: str) -> None:
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError):  # RuntimeError: a torchvision for another build of torch
        _forget(name)
        return False
    return True


@pytest.fixture(scope="module")
def timm() -> Iterator[ModuleType]:
    """timm with the models that the tests take apart."""
    names = ("vision_transformer", "swin_transformer", "convit", "volo", "efficientvit_msra", "davit", "eva")
    absent = not _imports("torchvision")
    for name in TORCHVISION if absent else ():
        sys.modules[name] = _Empty(name)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, sys.modules[name])
    try:
        with borrowed("timm", *(f"models.{name}" for name in names)) as found:
            yield found
    finally:
        if absent:
            _forget("torchvision")


@pytest.fixture(scope="module")
def natten() -> Iterator[ModuleType]:
    with borrowed("natten") as found:
        yield found


@pytest.fixture(scope="module")
def fla() -> Iterator[ModuleType]:
    """flash-linear-attention; its kernels in Triton's interpreter, where an autotuner has nothing to measure."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fla.models", None)
        with borrowed("fla", "layers") as found:
            if not torch.cuda.is_available():
                from triton.runtime.autotuner import Autotuner

                patch.setattr(Autotuner, "_bench", lambda *_, **__: [0.0, 0.0, 0.0])
            yield found
