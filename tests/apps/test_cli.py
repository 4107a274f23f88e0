"""The commands on small random models: what they answer, and that ``--json`` is one JSON document."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

import workbench as wb
from workbench.apps.terminal import to_json

TEXT = "When Mary and John went to the store, John gave a ring to"


def test_help_needs_no_torch():
    code = "import sys, workbench.apps.cli as c\ntry: c.main()\nexcept SystemExit as e: assert e.code in (0, None), e.code\n"
    code += "heavy = {'torch', 'pandas', 'transformers', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    done = subprocess.run(
        [sys.executable, "-c", code.replace("import sys,", "import sys; sys.argv = ['workbench', '--help']; import")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in (
        "models",
        "tasks",
        "methods",
        "capture",
        "sinks",
        "retrieval",
        "heads",
        "circuit",
        "faithfulness",
        "doctor",
    ):
        assert f"\n  {name}" in done.stdout


def test_python_m_workbench_is_the_same(workbench):
    done = subprocess.run([sys.executable, "-m", "workbench", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ")
    assert "\n  sinks " in done.stdout


def test_sinks_are_those_of_the_library(workbench, model):
    got = workbench("sinks", model, "--text", TEXT, "--json").json
    loaded = wb.load(model)
    result = wb.sinks(loaded.run(TEXT, maps=wb.capture()))
    assert got["tokens"][:3] == ["<bos>", "When", "Mary"]
    assert got["sink_score"] == pytest.approx(result.sink_score)
    assert got["f_attn"] == pytest.approx(result.f_attn)
    want = result.frame()
    assert len(got["rows"]) == len(want) == 2 * 2 * len(got["tokens"])
    assert [row["share"] for row in got["rows"]] == pytest.approx(want["share"].tolist())
    assert {"layer", "head", "key", "token", "share"} <= set(got["rows"][0])
    assert got["provenance"]["model"] == "random"


def test_sinks_for_people_name_heads_and_tokens(workbench, model):
    answer = workbench("sinks", model, "--text", TEXT, "--epsilon", "0.01")
    best = wb.sinks(wb.load(model).run(TEXT, maps=wb.capture())).strongest()[0]
    assert answer.code == 0
    assert f"head {best.layer}.{best.head} gives {100 * best.share:.0f}% of its weight to '{best.token}'" in answer.out
    assert answer.err == ""


def test_a_saved_result_is_announced(workbench, model, tmp_path):
    for command in ("sinks", "heads", "capture"):
        answer = workbench(command, model, "--text", TEXT, "--out", tmp_path / command)
        assert f"saved in {tmp_path / command}" in answer.out.replace("\n", "")


def test_sinks_of_one_layer(workbench, model):
    rows = workbench("sinks", model, "--text", TEXT, "--layer", "1", "--json").json["rows"]
    assert {row["layer"] for row in rows} == {1}


def test_sinks_compare_two_models(workbench, model, gated):
    got = workbench("sinks", "--compare", model, gated, "--text", TEXT, "--json").json
    one = workbench("sinks", gated, "--text", TEXT, "--json").json
    assert got["compare"][1]["rows"] == one["rows"]
    first = {(r["layer"], r["head"]): r for r in got["difference"]}
    for row in one["rows"]:
        if row["key"] == 0:
            pair = first[row["layer"], row["head"]]
            assert pair["second"] == row["share"]
            assert pair["difference"] == pytest.approx(pair["second"] - pair["first"])
    shown = workbench("sinks", "--compare", model, gated)
    assert shown.code == 0
    assert "generated text" in shown.err
    assert "largest difference: head" in shown.out


def test_twins_are_compared_on_several_texts_with_intervals(workbench, model, gated):
    got = workbench("sinks", "--compare", model, gated, "--json").json
    rows = {(r["model"], r["map"]): r for r in got["models"]}
    apart = f"{gated} - {model}"
    assert set(rows) == {(model, "both"), *((name, m) for name in (gated, apart) for m in ("effective", "raw"))}
    for name in ("f_attn", "sink_score", "largest", "largest_later"):
        for row in rows.values():
            assert row[f"{name}_low"] <= row[name] + 1e-12
            assert row[name] <= row[f"{name}_high"] + 1e-12
        difference = rows[gated, "effective"][name] - rows[model, "both"][name]
        assert rows[apart, "effective"][name] == pytest.approx(difference)
    assert rows[gated, "raw"]["f_attn"] > rows[gated, "effective"]["f_attn"]
    assert {r["layer"] for r in got["layers"]} == {0, 1}
    assert len(got["heads"]) == 2 * 2 * 2
    ratio, low, high = got["ratio"]["effective"]
    assert low < ratio < high
    assert ratio == pytest.approx(rows[model, "both"]["f_attn"] / rows[gated, "effective"]["f_attn"])
    assert got["published"]["without"] == 0.467
    assert got["paired"]
    assert got["sequences"][0] > 1


def test_the_comparison_is_a_table_and_sentences(workbench, model, gated, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    shown = workbench("sinks", "--compare", model, gated).out
    for text in (
        "F-Attn",
        "sink score",
        "largest activation",
        "by layer",
        "by head",
        "with the gate",
        "inside the gate",
    ):
        assert text in shown
    assert "published, inside the gate: 0.467 without and 0.048 with it, 9.7 times less" in shown
    assert "no intervals" not in shown
    one = workbench("sinks", "--compare", model, gated, "--text", TEXT).out
    assert "one text: no intervals" in one
    plain = workbench("sinks", "--compare", model, "compiled-induction").out
    assert "published" not in plain
    assert "times" in plain


def test_ratios_are_told_the_way_round_that_is_larger_than_one():
    from workbench.apps.sentences import times

    assert times(4.0, 3.0, 5.0) == "4 times less [3, 5]"
    assert times(0.25, 0.2, 0.5) == "4 times more [2, 5]"
    assert times(2.0, float("nan"), float("nan")) == "2 times less"


def test_terminals_without_unicode_lose_nothing(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "workbench", "models", "./d\u00fcnn"]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 2
    assert b"./d\\xfcnn does not exist" in done.stderr
    shown = subprocess.run([*command[:3], "tasks"], capture_output=True, env=environment, check=True)
    assert b"| ioi" in shown.stdout
    assert json.loads(to_json({"token": "d\u00fcnn \udcff"})) == {"token": "d\u00fcnn \udcff"}
    assert to_json({"token": "d\u00fcnn"}).isascii()


@pytest.mark.parametrize("columns", ["", "0", "wide", "60"])
def test_any_width_of_terminal(columns):
    command = [sys.executable, "-m", "workbench", "tasks"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": columns}, check=True)
    assert "indirect object" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= (60 if columns == "60" else 160)


def test_a_bundled_name_is_the_bundled_model_wherever_it_is_called(workbench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compiled-needle").mkdir()
    assert workbench("models", "compiled-needle", "--json").json["model"] == "compiled-needle"


def test_prompt_from_file_is_the_prompt(workbench, model, tmp_path):
    for name, raw in (
        ("a", TEXT.encode()),
        ("b", TEXT.encode() + b"\n"),
        ("c", b"\xef\xbb\xbf" + TEXT.encode() + b"\r\n"),
    ):
        (tmp_path / name).write_bytes(raw)
        got = workbench("sinks", model, "--file", tmp_path / name, "--json").json
        assert got["rows"] == workbench("sinks", model, "--text", TEXT, "--json").json["rows"]


def test_tokens_that_look_like_markup_are_shown_as_they_are(workbench, model):
    answer = workbench("capture", model, "--text", "[bold] Mary [/bold] $x^2$ \x1b[31m", "--blocks", "4")
    assert answer.code == 0
    assert "tokens are unknown to the tokenizer" in answer.err


def test_capture(workbench, model, tmp_path):
    got = workbench(
        "capture",
        model,
        "--text",
        TEXT,
        "--blocks",
        "4",
        "--layer",
        "0",
        "--check",
        "--out",
        tmp_path / "new" / "atlas",
        "--json",
    ).json
    run = wb.load(model).run(TEXT, maps=wb.capture(layers=0))
    assert got["parity"] == 0
    assert got["blocks"] == {"size": 4, "shape": {"0": [2, 4, 4]}}
    entropy = run.maps[0].entropy()[0].double().mean(-1)
    assert [row["entropy"] for row in got["rows"]] == pytest.approx(entropy.tolist(), rel=1e-5)
    from workbench.results import load_result

    saved = load_result(tmp_path / "new" / "atlas")
    weights = run.maps[0].dense()[0].double()
    assert saved.tensors["blocks.0"][1, 1, 0] == pytest.approx(float(weights[1, 4:8, 0:4].sum()) / 4, rel=1e-5)
    assert saved.tensors["peaks.0"][1, 1, 0] == pytest.approx(float(weights[1, 4:8, 0:4].max()), rel=1e-5)


def test_heads_on_text_and_on_random_repeats(workbench, model):
    on_text = workbench("heads", model, "--text", TEXT, "--json").json
    want = wb.head_scores(wb.load(model).run(TEXT, maps=wb.capture())).frame()
    assert on_text["source"] == "text"
    assert [row["value"] for row in on_text["rows"]] == pytest.approx(want["value"].tolist(), nan_ok=True)
    random = workbench("heads", model, "--json").json
    assert random["source"].startswith("random repeats")
    assert {row["kind"] for row in random["rows"]} == {"previous", "duplicate", "induction"}
    assert "looks at the previous token" in workbench("heads", model, "--text", TEXT).out


def test_undefined_numbers_are_null(workbench, model):
    got = workbench("heads", model, "--text", "Mary went", "--json").json
    duplicate = [row for row in got["rows"] if row["kind"] == "duplicate"]
    assert all(row["value"] is None for row in duplicate)
    assert "no token occurs twice" in got["undefined"]["duplicate"]
    assert json.loads(to_json({"a": float("nan"), "b": float("inf")})) == {"a": None, "b": "inf"}


def test_retrieval_of_a_compiled_model(workbench):
    got = workbench("retrieval", "compiled-needle", "--lengths", "64,96", "--depths", "2", "--json").json
    head = max((row for row in got["rows"]), key=lambda row: row["score"])
    assert (head["layer"], head["head"], head["score"]) == (1, 1, 1.0)
    assert [(cell["length"], cell["depth"], cell["recall"]) for cell in got["grid"]] == [
        (64, 0.0, 1.0),
        (64, 1.0, 1.0),
        (96, 0.0, 1.0),
        (96, 1.0, 1.0),
    ]
    shown = workbench("retrieval", "compiled-needle", "--lengths", "64", "--depths", "1")
    assert "1 retrieval head: 1.1 (copies 100% of the needle" in shown.out


def test_tasks_and_methods(workbench):
    assert {row["name"] for row in workbench("tasks", "--json").json["rows"]} == set(wb.tasks())
    assert {row["name"] for row in workbench("methods", "--json").json["rows"]} == set(wb.methods())
    assert "eap-ig" in workbench("methods").out
    assert "needle" in workbench("tasks").out


def test_tasks_show_draws_the_tokens(workbench):
    got = workbench("tasks", "show", "ioi", "--json").json["examples"][0]
    words = [row["clean"] for row in got["tokens"]]
    named = {name: row["clean"] for row in got["tokens"] for name in row["span"].split(", ") if name}
    assert words[0] == "<bos>"
    assert got["answer"] == [named["IO"]]
    assert got["wrong"] == [named["S1"]] == [named["S2"]]
    assert [row["corrupt"] for row in got["tokens"] if row["corrupt"]] == [named["IO"]]
    other = workbench("tasks", "show", "ioi", "--task-option", "corruption=abc", "--json").json["examples"][0]
    assert sum(row["corrupt"] != "" for row in other["tokens"]) == 2
    assert "answer:" in workbench("tasks", "show", "needle", "--task-option", "length=40").out


def test_circuit_and_its_faithfulness(workbench, tmp_path):
    folder = tmp_path / "circuit"
    words = ("compiled-induction", "induction", "-n", "4")
    got = workbench(
        "circuit", *words, "--method", "patching", "--level", "node", "--top", "2", "--out", folder, "--json"
    ).json
    assert {row["node"] for row in got["rows"] if row["kept"]} == {"a0.h1", "a1.h2"}
    judged = workbench("faithfulness", *words, "--circuit", folder, "--json").json
    assert judged["rows"][-1]["faithfulness"] == pytest.approx(1)
    assert judged["cpr"] is not None
    assert judged["note"] == ""
    empty = tmp_path / "empty"
    workbench("circuit", *words, "--method", "patching", "--level", "node", "--top", "0", "--out", empty)
    assert "the circuit keeps nothing" in workbench("judge", *words, "--circuit", empty).mistake()
    shown = workbench("circuit", *words, "--method", "eap-ig", "--option", "steps=2", "--level", "node")
    assert shown.out.splitlines()[-1] in ("strongest heads: 1.2, 0.1", "strongest heads: 0.1, 1.2")


def test_variants_are_those_of_the_catalogue(workbench):
    answer = workbench("variants", "--json").json
    assert [row["name"] for row in answer["rows"]] == list(wb.variants().names)
    some = workbench("variants", "--family", "softmax", "--json").json["rows"]
    assert {row["family"] for row in some} == {"softmax"}
    assert len(some) < len(answer["rows"])
    people = workbench("variants").out
    assert all(name in people for name in wb.variants().names)


def test_a_variant_shows_its_map(workbench):
    answer = workbench("variants", "grouped-query-attention", "--tokens", "7", "--head", "1", "--json").json
    variant = wb.variants()["grouped-query-attention"]
    _, amap = variant(**variant.example(0, 7, torch.float64))
    torch.testing.assert_close(torch.tensor(answer["weights"], dtype=torch.float64), amap.dense()[0, 1])
    assert answer["largest |output - M v|"] < 1e-12
    lines = workbench("variants", "grouped-query-attention", "--tokens", "7").out.rstrip().splitlines()
    assert [len(line.split()) for line in lines[-7:]] == [1, 2, 3, 4, 5, 6, 7]


def test_models(workbench, model):
    listed = {row["name"]: row for row in workbench("models", "--json").json["rows"]}
    assert set(listed) == set(wb.bundled())
    assert listed["compiled-induction"]["layers"] == 2
    got = workbench("models", model, "--json").json
    assert got["shape"]["heads"] == 2
    assert [row["layer"] for row in got["rows"]] == [0, 1]
    assert "2 layers x 2 heads" in workbench("models", model).out


def test_doctor(workbench):
    got = workbench("doctor", "--json")
    checks = json.loads(got.out)["checks"]
    assert [c for c in checks if c["status"] == "failed"] == []
    assert got.code == 0
    states = {(c["group"], c["name"]): c["status"] for c in checks}
    assert states["kernel", "cpu"] == states["kernel", "reference"] == "ok"
    assert states["layout", "import datasets"] == "ok"
    for name in wb.bundled():
        assert states["bundled model", name] == "ok"


def test_doctor_says_what_is_broken(workbench, monkeypatch):
    from workbench.kernels import attention_stats as kernel

    plain = kernel.attention_stats

    def wrong(*args, impl=None, **options):
        out = plain(*args, impl=impl, **options)
        out.received.mul_(1.01 if impl == "cpu" else 1)
        return out

    monkeypatch.setattr(kernel, "attention_stats", wrong)
    got = workbench("doctor", "--json")
    failed = [(c["group"], c["name"]) for c in json.loads(got.out)["checks"] if c["status"] == "failed"]
    assert got.code == 1
    assert ("kernel", "cpu") in failed
    assert ("kernel", "reference") not in failed


def test_a_weight_near_its_null_is_called_no_find(workbench):
    said = " ".join(workbench("heads", "compiled-induction").out.split())
    assert "head 1.2 looks at what followed" in said
    assert "no head looks at earlier copies of the token much more than by chance; the nearest, 1.2, with <0.1%" in said


def test_why_faithfulness_is_undefined_is_said(workbench):
    words = ("faithfulness", "compiled-needle", "induction", "-n", "4")
    said = "the metric is 0 with everything and with nothing: faithfulness is undefined"
    assert workbench(*words, "--json").json["note"] == said
    assert said in " ".join(workbench(*words).out.split())
