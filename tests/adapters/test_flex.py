"""FlexAttention: its own output, and maps against dense softmax and autograd."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

import workbench as wb
from workbench.adapters.flex import ScoreModMap, from_flex
from workbench.adapters.flex_masks import mask_from_mod, to_mask_mod
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.patterns.softmax import SoftmaxMap

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def tensors(
    q: int = 37, k: int = 37, heads: int = 4, groups: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(q)
    shapes = ((2, heads, q, 8), (2, groups, k, 8), (2, groups, k, 6))
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def every_third(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return ((q - k) % 3 == 0) & (k <= q)


def per_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() <= 3 * h + b


def soft_cap(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return 2.0 * torch.tanh(score / 2.0)


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)


def alibi(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score - SLOPES[h] * (q - k).abs()


def dense(q: Tensor, k: Tensor, score_mod, mask_mod, scale: float | None = None) -> Tensor:
    """Softmax of all scores with index tensors that broadcast."""
    b, h, n, m = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    s = q @ k.repeat_interleave(h // k.shape[1], 1).transpose(-1, -2) * (q.shape[3] ** -0.5 if scale is None else scale)
    at = (
        torch.arange(b)[:, None, None, None], torch.arange(h)[:, None, None], torch.arange(n)[:, None], torch.arange(m),
    )  # fmt: skip
    s = s if score_mod is None else score_mod(s, *at)
    if mask_mod is not None:
        s = s.masked_fill(~mask_mod(*at), float("-inf"))
    return s.softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize(
    ("score_mod", "mask_mod"),
    [(None, None), (None, every_third), (None, per_head), (soft_cap, None), (soft_cap, causal), (alibi, per_head)],
)
def test_output_is_flexattentions_and_map_is_exact(score_mod, mask_mod) -> None:
    q, k, v = tensors()
    block_mask = (
        None if mask_mod is None else flex.create_block_mask(mask_mod, 2, 4, 37, 37, device="cpu", BLOCK_SIZE=16)
    )
    out, amap = from_flex(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=True, scale=0.3)
    own = flex.flex_attention(q, k, v, score_mod=score_mod, block_mask=block_mask, enable_gqa=True, scale=0.3)
    assert torch.equal(out, own)
    assert isinstance(amap, ScoreModMap if score_mod else SoftmaxMap)
    want = dense(q, k, score_mod, mask_mod, 0.3)
    torch.testing.assert_close(amap.dense(), want, atol=1e-10, rtol=0)
    torch.testing.assert_close(amap.matvec(v), out, atol=1e-10, rtol=0)
    torch.testing.assert_close(amap.tile(slice(5, 20), slice(3, 31)), want[:, :, 5:20, 3:31], atol=1e-10, rtol=0)
    torch.testing.assert_close(amap.received(), want.sum(2), atol=1e-10, rtol=0)
    torch.testing.assert_close(amap.entropy(), torch.special.entr(want).sum(-1), atol=1e-10, rtol=0)
    torch.testing.assert_close(amap.heads([3, 1]).dense(), want[:, [3, 1]], atol=1e-10, rtol=0)
    assert amap.row_sum == "1"


def test_map_is_what_unit_values_give() -> None:
    """FlexAttention has no backward on a CPU; it is linear in its values."""
    q, k, _ = tensors(q=9, k=9, groups=4)
    units = torch.eye(9, dtype=torch.float64).expand(2, 4, 9, 9).contiguous()
    out, amap = from_flex(q, k, units, score_mod=alibi, mask_mod=every_third)
    torch.testing.assert_close(amap.dense(), out, atol=1e-12, rtol=0)


def test_a_row_that_sees_nothing_is_zero() -> None:
    q, k, v = tensors(groups=4)
    out, amap = from_flex(q, k, v, mask_mod=lambda b, h, i, j: (j < i) & (i > 1), score_mod=soft_cap)
    assert amap.row_sum == "<=1"
    assert not amap.rows(0, 2).any()
    torch.testing.assert_close(amap.matvec(v), out, atol=1e-10, rtol=0)


def test_workbench_masks_are_known_and_count_queries_from_their_offset() -> None:
    q, k, v = tensors(q=5, k=37)
    mask = Mask(causal=True, window=9, prefix=2, offset=32)
    out, amap = from_flex(q, k, v, mask_mod=to_mask_mod(mask), enable_gqa=True)
    assert isinstance(amap, SoftmaxMap)
    assert amap.mask is mask
    assert amap.offset == 32
    torch.testing.assert_close(amap.matvec(v), out, atol=1e-10, rtol=0)


def test_blocks_of_two_sides_and_whole_blocks_only() -> None:
    q, k, v = tensors(q=64, k=64, groups=4)
    mod = lambda b, h, i, j: (i // 16 + j // 8) % 2 == 0  # noqa: E731
    block_mask = flex.create_block_mask(mod, None, None, 64, 64, device="cpu", BLOCK_SIZE=(16, 8))
    out, amap = from_flex(q, k, v, block_mask=block_mask)
    assert isinstance(amap, SoftmaxMap)
    assert amap.mask.side == 8
    assert amap.scores.bias is None
    torch.testing.assert_close(amap.matvec(v), out, atol=1e-10, rtol=0)
    torch.testing.assert_close(amap.dense(), dense(q, k, None, mod), atol=1e-10, rtol=0)


def test_blocks_without_a_mod_are_refused_where_flexattention_ignores_them() -> None:
    q, k, v = tensors(q=64, k=64, groups=4)
    counts, order = (
        torch.ones(1, 1, 4, dtype=torch.int32),
        torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4).contiguous(),
    )
    lonely = flex.BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=16)
    with pytest.raises(Refused, match="mask_mod alone"):
        from_flex(q, k, v, block_mask=lonely)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrower_types(dtype: torch.dtype) -> None:
    q, k, v = tensors(groups=4, dtype=dtype)
    out, amap = from_flex(q, k, v, mask_mod=causal)
    assert out.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(amap.matvec(v), out, atol=tolerance, rtol=tolerance)


def _base_two(*args, **options):
    out, aux = flex.flex_attention(*args, **options)
    return out, aux._replace(lse=aux.lse / torch.log(torch.tensor(2.0)))


def _without_lse(*args, return_aux=None, **options):
    if return_aux is not None:
        raise NotImplementedError("`return_lse` is not supported yet")
    return flex.flex_attention(*args, **options)


@pytest.mark.parametrize("score_mod", [None, soft_cap])
def test_a_log_sum_exp_in_base_two_is_found_and_replaced(score_mod) -> None:
    q, k, v = tensors(groups=4)
    with pytest.warns(UserWarning, match="base 2"):
        out, amap = from_flex(q, k, v, mask_mod=causal, score_mod=score_mod, attention=_base_two)
    torch.testing.assert_close(amap.matvec(v), out, atol=1e-10, rtol=0)
    out, amap = from_flex(q, k, v, mask_mod=causal, score_mod=score_mod, attention=_without_lse)
    torch.testing.assert_close(amap.matvec(v), out, atol=1e-10, rtol=0)


def test_an_output_that_the_mods_do_not_explain_is_refused() -> None:
    q, k, v = tensors(groups=4)
    with pytest.raises(Refused, match="away from"):
        from_flex(q, k, v, attention=lambda *args, **options: flex.flex_attention(args[0] * 2, *args[1:], **options))


def test_wrong_arguments_say_what_was_wanted() -> None:
    q, k, v = tensors()
    with pytest.raises(WorkbenchError, match="enable_gqa"):
        from_flex(q, k, v)
    with pytest.raises(WorkbenchError, match="share batch"):
        from_flex(q, k, v[:, :, 1:])
    with pytest.raises(WorkbenchError, match="v is a tensor"):
        from_flex(q, k, v[0])
    block_mask = flex.create_block_mask(causal, None, None, 37, 37, device="cpu")
    with pytest.raises(WorkbenchError, match="block_mask or a mask_mod"):
        from_flex(q, k, v, block_mask=block_mask, mask_mod=causal)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled() -> None:
    q, k, v = tensors(q=64, k=64, groups=4, dtype=torch.float32)
    compiled = torch.compile(flex.flex_attention)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out, amap = from_flex(q, k, v, mask_mod=every_third, attention=compiled)
    torch.testing.assert_close(amap.matvec(v), out, atol=1e-5, rtol=1e-5)


GENERATOR = torch.Generator().manual_seed(0)
MASKS = {
    "full": Mask(),
    "causal": Mask(causal=True),
    "window": Mask(causal=True, window=7),
    "near": Mask(window=4),
    "prefix": Mask(causal=True, prefix=5),
    "window and prefix": Mask(causal=True, window=6, prefix=3),
    "decoding": Mask(causal=True, window=11, offset=10),
    "documents": Mask(causal=True, documents=torch.arange(40)[None] // 9),
    "keys": Mask(keys=torch.rand(2, 40, generator=GENERATOR) > 0.3),
    "queries": Mask(causal=True, queries=torch.rand(1, 30, generator=GENERATOR) > 0.3),
    "dense": Mask(dense=torch.rand(2, 1, 30, 40, generator=GENERATOR) > 0.5),
    "blocks": Mask(blocks=torch.rand(1, 3, 4, 5, generator=GENERATOR) > 0.5, side=8),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_go_there_and_back(name: str) -> None:
    mask = MASKS[name]
    want = mask.tile(slice(0, 30), slice(0, 40))
    want = torch.ones(2, 3, 30, 40, dtype=torch.bool) if want is None else want.expand(2, 3, 30, 40)
    mod = to_mask_mod(mask)
    assert mask_from_mod(mod, 30, 40, offset=mask.offset) is mask
    plain = lambda b, h, i, j: mod(b, h, i, j)  # noqa: E731
    found = mask_from_mod(plain, 30, 40, batch=2, heads=3, offset=mask.offset, side=8)
    tile = found.tile(slice(0, 30), slice(0, 40))
    assert torch.equal(torch.ones_like(want) if tile is None else tile.expand_as(want), want)
    described = name not in ("documents", "keys", "queries", "dense")
    assert (found.dense is None) == described
    assert flex.create_block_mask(mod, 2, 3, 30, 40, device="cpu", BLOCK_SIZE=8).shape == (2, 3, 30, 40)


def test_mods_of_the_workbench_become_masks() -> None:
    assert mask_from_mod(wb.mods.causal(), 50, 50).causal
    assert mask_from_mod(wb.mods.window(5), 50, 50).window == 5
    ids = torch.arange(50) // 12
    tile = mask_from_mod(wb.mods.document(ids), 50, 50).tile(slice(0, 50), slice(0, 50))
    assert tile is not None
    assert torch.equal(tile[0, 0], ids[:, None] == ids)


def test_long_masks_are_described_or_refused() -> None:
    assert mask_from_mod(causal, 9000, 9000).causal
    with pytest.raises(Refused, match="from_flex"):
        mask_from_mod(every_third, 9000, 9000)
    with pytest.raises(WorkbenchError, match="at least one query"):
        mask_from_mod(causal, 0, 4)
