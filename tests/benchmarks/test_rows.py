"""The benchmark of the kernels measures what it says: every row gives the right numbers, and its work is counted."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

machine: Any
peers: Any
setting: Any
kernels: Any
"""The benchmark's modules. They import each other by their bare names, so they are there while these tests run and no longer."""


@pytest.fixture(autouse=True, scope="module")
def _scripts():
    global machine, peers, setting, kernels
    folder = Path(__file__).parent
    names = ("machine", "peers", "setting", "softmax_ways", "other_ways", "truths")
    sys.path.insert(0, str(folder))
    try:
        machine, peers, setting, *_ = [importlib.import_module(name) for name in names]
        spec = importlib.util.spec_from_file_location("benchmark_of_kernels", folder / "kernels.py")
        assert spec is not None
        assert spec.loader is not None
        kernels = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = kernels
        spec.loader.exec_module(kernels)
        yield
    finally:
        sys.path.remove(str(folder))
        for name in (*names, "benchmark_of_kernels"):
            sys.modules.pop(name, None)


def small(tokens: int = 150, **changes) -> Any:
    sizes = {"tokens": tokens, "heads": 4, "kv_heads": 2, "width": 16, "dtype": torch.float32, "device": "cpu"}
    return setting.Setting(**{**sizes, "block": 32, **changes})


NAMES = ("attention", "received", "maximum", "sparse", "sigmoid", "linear", "delta", "encode", "decode")


def test_every_question_is_tested():
    assert tuple(kernels.QUESTIONS) == NAMES


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_row_gives_the_right_numbers(name):
    question, at = kernels.QUESTIONS[name], small()
    ways = question.ways(at)
    errors = machine.differences(ways, question.truth(at))
    ran = [way for way in ways if way.call is not None]
    assert len({way.name for way in ways}) == len(ways)
    assert set(errors) == {way.name for way in ran if way.read is not None}
    assert len(errors) >= 2
    assert max(errors.values()) < 1e-5, errors
    assert all(way.remark for way in ways if way.call is None)
    assert all(way.base in {"", *(w.name for w in ways)} for way in ways)
    assert all(way.flops > 0 and way.moved > 0 for way in ran)


def test_an_error_is_relative_and_the_output_counts_only_alone():
    truth = {"output": torch.tensor([1.0]), "sum": torch.tensor([4.0, 2.0])}
    way = machine.Way("maps", lambda: {"output": torch.tensor([9.0]), "sum": torch.tensor([4.0, 1.0])}, read=dict)
    alone = machine.Way("output", lambda: {"output": torch.tensor([1.5])}, read=dict)
    assert machine.differences([way, alone], truth) == {"maps": 0.25, "output": 0.5}


def test_answers_that_are_not_numbers_show(monkeypatch):
    way = machine.Way("broken", lambda: {"sum": torch.ones(1), "max": torch.tensor([float("nan")])}, read=dict)
    question = kernels.Question("", lambda at: [way], lambda at: {"sum": torch.ones(1), "max": torch.ones(1)})
    computer = machine.Machine("", "cpu", "float32", "", matmul=1.0, copy=1.0)
    (row,) = kernels.ask(question, small(8), computer, 1, 1.0)
    assert row["error"] is None
    assert row["remark"].startswith("its answers are not finite")


def test_work_is_counted():
    at = small(3, heads=2, kv_heads=1, width=8)
    assert at.pairs == 2 * 6
    assert at.attention == 2 * 6 * (2 * 8 + 2 * 8)
    assert at.inputs == (2 * 2 + 2 * 1) * 3 * 8 * 4
    assert small(65).maps == 4 * 4 * 3**2


def test_limit_is_the_slower_of_arithmetic_and_traffic():
    computer = machine.Machine("", "cpu", "float32", "", matmul=10.0, copy=2.0)
    assert computer.limit(machine.Way("", None, flops=100, moved=4)) == 10
    assert computer.limit(machine.Way("", None, flops=10, moved=8)) == 4


def test_rows_take_turns_and_ratios_are_of_one_round(monkeypatch):
    """A machine that gets slower from round to round changes the seconds, not the ratios."""
    order: list[str] = []
    speed = {"first": 1.0, "double": 2.0}

    def seconds(call, device, times=1):
        call()
        rounds = len(order) // 2
        return speed[order[-1]] * (1 + rounds)

    monkeypatch.setattr(machine, "seconds", seconds)
    monkeypatch.setattr(machine, "peak_bytes", lambda call, device: 3 * 2**20)
    ways = [
        machine.Way("first", lambda: order.append("first"), flops=1.0),
        machine.Way("double", lambda: order.append("double"), base="first"),
        machine.Way("absent", None, remark="not installed: it"),
        machine.Way("broken", lambda: 1 / 0),
    ]
    computer = machine.Machine("", "cpu", "float32", "", matmul=1.0, copy=1.0)
    rows = {row["way"]: row for row in machine.measure(ways, computer, 3, 1e9)}
    assert order[4:10] == ["first", "double"] * 3
    assert rows["double"]["ratio"] == rows["double"]["base_ratio"] == pytest.approx(2, rel=0.3)
    assert rows["double"]["rounds"] == 3
    assert rows["double"]["peak_mb"] == 3
    assert rows["first"]["of_limit"] == pytest.approx(1 / rows["first"]["seconds"])
    assert rows["absent"] == {"way": "absent", "remark": "not installed: it"}
    assert rows["broken"]["remark"] == "failed: ZeroDivisionError: division by zero"
    text = machine.table([row | {"error": None} for row in rows.values()])
    assert len({line.count("|") for line in text.splitlines()}) == 1


