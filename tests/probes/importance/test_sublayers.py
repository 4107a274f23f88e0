"""Sublayer removal: planted identities go first, distances are literal, orders are those of a literal greedy search."""

import math

import pytest
import torch
from builders import hugging_face, native

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.probes.examples import needles
from workbench.probes.importance.sublayers import DISTANCES, sublayer_removal, sublayers
from workbench.results import load_result
from workbench.sites import Site


def literal(distance, a, b):
    """Of two rows of logits."""
    if distance == "norm":
        return math.sqrt(sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)))
    if distance == "angular":
        return math.acos(max(-1, min(1, float(a @ b) / float(a.norm() * b.norm()))))
    p, q = a.softmax(-1).tolist(), b.softmax(-1).tolist()
    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return sum(x * math.log(x / c) + y * math.log(y / c) for x, y, c in zip(p, q, m, strict=True)) / 2


@pytest.fixture(scope="module")
def case():
    return native(layers=3)


@pytest.mark.parametrize("distance", list(DISTANCES))
def test_distances_term_by_term(case, distance):
    with torch.no_grad():
        plain = case.model.run(case.inputs)
        cut = case.model.run(case.inputs, edit={"blocks.1.hook_mlp_out": torch.zeros_like})
    wanted = [
        sum(literal(distance, x, y) for x, y in zip(a, b, strict=True)) / len(a)
        for a, b in zip(plain.logits, cut.logits, strict=True)
    ]
    found = DISTANCES[distance](plain, cut)
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(DISTANCES[distance](plain, plain), torch.zeros(2).double(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("distance", list(DISTANCES))
@pytest.mark.parametrize("search", ["greedy", "one-shot"])
def test_sublayers_that_write_nothing_go_first(distance, search):
    case = native(layers=3)
    with torch.no_grad():
        case.net.blocks[1].attn.W_O.zero_()
        case.net.blocks[0].mlp.W_out.zero_()
        case.net.blocks[0].mlp.b_out.zero_()
    found = sublayer_removal(case.model, case.inputs, distance=distance, search=search, random=2)
    assert set(found.order[:2]) == {"blocks.1.hook_attn_out", "blocks.0.hook_mlp_out"}
    torch.testing.assert_close(found.moved[:2], torch.zeros(2, 2).double(), atol=1e-7, rtol=0)
    assert (found.moved[2] > 1e-6).all()


def test_on_a_model_of_transformers():
    case = hugging_face("llama")
    block = case.net.model.layers[1]
    kept = block.mlp.down_proj.weight.detach().clone()
    try:
        with torch.no_grad():
            block.mlp.down_proj.weight.zero_()
        found = sublayer_removal(case.model, case.inputs, random=1, count=2)
    finally:
        with torch.no_grad():
            block.mlp.down_proj.weight.copy_(kept)
    assert found.order[0] == "blocks.1.hook_mlp_out"
    assert float(found.moved[0].max()) < 1e-12


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit", "falcon"])
def test_other_models_are_served(name):
    case = hugging_face(name)
    found = sublayer_removal(case.model, case.inputs, count=3, random=1)
    assert len(set(found.order)) == 3
    assert found.candidates == 4
    assert found.metric == ("loss" if case.model.shape.causal and name != "vit" else "kl")


def test_greedy_is_a_literal_greedy_search(case):
    found = sublayer_removal(case.model, case.inputs, distance="norm", random=1)
    candidates, order = sublayers(case.model), []
    with torch.no_grad():
        plain = case.model.run(case.inputs).logits
        while len(order) < len(candidates):
            far = {}
            for site in candidates:
                if site not in order:
                    run = case.model.run(case.inputs, edit=dict.fromkeys([*order, site], torch.zeros_like))
                    far[site] = float((plain - run.logits).norm(dim=-1).mean())
            order.append(min(far, key=far.get))
            assert float(found.moved[len(order) - 1].mean()) == pytest.approx(far[order[-1]], rel=1e-9)
    assert found.order == tuple(map(str, order))


def test_one_shot_ranks_by_single_removals(case):
    found = sublayer_removal(case.model, case.inputs, search="one-shot", random=1)
    with torch.no_grad():
        plain = case.model.run(case.inputs)
        far = {
            str(site): float(DISTANCES["js"](plain, case.model.run(case.inputs, edit={site: torch.zeros_like})).mean())
            for site in sublayers(case.model)
        }
    assert list(found.order) == sorted(far, key=far.get)


@pytest.mark.parametrize("search", ["greedy", "one-shot"])
def test_protected_early_sublayers_go_last(search):
    """Even if they write nothing, and would go first."""
    case = native(layers=3)
    with torch.no_grad():
        case.net.blocks[0].attn.W_O.zero_()
    free = sublayer_removal(case.model, case.inputs, search=search, random=1)
    found = sublayer_removal(case.model, case.inputs, protect=0.4, search=search, random=1)
    early = {str(site) for site in sublayers(case.model)[: round(0.4 * 6)]}
    assert free.order[0] == "blocks.0.hook_attn_out"
    assert len(early) == 2
    assert set(found.order[-2:]) == early


def test_the_curves_end_where_nothing_is_left(case):
    found = sublayer_removal(case.model, case.inputs, random=3)
    torch.testing.assert_close(found.random_moved[:, -1], found.moved[-1].expand(3, -1), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(found.random_kept[:, -1], found.kept[-1].expand(3, -1), atol=1e-9, rtol=1e-9)
    table = found.frame()
    assert table["share_kept"].tolist() == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])
    assert set(table["kind"]) == {"attention", "mlp"}
    assert table["distance"].iloc[0] <= table["distance_random_high"].iloc[0]


def test_the_metric_is_taken_on_other_examples(case):
    other = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(5))
    found = sublayer_removal(case.model, case.inputs, evaluate=other, random=1, count=2)
    assert found.base.shape == (3,)
    assert found.kept.shape == (2, 3)
    assert found.moved.shape == (2, 2)
    with torch.no_grad():
        run = case.model.run(other, edit={found.order[0]: torch.zeros_like})
    wanted = -run.logits[:, :-1].log_softmax(-1).gather(-1, other[:, 1:, None])[..., 0].mean(1)
    torch.testing.assert_close(found.kept[0], wanted)


