"""Outlier tokens with merged heads, their overlap with the decoder's, and contrastive logits."""

import itertools
import math

import pytest
import torch
from vision_nets import llava, vision

from workbench.captures import capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.models.protocol import Tokens
from workbench.probes.vision.cls_maps import class_maps
from workbench.probes.vision.damro import attention_outliers, contrast_logits, outlier_contrast, token_overlap
from workbench.probes.vision.erasure import random_vision_model
from workbench.probes.vision.grid import Grid, grid_of
from workbench.probes.vision.pruning import pruned_run
from workbench.run import Activations, Run
from workbench.sites import Site


def reads(layers, stack=""):
    return [f"{stack}blocks.{layer}.attn.hook_{kind}" for layer in layers for kind in "qk"]


def softmax(scores):
    top = max(scores)
    parts = [math.exp(x - top) for x in scores]
    return [x / sum(parts) for x in parts]


def test_merged_heads_by_hand_in_an_encoder_with_a_class_token():
    model, inputs, _ = vision("clip-vision")
    grid = grid_of(model)
    run = model.run(inputs, read=reads((0, 1)), maps=capture())
    found = attention_outliers(run, grid, k=4)
    assert found.layer == 0  # the last but one
    q, k = (run.acts[f"blocks.0.attn.hook_{kind}"].detach().flatten(2) for kind in "qk")
    for image in range(2):
        scores = [float(q[image, 0] @ k[image, token]) / math.sqrt(32) for token in range(17)]
        row = softmax(scores)[1:]
        torch.testing.assert_close(found.merged[image], torch.tensor(row).double())
        top = sorted(range(16), key=lambda p: -row[p])[:4]
        assert sorted(found.outlier[image].nonzero()[:, 0].tolist()) == sorted(top)
    # The heads' own rows are the model's attention.
    torch.testing.assert_close(found.by_head, class_maps(run, grid).weight[0])
    assert attention_outliers(run, grid, k=4, layer=1).layer == 1


def test_without_a_class_token_it_is_the_mean_over_patches():
    model, images, grid = random_vision_model()
    run = model.run(images, read=reads((0,)), maps=capture())
    found = attention_outliers(run, grid, k=3)
    q, k = (run.acts[f"blocks.0.attn.hook_{kind}"].detach().double().flatten(2) for kind in "qk")
    rows = (q @ k.transpose(1, 2) / 4).softmax(-1)
    torch.testing.assert_close(found.merged, rows.mean(1))
    torch.testing.assert_close(found.by_head, class_maps(run, grid).weight[0], atol=1e-6, rtol=1e-5)
    assert found.query == "mean over patches"


def test_a_head_with_large_products_rules_the_merged_row():
    """Head 0 points hard at patch 1, three heads softly at patch 2: the mean of heads takes 2, the merged row 1."""
    grid = Grid(1, 4, start=1, cls=0, tokens=5)
    q, k = torch.zeros(1, 5, 4, 4), torch.zeros(1, 5, 4, 4)
    q[..., 0] = 1.0
    k[0, 2, 0, 0] = 12.0
    k[0, 3, 1:, 0] = 3.0
    run = Run(Tokens.of(torch.zeros(1, 0).long()), acts=Activations({Site("q", 0): q, Site("k", 0): k}))
    found = attention_outliers(run, grid, k=1)
    assert found.outlier[0].tolist() == [False, True, False, False]
    assert int(found.by_head.mean(1).argmax()) == 2
    assert float(found.agreement().values["share"][0]) == 0.0


def test_grouped_keys_are_shared_by_their_queries():
    grid = Grid(1, 3)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 3, 4, 2, generator=generator), torch.randn(1, 3, 2, 2, generator=generator)
    acts = {Site("q", 0): q, Site("k", 0): k}
    found = attention_outliers(Run(Tokens.of(torch.zeros(1, 0).long()), acts=Activations(acts)), grid, k=1)
    wide = k[:, :, [0, 0, 1, 1]].flatten(2).double()
    torch.testing.assert_close(
        found.merged, (q.double().flatten(2) @ wide.transpose(1, 2) / 8**0.5).softmax(-1).mean(1)
    )


def test_the_overlap_and_its_chance_by_counting():
    n, k = 6, 2
    first = torch.tensor([[6.0, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6]])
    same = token_overlap(first, {0: first, "text.1": first.flip(1)}, k)
    assert same.values["share"].tolist() == [1.0, 0.0]
    half = token_overlap(first, {0: torch.tensor([[6.0, 0, 5, 0, 0, 0], [6.0, 0, 0, 0, 0, 5]])}, k)
    assert half.values["share"].tolist() == [0.5]
    assert float(half.values["jaccard"][0]) == pytest.approx(1 / 3)
    sets = [set(c) for c in itertools.combinations(range(n), k)]
    share = sum(len(a & {0, 1}) / k for a in sets) / len(sets)
    jaccard = sum(len(a & {0, 1}) / len(a | {0, 1}) for a in sets) / len(sets)
    assert float(half.null["share"][0]) == pytest.approx(share) == pytest.approx(k / n)
    assert float(half.null["jaccard"][0]) == pytest.approx(jaccard)
    unknown = token_overlap(first * float("nan"), {0: first}, k)
    assert unknown.values["share"].isnan().all()
    assert "layer 0" in unknown.undefined


