"""The model of two tasks: what is shared as planted, and what repairs the second task."""

import pytest
import torch

from workbench.circuits import Circuit
from workbench.datasets.catalogue import task
from workbench.datasets.models.compile import compiled, labels
from workbench.datasets.models.compiled.two_task import CIRCUITS, ROLES
from workbench.datasets.words import words
from workbench.models.load import load
from workbench.pairs import accuracy
from workbench.sites import Site


@pytest.fixture(scope="module", params=["hard", "soft"])
def model(request):
    return compiled("compiled-two-task", request.param, rotate=4)


def site(kind, role):
    layer, head = ROLES[role][1:].split(".h")
    return Site(kind, int(layer), int(head))


def colors_of_the_scene(model, pairs):
    """``[B, T]``: the three color tokens of the last scene."""
    known = torch.tensor(model.tokenizer.convert_tokens_to_ids(list(words("colors"))))
    found = torch.isin(pairs.clean, known)
    return found & (found.flip(1).cumsum(1).flip(1) <= 3)


def forced(model, pairs, *roles):
    """Right answers when heads attend at the last token to the two wrong colors alone."""
    wrong = (colors_of_the_scene(model, pairs) & (pairs.clean != pairs.answer)) / 2

    def attend(pattern):
        pattern = pattern.clone()
        pattern[:, -1] = wrong
        return pattern

    edit = {site("pattern", role): attend for role in roles}
    return accuracy(model.run(pairs.clean, edit=edit).logits, pairs)


@pytest.mark.parametrize("options", [{}, {"split": "test"}, {"shots": 0}], ids=str)
def test_colored_objects_are_half_right_and_repaired(model, options):
    pairs = task("colored-objects", **options).build(seed=0, tokenizer=model.tokenizer, n=120)
    plain = forced(model, pairs)
    assert 0.4 < plain.mean() < 0.6
    inhibition, negative = forced(model, pairs, "inhibition"), forced(model, pairs, "negative")
    both = forced(model, pairs, "inhibition", "negative")
    assert inhibition.mean() > 0.9
    assert 0.7 < negative.mean() < 0.95
    assert both.mean() >= inhibition.mean()
    for repaired in (inhibition, negative, both):
        assert not ((plain == 1) & (repaired == 0)).any()


def test_the_mover_leans_to_the_right_color_and_looks_at_all_three(model):
    pairs = task("colored-objects").build(seed=1, tokenizer=model.tokenizer, n=100)
    weight = model.run(pairs.clean, read=[site("pattern", "mover")]).acts[site("pattern", "mover")][:, -1]
    scene = colors_of_the_scene(model, pairs)
    assert ((weight * scene).sum(1) > 0.7).all()
    right = weight[torch.arange(100), pairs.spans["COLOR"][:, 0]].mean()
    wrong = (weight * (scene & (pairs.clean != pairs.answer))).sum(1).mean() / 2
    assert 0 < right - wrong < 0.2
    for role in ("inhibition", "negative"):
        rests = model.run(pairs.clean, read=[site("pattern", role)]).acts[site("pattern", role)][:, -1, 0]
        assert (rests > 0.6).all()


def test_indirect_objects_take_the_other_path(model):
    pairs = task("ioi").build(seed=1, tokenizer=model.tokenizer, n=40)
    sites = {role: site("pattern", role) for role in ("duplicate", "inhibition", "mover", "negative")}
    acts = model.run(pairs.clean, read=list(sites.values())).acts
    each = torch.arange(40)
    s2, s1, io = (pairs.spans[name][:, 0] for name in ("S2", "S1", "IO"))
    assert (acts[sites["duplicate"]][each, s2, s1] > 0.9).all()
    assert (acts[sites["inhibition"]][each, -1, s2] > 0.9).all()
    assert (acts[sites["mover"]][each, -1, io] > 0.8).all()
    assert (acts[sites["negative"]][each, -1, io] > 0.8).all()
    assert accuracy(model.run(pairs.clean).logits, pairs).mean() == 1


def test_planted_overlap_is_one_head_of_four_and_five():
    ioi, colored = (set(CIRCUITS[name]) for name in ("ioi", "colored_objects"))
    assert ioi & colored == {"mover"}
    assert (len(ioi), len(colored), len(ioi | colored)) == (4, 5, 8)
    truth = load("compiled-two-task").ground_truth
    heads = {}
    for name in CIRCUITS:
        inside = [n for n, flag in zip(truth.names, truth.columns[name].tolist(), strict=True) if flag]
        kept = Circuit.of("edge", truth.names, inside)
        heads[name] = set(kept.nodes) - {"input", "logits"}
        assert heads[name] == {ROLES[role] for role in CIRCUITS[name]}
    assert heads["ioi"] & heads["colored_objects"] == {"a3.h1"}


def test_effects_of_the_two_tasks_meet_in_the_mover_alone():
    truth = load("compiled-two-task").ground_truth
    ioi, colored = labels(truth, "ioi", "s2_io_flip"), labels(truth, "colored-objects", "query")
    assert (ioi & colored).edges == (("a3.h1", "logits", "in"),)
    assert (ioi.edges, len(ioi), len(colored)) == (truth.edges, 9, 4)
