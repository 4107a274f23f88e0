"""Removal curves against literal runs: what stands in for a part, what random parts are, which number is measured."""

import itertools
import math

import pytest
import torch
from builders import hugging_face

import workbench as wb
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Tokens
from workbench.pairs import Pairs, accuracy, logit_difference
from workbench.probes.ablation import (
    AblationCurve,
    ablation_curve,
    as_site,
    divergence,
    matched,
    named_metric,
    next_token_loss,
)
from workbench.probes.examples import needles
from workbench.probes.removal import Heads, kv_groups
from workbench.results import load_result
from workbench.run import Run
from workbench.sites import Site


@pytest.fixture(scope="module")
def tiny():
    return wb.load("tiny-softmax")


@pytest.fixture(scope="module")
def texts(tiny):
    return tiny.tokens(["Mary and John went to the store .", "John gave a book", "the cat sat on the mat and Mary"])


@pytest.fixture(scope="module")
def pairs(tiny):
    return needles(tiny, 48, 4)


def literal_loss(logits, ids, mask):
    found = []
    for b in range(len(ids)):
        real = mask[b].nonzero()[:, 0].tolist()
        terms = [
            -float(logits[b, i].double().log_softmax(-1)[ids[b, j]]) for i, j in itertools.pairwise(real) if j == i + 1
        ]
        found.append(sum(terms) / len(terms))
    return torch.tensor(found, dtype=torch.float64)


def literal_kl(p_logits, q_logits, mask):
    found = []
    for b in range(len(mask)):
        terms = []
        for t in mask[b].nonzero()[:, 0].tolist():
            p, q = p_logits[b, t].double().softmax(-1), q_logits[b, t].double().softmax(-1)
            terms.append(float(sum(a * math.log(a / c) for a, c in zip(p.tolist(), q.tolist(), strict=True))))
        found.append(sum(terms) / len(terms))
    return torch.tensor(found, dtype=torch.float64)


def test_the_loss_is_that_of_the_next_real_token(tiny, texts):
    with torch.no_grad():
        run = tiny.run(texts)
    torch.testing.assert_close(
        next_token_loss(run), literal_loss(run.logits, texts.ids, texts.mask), atol=1e-5, rtol=1e-5
    )


def test_padding_leaves_loss_and_divergence_alone(tiny, texts):
    short = tiny.tokens("John gave a book")
    with torch.no_grad():
        together, alone = tiny.run(texts), tiny.run(short)
        changed = {"blocks.0.attn.hook_z[1]": torch.zeros_like}
        together_cut, alone_cut = tiny.run(texts, edit=changed), tiny.run(short, edit=changed)
    torch.testing.assert_close(next_token_loss(together)[1:2], next_token_loss(alone), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        divergence(together_cut, together)[1:2], divergence(alone_cut, alone), atol=1e-5, rtol=1e-4
    )


