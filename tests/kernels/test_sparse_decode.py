from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.kernels.decode import cpu as gathered
from workbench.kernels.sparse_decode import sparse_decode

Budget = Callable[[Tensor, Sequence[Tensor], Tensor], None]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FAST = ("cpu", "triton")
IMPLS = ("reference", *FAST)
SMALL = [(1, 1, 1, 1), (63, 9, 40, 17), (20, 4, 7, 600)]
"""N, k, F, D. The interpreter takes milliseconds for a program, and there is one for each row and feature."""
SHAPES = [*SMALL, (100, 4, 7, 600), (257, 16, 300, 33)]
ops = torch.ops.workbench


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(n: int, k: int, f: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values, indices with empty places, twins in a row and a feature that most rows use, weight, bias."""
    indices = torch.randint(-1, f, (n, k), generator=torch.Generator().manual_seed(0))
    if k > 3:
        indices[:, 1] = indices[:, 0]
        indices[: n - n // 5, 2] = f // 2
    return normal(1, n, k), indices, normal(2, f, d), normal(3, d)


def dense(values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Row by row, place by place."""
    dtype = torch.promote_types(torch.promote_types(values.dtype, weight.dtype), torch.float32)
    code = values.new_zeros((len(values), weight.shape[0]), dtype=dtype)
    for j in range(values.shape[1]):
        held = (indices[:, j] >= 0).to(dtype)
        one_hot = torch.nn.functional.one_hot(indices[:, j].clamp(min=0), weight.shape[0]).to(dtype)
        code = code + one_hot * (values[:, j].to(dtype) * held)[:, None]
    out = code @ weight.to(dtype)
    return (out if bias is None else out + bias.to(dtype)).to(weight.dtype)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [*SHAPES, (1000, 5, 90, 24)], ids=str)
def test_value_and_gradients_in_float64(impl: str, shape: tuple[int, ...]) -> None:
    values, indices, weight, bias = (t.requires_grad_(t.is_floating_point()) for t in problem(*shape))
    leaves, seed = (values, weight, bias), normal(4, shape[0], shape[3])
    wanted, got = dense(values, indices, weight, bias), sparse_decode(values, indices, weight, bias, impl=impl)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)
    for one, other in zip(
        torch.autograd.grad(got, leaves, seed), torch.autograd.grad(wanted, leaves, seed), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_reference_against_numbers_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0], [10.0, 20.0], [float("nan"), 0.0]])
    values, indices = torch.tensor([[2.0, 3.0, 5.0], [7.0, 1.0, 1.0]]), torch.tensor([[0, 1, 0], [-1, 1, -1]])
    for impl in FAST:
        got = sparse_decode(values, indices, weight, torch.tensor([0.5, 0.0]), impl=impl)
        assert got.tolist() == [[37.5, 74.0], [10.5, 20.0]]
    assert sparse_decode(values, indices, weight[:2], impl="reference").tolist() == [[37.0, 74.0], [10.0, 20.0]]


