"""A small random model that is trained on here, and texts for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from workbench.datasets.corpus import filler_text
from workbench.datasets.tokenizer import vocabulary, word_tokenizer
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet


def build(name: str = "random", seed: int = 0, **options: object) -> NativeModel:
    """A random model of 2 layers x 2 heads of 8, width 16, with the bundled models' tokenizer."""
    torch.manual_seed(seed)
    sizes = {"layers": 2, "heads": 2, "width": 16, "head_width": 8, "mlp_width": 16, "vocab": len(vocabulary())}
    net = NativeNet(NativeConfig(**{**sizes, "context": 256, **options})).eval()
    return NativeModel(net, word_tokenizer(), name=name)


@pytest.fixture(scope="session")
def build_small() -> Callable[..., NativeModel]:
    """``build``, for tests that need more than one model."""
    return build


@pytest.fixture
def small_model() -> NativeModel:
    return build()


@pytest.fixture(scope="session")
def small_texts() -> list[str]:
    """24 texts of 5 to 60 tokens."""
    return [filler_text(i, 5 + 55 * i // 23) for i in range(24)]
