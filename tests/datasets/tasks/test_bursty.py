"""Bursty classification in context: the word form, the vectors, and the three measures."""

import pytest
import task_cases_symbolic as cases
import torch

import workbench as wb
from workbench.datasets.bursty import MEASURES, bursty_batch, bursty_classes
from workbench.datasets.tokenizer import word_tokenizer
from workbench.errors import UnknownName, WorkbenchError


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="module")
def world():
    return bursty_classes(torch.Generator().manual_seed(0), classes=128, labels=16, width=64)


def _generator(seed=1):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("options", [options for name, options in cases.CASES if name == "bursty"])
def test_answers_follow_from_the_text_and_flip(options, tokenizer):
    task = wb.task("bursty", **options)
    pairs = task.build(1, tokenizer, 60)
    for i, text in enumerate(pairs.texts):
        other = cases.DERIVE["bursty"](tokenizer.decode(pairs.corrupt[i], skip_special_tokens=True))
        assert cases.DERIVE["bursty"](text) == {pairs.labels["label"][i]}
        assert other <= set(tokenizer.convert_ids_to_tokens(pairs.wrong[i].tolist()))
        assert (other == set()) == (task.corruption == "absent")
        items, last = text.split()[:-1:2], text.split()[-1]
        assert all(items.count(item) == task.burst for item in items)
        assert (pairs.spans["MATCH"][i, 0] - 1) // 2 == max(j for j, item in enumerate(items) if item == last)


def test_weights_cannot_hold_the_labels(tokenizer):
    """A class has many labels over prompts, and only the context tells which."""
    pairs = wb.task("bursty").build(0, tokenizer, 600)
    seen = {}
    for item, label in zip(pairs.labels["item"], pairs.labels["label"], strict=True):
        seen.setdefault(item, set()).add(label)
    assert sum(len(labels) for labels in seen.values()) > 5 * len(seen)


def test_impossible_options_are_refused(world):
    for option in ({"burst": 3}, {"burst": 8}, {"burst": 0}, {"pairs": 80, "burst": 1}):
        with pytest.raises(WorkbenchError, match="got pairs="):
            wb.task("bursty", **option)
    with pytest.raises(UnknownName, match="labels, absent"):
        wb.task("bursty", corruption="swap")
    assert wb.task("bursty").contrast().corruption == "absent"
    for option in ({"burst": 3}, {"burst": 8}, {"bursty": 1.5}, {"alpha": -1.0}, {"longest": 4}):
        with pytest.raises(WorkbenchError):
            bursty_batch(2, _generator(), world, **option)
    for option in ({"classes": 40, "labels": 32}, {"labels": 1}, {"width": 0}):
        with pytest.raises(WorkbenchError):
            bursty_classes(_generator(), **option)


def _values(batch, width=64):
    return batch.inputs[..., -width:]


def test_items_are_the_formula_and_labels_their_vectors(world):
    """(mu + eps eta) / sqrt(1 + eps^2) with eta of expected length 1: what is left after mu has length eps."""
    batch = bursty_batch(400, _generator(), world, eps=0.3)
    values = _values(batch)
    assert batch.inputs.shape == (400, 17, 17 + 64)
    assert torch.equal(values[:, 1::2], world.labels[batch.classes[:, :-1] % 16])
    noise = values[:, ::2] * (1 + 0.3**2) ** 0.5 - world.items[batch.classes]
    assert noise.pow(2).sum(-1).mean() == pytest.approx(0.3**2, rel=0.02)
    assert world.items.pow(2).sum(-1).mean() == pytest.approx(1, abs=0.05)
    exact = bursty_batch(20, _generator(), world, eps=0.0)
    assert torch.equal(_values(exact)[:, ::2], world.items[exact.classes])


@pytest.mark.parametrize("burst", [1, 2, 4])
def test_bursty_contexts_repeat_each_class(burst, world):
    batch = bursty_batch(100, _generator(), world, burst=burst)
    for k, label, labels, match in zip(batch.classes, batch.label, batch.labels, batch.match, strict=True):
        counts = k[:-1].bincount()
        assert (counts[counts > 0] % burst == 0).all()
        assert torch.equal(match, k[:-1] == k[-1])
        assert match.sum() >= burst
        assert set(labels[match].tolist()) == {int(k[-1]) % 16} == {int(label)}


def test_classes_follow_zipf(world):
    for alpha in (0.0, 1.0):
        batch = bursty_batch(6000, _generator(), world, bursty=0.0, alpha=alpha)
        p = torch.arange(1.0, 129) ** -alpha
        p = p / p.sum()
        found = batch.classes.flatten().bincount(minlength=128) / batch.classes.numel()
        assert ((found - p).abs() < 5 * (p * (1 - p) / batch.classes.numel()).sqrt()).all()


def test_measures_are_what_they_are_said_to_be(world):
    iwl, icl, icl2 = (bursty_batch(400, _generator(), world, **MEASURES[name]) for name in ("iwl", "icl", "icl2"))
    assert (iwl.label == iwl.classes[:, -1] % 16).all()
    assert iwl.match.float().mean() < 0.03
    assert (icl.classes == -1).all()
    assert (icl2.label == (icl2.classes[:, -1] + 1) % 16).all()
    for batch in (icl, icl2):
        assert (batch.match.sum(1) >= 4).all()
        assert all(
            set(row[m].tolist()) == {int(y)} for row, m, y in zip(batch.labels, batch.match, batch.label, strict=True)
        )
        assert torch.equal(_values(batch)[:, 1::2], world.labels[batch.labels])
    items = torch.nn.functional.normalize(_values(icl)[:, ::2], dim=-1)
    assert torch.equal((items[:, :-1] @ items[:, -1:].mT)[..., 0] > 0.7, icl.match)
    assert (items[:, -1] @ torch.nn.functional.normalize(world.items, dim=-1).T).max() < 0.7


def test_shares_and_places(world):
    batch = bursty_batch(2000, _generator(), world, bursty=0.5, novel=0.25, longest=11)
    novel = batch.classes[:, 0] == -1
    assert novel.float().mean() == pytest.approx(0.25, abs=0.04)
    assert (batch.match[~novel].sum(1) >= 4).float().mean() == pytest.approx(0.5, abs=0.04)
    places = batch.inputs[..., :23]
    first = places[:, 0].argmax(-1)
    assert set(first.tolist()) == set(range(7))
    assert (places.argmax(-1) == first[:, None] + torch.arange(17)).all()
    assert (places.sum(-1) == 1).all()
    assert torch.equal(batch.inputs, bursty_batch(2000, _generator(), world, bursty=0.5, novel=0.25, longest=11).inputs)
