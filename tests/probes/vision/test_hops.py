"""Attention strength by hops, against planted heads, loops and closed forms."""

import pytest
import torch
from vision_nets import by_hops, llava, vision

import workbench as wb
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import random_rows
from workbench.probes.vision.grid import Grid, grid_of
from workbench.probes.vision.hops import hops
from workbench.probes.vision.on_patches import image_mods


def literal(rows, grid):
    """S_k, class and others of one head, one patch at a time."""
    found = [0.0] * (max(grid.rows, grid.cols) + 2)
    index = grid.index.tolist()
    for p, (a, b) in enumerate(grid.places.tolist()):
        for key in range(rows.shape[1]):
            value = float(rows[index[p], key]) / grid.patches
            if key in index:
                c, d = divmod(index.index(key), grid.cols)
                found[max(abs(a - c), abs(b - d))] += value
            elif key == grid.cls:
                found[-2] += value
            else:
                found[-1] += value
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_ring_head_is_strongest_exactly_at_its_ring(k):
    grid = Grid(9, 9)
    found = hops(AttentionMap.from_dense(by_hops(9, 9, k)[None, None]), grid)
    assert int(found.strength[0][0].argmax()) == k
    torch.testing.assert_close(found.strength[0][0, k], torch.tensor(1.0, dtype=torch.float64))
    assert found.ring(0, 0) == k
    assert (found.reach[0] - k).abs().max() < 1e-12


def test_identity_has_all_its_strength_at_zero_hops():
    found = hops(AttentionMap.from_dense(torch.eye(12, dtype=torch.float64)[None, None]), Grid(3, 4))
    assert found.strength[0][0].tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "grid", [Grid(3, 4, start=2, cls=0, others=(1,), tokens=14), Grid(3, 3, start=1, step=4), Grid(2, 5, tokens=10)]
)
def test_it_is_the_literal_sum(grid):
    tokens = grid.tokens or 16
    rows = random_rows(2, 3, tokens, causal=False)
    found = hops(AttentionMap.from_dense(rows), grid)
    for head in range(3):
        wanted = torch.stack([literal(rows[b, head], grid) for b in range(2)]).mean(0)
        torch.testing.assert_close(found.strength[0][head], wanted, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(found.strength[0].sum(1), torch.ones(3, dtype=torch.float64))
    uniform = torch.full((tokens, tokens), 1 / tokens, dtype=torch.float64)
    torch.testing.assert_close(found.uniform[0][0], literal(uniform, grid), atol=1e-12, rtol=1e-12)


def test_even_attention_is_its_own_null_and_has_a_closed_form():
    n = 6
    amap = AttentionMap.from_dense(torch.full((1, 1, n * n, n * n), 1 / n**2, dtype=torch.float64))
    found = hops(amap, Grid(n, n))
    torch.testing.assert_close(found.strength[0], found.uniform[0])
    at = torch.arange(n, dtype=torch.float64)
    within = torch.tensor([((at[:, None] - at).abs() <= k).sum() for k in range(-1, n)], dtype=torch.float64)
    torch.testing.assert_close(found.strength[0][0, :n], (within[1:] ** 2 - within[:-1] ** 2) / n**4)


def test_one_query_gives_its_own_row():
    grid = Grid(4, 4)
    rows = random_rows(1, 1, 16, causal=False)
    one = hops(AttentionMap.from_dense(rows), grid, queries=[5]).strength[0][0]
    ring = (grid.places - grid.places[5]).abs().amax(1)
    wanted = torch.stack([rows[0, 0, 5][ring == k].sum() for k in range(4)])
    torch.testing.assert_close(one[:4], wanted)
    each = torch.stack([hops(AttentionMap.from_dense(rows), grid, queries=[p]).strength[0] for p in range(16)])
    torch.testing.assert_close(each.mean(0), hops(AttentionMap.from_dense(rows), grid).strength[0])


def test_fused_maps_and_summaries_answer_as_dense_ones():
    grid = Grid(5, 4, (2, 3), start=1, cls=0, tokens=21)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 21, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    fused = SoftmaxMap(q, k, mask=Mask())
    dense = hops(AttentionMap.from_dense(fused.dense()), grid)
    summary = SoftmaxMap(q, k, mask=Mask()).precompute(wb.capture(mass=image_mods(grid), keep=False))
    for other in (hops(fused, grid), hops(summary, grid)):
        for name in ("strength", "uniform", "reach", "low", "high"):
            torch.testing.assert_close(getattr(other, name)[0], getattr(dense, name)[0], atol=1e-5, rtol=1e-5)
    assert "from_class" in hops(summary, grid).undefined
    with pytest.raises(WorkbenchError, match="hop 0"):
        hops(SoftmaxMap(q, k, mask=Mask()).precompute(wb.capture(stats=("received",), keep=False)), grid)


def test_an_image_inside_of_a_causal_text_has_a_causal_null():
    grid = Grid(2, 2, start=1)
    rows = torch.tril(torch.ones(6, 6, dtype=torch.float64))
    rows = rows / rows.sum(1, keepdim=True)
    found = hops(AttentionMap.from_dense(rows[None, None]), grid)
    torch.testing.assert_close(found.strength[0], found.uniform[0])
    assert found.strength[0][0, -1] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4)


