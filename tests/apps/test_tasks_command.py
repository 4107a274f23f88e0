"""``workbench tasks show``: what a task is, its options, and examples."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

import workbench as wb
from workbench.apps.commands.tasks import about
from workbench.datasets.tokenizer import word_tokenizer


@pytest.mark.parametrize("name", sorted(wb.tasks()))
def test_every_task_is_shown(workbench, name):
    got = workbench("tasks", "show", name, "-n", "2", "--json").json
    task = wb.task(name)
    pairs = task.build(0, word_tokenizer(), 2)
    assert got["options"] == got["defaults"] == {f.name: getattr(task, f.name) for f in fields(task) if f.init}
    assert got["corruption"] == task.corruption
    assert got["corruptions"] == list(task.corruptions)
    assert got["contrast"] == task.contrast().corruption
    assert got["dropped"] == pairs.dropped
    assert [item["text"] for item in got["examples"]] == list(pairs.texts)
    for i, item in enumerate(got["examples"]):
        assert [row["clean"] for row in item["tokens"]] == word_tokenizer().convert_ids_to_tokens(pairs.clean[i])
        assert sum(row["corrupt"] != "" for row in item["tokens"]) == (pairs.clean[i] != pairs.corrupt[i]).sum()
    shown = workbench("tasks", "show", name)
    assert shown.code == 0
    for option in (*got["defaults"], *task.corruptions, "dropped"):
        assert option in shown.out


@pytest.mark.parametrize("name", sorted(wb.tasks()))
def test_the_drawing_names_every_corruption_and_every_span(name):
    task = wb.task(name)
    said = about(task)
    assert "clean " in said
    for corruption in task.corruptions:
        assert corruption in said, f"{name}: {corruption} is not drawn"
    for span in task.build(0, word_tokenizer(), 8).spans:
        first = re.sub(r"\d+$", "0", span)  # the rest of a numbered series goes without saying
        assert span in said or first in said, f"{name}: the span {span} is not told"


def test_an_option_of_the_task_is_used_and_shown(workbench):
    words = ("tasks", "show", "agreement", "--task-option", "corruption=unmarked", "--task-option", "structure=simple")
    got = workbench(*words, "--json").json
    assert got["options"] == {"corruption": "unmarked", "structure": "simple", "split": "train"}
    assert got["defaults"]["corruption"] == "number"
    first = got["examples"][0]["tokens"]
    assert [row["clean"] for row in first[:2]] == ["<bos>", "The"]
    assert len(first) == 3
    assert "unmarked" in workbench(*words).out


def test_contrast_shows_the_negatives(workbench):
    got = workbench("tasks", "show", "ioi", "--contrast", "--json").json
    assert got["corruption"] == got["contrast"] == "abc"
    same = workbench("tasks", "show", "ioi", "--task-option", "corruption=abc", "--json").json
    assert got["examples"] == same["examples"]
    assert got["examples"] != workbench("tasks", "show", "ioi", "--json").json["examples"]


def test_mistakes_are_one_line(workbench):
    assert "s1_random" in workbench("tasks", "show", "ioi", "--task-option", "corruption=s3").mistake()
    assert "greater-than" in workbench("tasks", "show", "less-than").mistake()
    assert "no option 'structure'" in workbench("tasks", "show", "ioi", "--task-option", "structure=rc").mistake()
