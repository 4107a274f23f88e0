import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

import workbench.kernels.gated_delta_rule as front
from workbench.kernels.delta import cpu as chunked
from workbench.kernels.delta import reference
from workbench.kernels.gated_delta_rule import REDUCTIONS, GatedDelta, delta_rows, gated_delta_rule

NAMES = ("q", "k", "v", "beta", "log_decay", "state")
Budget = Callable[[Tensor, Sequence[Tensor], Tensor], None]


def problem(
    seed: int,
    n: int,
    heads: tuple[int, int, int, int] = (4, 2, 2, 4),
    widths: tuple[int, int] = (16, 16),
    dtype: torch.dtype = torch.float64,
    strongest: float = 1.0,
    decay: float | None = 0.1,
    state: bool = True,
    batch: int = 2,
) -> dict[str, Any]:
    """Heads of q, k, v and beta; beta uniform up to ``strongest``; log decays spread around ``-decay``, some tenfold."""
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    (hq, hk, hv, h), (e, width) = heads, widths
    found: dict[str, Any] = {
        "q": normalize(rand(batch, hq, n, e), dim=-1).to(dtype),
        "k": normalize(rand(batch, hk, n, e), dim=-1).to(dtype),
        "v": rand(batch, hv, n, width).to(dtype),
        "beta": strongest * torch.rand(batch, h, n, generator=g, dtype=torch.float64),
        "log_decay": None if decay is None else -decay * rand(batch, h, n).exp(),
        "state": rand(batch, h, e, width) if state else None,
    }
    rest = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: x if x is None or name in "qkv" else x.to(rest) for name, x in found.items()}


def only_map(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in ("q", "k", "beta", "log_decay")}


def to(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: None if x is None else x.to(dtype) for name, x in given.items()}


def pieces(found: GatedDelta) -> dict[str, Tensor]:
    assert found.state is not None
    return {"output": found.output, "state": found.state, **found.blocks}


def orders(given: dict[str, Any]) -> list[dict[str, Any]]:
    """The same problem with the key channels in three orders."""
    found = []
    for i in range(3):
        o = torch.randperm(given["q"].shape[3], generator=torch.Generator().manual_seed(i))
        state = None if given["state"] is None else given["state"][:, :, o]
        found.append({**given, "q": given["q"][..., o], "k": given["k"][..., o], "state": state})
    return found


def test_the_recurrence_is_the_one_of_qwen3_next() -> None:
    given = problem(0, 37, heads=(2, 2, 4, 4), widths=(8, 6), dtype=torch.float32, decay=0.5)
    q, k = given["q"] * 3, given["k"] * 0.7

    def tokens(x: Tensor) -> Tensor:
        return x.transpose(1, 2)

    theirs, state = torch_recurrent_gated_delta_rule(
        tokens(q), tokens(k), tokens(given["v"]), tokens(given["log_decay"]), tokens(given["beta"]),
        initial_state=given["state"], output_final_state=True,
    )  # fmt: skip
    for impl in ("reference", "cpu"):
        ours = gated_delta_rule(**{**given, "q": q, "k": k}, impl=impl)
        torch.testing.assert_close(ours.output, tokens(theirs), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.state, state, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [None, 0.3])
@pytest.mark.parametrize("strongest", [1.0, 2.0])
def test_the_map_times_the_values_is_the_recurrence(decay: float | None, strongest: float) -> None:
    given = problem(1, 70, strongest=strongest, decay=decay, state=False)
    output = gated_delta_rule(**given, impl="reference").output
    dense = reference.dense_map(**only_map(given), scale=16**-0.5)
    torch.testing.assert_close(dense @ reference.heads(given["v"], 4), output, rtol=1e-10, atol=1e-12)
    assert (dense.triu(1) == 0).all()
    assert dense.min() < -0.01 < 0.01 < dense.max()
    # Entry by entry: what the recurrence gives for the identity as values.
    identity = torch.eye(70, dtype=torch.float64).expand(2, 1, 70, 70)
    columns = gated_delta_rule(**{**given, "v": identity}, impl="reference").output
    torch.testing.assert_close(dense, columns, rtol=1e-10, atol=1e-12)


