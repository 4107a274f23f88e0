"""Leave-one-head-out against literal runs, on pairs, texts and images; first-order against derivatives."""

import math

import pytest
import torch
from builders import hugging_face, native
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.examples import needles
from workbench.probes.importance.first_order import first_order
from workbench.probes.importance.leave_one_out import GroupTable, effects, leave_one_head_out
from workbench.probes.importance.outcomes import Judge, jensen_shannon
from workbench.results import load_result
from workbench.sites import Site


@pytest.fixture(scope="module")
def compiled():
    return wb.load("compiled-needle")


@pytest.fixture(scope="module")
def pairs(compiled):
    return needles(compiled, 32, 4)


@pytest.fixture(scope="module")
def tiny():
    return wb.load("tiny-softmax")


def literal_js(p, q):
    """Term by term, with KL(p || m) written out."""
    total = 0.0
    for a, b in zip(p.tolist(), q.tolist(), strict=True):
        m = (a + b) / 2
        total += (a * math.log(a / m) if a else 0) / 2 + (b * math.log(b / m) if b else 0) / 2
    return total


@given(st.integers(0, 2**31), st.floats(0.1, 20))
@settings(max_examples=30, deadline=None)
def test_jensen_shannon_is_symmetric_and_at_most_ln_2(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    p, q = ((torch.randn(3, 7, generator=generator, dtype=torch.float64) * scale).log_softmax(-1) for _ in range(2))
    found = jensen_shannon(p, q)
    torch.testing.assert_close(found, jensen_shannon(q, p))
    assert (found >= 0).all()
    assert (found <= math.log(2) + 1e-12).all()
    wanted = [literal_js(a.exp(), b.exp()) for a, b in zip(p, q, strict=True)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-10, rtol=1e-8)


def test_jensen_shannon_at_its_ends():
    one, other = torch.tensor([1.0, 0, 0]).double().log(), torch.tensor([0, 0.5, 0.5]).double().log()
    assert float(jensen_shannon(one, one)) == 0
    assert float(jensen_shannon(one, other)) == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize("ablation", ["zero", "mean", "counterfactual", "resample"])
def test_effects_are_those_of_literal_runs(compiled, pairs, ablation):
    found = leave_one_head_out(compiled, pairs, ablation=ablation, draws=0)
    rows = torch.arange(len(pairs)), pairs.position
    with torch.no_grad():
        z = {l: compiled.run(pairs.clean, read=[Site("z", l)]).acts[Site("z", l)] for l in range(2)}
        c = {l: compiled.run(pairs.corrupt, read=[Site("z", l)]).acts[Site("z", l)] for l in range(2)}
        before = compiled.run(pairs.clean).logits[rows].double().softmax(-1)
        for layer in range(2):
            for head in range(4):
                here = z[layer][:, :, head]
                instead = {
                    "zero": torch.zeros_like(here),
                    "mean": here.mean((0, 1)).expand_as(here),
                    "counterfactual": c[layer][:, :, head],
                    "resample": here.roll(1, 0),
                }[ablation]
                after = (
                    compiled.run(pairs.clean, edit={Site("z", layer, head): instead}).logits[rows].double().softmax(-1)
                )
                p = [
                    x.gather(1, pairs.answer.clamp(min=0)).masked_fill(pairs.answer < 0, 0).sum(1)
                    for x in (before, after)
                ]
                hit = [(x.argmax(1, keepdim=True) == pairs.answer).any(1).double() for x in (before, after)]
                js = sum(literal_js(a, b) for a, b in zip(before, after, strict=True)) / len(pairs)
                wanted = {
                    "probability_drop": float((p[0] - p[1]).mean()),
                    "divergence": js,
                    "accuracy_change": float((hit[1] - hit[0]).mean()),
                    "loss_change": float((p[0].log() - p[1].log()).mean()),
                }
                for name, value in wanted.items():
                    assert float(found.values[name][layer][head]) == pytest.approx(value, abs=2e-5), (name, layer, head)


def test_the_copying_head_is_the_one_that_hurts(compiled, pairs):
    found = leave_one_head_out(compiled, pairs, ablation="zero")
    best = found.top("probability_drop", 1)[0]
    assert (best.layer, best.head) == (1, 1)
    assert float(found.values["accuracy_change"][1][1]) == -1
    assert best.value > 5 * abs(best.null)
    assert float(found.low["probability_drop"][1][1]) > 0
    # The last head of layer 1 writes nothing that is read.
    assert abs(float(found.values["divergence"][1][3])) < 1e-6


def test_batch_1_and_batch_n_agree(compiled, pairs):
    options = dict(ablation="zero", labels=None, by="head", stack="", draws=0, seed=0)
    together = effects(compiled, pairs, **options)
    alone = [effects(compiled, pairs[i : i + 1], **options) for i in range(len(pairs))]
    for name, values in together.of.items():
        torch.testing.assert_close(values, torch.cat([one.of[name] for one in alone], 1), atol=1e-5, rtol=1e-5)


def test_padding_does_not_count(tiny):
    texts = ["Mary and John went to the store .", "John gave a book"]
    options = dict(ablation="zero", labels=None, by="head", stack="", draws=0, seed=0)
    together, alone = effects(tiny, texts, **options), effects(tiny, texts[1:], **options)
    for name, values in together.of.items():
        torch.testing.assert_close(values[:, 1:], alone.of[name], atol=1e-5, rtol=1e-4)


def test_the_null_moves_the_head_as_far_as_its_removal(tiny):
    """At every token the random change is as long as what removal takes away."""
    from workbench.probes.importance.leave_one_out import _random_change

    value = torch.randn(2, 5, 16, dtype=torch.float64)
    moved = _random_change(torch.zeros_like, (0, 0, 1))(value) - value
    torch.testing.assert_close(moved.norm(dim=-1), value.norm(dim=-1))
    cosine = torch.nn.functional.cosine_similarity(moved, value, dim=-1)
    assert cosine.abs().max() < 0.9
    again = _random_change(torch.zeros_like, (0, 0, 1))(value) - value
    torch.testing.assert_close(moved, again)
    assert not torch.allclose(moved, _random_change(torch.zeros_like, (0, 0, 2))(value) - value)


def test_kv_groups_are_removed_whole():
    case = native()
    found = leave_one_head_out(case.model, case.inputs, ablation="zero", by="kv-group", draws=1)
    assert isinstance(found, GroupTable)
    assert found.size == 2
    assert len(found.values["divergence"][0]) == 2
    with torch.no_grad():
        plain = case.model.run(case.inputs)
        run = case.model.run(case.inputs, edit={Site("z", 1, h): torch.zeros_like for h in (2, 3)})
        wanted = Judge().scores(run)["loss"] - Judge().scores(plain)["loss"]
    assert float(found.values["loss_change"][1][1]) == pytest.approx(float(wanted.mean()), abs=1e-10)


@pytest.mark.parametrize("name", ["vit", "native"])
def test_images_are_judged_by_their_class(name):
    if name == "vit":
        case = hugging_face("vit")
        model, images = case.model, case.inputs
    else:
        case = native(grid=(2, 2), patch=4, channels=3, vocab=5, causal=False, positions="learned")
        model, images = case.model, torch.randn(3, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        logits = model.run(images).logits
    labels = torch.arange(len(logits)) % logits.shape[1]
    found = leave_one_head_out(model, images, ablation="zero", labels=labels, draws=1)
    with torch.no_grad():
        cut = model.run(images, edit={Site("z", 1, 2): torch.zeros_like}).logits
    at = torch.arange(len(labels)), labels
    wanted = float((logits.softmax(-1)[at] - cut.softmax(-1)[at]).mean())
    assert float(found.values["probability_drop"][1][2]) == pytest.approx(wanted, abs=1e-9)
    assert first_order(model, images, labels=labels).correlation["estimate"].shape == (3,)
    with pytest.raises(Refused, match="pass labels="):
        leave_one_head_out(model, images)


def test_a_stack_of_a_two_stack_model():
    case = hugging_face("t5")
    found = leave_one_head_out(case.model, case.inputs, ablation="zero", stack="decoder", draws=0)
    assert found.layers == ("decoder.0", "decoder.1")
    with pytest.raises(Refused, match="stacks that do"):
        leave_one_head_out(case.model, case.inputs)


def test_one_example_has_no_interval(compiled, pairs):
    found = leave_one_head_out(compiled, pairs[:1], draws=0)
    assert found.low["divergence"][0].isnan().all()
    assert "interval" in found.undefined


def test_what_makes_no_sense_is_refused(compiled, pairs, tiny):
    for options, message in (
        (dict(by="layer"), "unit to remove"),
        (dict(draws=-1), "at least 0"),
        (dict(labels=torch.zeros(4, dtype=torch.long)), "answers of their own"),
    ):
        with pytest.raises((WorkbenchError, UnknownName), match=message):
            leave_one_head_out(compiled, pairs, **options)
    with pytest.raises(WorkbenchError, match="classes of a classifier"):
        leave_one_head_out(tiny, "Mary went to the store .", labels=torch.tensor([1]))
    with pytest.raises(WorkbenchError, match="integers"):
        leave_one_head_out(tiny, "Mary went to the store .", labels=torch.tensor([1.0]))
    bert = hugging_face("bert")
    with pytest.raises(Refused, match="sees the next token"):
        leave_one_head_out(bert.model, bert.inputs)
    vit = hugging_face("vit")
    with pytest.raises(WorkbenchError, match=r"labels lie in \[0, 2\)"):
        leave_one_head_out(vit.model, vit.inputs, labels=torch.tensor([0, 9]))


@pytest.mark.parametrize("make", [native, lambda: hugging_face("llama"), lambda: hugging_face("gpt2")])
def test_first_order_is_the_derivative_of_a_switch(make):
    """d loss / d xi where xi multiplies the head: central differences."""
    case = make()
    found = first_order(case.model, case.inputs, ablation="zero")
    step = 1e-3  # Llama's norm works in float32
    for layer, head in ((0, 1), (1, 3)):
        with torch.no_grad():
            losses = [
                Judge().scores(case.model.run(case.inputs, edit={Site("z", layer, head): lambda z, f=f: z * f}))["loss"]
                for f in (1 + step, 1 - step)
            ]
        slope = (losses[0] - losses[1]) / (2 * step)
        assert float(found.values["importance"][layer][head]) == pytest.approx(
            float(slope.abs().mean()), rel=1e-3, abs=1e-7
        )
        assert float(found.values["estimate"][layer][head]) == pytest.approx(float(-slope.mean()), rel=1e-3, abs=1e-7)


def test_first_order_is_exact_where_the_loss_is_almost_linear():
    """The estimate's error falls with the square of the change: scale every head's output down and compare."""
    case = native()
    with torch.no_grad():
        for block in case.net.blocks:
            block.attn.W_O *= 1e-4
    found = first_order(case.model, case.inputs)
    for layer in range(2):
        torch.testing.assert_close(found.values["estimate"][layer], found.values["exact"][layer], rtol=1e-2, atol=1e-9)
    assert float(found.correlation["estimate"][0]) > 0.99


def test_normalised_importance_has_length_one_in_every_layer(compiled, pairs):
    found = first_order(compiled, pairs)
    for layer in range(2):
        assert float(found.values["normalised"][layer].norm()) == pytest.approx(1)
    torch.testing.assert_close(
        found.values["exact"][1], leave_one_head_out(compiled, pairs, ablation="zero", draws=0).values["loss_change"][1]
    )


def test_the_correlation_is_scipys(tiny):
    from scipy.stats import spearmanr

    pairs = wb.task("ioi").build(0, tiny.tokenizer, 4)
    found = first_order(tiny, pairs)
    table = found.frame()
    assert float(found.correlation["estimate"][0]) == pytest.approx(
        spearmanr(table["estimate"], table["exact"]).statistic
    )
    value, low, high = found.correlation["importance"].tolist()
    assert low <= value <= high


def test_without_exact_effects_nothing_is_claimed(compiled, pairs, tmp_path):
    found = first_order(compiled, pairs[:1], exact=False)
    assert found.correlation == {}
    assert "exact" not in found.values
    assert found.null["importance"][0].isnan().all()
    assert "null" in found.undefined
    assert load_result(found.save(tmp_path / "first")).type == "FirstOrder"
