import json

import pytest
import torch

from workbench.circuits import Circuit
from workbench.datasets.catalogue import task
from workbench.datasets.models.compile import COMPILERS, HERE, compiled, main, positions, rotation
from workbench.datasets.tokenizer import SPECIAL, base_vocabulary
from workbench.errors import UnknownName, WorkbenchError
from workbench.models.load import load
from workbench.pairs import accuracy
from workbench.sites import Site

NAMES = sorted(COMPILERS)


def solved(model, pairs):
    with torch.no_grad():
        return float(accuracy(model.run(pairs.clean).logits, pairs).mean())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attention", ["hard", "soft"])
@pytest.mark.parametrize("rotate", [None, 5])
def test_compiled_models_solve_their_task(name, attention, rotate):
    model = compiled(name, attention, rotate=rotate)
    options = {"length": 12} if name.endswith("induction") else {"length": 64}
    pairs = task(name.removeprefix("compiled-"), **options).build(seed=1, tokenizer=model.tokenizer, n=8)
    assert solved(model, pairs) == 1
    swapped = type(pairs)(pairs.corrupt, pairs.clean, pairs.wrong, pairs.answer, pairs.position)
    assert solved(model, swapped) == 1


def test_needle_is_found_in_long_text():
    model = compiled("compiled-needle")
    pairs = task("needle", length=2000, distractors=3).build(seed=0, tokenizer=model.tokenizer, n=2)
    assert solved(model, pairs) == 1


def test_retrieval_head_looks_at_the_value_and_decoys_at_the_start():
    model = compiled("compiled-needle", rotate=2)
    pairs = task("needle", length=64).build(seed=0, tokenizer=model.tokenizer, n=4)
    pattern = model.run(pairs.clean, read=[Site("pattern", 1)]).acts[Site("pattern", 1)]
    for b in range(4):
        value = int(pairs.spans["VALUE"][b, 0])
        assert pattern[b, 1, -1, value] > 0.999
        for decoy in (0, 3):
            assert pattern[b, decoy, -1, 0] > 0.999


def test_induction_heads_attend_as_their_names_say():
    model = compiled("compiled-induction")
    pairs = task("induction", length=12).build(seed=0, tokenizer=model.tokenizer, n=4)
    sites = [Site("pattern", 0), Site("pattern", 1)]
    first, second = (model.run(pairs.clean, read=sites).acts[site] for site in sites)
    steps = torch.arange(1, pairs.clean.shape[1])
    assert (first[:, 1, steps, steps - 1] > 0.999).all()
    for b in range(4):
        assert second[b, 2, -1, int(pairs.spans["SOURCE"][b, 0])] > 0.999


def test_any_token_is_continued_after_its_repeat():
    model = compiled("compiled-induction")
    generator = torch.Generator().manual_seed(0)
    start = len(SPECIAL)
    row = start + torch.randperm(len(base_vocabulary()) - start, generator=generator)[:60]
    ids = torch.cat([torch.zeros(1, dtype=torch.long), row, row[:30]])[None]
    best = model.run(ids).logits[0, -29:].argmax(-1)
    assert (best == row[2:31]).double().mean() == 1


def test_rotation_changes_no_answer_but_every_axis():
    plain, turned = compiled("compiled-induction"), compiled("compiled-induction", rotate=0)
    pairs = task("induction", length=12).build(seed=0, tokenizer=plain.tokenizer, n=4)
    site = Site("resid_post", 0)
    a, b = (model.run(pairs.clean, read=[site]) for model in (plain, turned))
    torch.testing.assert_close(a.logits, b.logits, atol=1e-4, rtol=0)
    assert (a.acts[site] == 0).double().mean() > 0.5
    assert (b.acts[site].abs() < 1e-6).double().mean() < 0.01
    q = rotation(20, 3)
    torch.testing.assert_close(q @ q.T, torch.eye(20), atol=1e-5, rtol=0)


def test_decoys_move_with_the_prompt_and_reach_nothing():
    model = compiled("compiled-induction")
    pairs = task("induction", length=12).build(seed=0, tokenizer=model.tokenizer, n=4)
    site = Site("result", 0, 2)
    clean, corrupt = (model.run(ids, read=[site]) for ids in (pairs.clean, pairs.corrupt))
    assert (clean.acts[site] - corrupt.acts[site]).abs().max() > 0.1
    edited = model.run(pairs.clean, edit={Site("z", 0, 2): lambda z: z + 3})
    assert torch.equal(edited.logits, clean.logits)


@pytest.mark.parametrize("name", NAMES)
def test_needed_edges_are_those_that_break_the_model_when_cut(name):
    """Without an edge's whole content (zeros in its place) the model fails if and only if the edge is needed."""
    model = compiled(name)
    truth = model.ground_truth
    needed = {n for n, flag in zip(truth.names, truth.columns["needed"].tolist(), strict=True) if flag}
    assert {n for n, kept in zip(truth.names, truth.kept.tolist(), strict=True) if kept} <= needed
    options = {"length": 12} if name.endswith("induction") else {"length": 48}
    pairs = task(name.removeprefix("compiled-"), **options).build(seed=0, tokenizer=model.tokenizer, n=8)
    from workbench.probes.circuits.find import find_circuit

    zero = find_circuit(model, pairs, "patching", ablation="zero")
    assert {n for n, score in zip(zero.names, zero.scores.tolist(), strict=True) if abs(score) > 0.1} == needed


@pytest.mark.parametrize("name", NAMES)
def test_bundled_folder_is_what_the_compiler_makes(name):
    stored, made = load(name), compiled(name)
    assert stored.net.config == made.net.config
    for key, value in made.net.state_dict().items():
        torch.testing.assert_close(stored.net.state_dict()[key], value.half().float(), atol=0, rtol=0)
    assert stored.tokenizer.convert_ids_to_tokens(range(len(base_vocabulary()))) == list(base_vocabulary())
    assert isinstance(stored.ground_truth, Circuit)
    assert stored.ground_truth.edges == made.ground_truth.edges
    assert torch.equal(stored.ground_truth.columns["needed"], made.ground_truth.columns["needed"])
    assert all(f"`{'->'.join(edge[:2])}" in (HERE / name / "card.md").read_text() for edge in made.ground_truth.edges)


@pytest.mark.parametrize("name", NAMES)
def test_bundled_models_solve_their_task(name):
    model = load(name)
    pairs = task(name.removeprefix("compiled-")).build(seed=3, tokenizer=model.tokenizer, n=8)
    assert solved(model, pairs) == 1


def test_the_command_writes_complete_folders(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("workbench.datasets.models.compile.HERE", tmp_path)
    main()
    main()
    printed = capsys.readouterr().out
    for name in NAMES:
        assert name in printed
        assert json.loads((tmp_path / name / "config.json").read_text())["norm"] == "none"
        assert load(tmp_path / name).ground_truth.level == "edge"


def test_position_codes_move_back_and_stay_apart():
    table, shift, gap = positions(300)
    torch.testing.assert_close(table[7:] @ shift(7), table[:-7], atol=1e-5, rtol=0)
    inner = table @ table.T
    assert (inner - torch.eye(300) * 2).max() <= 1 - gap + 1e-5
    assert gap > 0.3


def test_unknown_names_list_what_exists():
    with pytest.raises(UnknownName, match="compiled-induction, compiled-needle"):
        compiled("compiled-magic")
    with pytest.raises(UnknownName, match="hard, soft"):
        compiled("compiled-needle", "medium")
    with pytest.raises(WorkbenchError, match="too many"):
        positions(300, width=2)
