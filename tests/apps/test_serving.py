"""The command that starts the app: on which addresses it answers, and what it does with a folder that is not there."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words of the commands that replaced this process, had they been let."""
    words: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda path, given: words.append(given))
    return words


def test_the_command_binds_to_this_machine_and_reports_nothing(workbench, tmp_path, started) -> None:
    answer = workbench("app", "--store", tmp_path, "--port", "8599", "--models", tmp_path)
    assert answer.code == 0
    assert "http://127.0.0.1:8599" in answer.out
    (words,) = started
    assert words[words.index("--server.address") + 1] == "127.0.0.1"
    assert words[words.index("--server.port") + 1] == "8599"
    assert words[words.index("--browser.gatherUsageStats") + 1] == "false"
    assert words[words.index("--") + 1 :] == ["--store", str(tmp_path), "--models", str(tmp_path)]


def test_a_store_that_is_not_there_yet_is_fine(workbench, tmp_path, started) -> None:
    assert workbench("app", "--store", tmp_path / "new" / "results", "--port", "8599").code == 0
    assert started
    assert not (tmp_path / "new").exists()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """The app as a person starts it, on a results folder that does not exist."""
    port = _free_port()
    words = [sys.executable, "-m", "workbench", "app", "--store", str(tmp_path / "none"), "--port", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield port, process
    process.terminate()
    process.wait(30)


def _listening(port: int) -> list[str]:
    """Addresses on which the port is open, as the kernel writes them."""
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1].split(":")[0] for row in rows if row[3] == "0A" and int(row[1].split(":")[1], 16) == port]


def test_the_server_answers_here_and_nowhere_else(server) -> None:
    port, process = server
    ends = time.monotonic() + 60
    while True:
        assert process.poll() is None
        assert time.monotonic() < ends
        try:
            answer = urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5)
            break
        except OSError:
            time.sleep(0.2)
    assert answer.status == 200
    assert _listening(port) == ["0100007F"]