@pytest.mark.parametrize(
    ("impl", "shape"), [*(("cpu", shape) for shape in SHAPES), *(("triton", shape) for shape in SMALL)], ids=str
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_value_and_gradients_stay_within_the_error_budget(
    impl: str, dtype: torch.dtype, shape: tuple[int, ...], assert_within_budget: Budget
) -> None:
    values, indices, weight, bias = problem(*shape)
    values = values.float()
    leaves = [values, weight.to(dtype), bias.to(dtype)]
    seed = normal(4, shape[0], shape[3]).to(dtype)

    def run(code: Callable[..., Tensor], dtypes: Sequence[torch.dtype], order: Tensor) -> list[Tensor]:
        ins = [leaf.to(t).requires_grad_() for leaf, t in zip(leaves, dtypes, strict=True)]
        out = code(ins[0][:, order], indices[:, order], ins[1], ins[2])
        return [out.detach(), *torch.autograd.grad(out, ins, seed.to(out.dtype))]

    same = [leaf.dtype for leaf in leaves]
    orders = [torch.randperm(shape[1], generator=torch.Generator().manual_seed(i)) for i in range(3)]
    high = run(dense, 3 * [torch.float64], orders[0])
    low = [run(dense, same, order) for order in orders]
    got = run(lambda *ins: sparse_decode(*ins, impl=impl), same, torch.arange(shape[1]))
    assert got[0].dtype == dtype
    for i, one in enumerate(got):
        assert one.dtype == [dtype, *same][i]
        assert_within_budget(one, [other[i] for other in low], high[i])


@pytest.mark.parametrize("impl", IMPLS)
def test_empty_places_add_nothing_and_get_no_gradient(impl: str) -> None:
    values, indices, weight, _ = problem(20, 4, 6, 8)
    values = values.float().masked_fill(indices < 0, 1e6).requires_grad_()
    weight = weight.float().requires_grad_()
    out = sparse_decode(values, indices, weight, impl=impl)
    torch.testing.assert_close(out, dense(values.detach().masked_fill(indices < 0, 0.0), indices, weight))
    to_values, to_weight = torch.autograd.grad(out.sum(), (values, weight))
    assert (to_values[indices < 0] == 0).all()
    assert (to_values[indices >= 0] != 0).all()
    assert (to_weight.abs() < 1e3).all()
    nothing = sparse_decode(values, torch.full_like(indices, -1), weight, torch.arange(8.0), impl=impl)
    assert torch.equal(nothing, torch.arange(8.0).expand(20, 8))
    assert all((grad == 0).all() for grad in torch.autograd.grad(nothing.sum(), (values, weight)))


@pytest.mark.parametrize("impl", FAST)
def test_what_nobody_points_at_does_not_matter(impl: str) -> None:
    """Values of empty places, weights of unused features and the memory around the inputs are NaN."""
    values, indices, weight, bias = problem(20, 5, 9, 24)
    indices = indices.masked_fill(indices == 3, -1).masked_fill(indices == 0, -1)
    used = torch.isin(torch.arange(9), indices)
    assert not used.all()
    values, weight, bias = values.float(), weight.float(), bias.float()
    seed = normal(4, 20, 24).float()

    def window(inner: Tensor, flip: bool) -> Tensor:
        shape = [2 * s + 40 for s in inner.shape]
        outer = torch.full(shape[::-1] if flip else shape, float("nan"))
        outer = outer.T if flip else outer
        return outer[tuple(slice(3, 2 * s + 3, 2) for s in inner.shape)].copy_(inner)

    def run(flip: bool, poison: float) -> list[Tensor]:
        empty = values.masked_fill(indices < 0, poison)
        ins = [window(t, flip).requires_grad_() for t in (empty, weight.masked_fill(~used[:, None], poison))]
        out = sparse_decode(ins[0], indices, ins[1], window(bias, False), impl=impl)
        return [out, *torch.autograd.grad(out, ins, window(seed, flip))]

    wanted = run(False, 0.0)
    torch.testing.assert_close(wanted[0], dense(values.masked_fill(indices < 0, 0.0), indices, weight, bias))
    for flip in (False, True):
        for one, other in zip(run(flip, float("nan")), wanted, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("impl", FAST)
def test_a_row_of_nan_stays_in_its_row(impl: str) -> None:
    values, indices, weight, _ = problem(6, 4, 5, 8)
    seed = torch.ones(6, 8).index_fill(0, torch.tensor([2]), float("nan"))
    values = values.float().requires_grad_()
    indices[2] = torch.tensor([1, -1, 4, -1])
    (grad,) = torch.autograd.grad(sparse_decode(values, indices, weight.float(), impl=impl), values, seed)
    assert grad[2].isnan().tolist() == [True, False, True, False]
    assert grad[torch.arange(6) != 2].isfinite().all()


@pytest.mark.parametrize("impl", FAST)
def test_gradients_are_the_same_bit_for_bit_from_run_to_run(impl: str) -> None:
    values, indices, weight, bias = (t.float() if t.is_floating_point() else t for t in problem(50, 8, 12, 20))
    leaves, seed = [t.requires_grad_() for t in (values, weight, bias)], normal(4, 50, 20).float()
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        try:
            out = sparse_decode(values, indices, weight, bias, impl=impl)
            found.append([out, *torch.autograd.grad(out, leaves, seed)])
        finally:
            torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("impl", FAST)
def test_the_sum_of_a_feature_does_not_depend_on_the_others(impl: str) -> None:
    """Whatever else is summed beside it, a feature's gradient is the same bit for bit."""
    values, indices, _, _ = problem(60, 8, 30, 40)
    values, rows = values.float(), normal(4, 60, 40).float()
    sums, totals = ops.feature_sums(values, indices, rows, 30, impl)
    assert (sums[15] != 0).all()
    for others in (indices.masked_fill(indices < 15, -1), indices.masked_fill(indices != 15, -1), indices + 5):
        shift = 5 if int(others.min()) > 0 else 0
        again, total = ops.feature_sums(values, others, rows, 40, impl)
        assert torch.equal(again[15 + shift], sums[15])
        assert torch.equal(total[15 + shift], totals[15])


@pytest.mark.parametrize("impl", IMPLS)
def test_feature_sums_and_dots_against_sums_by_hand(impl: str) -> None:
    values, indices, weight, _ = problem(50, 5, 11, 7)
    values, weight, rows = values.float(), weight.float(), normal(4, 50, 7).float()
    sums, totals = torch.zeros(11, 7).double(), torch.zeros(11).double()
    dots = torch.zeros(50, 5).double()
    for n in range(50):
        for j in range(5):
            f = int(indices[n, j])
            if f >= 0:
                sums[f] += values[n, j].double() * rows[n].double()
                totals[f] += values[n, j].double()
                dots[n, j] = rows[n].double() @ weight[f].double()
    got = ops.feature_sums(values, indices, rows, 11, impl)
    torch.testing.assert_close(got[0].double(), sums, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1].double(), totals, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ops.sparse_dots(rows, indices, weight, impl).double(), dots, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradients_by_finite_differences(impl: str) -> None:
    values, indices, weight, bias = problem(4, 4, 5, 3)
    rows = normal(4, 4, 3)
    for leaf in (values, weight, bias, rows):
        leaf.requires_grad_()
    for code, leaves in (
        (lambda v, w, b: sparse_decode(v, indices, w, b, impl=impl), (values, weight, bias)),
        (lambda r, w: ops.sparse_dots(r, indices, w, impl), (rows, weight)),
        (lambda v, r: tuple(ops.feature_sums(v, indices, r, 5, impl)), (values, rows)),
    ):
        assert torch.autograd.gradcheck(code, leaves)
        assert torch.autograd.gradgradcheck(code, leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_operators_keep_torchs_contract(impl: str) -> None:
    values, indices, weight, bias = (t.float() if t.is_floating_point() else t for t in problem(5, 4, 6, 8))
    rows = normal(4, 5, 8).float()
    for leaf in (values, weight, bias, rows):
        leaf.requires_grad_()
    torch.library.opcheck(ops.sparse_decode.default, (values, indices, weight, bias, impl))
    torch.library.opcheck(ops.sparse_dots.default, (rows, indices, weight, impl))
    torch.library.opcheck(ops.feature_sums.default, (values, indices, rows, 6, impl))


@pytest.mark.parametrize("impl", FAST)
def test_it_compiles_and_exports_whole(impl: str) -> None:
    values, indices, weight, bias = (t.float() if t.is_floating_point() else t for t in problem(6, 4, 5, 8))

    class Decoder(torch.nn.Module):
        def forward(self, values: Tensor, weight: Tensor) -> Tensor:
            return sparse_decode(values, indices, weight, bias, impl=impl)

    def run(code: Any) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in (values, weight)]
        out = code(*leaves)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    wanted = run(Decoder())
    torch._dynamo.reset()
    for one, other in zip(run(torch.compile(Decoder(), backend="aot_eager", fullgraph=True)), wanted, strict=True):
        torch.testing.assert_close(one, other)
    exported = torch.export.export(Decoder(), (values, weight)).module()
    torch.testing.assert_close(exported(values, weight), wanted[0])


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


def test_neither_n_by_f_nor_n_by_k_by_d_is_allocated() -> None:
    values, indices, weight, bias = problem(500, 16, 300, 64)
    with Allocations() as seen:
        gathered.decode(values, indices, weight, bias)
        gathered.dots(normal(4, 500, 64), indices, weight)
        gathered.feature_sums(values, indices, normal(4, 500, 64), 300)
    assert seen.largest == 500 * 64 < 500 * 300 < 500 * 16 * 64


V, I, W = torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64), torch.zeros(20, 8)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"values": V[0]}, r"values is a tensor \[N, k\] of floats, not empty; got torch.float32 \[3\]"),
        ({"values": I}, r"values is a tensor \[N, k\] of floats, not empty; got torch.int64 \[4, 3\]"),
        ({"weight": W[:0]}, r"weight is a tensor \[F, D\] of floats, not empty"),
        ({"indices": I[:2]}, r"indices is int64 \[N, k\] = \[4, 3\] like values; got torch.int64 \[2, 3\]"),
        ({"indices": I.int()}, "indices is int64 .*; got torch.int32"),
        ({"indices": I + 20}, r"indices are from -1 \(empty\) to F - 1 = 19; got 20 to 20"),
        ({"indices": I - 2}, "got -2 to -2"),
        ({"bias": V[0]}, r"bias is floats \[D\] = \[8\]; got torch.float32 \[3\]"),
        ({"weight": W.to("meta")}, "weight is on the device of values, cpu; got meta"),
        ({"impl": "fast"}, "impl: no form 'fast'"),
    ],
)
def test_what_does_not_fit_is_said(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sparse_decode(**{"values": V, "indices": I, "weight": W, **arguments})


def test_a_form_that_cannot_run_raises_and_nothing_else_runs() -> None:
    with pytest.raises(RuntimeError, match="float64.*impl='cpu'"):
        sparse_decode(V.double(), I, W, impl="triton")
