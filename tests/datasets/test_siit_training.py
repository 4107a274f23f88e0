"""Strict interchange-intervention training: the program, the swaps, the loss and the recipe."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.datasets.models.siit import train as recipe_module
from workbench.datasets.models.siit.__main__ import arguments, name_of, write
from workbench.datasets.models.siit.effects import edge_effects
from workbench.datasets.models.siit.program import (
    VARIABLES,
    Prompts,
    Sources,
    answers,
    draw,
    encoded,
    name_ids,
    targets,
    tokens,
    vocabulary,
)
from workbench.datasets.models.siit.swap import COMPONENTS, components, mapped, plain, swapped
from workbench.datasets.models.siit.train import (
    COOLING,
    LATE_LEAK,
    WARM_UP,
    WEIGHTS,
    Recipe,
    losses,
    rate,
    start,
    train,
    weights,
)
from workbench.datasets.pairs import in_split
from workbench.datasets.words import words
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.native import NativeModel
from workbench.sites import Site


@pytest.fixture(scope="module")
def first():
    return wb.load("siit-ioi")


def sets(rows):
    return [{int(token) for token in row if token >= 0} for row in rows]


def test_program_gives_the_answers_of_the_task():
    tokenizer = vocabulary()
    for split in ("train", "test"):
        pairs = wb.task("ioi", split=split).build(3, tokenizer, 60)
        assert sets(answers(Prompts.of(pairs.clean, tokenizer))) == sets(pairs.answer)
        assert sets(answers(Prompts.of(pairs.corrupt, tokenizer))) == sets(pairs.wrong)
        contrast = wb.task("ioi", split=split).contrast().build(3, tokenizer, 60)
        prompts = Prompts.of(contrast.corrupt, tokenizer)
        assert sets(answers(prompts)) == sets(prompts.names[:, :2])
        assert prompts.end.tolist() == contrast.position.tolist()
        assert all(len(set(row)) == 3 for row in prompts.names.tolist())


def run_program(names, given_slot=None, given_at_end=None, given_out=None):
    """The program for one prompt, written out: variables may be given."""
    a, b, s = names
    slot = given_slot if given_slot is not None else 1 if s == a else 2 if s == b else 0
    at_end = given_at_end if given_at_end is not None else slot
    out = given_out if given_out is not None else {name for i, name in ((1, a), (2, b)) if i != at_end}
    return slot, at_end, out


three = st.lists(st.integers(5, 9), min_size=3, max_size=3).filter(lambda row: row[0] != row[1])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(three, three, st.integers(-1, 2)), min_size=1, max_size=8))
def test_interventions_are_the_program_with_one_variable_from_the_source(rows):
    def prompts(names):
        n = len(names)
        return Prompts(torch.zeros(n, 4, dtype=torch.long), torch.tensor(names), torch.zeros(n, 4, dtype=torch.long))

    base, source, variable = zip(*rows, strict=True)
    found = sets(answers(prompts(base), prompts(source), torch.tensor(variable)))
    for got, mine, other, index in zip(found, base, source, variable, strict=True):
        values = run_program(other)
        given_ = [value if i == index else None for i, value in enumerate(values)]
        assert got == run_program(mine, *given_)[2]


def test_targets_are_distributions_over_the_answer():
    known = torch.tensor([3, 4, 5, 6])
    found = targets(torch.tensor([[4, -1], [3, 6]]), 8, known, 0.2)
    expected = torch.zeros(2, 8)
    expected[:, known] += 0.05
    expected[0, 4] += 0.8
    expected[1, 3] += 0.4
    expected[1, 6] += 0.4
    torch.testing.assert_close(found, expected)


def test_vocabulary_is_that_of_the_task():
    tokenizer = vocabulary()
    assert tokenizer.convert_ids_to_tokens(range(len(tokenizer))) == list(tokens())
    assert tokenizer.convert_ids_to_tokens(name_ids(tokenizer).tolist()) == list(words("names"))
    assert len(tokenizer) == len(set(tokens())) < 150
    assert (
        tokenizer("When Mary and John went to the store, John gave a ring to").input_ids.count(tokenizer.unk_token_id)
        == 0
    )


def test_drawn_prompts_are_of_their_split_and_repeatable():
    tokenizer = vocabulary()
    one, two = (draw(tokenizer, seed=4, n=200) for _ in range(2))
    assert torch.equal(one.ids, two.ids)
    assert not torch.equal(one.ids, draw(tokenizer, seed=5, n=200).ids)
    for split in ("train", "test"):
        prompts = draw(tokenizer, seed=0, n=200, split=split, nobody=0.0)
        for a, b, s in prompts.names.tolist():
            assert s in (a, b)
            assert in_split("+".join(sorted(tokenizer.convert_ids_to_tokens([a, b]))), split)
    twice = (one.names[:, 2:] == one.names[:, :2]).any(1).double().mean()
    assert twice == pytest.approx(0.75, abs=0.1)


def test_sources_have_the_same_layout_and_any_of_them_may_come():
    prompts = draw(vocabulary(), seed=0, n=60)
    sources, generator = Sources(prompts), torch.Generator().manual_seed(0)
    rows = torch.arange(60).repeat(200)
    chosen = sources(rows, generator)
    assert torch.equal(prompts.places[chosen], prompts.places[rows])
    layouts = torch.unique(prompts.places, dim=0, return_inverse=True)[1]
    assert len(layouts.unique()) > 1
    for row in range(60):
        assert set(chosen[rows == row].tolist()) <= set((layouts == layouts[row]).nonzero()[:, 0].tolist())
    assert set(chosen.tolist()) == set(range(60))
    assert torch.equal(sources(rows, torch.Generator().manual_seed(0)), chosen)


@pytest.fixture(scope="module")
def untrained():
    net = start(1)
    for block in net.blocks:  # outputs of the size of the stream, so that a swap is felt
        block.attn.W_O.data *= 5
        block.mlp.W_out.data *= 5
    base = draw(vocabulary(), seed=0, n=26)
    source = base[Sources(base)(torch.arange(26), torch.Generator().manual_seed(0))]
    return NativeModel(net.eval().requires_grad_(False), vocabulary(), name="net"), base, source


def one_swap(model, base, source, name):
    """The same through ``model.run``."""
    layer = int(name[1])
    site = Site("mlp_out", layer) if name[0] == "m" else Site("z", layer, int(name[-1]))
    other = model.run(source.ids, read=[site]).acts[site]
    logits = model.run(base.ids, edit={site: other}).logits
    return logits[torch.arange(len(base)), base.end]


def test_a_swap_moves_one_component_of_each_row(untrained):
    model, base, source = untrained
    names = components(model.net.config)
    before, own = plain(model.net, base.ids, base.end)
    _, wrote = plain(model.net, source.ids, source.end)
    which = torch.arange(26) % len(names)
    found = swapped(model.net, base.ids, base.end, wrote, which)
    for i, name in enumerate(names):
        torch.testing.assert_close(
            found[which == i], one_swap(model, base, source, name)[which == i], atol=1e-5, rtol=1e-5
        )
    other = (source.ids != base.ids).any(1)
    assert other.sum() > 20
    assert (found - before).abs().amax(1)[other].gt(1e-4).all()
    torch.testing.assert_close(swapped(model.net, base.ids, base.end, own, which), before, atol=1e-6, rtol=0)
    assert not any(point.fwd_hooks for point in model.net.hook_dict.values())


def test_losses_are_those_of_the_docstring(untrained):
    model, base, source = untrained
    names, n = components(model.net.config), len(base)
    _, others = mapped(names)
    found = losses(model.net, base, source, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    variable = torch.randint(3, (n,), generator=generator)
    other = others[torch.randint(len(others), (n,), generator=generator)]
    known = name_ids(model.tokenizer).tolist()
    before = model.run(base.ids).logits[torch.arange(n), base.end].double().log_softmax(-1)
    of_source = model.run(source.ids).logits[torch.arange(n), source.end].double().log_softmax(-1)

    def entropy(logp, answer):
        share = {name: 0.05 / len(known) for name in known}
        for name in answer:
            share[name] += 0.95 / len(answer)
        return -sum(p * float(logp[name]) for name, p in share.items())

    terms = {name: [] for name in WEIGHTS}
    for row in range(n):
        b, s, v = base[row : row + 1], source[row : row + 1], int(variable[row])
        terms["behaviour"] += [entropy(before[row], sets(answers(b))[0]), entropy(of_source[row], sets(answers(s))[0])]
        values = run_program(s.names[0].tolist())
        want = run_program(b.names[0].tolist(), *(value if i == v else None for i, value in enumerate(values)))[2]
        moved = one_swap(model, b, s, COMPONENTS[VARIABLES[v]])[0].double().log_softmax(-1)
        terms["intervention"].append(entropy(moved, want))
        strict = one_swap(model, b, s, names[int(other[row])])[0].double().log_softmax(-1)
        terms["strict"].append(entropy(strict, sets(answers(b))[0]))
        terms["leak"].append(float((before[row].exp() * (before[row] - strict)).sum()))
    for name, values in terms.items():
        assert found[name].item() == pytest.approx(sum(values) / len(values), rel=2e-4), name


def test_every_component_is_a_variable_or_has_its_strict_loss():
    own, others = mapped(components(start(0).config))
    assert sorted([*own.tolist(), *others.tolist()]) == list(range(15))
    assert not set(own.tolist()) & set(others.tolist())
    assert [components(start(0).config)[i] for i in own] == list(COMPONENTS.values())


def test_loss_terms_fall_again_after_a_disturbance(first):
    """Every term on one batch, before and after some steps from a disturbed copy of the trained network."""
    net = start(0)
    noise = torch.Generator().manual_seed(0)
    net.load_state_dict(
        {k: v + 0.15 * v.std() * torch.randn(v.shape, generator=noise) for k, v in first.net.state_dict().items()}
    )
    pool = draw(first.tokenizer, seed=0, n=800)
    sources = Sources(pool)
    fixed = torch.arange(200)
    batch = pool[fixed], pool[sources(fixed, torch.Generator().manual_seed(1))]

    def measured():
        with torch.no_grad():
            return {k: v.item() for k, v in losses(net, *batch, torch.Generator().manual_seed(2)).items()}

    before = measured()
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    for step in range(25):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(200, 800, (32,), generator=generator)
        parts = losses(net, pool[rows], pool[sources(rows, generator)], generator)
        optimiser.zero_grad()
        sum(WEIGHTS[name] * part for name, part in parts.items()).backward()
        optimiser.step()
    after = measured()
    assert {name for name in before if after[name] < before[name]} == set(WEIGHTS)


def small(work, monkeypatch, **options):
    """A run of 6 steps of which the last 4 have a falling rate: it counts as ready when first measured, after 2."""
    monkeypatch.setattr(recipe_module, "POOL", 200)
    monkeypatch.setattr(recipe_module, "COOLING", 4)
    monkeypatch.setattr(recipe_module, "measure", lambda net, **_: {})
    monkeypatch.setattr(recipe_module, "shares", lambda found: {"accuracy": 1.0})
    return train(Recipe(seed=3, batch=4), work, **options)


def same(one, two):
    return all(torch.equal(weight, two.state_dict()[name]) for name, weight in one.state_dict().items())


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_training_repeats_and_resumes_to_the_same_bits(tmp_path, monkeypatch, stop):
    whole, steps, _ = small(tmp_path / "whole", monkeypatch, every=2)
    again, _, _ = small(tmp_path / "again", monkeypatch, every=2)
    part, stopped, _ = small(tmp_path / "parts", monkeypatch, every=2, stop=stop)
    taken = []
    monkeypatch.setattr(recipe_module, "losses", lambda *given: taken.append(1) or losses(*given))
    resumed, after, _ = small(tmp_path / "parts", monkeypatch, every=2)
    assert len(taken) == steps - stop
    assert (steps, stopped, after) == (6, stop, 6)
    assert same(whole, again)
    assert same(whole, resumed)
    assert same(whole, part) == (stop == steps)


def test_network_that_does_not_learn_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_module, "POOL", 200)
    with pytest.raises(Refused, match=r"seed 3 has not learned the program in 2 steps: its lowest accuracy is 0\.\d+"):
        train(Recipe(seed=3, steps=2, batch=4), tmp_path, every=1)


def test_untrained_network_is_not_written(tmp_path):
    folder = tmp_path / "siit-ioi"
    with pytest.raises(Refused, match=r"siit-ioi is not written: .* accuracy 0\.\d+.*strict accuracy of m2"):
        write(start(0).eval(), folder, Recipe(), 0, 0.0)
    assert not folder.exists()


def test_learning_rate_and_weight_of_the_leak():
    assert [rate(step, None) for step in (0, 49, 50, 5000)] == [1 / WARM_UP, 1.0, 1.0, 1.0]
    falling = [rate(step, 600) for step in range(580, 600 + COOLING)]
    assert falling[:21] == [1.0] * 21
    assert all(a > b for a, b in pairwise(falling[20 : -COOLING // 50]))
    assert falling[-1] == pytest.approx(0.02)
    assert weights(599, 600) == weights(599, None) == WEIGHTS
    assert weights(600, 600) == {**WEIGHTS, "leak": LATE_LEAK}


def test_command_names_folders_by_seed():
    assert [name_of(0), name_of(3)] == ["siit-ioi", "siit-ioi-3"]
    assert arguments([]).steps == Recipe().steps


def test_prompts_without_three_names_are_refused():
    with pytest.raises(WorkbenchError, match=r"three names; row 1 has 2: .*Build them with task\('ioi'\)"):
        encoded(
            ["When Mary and John went to the store, John gave a ring to", "When Mary and John went to the store, gave"],
            vocabulary(),
        )


def test_unknown_splits_and_nodes_are_refused():
    with pytest.raises(UnknownName, match="train, test"):
        draw(vocabulary(), seed=0, n=1, split="dev")
    from workbench.datasets.models.siit.effects import _reader

    with pytest.raises(UnknownName, match="counterfactual, zero"):
        edge_effects(NativeModel(start(0).eval(), vocabulary()), None, "mean")
    with pytest.raises(WorkbenchError, match="a0.h1 and m0"):
        _reader("input", "q", 3)
