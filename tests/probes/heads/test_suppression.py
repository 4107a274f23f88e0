import math

import pytest
import torch
from builders import hugging_face
from natives import make
from suppressor import V, copy_suppressor

import workbench as wb
from workbench.errors import Refused
from workbench.models.protocol import Tokens
from workbench.probes.heads.suppression import copy_suppression

IDS = torch.randint(V, (6, 32), generator=torch.Generator().manual_seed(0))


def test_the_planted_head_suppresses_and_its_twin_copies():
    found = copy_suppression(copy_suppressor(), IDS)
    attention, own, effect = (found.values[name][1] for name in ("attention", "own_logit", "effect"))
    assert float(attention[0]) > 0.95  # what copies the first token holds is not counted
    assert float(attention[1]) == float(attention[0])
    assert float(attention[2]) < 0.3
    assert found.null["attention"][1][0] < 0.05
    # all of its weight on it, -1.5 on its logit; the mean logit takes a sixteenth back
    assert float(own[0]) == pytest.approx(-1.5 * (1 - 1 / V) * float(attention[0]), abs=1e-3)
    assert float(own[1]) == pytest.approx(1.5 * (1 - 1 / V) * float(attention[0]), abs=1e-3)
    assert effect[0] > 0.1
    assert effect[1] < -0.1
    assert abs(float(effect[3])) < 1e-9
    assert found.null["effect"][1][0] < 0  # what others lose to the token that is no longer held back
    assert found.high["own_logit"][1][0] < 0
    assert found.low["effect"][1][0] > 0


@torch.no_grad()
def test_a_literal_loop_gives_the_same_numbers():
    model = copy_suppressor()
    ids = IDS[:2]
    run = model.run(ids, ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"], maps=wb.capture())
    weights = run.maps[1].dense()
    guess = (run.acts["blocks.1.hook_resid_pre"] @ model.net.unembed).argmax(-1)
    z = run.acts["blocks.1.attn.hook_z"][:, :, 2].mean((0, 1))
    gone = model.run(ids, edit={"blocks.1.attn.hook_z[2]": z.expand_as})
    found = copy_suppression(model, ids)
    attention, own, effect = [], [], []
    for b in range(2):
        rows = [[], [], []]
        for q in range(ids.shape[1]):
            keys = [k for k in range(1, q) if ids[b, k] == guess[b, q]]
            if not keys:
                continue
            mass = sum(float(weights[b, 2, q, k]) for k in keys)
            rows[0].append(mass)
            rows[1].append(mass * -(1 - 1 / V))
            x = guess[b, q]
            rows[2].append(float(gone.logits[b, q].log_softmax(-1)[x] - run.logits[b, q].log_softmax(-1)[x]))
        for store, row in zip((attention, own, effect), rows, strict=True):
            store.append(sum(row) / len(row))
    for name, wanted in (("attention", attention), ("own_logit", own), ("effect", effect)):
        assert float(found.values[name][1][2]) == pytest.approx(sum(wanted) / 2, abs=1e-6), name


def test_padding_and_batches_change_nothing():
    model = copy_suppressor()
    alone = copy_suppression(model, IDS[:1, :20])
    ids = torch.cat([torch.full((1, 4), 3), IDS[:1, :20]], 1)
    mask = (torch.arange(24) >= 4)[None]
    both = Tokens(torch.cat([ids, ids]), torch.cat([mask, mask]))
    padded = copy_suppression(model, both)
    for name in ("attention", "own_logit", "effect"):
        torch.testing.assert_close(padded.values[name][1], alone.values[name][1], atol=1e-6, rtol=1e-6)


def test_the_effect_may_be_left_out_and_heads_grouped():
    model = make()
    data = torch.randint(4, (3, 24), generator=torch.Generator().manual_seed(1))
    each = copy_suppression(model, data, cause=False)
    assert set(each.values) == {"attention", "own_logit"}
    mean = copy_suppression(model, data, cause=False, per="kv")
    torch.testing.assert_close(
        mean.values["attention"][1], each.values["attention"][1].view(2, 2).mean(1), equal_nan=True
    )


def test_nothing_to_suppress_is_undefined():
    found = copy_suppression(copy_suppressor(), torch.arange(V)[None].flip(1), cause=False)
    assert math.isnan(float(found.values["attention"][1][0])) or found.values["attention"][1][0] >= 0
    never = copy_suppression(copy_suppressor(), torch.tensor([[1, 2, 3, 4, 5]]))
    assert never.values["attention"][1].isnan().all()
    assert "nothing to suppress" in never.undefined["attention"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_hugging_face_models(name):
    model = hugging_face(name).model
    data = torch.randint(3, 9, (3, 20), generator=torch.Generator().manual_seed(0))
    found = copy_suppression(model, data)
    assert len(found.frame()) == model.shape.layers * model.shape.heads
    with pytest.raises(Refused, match="does not predict next tokens"):
        copy_suppression(hugging_face("bert").model, data)


def test_own_logits_of_a_hugging_face_model_by_hand():
    """Normed llama with grouped heads, one token everywhere: v of each key through W_O onto that token's logit."""
    model = hugging_face("llama").model
    ids = torch.full((1, 9), 5)
    head = model.model.get_output_embeddings().weight.detach()
    read = ["blocks.1.attn.hook_v", "blocks.1.hook_resid_post", "blocks.1.hook_resid_pre"]
    with torch.no_grad():
        run = model.run(ids, read, maps=wb.capture())
        x, norm = run.acts["blocks.1.hook_resid_post"], model.model.model.norm
        with torch.no_grad():
            head[5] = 9 * norm(run.acts["blocks.1.hook_resid_pre"])[0].mean(0)  # so that it is the token predicted
        run = model.run(ids, read, maps=wb.capture())
    v, weights = run.acts["blocks.1.attn.hook_v"][0], run.maps[1].dense()[0]
    column = (head[5] - head.mean(0)) * norm.weight.detach()
    size = (x.square().mean(-1) + norm.variance_epsilon).sqrt()[0]
    for h in range(model.shape.heads):
        group = h // (model.shape.heads // model.shape.kv_heads)
        own = v[:, group] @ model.weight("W_O", 1)[h].detach() @ column
        wanted = [float(sum(weights[h, q, k] * own[k] for k in range(1, q)) / size[q]) for q in range(2, 9)]
        assert float(copy_suppression(model, ids).values["own_logit"][1][h]) == pytest.approx(sum(wanted) / 7, rel=1e-4)
