from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from encode_problems import cast, dense, normal, problem
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.kernels.encode import cpu as blocked
from workbench.kernels.encode import triton as fused
from workbench.kernels.topk_encode import topk_encode

Budget = Callable[[Tensor, Sequence[Tensor], Tensor], None]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FAST = ("cpu", "triton")
IMPLS = ("reference", *FAST)


@pytest.fixture(params=["whole", "cut"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Tiles and shares so small that small inputs need several."""
    if request.param == "cut":
        monkeypatch.setattr(blocked, "CHUNK", 1500)
        monkeypatch.setattr(blocked, "ROWS", 30)
        monkeypatch.setattr(fused, "LEAST", 128)
    return request.param == "cut"


def without(given: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: None if name in names else value for name, value in given.items()}


@pytest.mark.parametrize("n", [1, 63, 100, 257, 1000])
@pytest.mark.parametrize("k", [1, 12, 90])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("parts", [(), ("bias",), ("centre",), ("excluded",), ("bias", "centre", "excluded")])
def test_the_cpu_form_is_the_reference_in_float64(
    n: int, k: int, positive: bool, parts: tuple[str, ...], cut: bool
) -> None:
    given = without(problem(n, 11, 90), *parts)
    wanted = topk_encode(**given, k=k, positive=positive, impl="reference")
    got = topk_encode(**given, k=k, positive=positive)
    assert got.impl == "cpu"
    assert got.values.dtype == torch.float64
    torch.testing.assert_close(got.values, wanted.values, rtol=1e-9, atol=1e-12)
    assert torch.equal(got.indices, wanted.indices)


@pytest.mark.parametrize("k", [1, 4, 50])
def test_rows_one_by_one_in_narrow_tiles_of_the_cpu_form(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles bring nothing new, others little that is."""
    monkeypatch.setattr(blocked, "CHUNK", 6)
    monkeypatch.setattr(blocked, "ROWS", 1)
    given = without(problem(20, 11, 90), "excluded")
    wanted = topk_encode(**given, k=k, impl="reference")
    got = topk_encode(**given, k=k)
    torch.testing.assert_close(got.values, wanted.values, rtol=1e-9, atol=1e-12)
    assert torch.equal(got.indices, wanted.indices)


def test_the_reference_against_numbers_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.0]])
    weight = torch.tensor([[1.0, 0.0, -1.0, 2.0], [0.0, 1.0, 1.0, -2.0]])
    bias, centre = torch.tensor([0.0, 0.0, 0.0, 3.0]), torch.tensor([0.0, 1.0])
    # x - centre is (1, 1) and (-1, -1): pre is (1, 1, 0, 3) and (-1, -1, 0, 3).
    for impl in IMPLS:
        got = topk_encode(x, weight, bias, k=3, centre=centre, impl=impl)
        assert got.values.tolist() == [[3.0, 1.0, 1.0], [3.0, 0.0, 0.0]]
        assert got.indices.tolist() == [[3, 0, 1], [3, -1, -1]]
        got = topk_encode(x, weight, bias, k=3, centre=centre, positive=False, impl=impl)
        assert got.values.tolist() == [[3.0, 1.0, 1.0], [3.0, 0.0, -1.0]]
        assert got.indices.tolist() == [[3, 0, 1], [3, 2, 0]]


