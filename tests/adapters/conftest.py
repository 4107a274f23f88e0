"""Other libraries as the tests use them: fla without its models, which register themselves with transformers."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch


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