def test_two_tokens_by_hand() -> None:
    q, k = (
        torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64),
        torch.tensor([[0.6, 0.8], [1.0, 0.0]], dtype=torch.float64),
    )
    beta, log = torch.tensor([0.5, 0.25], dtype=torch.float64), torch.tensor([-1.0, -2.0], dtype=torch.float64)
    # S_1 = .5 k_1 v_1^T, S_2 = a (I - .25 k_2 k_2^T) S_1 + .25 k_2 v_2^T with a = exp(-2)
    first = [2 * 0.5 * (0.6 + 1.6), 0.0]
    erased = [0.6 - 0.25 * 0.6, 0.8]
    second = [2 * math.exp(-2) * 0.5 * (3 * erased[0] - erased[1]), 2 * 0.25 * 3]
    for impl in ("reference", "cpu"):
        got = delta_rows(
            q[None, None], k[None, None], beta[None, None], log[None, None], lo=0, hi=2, scale=2.0, impl=impl
        )
        torch.testing.assert_close(
            got[0, 0], torch.tensor([first, second], dtype=torch.float64), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(
    ("n", "block"), [(1, 1), (1, 100), (63, 7), (100, 100), (257, 64), (257, 101), (257, 20), (130, 300)]
)
@pytest.mark.parametrize("decay", [None, 0.02, 3.0])
def test_the_cpu_form_is_the_reference_in_float64(n: int, block: int, decay: float | None) -> None:
    heads = ((4, 2, 2, 4), (1, 1, 2, 2), (2, 1, 1, 2))[n % 3]
    given = problem(n, n, heads, widths=(8, 5), strongest=2.0 if block % 2 else 1.0, decay=decay, state=bool(block % 3))
    expected = gated_delta_rule(**given, block=block, reduce=REDUCTIONS, impl="reference")
    got = gated_delta_rule(**given, block=block, reduce=REDUCTIONS)
    assert got.impl == "cpu"
    for name, value in pieces(got).items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(
            value, pieces(expected)[name], rtol=1e-9, atol=1e-11, msg=lambda m, x=name: f"{x}: {m}"
        )
    alone = gated_delta_rule(**given, block=block, reduce=("mean", "sum")).blocks
    for name in ("sum", "mean"):
        torch.testing.assert_close(alone[name], expected.blocks[name], rtol=1e-9, atol=1e-11)
    lo, hi = n // 3, n // 3 + max(1, n // 2)
    want = delta_rows(**only_map(given), lo=lo, hi=hi, impl="reference")
    torch.testing.assert_close(delta_rows(**only_map(given), lo=lo, hi=hi), want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "decay"), [(1, 0.1), (63, None), (100, 4.0), (257, 0.02)])
def test_the_cpu_form_stays_within_the_error_budget(
    n: int, decay: float | None, dtype: torch.dtype, assert_within_budget: Budget
) -> None:
    budget(problem(2, n, dtype=dtype, decay=decay), "cpu", assert_within_budget, block=64)


def test_a_thousand_tokens(assert_within_budget: Budget) -> None:
    budget(problem(2, 1000, (2, 1, 1, 2), dtype=torch.bfloat16, batch=1), "cpu", assert_within_budget, block=130)


def budget(given: dict[str, Any], impl: str, check: Budget, block: int) -> None:
    """Output, state, blocks and some rows against the same numbers in float64."""
    n = given["q"].shape[2]
    asked: dict[str, Any] = {"block": block, "reduce": REDUCTIONS}
    span = {"lo": n // 3, "hi": n // 3 + max(1, n // 2)}

    def all_of(one: dict[str, Any], impl: str) -> dict[str, Tensor]:
        found = pieces(gated_delta_rule(**one, **asked, impl=impl))
        return {**found, "rows": delta_rows(**only_map(one), **span, impl=impl)}

    high = all_of(to(given, torch.float64), "reference")
    low = [all_of(one, "reference") for one in orders(given)]
    got = all_of(given, impl)
    alone = gated_delta_rule(**given, block=block, reduce="sum", impl=impl).blocks["sum"]
    check(alone, [one["sum"] for one in low], high["sum"])
    for name, value in got.items():
        assert value.dtype == (given["q"].dtype if name == "output" else torch.float32)
        check(value, [one[name] for one in low], high[name])


def gradients(given: dict[str, Any], impl: str, parts: tuple[str, ...] = ("output", "state")) -> dict[str, Tensor]:
    leaves = {name: x.detach().requires_grad_() for name, x in given.items() if x is not None}
    found = gated_delta_rule(**{**given, **leaves}, impl=impl)
    loss = found.output.new_zeros((), dtype=torch.float64)
    for i, name in enumerate(parts):
        value = getattr(found, name)
        weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        loss = loss + (value.double() * weights).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)  # the state does not depend on q
    return dict(zip(leaves, grads, strict=True))


