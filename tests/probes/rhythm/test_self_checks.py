"""WAAD and FAI as someone from outside would try them: wrong kinds of maps, texts of one token, padding on either side."""

import inspect

import pytest
import torch

from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.models.protocol import Tokens
from workbench.patterns.softmax import SoftmaxMap
from workbench.probes.examples import random_rows
from workbench.probes.rhythm import spans
from workbench.probes.rhythm.receivers import receiver_heads
from workbench.probes.rhythm.rhythm import couplings, rhythm
from workbench.probes.rhythm.waad import fai, waad
from workbench.probes.similarity.rank import effective_rank, rank_bounds
from workbench.probes.structure.block_selection import selection_curves
from workbench.run import Maps, Provenance, Run

ROWS = random_rows(1, 2, 6)
MAP = AttentionMap.from_dense(ROWS)


def padded_run(text, pad, side):
    """Three layers of softmax maps over a text of random queries and keys, with ``pad`` columns of rubbish beside it."""
    generator = torch.Generator().manual_seed(3)
    real = torch.randn(3, 2, 1, 4, text, 8, generator=generator, dtype=torch.float64)
    rubbish = torch.randn(3, 2, 1, 4, pad, 8, generator=generator, dtype=torch.float64)
    both = torch.cat([rubbish, real] if side == "left" else [real, rubbish], 4)
    place = torch.arange(text + pad)
    mask = ((place >= pad) if side == "left" else (place < text))[None]
    maps = {layer: SoftmaxMap(2 * q, k, mask=Mask(causal=True, keys=mask)) for layer, (q, k) in enumerate(both)}
    return Run(Tokens(torch.zeros_like(mask, dtype=torch.long), mask), maps=Maps(maps), provenance=Provenance("random"))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_leaves_a_text_its_rhythm(side):
    text, pad = 37, 14
    alone, beside = rhythm(padded_run(text, 0, side)), rhythm(padded_run(text, pad, side))
    columns = slice(pad, None) if side == "left" else slice(0, text)
    assert (alone.local, alone.over) == (beside.local, beside.over)
    for name, values in alone.values.items():
        torch.testing.assert_close(beside.values[name][:, columns], values, equal_nan=True, msg=name)


def test_queries_of_padding_are_no_later_tokens():
    amap = padded_run(20, 9, "right").maps[0]
    alone = padded_run(20, 0, "right").maps[0]
    torch.testing.assert_close(fai(amap, (3, 8))[..., :20], fai(alone, (3, 8)), equal_nan=True)
    assert bool(fai(amap, (3, 8))[..., 17:].isnan().all())


def test_what_is_no_single_map_is_told():
    calls = (waad, fai, effective_rank, rank_bounds, lambda x: selection_curves(x, {}, 2))
    wrong = (ROWS, ROWS.numpy(), ROWS.tolist(), None, "text", 3, [], {}, [MAP, MAP], {"a": MAP, "b": MAP})
    for call in calls:
        for source in wrong:
            with pytest.raises(WorkbenchError):
                call(source)
    with pytest.raises(WorkbenchError, match=r"layers a, b: choose one"):
        waad({"a": MAP, "b": MAP})
    with pytest.raises(WorkbenchError, match=r"a ndarray: torch\.as_tensor"):
        AttentionMap.from_dense(ROWS.numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_short_types_are_summed_in_float64(dtype):
    rows = ROWS.to(dtype)
    place = torch.arange(6, dtype=torch.float64)
    apart = (place[:, None] - place).clamp(0, 2)
    got = waad(AttentionMap.from_dense(rows), 2)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, (rows.double() * apart).sum(-1), atol=1e-6, rtol=0)


def test_a_text_of_one_token():
    one = AttentionMap.from_dense(torch.ones(2, 3, 1, 1))
    assert torch.equal(waad(one), torch.zeros(2, 3, 1, dtype=torch.float64))
    assert fai(one).shape == (2, 3, 1)
    assert bool(fai(one).isnan().all())
    assert torch.equal(effective_rank(one), torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("function", "name", "published"),
    [
        (waad, "window", 10),
        (fai, "clip", (10, 50)),
        (rhythm, "window", 10),
        (rhythm, "clip", (10, 50)),
        (rhythm, "share", 0.3),
        (rhythm, "top", 0.4),
        (couplings, "windows", (1, 2, 3)),
        (spans.local_heads, "share", 0.3),
        (spans.global_heads, "share", 0.3),
        (receiver_heads, "near", 4),
    ],
)
def test_published_constants_are_the_defaults(function, name, published):
    assert inspect.signature(function).parameters[name].default == published