def test_divergence_is_from_the_plain_prediction_to_the_changed_one(tiny, texts):
    """The order of the arguments: KL(plain || changed), and not the other way round."""
    with torch.no_grad():
        plain, cut = tiny.run(texts), tiny.run(texts, edit={"blocks.2.hook_attn_out": torch.zeros_like})
    wanted = literal_kl(plain.logits, cut.logits, texts.mask)
    torch.testing.assert_close(divergence(cut, plain), wanted, atol=1e-6, rtol=1e-5)
    other = literal_kl(cut.logits, plain.logits, texts.mask)
    assert (wanted - other).abs().max() > 1e-3
    torch.testing.assert_close(divergence(plain, plain), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_divergence_is_the_same_whatever_is_compared_at_a_time(tiny, texts, monkeypatch):
    with torch.no_grad():
        plain, cut = tiny.run(texts), tiny.run(texts, edit={"blocks.2.hook_attn_out": torch.zeros_like})
    whole = divergence(cut, plain)
    monkeypatch.setattr("workbench.probes.ablation._NUMBERS", 3 * plain.logits.shape[-1])
    torch.testing.assert_close(divergence(cut, plain), whole)


def test_named_metrics_of_pairs_are_those_of_the_answer(tiny, pairs):
    with torch.no_grad():
        run = tiny.run(pairs.clean)
    logits = run.logits.double()
    rows = logits[torch.arange(len(pairs)), pairs.position].softmax(-1)
    wanted = [float(rows[b, [a for a in pairs.answer[b].tolist() if a >= 0]].sum()) for b in range(len(pairs))]
    for name, values in {
        "probability": torch.tensor(wanted, dtype=torch.float64),
        "accuracy": accuracy(logits, pairs).double(),
        "logit-difference": logit_difference(logits, pairs),
    }.items():
        label, measure = named_metric(name, pairs)
        assert label == name
        torch.testing.assert_close(measure(run, run), values, atol=1e-5, rtol=1e-5)


def test_a_metric_of_ones_own(tiny, texts):
    def first_logit(run):
        return run.logits[:, 0, 0]

    found = ablation_curve(tiny, texts, [(0, 0), (1, 1)], metric=first_logit, random=2)
    assert found.metric == "first_logit"
    assert found.base.dtype == torch.float64
    with torch.no_grad():
        torch.testing.assert_close(found.base, tiny.run(texts).logits[:, 0, 0].double())


@pytest.mark.parametrize("ablation", ["zero", "mean", "resample", "counterfactual"])
def test_the_ranked_curve_is_what_literal_edits_give(tiny, pairs, ablation):
    order = [(1, 2), (0, 3), (3, 0)]
    found = ablation_curve(tiny, pairs, order, metric="loss", ablation=ablation, random=1)
    assert found.counts == (1, 2, 3)
    with torch.no_grad():
        read = [f"blocks.{layer}.attn.hook_z" for layer in range(tiny.shape.layers)]
        plain = tiny.run(pairs.clean, read=read)
        corrupt = tiny.run(pairs.corrupt, read=read)
        for c in found.counts:
            edits = {}
            for layer, head in order[:c]:
                z = plain.acts[f"blocks.{layer}.attn.hook_z[{head}]"]
                instead = {
                    "zero": torch.zeros_like(z),
                    "mean": z.mean((0, 1)).expand_as(z),
                    "resample": torch.stack([z[(b - 1) % len(z)] for b in range(len(z))]),
                    "counterfactual": corrupt.acts[f"blocks.{layer}.attn.hook_z[{head}]"],
                }[ablation]
                edits[f"blocks.{layer}.attn.hook_z[{head}]"] = instead
            wanted = next_token_loss(tiny.run(pairs.clean, edit=edits))
            torch.testing.assert_close(found.ranked[c - 1], wanted, atol=1e-5, rtol=1e-5)


def test_the_mean_is_over_real_tokens(tiny, texts):
    """A padded batch: the mean of what is there."""
    found = ablation_curve(tiny, texts, [(0, 1)], random=1)
    with torch.no_grad():
        z = tiny.run(texts, read=["blocks.0.attn.hook_z[1]"]).acts["blocks.0.attn.hook_z[1]"]
        mean = torch.cat([z[b, : int(texts.mask[b].sum())] for b in range(3)]).mean(0)
        run = tiny.run(texts, edit={"blocks.0.attn.hook_z[1]": mean.expand_as(z)})
    assert not bool(texts.mask.all())
    torch.testing.assert_close(found.ranked[0], next_token_loss(run), atol=1e-5, rtol=1e-5)


def test_resampling_never_brings_in_padding(tiny, texts):
    found = ablation_curve(tiny, texts, [(0, 1)], ablation="resample", random=1)
    with torch.no_grad():
        z = tiny.run(texts, read=["blocks.0.attn.hook_z[1]"]).acts["blocks.0.attn.hook_z[1]"]
        lengths = texts.mask.sum(1).tolist()
        instead = z.clone()
        for b in range(3):
            for t in range(lengths[b]):
                instead[b, t] = z[b - 1, t % lengths[b - 1]]
        run = tiny.run(texts, edit={"blocks.0.attn.hook_z[1]": instead})
    torch.testing.assert_close(found.ranked[0], next_token_loss(run), atol=1e-5, rtol=1e-5)


def test_several_removals_in_a_batch_are_those_one_by_one(tiny, texts, monkeypatch):
    """Copies of the batch get each its own edits: the numbers of one at a time."""
    order = [(layer, head) for layer in range(2) for head in range(3)]
    together = ablation_curve(tiny, texts, order, random=3)
    monkeypatch.setattr("workbench.probes.removal._NUMBERS", 1)
    alone = ablation_curve(tiny, texts, order, random=3)
    torch.testing.assert_close(together.ranked, alone.ranked, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.random, alone.random, atol=1e-5, rtol=1e-5)


def test_random_parts_are_matched_by_layer_and_spare_the_removed_ones():
    pool = [Site("z", layer, head) for layer in range(3) for head in range(4)]
    chosen = [pool[0], pool[1], pool[8]]
    seen = set()
    for seed in range(30):
        picked = matched(chosen, pool, torch.Generator().manual_seed(seed))
        assert sorted(part.layer for part in picked) == [0, 0, 2]
        assert len(set(picked)) == 3
        assert not set(picked) & set(chosen)
        seen |= set(picked)
    assert seen == {pool[2], pool[3], *pool[9:]}, "every other head of the layers is drawn some time"


def test_random_parts_of_a_full_layer_come_from_any_other():
    """A layer that is chosen whole has no other head; its stand-ins do not use up the layer of another chosen head first."""
    pool = [Site("z", layer, head) for layer in range(4) for head in range(4)]
    chosen = [*pool[:4], pool[4], pool[5]]
    others = set()
    for seed in range(60):
        picked = matched(chosen, pool, torch.Generator().manual_seed(seed))
        assert len(set(picked)) == 6
        assert not set(picked) & set(chosen)
        assert {part for part in picked if part.layer == 1} == {pool[6], pool[7]}
        others |= {part for part in picked if part.layer > 1}
    assert others == set(pool[8:])


def test_beyond_half_of_the_pool_chosen_parts_are_drawn_like_others():
    """Of 12 heads, 8 are chosen (4, 3, 1): each head of a layer that is not full is as likely; not the 4 others every time."""
    pool = [Site("z", layer, head) for layer in range(3) for head in range(4)]
    chosen = [*pool[:7], pool[8]]
    draws = [matched(chosen, pool, torch.Generator().manual_seed(seed)) for seed in range(400)]
    assert all(len(set(picked)) == 8 for picked in draws)
    counts = [sum(part in picked for picked in draws) / 400 for part in pool]
    # 3 of 4 of layer 1, 1 of 4 of layer 2; the 4 for the full layer from the 8 that are then left
    wanted = [0.5] * 4 + [0.75 + 0.25 / 2] * 4 + [0.25 + 0.75 / 2] * 4
    assert counts == pytest.approx(wanted, abs=0.1)
    assert set(matched(pool, pool, torch.Generator().manual_seed(0))) == set(pool)


def test_a_pool_that_is_too_small_is_refused():
    pool = [Site("z", 0, head) for head in range(2)]
    with pytest.raises(Refused, match="the pool holds 1 parts, too few to draw 2"):
        matched(pool, pool[:1], torch.Generator())


def test_stand_ins_of_sublayers_are_of_their_kind():
    pool = [Site(kind, layer) for layer in range(4) for kind in ("attn_out", "mlp_out")]
    for seed in range(20):
        (picked,) = matched([pool[0]], pool, torch.Generator().manual_seed(seed))
        assert picked.kind == "attn_out"
        assert picked.layer > 0
    assert [part.kind for part in matched([pool[0]], pool[:2], torch.Generator())] == ["mlp_out"]


def test_a_part_named_twice_in_the_pool_is_drawn_once():
    pool = [Site("z", 0, 1), Site("z", 0, 1), Site("z", 0, 2)]
    assert set(matched([Site("z", 0, 0)] * 2, pool, torch.Generator().manual_seed(0))) == set(pool)


def test_stacks_are_layers_of_their_own():
    pool = [Site("z", 0, head, stack) for stack in ("encoder", "decoder") for head in range(4)]
    for seed in range(10):
        picked = matched([pool[0]], pool, torch.Generator().manual_seed(seed))
        assert picked[0].stack == "encoder"


def test_whole_groups_are_removed_together(tiny, texts):
    group = Heads(1, (0, 1))
    found = ablation_curve(tiny, texts, [group, Heads(0, (2, 3))], ablation="zero", random=1)
    assert found.order[0] == "blocks.1.attn.hook_z[0,1]"
    with torch.no_grad():
        run = tiny.run(texts, edit={f"blocks.1.attn.hook_z[{head}]": torch.zeros_like for head in (0, 1)})
    torch.testing.assert_close(found.ranked[0], next_token_loss(run), atol=1e-5, rtol=1e-5)


def test_heads_together_are_one_or_more_different_ones():
    for heads in ((), (1, 1)):
        with pytest.raises(WorkbenchError, match="one or more different ones"):
            Heads(0, heads)


def test_groups_of_a_model_are_its_query_heads_by_kv_head():
    model = hugging_face("llama").model
    assert kv_groups(model) == [Heads(layer, heads) for layer in range(2) for heads in ((0, 1), (2, 3))]


def test_sublayers_are_ranked_among_themselves(tiny, texts):
    order = [Site("mlp_out", 1), Site("attn_out", 2), Site("attn_out", 0)]
    found = ablation_curve(tiny, texts, order, ablation="zero", random=2)
    with torch.no_grad():
        run = tiny.run(texts, edit={"blocks.1.hook_mlp_out": torch.zeros_like})
    torch.testing.assert_close(found.ranked[0], next_token_loss(run), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.random[:, -1], found.ranked[-1].expand(2, -1), atol=1e-5, rtol=1e-5)


def test_everything_removed_is_the_same_set_ranked_or_random(tiny, texts):
    order = [(layer, head) for layer in range(tiny.shape.layers) for head in range(tiny.shape.heads)]
    found = ablation_curve(tiny, texts, order, random=2)
    assert found.counts[-1] == len(order)
    torch.testing.assert_close(found.random[:, -1], found.ranked[-1].expand(2, -1), atol=0, rtol=0)


def test_the_seed_decides(tiny, texts):
    runs = [ablation_curve(tiny, texts, [(0, 0), (1, 1)], random=2, seed=seed) for seed in (0, 0, 1)]
    torch.testing.assert_close(runs[0].random, runs[1].random, atol=0, rtol=0)
    assert not torch.equal(runs[0].random, runs[2].random)


def test_removing_the_copying_head_of_the_compiled_model_loses_the_needle():
    model = wb.load("compiled-needle")
    pairs = needles(model, 40, 4)
    found = ablation_curve(model, pairs, [(1, 1)], metric="accuracy", ablation="zero", random=2)
    assert found.base.mean() == 1
    assert found.ranked[0].mean() == 0


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "bert"])
def test_on_models_of_transformers(name):
    case = hugging_face(name)
    found = ablation_curve(case.model, case.inputs, [(0, 1), (1, 2)], metric="kl", ablation="mean", random=2)
    assert found.ranked.shape == (2, len(found.base))
    assert (found.base.abs() < 1e-12).all()
    assert (found.ranked > 0).all()


