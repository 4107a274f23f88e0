import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.kernels.mask import Mask
from workbench.kernels.scores import Relative
from workbench.kernels.sigmoid import cpu as tiled
from workbench.kernels.sigmoid import triton as fused
from workbench.kernels.sigmoid_attention import REDUCTIONS, STATS, sigmoid_attention

Budget = Callable[[Tensor, Sequence[Tensor], Tensor], None]


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(
    n: int, m: int, e: int = 12, w: int = 7, b: int = 2, h: int = 4, g: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    return 2 * rand(0, b, h, n, e), 2 * rand(1, b, g, m, e), rand(2, b, g, m, w)


def everything(
    given: Sequence[Tensor], impl: str, *, order: Tensor | None = None, block: int = 64, **options: Any
) -> dict[str, Tensor]:
    """All outputs and the gradients of q, k and v under fixed random weights; the widths of q and k summed in ``order``."""
    leaves = [t.detach().clone().requires_grad_() for t in given]
    q, k, v = leaves
    if order is not None:
        q, k = q[..., order], k[..., order]
    got = sigmoid_attention(q, k, v, block=block, reduce=REDUCTIONS, stats=STATS, impl=impl, **options)
    assert got.impl == impl
    assert got.received is not None
    assert got.row_sums is not None
    named = {"output": got.output, "received": got.received, "row_sums": got.row_sums}
    named |= {f"blocks {name}": got.blocks[name] for name in ("sum", "mean", "abs")}
    weights = [rand(i, *value.shape).bfloat16().to(value.dtype) for i, value in enumerate(named.values())]
    grads = torch.autograd.grad(list(named.values()), leaves, weights)
    named |= {"blocks max": got.blocks["max"], **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    return {name: value.detach() for name, value in named.items()}


def some(seed: int, *shape: int) -> Tensor:
    return rand(seed, *shape) > -0.5


OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "causal": lambda n: {},
    "full": lambda n: {"mask": Mask(), "shift": -1.0, "scale": 0.2},
    "window": lambda n: {"mask": Mask(causal=True, window=7, prefix=2)},
    "near": lambda n: {"mask": Mask(window=9)},
    "padding": lambda n: {"mask": Mask(causal=True, keys=some(5, 2, n), queries=some(6, 2, n))},
    "documents": lambda n: {"mask": Mask(causal=True, documents=(torch.arange(n) // 11)[None])},
    "dense": lambda n: {"mask": Mask(dense=some(7, 2, 1, n, n))},
    "blocks": lambda n: {"mask": Mask(causal=True, blocks=some(8, 2, 1, -(-n // 16), -(-n // 16)), side=16)},
    "bias": lambda n: {"bias": rand(9, n, n).masked_fill(~some(10, n, n), -1e30)},
    "relative": lambda n: {"mask": Mask(), "bias": Relative(rand(11, 1, 2 * n - 1), 1 - n)},
}


@pytest.mark.parametrize("block", [7, 64, 300])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_cpu_form_is_the_reference_in_float64(option: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "ROWS", 32)
    monkeypatch.setattr(tiled, "COLUMNS", 48)
    given = tensors(100, 100)
    expected = everything(given, "reference", block=block, **OPTIONS[option](100))
    for name, value in everything(given, "cpu", block=block, **OPTIONS[option](100)).items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


def within_budget(given: Sequence[Tensor], impl: str, check: Budget, options: dict[str, Any]) -> None:
    high = everything([t.double() for t in given], "reference", **options)
    width = given[0].shape[3]
    orders = [torch.randperm(width, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    low = [everything(given, "reference", order=order, **options) for order in orders]
    for name, value in everything(given, impl, **options).items():
        check(value, [one[name] for one in low], high[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 1), (63, 63), (100, 257), (257, 100), (1000, 1000)])
def test_the_cpu_form_stays_within_the_error_budget(
    n: int, m: int, dtype: torch.dtype, assert_within_budget: Budget
) -> None:
    given = [t.to(dtype) for t in tensors(n, m, b=1)]
    within_budget(given, "cpu", assert_within_budget, {"mask": Mask(causal=True, offset=max(0, m - n))})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [1, 63, 100])
def test_the_fused_form_stays_within_the_error_budget(n: int, dtype: torch.dtype, assert_within_budget: Budget) -> None:
    given = [t.to(dtype) for t in tensors(n, n + 5, e=20, b=1)]
    within_budget(given, "triton", assert_within_budget, {"mask": Mask(causal=True, offset=5), "block": 7})


@pytest.mark.parametrize("option", OPTIONS)
def test_the_fused_form_knows_every_option(
    option: str, assert_within_budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With fewer programs than row tiles, so that a program adds several tiles to its private column sums."""
    monkeypatch.setattr(fused, "PROGRAMS", 8)
    monkeypatch.setattr(fused, "forward_tiles", lambda wide, size: (32, 32, 4))
    given = [t.float() for t in tensors(70, 70, h=2, g=1)]
    within_budget(given, "triton", assert_within_budget, {"block": 40, **OPTIONS[option](70)})


@pytest.mark.parametrize("n", [257])
def test_the_fused_form_on_blocks_larger_than_a_tile(n: int, assert_within_budget: Budget) -> None:
    given = [t.float() for t in tensors(n, n, b=1, h=1, g=1)]
    within_budget(given, "triton", assert_within_budget, {"block": 130})


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_every_number_against_arithmetic_by_hand(impl: str) -> None:
    scores = [[0.3, -9.0, -9.0], [1.0, -0.5, -9.0], [0.2, 0.4, -1.2]]
    p = [[1 / (1 + math.exp(-s - 0.25)) if j <= i else 0.0 for j, s in enumerate(row)] for i, row in enumerate(scores)]
    q, k = torch.eye(3)[None, None], torch.tensor(scores).T.contiguous()[None, None]
    v = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]])[None, None]
    got = sigmoid_attention(q, k, v, scale=1.0, shift=0.25, block=2, reduce=REDUCTIONS, stats=STATS, impl=impl)

    def same(value: Tensor | None, wanted: object) -> None:
        assert value is not None
        torch.testing.assert_close(value[0, 0], torch.tensor(wanted), rtol=1e-6, atol=1e-7)

    same(got.output, [[row[0] + 2 * row[2], row[1] - row[2]] for row in p])
    same(got.row_sums, [sum(row) for row in p])
    same(got.received, [sum(row[j] for row in p) for j in range(3)])
    corner = p[0][0] + p[1][0] + p[1][1]
    same(got.blocks["sum"], [[corner, 0.0], [p[2][0] + p[2][1], p[2][2]]])
    same(got.blocks["abs"], [[corner, 0.0], [p[2][0] + p[2][1], p[2][2]]])
    same(got.blocks["mean"], [[corner / 4, 0.0], [(p[2][0] + p[2][1]) / 2, p[2][2]]])
    same(got.blocks["max"], [[max(p[0][0], p[1][0], p[1][1]), 0.0], [max(p[2][0], p[2][1]), p[2][2]]])


def test_the_shift_is_minus_the_log_of_the_number_of_keys() -> None:
    got = sigmoid_attention(*(torch.zeros(1, 1, 7, 4),) * 3, stats=STATS, mask=Mask())
    torch.testing.assert_close(got.row_sums, torch.full((1, 1, 7), 7 / 8))


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_deleting_a_key_leaves_the_other_weights_alone(impl: str) -> None:
    q, k, v = (t.float() for t in tensors(9, 9))
    whole = sigmoid_attention(q, k, v, mask=Mask(), shift=-2.0, stats=STATS, impl=impl).received
    part = sigmoid_attention(q, k[:, :, 1:], v[:, :, 1:], mask=Mask(), shift=-2.0, stats=STATS, impl=impl).received
    assert whole is not None
    torch.testing.assert_close(part, whole[..., 1:])


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_scores_far_from_zero_neither_overflow_nor_cancel(impl: str) -> None:
    for size in (-1e4, -80.0, -30.0, 30.0, 1e4):
        q = torch.ones(1, 1, 1, 1, requires_grad=True)
        k, v = torch.full((1, 1, 1, 1), size), torch.ones(1, 1, 1, 1)
        got = sigmoid_attention(q, k, v, shift=0.0, scale=1.0, impl=impl).output
        high = torch.sigmoid(torch.tensor(size, dtype=torch.float64))
        torch.testing.assert_close(got.double().flatten(), high[None], rtol=1e-5, atol=1e-44)
        slope = torch.autograd.grad(got, q)[0].double().flatten()
        wanted = size * high * torch.sigmoid(torch.tensor(-size, dtype=torch.float64))
        if impl == "triton" or size < 0:  # plain torch forms 1 - p, which is zero beyond 17
            torch.testing.assert_close(slope, wanted[None], rtol=2e-5, atol=1e-40)
        assert torch.isfinite(slope).all()


def test_small_weights_keep_their_digits_in_float16(assert_within_budget: Budget) -> None:
    """Weights of 1e-6 are subnormal in float16; large values bring the output back into range."""
    q, k, v = (t.half() for t in tensors(40, 40, b=1, h=2, g=1))
    given = (q / 4, k, 4096 * v)
    high = sigmoid_attention(*[t.double() for t in given], shift=-13.0, impl="reference").output
    low = sigmoid_attention(*given, shift=-13.0, impl="reference").output
    assert_within_budget(sigmoid_attention(*given, shift=-13.0, impl="triton").output, [low], high)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_what_hidden_keys_and_queries_hold_does_not_matter(impl: str, poison: float) -> None:
    given = [t.float() for t in tensors(9, 9)]
    real = torch.arange(9) >= torch.tensor([[0], [4]])
    hidden = ~real[:, None, :, None]
    options: dict[str, Any] = {"mask": Mask(causal=True, keys=real, queries=real), "block": 4}
    expected = everything(given, impl, **options)
    assert (expected["output"][1, :, :4] == 0).all()
    assert (expected["row_sums"][1, :, :4] == 0).all()
    for name, value in everything([t.masked_fill(hidden, poison) for t in given], impl, **options).items():
        assert torch.equal(value, expected[name]), name


def test_the_fused_form_reads_strided_tensors_and_gradients() -> None:
    packed = rand(3, 1, 10, 6, 16).float()
    q, k, v = (part.transpose(1, 2) for part in packed.split(2, dim=2))
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    got = {
        impl: torch.autograd.grad(sigmoid_attention(*leaves, impl=impl).output.sum(), leaves)
        for impl in ("triton", "reference")
    }
    for one, other in zip(got["triton"], got["reference"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_backward_of_the_cpu_form_passes_gradcheck() -> None:
    given = [t.requires_grad_() for t in tensors(5, 6, e=3, w=2, b=1, h=2, g=1)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        got = sigmoid_attention(q, k, v, mask=Mask(causal=True, offset=1), block=2, reduce=("mean",), stats=STATS)
        assert got.received is not None
        assert got.row_sums is not None
        return got.output, got.blocks["mean"], got.received, got.row_sums

    assert torch.autograd.gradcheck(run, given)


def test_the_largest_weight_carries_no_gradient_and_a_bias_that_wants_one_is_refused() -> None:
    q, k, v = (t.requires_grad_() for t in tensors(5, 5))
    assert not sigmoid_attention(q, k, v, block=2).blocks["max"].requires_grad
    bias = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="bias must not require a gradient"):
        sigmoid_attention(q, k, v, bias=bias)
    sigmoid_attention(q, k, v, bias=bias, impl="reference").output.sum().backward()
    assert bias.grad is not None
    with torch.no_grad():
        sigmoid_attention(q, k, v, bias=bias)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_the_operator_is_sound(impl: str) -> None:
    q, k, v = (t.float().requires_grad_() for t in tensors(9, 9, b=1))
    mask = Mask(causal=True, keys=torch.ones(1, 9, dtype=torch.bool))
    arguments = (q, k, v, torch.zeros(4, 9, 9), None, *mask.parts(), 0.3, -1.0, 4, True, True, True, True, impl)
    torch.library.opcheck(torch.ops.workbench.sigmoid_attention.default, arguments)
    arguments = (q, k, v, None, None, *Mask().parts(), 0.3, -1.0, None, False, False, False, True, impl)
    torch.library.opcheck(torch.ops.workbench.sigmoid_attention.default, arguments)


class Whole(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        got = sigmoid_attention(q, k, v, block=4, stats=STATS)
        assert got.received is not None
        return got.output, got.blocks["sum"], got.received


def test_it_compiles_without_a_break_and_exports() -> None:
    given = tuple(t.float().requires_grad_() for t in tensors(9, 9))
    expected = Whole()(*given)
    got = torch.compile(Whole(), backend="aot_eager", fullgraph=True)(*given)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    grads = [torch.autograd.grad(sum(x.square().sum() for x in out), given) for out in (got, expected)]
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)
    exported = torch.export.export(Whole(), given)
    assert any("sigmoid_attention" in str(node.target) for node in exported.graph.nodes)
    for one, other in zip(exported.module()(*given), expected, strict=True):
        assert torch.equal(one, other)


class Allocations(TorchDispatchMode):
    """Largest number of elements that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                steps = zip(value.shape, value.stride(), strict=True)
                self.largest = max(self.largest, math.prod(n for n, step in steps if step != 0))
        return out


def test_no_n_by_n_tensor_is_allocated() -> None:
    """The backward operator runs what the forward runs and more, as plain torch calls seen from inside."""
    q, k, v = (t.float() for t in tensors(3000, 3000, e=4, w=4, b=1, h=2, g=1))
    scores = tiled.Scores(q, k, Mask(causal=True))
    with Allocations() as seen:
        tiled.tiled_forward(scores, v, -1.0, tiled.Wanted(64, True, True, True, True))
        tiled.tiled_backward(scores, v, -1.0, 64, torch.ones_like(q), torch.ones(1, 2, 47, 47), None, None)
    assert tiled.ROWS * tiled.COLUMNS / 4 < seen.largest <= 2 * tiled.ROWS * tiled.COLUMNS < 3000**2 / 3


Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 6, 8), torch.zeros(2, 2, 6, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"q": Q[0]}, r"q is a tensor \[B, heads, tokens, E\]"),
        ({"k": K[..., :4]}, "k must share B=2 and E=8"),
        ({"v": V[:, :, :5]}, r"v is a tensor \[B, G, K, V\] with B, G, K = \[2, 2, 6\]; got \[2, 2, 5, 3\]"),
        ({"v": None}, "got NoneType"),
        ({"v": V.double()}, "v must have q's dtype"),
        ({"bias": torch.zeros(4, 5, 5)}, "bias must broadcast"),
        ({"bias": lambda lo, hi: torch.zeros(4, hi - lo, 6)}, "bias is a tensor or a Relative table; got function"),
        ({"shift": float("nan")}, "shift is a finite number; got nan"),
        ({"block": 0}, "block is a positive number of tokens; got 0"),
        ({"reduce": ("median",)}, "reduce: no 'median'; known: sum, mean, max, abs"),
        ({"stats": "entropy"}, "stats: no 'entropy'; known: received, row_sums"),
        ({"impl": "cuda"}, "impl: no form 'cuda'"),
        ({"mask": Mask(keys=torch.ones(2, 5, dtype=torch.bool))}, "mask.keys"),
    ],
)
def test_bad_arguments_raise_one_error_naming_them(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sigmoid_attention(**{"q": Q, "k": K, "v": V, "mask": Mask(), **arguments})


def test_the_fused_form_refuses_float64() -> None:
    with pytest.raises(RuntimeError, match="float64"):
        sigmoid_attention(Q.double(), K.double(), V.double(), mask=Mask(), impl="triton")


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus(capability: int, compiled_for: Callable[[int, str], list[str]]) -> None:
    names = 2 * ["sigmoid_forward", "sigmoid_backward_queries", "sigmoid_backward_keys"]
    assert compiled_for(capability, "aot_sigmoid_attention:everything") == names
