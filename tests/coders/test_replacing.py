"""Coders in the place of a model's own parts: literal runs, errors that make the run the model's own, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import workbench as wb
from workbench.coders.catalogue import make_coder
from workbench.coders.coder import Coder
from workbench.coders.cross_layer import CrossLayer
from workbench.coders.cross_layer_kinds import make_cross_layer
from workbench.coders.lorsa import Lorsa
from workbench.coders.replacing import replacement_edits, replacement_errors, spliced
from workbench.errors import Refused, WorkbenchError
from workbench.models.native import NativeModel
from workbench.sites import Site

READ, WRITE = "blocks.{}.ln2.hook_normalized", "blocks.{}.hook_mlp_out"


def filled(coder: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return coder.requires_grad_(False)


def transcoder(layer: int) -> Coder:
    coder: Coder = filled(make_coder("topk", 16, 24, d_out=16, k=4, skip=True))
    coder.about = {"reads": [READ.format(layer)], "writes": [WRITE.format(layer)]}
    return coder


def cross_layer() -> CrossLayer:
    coder: CrossLayer = filled(make_cross_layer("topk", 2, 16, 24, k=4, skip=True))
    coder.about = {"reads": [READ.format(i) for i in range(2)], "writes": [WRITE.format(i) for i in range(2)]}
    return coder


def ids(model: NativeModel) -> Tensor:
    assert model.shape.vocab is not None
    return torch.randint(model.shape.vocab, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_transcoders_take_the_place_of_mlps(small_model: NativeModel) -> None:
    first, second = transcoder(0), transcoder(1)
    tokens = ids(small_model)
    found = spliced(small_model, [first, second], tokens, read=[WRITE.format(1)])
    x0 = small_model.run(tokens, read=[READ.format(0)]).acts[READ.format(0)]
    edit = {WRITE.format(0): first(x0)}
    x1 = small_model.run(tokens, read=[READ.format(1)], edit=edit).acts[READ.format(1)]
    wanted = small_model.run(tokens, edit={**edit, WRITE.format(1): second(x1)})
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.acts[WRITE.format(1)], second(x1))
    assert not torch.allclose(found.logits, small_model.run(tokens).logits, atol=1e-2)


@torch.no_grad()
def test_a_cross_layer_transcoder_writes_into_later_layers(small_model: NativeModel) -> None:
    coder, tokens = cross_layer(), ids(small_model)
    found = spliced(small_model, coder, tokens)
    x0 = small_model.run(tokens, read=[READ.format(0)]).acts[READ.format(0)]
    f0 = coder.encode(0, x0)
    edit = {WRITE.format(0): f0 @ coder.decoder(0, 0) + coder.b_dec[0] + x0 @ coder.W_skip[0]}
    x1 = small_model.run(tokens, read=[READ.format(1)], edit=edit).acts[READ.format(1)]
    y1 = f0 @ coder.decoder(0, 1) + coder.encode(1, x1) @ coder.decoder(1, 1) + coder.b_dec[1] + x1 @ coder.W_skip[1]
    assert torch.allclose(found.logits, small_model.run(tokens, edit={**edit, WRITE.format(1): y1}).logits, atol=1e-5)


@torch.no_grad()
def test_with_its_errors_the_run_is_the_models_own(small_model: NativeModel) -> None:
    tokens = small_model.tokens(
        ["The old guard walked home.", "Then the woman ran to the bright market in the evening."]
    )
    plain = small_model.run(tokens)
    z: Coder = filled(make_coder("jumprelu", 16, 24))
    z.about = {"reads": "blocks.1.attn.hook_z", "writes": "blocks.1.attn.hook_z"}
    lorsa = Lorsa.from_model(small_model, 0, features=8, k=2)
    for coders in (cross_layer(), [transcoder(1), z], [lorsa, cross_layer(), z]):
        found = spliced(small_model, coders, tokens, error=True)
        changed = spliced(small_model, coders, tokens)
        real = tokens.mask
        assert torch.allclose(found.logits[real], plain.logits[real], atol=2e-5)
        assert not torch.allclose(changed.logits[real], plain.logits[real], atol=1e-2)


@torch.no_grad()
def test_an_intervention_goes_through_the_coders(small_model: NativeModel) -> None:
    """With errors in place, a change upstream reaches the output through the coder alone."""
    coder, tokens = transcoder(1), ids(small_model)
    errors = replacement_errors(small_model, coder, tokens)
    assert set(errors) == {Site.parse(WRITE.format(1))}
    shift = torch.randn(16, generator=torch.Generator().manual_seed(2))
    changed = {"blocks.1.hook_resid_pre": lambda value: value + shift, **replacement_edits(coder, errors=errors)}
    found = small_model.run(tokens, read=[READ.format(1), WRITE.format(1)], edit=changed)
    wanted = coder(found.acts[READ.format(1)]) + errors[Site.parse(WRITE.format(1))]
    assert torch.allclose(found.acts[WRITE.format(1)], wanted, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_exact_attention_in_every_layer_is_the_model(side: str) -> None:
    model = wb.load("tiny-softmax")
    coders = [Lorsa.exact(model, layer).requires_grad_(False) for layer in range(model.shape.layers)]
    tokens = model.tokens(["Mary and John went to the store .", "John gave a book to Mary near the old market ."])
    if side == "left":
        lengths = tokens.mask.sum(1).tolist()
        rows = [torch.roll(row, len(row) - n) for row, n in zip(tokens.ids, lengths, strict=True)]
        mask = torch.stack([torch.roll(row, len(row) - n) for row, n in zip(tokens.mask, lengths, strict=True)])
        tokens = wb.Tokens(torch.stack(rows), mask)
    plain, found = model.run(tokens), spliced(model, coders, tokens)
    assert torch.allclose(found.logits[tokens.mask], plain.logits[tokens.mask], atol=1e-3)


@torch.no_grad()
def test_the_recovered_loss_of_perfect_and_useless_coders(small_model: NativeModel) -> None:
    """An autoencoder with every axis and its negative changes nothing; one of zeros is an ablation to its bias."""
    site, tokens = "blocks.0.hook_resid_post", ids(small_model)
    perfect, useless = (make_coder("topk", 16, 32, k=32, centred=False).requires_grad_(False) for _ in range(2))
    both = torch.cat([torch.eye(16), -torch.eye(16)])
    perfect.W_enc.copy_(both.T)
    perfect.W_dec.copy_(both)
    useless.W_dec.zero_()
    for coder in (perfect, useless):
        coder.about = {"reads": [site], "writes": [site]}
    plain = small_model.run(tokens).logits
    assert torch.allclose(spliced(small_model, perfect, tokens).logits, plain, atol=1e-5)
    zero = small_model.run(tokens, edit={site: torch.zeros_like}).logits
    assert torch.allclose(spliced(small_model, useless, tokens).logits, zero, atol=1e-6)


def test_impossible_replacements_are_refused(small_model: NativeModel) -> None:
    tokens, coder = ids(small_model), transcoder(0)
    with pytest.raises(WorkbenchError, match="two coders write blocks.0.hook_mlp_out"):
        replacement_edits([coder, cross_layer()])
    with pytest.raises(WorkbenchError, match="no coder given"):
        replacement_edits([])
    with pytest.raises(WorkbenchError, match="got a str"):
        spliced(small_model, ["topk"], tokens)
    silent = make_coder("topk", 16, 24, k=4)
    with pytest.raises(WorkbenchError, match=r"coder\.about\['reads'\]"):
        replacement_edits(silent)
    backwards = transcoder(0)
    backwards.about["reads"] = ["blocks.1.hook_resid_post"]
    with pytest.raises(
        WorkbenchError, match=r"blocks\.0\.hook_mlp_out is written before blocks\.1\.hook_resid_post is read"
    ):
        spliced(small_model, backwards, tokens)
    crosscoder = make_coder("topk", 32, 24, k=4, reads=(16, 16), writes=(16, 16))
    crosscoder.about = {"reads": ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]}
    with pytest.raises(Refused, match="crosscoder of 2 sites"):
        replacement_edits(crosscoder)
    half = cross_layer()
    half.about["reads"] = half.about["reads"][:1]
    with pytest.raises(WorkbenchError, match="names as many sites"):
        replacement_edits(half)
