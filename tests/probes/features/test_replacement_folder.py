"""Transcoders of all layers from one folder, whichever way it was filled."""

from __future__ import annotations

from pathlib import Path

import pytest

import workbench as wb
from workbench.coders.catalogue import make_coder
from workbench.errors import WorkbenchError


def transcoder(layer: int) -> wb.Coder:
    coder = make_coder("topk", 6, 9, k=2, d_out=6)
    coder.about |= {"reads": f"blocks.{layer}.ln2.hook_normalized", "writes": f"blocks.{layer}.hook_mlp_out"}
    return coder


@pytest.mark.parametrize("place", ["layer-{}", "{}/coder", "run/coders/{}-mlp"])
def test_coders_and_what_trainings_left_are_found(tmp_path: Path, place: str) -> None:
    for layer in (0, 3):
        path = tmp_path / place.format(layer)
        path.parent.mkdir(parents=True, exist_ok=True)
        transcoder(layer).save(path)
    assert sorted(wb.load_replacement(tmp_path)) == [0, 3]


def test_two_of_one_layer_and_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkbenchError, match="holds no transcoders"):
        wb.load_replacement(tmp_path)
    for name in ("a", "b"):
        transcoder(1).save(tmp_path / name)
    with pytest.raises(WorkbenchError, match="two coders of layer 1"):
        wb.load_replacement(tmp_path)
