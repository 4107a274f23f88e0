"""The page of a model: its facts are the model's, its table of memory follows the formulas, mistakes are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import open_page, python_of, settled

import workbench as wb
from workbench.apps.memory import LONGEST, kept, memory_frame, memory_plot, size_text
from workbench.apps.work_model import card, model_facts
from workbench.errors import UnknownName, WorkbenchError
from workbench.models.protocol import Shape

EIGHT_B = Shape(layers=32, heads=32, kv_heads=8, width=4096, head_width=128, vocab=128256, context=131072)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One results folder for all pages: what one has computed the next one reads."""
    return tmp_path_factory.mktemp("store")


def sizes(tokens: int, shape: Shape = EIGHT_B, **more: Any) -> dict[str, int]:
    return {one.name: one.bytes for one in kept(shape, tokens, **more)}


@pytest.mark.parametrize(
    ("tokens", "name", "said"),
    [
        (2048, "dense patterns, fp16", "8.6 GB"),
        (8192, "dense patterns, fp16", "137 GB"),
        (32768, "dense patterns, fp16", "2.2 TB"),
        (131072, "dense patterns, fp16", "35 TB"),
        (8192, "block maps of 128", "34 MB"),
        (32768, "block maps of 128", "537 MB"),
        (131072, "block maps of 128", "8.6 GB"),
        (32768, "received mass, fp32", "134 MB"),
    ],
)
def test_an_8b_model_takes_what_was_measured_elsewhere(tokens: int, name: str, said: str) -> None:
    assert size_text(sizes(tokens)[name]) == said


def test_the_formulas_count_what_the_tensors_hold() -> None:
    shape = Shape(layers=3, heads=4, kv_heads=2, width=8, head_width=5, vocab=None, context=None)
    found = sizes(100, shape, dtype="float32")
    assert found["dense patterns, fp32"] == 3 * torch.zeros(4, 100, 100).nbytes
    assert found["dense patterns, fp16"] == 3 * torch.zeros(4, 100, 100, dtype=torch.float16).nbytes
    assert found["block maps of 32"] == 3 * 2 * torch.zeros(4, 4, 4).nbytes  # 100 tokens are 4 blocks, the last one cut
    q, k, lse = torch.zeros(4, 100, 5), torch.zeros(2, 100, 5), torch.zeros(4, 100)
    assert found["queries and keys, float32"] == 3 * (q.nbytes + k.nbytes + lse.nbytes)
    assert found["received mass, fp32"] == 3 * torch.zeros(4, 100).nbytes


def test_a_capture_on_disk_is_as_large_as_the_estimate_says(tmp_path: Path) -> None:
    model = wb.load("tiny-softmax")
    model.run(torch.arange(512)[None], maps=wb.capture(store=tmp_path / "maps"))
    held = sum(path.stat().st_size for path in (tmp_path / "maps").rglob("*.safetensors"))
    expected = sizes(512, model.shape, dtype="float32")["queries and keys, float32"]
    assert expected <= held < 1.02 * expected


def test_mistakes_of_the_estimate_are_said() -> None:
    with pytest.raises(WorkbenchError, match="at least 1; got 0"):
        kept(EIGHT_B, 0)
    with pytest.raises(UnknownName, match="float16"):
        kept(EIGHT_B, 8, dtype="int4")


@pytest.mark.parametrize(
    ("size", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_600, "1 MB"), (12_300_000, "12 MB")]
)
def test_sizes_for_people(size: int, said: str) -> None:
    assert size_text(size) == said


def test_the_plot_shows_the_table_and_the_memory_of_the_machine() -> None:
    ax = memory_plot(EIGHT_B, 8192, machine=16 * 10**9)
    lines = {line.get_label(): line for line in ax.get_lines()}
    at = list(lines["block maps of 64"].get_xdata()).index(8192)
    frame = memory_frame(EIGHT_B, 8192).set_index("kept")
    assert lines["block maps of 64"].get_ydata()[at] == frame.loc["block maps of 64", "bytes"]
    assert max(lines["block maps of 64"].get_xdata()) == LONGEST
    assert list(lines["memory here, 16 GB"].get_ydata()) == [16e9, 16e9]


def test_facts_are_the_models_own() -> None:
    model = wb.load("tiny-vit")
    facts = model_facts(model)
    assert facts.shape == model.shape
    assert facts.grid == wb.grid_of(model)
    assert facts.parameters == sum(weight.numel() for weight in model.net.parameters())
    assert list(facts.frame()["layer"]) == [0, 1]


def test_a_card_is_read_for_bundled_names_alone(tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("not ours")
    assert card("tiny-vit").startswith("# tiny-vit")
    assert card(str(tmp_path)) == ""
    assert card("../models/tiny-vit") == ""


def test_the_page_shows_facts_layers_memory_and_card(store: Path) -> None:
    page = open_page("model", store, model="tiny-softmax")
    metrics = {one.label: one.value for one in page.metric}
    assert metrics["layers"] == "4"
    assert metrics["heads"] == "8"
    assert metrics["longest in training"] == "192"
    said = [one.value for one in page.text]
    assert "4 layers of softmax (0, 1, 2, 3): captured (native), exact" in said
    table = next(one.value for one in page.dataframe if "formula" in one.value.columns).set_index("kept")
    assert table.loc["dense patterns, fp16", "size"] == size_text(4 * 8 * 8192**2 * 2)
    assert any("# tiny-softmax" in one.value for one in page.markdown)


def test_the_length_changes_the_table_and_stands_in_the_address(store: Path) -> None:
    page = open_page("model", store, model="tiny-softmax")
    page.select_slider(key="tokens").set_value(65536)
    page = settled(page.run())
    table = next(one.value for one in page.dataframe if "formula" in one.value.columns).set_index("kept")
    assert table.loc["dense patterns, fp16", "size"] == size_text(4 * 8 * 65536**2 * 2)
    assert page.query_params["tokens"] == "65536"
    assert any("32,768 tokens at most" in one.value for one in page.info)


def test_a_model_that_is_not_there_and_a_length_that_is_none_are_said(store: Path) -> None:
    open_page("model", store, model="tiny-softmax")
    page = open_page("model", store, model="huge-softmax", tokens="many")
    said = " ".join(one.value for one in page.warning)
    assert "huge" in said
    assert "many" in said
    assert page.metric[0].value == "4"  # the first model is shown instead


def test_a_model_that_cannot_be_loaded_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models" / "<b>broken"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "workbench-native"}))
    import workbench.apps.screen.place as place

    monkeypatch.setattr(place, "_given", lambda: (tmp_path / "store", (tmp_path / "models",)))
    page = open_page("model", tmp_path / "store", model=str(folder))
    assert any("safetensors" in one.value for one in page.error)
    assert not page.metric


def test_its_python_runs(store: Path) -> None:
    page = open_page("model", store, model="tiny-vit")
    found = python_of(page)
    assert len(found) == 2
    for code in found:
        exec(code, {})