@pytest.mark.parametrize("parts", [("output",), ("state",), ("output", "state")], ids=str)
@pytest.mark.parametrize(("n", "decay"), [(1, 0.1), (63, None), (150, 0.05), (130, 3.0)])
def test_gradients_of_the_cpu_form_are_those_of_the_reference(
    n: int, decay: float | None, parts: tuple[str, ...]
) -> None:
    given = problem(
        3, n, ((4, 2, 1, 4), (1, 2, 2, 2))[n % 2], widths=(8, 5), decay=decay, strongest=2.0, state=n != 130
    )
    expected = gradients(given, "reference", parts)
    for name, value in gradients(given, "cpu", parts).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-10, msg=lambda m, x=name: f"{x}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_the_cpu_form_stay_within_the_error_budget(
    dtype: torch.dtype, assert_within_budget: Budget
) -> None:
    gradient_budget(problem(4, 257, dtype=dtype, decay=0.1), "cpu", assert_within_budget)


def gradient_budget(given: dict[str, Any], impl: str, check: Budget) -> None:
    """Against the reference's own gradient through autograd in the same types."""
    high = gradients(to(given, torch.float64), "reference")
    low = gradients(given, "reference")
    for name, value in gradients(given, impl).items():
        assert value.dtype == given[name].dtype
        check(value, [low[name]], high[name])


