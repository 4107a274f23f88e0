"""What capture computes and what it keeps: passes of the statistics kernel, bytes of maps, nothing after them."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from builders import NETS, L, hugging_face, native
from torch import Tensor

from workbench import mods
from workbench.captures import capture
from workbench.maps import AttentionMap
from workbench.models.hf import HFModel
from workbench.patterns import softmax


def held(*maps: AttentionMap) -> int:
    """Bytes of all storages that maps hold on to, masks apart."""
    found: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for part in value.values():
                look(part)
        elif isinstance(value, tuple | list):
            for part in value:
                look(part)
        elif isinstance(value, AttentionMap) or type(value).__name__ == "Scores":
            look({name: part for name, part in vars(value).items() if name != "mask"})

    look(list(maps))
    return sum(found.values())


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "native"])
def test_a_run_passes_over_every_layer_once(name: str, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = native() if name == "native" else hugging_face(name, dtype=torch.float32)
    calls, plain = [], softmax.attention_stats

    def watch(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return plain(*args, **options)

    monkeypatch.setattr(softmax, "attention_stats", watch)
    mass = {"sink": mods.sink(), "first": torch.arange(11) < 4}
    request = capture(
        blocks=4, reduce=("sum", "max"), stats=("received", "entropy", "distance", "distance2", "top1"), window=3,
        topk=2, mass=mass, keep=keep,
    )  # fmt: skip
    run = case.model.run(case.inputs, maps=request)
    for found in run.maps.values():
        found.received(), found.entropy(), found.distance(), found.distance(3), found.distance(moment=2)
        found.topk(1), found.topk(2), found.mass("sink"), found.mass("first"), found.blocks(4), found.blocks(4, "max")
    assert len(calls) == L
    assert run.provenance.kernel == "cpu"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_a_map_keeps_q_and_k_in_the_models_type_and_lse(name: str) -> None:
    model = HFModel(NETS[name](dtype=torch.bfloat16), name=name)
    found: Any = model.run(torch.arange(3, 53)[None], maps=capture(layers=1, stats=("received",))).maps[1]
    assert found.scores.q.dtype == found.scores.k.dtype == torch.bfloat16
    assert found.lse.dtype == torch.float32
    _, h, n, e = found.scores.q.shape
    g = found.scores.k.shape[1]
    assert held(found) == 2 * n * e * (h + g) + 4 * h * n + 4 * h * n


def test_maps_of_many_runs_leave_nothing_behind() -> None:
    model = hugging_face("llama").model
    request = capture(blocks=4, stats=("received", "entropy"), mass={"sink": mods.sink()})

    def alive() -> tuple[int, int]:
        gc.collect()
        tensors = [x for x in gc.get_objects() if issubclass(type(x), Tensor)]
        return len(tensors), sum(x.untyped_storage().nbytes() for x in tensors)

    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        model.run(ids, maps=request).maps[0].dense()
        before = alive()
        for _ in range(10):
            model.run(ids, maps=request).maps[1].dense()
        after = alive()
    assert after[0] <= before[0]
    assert after[1] <= before[1]
