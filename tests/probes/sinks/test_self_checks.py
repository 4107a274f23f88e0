"""Sinks from outside: what a layer would give without a key, odd inputs, and levels against a plain loop over a stream."""

import inspect

import builders as B
import pytest
import torch

import workbench as wb
from workbench.errors import Refused
from workbench.models.native import NativeConfig, NativeModel, NativeNet
from workbench.probes.hidden_keys import without_keys
from workbench.probes.sinks.eviction import eviction
from workbench.probes.sinks.inactive import inactive_heads, zeroable
from workbench.probes.sinks.levels import sink_levels
from workbench.probes.sinks.massive import massive_activations
from workbench.probes.sinks.massive_effect import massive_effect
from workbench.probes.sinks.overfocus import overfocus, overfocus_loss
from workbench.probes.sinks.scores import sinks
from workbench.probes.sinks.tagging import tagging, untag
from workbench.probes.structure.oracle import sparsified


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sink", [None, -1.0, 6.0])
def test_without_keys_is_softmax_over_those_that_stay(sink, dtype):
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(2, 3, 5, 9, generator=generator, dtype=torch.float64)
    scores[0, 0, 0, 4] = 40.0  # hiding a key that held everything leaves the others, not noise
    stay = torch.rand(2, 1, 5, 9, generator=generator) < 0.6
    stay[0, 0, 0, 4] = False
    extra = torch.full((2, 3, 5, 1), -torch.inf if sink is None else sink, dtype=torch.float64)
    whole = torch.cat([scores, extra], -1).softmax(-1)[..., :9].to(dtype)
    want = torch.cat([scores.masked_fill(~stay, -torch.inf), extra], -1).softmax(-1)[..., :9]
    got = without_keys(whole, stay)
    close = torch.ones(2, 3, 5, dtype=torch.bool)
    close[0, 0, 0] = dtype == torch.float64 and sink is None
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(got[close].double(), want[close], atol=tolerance, rtol=tolerance)
    assert bool(got.isfinite().all())
    assert float(got.double().sum(-1).max()) <= 1 + 10 * tolerance


def test_weights_that_are_no_softmax_are_refused():
    for wrong in (torch.full((1, 1, 2, 2), 0.7), torch.tensor([[[[0.5, -0.1]]]])):
        with pytest.raises(Refused, match="no softmax"):
            without_keys(wrong, torch.ones(1, 1, 1, 2, dtype=torch.bool))
    empty = without_keys(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([False, True]))
    assert empty.tolist() == [[[[0.0, 0.0]]]]


def with_sinks():
    """A model of transformers with learned sinks, its layers, and a text."""
    case = B.hugging_face("gpt_oss")
    return case.model, torch.randint(3, 20, (2, 12), generator=torch.Generator().manual_seed(3))


def scored(model, text, layer, stay):
    """The loss ``[B, T - 1]`` with one layer's patterns made anew from its scores and its sinks, without some keys."""
    site = f"blocks.{layer}.attn.hook_pattern"
    plain = model.run(text, read=[site], maps=wb.capture(layers=layer))
    amap = plain.maps[layer]
    share = 1 - plain.acts[site].sum(-1, keepdim=True)
    odds = torch.cat([plain.acts[site].masked_fill(~stay, 0.0), share], -1)
    pattern = (odds / odds.sum(-1, keepdim=True))[..., :-1]
    assert amap.row_sum == "<=1"
    run = model.run(text, edit={site: pattern})
    return -run.logits[:, :-1].double().log_softmax(-1).gather(-1, text[:, 1:, None])[..., 0]


@torch.no_grad()
def test_evicting_leaves_a_learned_sink_in_its_place():
    model, text = with_sinks()
    place = torch.arange(12)
    apart = place[:, None] - place
    found = eviction(model, text, window=6, sinks=(0, 2), random=1, layers=[1])
    for i, count in enumerate((0, 2)):
        stay = (apart < 6 - count) | (place < count)
        want = scored(model, text, 1, stay)[:, 6:].mean(1)
        torch.testing.assert_close(found.loss[i], want)


@torch.no_grad()
def test_one_key_beside_a_learned_sink_does_not_get_all():
    model, text = with_sinks()
    site = "blocks.1.attn.hook_pattern"
    plain = model.run(text, read=[site]).acts[site]
    stay = torch.zeros_like(plain).scatter_(-1, plain.argmax(-1, keepdim=True), 1.0) > 0
    found = sparsified(model, text, keys=(1,), random=1, metric="loss", layers=[1])
    torch.testing.assert_close(found.largest[0], scored(model, text, 1, stay).mean(1))


