import pytest
import torch
from builders import hugging_face, native
from random_nets import ids

import workbench as wb
from workbench.errors import UnknownName
from workbench.pairs import Pairs
from workbench.probes.retrieval.recovery import recovery
from workbench.sites import Site


def without_needle(model, n=6, length=64):
    return wb.task("needle", length=length, depth=0.5, corruption="filler", split="test").build(0, model.tokenizer, n)


def random_pairs(answers=((5,), (9,))):
    text = ids(4, 11)
    answer = torch.tensor(answers)
    return Pairs(text[:2], text[2:], answer, torch.full((2, 1), -1), torch.tensor([10, 10]))


@pytest.mark.parametrize("place", ["answer", "all"])
def test_one_head_of_the_compiled_model_brings_the_answer_back(place):
    model = wb.load("compiled-needle")
    found = recovery(model, without_needle(model), place=place)
    best = found.top("share")
    assert best[0][:2] == (1, 1)
    assert best[0].value == pytest.approx(1, abs=1e-3)
    assert all(abs(head.value) < 5e-3 for head in best[1:])  # everywhere, the key's owner comes back too
    assert found.null["share"][1][0] == pytest.approx(1 / 3, abs=1e-3)  # a random head of that layer is it in 1 of 3
    assert found.null["share"][0].abs().max() < 2e-3


@torch.no_grad()
@pytest.mark.parametrize("make", [native, lambda: hugging_face("llama")])
@pytest.mark.parametrize("place", ["answer", "all"])
def test_recovery_is_what_patching_by_hand_gives(make, place):
    model, pairs = make().model, random_pairs()
    sites = [Site("z", layer) for layer in range(2)]
    clean = model.run(pairs.clean, read=sites)
    base = model.run(pairs.corrupt).logits[:, -1]
    found = recovery(model, pairs, place=place)
    for layer in range(2):
        for head in range(4):

            def patch(z, layer=layer, head=head):
                z = z.clone()
                where = slice(None) if place == "all" else slice(10, 11)
                z[:, where, head] = clean.acts[Site("z", layer)][:, where, head]
                return z

            out = model.run(pairs.corrupt, edit={Site("z", layer): patch}).logits[:, -1]
            logp, logit, share = [], [], []
            for b, y in enumerate((5, 9)):
                gone = [l[b].log_softmax(-1)[y] for l in (out, base, clean.logits[:, -1])]
                rival = max((i for i in range(61) if i != y), key=lambda i: base[b, i])
                logp.append(gone[0] - gone[1])
                logit.append(out[b, y] - out[b, rival] - base[b, y] + base[b, rival])
                share.append((gone[0] - gone[1]) / (gone[2] - gone[1]) if gone[2] - gone[1] > 1e-3 else torch.nan)
            for name, hand in (("log_probability", logp), ("logit", logit), ("share", share)):
                expected = torch.tensor(hand).nanmean()
                torch.testing.assert_close(
                    found.values[name][layer][head].to(expected), expected, atol=1e-7, rtol=1e-6, equal_nan=True
                )


@torch.no_grad()
def test_several_accepted_answers_count_together():
    model = native().model
    pairs = random_pairs(((5, 7), (9, -1)))
    clean = model.run(pairs.clean, read=[Site("z", 0)]).acts[Site("z", 0)]

    def patch(z):
        z = z.clone()
        z[:, -1, 2] = clean[:, -1, 2]
        return z

    before, after = (
        model.run(pairs.corrupt, edit=edit).logits[:, -1].softmax(-1) for edit in ({}, {Site("z", 0): patch})
    )
    gained = [(after[0, [5, 7]].sum() / before[0, [5, 7]].sum()).log(), (after[1, 9] / before[1, 9]).log()]
    found = recovery(model, [pairs[:1], pairs[1:]])
    torch.testing.assert_close(found.values["log_probability"][0][2], torch.stack(gained).mean(), atol=1e-9, rtol=1e-6)


def test_nothing_lost_is_nothing_to_recover():
    model = native().model
    pairs = random_pairs()
    same = Pairs(pairs.clean, pairs.clean, pairs.answer, pairs.wrong, pairs.position)
    found = recovery(model, same)
    assert found.values["share"][0].isnan().all()
    assert "nothing to recover" in found.undefined["share"]
    assert found.values["log_probability"][0].abs().max() < 1e-12


def test_unknown_places_are_refused():
    model = wb.load("compiled-needle")
    with pytest.raises(UnknownName, match="answer, all"):
        recovery(model, without_needle(model, 2), place="needle")
