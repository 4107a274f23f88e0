import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.kernels.linear import cpu as chunked
from workbench.kernels.linear import sums
from workbench.kernels.linear.reference import dense_map
from workbench.kernels.linear_attention import REDUCTIONS, linear_attention

Budget = Callable[[Tensor, Sequence[Tensor], Tensor], None]


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(n: int, b: int = 2, h: int = 4, g: int = 2, e: int = 12, w: int = 7) -> list[Tensor]:
    """q, k, v and an initial state."""
    return [rand(0, b, h, n, e), rand(1, b, g, n, e), rand(2, b, g, n, w), rand(3, b, h, e, w)]


def decay(kind: str, n: int, b: int = 2, h: int = 4) -> list[Tensor]:
    """The log decay that a name stands for, in a list, or an empty list."""
    rates = {"per token": 0.1, "strong": 10.0}
    if kind == "none":
        return []
    if kind == "per head":  # Lightning attention's rates
        return [-(2.0 ** (-8 * torch.arange(1, h + 1, dtype=torch.float64) / h))]
    if kind == "resets":
        found = -0.1 * rand(4, b, h, n).abs()
        found[:, :, ::17] = -math.inf
        return [found]
    return [-rates[kind] * torch.rand(b, h, n, generator=torch.Generator().manual_seed(5), dtype=torch.float64)]


DECAYS = ("none", "per head", "per token", "strong", "resets")


def everything(
    given: Sequence[Tensor], impl: str, *, order: Tensor | None = None, block: int = 64, scale: float = -0.4
) -> dict[str, Tensor]:
    """All outputs, and the gradients of q, k, v, state and log_decay under fixed random weights."""
    leaves = [t.detach().clone().requires_grad_() for t in given]
    q, k, v, state = leaves[:4]
    if order is not None:
        q, k, state = q[..., order], k[..., order], state[:, :, order]
    log_decay = leaves[4] if len(leaves) > 4 else None
    got = linear_attention(q, k, v, log_decay, scale=scale, block=block, reduce=REDUCTIONS, state=state, impl=impl)
    assert got.impl == impl
    assert got.state is not None
    last = got.state if order is None else got.state[:, :, order.argsort()]
    named = {"output": got.output, "state": last, "blocks sum": got.blocks["sum"], "blocks mean": got.blocks["mean"]}
    weights = [rand(i, *value.shape).bfloat16().to(value.dtype) for i, value in enumerate(named.values())]
    grads = torch.autograd.grad(list(named.values()), leaves, weights)
    named |= {f"blocks {name}": got.blocks[name] for name in ("abs", "max")}
    named |= dict(zip(("dq", "dk", "dv", "d state", "d log_decay"), grads, strict=False))
    return {name: value.detach() for name, value in named.items()}


