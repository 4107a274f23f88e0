"""``workbench bench``: what there is, and that a benchmark of the checkout runs with its own options and exit code."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from workbench.apps.commands import bench

TINY = ("--heads", "2", "--kv-heads", "1", "--width", "16", "--tokens", "40", "--repeat", "1", "--threads", "1")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "workbench", "bench", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_alone_it_lists_what_there_is(workbench):
    rows = workbench("bench", "--json").json["rows"]
    assert [row["name"] for row in rows] == list(bench.NAMES)
    assert rows[0]["measures"].startswith("What block maps and statistics cost in one attention call")
    assert "\n" not in rows[0]["measures"]
    assert "│ capture       │ What capture costs" in workbench("bench").out


def test_options_are_passed_on_and_the_answer_is_one_document():
    done = run("kernels", "--json", "--device", "cpu", *TINY, "--only", "maximum", "decode")
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert [(t["question"], t["tokens"]) for t in got["tables"]] == [("maximum", 40), ("decode", 40)]
    assert got["machine"]["device"] == "cpu"
    assert got["machine"]["matmul"] > 0
    assert got["sizes"] == {"heads": 2, "kv_heads": 1, "width": 16, "block": 64}
    assert got["log_sum_exp"]["SDPA flash (cpu)"].startswith("ok")
    rows = {row["way"]: row for row in got["tables"][0]["rows"]}
    assert rows["SDPA flash (cpu)"]["ratio"] == 1
    mapped = rows["flash_attention with the maximum"]
    assert mapped["error"] < 1e-5
    assert mapped["base_ratio"] == pytest.approx(mapped["seconds"] / rows["flash_attention"]["seconds"])
    assert mapped["of_limit"] == pytest.approx(mapped["limit_seconds"] / mapped["seconds"])


def test_the_exit_code_and_the_stream_are_the_benchmarks(workbench, monkeypatch, tmp_path, capfd):
    for name in bench.NAMES:
        (tmp_path / f"{name.replace('-', '_')}.py").write_text(
            "import sys; print(sys.argv[1:]); print('no', file=sys.stderr); sys.exit(3)"
        )
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    answer = workbench("bench", "decode", "--steps", "4", "--json", "--", "--help")
    assert answer.code == 3
    assert capfd.readouterr() == ("['--json', '--steps', '4', '--help']\n", "no\n")


def test_an_unknown_benchmark_is_one_line(workbench):
    assert "no benchmark 'kernel'; known: kernels, capture, decode" in workbench("bench", "kernel").mistake()


def test_an_installed_package_has_none(workbench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "FOLDER", tmp_path)
    for words in (("bench",), ("bench", "kernels")):
        assert "part of the repository, not of an installed package" in workbench(*words).mistake()


def test_capture_measures_every_way_in_turn():
    sizes = ("--tokens", "48", "--repeat", "2", "--threads", "1", "--layers", "1")
    done = run("capture", "--json", *sizes, "--only", "capture")
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    (row,) = got["rows"]
    assert list(row["ways"]) == ["plain", "capture"]
    assert row["ways"]["plain"]["ratio"] == 1
    for way in row["ways"].values():
        assert way["seconds"] > 0
        assert way["rounds"] == 2
    assert row["floor_seconds"] > 0
    assert "GFLOP/s in q k^T products of float32" in got["machine"]


def test_ways_of_capture_do_what_they_are_called(tmp_path):
    spec = importlib.util.spec_from_file_location("benchmark_of_capture", bench.FOLDER / "capture.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    ids = torch.arange(48)[None]
    with torch.no_grad():
        found = {way: script.prepare(way, script.build(way, "cpu", 2, 48), ids, tmp_path)() for way in script.WAYS}
    assert found["plain"].attentions is None
    assert [a.shape for a in found["eager"].attentions] == [(1, 8, 48, 48)] * 2
    _, cache = found["transformer-lens"]
    patterns = [value for name, value in cache.items() if name.endswith("hook_pattern")]
    assert len(patterns) == len(cache) == 2
    for i in range(2):
        exact = found["eager"].attentions[i]
        assert torch.allclose(patterns[i], exact, atol=1e-5)
        assert torch.allclose(found["capture"].maps[i].received(), exact.sum(2), atol=1e-4)
    assert len(found["capture"].maps) == 2
    assert list(found["one layer"].maps) == [1]
    assert len(found["store"].maps) == 2
    assert (tmp_path / "0" / "maps.json").is_file()


def test_leaderboard_of_circuits_and_its_submission(tmp_path):
    words = ("--models", "compiled-induction", "--methods", "eap,random", "--pairs", "4", "--threads", "1")
    done = run("circuits", "--json", *words, "--export-mib", str(tmp_path / "mib"))
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["eap"]["auroc"] > 0.7 > rows["random"]["auroc"]
    assert (rows["eap"]["forward"], rows["eap"]["backward"]) == (2, 1)
    assert rows["eap"]["cmd"] < rows["random"]["cmd"]
    assert (tmp_path / "mib" / "eap" / "induction_compiled-induction" / "importances.json").is_file()
    done = run("circuits", "--models", "nosuch")
    assert done.returncode != 0
    assert "no model 'nosuch'" in done.stderr
    assert "Traceback" not in done.stderr


def test_codes_beside_baselines():
    done = run(
        "codes", "--json", "--models", "siit-ioi", "--pairs", "8", "--draws", "1", "--threads", "1", "--only-models"
    )
    assert done.returncode == 0, done.stderr
    rows = {row["form"]: row["auroc"] for row in json.loads(done.stdout)["rows"]}
    assert rows["exact mean ablation"] == 1.0
    assert {"published", "default", "default, shuffled labels", "logistic probe"} <= set(rows)
