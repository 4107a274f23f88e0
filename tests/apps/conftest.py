"""Small random models on disk, and a way to call the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import browser_page, chromium, shown  # noqa: F401
from typer.testing import CliRunner

from workbench.apps.cli import app
from workbench.datasets.tokenizer import vocabulary, word_tokenizer
from workbench.models.native import NativeModel
from workbench.models.native_net import NativeConfig, NativeNet

TEXT = "When Mary and John went to the store, John gave a ring to"


def build(name: str, mixer: str = "softmax", seed: int = 0, context: int = 256) -> NativeModel:
    """A random model of 2 layers x 2 heads with the bundled models' tokenizer."""
    torch.manual_seed(seed)
    sizes = {"layers": 2, "heads": 2, "width": 16, "head_width": 8, "mlp_width": 16, "vocab": len(vocabulary())}
    net = NativeNet(NativeConfig(**sizes, mixer=mixer, context=context)).eval()
    return NativeModel(net, word_tokenizer(), name=name)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random softmax model."""
    return str(build("random").save(tmp_path_factory.mktemp("models") / "random"))


@pytest.fixture(scope="session")
def gated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random gated model."""
    return str(build("gated", "gated-softmax", seed=1).save(tmp_path_factory.mktemp("models") / "gated"))


class Answer:
    """Exit code and both streams of a command."""

    def __init__(self, result: Any) -> None:
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr
        self.exception = result.exception

    @property
    def json(self) -> Any:
        """stdout as one JSON document; NaN and Infinity are no JSON."""

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        assert self.code == 0, f"exit code {self.code}: {self.err}"
        return json.loads(self.out, parse_constant=refuse)

    def mistake(self) -> str:
        """The one line of a user's mistake: exit code 2, nothing on stdout, no traceback."""
        assert self.code == 2, f"exit code {self.code}: {self.out} {self.err} {self.exception!r}"
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("workbench: ")
        return lines[0]


@pytest.fixture(scope="session")
def workbench() -> Callable[..., Answer]:
    """``workbench("sinks", folder, "--text", "...")``."""
    runner = CliRunner()
    return lambda *words: Answer(runner.invoke(app, [str(word) for word in words]))


@pytest.fixture
def half_written(tmp_path: Path, workbench: Callable[..., Answer], model: str) -> Path:
    """A results folder whose one result lost a file."""
    assert workbench("sinks", model, "--text", TEXT, "--out", tmp_path / "store" / "sinks").code == 0
    (tmp_path / "store" / "sinks" / "tensors.safetensors").unlink()
    return tmp_path / "store"