def test_contrast_logits_are_the_formula_s():
    full, negative = torch.tensor([[2.0, 1.0, -3.0]]), torch.tensor([[2.5, 0.0, 0.0]])
    got = contrast_logits(full, negative, a=2.0)
    assert got[0].tolist() == pytest.approx([3 * 2 - 2 * 2.5, 3.0, float("-inf")])
    # exp(-1) = .37 of the largest probability is above a cut of .1 and below one of .5.
    assert contrast_logits(full, negative, cut=0.5)[0].tolist() == [1.0, float("-inf"), float("-inf")]
    assert torch.equal(contrast_logits(full, full, a=5.0, cut=1e-9), full)
    for wrong in (0.0, 1.5):
        with pytest.raises(WorkbenchError, match="cut"):
            contrast_logits(full, negative, cut=wrong)
    with pytest.raises(WorkbenchError, match="one shape"):
        contrast_logits(full, negative[0])


@pytest.mark.parametrize("how", ["remove", "mean"])
def test_the_contrast_by_hand(how):
    model, images, grid = random_vision_model()
    run = model.run(images, read=reads((0,)))
    outlier = attention_outliers(run, grid, k=3).outlier
    answer = torch.tensor([0, 2])
    found = outlier_contrast(model, images, outlier, grid, a=(0.0, 2.0), cut=0.3, answer=answer, how=how, random=3)
    full = run.logits.detach().double()
    alone = pruned_run(model, images, ~outlier, grid, how=how).logits.detach().double()
    for image in range(2):
        p = softmax(full[image].tolist())
        fine = [x >= 0.3 * max(p) for x in p]
        logits = [
            3 * float(f) - 2 * float(n) if ok else -1e9
            for f, n, ok in zip(full[image], alone[image], fine, strict=True)
        ]
        q = softmax(logits)
        total = sum(x for x, ok in zip(p, fine, strict=True) if ok)
        kl = sum(x / total * math.log(x / total / y) for x, y, ok in zip(p, q, fine, strict=True) if ok)
        assert float(found.values["divergence"][1, image]) == pytest.approx(kl, abs=1e-5)
        assert float(found.values["probability"][1, image]) == pytest.approx(q[int(answer[image])], abs=1e-5)
        assert float(found.values["gain"][1, image]) == pytest.approx(
            q[int(answer[image])] - p[int(answer[image])], abs=1e-5
        )
        assert bool(found.values["changed"][1, image]) == (q.index(max(q)) != p.index(max(p)))
        assert int(found.plausible[image]) == sum(fine)
    assert float(found.values["divergence"][0].abs().max()) < 1e-9  # strength 0 changes nothing
    assert found.random["divergence"].shape == (3, 2, 2)


def test_encoder_and_decoder_of_a_llava():
    model, inputs = llava()
    eyes, text = grid_of(model, inputs, stack="vision"), grid_of(model, inputs)
    run = model.run(inputs, read=reads((0, 1), "vision."), maps=capture())
    found = attention_outliers(run, eyes, k=4)
    decoder = class_maps(run, text, query=20).weight
    table = token_overlap(found.merged, {layer: rows.mean(1) for layer, rows in decoder.items()}, 4)
    assert table.layers == ("text.0", "text.1")
    assert float(table.null["share"][0]) == pytest.approx(0.25)
    contrast = outlier_contrast(model, inputs, found.outlier, text, cut=0.01, random=2)
    hidden = torch.ones(1, 21).long()
    hidden[0, 2:18] = found.outlier[0].long()
    alone = model.run({**inputs, "attention_mask": hidden}).logits[0, -1].detach().double()
    full = model.run(inputs).logits[0, -1].detach().double()
    wanted = contrast_logits(full, alone, a=2.0, cut=0.01).log_softmax(-1)
    allowed = wanted.isfinite()
    p = full[allowed].log_softmax(-1)
    kl = (p.exp() * (p - wanted[allowed])).sum()
    assert float(contrast.values["divergence"][2, 0]) == pytest.approx(float(kl), rel=1e-6)


def test_wrong_questions():
    model, images, grid = random_vision_model()
    run = model.run(images, read=reads((0,)))
    with pytest.raises(WorkbenchError, match="outliers"):
        attention_outliers(run, grid, k=12)
    with pytest.raises(UnknownName, match="queries and keys"):
        attention_outliers(run, grid, k=2, layer=5)
    with pytest.raises(WorkbenchError, match="read no queries"):
        attention_outliers(model.run(images), grid, k=2)
    with pytest.raises(Refused, match="some outlier"):
        outlier_contrast(model, images, torch.zeros(2, 12, dtype=torch.bool), grid)
    with pytest.raises(WorkbenchError, match="bool"):
        outlier_contrast(model, images, torch.zeros(2, 12), grid)
    with pytest.raises(WorkbenchError, match="weighs"):
        token_overlap(torch.rand(2, 6), {0: torch.rand(2, 5)}, 2)
