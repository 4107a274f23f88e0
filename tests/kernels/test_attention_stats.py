import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.kernels.attention_stats import AttentionStats, attention_stats
from workbench.kernels.mask import Mask
from workbench.kernels.pairs import chunks as blocked
from workbench.kernels.scores import Relative, Scores
from workbench.kernels.stats.operator import compute
from workbench.kernels.stats.request import REDUCTIONS, STATS, Wanted

LENGTHS = (1, 63, 100, 257)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def pieces(found: AttentionStats) -> dict[str, Tensor]:
    named = {"lse": found.lse, "received": found.received, "entropy": found.entropy, "distance": found.distance}
    named |= {"windowed": found.windowed, "distance2": found.distance2}
    named |= {f"mass {name}": value for name, value in found.mass.items()}
    named |= {f"blocks {name}": value for name, value in found.blocks.items()}
    if found.top1 is not None:
        named |= {"top1": found.top1[0]}
    if found.topk is not None:
        named |= {"topk": found.topk[0]}
    return {name: value for name, value in named.items() if value is not None}


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    queries = draw(st.sampled_from(LENGTHS))
    offset = draw(st.sampled_from((0, 0, 5)))
    keys = draw(st.sampled_from((queries, queries + offset, 40)))
    b, kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    h, e = kv * group, draw(st.sampled_from((4, 16)))

    def maybe(make: Callable[[], Tensor]) -> Tensor | None:
        return make() if draw(st.booleans()) else None

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = Mask(
        causal=draw(st.booleans()),
        window=draw(st.none() | st.sampled_from((1, 7, 64))),
        prefix=draw(st.sampled_from((0, 0, 3))),
        offset=offset,
        keys=maybe(lambda: torch.rand(b, keys, generator=g) > 0.3),
        documents=maybe(lambda: (torch.arange(keys) // 11)[None]) if offset + queries <= keys else None,
        queries=maybe(lambda: torch.rand(b, queries, generator=g) > 0.2),
    )
    bias = maybe(lambda: rand(1, h, queries, keys))
    if bias is not None and draw(st.booleans()):
        table = bias

        def bias(lo, hi):
            return table[:, :, lo:hi]

    return {
        "q": 2 * rand(b, h, queries, e),
        "k": 2 * rand(b, kv, keys, e),
        "mask": mask,
        "softcap": draw(st.none() | st.just(3.0)),
        "sink": maybe(lambda: rand(h)),
        "bias": bias,
        "gate": maybe(lambda: torch.rand(b, h, queries, generator=g, dtype=torch.float64)),
        "block": draw(st.sampled_from((1, 7, 64))),
        "window": 9,
        "reduce": REDUCTIONS,
        "stats": STATS,
        "topk": draw(st.none() | st.sampled_from((1, 5))),
        "mass": {
            "first": torch.arange(keys) < 3,
            "weighted": rand(b, keys),
            "near": lambda b, h, q, k: (q - k < 4) & (k >= h),
        },
    }


@pytest.fixture(params=[2**20, 3000], ids=["one chunk", "many chunks"])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(blocked, "CHUNK", request.param)
    if request.param < 2**20:
        monkeypatch.setattr(blocked, "TILE", (40, 30))
    return request.param


relaxed = settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@relaxed
@given(problem=problems(), given_lse=st.booleans(), rows_whole=st.booleans())
def test_the_cpu_form_is_the_reference_in_float64(
    chunk: int, problem: dict[str, Any], given_lse: bool, rows_whole: bool
) -> None:
    if not rows_whole:  # top keys need whole rows
        problem = {**problem, "stats": tuple(name for name in STATS if name != "top1"), "topk": None}
    expected = attention_stats(**problem, impl="reference")
    lse = expected.lse if given_lse else None
    got = attention_stats(lse=lse, **problem)
    assert got.impl == "cpu"
    wanted = pieces(expected)
    assert set(pieces(got)) == set(wanted)
    for name, value in pieces(got).items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    if rows_whole:
        assert got.top1 is not None
        assert expected.top1 is not None
        assert torch.equal(got.top1[1], expected.top1[1])


def _rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "causal": lambda n: {"mask": Mask(causal=True)},
    "full": lambda n: {"mask": Mask()},
    "window": lambda n: {"mask": Mask(causal=True, window=7)},
    "decode": lambda n: {"mask": Mask(causal=True, offset=5)},
    "padding": lambda n: {"mask": Mask(keys=_rand(1, 2, n) > -0.5)},
    "softcap": lambda n: {"softcap": 3.0},
    "sink": lambda n: {"sink": _rand(2, 4)},
    "bias": lambda n: {"bias": _rand(3, 1, 4, n, n)},
    "gate": lambda n: {"gate": _rand(4, 2, 4, n).sigmoid()},
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("n", [63, 100, 257])
def test_the_cpu_form_stays_within_the_error_budget(
    n: int, option: str, dtype: torch.dtype, assert_within_budget: Callable[[Tensor, Sequence[Tensor], Tensor], None]
) -> None:
    options = {"block": 64, "window": 9, "reduce": REDUCTIONS, "stats": STATS, **OPTIONS[option](n)}
    q, k = (2 * _rand(5, 2, 4, n, 16)).to(dtype), (2 * _rand(6, 2, 2, n, 16)).to(dtype)
    high = pieces(attention_stats(q.double(), k.double(), **options, impl="reference"))
    orders = [torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    low = [pieces(attention_stats(q[..., o], k[..., o], **options, impl="reference")) for o in orders]
    for name, value in pieces(attention_stats(q, k, **options)).items():
        assert value.dtype == torch.float32
        assert_within_budget(value, [one[name] for one in low], high[name])


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_every_number_against_arithmetic_by_hand(impl: str) -> None:
    scores = [[0.3, -9.0, -9.0], [1.0, -0.5, -9.0], [0.2, 0.4, -1.2]]
    sink = 0.1
    p = [[0.0] * 3 for _ in range(3)]
    lse = []
    for i in range(3):
        total = math.exp(sink) + sum(math.exp(scores[i][j]) for j in range(i + 1))
        lse.append(math.log(total))
        for j in range(i + 1):
            p[i][j] = math.exp(scores[i][j]) / total
    q = torch.eye(3, dtype=torch.float64)[None, None]
    k = torch.tensor(scores, dtype=torch.float64).T.contiguous()[None, None]
    got = attention_stats(
        q, k, scale=1.0, sink=torch.tensor([sink]), block=2, reduce=REDUCTIONS, stats=STATS, window=1, topk=2,
        mass={"ends": torch.tensor([1.0, 0.0, 0.5]), "previous": lambda b, h, q, k: q - k == 1}, impl=impl,
    )  # fmt: skip

    def same(value: Tensor | None, wanted: object) -> None:
        assert value is not None
        torch.testing.assert_close(value[0, 0], torch.tensor(wanted, dtype=torch.float64), rtol=1e-7, atol=1e-8)

    same(got.lse, lse)
    same(got.received, [sum(p[i][j] for i in range(3)) for j in range(3)])
    same(got.entropy, [-sum(x * math.log(x) for x in row if x) for row in p])
    same(got.distance, [sum(p[i][j] * (i - j) for j in range(i + 1)) for i in range(3)])
    same(got.windowed, [sum(p[i][j] * min(i - j, 1) for j in range(i + 1)) for i in range(3)])
    same(got.distance2, [sum(p[i][j] * (i - j) ** 2 for j in range(i + 1)) for i in range(3)])
    same(got.mass["ends"], [p[i][0] + 0.5 * p[i][2] for i in range(3)])
    same(got.mass["previous"], [0.0, p[1][0], p[2][1]])
    assert got.topk is not None
    same(got.topk[0], [sorted(row, reverse=True)[:2] for row in p])
    assert got.topk[1][0, 0].tolist() == [[0, -1], [0, 1], [1, 0]]
    corner = [p[0][0], p[0][1], p[1][0], p[1][1]]
    assert got.top1 is not None
    same(got.top1[0], [max(row) for row in p])
    assert got.top1[1].flatten().tolist() == [0, 0, 1]
    same(got.blocks["sum"], [[sum(corner), 0.0], [p[2][0] + p[2][1], p[2][2]]])
    same(got.blocks["abs"], [[sum(corner), 0.0], [p[2][0] + p[2][1], p[2][2]]])
    same(got.blocks["mean"], [[sum(corner) / 4, 0.0], [(p[2][0] + p[2][1]) / 2, p[2][2]]])
    same(got.blocks["max"], [[max(corner), 0.0], [max(p[2][0], p[2][1]), p[2][2]]])


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("given_lse", [False, True])
def test_rows_that_see_nothing_are_zero(impl: str, given_lse: bool) -> None:
    q = torch.randn(1, 2, 5, 4)
    mask = Mask(causal=True, keys=torch.tensor([[False, False, True, True, True]]))
    lse = attention_stats(q, q, mask=mask, impl="reference").lse if given_lse else None
    got = attention_stats(q, q, lse, mask=mask, block=2, reduce=REDUCTIONS, stats=STATS, window=2, impl=impl)
    assert torch.isneginf(got.lse[:, :, :2]).all()
    assert torch.isfinite(got.lse[:, :, 2:]).all()
    for name, value in pieces(got).items():
        assert name == "lse" or torch.isfinite(value).all(), name
    for part in (got.entropy, got.distance, got.top1[0] if got.top1 else None):
        assert part is not None
        assert (part[:, :, :2] == 0).all()
    assert got.top1 is not None
    assert (got.top1[1][:, :, :2] == -1).all()
    assert (got.blocks["sum"][:, :, 0] == 0).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_what_hidden_keys_and_queries_hold_does_not_matter(impl: str, poison: float) -> None:
    """Padding in a cache or a batch is memory that nobody wrote."""
    q, k = _rand(0, 2, 4, 9, 8), _rand(1, 2, 2, 9, 8)
    real = torch.arange(9) >= torch.tensor([[0], [4]])
    mask = Mask(causal=True, keys=real, queries=real)
    asked: dict[str, Any] = {"mask": mask, "block": 4, "reduce": REDUCTIONS, "stats": STATS, "impl": impl}
    asked["window"] = 3
    expected = attention_stats(q, k, **asked)
    hidden = ~real[:, None, :, None]
    got = attention_stats(q.masked_fill(hidden, poison), k.masked_fill(hidden, poison), **asked)
    for name, value in pieces(got).items():
        assert torch.equal(value, pieces(expected)[name]), name


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_sink_far_above_the_scores_takes_everything_without_overflow(impl: str) -> None:
    q = torch.randn(1, 1, 3, 4)
    got = attention_stats(q, q, sink=torch.tensor([500.0]), stats=STATS, window=2, impl=impl)
    torch.testing.assert_close(got.lse, torch.full((1, 1, 3), 500.0))
    assert got.received is not None
    assert got.entropy is not None
    assert (got.received == 0).all()
    assert (got.entropy == 0).all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_large_scores_do_not_overflow(impl: str) -> None:
    q = 40 * torch.randn(1, 1, 9, 16, generator=torch.Generator().manual_seed(0))
    got = attention_stats(q, q, stats=STATS, window=2, block=4, impl=impl)
    for value in pieces(got).values():
        assert torch.isfinite(value).all()
    assert got.received is not None
    torch.testing.assert_close(got.received.sum(), torch.tensor(9.0))


def test_first_of_equal_keys_is_the_top_key() -> None:
    q, k = torch.zeros(1, 1, 600, 4), torch.randn(1, 1, 600, 4)
    top = attention_stats(q, k, mask=Mask(), stats=("top1",)).top1
    assert top is not None
    assert (top[1] == 0).all()
    k = torch.zeros(1, 1, 600, 4)
    k[0, 0, [311, 599]] = 1.0
    top = attention_stats(torch.ones(1, 1, 2, 4), k, mask=Mask(), stats=("top1",)).top1
    assert top is not None
    assert (top[1] == 311).all()


def test_uninitialised_memory_is_poisoned_here() -> None:
    assert torch.empty(3).isnan().all()


class Allocations(TorchDispatchMode):
    """Largest number of elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                # A broadcast view has many elements and little memory.
                strides = zip(value.shape, value.stride(), strict=True)
                self.largest = max(self.largest, math.prod(n for n, step in strides if step != 0))
        return out


@pytest.mark.parametrize(
    "mask",
    [
        Mask(causal=True),
        Mask(),
        Mask(causal=True, window=300),
        Mask(causal=True, keys=torch.arange(2048)[None] > 4),
        Mask(causal=True, documents=(torch.arange(2048) // 700)[None]),
        Mask(causal=True, blocks=torch.ones(1, 1, 32, 32, dtype=torch.bool), side=64),
    ],
    ids=["causal", "full", "window", "padding", "documents", "block mask"],
)
def test_no_n_by_n_tensor_is_allocated(mask: Mask) -> None:
    q, k = torch.randn(1, 2, 2048, 8), torch.randn(1, 1, 2048, 8)
    wanted = Wanted(64, REDUCTIONS, STATS, 9, 4, (torch.ones(1, 2048),), (lambda b, h, q, k: q - k < 9,))
    with Allocations() as seen:
        compute(Scores(q, k, mask), None, wanted, "cpu")
    assert blocked.CHUNK / 4 <= seen.largest <= 1.01 * blocked.CHUNK < 2048**2 / 3
    if mask.window is None and mask.causal:
        with Allocations() as seen:
            compute(Scores(q, k, mask), None, Wanted(), "reference")
        assert seen.largest >= 2 * 2048**2


def test_inputs_are_left_alone() -> None:
    q, k = torch.randn(1, 2, 9, 4), torch.randn(1, 1, 9, 4)
    lse = attention_stats(q, k).lse
    before = [t.clone() for t in (q, k, lse)]
    got = attention_stats(q, k, lse, block=4, stats=STATS, window=3)
    assert all(torch.equal(a, b) for a, b in zip((q, k, lse), before, strict=True))
    assert got.lse.data_ptr() != lse.data_ptr()


Q, K = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"q": Q[0]}, r"q is a tensor \[B, heads, tokens, E\]; got \[4, 5, 8\]"),
        ({"q": Q.long()}, "q is float64, float32"),
        ({"k": K[:1]}, "k must share B=2"),
        ({"k": K[..., :4]}, "k must share B=2 and E=8"),
        ({"k": torch.zeros(2, 3, 6, 8)}, "its 3 heads must divide the 4 heads of q"),
        ({"k": K.double()}, "k must have q's dtype"),
        ({"q": Q[:, :, :0]}, "must not be empty"),
        ({"lse": torch.zeros(2, 4, 6)}, r"lse is \[B, H, Q\] = \[2, 4, 5\]"),
        ({"lse": torch.zeros(2, 4, 5).half()}, "lse is float32 or float64"),
        ({"softcap": 0.0}, "softcap is a positive number"),
        ({"sink": torch.zeros(2)}, "sink is one logit per query head"),
        ({"bias": torch.zeros(4, 5, 5)}, "bias must broadcast"),
        ({"bias": lambda lo, hi: torch.zeros(4, hi - lo, 5)}, r"bias\(0, 5\) must broadcast"),
        ({"bias": 3.0}, "bias is a tensor, a Relative table or a function"),
        ({"gate": torch.zeros(2, 4)}, "gate is floating point"),
        ({"gate": -torch.ones(2, 4, 5)}, "gate must not be negative"),
        ({"block": 0}, "block is a positive number"),
        ({"block": 2.5}, "block is a positive number"),
        ({"window": -1}, "window is a positive number"),
        ({"stats": "windowed"}, "window: 'windowed' needs the distance"),
        ({"topk": 0}, "topk is a positive number of keys"),
        ({"topk": 7}, "topk: 7 keys of 6"),
        ({"mass": {"x": torch.ones(5)}}, r"mass\['x'\] is \[6\] or \[2, 6\]"),
        ({"mass": {"x": 3}}, r"mass\['x'\] is a tensor"),
        ({"mass": {"x": lambda b, h, q, k: torch.ones(7)}}, r"mass: a function of \(b, h, q, k\) returns"),
        ({"bias": Relative(torch.zeros(3, 20), -9)}, "bias: its table has 3 heads; q has 4"),
        ({"bias": Relative(torch.zeros(4, 9), -3)}, "bias: its table holds distances -3 to 5; this map needs -4 to 5"),
        ({"bias": torch.zeros(4, 5, 6, requires_grad=True)}, "bias requires a gradient"),
        ({"gate": torch.ones(2, 4, 5, requires_grad=True)}, "gate requires a gradient"),
        ({"reduce": ("median",)}, "reduce: no 'median'; known: sum, mean, max, abs"),
        ({"stats": "entropie"}, "stats: no 'entropie'; known: received, entropy, distance, windowed, distance2, top1"),
        ({"impl": "cuda"}, "impl: no form 'cuda'; known: reference, cpu, triton"),
        ({"mask": Mask(keys=torch.ones(2, 5, dtype=torch.bool))}, "mask.keys"),
    ],
)
def test_bad_arguments_raise_one_error_naming_them(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        attention_stats(**{"q": Q, "k": K, "mask": Mask(), **arguments})