@pytest.mark.parametrize("side", [(128, 256), (33, 16)], ids=str)
@pytest.mark.parametrize("block", [1, 7, 40, 300])
@pytest.mark.parametrize("kind", DECAYS)
def test_the_cpu_form_is_the_reference_in_float64(
    kind: str, block: int, side: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CHUNK", side[0])
    monkeypatch.setattr(chunked, "TILE", side[1])
    given = tensors(100) + decay(kind, 100)
    expected = everything(given, "reference", block=block)
    for name, value in everything(given, "cpu", block=block).items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


def within_budget(given: Sequence[Tensor], impl: str, check: Budget, dtype: torch.dtype, block: int) -> None:
    given = [t.to(dtype) for t in given[:3]] + [t.float() for t in given[3:]]
    high = everything([t.double() for t in given], "reference", block=block)
    orders = [torch.randperm(given[0].shape[3], generator=torch.Generator().manual_seed(i)) for i in range(5)]
    low = [everything(given, "reference", block=block, order=order) for order in orders]
    for name, value in everything(given, impl, block=block).items():
        plain = [one[name] for one in low]
        if impl == "triton" and name in ("state", "d state", "d log_decay"):
            plain = [one.to(dtype) for one in plain]  # their products take operands of that type, see the front door
        check(value, plain, high[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("n", "kind"),
    [(1, "per token"), (63, "none"), (100, "resets"), (257, "per head"), (257, "per token"), (1000, "strong")],
)
def test_the_cpu_form_stays_within_the_error_budget(
    n: int, kind: str, dtype: torch.dtype, assert_within_budget: Budget
) -> None:
    within_budget(tensors(n, b=1) + decay(kind, n, b=1), "cpu", assert_within_budget, dtype, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "kind", "block"), [(1, "none", 1), (63, "per head", 16), (100, "per token", 7)])
def test_the_fused_form_stays_within_the_error_budget(
    n: int, kind: str, block: int, dtype: torch.dtype, assert_within_budget: Budget
) -> None:
    within_budget(tensors(n, b=1, e=20) + decay(kind, n, b=1), "triton", assert_within_budget, dtype, block)


@pytest.mark.parametrize(("n", "kind", "block"), [(257, "per token", 90), (257, "strong", 130), (100, "resets", 64)])
def test_the_fused_form_on_long_inputs_and_large_blocks(
    n: int, kind: str, block: int, assert_within_budget: Budget
) -> None:
    b = 2 if n == 100 else 1
    given = tensors(n, b=b, h=2, g=1) + decay(kind, n, b=b, h=2)
    within_budget(given, "triton", assert_within_budget, torch.float32, block)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("kind", DECAYS)
def test_the_recurrence_token_by_token_is_a_second_oracle(kind: str, impl: str) -> None:
    q, k, v, state = given = tensors(50)
    log_decay = decay(kind, 50)
    factors = torch.ones(2, 4, 50, dtype=torch.float64)
    if log_decay:
        factors = (log_decay[0] if log_decay[0].ndim == 3 else log_decay[0][None, :, None].expand(2, 4, 50)).exp()
    outputs = []
    for t in range(50):
        outer = k[:, :, t, :, None] * v[:, :, t, None, :]
        state = factors[:, :, t, None, None] * state + outer.repeat_interleave(2, dim=1)
        outputs.append(0.5 * torch.einsum("bhe,bhev->bhv", q[:, :, t], state))
    kept = torch.float32 if impl == "triton" else torch.float64
    got = linear_attention(
        *[t.to(kept) for t in given[:3]], *[t.to(kept) for t in log_decay], state=given[3], scale=0.5, impl=impl
    )
    accuracy = {"rtol": 1e-4, "atol": 1e-4} if impl == "triton" else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(got.output.double(), torch.stack(outputs, 2), **accuracy)
    assert got.state is not None
    torch.testing.assert_close(got.state.double(), state, **accuracy)


@pytest.mark.parametrize("size", [5.0, 100.0])
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_strong_decay_neither_underflows_nor_loses_digits_far_down_the_sequence(impl: str, size: float) -> None:
    """Plain torch would form exp(-5000) / exp(-4999); the running sum of float32 would lose three digits."""
    n = 1000
    q = torch.ones(1, 1, n, 1)
    log_decay = torch.full((1, 1, n), -size)
    log_decay[..., ::2] = -0.001
    got = linear_attention(q, q, q, log_decay, block=100, reduce=REDUCTIONS, impl=impl)
    high = linear_attention(*[q.double()] * 3, log_decay.double(), block=100, reduce=REDUCTIONS, impl="reference")
    torch.testing.assert_close(got.output.double(), high.output, rtol=1e-6, atol=0)
    for name in REDUCTIONS:
        torch.testing.assert_close(got.blocks[name].double(), high.blocks[name], rtol=1e-5, atol=1e-36, msg=name)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_every_number_against_arithmetic_by_hand(impl: str) -> None:
    q = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, -1.0]])[None, None]
    k = torch.tensor([[1.0, 1.0], [-1.0, 0.5], [-3.0, 1.0]])[None, None]
    v = torch.tensor([[1.0], [10.0], [100.0]])[None, None]
    log_decay = torch.tensor([0.5, 0.25, 0.125]).log()[None, None]
    m = [[2.0], [1.0, 2.0], [0.0, 2 * -1.5 * 0.125, -8.0]]
    state = torch.tensor([[4.0], [8.0]])[None, None]
    got = linear_attention(q, k, v, log_decay, scale=2.0, block=2, reduce=REDUCTIONS, state=state, impl=impl)

    def same(value: Tensor | None, wanted: object) -> None:
        assert value is not None
        torch.testing.assert_close(value[0, 0], torch.tensor(wanted), rtol=1e-6, atol=1e-7)

    carried = [2 * 4 * 0.5, 2 * 2 * 8 * 0.125, 2 * (4 - 8) / 64]
    same(got.output, [[2 + carried[0]], [1 + 20 + carried[1]], [10 * m[2][1] - 800 + carried[2]]])
    same(got.state, [[4 / 64 + 1 / 32 - 10 / 8 - 300], [8 / 64 + 1 / 32 + 5 / 8 + 100]])
    same(got.blocks["sum"], [[5.0, 0.0], [m[2][1], -8.0]])
    same(got.blocks["mean"], [[5 / 4, 0.0], [m[2][1] / 2, -8.0]])
    same(got.blocks["abs"], [[5.0, 0.0], [-m[2][1], 8.0]])
    same(got.blocks["max"], [[2.0, 0.0], [0.0, -8.0]])


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize("block", [3, 40, 80])
def test_the_largest_value_of_a_negative_block_is_negative(block: int, impl: str) -> None:
    """100 tokens: the last block is short, and cells that do not exist are no zeros."""
    q, v = torch.ones(1, 1, 100, 2), torch.ones(1, 1, 100, 1)
    got = linear_attention(q, -q, v, torch.full((1,), -0.01), block=block, reduce=("max",), impl=impl).blocks["max"]
    expected = linear_attention(q, -q, v, torch.full((1,), -0.01), block=block, reduce=("max",), impl="reference")
    torch.testing.assert_close(got, expected.blocks["max"])
    assert (got.tril(-1) < 0).sum() == got.tril(-1).count_nonzero() > 0


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_the_state_continues_a_sequence(impl: str) -> None:
    q, k, v, state = (t.float() for t in tensors(90))
    log_decay = decay("per token", 90)[0].float()
    whole = linear_attention(q, k, v, log_decay, state=state)
    outputs = []
    for part in (slice(0, 37), slice(37, 90)):
        got = linear_attention(
            q[:, :, part], k[:, :, part], v[:, :, part], log_decay[..., part], state=state, impl=impl
        )
        outputs.append(got.output)
        assert got.state is not None
        state = got.state
    torch.testing.assert_close(torch.cat(outputs, 2), whole.output, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, whole.state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("piece", [4, 32])
def test_block_sums_are_made_of_pieces_of_any_size(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "PIECE", piece)
    q, k, *_ = tensors(70)
    for log_decay in (None, decay("strong", 70)[0]):
        got = sums.block_sums(q, k, log_decay, 0.3, 23)
        m = torch.nn.functional.pad(dense_map(q, k, log_decay, 0.3), (0, 22, 0, 22)).view(2, 4, 4, 23, 4, 23)
        torch.testing.assert_close(got, m.sum((3, 5)), rtol=1e-10, atol=1e-12)


def test_the_fused_form_reads_strided_tensors_and_gradients() -> None:
    packed = rand(3, 1, 10, 6, 16).float()
    leaves = [part.transpose(1, 2).detach() for part in packed.split(2, dim=2)]
    leaves = [leaf.requires_grad_() for leaf in (*leaves, rand(7, 1, 2, 16, 16).float().transpose(2, 3))]
    got = {}
    for impl in ("triton", "reference"):
        found = linear_attention(*leaves[:3], torch.full((2,), -0.1), state=leaves[3], impl=impl)
        assert found.state is not None
        loss = found.output.sum() + (found.state * torch.arange(16.0)[:, None]).sum()
        got[impl] = (found.output, found.state, *torch.autograd.grad(loss, leaves))
    for one, other in zip(got["triton"], got["reference"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_backward_of_the_cpu_form_passes_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK", 2)
    given = [t.requires_grad_() for t in (*tensors(5, b=1, h=2, g=1, e=3, w=2), -0.2 - rand(6, 1, 2, 5).abs())]

    def run(q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor) -> tuple[Tensor, ...]:
        got = linear_attention(q, k, v, log_decay, state=state, block=2, reduce=("mean",))
        assert got.state is not None
        return got.output, got.state, got.blocks["mean"]

    assert torch.autograd.gradcheck(run, given)


def test_magnitudes_and_maxima_carry_no_gradient() -> None:
    q, k, v, _ = (t.requires_grad_() for t in tensors(5))
    for impl in ("reference", "cpu"):
        blocks = linear_attention(q, k, v, block=2, reduce=REDUCTIONS, impl=impl).blocks
        assert list(blocks) == list(REDUCTIONS)
        assert [blocks[name].requires_grad for name in REDUCTIONS] == [True, True, False, False]


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_the_operator_is_sound(impl: str) -> None:
    q, k, v, state = (t.float().requires_grad_() for t in tensors(9, b=1))
    log_decay = decay("per token", 9, b=1)[0].float().requires_grad_()
    operator = torch.ops.workbench.linear_attention.default
    torch.library.opcheck(operator, (q, k, v, log_decay, state, 0.3, 4, True, True, impl))
    short = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(operator, (*short, None, None, 0.3, None, False, False, impl))


class Whole(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, ...]:
        got = linear_attention(q, k, v, log_decay, block=4)
        assert got.state is not None
        return got.output, got.state, got.blocks["sum"], got.blocks["abs"]


def test_it_compiles_without_a_break_and_exports() -> None:
    given = tuple(t.float().requires_grad_() for t in (*tensors(9)[:3], *decay("per head", 9)))
    expected = Whole()(*given)
    got = torch.compile(Whole(), backend="aot_eager", fullgraph=True)(*given)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)
    grads = [torch.autograd.grad(sum(x.square().sum() for x in out[:3]), given) for out in (got, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    exported = torch.export.export(Whole(), given)
    assert any("linear_attention" in str(node.target) for node in exported.graph.nodes)
    for one, other in zip(exported.module()(*given), expected, strict=True):
        torch.testing.assert_close(one, other)


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
    n = 4000
    q, k, v, state = (t.float() for t in tensors(n, b=1, h=2, g=1, e=4, w=4))
    log_decay = torch.full((1, 2, n), -0.01)
    with Allocations() as seen:
        chunked.chunked_forward(q, k, v, log_decay, state, 1.0, 64, True, True)
        chunked.chunked_backward(torch.ones_like(q), state, q, k, v, log_decay, state, 1.0)
        sums.block_sums(q, k, log_decay, 1.0, 64)
        sums.block_sums(q, k, log_decay, 1.0, n)
    assert 2 * chunked.TILE**2 <= seen.largest <= 2 * 1.05 * sums.PIECE * n < n**2 / 10


Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"q": Q[0]}, r"q is a tensor \[B, heads, tokens, E\]"),
        ({"k": K[..., :4]}, "k must share B=2 and E=8"),
        ({"k": K[:, :, :4]}, "k must have the 5 tokens of q; got 4"),
        ({"v": V[:, :, :4]}, r"v is a tensor \[B, G, N, V\] with B, G, N = \[2, 2, 5\]; got \[2, 2, 4, 3\]"),
        ({"v": 1.0}, "got float"),
        ({"v": V.double()}, "v must have q's dtype"),
        ({"log_decay": torch.zeros(3)}, r"log_decay is \[H\] = \[4\] or \[B, H, N\] = \[2, 4, 5\]; got \[3\]"),
        (
            {"log_decay": torch.zeros(4, dtype=torch.long)},
            "log_decay is a floating point tensor on cpu; got torch.int64",
        ),
        ({"log_decay": -1.0}, "log_decay is a floating point tensor on cpu; got float"),
        ({"log_decay": torch.full((4,), 0.1)}, "log_decay is the log of a factor of at most 1"),
        ({"log_decay": torch.full((4,), math.nan)}, "not positive, not NaN"),
        ({"state": torch.zeros(2, 2, 8, 3)}, r"state is floating point \[B, H, E, V\] = \[2, 4, 8, 3\]"),
        ({"scale": math.inf}, "scale is a finite number; got inf"),
        ({"block": True}, "block is a positive number of tokens; got True"),
        ({"reduce": "median"}, "reduce: no 'median'; known: sum, mean, max, abs"),
        ({"impl": "cuda"}, "impl: no form 'cuda'"),
    ],
)
def test_bad_arguments_raise_one_error_naming_them(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        linear_attention(**{"q": Q, "k": K, "v": V, **arguments})


def test_the_fused_form_refuses_float64() -> None:
    with pytest.raises(RuntimeError, match="float64"):
        linear_attention(Q.double(), K.double(), V.double(), impl="triton")


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus(capability: int, compiled_for: Callable[[int, str], list[str]]) -> None:
    forward, backward = ["linear_output", "linear_maps"], ["linear_backward", "linear_backward_values"]
    names = 2 * ["linear_scan", *forward, "linear_scan", "linear_scan", *backward]
    assert compiled_for(capability, "aot_linear_attention:everything") == names