def test_a_slow_row_gets_one_round(monkeypatch):
    monkeypatch.setattr(machine, "seconds", lambda call, device, times=1: 5.0)
    computer = machine.Machine("", "cpu", "float32", "", matmul=1.0, copy=1.0)
    (row,) = machine.measure([machine.Way("slow", lambda: None)], computer, 4, budget=4.0)
    assert row["rounds"] == 1


def test_tables_for_people(monkeypatch, capsys):
    sizes = ["--heads", "2", "--kv-heads", "1", "--width", "16", "--tokens", "40", "50", "--repeat", "1"]
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cpu", *sizes, "--only", "encode"])
    kernels.main()
    out = capsys.readouterr().out
    assert "TFLOP/s in float32 products" in out
    assert "log-sum-exp of SDPA flash (cpu): ok" in out
    assert out.index("encode, 40 tokens: the best 32 features") < out.index("encode, 50 tokens")
    assert out.count("| topk_encode | ") == 2


@pytest.mark.parametrize("wrong", [("--heads", "3"), ("--only", "nothing")])
def test_wrong_options_are_refused(monkeypatch, wrong):
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cpu", "--tokens", "8", *wrong])
    with pytest.raises(SystemExit) as refused:
        kernels.main()
    assert refused.value.code == 2 or "--kv-heads must divide --heads" in str(refused.value.code)


def test_median():
    assert machine.median([3.0, 1.0, 2.0]) == 2
    assert machine.median([4.0, 1.0, 2.0, 3.0]) == 2.5


def test_peak_memory_is_that_of_the_call():
    held = torch.ones(2**22)
    needed = machine.peak_bytes(lambda: held * 2 + held, "cpu") / held.nbytes
    assert 1.9 < needed < 2.5
    assert machine.peak_bytes(lambda: None, "cpu") < 2**20


def test_too_large_says_how_large():
    at = small(2**15, free=2.0**30)
    assert setting.too_large(at, 28, "the dense pattern") == "not run: the dense pattern needs 112 GiB, 1 are free"
    assert setting.too_large(small(64), 28, "it") == ""


def test_cuda_backends_are_called_as_torch_declares_them():
    """Without a GPU: on tensors without numbers."""
    for width, heads, groups in ((64, 4, 4), (128, 8, 2)):
        q, k = torch.empty(1, heads, 100, width, device="meta"), torch.empty(1, groups, 100, width, device="meta")
        for backend in peers.backends("cuda"):
            output, lse = backend.run(q.half(), k.half(), k.half())
            assert output.shape == q.shape, backend.name
            assert lse.shape == q.shape[:3], backend.name


def test_packages_are_called_as_they_document(monkeypatch):
    """flash-colreduce and flash-linear-attention need CUDA: here something stands in for them that takes what they take."""

    def flash_colreduce(q, k, is_causal=False, reduction="sum"):
        assert q.shape == k.shape
        assert is_causal
        p = torch.softmax((q @ k.transpose(-1, -2) * q.shape[3] ** -0.5).masked_fill(_above(q), -math.inf), -1)
        return getattr(p, reduction)(2)

    def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False):
        assert q.shape[:3] == g.shape == beta.shape
        return peers.torch_delta(*(x.transpose(1, 2) for x in (q, k, v, beta, g))).transpose(1, 2), None

    monkeypatch.setitem(sys.modules, "flash_colreduce", types.SimpleNamespace(flash_colreduce=flash_colreduce))
    rule = types.SimpleNamespace(chunk_gated_delta_rule=chunk_gated_delta_rule)
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", rule)
    at = small()
    exact = kernels.QUESTIONS["received"].truth(at)["received"]
    assert torch.allclose(peers.colreduce(at.q, at.k).double(), exact, atol=1e-5)
    output = peers.fla_delta(*setting.delta_inputs(at))
    assert torch.allclose(output.double(), kernels.QUESTIONS["delta"].truth(at)["output"], atol=1e-5)


def _above(q: torch.Tensor) -> torch.Tensor:
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)


def test_pooling_after_seer_attention():
    """In Triton's interpreter, as a CUDA device would run it."""
    at = small(64, heads=2, kv_heads=1)
    found = peers.seer(at.q, at.k, at.v, 32)
    exact = kernels.QUESTIONS["maximum"].truth(at)
    assert torch.allclose(found["output"].double(), exact["output"], atol=1e-5)
    assert torch.allclose(found["max"].double(), exact["max"], rtol=0.05)


def test_what_cannot_run_says_why():
    assert peers.missing("flash_colreduce", "cpu") == "needs a CUDA device"
    assert peers.missing("no_such_package", "cuda") == "not installed: no-such-package"
    assert peers.missing("torch", "cpu", cuda_only=False) == ""