def test_patterns_that_nothing_can_be_hidden_in_are_refused():
    ids = torch.randint(3, 20, (1, 14), generator=torch.Generator().manual_seed(3))
    with pytest.raises(Refused, match="cannot be edited"):
        eviction(B.hugging_face("mamba").model, ids, window=6, sinks=(0,), random=1)
    config = NativeConfig(layers=1, heads=2, width=16, head_width=8, vocab=32, mixer="sink-logits")
    with pytest.raises(Refused, match="cannot be edited"):
        eviction(NativeModel(NativeNet(config).eval()), ids, window=6, sinks=(0,), random=1)


@pytest.mark.parametrize(
    ("function", "name", "published"),
    [
        (sinks, "epsilon", 0.3),
        (sinks, "token", 0),
        (sink_levels, "threshold", 0.9),
        (sink_levels, "candidates", 3),
        (sink_levels, "short", 4 / 48),
        (sink_levels, "long", 33 / 48),
        (massive_activations, "least", 100),
        (massive_activations, "ratio", 1000),
        (massive_effect, "least", 100),
        (massive_effect, "ratio", 1000),
        (inactive_heads, "share", 0.12),
        (zeroable, "within", 0.01),
        (zeroable, "score", "relative_norm"),
        (tagging, "more", 0.5),
        (untag, "more", 0.5),
        (overfocus, "threshold", 2),
        (overfocus_loss, "threshold", 2),
    ],
)
def test_published_constants_are_the_defaults(function, name, published):
    assert inspect.signature(function).parameters[name].default == published


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("blocks", [3, 12, 40])
@pytest.mark.parametrize("last", [False, True])
def test_levels_are_those_of_a_plain_loop(first, blocks, last):
    """The published steps, one after the other, on a stream whose primary sink ends before the last block or with it."""
    generator = torch.Generator().manual_seed(first + blocks)
    stream = torch.randn(blocks + 1, 14, 48, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(48, generator=generator), dim=0)
    lives = blocks - 1 - (not last)
    planted = {first: (1, lives), 7: (1 + lives // 3, max(1, lives // 2)), 11: (lives, 1)}
    for position, (start, lifetime) in planted.items():
        stream[1 + start : 1 + start + lifetime, position] += (400 if position == first else 150) * direction
    outputs = stream[1:]
    norms = outputs[:, :3].norm(dim=-1)
    primary = int(norms.mean(0).argmax())
    assert primary == first
    steps = norms[1:, primary] - norms[:-1, primary]
    begin = int(steps.argmax()) + 1
    end = blocks if last else int(steps[begin:].argmin()) + begin + 1
    levels = {}
    for position in range(14):
        alive = [
            layer
            for layer in range(begin, end)
            if abs(float(torch.cosine_similarity(outputs[layer, position], outputs[layer, primary], dim=0))) > 0.9
        ]
        if alive:
            levels[position] = (alive[0], len(alive))
    assert levels == planted
    table = sink_levels(stream).frame()
    assert list(table.columns) == ["position", "start", "lifetime", "kind"]
    found = {row.position: (row.start, row.lifetime) for row in table.itertuples()}
    assert found == levels
    for row in table.itertuples():
        is_primary = row.position == first or row.lifetime >= 33 / 48 * blocks
        assert row.kind == ("primary" if is_primary else "secondary" if row.lifetime > 4 / 48 * blocks else "other")


def test_shares_are_the_published_formula_with_grouped_heads_and_padding():
    """alpha_k = sum_{i >= k} A[i, k] / (T - k) of every text by itself, on a model whose heads share keys."""
    torch.manual_seed(1)
    config = NativeConfig(layers=2, heads=4, kv_heads=2, width=16, head_width=8, vocab=32)
    model = NativeModel(NativeNet(config).double().eval().requires_grad_(False))
    ids = torch.randint(3, 32, (2, 13), generator=torch.Generator().manual_seed(2))
    mask = torch.arange(13) >= torch.tensor([[0], [4]])
    run = model.run({"input_ids": ids, "attention_mask": mask}, maps=wb.capture())
    found = sinks(run, epsilon=0.2)
    texts = [[run.maps[layer].dense()[b, :, s:, s:] for b, s in enumerate((0, 4))] for layer in range(2)]
    alphas = torch.stack([torch.stack([a[:, :, 0].mean(1) for a in layer]) for layer in texts])
    assert found.sink_score == pytest.approx(float((alphas > 0.2).double().mean()))
    assert found.f_attn == pytest.approx(float(alphas.mean()))
    table = found.frame()
    assert list(table.columns)[:5] == ["layer", "head", "key", "token", "share"]
    for layer in range(2):
        part = table[table["layer"] == layer].pivot(index="head", columns="key", values="share").to_numpy().copy()
        for key in range(9):
            want = torch.stack([a[:, key:, key].mean(1) for a in texts[layer]]).mean(0)
            torch.testing.assert_close(torch.from_numpy(part[:, key]), want)
