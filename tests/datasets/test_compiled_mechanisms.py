"""Heads of the compiled models do what their names say."""

import pytest
import torch

from workbench.datasets.catalogue import task
from workbench.datasets.models.compile import compiled
from workbench.datasets.models.compiled.counting import pairs_table, steps
from workbench.datasets.tokenizer import SPECIAL, base_vocabulary
from workbench.pairs import accuracy
from workbench.probes.circuits.find import find_circuit
from workbench.sites import Site


def solved(model, pairs, edit=None):
    return float(accuracy(model.run(pairs.clean, edit=edit or {}).logits, pairs).mean())


def gone(x):
    return x * 0


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
    steps_ = torch.arange(1, pairs.clean.shape[1])
    assert (first[:, 1, steps_, steps_ - 1] > 0.999).all()
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


def test_decoys_move_with_the_prompt_and_reach_nothing():
    model = compiled("compiled-induction")
    pairs = task("induction", length=12).build(seed=0, tokenizer=model.tokenizer, n=4)
    site = Site("result", 0, 2)
    clean, corrupt = (model.run(ids, read=[site]) for ids in (pairs.clean, pairs.corrupt))
    assert (clean.acts[site] - corrupt.acts[site]).abs().max() > 0.1
    edited = model.run(pairs.clean, edit={Site("z", 0, 2): lambda z: z + 3})
    assert torch.equal(edited.logits, clean.logits)


def test_heads_for_indirect_objects_attend_as_their_names_say():
    model = compiled("compiled-ioi")
    pairs = task("ioi").build(seed=0, tokenizer=model.tokenizer, n=40)
    sites = [Site("pattern", layer) for layer in range(4)]
    acts = model.run(pairs.clean, read=sites).acts
    each = torch.arange(40)
    s2, s1, io = (pairs.spans[name][:, 0] for name in ("S2", "S1", "IO"))
    assert (acts[sites[0]][each, 1, s2, s1] > 0.999).all()
    assert (acts[sites[1]][each, 2, -1, s2] > 0.999).all()
    assert (acts[sites[2]][each, 0, -1, io] > 0.999).all()
    assert (acts[sites[3]][each, 1, -1, io] > 0.999).all()
    assert (acts[sites[3]][each, 2, -1, 0] > 0.999).all()


@pytest.mark.parametrize("attention", ["hard", "soft"])
def test_the_backup_mover_acts_when_the_mover_is_gone(attention):
    pairs = task("ioi").build(seed=0, tokenizer=compiled("compiled-ioi").tokenizer, n=20)
    for backup, expected in ((True, 1.0), (False, 0.0)):
        model = compiled("compiled-ioi", attention, backup=backup)
        assert solved(model, pairs) == 1
        assert solved(model, pairs, {Site("z", 2, 0): gone}) == expected
        assert solved(model, pairs, {Site("z", 3, 2): gone}) == 1
        assert solved(model, pairs, {Site("z", 2, 0): gone, Site("z", 3, 2): gone}) == 0


@pytest.mark.parametrize("attention", ["hard", "soft"])
def test_a_head_with_a_backup_has_no_effect_alone_and_both_have_all(attention):
    model = compiled("compiled-backup", attention)
    pairs = task("needle", corruption="filler", length=48).build(seed=0, tokenizer=model.tokenizer, n=6)
    nodes = find_circuit(model, pairs, method="patching", level="node")
    effect = dict(zip(nodes.names, nodes.scores.tolist(), strict=True))
    assert abs(effect["a1.h1"]) < 0.05
    assert abs(effect["a2.h3"]) < 0.05
    assert effect["a0.h0"] > 4.5
    sites = [Site("z", 1, 1), Site("z", 2, 3)]
    other = model.run(pairs.corrupt, read=sites).acts
    edit = {site: lambda z, new=other[site]: new for site in sites}
    assert task("needle").metric(model.run(pairs.clean, edit=edit).logits, pairs).abs().max() < 0.05


def test_soft_attention_has_gradients_where_hard_attention_has_none():
    pairs = task("ioi").build(seed=0, tokenizer=compiled("compiled-ioi").tokenizer, n=8)
    edge = "a1.h2->a2.h0<q>"
    for attention, low, high in (("hard", 0, 1e-4), ("soft", 1, 10)):
        found = find_circuit(compiled("compiled-ioi", attention, rotate=1), pairs, method="eap")
        assert low <= found.scores[found.names.index(edge)].abs() <= high


@pytest.mark.parametrize("attention", ["hard", "soft"])
def test_greater_than_raises_exactly_the_later_years(attention):
    model = compiled("compiled-greater-than", attention)
    pairs = task("greater-than").build(seed=0, tokenizer=model.tokenizer, n=60)
    logits = model.run(pairs.clean).logits[:, -1]
    for b in range(60):
        later = pairs.answer[b][pairs.answer[b] >= 0]
        assert logits[b, later].min() > 0.4
        assert logits[b].topk(len(later)).indices.sort().values.tolist() == later.sort().values.tolist()
        assert logits[b, pairs.wrong[b][pairs.wrong[b] >= 0]].abs().max() < 0.2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("reverse", {"length": 16, "letters": 8}),
        ("reverse", {"length": 3}),
        ("sort", {"length": 7}),
        ("sort", {"length": 3}),
        ("histogram", {"length": 9, "letters": 8}),
        ("frac-prevs", {"length": 10}),
        ("dyck", {"length": 16}),
    ],
)
@pytest.mark.parametrize("attention", ["hard", "soft"])
def test_programs_answer_rows_of_every_length(name, options, attention):
    model = compiled(f"compiled-{name}", attention)
    pairs = task(name, **options).build(seed=0, tokenizer=model.tokenizer, n=60)
    assert solved(model, pairs) == 1


def test_programs_answer_at_every_place():
    model, asked = compiled("compiled-sort"), task("sort")
    ids = torch.tensor(model.tokenizer(["d a c f b", "h g a c e"])["input_ids"])
    best = model.run(ids).logits[:, 1:].argmax(-1)
    rows = [model.tokenizer.convert_ids_to_tokens(row.tolist()) for row in best]
    assert rows == [asked.answers("dacfb"), asked.answers("hgace")]


def test_steps_are_one_hot_at_the_levels_and_tables_pick_one_unit():
    levels = [1 / (1 + n) for n in range(6)]
    mlp = steps(torch.tensor([[1.0]]), levels, torch.eye(6))
    x = torch.tensor(levels)[:, None]
    torch.testing.assert_close((x @ mlp.read + mlp.bias).relu() @ mlp.write, torch.eye(6), atol=1e-4, rtol=0)
    pair = pairs_table(torch.eye(5)[:, :2], torch.eye(5)[:, 2:], {(1, 2): torch.ones(5)})
    both, one = torch.tensor([0.0, 1, 0, 0, 1]), torch.tensor([0.0, 1, 0, 1, 0])
    for row, expected in ((both, 1.0), (one, 0.0)):
        assert torch.equal((row @ pair.read + pair.bias).relu() @ pair.write, torch.full((5,), expected))
