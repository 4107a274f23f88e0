"""Rollout, flow and their attributed form against closed forms, products, brute force and interventions."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import needles, random_maps, random_rows
from workbench.probes.structure.attributed import attributed_rollout, erased
from workbench.probes.structure.flow import flow, residual_mean
from workbench.probes.structure.rollout import rollout


def product(maps, residual=0.5):
    """The published product, layer by layer."""
    length = maps[0].shape[2]
    total = torch.eye(length, dtype=torch.float64)
    for amap in maps:
        mixed = (1 - residual) * amap.dense().double().mean(1) + residual * torch.eye(length, dtype=torch.float64)
        total = mixed / mixed.sum(-1, keepdim=True) @ total
    return total


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 12), st.sampled_from([0.0, 0.3, 0.5]), st.integers(0, 50))
def test_rollout_is_the_product_of_the_layers(layers, batch, tokens, residual, seed):
    maps = random_maps(layers, batch, 3, tokens, seed=seed)
    torch.testing.assert_close(rollout(maps, residual=residual), product(maps, residual))


def test_one_layer_of_uniform_attention_in_closed_form():
    n = 7
    rows = torch.full((1, 2, n, n), 1 / n, dtype=torch.float64)
    want = torch.full((n, n), 0.5 / n, dtype=torch.float64) + 0.5 * torch.eye(n, dtype=torch.float64)
    torch.testing.assert_close(rollout(AttentionMap.from_dense(rows))[0], want)


def test_rows_sum_to_one_and_rows_without_weight_stay():
    weights = random_rows(1, 2, 9).clone()
    weights[:, :, 4] = 0
    found = rollout([AttentionMap.from_dense(weights, row_sum="<=1")] * 2)
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 9, dtype=torch.float64))
    assert float(found[0, 4, 4]) == 1.0


def test_identity_attention_leads_nowhere():
    eye = AttentionMap.from_dense(torch.eye(5, dtype=torch.float64).expand(1, 1, 5, 5))
    torch.testing.assert_close(rollout([eye] * 3)[0], torch.eye(5, dtype=torch.float64))


def test_some_queries_of_a_long_text_build_no_square():
    n, g = 3000, torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 4, n, 8, generator=g) for _ in range(2))
    maps = [SoftmaxMap(q, k[:, :2], mask=Mask(causal=True)), SoftmaxMap(k, q[:, :1], mask=Mask(causal=True))]
    found = rollout(maps, queries=[-1, 50])
    assert found.shape == (1, 2, n)
    torch.testing.assert_close(found.sum(-1), torch.ones(1, 2, dtype=torch.float64), atol=1e-5, rtol=0)
    assert float(found[0, 1, 51:].abs().max()) == 0
    short = [SoftmaxMap(m.scores.q[:, :, :60], m.scores.k[:, :, :60], mask=Mask(causal=True)) for m in maps]
    torch.testing.assert_close(rollout(short)[0, 50], found[0, 1, :60], atol=1e-6, rtol=1e-4)


def cut(capacity, layers, top, end, length):
    """Minimum cut by trying every set of nodes: what the maximum flow must be."""
    nodes = [(layer, t) for layer in range(layers + 1) for t in range(length)]
    inner = [n for n in nodes if n not in ((0, top), (layers, end))]
    best = float("inf")
    for size in range(len(inner) + 1):
        for chosen in itertools.combinations(inner, size):
            side = {(0, top), *chosen}
            value = sum(
                float(capacity[layer][q, k])
                for layer in range(layers)
                for q in range(length)
                for k in range(length)
                if (layer, q) in side and (layer + 1, k) not in side
            )
            best = min(best, value)
    return best


def test_flow_is_the_minimum_cut():
    maps = random_maps(2, tokens=3, heads=2)
    capacity = [residual_mean(m.dense().mean(1), 0.5)[0] for m in reversed(maps)]
    found = flow(maps).values["flow"][0]
    want = [cut(capacity, 2, 2, end, 3) for end in range(3)]
    assert found.tolist() == pytest.approx(want, abs=1e-6)


def test_flow_through_a_bottleneck():
    """Query 3 looks at token 1 alone, which looks at token 0 with a quarter of its weight."""
    first = torch.eye(4, dtype=torch.float64)
    first[1, 1], first[1, 0] = 0.75, 0.25
    second = torch.eye(4, dtype=torch.float64)
    second[3, 3], second[3, 1] = 0.0, 1.0
    maps = [AttentionMap.from_dense(m[None, None]) for m in (first, second)]
    found = flow(maps, residual=0.0)
    assert found.values["flow"][0].tolist() == pytest.approx([0.25, 0.75, 0, 0], abs=1e-6)
    assert found.values["rollout"][0].tolist() == pytest.approx([0.25, 0.75, 0, 0])


def test_what_cannot_be_followed_is_refused():
    signed = AttentionMap.from_dense(torch.randn(1, 1, 4, 4).tril(), sign="signed")
    for call in (rollout, flow):
        with pytest.raises(Refused, match="signed"):
            call(signed)
        with pytest.raises(WorkbenchError, match="one set of tokens"):
            call([*random_maps(1, tokens=4), *random_maps(1, tokens=5)])
        with pytest.raises(WorkbenchError, match=r"in \[0, 1\)"):
            call(random_maps(), residual=1.0)
    with pytest.raises(WorkbenchError, match="positions below 12"):
        rollout(random_maps(), queries=[12])
    with pytest.raises(WorkbenchError, match="position below 12"):
        flow(random_maps(), 12)


def test_attributed_rollout_finds_the_value_of_the_needle_and_random_logits_do_not():
    model = wb.load("tiny-softmax")
    pairs = needles(model, length=64, n=6)
    found = attributed_rollout(model, pairs)
    parts = []
    for values in (found.values["relevance"], found.null["relevance"]):
        spans = pairs.spans["VALUE"]
        inside = torch.stack([values[b, lo:hi].sum() for b, (lo, hi) in enumerate(spans.tolist())])
        parts.append(float((inside / values.sum(1)).mean()))
    assert parts[0] > 0.3
    assert parts[0] > parts[1]
    effects = erased(model, pairs, found.values["relevance"], 3, random=3)
    assert effects["relevant"] > 2 * effects["random"]


def test_attributed_rollout_is_what_gradients_by_differences_say():
    """One layer: the relevance of key k is the mean over heads of max(0, A dm/dA), here with dm/dA by central differences."""
    from workbench.models.native import NativeModel
    from workbench.models.native_net import NativeConfig, NativeNet
    from workbench.pairs import Pairs, logit_difference

    torch.manual_seed(0)
    config = NativeConfig(layers=1, heads=2, width=8, head_width=4, vocab=9, mlp_width=8)
    model = NativeModel(NativeNet(config).double().eval(), name="one")
    clean = torch.tensor([[1, 4, 2, 7, 3]])
    pairs = Pairs(clean, clean, torch.tensor([[5]]), torch.tensor([[6]]), torch.tensor([4]))
    found = attributed_rollout(model, pairs).values["relevance"][0]
    pattern = model.run(clean, read=["blocks.0.attn.hook_pattern"]).acts["blocks.0.attn.hook_pattern"].detach()
    want = torch.zeros(5, dtype=torch.float64)
    for h in range(2):
        for k in range(5):
            sides = []
            for step in (1e-5, -1e-5):
                moved = pattern.clone()
                moved[0, h, 4, k] += step
                with torch.no_grad():
                    sides.append(
                        float(
                            logit_difference(model.run(clean, edit={"blocks.0.attn.hook_pattern": moved}).logits, pairs)
                        )
                    )
            slope = (sides[0] - sides[1]) / 2e-5
            want[k] += max(0.0, float(pattern[0, h, 4, k]) * slope) / 2
    torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-3)
