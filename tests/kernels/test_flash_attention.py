import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.kernels.flash import triton as fused
from workbench.kernels.flash.cpu import blocked_flash
from workbench.kernels.flash_attention import REDUCTIONS, FlashAttention, flash_attention
from workbench.kernels.mask import Mask
from workbench.kernels.pairs import chunks
from workbench.kernels.pairs import tiles as visits
from workbench.kernels.scores import Relative, Scores
from workbench.kernels.tiles import Cells

LENGTHS = (1, 63, 100, 257)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Budget = Callable[[Tensor, Sequence[Tensor], Tensor], None]


def pieces(found: FlashAttention) -> dict[str, Tensor]:
    return {"output": found.output, "lse": found.lse} | {
        f"blocks {name}": value for name, value in found.blocks.items()
    }


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    queries, offset = draw(st.sampled_from(LENGTHS)), draw(st.sampled_from((0, 0, 5)))
    keys = draw(st.sampled_from((queries, queries + offset, 40)))
    b, kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    h, e = kv * group, draw(st.sampled_from((4, 16)))

    def maybe(make: Callable[[], Any]) -> Any:
        return make() if draw(st.booleans()) else None

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    side = draw(st.sampled_from((None, 8, 24, 300)))
    spread = draw(st.sampled_from(((1, 1), (b, h))))
    mask = Mask(
        causal=draw(st.booleans()),
        window=draw(st.none() | st.sampled_from((1, 7, 64))),
        prefix=draw(st.sampled_from((0, 0, 3))),
        offset=offset,
        keys=maybe(lambda: rand(b, keys) > -0.5),
        documents=maybe(lambda: (torch.arange(keys) // 11)[None]) if offset + queries <= keys else None,
        queries=maybe(lambda: rand(b, queries) > -0.8),
        dense=maybe(lambda: rand(1, h, queries, keys) > -1),
        blocks=None if side is None else rand(*spread, -(-queries // side), -(-keys // side)) > 0,
        side=side,
    )
    bias = maybe(lambda: rand(1, h, queries, keys))
    if bias is not None:
        table, kind = bias, draw(st.integers(0, 2))
        if kind == 1:
            bias = Relative(rand(h, queries + keys + offset), -queries - offset)
        elif kind == 2:

            def bias(lo: int, hi: int) -> Tensor:
                return table[:, :, lo:hi]

    return {
        "q": 2 * rand(b, h, queries, e),
        "k": 2 * rand(b, kv, keys, e),
        "v": rand(b, kv, keys, draw(st.sampled_from((3, 16)))),
        "mask": mask,
        "softcap": draw(st.none() | st.just(3.0)),
        "sink": maybe(lambda: rand(h)),
        "bias": bias,
        "block": draw(st.sampled_from((None, 1, 7, 24, 64))),
        "reduce": REDUCTIONS,
    }


@pytest.fixture(params=[2**20, 3000], ids=["one chunk", "many chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(chunks, "CHUNK", request.param)
    return request.param


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(problem=problems())
def test_the_cpu_form_is_the_reference_in_float64(chunk: int, problem: dict[str, Any]) -> None:
    expected = pieces(flash_attention(**problem, impl="reference"))
    got = flash_attention(**problem)
    assert got.impl == "cpu"
    assert set(pieces(got)) == set(expected)
    for name, value in pieces(got).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block_mask(n: int, side: int, heads: int = 2) -> Mask:
    """Lower-triangular, with some blocks missing and the first row of blocks empty."""
    blocks = rand(9, 1, heads, -(-n // side), -(-n // side)) > -0.3
    blocks[:, :, 0] = False
    return Mask(causal=True, blocks=blocks, side=side)


OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "causal": lambda n: {},
    "full": lambda n: {"mask": Mask()},
    "window": lambda n: {"mask": Mask(causal=True, window=7)},
    "wide two-sided window": lambda n: {"mask": Mask(window=90)},
    "prefix": lambda n: {"mask": Mask(causal=True, prefix=70, window=20)},
    "padding": lambda n: {"mask": Mask(causal=True, keys=rand(1, 2, n) > -0.5, queries=rand(7, 2, n) > -0.5)},
    "documents": lambda n: {"mask": Mask(causal=True, documents=(torch.arange(n) // 40)[None])},
    "dense": lambda n: {"mask": Mask(dense=rand(2, 1, 2, n, n) > 0)},
    "blocks": lambda n: {"mask": block_mask(n, 16)},
    "blocks, prefix and window": lambda n: {"mask": replace(block_mask(n, 16), prefix=20, window=30)},
    "blocks as large as tiles": lambda n: {"mask": block_mask(n, 64)},
    "softcap and sink": lambda n: {"softcap": 3.0, "sink": rand(2, 2)},
    "bias": lambda n: {"bias": rand(3, 1, 2, n, n).where(rand(4, 1, 2, n, n) > -1, -1e30)},
    "relative": lambda n: {"bias": Relative(rand(3, 2, 2 * n), -n), "mask": Mask()},
}


def check(
    option: str,
    n: int,
    dtype: torch.dtype,
    impl: str,
    within: Budget,
    *,
    e: int = 16,
    ve: int = 12,
    block: int | None = 24,
) -> None:
    options = {"block": block, "reduce": REDUCTIONS, **OPTIONS[option](n)}
    q, k, v = (
        (scale * rand(i, 2, h, n, w)).to(dtype) for i, h, w, scale in ((5, 2, e, 2), (6, 1, e, 2), (7, 1, ve, 1))
    )
    exact = {name: f.double() if isinstance(f, Tensor) else f for name, f in options.items()}
    high = pieces(flash_attention(q.double(), k.double(), v.double(), **exact, impl="reference"))
    orders = [torch.randperm(e, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    low = [pieces(flash_attention(q[..., o], k[..., o], v, **options, impl="reference")) for o in orders]
    for name, value in pieces(flash_attention(q, k, v, **options, impl=impl)).items():
        assert value.dtype == (dtype if name == "output" else torch.float32)
        within(value, [one[name] for one in low], high[name])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("n", [63, 257])
def test_the_cpu_form_stays_within_the_error_budget(
    n: int, option: str, dtype: torch.dtype, assert_within_budget: Budget
) -> None:
    check(option, n, dtype, "cpu", assert_within_budget)


def test_a_thousand_tokens_stay_within_the_error_budget(assert_within_budget: Budget) -> None:
    check("causal", 1000, torch.float32, "cpu", assert_within_budget, block=100)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_triton_form_stays_within_the_error_budget(option: str, assert_within_budget: Budget) -> None:
    check(option, 100, torch.float32, "triton", assert_within_budget)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("option", ["padding", "blocks as large as tiles", "softcap and sink"])
def test_the_triton_form_in_half_precision(option: str, dtype: torch.dtype, assert_within_budget: Budget) -> None:
    check(option, 150, dtype, "triton", assert_within_budget)


@pytest.mark.parametrize(
    ("n", "block"), [(1, None), (1, 64), (63, 64), (100, 1), (257, None), (257, 64), (257, 100), (257, 200)]
)
def test_the_triton_form_at_any_length_and_block(n: int, block: int | None, assert_within_budget: Budget) -> None:
    check("causal", n, torch.bfloat16, "triton", assert_within_budget, block=block)


@pytest.mark.parametrize(("e", "ve", "block"), [(80, 33, 1), (16, 130, 7)])
def test_the_triton_form_at_odd_widths(e: int, ve: int, block: int, assert_within_budget: Budget) -> None:
    check("causal", 50, torch.float32, "triton", assert_within_budget, e=e, ve=ve, block=block)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_decoding_against_a_cache_of_which_most_was_never_written(impl: str) -> None:
    """One query at position 70 of a cache of 200: keys 71 on are NaN, and so is what left the window."""
    q, k, v = rand(0, 1, 2, 3, 16), rand(1, 1, 1, 200, 16), rand(2, 1, 1, 200, 16)
    asked: dict[str, Any] = {"mask": Mask(causal=True, offset=70, window=40), "block": 24, "reduce": REDUCTIONS}
    expected = pieces(flash_attention(q, k, v, **asked, impl="reference"))
    for tensor in (k, v):
        tensor[:, :, 73:] = float("nan")
        tensor[:, :, :31] = float("nan")
    for name, value in pieces(flash_attention(q, k, v, **asked, impl=impl)).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_what_hidden_keys_and_queries_hold_does_not_matter(impl: str, poison: float) -> None:
    q, k, v = rand(0, 2, 4, 9, 8), rand(1, 2, 2, 9, 8), rand(2, 2, 2, 9, 8)
    real = torch.arange(9) >= torch.tensor([[0], [4]])
    mask = Mask(causal=True, keys=real, queries=real)
    asked: dict[str, Any] = {"mask": mask, "block": 4, "reduce": REDUCTIONS, "impl": impl}
    expected = pieces(flash_attention(q, k, v, **asked))
    q, k, v = (t.masked_fill(~real[:, None, :, None], poison) for t in (q, k, v))
    for name, value in pieces(flash_attention(q, k, v, **asked)).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_rows_that_see_nothing_are_zero(impl: str) -> None:
    q, k = rand(0, 1, 2, 5, 16), rand(1, 1, 2, 5, 16)
    mask = Mask(causal=True, keys=torch.tensor([[False, False, True, True, True]]))
    got = flash_attention(q, k, k, mask=mask, block=2, reduce=REDUCTIONS, impl=impl)
    assert torch.isneginf(got.lse[:, :, :2]).all()
    assert (got.output[:, :, :2] == 0).all()
    assert (got.output[:, :, 2:] != 0).all()
    for value in got.blocks.values():
        assert (value[:, :, 0] == 0).all()
        assert torch.isfinite(value).all()
    sink = torch.tensor([1.5, -2.0])
    got = flash_attention(q, k, k, mask=mask, sink=sink, impl=impl)
    torch.testing.assert_close(got.lse[0, :, 0], sink)
    assert (got.output[:, :, :2] == 0).all()


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_large_scores_keep_their_digits_in_the_maps(impl: str) -> None:
    """Scores of +-60, where a bfloat16 scratch is off by a fifth; sinks far above take everything without overflow."""
    q, k, v = 15 * rand(0, 1, 2, 70, 16), 4 * rand(1, 1, 2, 70, 16), rand(2, 1, 2, 70, 16)
    high = flash_attention(q.double(), k.double(), v.double(), block=7, reduce=REDUCTIONS, impl="reference")
    got = flash_attention(q, k, v, block=7, reduce=REDUCTIONS, impl=impl)
    for name, value in got.blocks.items():
        torch.testing.assert_close(value.double(), high.blocks[name], rtol=1e-3, atol=1e-4)
    got = flash_attention(q, k, v, sink=torch.tensor([5000.0, -5000.0]), block=7, impl=impl)
    assert (got.output[:, 0] == 0).all()
    torch.testing.assert_close(got.blocks["sum"][:, 1].double(), high.blocks["sum"][:, 1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_every_number_against_arithmetic_by_hand(impl: str) -> None:
    scores, values, sink = [[0.3, -9.0, -9.0], [1.0, -0.5, -9.0], [0.2, 0.4, -1.2]], [0.5, -2.0, 3.0], 0.1
    total = [math.exp(sink) + sum(math.exp(x) for x in row[: i + 1]) for i, row in enumerate(scores)]
    p = [[math.exp(scores[i][j]) / total[i] if j <= i else 0.0 for j in range(3)] for i in range(3)]
    got = flash_attention(
        torch.eye(3)[None, None], torch.tensor(scores).T.contiguous()[None, None], torch.tensor(values)[None, None, :, None],
        scale=1.0, sink=torch.tensor([sink]), block=2, reduce=REDUCTIONS, impl=impl,
    )  # fmt: skip

    def same(value: Tensor, wanted: object) -> None:
        torch.testing.assert_close(value[0, 0], torch.tensor(wanted), rtol=1e-6, atol=1e-7)

    same(got.lse, [math.log(t) for t in total])
    same(got.output, [[sum(w * x for w, x in zip(row, values, strict=True))] for row in p])
    corner, below = [p[0][0], p[0][1], p[1][0], p[1][1]], [p[2][0], p[2][1]]
    for name, reduce, size in (("sum", sum, 1), ("abs", sum, 1), ("max", max, 1)):
        same(got.blocks[name], [[reduce(corner) / size, 0.0], [reduce(below) / size, p[2][2]]])
    same(got.blocks["mean"], [[sum(corner) / 4, 0.0], [sum(below) / 2, p[2][2]]])


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_block_sparse_attention_is_dense_attention_under_that_mask_and_returns_the_map_it_executed(impl: str) -> None:
    n, side = 100, 16
    q, k, v = rand(0, 2, 4, n, 16), rand(1, 2, 2, n, 16), rand(2, 2, 2, n, 16)
    mask = block_mask(n, side, heads=4)
    assert mask.blocks is not None
    got = flash_attention(q, k, v, mask=mask, block=side, reduce=("sum",), impl=impl)
    at = torch.arange(n)
    allowed = mask.blocks[:, :, at // side][..., at // side] & (at <= at[:, None])
    heads = [t.repeat_interleave(2, 1) for t in (k, v)]
    weights = (q @ heads[0].mT / 4).masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
    torch.testing.assert_close(got.output, weights @ heads[1], rtol=1e-4, atol=1e-5)
    executed = got.blocks["sum"]
    assert (executed[~mask.blocks.expand_as(executed)] == 0).all()
    rows = allowed.any(-1).float().unflatten(-1, (-1, 4)).sum(-1)  # visible rows in fours, to pool 100 by 16
    whole = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % 4)).unflatten(-1, (-1, 4)).sum(-1)
    torch.testing.assert_close(executed.sum(-1), whole.expand(2, 4, -1), rtol=1e-5, atol=1e-5)
    assert 0 < int(whole.sum()) < 4 * n  # some rows see nothing, most do


class Operations(TorchDispatchMode):
    """Elements of the scores that were multiplied out, and the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplied = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.mm):
            self.multiplied += out.numel() * args[0].shape[-1]
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):  # a broadcast view has many elements and little memory
                steps = zip(value.shape, value.stride(), strict=True)
                self.largest = max(self.largest, math.prod(n for n, step in steps if step != 0))
        return out


def test_the_cpu_form_multiplies_the_visible_blocks_only() -> None:
    n, side, e = 1000, 50, 8
    q, k = rand(0, 1, 2, n, e), rand(1, 1, 1, n, e)
    scores = Scores(q, k, Mask(blocks=rand(3, 1, 2, 20, 20) > 1, side=side))
    assert scores.mask.blocks is not None
    with Operations() as seen:
        blocked = list(chunks.chunks(scores, None))
        blocked_flash(scores, k, 50, True, True)
    visible = int(scores.mask.blocks.sum())
    assert 0 < visible < 200
    assert seen.multiplied == visible * side * side * 2 * e  # q k^T and p v
    assert sum(math.prod(part.full) for part in blocked) == visible * side * side
    causal = Scores(q, k, replace(scores.mask, causal=True))
    with Operations() as seen:
        blocked_flash(causal, k, None, False, False)
    assert seen.multiplied == int(scores.mask.blocks.tril().sum()) * side * side * 2 * e
    with Operations() as seen:
        blocked_flash(Scores(q, k, Mask()), k, None, False, False)
    assert seen.multiplied == 2 * n * n * 2 * e


@pytest.mark.parametrize(
    "mask",
    [Mask(causal=True), Mask(), Mask(causal=True, window=300), Mask(blocks=rand(0, 1, 2, 16, 16) > 0, side=128)],
    ids=["causal", "full", "window", "blocks"],
)
def test_no_n_by_n_tensor_is_allocated(mask: Mask) -> None:
    q, k = rand(0, 1, 2, 2048, 8), rand(1, 1, 1, 2048, 8)
    with Operations() as seen:
        blocked_flash(Scores(q, k, mask), k, 64, True, True)
    assert chunks.CHUNK / 4 < seen.largest <= 1.01 * chunks.CHUNK < 2048**2 / 3


def test_programs_reuse_their_scratch_and_nothing_depends_on_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = rand(0, 1, 2, 150, 16), rand(1, 1, 1, 150, 16), rand(2, 1, 1, 150, 16)
    found = []
    for programs in (1, 3, 1000):
        monkeypatch.setattr(fused, "programs_at_once", lambda like, each, n=programs: n)
        found.append(pieces(flash_attention(q, k, v, block=24, reduce=REDUCTIONS, impl="triton")))
    high = flash_attention(q.double(), k.double(), v.double(), block=24, reduce=REDUCTIONS, impl="reference")
    for name, value in pieces(high).items():
        torch.testing.assert_close(found[0][name].double(), value, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[0][name], found[1][name])
        assert torch.equal(found[0][name], found[2][name])


@pytest.mark.parametrize("block", [8, 16, 24, 100, None])
@pytest.mark.parametrize(
    "mask",
    [
        Mask(causal=True, documents=(torch.arange(200) // 60)[None]),
        Mask(causal=True, window=40, keys=torch.arange(200)[None] < 90, prefix=5),
        Mask(window=30, blocks=rand(0, 1, 2, 5, 5) > 0.5, side=40, queries=(torch.arange(200)[None] // 64) != 1),
        block_mask(200, 64),
    ],
    ids=["documents", "padding", "two-sided window and blocks", "blocks"],
)
def test_the_tiles_that_are_visited_hold_every_visible_pair_and_few_others(mask: Mask, block: int | None) -> None:
    scores = Scores(torch.zeros(1, 2, 200, 4), torch.zeros(1, 2, 200, 4), mask)
    rows, columns = Cells(200, block or 32, 32), Cells(200, block or 16, 16)
    seen = visits.visible_tiles(scores, rows, columns).expand(1, 2, -1, -1)
    allowed = mask.tile(slice(0, 200), slice(0, 200))
    assert allowed is not None
    allowed = allowed.expand(1, 2, 200, 200)
    (row, row_in), (column, column_in) = (visits._positions(cells, torch.device("cpu")) for cells in (rows, columns))
    pairs = allowed[:, :, row.clamp(max=199)][..., column.clamp(max=199)]  # [1, 2, row tiles, rows, key tiles, keys]
    exact = (pairs & row_in[..., None, None] & column_in).any(-1).any(3)
    assert not (exact & ~seen).any()
    assert int(seen.sum()) <= 1.5 * int(exact.sum())
    assert int(seen.sum()) < seen.numel()