def test_an_encoder_has_no_next_token():
    case = hugging_face("bert")
    with pytest.raises(Refused, match="sees the next token"):
        ablation_curve(case.model, case.inputs, [(0, 1)])


def test_a_decoder_is_judged_by_its_own_tokens():
    case = hugging_face("t5")
    part = Site("z", 1, 2, "decoder")
    found = ablation_curve(case.model, case.inputs, [part, Site("z", 0, 0, "encoder")], metric="kl", random=1)
    assert (found.ranked > 0).all()
    with torch.no_grad():
        run = case.model.run(case.inputs)
    ids = case.inputs["decoder_input_ids"]
    wanted = literal_loss(run.logits, ids, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(next_token_loss(run), wanted, atol=1e-8, rtol=1e-8)


def test_a_curve_is_a_table_a_picture_and_a_folder(tiny, texts, tmp_path):
    found = ablation_curve(tiny, texts, [(0, 0), (0, 1), (1, 1)], counts=(1, 3), random=2)
    table = found.frame()
    assert table["removed"].tolist() == [1, 3]
    assert table["ranked"].tolist() == pytest.approx(found.ranked.mean(1).tolist())
    assert (table["ranked_low"] <= table["ranked"]).all()
    assert (table["random_low"] <= table["random_high"]).all()
    assert table["base"].nunique() == 1
    assert found.plot().get_ylabel() == "loss"
    assert load_result(found.save(tmp_path / "curve")).type == "AblationCurve"
    assert isinstance(found, AblationCurve)


def test_wrong_requests_are_refused_in_one_line(tiny, texts, pairs):
    wrong = [
        (dict(ranking=[]), "names no parts"),
        (dict(ranking=[(0, 0), Site("z", 0, 0)]), "names a part twice"),
        (dict(ranking=[(0, 0)], random=0), "at least 1"),
        (dict(ranking=[(0, 0)], counts=(2,)), "between 1 and the 1 parts"),
        (dict(ranking=[(0, 0)], counts=()), "between 1 and the 1 parts"),
        (dict(ranking=[(0, 0)], metric="accuracy"), "asks for the answer of pairs"),
        (dict(ranking=[(0, 0)], ablation="counterfactual"), "corrupted prompt of pairs"),
    ]
    for options, message in wrong:
        with pytest.raises(WorkbenchError, match=message):
            ablation_curve(tiny, texts, **options)
    with pytest.raises(WorkbenchError, match="give two or more"):
        ablation_curve(tiny, "Mary went to the store .", [(0, 0)], ablation="resample")
    with pytest.raises(UnknownName, match="ablation"):
        ablation_curve(tiny, texts, [(0, 0)], ablation="median")
    with pytest.raises(UnknownName, match="metric"):
        ablation_curve(tiny, pairs, [(0, 0)], metric="f1")
    with pytest.raises(UnknownName, match="site"):
        ablation_curve(tiny, texts, [(0, 99)])
    with pytest.raises(Refused, match="no axis of tokens"):
        ablation_curve(tiny, texts, [Site("pattern", 0, 1)])
    with pytest.raises(Refused, match="loss needs logits of every token"):
        next_token_loss(Run(Tokens.of(torch.zeros(1, 4, dtype=torch.int64)), logits=torch.zeros(1, 1, 5)))
    with pytest.raises(Refused, match="compared by their logits"):
        divergence(Run(texts), Run(texts))


def test_parts_are_written_as_pairs_or_sites():
    assert as_site((2, 3)) == Site("z", 2, 3)
    assert as_site(Site("attn_out", 1)) == Site("attn_out", 1)


def test_pairs_are_judged_by_their_clean_prompts(tiny, pairs):
    assert isinstance(pairs, Pairs)
    found = ablation_curve(tiny, pairs, [(0, 0)], metric="kl", random=1)
    assert (found.base.abs() < 1e-12).all()
