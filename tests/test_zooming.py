"""Views of maps: every cell is what the dense weights say, from afar and near by, with keys taken out, in groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from workbench import zooming
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import GatedMap
from workbench.patterns.softmax import SoftmaxMap


def made(queries, keys=None, heads=4, groups=2, seed=0, causal=True):
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(1, heads, queries, 8, generator=generator)
    k = 2 * torch.randn(1, groups, keys or queries, 8, generator=generator)
    return SoftmaxMap(q, k, mask=Mask(causal=causal))


def expected(amap, heads, view, size, way="mass", hide=(), renormalise=False):
    """Cells of the view, one after the other, from the dense weights in float64; NaN where no query sees a key."""
    weights = amap.dense()[0, list(heads)].double().mean(0)
    mask = getattr(amap, "raw", amap).mask
    left = 1 - weights[:, list(hide)].sum(1)
    weights = weights.clone()
    weights[:, list(hide)] = 0
    (q0, q1), (k0, k1) = view
    rows = []
    for a in range(q0, q1, size):
        row = []
        for b in range(k0, k1, size):
            part = weights[a : min(a + size, q1), b : min(b + size, k1)]
            last = min(a + size, q1) - 1 + amap.offset
            value = part.max() if way == "max" else part.sum() / len(part)
            if renormalise:
                value = value / left[a : min(a + size, q1)].mean().clamp(min=1e-12)
            row.append(float("nan") if mask.causal and b > last else float(value))
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def agrees(found, amap, heads, **options):
    wanted = expected(amap, heads, (found.queries, found.keys), found.size, **options)
    assert torch.equal(found.values.isnan(), wanted.isnan())
    assert torch.allclose(found.values.nan_to_num().double(), wanted.nan_to_num(), atol=2e-6, rtol=2e-5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_view_is_what_the_dense_weights_say(data):
    draw = data.draw
    queries = draw(st.integers(1, 70))
    keys = queries + draw(st.integers(0, 20)) * draw(st.booleans())
    amap = made(queries, keys, causal=draw(st.booleans()), seed=draw(st.integers(0, 99)))
    stored = draw(st.sampled_from([None, 2, 4, 8]))
    if stored:
        amap.blocks(stored, "sum"), amap.blocks(stored, "max")
    q0, k0 = draw(st.integers(0, queries - 1)), draw(st.integers(0, keys - 1))
    view = (q0, draw(st.integers(q0 + 1, queries))), (k0, draw(st.integers(k0 + 1, keys)))
    heads = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4, unique=True))
    way, hide = draw(st.sampled_from(zooming.WAYS)), draw(st.lists(st.integers(0, keys - 1), max_size=2, unique=True))
    renormalise = draw(st.booleans()) and way == "mass"
    cells = draw(st.integers(2, 80))
    options = {"way": way, "hide": tuple(hide), "renormalise": renormalise}
    found = wb.zoom(amap, heads, *view, cells=cells, **options)
    assert found.queries[0] <= view[0][0] < view[0][1] <= found.queries[1]
    assert found.keys[0] <= view[1][0] < view[1][1] <= found.keys[1]
    assert max(found.values.shape) <= cells + 1
    if way == "max" and len(heads) > 1 and found.size > 1:
        return  # the mean of maxima of stored blocks and the maximum of means differ, as the docstring says
    agrees(found, amap, heads, **options)


def test_a_large_view_comes_from_stored_blocks_and_is_refused_without(monkeypatch):
    monkeypatch.setattr(zooming, "EXACT", 400)
    amap = made(50)
    with pytest.raises(Refused, match="a view of 2,500 weights is more than the 400.*capture with blocks"):
        wb.zoom(amap, 1)
    amap.blocks(4, "sum"), amap.blocks(4, "max")
    for hide in ((), (0,), (0, 7)):
        found = wb.zoom(amap, 1, cells=7, hide=hide)
        assert not found.exact
        assert found.size == 8
        agrees(found, amap, [1], hide=hide)
        agrees(wb.zoom(amap, 1, cells=7, hide=hide, way="max"), amap, [1], hide=hide, way="max")
    small = wb.zoom(amap, 1, (10, 20), (5, 15))
    assert small.exact
    agrees(small, amap, [1])


def test_gated_maps_and_the_raw_ones_inside(monkeypatch):
    monkeypatch.setattr(zooming, "EXACT", 100)
    gated = GatedMap(made(40), torch.rand(1, 4, 40, generator=torch.Generator().manual_seed(1)))
    for amap in (gated, gated.raw):
        amap.blocks(4, "sum"), amap.blocks(4, "max")
        agrees(wb.zoom(amap, 2, cells=10), amap, [2])


def test_rows_and_columns():
    amap = made(33)
    dense = amap.dense()[0]
    assert torch.allclose(zooming.row(amap, 3, 20), dense[3, 20], atol=1e-6)
    assert torch.allclose(zooming.column(amap, [0, 1], 5), dense[:2, :, 5].mean(0), atol=1e-6)


def test_frame_plot_and_save(tmp_path):
    amap = made(6)
    found = wb.zoom(amap, 0)
    frame = found.frame()
    assert len(frame) == 21
    dense = amap.dense()[0, 0]
    assert all(abs(row.value - float(dense[row.query, row.key])) < 1e-6 for row in frame.itertuples())
    assert found.plot().images
    assert wb.load_result(found.save(tmp_path / "view")).type == "Zoom"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"heads": 4}, "no head '4'"),
        ({"heads": []}, "at least one head"),
        ({"queries": (3, 3)}, "queries of a view are a part of 0 .. 9; got 3 .. 3"),
        ({"keys": (0, 10)}, "keys of a view"),
        ({"way": "sum"}, "no way to fill a cell 'sum'; known: mass, max"),
        ({"hide": (9,)}, "no key '9'"),
    ],
)
def test_what_is_not_there_is_refused(call, said):
    with pytest.raises(WorkbenchError, match=said) as raised:
        wb.zoom(made(9), **{"heads": 0, **call})
    assert isinstance(raised.value, UnknownName) or "no " not in said
