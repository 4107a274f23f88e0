"""The user's mistakes: one line on stderr, exit code 2, nothing on stdout, no traceback."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from workbench.apps.terminal import quiet

TEXT = "When Mary and John went to the store, John gave a ring to"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sinks", "nosuch-model", "--text", TEXT), "no bundled model 'nosuch-model'; known: compiled-backup"),
        (("sinks", "./missing/folder", "--text", TEXT), "./missing/folder does not exist"),
        (("sinks", "some-owner/some-model", "--text", TEXT), "some-owner/some-model"),
        (("sinks", "MODEL"), "either --text or --file"),
        (("sinks", "MODEL", "--text", TEXT, "--file", "x"), "got both"),
        (("sinks", "MODEL", "--text", ""), "the prompt is empty"),
        (("sinks", "MODEL", "--text", " \n\t"), "the prompt is empty"),
        (("sinks", "MODEL", "--text", "a \udcff"), "--text is not valid UTF-8"),
        (("sinks", "MODEL", "--file", "no/such/file.txt"), "cannot read no/such/file.txt: No such file or directory"),
        (("sinks", "MODEL", "--file", "."), "is a folder"),
        (("sinks", "MODEL", "--text", TEXT, "--layer", "9"), "no attention layer '9'; known: 0, 1"),
        (("sinks", "MODEL", "--text", TEXT, "--layer", "-1"), "no attention layer '-1'; known: 0, 1"),
        (("capture", "MODEL", "--text", TEXT, "--layer", "encoder.0"), "no attention layer 'encoder.0'"),
        (("capture", "MODEL", "--text", TEXT, "--head", "2"), "no head '2'; known: 0, 1"),
        (("sinks", "MODEL", "--text", TEXT, "--head", "7"), "no head '7'; known: 0, 1"),
        (("heads", "MODEL", "--text", TEXT, "--head", "7"), "no head '7'; known: 0, 1"),
        (
            ("capture", "MODEL", "--text", TEXT, "--site", "blocks.0.attn.hook_patern"),
            "no site 'blocks.0.attn.hook_patern'",
        ),
        (("capture", "MODEL", "--text", TEXT, "--site", "blocks.7.attn.hook_z"), "blocks.7.attn.hook_z"),
        (("capture", "MODEL", "--text", TEXT, "--blocks", "0"), "at least 1; got 0"),
        (("capture", "MODEL", "--text", TEXT, "--blocks", "four"), "Invalid value for '--blocks'"),
        (("capture", "MODEL", "--text", TEXT, "--blocks", "99999999999999999999"), "Invalid value for '--blocks'"),
        (("sinks", "MODEL", "--text", TEXT, "--epsilon", "1.5"), "between 0 and 1; got 1.5"),
        (("sinks", "MODEL", "--text", TEXT, "--epsilon", "nan"), "between 0 and 1; got nan"),
        (("sinks", "MODEL", "MODEL", "--text", TEXT), "one model (two with --compare)"),
        (("sinks", "--compare", "MODEL", "--text", TEXT), "two models"),
        (("sinks", "--compare", "MODEL", "MODEL", "--text", TEXT), "two different models; got"),
        (("sinks", "compiled-inductoin", "--text", TEXT), "; nearest: compiled-induction"),
        (("sinks", "~nosuchuser/model", "--text", TEXT), "~nosuchuser/model does not exist"),
        (("retrieval", "MODEL", "--lengths", "many"), "whole numbers separated by commas"),
        (("retrieval", "MODEL", "--lengths", "0"), "at least 1"),
        (("retrieval", "MODEL", "--lengths", "5000"), "4744 tokens more than the context"),
        (("variants", "softmx"), "no attention variant 'softmx'; known:"),
        (("variants", "--family", "sofmax"), "no family of variants 'sofmax'; known: softmax"),
        (
            ("variants", "grouped-query-attention", "--tokens", "0"),
            "--tokens is between 1 and 64: the map is drawn; got 0",
        ),
        (("variants", "grouped-query-attention", "--head", "9"), "no head '9'; known: 0, 1"),
        (("circuit", "MODEL", "nosuch"), "no task 'nosuch'; known: a"),
        (("circuit", "MODEL", "ioi", "--method", "nosuch", "-n", "2"), "no circuit method 'nosuch'; known: acdc"),
        (("circuit", "MODEL", "ioi", "--level", "layer", "-n", "2"), "no circuit level 'layer'"),
        (("circuit", "MODEL", "ioi", "--ablation", "nosuch", "-n", "2"), "no ablation 'nosuch'"),
        (("circuit", "MODEL", "ioi", "--option", "stepz=2", "-n", "2"), "no option of 'eap-ig' 'stepz'; known: steps"),
        (("circuit", "MODEL", "ioi", "--option", "steps", "-n", "2"), "--option wants name=value"),
        (("circuit", "MODEL", "ioi", "--task-option", "nosuch=1"), "has no option 'nosuch'"),
        (
            ("tasks", "show", "needle", "--task-option", "length=abc"),
            "task 'needle', option length: Input should be a valid integer; got 'abc'",
        ),
        (
            ("tasks", "show", "needle", "--task-option", "length=true"),
            "length: Input should be a valid integer; got True",
        ),
        (
            ("tasks", "show", "needle", "--task-option", "depth=[1]"),
            "depth: Input should be a valid number; got [1]",
        ),
        (
            ("circuit", "MODEL", "ioi", "--method", "discrete-sae", "-n", "2", "--option", "rate=x"),
            "method 'discrete-sae', option rate: Input should be a valid number; got 'x'",
        ),
        (
            ("tasks", "show", "ioi", "--task-option", "split=test", "--task-option", "split=train"),
            "split is given twice",
        ),
        (("heads", "MODEL", "--seed", "99999999999999999999"), "Invalid value for '--seed'"),
        (("circuit", "MODEL", "ioi", "-n", "2", "--option", "steps=1", "--top", "-1"), "top wants 0 <= n"),
        (("circuit", "MODEL", "ioi", "-n", "0"), "at least one example; got n=0"),
        (("faithfulness", "MODEL", "ioi", "--circuit", "c", "--method", "eap"), "say how to find a circuit; --circuit"),
        (("faithfulness", "MODEL", "ioi", "--circuit", "no/such/circuit"), "no circuit folder at no/such/circuit"),
        (("tasks", "show", "nosuch"), "no task 'nosuch'"),
        (("tasks", "--json", "show", "ioi"), "workbench tasks show NAME --json"),
        (("models", "nosuch"), "no bundled model 'nosuch'"),
        (("report", "no/such/results"), "no results folder no/such/results"),
        (("report", __file__), "no results folder"),
        (("app", "--store", __file__), "--store wants a folder"),
        (("app", "--models", "no/such/models"), "--models wants a folder; there is none at no/such/models"),
        (("app", "--port", "99999"), "Invalid value for '--port'"),
        (("nosuch-command",), "No such command 'nosuch-command'"),
        (("sink", "MODEL"), "Did you mean 'sinks'?"),
        (("sinks", "MODEL", "--nosuch"), "No such option: --nosuch"),
        (("sinks",), "Missing argument"),
    ],
)
def test_one_clear_line(workbench, model, words, said):
    for extra in ((), ("--json",)):
        if extra and words[0] in ("nosuch-command", "sink"):
            continue
        line = workbench(*(model if word == "MODEL" else word for word in words), *extra).mistake()
        assert said in line


def test_a_prompt_longer_than_the_context_says_by_how_much(workbench):
    long = "the " * 600
    line = workbench("sinks", "compiled-induction", "--text", long).mistake()
    assert "601 tokens, 89 more than the model's context of 512" in line


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "the prompt is empty"),
        (b"\n", "the prompt is empty"),
        (b"\x89PNG\xff", "is not UTF-8 text: byte 0x89"),
        (b"a\0b", "zero bytes"),
    ],
)
def test_files_that_are_no_text(workbench, model, tmp_path, raw, said):
    path = tmp_path / "prompt.txt"
    path.write_bytes(raw)
    assert said in workbench("sinks", model, "--file", path).mistake()


def test_folders_that_are_no_models(workbench, model, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is not a model folder: it has no config.json" in workbench("models", tmp_path / "empty").mistake()
    broken = shutil.copytree(model, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    assert "model.safetensors is damaged" in workbench("sinks", broken, "--text", TEXT).mistake()
    weights.write_bytes(b"not safetensors at all")
    assert "model.safetensors is damaged" in workbench("models", broken).mistake()
    weights.unlink()
    assert "it has no *.safetensors" in workbench("models", broken).mistake()
    (broken / "config.json").write_text("{")
    assert "config.json is not valid JSON" in workbench("models", broken).mistake()
    assert "is a file, not a folder" in workbench("models", broken / "config.json").mistake()


def test_a_tokenizer_that_knows_no_words(workbench, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    Tokenizer(WordLevel({})).save(str(broken / "tokenizer.json"))
    assert "tokenizer cannot encode the text: WordLevel error" in workbench("sinks", broken, "--text", TEXT).mistake()


@pytest.mark.parametrize("command", ["sinks", "capture", "heads"])
def test_an_output_that_exists_is_left_alone(workbench, model, tmp_path, command):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    assert "exists already" in workbench(command, model, "--text", TEXT, "--out", tmp_path / "there").mistake()
    assert (tmp_path / "there" / "mine.txt").read_text() == "mine"


def test_an_unwritable_output_is_refused_before_the_work(workbench, tmp_path):
    (tmp_path / "file").write_text("")
    words = ("circuit", "a-model-that-would-be-refused-later", "ioi", "--out")
    assert "exists already" in workbench(*words, tmp_path).mistake()
    assert "cannot write to" in workbench(*words, tmp_path / "file" / "out").mistake()
    assert "cannot write to /proc/1" in workbench(*words, "/proc/1/out").mistake()


def test_half_written_results(workbench, half_written, tmp_path):
    line = workbench("report", half_written, "--out", tmp_path / "page").mistake()
    assert "sinks is not a complete result: tensors.safetensors missing" in line
    assert not (tmp_path / "page").exists()
    (half_written / "sinks" / "tensors.safetensors").write_bytes(b"half")
    assert "tensors.safetensors is damaged" in workbench("report", half_written).mistake()


def test_a_circuit_of_another_model_is_refused(workbench, model, tmp_path):
    words = ("induction", "-n", "2", "--method", "eap", "--level", "node")
    assert workbench("circuit", "compiled-needle", "needle", *words[1:], "--out", tmp_path / "c", "--json").json[
        "saved"
    ]
    line = workbench("faithfulness", model, "ioi", "-n", "2", "--circuit", tmp_path / "c").mistake()
    assert "no node of random 'a0.h2'" in line


def test_an_occupied_port(workbench, tmp_path):
    (tmp_path / "store").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        line = workbench("app", "--store", tmp_path / "store", "--port", taken.getsockname()[1]).mistake()
    assert "cannot listen on port" in line


def test_a_reader_that_goes_away_is_no_error():
    for words in (["tasks"], ["tasks", "--json"]):
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "workbench", *words]
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
        os.close(write)
        assert (done.returncode, done.stderr) == (0, "")


def test_stdout_that_is_closed_is_no_error():
    command = f"'{sys.executable}' -m workbench tasks >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_stdin_that_is_closed(model):
    command = f"'{sys.executable}' -m workbench sinks '{model}' --file - <&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "workbench: --file - reads stdin, which is closed\n"


def test_ctrl_c_is_one_line(workbench, monkeypatch):
    import workbench as wb

    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr(wb, "tasks", stop, raising=False)
    answer = workbench("tasks")
    assert (answer.code, answer.out, answer.err) == (130, "", "workbench: interrupted\n")


def test_errors_of_ours_keep_their_traceback(workbench, monkeypatch):
    import workbench as wb

    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr(wb, "tasks", broken, raising=False)
    answer = workbench("tasks")
    assert answer.code == 1
    assert isinstance(answer.exception, RuntimeError)


def test_prints_of_other_packages_stay_off_stdout(workbench, model, monkeypatch):
    import workbench as wb

    plain = wb.load

    def chatty(name):
        print("loading shards")
        return plain(name)

    monkeypatch.setattr(wb, "load", chatty, raising=False)
    answer = workbench("sinks", model, "--text", TEXT, "--json")
    assert answer.json["command"] == "sinks"
    assert "loading shards" in answer.err


def test_warnings_of_others_are_silenced_and_ours_are_one_line(capsys):
    with quiet():
        warnings.warn_explicit("theirs", FutureWarning, "f.py", 1, module="transformers.models")
        warnings.warn_explicit("ours", UserWarning, "g.py", 1, module="workbench.probes.sinks.scores")
    assert capsys.readouterr().err == "warning: ours\n"


def test_nothing_is_left_behind_by_a_refused_command(workbench, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workbench("capture", model, "--text", TEXT, "--layer", "9", "--out", tmp_path / "a" / "b").mistake()
    assert list(Path(tmp_path).iterdir()) == []
