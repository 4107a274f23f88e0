"""The notebooks run from the first cell to the last, offline, and show what they speak of."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from fragment_checks import Fragment
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[2] / "apps" / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
SHOWS = {
    "first-look": {"figures": 2, "views": 4, "says": "without it"},
    "long-context": {"figures": 1, "views": 4, "says": "trained on 192 tokens"},
    "circuits-and-saes": {"figures": 2, "views": 3, "says": "held 1.0000"},
}
"""Least numbers of drawings (SVG) and of interactive views, and words of the printed output."""


def test_the_notebooks_are_these() -> None:
    assert set(NAMES) == set(SHOWS)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_without_outputs(name: str) -> None:
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)
        assert not cell.metadata
    for target in re.findall(
        r"\]\(([^)#\s]+)", "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    ):
        assert "://" in target or (NOTEBOOKS / target).exists(), target


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Jupyter of its own whose only kernel is the Python that runs the tests; gives the folder that it works in."""
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "tests", "language": "python"}))
    for name, folder in (("JUPYTER_PATH", "jupyter"), ("JUPYTER_RUNTIME_DIR", "runtime"), ("IPYTHONDIR", "ipython")):
        monkeypatch.setenv(name, str(tmp_path / folder))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs(name: str, kernel: Path) -> None:
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(kernel)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    pages = [_html(output) for output in outputs if "text/html" in output.get("data", {})]
    shown = [Fragment(page) for page in pages if "data-figure" in page or "workbench-view" in page]
    wanted = SHOWS[name]
    assert sum("svg" in page.tags for page in shown) >= wanted["figures"]
    assert sum("data-figure" in page for page in pages) >= wanted["views"]
    assert not [page.text for page in shown if "no figure" in page.text or "no picture" in page.text]
    assert wanted["says"] in "".join(output.get("text", "") for output in outputs)
    assert not list(kernel.iterdir()), "a notebook leaves files beside itself"


def _html(output: Any) -> str:
    html = output["data"]["text/html"]
    return html if isinstance(html, str) else "".join(html)