def stays_within_budget(impl: str, given: dict[str, Any], k: int, positive: bool, check: Budget) -> None:
    d = given["x"].shape[1]
    high = topk_encode(**cast(given, torch.float64), k=k, positive=positive, impl="reference")
    pre = dense(**cast(given, torch.float64))
    orders = [torch.randperm(d, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    reordered = [
        {**given, "x": given["x"][:, o], "weight": given["weight"][o], "centre": given["centre"][o]} for o in orders
    ]
    low = [topk_encode(**one, k=k, positive=positive, impl="reference") for one in reordered]
    got = topk_encode(**given, k=k, positive=positive, impl=impl)
    assert got.values.dtype == torch.float32
    check(got.values, [one.values for one in low], high.values)
    # What the indices name is what the values are, and no feature is named twice.
    held, at = got.indices >= 0, got.indices.clamp(min=0)
    low_pre = [dense(**one).gather(1, at)[held] for one in reordered]
    check(got.values[held], low_pre, pre.gather(1, at)[held])
    assert (got.values[~held] == 0).all()
    named = torch.zeros(len(at), pre.shape[1] + 1, dtype=torch.int64).scatter_add(
        1, got.indices + 1, torch.ones_like(at)
    )
    assert (named[:, 1:] <= 1).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("n", [1, 63, 100, 257])
def test_the_cpu_form_stays_within_the_error_budget(
    n: int, positive: bool, dtype: torch.dtype, cut: bool, assert_within_budget: Budget
) -> None:
    stays_within_budget("cpu", cast(problem(n, 48, 130), dtype), 20, positive, assert_within_budget)


@pytest.mark.parametrize(
    ("n", "d", "f", "k", "positive", "dtype"),
    [
        (1, 17, 300, 1, True, torch.float32),
        (63, 100, 257, 9, False, torch.bfloat16),
        (100, 64, 300, 33, True, torch.bfloat16),
        (63, 40, 40, 40, False, torch.float32),
        (100, 70, 100, 20, True, torch.float16),
    ],
    ids=str,
)
def test_the_triton_form_stays_within_the_error_budget(
    n: int, d: int, f: int, k: int, positive: bool, dtype: torch.dtype, cut: bool, assert_within_budget: Budget
) -> None:
    stays_within_budget("triton", cast(problem(n, d, f), dtype), k, positive, assert_within_budget)


def tied(n: int, f: int) -> tuple[Tensor, Tensor]:
    """Rows that are exact in every order of summation and hold each pre-activation many times."""
    return normal(0, n, 6).round().float(), normal(1, 6, f).sign().float()


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("k", [1, 5, 40, 150])
def test_ties_go_to_the_smaller_index(impl: str, k: int, positive: bool, cut: bool) -> None:
    x, weight = tied(20, 150)
    wanted = topk_encode(x, weight, k=k, positive=positive, impl="reference")
    got = topk_encode(x, weight, k=k, positive=positive, impl=impl)
    assert torch.equal(got.values, wanted.values)
    assert torch.equal(got.indices, wanted.indices)
    same = (got.values[:, :-1] == got.values[:, 1:]) & (got.indices[:, 1:] >= 0)
    assert k < 5 or same.any()
    assert (got.indices[:, :-1] < got.indices[:, 1:])[same].all()


@pytest.mark.parametrize("impl", IMPLS)
def test_zeros_of_both_signs_are_equal_and_negative_values_keep_their_order(impl: str) -> None:
    weight = torch.tensor([[-0.0, 0.0, -1e-30, -0.0, -2.0, 1e-30]])
    got = topk_encode(torch.ones(1, 1), weight, bias=torch.full((6,), -0.0), k=6, positive=False, impl=impl)
    assert got.indices.tolist() == [[5, 0, 1, 3, 2, 4]]
    assert got.values.tolist() == weight[:, [5, 0, 1, 3, 2, 4]].tolist()


@pytest.mark.parametrize("impl", IMPLS)
def test_places_that_nothing_fills_hold_zero_and_minus_one(impl: str, cut: bool) -> None:
    given = cast(problem(9, 8, 150), torch.float32)
    given["bias"] = given["bias"] - 6.0
    pre = dense(**given)
    got = topk_encode(**given, k=30, impl=impl)
    filled = (pre > 0).sum(1)
    assert 0 < int(filled.max()) < 30
    assert torch.equal((got.indices >= 0).sum(1), filled)
    assert ((got.indices >= 0) == (torch.arange(30) < filled[:, None])).all()
    assert torch.equal(got.values > 0, got.indices >= 0)
    assert (got.values >= 0).all()
    nothing = topk_encode(**{**given, "bias": given["bias"] - 1e4}, k=3, impl=impl)
    assert (nothing.values == 0).all()
    assert (nothing.indices == -1).all()


@pytest.mark.parametrize("impl", FAST)
@pytest.mark.parametrize("left", [0, 3, 140])
def test_what_excluded_features_hold_does_not_matter(impl: str, left: int) -> None:
    given = cast(without(problem(9, 8, 150), "centre"), torch.float32)
    given["excluded"] = torch.ones(150, dtype=torch.bool)
    given["excluded"][torch.randperm(150, generator=torch.Generator().manual_seed(0))[:left]] = False
    wanted = topk_encode(**given, k=5, positive=False, impl="reference")
    given["weight"] = given["weight"].masked_fill(given["excluded"], float("nan"))
    given["bias"] = given["bias"].masked_fill(given["excluded"], float("inf"))
    got = topk_encode(**given, k=5, positive=False, impl=impl)
    assert torch.equal(got.indices, wanted.indices)
    torch.testing.assert_close(got.values, wanted.values)
    assert ((got.indices >= 0).sum(1) == min(5, left)).all()
    assert not given["excluded"][got.indices[got.indices >= 0]].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("positive", [False, True])
def test_nan_is_the_largest_and_minus_infinity_is_never_selected(impl: str, positive: bool) -> None:
    nan, inf = float("nan"), float("inf")
    weight = torch.tensor([[1.0, nan, -inf, inf, -3.0, nan]])
    weight[0, 5].neg_()  # its sign bit is set
    got = topk_encode(torch.ones(2, 1), weight, k=6, positive=positive, impl=impl)
    assert got.indices.tolist() == 2 * [[1, 5, 3, 0, -1, -1] if positive else [1, 5, 3, 0, 4, -1]]
    assert got.values[:, :2].isnan().all()
    assert got.values[0, 2:].tolist() == ([inf, 1.0, 0.0, 0.0] if positive else [inf, 1.0, -3.0, 0.0])


@pytest.mark.parametrize("impl", FAST)
def test_nothing_outside_of_strided_inputs_is_read(impl: str) -> None:
    """Inputs are windows into memory full of NaN."""
    given = cast(without(problem(20, 30, 140), "centre", "excluded"), torch.float32)
    wanted = topk_encode(**given, k=7, impl="reference")

    def window(inner: Tensor, flip: bool) -> Tensor:
        shape = [2 * s + 40 for s in inner.shape]
        outer = torch.full(shape[::-1] if flip else shape, float("nan"))
        outer = outer.T if flip else outer
        view = outer[tuple(slice(3, 2 * s + 3, 2) for s in inner.shape)]
        return view.copy_(inner)

    for flip in (False, True):
        x, weight, bias = window(given["x"], flip), window(given["weight"], flip), window(given["bias"], False)
        got = topk_encode(x, weight, bias, k=7, impl=impl)
        assert torch.equal(got.indices, wanted.indices)
        torch.testing.assert_close(got.values, wanted.values)


def test_the_triton_form_is_the_same_bit_for_bit_however_features_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    given = cast(without(problem(33, 70, 500), "excluded"), torch.bfloat16)
    found = []
    for least, programs in ((100, 512), (100, 2), (10**6, 512)):
        monkeypatch.setattr(fused, "LEAST", least)
        monkeypatch.setattr(fused, "PROGRAMS", programs)
        size = fused.tiles(9, 33, torch.bfloat16)
        found.append((fused.shares(33, 500, size), topk_encode(**given, k=9, impl="triton")))
    assert [share for share, _ in found] == [128, 256, 512]
    for _, one in found[1:]:
        assert torch.equal(one.values, found[0][1].values)
        assert torch.equal(one.indices, found[0][1].indices)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_operator_keeps_torchs_contract(impl: str) -> None:
    dtype = torch.float32
    x, weight, bias = (normal(i, *s).to(dtype).requires_grad_() for i, s in enumerate([(5, 8), (8, 20), (20,)]))
    excluded = torch.arange(20) % 3 == 0
    op = torch.ops.workbench.topk_encode.default
    for arguments in ((x, weight, bias, 3, True, excluded, impl), (x, weight, None, 3, False, None, impl)):
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("impl", FAST)
def test_it_compiles_and_exports_whole(impl: str) -> None:
    given = cast(without(problem(7, 8, 40), "excluded"), torch.float32)

    class Coder(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            got = topk_encode(x, weight, bias, k=4, centre=given["centre"], impl=impl)
            return got.values, got.indices

    def run(code: Any) -> tuple[Tensor, ...]:
        leaves = [given[name].clone().requires_grad_() for name in ("x", "weight", "bias")]
        values, indices = code(*leaves)
        return values, indices, *torch.autograd.grad(values.square().sum(), leaves)

    wanted = run(Coder())
    torch._dynamo.reset()
    got = run(torch.compile(Coder(), backend="aot_eager", fullgraph=True))
    exported = torch.export.export(Coder(), tuple(given[name] for name in ("x", "weight", "bias"))).module()
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(exported(*(given[name] for name in ("x", "weight", "bias"))), wanted, strict=False):
        torch.testing.assert_close(one, other)


class Allocations(TorchDispatchMode):
    """Largest number of elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return out


def test_no_n_by_f_tensor_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "CHUNK", 2**15)
    x, weight = normal(0, 500, 4).float(), normal(1, 4, 3000).float()
    with Allocations() as seen:
        blocked.encode(x, weight, None, 8, True)
    assert 2**14 < seen.largest <= 2**15


X, W = torch.zeros(4, 8), torch.zeros(8, 20)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"x": X[0]}, r"x is a tensor \[N, D\] of floats, not empty; got torch.float32 \[8\]"),
        ({"x": X.long()}, r"x is a tensor \[N, D\] of floats, not empty; got torch.int64 \[4, 8\]"),
        ({"x": X[:0]}, "not empty"),
        ({"weight": W[:7]}, r"weight is \[D, F\] with D = 8 in x's dtype torch.float32; got torch.float32 \[7, 20\]"),
        ({"weight": W.half()}, "in x's dtype torch.float32; got torch.float16"),
        ({"weight": [1.0]}, "weight is a tensor .*; got list"),
        ({"weight": W.to("meta")}, "weight is on x's device cpu; got meta"),
        ({"k": 0}, "k is a whole number from 1 to F = 20; got 0"),
        ({"k": 21}, "k is a whole number from 1 to F = 20; got 21"),
        ({"k": True}, "k is a whole number"),
        ({"bias": X[0]}, r"bias is floats \[F\] = \[20\]; got torch.float32 \[8\]"),
        ({"centre": W[0]}, r"centre is floats \[D\] = \[8\]; got torch.float32 \[20\]"),
        ({"excluded": W[0]}, r"excluded is bool \[F\] = \[20\], True hides; got torch.float32 \[20\]"),
        ({"impl": "fast"}, "impl: no form 'fast'"),
    ],
)
def test_what_does_not_fit_is_said(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        topk_encode(**{"x": X, "weight": W, "k": 3, **arguments})


def test_a_form_that_cannot_run_raises_and_nothing_else_runs() -> None:
    with pytest.raises(RuntimeError, match="float64.*impl='cpu'"):
        topk_encode(X.double(), W.double(), k=3, impl="triton")
    with pytest.raises(RuntimeError, match="k = 1025 is over 1024"):
        topk_encode(torch.zeros(1, 2), torch.zeros(2, 1025), k=1025, impl="triton")


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus_ahead_of_time(capability: int, compiled_for: Callable[[int, str], list[str]]) -> None:
    names = [*3 * ["_encode", "_bags", "_dots", "_bags"], "_encode"]
    assert compiled_for(capability, "aot_sparse_coder:sparse_coder") == names