def test_a_distance_at_the_answer_keeps_what_it_hangs_on():
    """The mean over tokens takes the attention away that one token needs; the answer alone does not let go of it."""
    model = wb.load("tiny-softmax")
    pairs = needles(model, 48, 4)
    answer = sublayer_removal(model, pairs, at="answer", count=3, random=1)
    tokens = sublayer_removal(model, pairs, at="tokens", distance="norm", count=3, random=1)
    assert float(answer.kept[2].mean()) > 0.9
    assert float(tokens.kept[2].mean()) < 0.1


def test_a_table_two_pictures_and_a_folder(case, tmp_path):
    found = sublayer_removal(case.model, case.inputs, random=1, count=2)
    assert "js" in found.plot().get_ylabel()
    assert found.plot(what="metric").get_ylabel() == "loss"
    with pytest.raises(UnknownName):
        found.plot(what="loss")
    assert load_result(found.save(tmp_path / "removal")).type == "SublayerRemoval"


def test_what_makes_no_sense_is_refused(case):
    for options in (
        dict(distance="l1"), dict(search="beam"), dict(at="end"), dict(at="answer"), dict(protect=1.5), dict(count=0),
        dict(count=7), dict(random=0),
    ):  # fmt: skip
        with pytest.raises((WorkbenchError, UnknownName)):
            sublayer_removal(case.model, case.inputs, **options)
    t5 = hugging_face("t5")
    with pytest.raises(Refused, match="of a single stack"):
        sublayer_removal(t5.model, t5.inputs)
    assert sublayers(case.model)[:2] == [Site("attn_out", 0), Site("mlp_out", 0)]