class Allocations(TorchDispatchMode):
    """Largest number of elements that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                strides = zip(value.shape, value.stride(), strict=True)
                self.largest = max(self.largest, math.prod(n for n, step in strides if step != 0))
        return out


def test_memory_is_linear_in_the_length() -> None:
    given = problem(7, 3000, (1, 1, 1, 1), widths=(8, 8), dtype=torch.float32, batch=1, state=False)
    args = [given[name] for name in ("q", "k", "v", "beta", "log_decay")]
    with Allocations() as seen:
        output, last = chunked.forward(*args, 1.0, None)
        chunked.backward(output, last, *args, 1.0, None)
        chunked.block_maps(*args[:2], *args[3:], 1.0, 64, REDUCTIONS)
        front._blocks("cpu", *args[:2], *args[3:], 1.0, 10**6, ["sum"])
        chunked.rows(*args[:2], *args[3:], 1.0, 2900, 2910)
    assert 3000 * 8 < seen.largest <= 47 * chunked.CHUNK**2
    with Allocations() as seen:
        reference.block_maps(*args[:2], *args[3:], 1.0, 64, ("sum",))
    assert seen.largest >= 3000**2


def test_blocks_refuse_a_gradient() -> None:
    given = problem(8, 20)
    given["q"].requires_grad_()
    found = gated_delta_rule(**given, block=8)
    with pytest.raises(RuntimeError, match="carry no gradient"):
        (found.output.sum() + found.blocks["sum"].sum()).backward()
    assert not gated_delta_rule(**given, block=8, impl="reference").blocks["sum"].requires_grad
    assert not delta_rows(**only_map(given), lo=0, hi=4).requires_grad


def _called(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    found = gated_delta_rule(q, k, v, beta, log_decay, state=state, block=16, reduce=("sum", "max"))
    assert found.state is not None
    rows = delta_rows(q.detach(), k.detach(), beta.detach(), lo=3, hi=9)
    return found.output, found.state, found.blocks["sum"], found.blocks["max"], rows


class _Module(torch.nn.Module):
    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        return _called(*args)


def test_it_compiles_and_exports() -> None:
    given = [x.requires_grad_() for x in problem(9, 40, widths=(8, 5)).values()]
    plain = _called(*given)
    compiled = torch.compile(_called, backend="aot_eager", fullgraph=True)(*given)
    exported = torch.export.export(_Module(), tuple(given)).module()(*given)
    for a, b, c in zip(plain, compiled, exported, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    grads = [torch.autograd.grad(x[0].sum() + x[1].square().sum(), given) for x in (plain, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert not any(x.requires_grad for x in compiled[2:])


@pytest.mark.parametrize("full", [True, False])
def test_operators_are_registered_properly(full: bool) -> None:
    given = problem(10, 20, (2, 1, 1, 2), (4, 3), torch.float32, batch=1, state=full, decay=0.1 if full else None)
    if full:
        given = {name: x.requires_grad_() for name, x in given.items()}
    q, k, v, beta, log, state = given.values()
    rule = (q, k, v, beta, log, 0.5, state, None if full else 8, "" if full else "sum abs", "cpu")
    torch.library.opcheck(torch.ops.workbench.gated_delta_rule, rule)
    fixed = [None if x is None else x.detach() for x in (q, k, v, beta, log)]
    state = None if state is None else state.detach()
    torch.library.opcheck(
        torch.ops.workbench.gated_delta_rule_backward, (torch.ones(1, 2, 20, 3), None, *fixed, 0.5, state, "cpu")
    )
    torch.library.opcheck(torch.ops.workbench.delta_rows, (*fixed[:2], *fixed[3:], 0.5, 3, 9, "cpu"))


def test_inputs_are_left_alone_and_results_repeat() -> None:
    given = problem(11, 70)
    before = {name: x.clone() for name, x in given.items()}
    first, again = (pieces(gated_delta_rule(**given, block=16, reduce=REDUCTIONS)) for _ in range(2))
    assert all(torch.equal(given[name], before[name]) for name in given)
    assert all(torch.equal(first[name], again[name]) for name in first)


Q, V, BETA = torch.zeros(2, 2, 5, 8), torch.zeros(2, 4, 5, 6), torch.zeros(2, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"q": Q[0]}, r"q is \[B, heads, N, E\] and not empty; got \[2, 5, 8\]"),
        ({"q": Q.long()}, "q is float64, float32"),
        ({"k": Q[:, :, :0]}, r"k is \[B, heads, N, E\] and not empty"),
        ({"k": Q.double()}, "k must have q's torch.float32"),
        ({"k": Q[..., :4]}, "k must share E=8"),
        ({"v": V[:, :, :4]}, "v must share B=2 and N=5"),
        ({"v": torch.zeros(2, 3, 5, 6)}, "v: its 3 heads must divide the 4 heads of beta"),
        ({"beta": BETA[:, :, :4]}, r"beta is \[B, H, N\]"),
        ({"beta": BETA.long()}, "beta is floating point"),
        ({"log_decay": BETA[:, :2]}, r"log_decay is \[B, H, N\] = \[2, 4, 5\]; got \[2, 2, 5\]"),
        ({"state": torch.zeros(2, 4, 6, 8)}, r"state is \[B, H, E, V\] = \[2, 4, 8, 6\]; got \[2, 4, 6, 8\]"),
        ({"scale": float("nan")}, "scale is a finite number"),
        ({"block": 0}, "block is a positive number"),
        ({"block": 2.5}, "block is a positive number"),
        ({"block": 2, "reduce": ("median",)}, "reduce: no 'median'; known: sum, mean, abs, max"),
        ({"impl": "cuda"}, "impl: no form 'cuda'"),
    ],
)
def test_bad_arguments_raise_one_error_naming_them(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gated_delta_rule(**{"q": Q, "k": Q, "v": V, "beta": BETA, **arguments})


@pytest.mark.parametrize(("lo", "hi"), [(-1, 2), (2, 2), (0, 6), (0.0, 2)])
def test_rows_outside_of_the_map_are_refused(lo: int, hi: int) -> None:
    with pytest.raises(ValueError, match="lo, hi: rows of the map, 0 <= lo < hi <= N = 5"):
        delta_rows(Q, Q, BETA, lo=lo, hi=hi)
