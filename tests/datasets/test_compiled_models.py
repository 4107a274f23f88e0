import json
from functools import cache

import pytest
import torch

from workbench.circuits import Circuit
from workbench.datasets.catalogue import task
from workbench.datasets.models.compile import COMPILERS, HERE, compiled, main, plan
from workbench.datasets.models.compiled.layout import apart, positions, rotation
from workbench.errors import UnknownName, WorkbenchError
from workbench.models.load import load
from workbench.pairs import accuracy
from workbench.sites import Site

NAMES = sorted(COMPILERS)
SHORT = {"induction": {"length": 12}, "needle": {"length": 48}}


@cache
def made(name):
    return plan(name)


def asked(name, **options):
    """The first task of a compiled model, with short prompts."""
    kind, own = made(name).tasks[0]
    return task(kind, **{**SHORT.get(kind, {}), **own, **options})


def solved(model, pairs):
    with torch.no_grad():
        return float(accuracy(model.run(pairs.clean).logits, pairs).mean())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attention", ["hard", "soft"])
def test_compiled_models_solve_their_task(name, attention):
    model = compiled(name, attention)
    for split in ("train", "test"):
        assert solved(model, asked(name, split=split).build(seed=1, tokenizer=model.tokenizer, n=200)) == 1


@pytest.mark.parametrize("name", ["compiled-induction", "compiled-needle", "compiled-ioi", "compiled-two-task"])
def test_corrupted_prompts_have_the_other_answer(name):
    model = compiled(name)
    pairs = asked(name).build(seed=1, tokenizer=model.tokenizer, n=32)
    assert solved(model, type(pairs)(pairs.corrupt, pairs.clean, pairs.wrong, pairs.answer, pairs.position)) == 1


def test_every_template_and_order_of_indirect_objects_is_solved():
    model = compiled("compiled-ioi")
    seen = set()
    for seed in range(12):
        pairs = asked("compiled-ioi").build(seed, model.tokenizer, 48)
        assert solved(model, pairs) == 1
        seen |= set(zip(pairs.labels["template"], pairs.labels["order"], strict=True))
    assert seen == {(index, order) for index in range(15) for order in ("ABBA", "BABA")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("changed", [{"rotate": 5}, {"norm": "rms", "rotate": 2}, {"kv_heads": 1}], ids=str)
def test_rotation_norm_and_grouped_heads_change_no_answer(name, changed):
    plain, other = compiled(name, "soft"), compiled(name, "soft", **changed)
    ids = asked(name).build(seed=0, tokenizer=plain.tokenizer, n=8).clean
    a, b = plain.run(ids).logits, other.run(ids).logits
    least = 2e-3 if "norm" in changed else 1e-4
    torch.testing.assert_close(a, b, atol=least * float(a.abs().max()), rtol=0)
    assert other.net.config.norm == changed.get("norm", "none")
    assert other.shape.kv_heads == changed.get("kv_heads", plain.shape.heads)


def test_rotation_changes_every_axis():
    plain, turned = compiled("compiled-induction"), compiled("compiled-induction", rotate=0)
    ids = asked("compiled-induction").build(seed=0, tokenizer=plain.tokenizer, n=4).clean
    site = Site("resid_post", 0)
    a, b = (model.run(ids, read=[site]).acts[site] for model in (plain, turned))
    assert (a == 0).double().mean() > 0.5
    assert (b.abs() < 1e-6).double().mean() < 0.01
    q = rotation(20, 3)
    torch.testing.assert_close(q @ q.T, torch.eye(20), atol=1e-5, rtol=0)


def test_grouped_heads_tell_the_truth_of_their_group():
    truth = compiled("compiled-induction", kv_heads=2).ground_truth
    assert ("a0.h1", "a1.g1", "k") in truth.edges
    assert ("input", "a1.g1", "v") in truth.edges
    with pytest.raises(WorkbenchError, match="divides the 4 heads"):
        compiled("compiled-induction", kv_heads=3)


@pytest.mark.parametrize("name", NAMES)
def test_bundled_folder_is_what_the_compiler_makes(name):
    stored, built = load(name), compiled(name)
    assert stored.net.config == built.net.config
    for key, value in built.net.state_dict().items():
        torch.testing.assert_close(stored.net.state_dict()[key], value.to(made(name).store).float(), atol=0, rtol=0)
    assert stored.tokenizer.get_vocab() == built.tokenizer.get_vocab()
    assert isinstance(stored.ground_truth, Circuit)
    assert stored.ground_truth.edges == built.ground_truth.edges
    for column, flags in built.ground_truth.columns.items():
        assert torch.equal(stored.ground_truth.columns[column], flags)
    assert all(f"`{'->'.join(edge[:2])}" in (HERE / name / "card.md").read_text() for edge in built.ground_truth.edges)
    assert sum(path.stat().st_size for path in (HERE / name).rglob("*")) < 4 * 2**20


@pytest.mark.parametrize("name", NAMES)
def test_bundled_models_solve_their_task(name):
    model = load(name)
    kind, own = made(name).tasks[0]
    assert solved(model, task(kind, **own).build(seed=3, tokenizer=model.tokenizer, n=32)) == 1


def test_the_command_writes_complete_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("workbench.datasets.models.compile.HERE", tmp_path)
    names = ["compiled-sort", "compiled-dyck"]
    main(names)
    main(names)
    printed = capsys.readouterr().out
    for name in names:
        assert name in printed
        assert json.loads((tmp_path / name / "config.json").read_text())["norm"] == "none"
        assert load(tmp_path / name).ground_truth.columns["effect_" + name[9:] + "_one"].abs().max() > 1


def test_position_codes_move_back_and_stay_apart():
    table, shift, gap = positions(300)
    torch.testing.assert_close(table[7:] @ shift(7), table[:-7], atol=1e-5, rtol=0)
    inner = table @ table.T
    assert (inner - torch.eye(300) * 2).max() <= 1 - gap + 1e-5
    assert gap > 0.3
    table, shift = apart(40, 16)
    torch.testing.assert_close(table[3:] @ shift(3), table[:-3], atol=1e-5, rtol=0)
    expected = torch.zeros(40, 40)
    for far, value in ((0, 1.0), (16, -1.0), (32, 1.0)):
        expected += value * (torch.eye(40).roll(far, 1).triu(far) if far else torch.eye(40) / 2)
    torch.testing.assert_close(table @ table.T, expected + expected.T, atol=1e-5, rtol=0)


def test_unknown_names_list_what_exists():
    with pytest.raises(UnknownName, match="compiled-induction, compiled-needle"):
        compiled("compiled-magic")
    with pytest.raises(UnknownName, match="hard, soft"):
        compiled("compiled-needle", "medium")
    with pytest.raises(UnknownName, match="token, bos"):
        made("compiled-needle").blocks.pick("tokens")
    with pytest.raises(WorkbenchError, match="too many"):
        positions(300, width=2)
