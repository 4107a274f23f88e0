"""What keeps a server quick: imports behind the first page, and garbage collections that pass over what was imported."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from workbench.apps.screen import warm
from workbench.apps.screen.need import guarded


@pytest.fixture(autouse=True)
def thawed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(warm, "_put_aside", len(sys.modules))
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_what_a_page_imported_is_put_aside_when_the_next_run_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    guarded(lambda: None)
    assert gc.get_freeze_count() == 0
    for i in range(60):
        monkeypatch.setitem(sys.modules, f"imported{i}", ModuleType(f"imported{i}"))
    guarded(lambda: None)
    frozen = gc.get_freeze_count()
    assert frozen > 0
    made = [[] for _ in range(1000)]
    guarded(lambda: None)
    assert gc.get_freeze_count() <= frozen  # what is put aside may still be let go of
    del made


def test_pages_compute_on_one_thread() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        warm._imports()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