def test_the_gate_acts_unless_asked_for_what_is_inside():
    rows = random_rows(1, 2, 9, causal=False)
    gate = torch.full((1, 2, 9), 0.25, dtype=torch.float64)
    amap = GatedMap(AttentionMap.from_dense(rows), gate)
    whole, inside = hops(amap, Grid(3, 3)), hops(amap, Grid(3, 3), raw=True)
    torch.testing.assert_close(whole.strength[0], inside.strength[0] / 4)
    torch.testing.assert_close(whole.uniform[0], inside.uniform[0] / 4)


def test_batches_are_means_of_their_images():
    rows = random_rows(3, 2, 9, causal=False)
    both = hops(AttentionMap.from_dense(rows), Grid(3, 3))
    each = torch.stack([hops(AttentionMap.from_dense(row[None]), Grid(3, 3)).strength[0] for row in rows])
    torch.testing.assert_close(both.strength[0], each.mean(0))
    assert (both.low[0] <= both.strength[0]).all()
    assert (both.strength[0] <= both.high[0]).all()


def test_what_has_no_answer_is_refused():
    grid = Grid(3, 3)
    with pytest.raises(Refused, match="signed"):
        hops(AttentionMap.from_dense(torch.randn(1, 1, 9, 9)), grid)
    with pytest.raises(Refused, match="square"):
        hops(AttentionMap.from_dense(torch.ones(1, 1, 2, 9) / 9), grid)
    with pytest.raises(WorkbenchError, match="10 tokens"):
        hops(AttentionMap.from_dense(torch.ones(1, 1, 10, 10) / 10), Grid(3, 3, tokens=9))
    with pytest.raises(WorkbenchError, match="queries are patches"):
        hops(AttentionMap.from_dense(torch.ones(1, 1, 9, 9) / 9), grid, queries=[9])


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov2-registers", "clip", "siglip"])
def test_image_encoders_are_answered_and_add_up(name):
    model, inputs, layers = vision(name)
    grid = grid_of(model)
    with torch.no_grad():
        run = model.run(inputs, maps=wb.capture())
    found = hops(run, grid)
    assert tuple(found.strength) == layers
    for layer in layers:
        torch.testing.assert_close(found.strength[layer].sum(1), torch.ones(4, dtype=torch.float64), atol=1e-6, rtol=0)
        assert (layer in found.from_class) == (grid.cls is not None)
    table = found.frame()
    assert set(table["query"]) == ({"patches", "class"} if grid.cls is not None else {"patches"})


def test_image_tokens_of_a_text_are_answered():
    model, inputs = llava()
    with torch.no_grad():
        run = model.run(inputs, maps=wb.capture())
    found = hops(run, grid_of(model, inputs))
    assert tuple(found.strength) == ("text.0", "text.1")
    assert tuple(hops(run, grid_of(model, inputs, stack="vision")).strength) == ("vision.0", "vision.1")
    dense = run.maps["text.0"].dense()[0, 0]
    torch.testing.assert_close(found.strength["text.0"][0], literal(dense, grid_of(model, inputs)), atol=1e-6, rtol=0)
