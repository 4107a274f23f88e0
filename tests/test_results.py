import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from workbench.errors import WorkbenchError
from workbench.results import Result, axis, head_map, load_result, wrapped
from workbench.run import Provenance


@dataclass(frozen=True)
class Toy(Result):
    scores: torch.Tensor
    by_layer: Mapping[Any, torch.Tensor] = field(default_factory=dict)
    note: Any = None
    provenance: Provenance = field(default_factory=lambda: Provenance("toy", versions={"torch": "2"}))

    def frame(self):
        return pd.DataFrame({"layer": [0, "encoder.0"], "score": self.scores.double().numpy()})

    def plot(self, ax=None):
        return axis(ax)


def toy(**options):
    return Toy(torch.tensor([1.5, float("nan")]), **options)


def test_what_is_saved_is_read_back(tmp_path):
    by_layer = {0: torch.arange(6.0).reshape(2, 3).T, "cross.1": torch.ones(2, dtype=torch.bool)}
    note = {"heads": [(1, 2)], "share": np.float32(0.25), "nan": float("nan"), "far": float("inf"), "names": {"b", "a"}}
    path = toy(by_layer=by_layer, note=note).save(tmp_path / "deep" / "toy")

    found = load_result(path)

    assert found.type == "Toy"
    assert found.tensors["by_layer.0"].equal(by_layer[0])
    assert found.tensors["by_layer.cross.1"].equal(by_layer["cross.1"])
    assert found.labels["by_layer"] == {"0": {"tensor": "by_layer.0"}, "cross.1": {"tensor": "by_layer.cross.1"}}
    expected = {"heads": [[1, 2]], "share": 0.25, "nan": None, "far": "inf", "names": ["a", "b"]}
    assert found.labels["note"] == expected
    assert found.labels["provenance"]["versions"] == {"torch": "2"}
    assert found.frame()["layer"].tolist() == ["0", "encoder.0"]
    np.testing.assert_array_equal(found.frame()["score"], [1.5, float("nan")])
    assert sorted(p.name for p in path.parent.iterdir()) == ["toy"]


def test_json_is_strict(tmp_path):
    path = toy(note=[float("nan"), float("-inf")]).save(tmp_path / "toy")

    def refuse(name):
        raise AssertionError(name)

    json.loads((path / "result.json").read_text(), parse_constant=refuse)


def test_an_existing_path_is_refused_and_kept(tmp_path):
    path = toy().save(tmp_path / "toy")
    before = (path / "result.json").read_text()
    with pytest.raises(WorkbenchError, match="exists already"):
        toy(note="other").save(path)
    assert (path / "result.json").read_text() == before


def test_a_field_that_is_no_number_or_label_is_named(tmp_path):
    with pytest.raises(WorkbenchError, match=r"field 'note.1' of a result holds a object"):
        toy(note=["fine", object()]).save(tmp_path / "toy")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_behind_when_writing_fails(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    with pytest.raises(WorkbenchError, match=r"cannot write .*toy: No space left on device"):
        toy().save(tmp_path / "toy")
    assert not list(tmp_path.iterdir())


def test_a_folder_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkbenchError, match="cannot write"):
        toy().save(tmp_path / "file" / "toy")


@pytest.mark.parametrize("name", ["table.parquet", "tensors.safetensors", "result.json"])
def test_half_written_and_damaged_results_are_refused(tmp_path, name):
    path = toy().save(tmp_path / "toy")
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(WorkbenchError, match=f"{name} is damaged"):
        load_result(path)
    os.remove(path / name)
    with pytest.raises(WorkbenchError, match=f"not a complete result: {name} missing"):
        load_result(path)


@pytest.mark.parametrize("form", [2, None])
def test_another_format_is_refused_and_named(tmp_path, form):
    path = toy().save(tmp_path / "toy")
    record = json.loads((path / "result.json").read_text())
    assert record.pop("format") == 1
    (path / "result.json").write_text(json.dumps(record if form is None else {**record, "format": form}))
    with pytest.raises(WorkbenchError, match=f"result format {form}; this version reads 1"):
        load_result(path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(WorkbenchError, match="no result folder"):
        load_result(tmp_path / "nowhere")


def test_head_maps_leave_undefined_heads_blank():
    ax = head_map(None, [torch.tensor([0.5, float("nan")]), torch.tensor([1.0])], [0, "cross.0"], title="t", unit="u")
    shown = np.ma.filled(ax.images[0].get_array(), np.nan)
    np.testing.assert_array_equal(shown, [[0.5, np.nan], [1.0, np.nan]])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "cross.0"]
    assert (ax.get_title(), ax.get_xlabel(), ax.get_ylabel()) == ("t", "head", "layer")
    with pytest.raises(WorkbenchError, match="at least one"):
        head_map(None, [], [], title="t", unit="u")


def test_long_labels_stay_on_the_figure() -> None:
    unit = "part of a query's weight that the learned sink takes away from all of the visible keys"
    ax = head_map(None, [torch.ones(2)], [0], title="A title that says a great deal about what is drawn", unit=unit)
    ax.figure.draw_without_rendering()
    drawn, (width, height) = ax.figure.get_tightbbox(), ax.figure.get_size_inches()
    assert 0 <= drawn.x0 <= drawn.x1 <= width
    assert 0 <= drawn.y0 <= drawn.y1 <= height
    assert wrapped("one\ntwo", 3) == "one\ntwo"
