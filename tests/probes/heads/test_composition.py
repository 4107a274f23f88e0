from dataclasses import replace

import pytest
import torch
from builders import hugging_face
from natives import CONFIG, make

import workbench as wb
from workbench.errors import Refused, UnknownName
from workbench.probes.heads.composition import composition
from workbench.probes.heads.weights import head_weights


def literal(model, channel, a, h, b, g):
    one, two = head_weights(model, a), head_weights(model, b)
    i, j = one.groups[h], two.groups[g]
    ov = one.v[i] @ one.o[h]
    other = {"q": two.q[g] @ two.k[j].T, "k": two.k[j] @ two.q[g].T, "v": two.v[j] @ two.o[g]}[channel]
    return float((ov @ other).norm() / (ov.norm() * other.norm()))


@pytest.mark.parametrize("model", [make, lambda: hugging_face("llama").model, lambda: hugging_face("gpt2").model])
def test_factored_scores_equal_the_dense_products(model):
    model = model()
    found = composition(model)
    for channel in "qkv":
        for h in range(model.shape.heads):
            for g in range(model.shape.heads):
                assert float(found.value[channel][0, h, 1, g]) == pytest.approx(
                    literal(model, channel, 0, h, 1, g), rel=1e-5
                )
    assert found.value["q"][1].isnan().all()
    assert len(found.frame()) == 3 * model.shape.heads**2
    assert found.frame()["value"].notna().all()


def test_the_compiled_induction_head_reads_the_previous_token_head_through_its_keys():
    found = composition(wb.load("compiled-induction"))
    best = found.top("k", 2)
    assert best[0][:3] == ("k", (0, 1), (1, 2))
    # 83 equal singular values that meet one to one: sqrt(83) / (sqrt(83) sqrt(83))
    assert best[0].value == pytest.approx(83**-0.5, rel=0.01)
    assert best[0].value > 1.9 * found.null
    assert best[0].z > 10
    assert best[1].value < 0.2 * best[0].value
    assert found.undefined == {}


def test_the_induction_heads_of_the_trained_model_read_its_previous_token_heads_through_their_keys():
    found = composition(wb.load("tiny-softmax"), channels="k")
    best = found.top("k", 6)
    assert {pair.writer for pair in best} == {(0, 2), (0, 3)}
    assert {pair.reader[0] for pair in best} == {1}
    assert best[0].value > 2.5 * found.null


def test_random_weights_stand_at_their_null():
    model = make(replace(CONFIG, layers=3, heads=8, kv_heads=None, width=96, head_width=6))
    found = composition(model)
    for channel in "qkv":
        square, z = (t[channel][t[channel].isfinite()] for t in (found.value, found.z))
        assert float(square.square().mean()) == pytest.approx(found.null**2, rel=0.05)
        assert float(z.std()) == pytest.approx(1, rel=0.25)
        assert abs(float(z.mean())) < 0.3


def test_the_null_is_that_of_random_rotations():
    """Mean square and spread over rotations of two heads with unequal singular values."""
    model = make(replace(CONFIG, heads=1, kv_heads=None, width=64, head_width=4, norm="none"))
    with torch.no_grad():
        for block in model.net.blocks:
            block.attn.W_V[0] *= torch.tensor([8.0, 4, 2, 1], dtype=torch.float64)
    one, two = head_weights(model, 0), head_weights(model, 1)
    a, b = one.v[0] @ one.o[0], two.v[0] @ two.o[0]
    generator = torch.Generator().manual_seed(1)
    draws = []
    for _ in range(400):
        turn = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=generator)).Q
        draws.append(float((a @ turn @ b).norm() / (a.norm() * b.norm())) ** 2)
    draws = torch.tensor(draws)
    found = composition(model, channels="v")
    value, z = float(found.value["v"][0, 0, 1, 0]) ** 2, float(found.z["v"][0, 0, 1, 0])
    assert float(draws.mean()) == pytest.approx(found.null**2, rel=0.1)
    assert (value - found.null**2) / z == pytest.approx(float(draws.std()), rel=0.2)


def test_numbers_per_group_of_heads():
    model = make()
    each, mean, largest = (composition(model, per=per) for per in ("query", "kv", "kv-max"))
    pairs = each.value["k"][0, :, 1].view(2, 2, 2, 2)
    torch.testing.assert_close(mean.value["k"][0, :, 1], pairs.mean((1, 3)))
    torch.testing.assert_close(largest.value["k"][0, :, 1], pairs.amax((1, 3)))


def test_a_silent_head_has_no_score():
    model = make(replace(CONFIG, kv_heads=None))
    with torch.no_grad():
        model.net.blocks[0].attn.W_O[2] = 0
    found = composition(model)
    assert found.value["k"][0, 2, 1].isnan().all()
    assert found.value["k"][0, 1, 1].isfinite().all()
    assert "zero" in found.undefined["heads"]
    assert (0, 2) not in [pair.writer for pair in found.top("k")]


def test_it_is_drawn_and_refuses_what_it_does_not_know():
    found = composition(make(), channels=["q"])
    assert found.plot(channel="q").get_title().startswith("Q-composition")
    with pytest.raises(UnknownName, match="known: q"):
        found.top("k")
    with pytest.raises(UnknownName, match="q, k, v"):
        composition(make(), channels="o")
    with pytest.raises(UnknownName, match="query, kv"):
        composition(make(), per="group")
    with pytest.raises(Refused, match="several stacks"):
        composition(hugging_face("t5").model)
