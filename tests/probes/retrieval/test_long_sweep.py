"""A sweep at 4,096 tokens in a process of its own: the memory it takes is not that of the maps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "retrieval.py"
SIZES = ("--tokens", "4096", "--layers", "2", "--width", "64", "--depths", "2", "--steps", "2", "--threads", "1")


def run(*more):
    command = [sys.executable, str(SCRIPT), *SIZES, *more]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_memory_of_a_sweep_is_linear_in_the_text():
    done = run("--json", "--limit", "2")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["tokens"], row["prompts"], row["shape"]) == (4096, 2, [2, 2, 8])
    assert row["maps_gb"] > 1
    assert row["peak_gb"] - row["before_gb"] < 0.25 * row["maps_gb"]


@pytest.mark.slow
def test_memory_is_counted_apart_from_that_of_the_program_that_starts_it():
    held = bytearray(1_500_000_000)
    held[::4096] = b"x" * len(held[::4096])
    done = run("--json", "--limit", "1.4")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_limit_that_is_exceeded_is_an_error():
    done = run("--limit", "0.01")
    assert done.returncode == 1
    assert "exceeds 0.01 GB" in done.stderr
