import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.kernels.mask import Mask
from workbench.kernels.seer import (
    AttnGate,
    SeerTriple,
    distillation_loss,
    seer_attention,
    seer_target,
    select_blocks,
)

HERE = Path(__file__).resolve().parent
BENCHMARKS = HERE.parent / "benchmarks"


def _rand(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _full(q: Tensor, k: Tensor, mask: Mask, kept: Tensor | None = None, side: int = 1) -> Tensor:
    """Dense weights ``[B, H, Q, K]`` in float64, over the kept blocks only if given; rows that see nothing are zero."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    n, m = q.shape[2], k.shape[2]
    allowed = mask.tile(slice(0, n), slice(0, m))
    assert allowed is not None
    if kept is not None:
        allowed = allowed & kept.repeat_interleave(side, 2)[:, :, :n].repeat_interleave(side, 3)[..., :m]
    s = torch.where(allowed, q @ k.mT * q.shape[-1] ** -0.5, -math.inf)
    return s.softmax(-1).nan_to_num(0.0)


def _blocks(p: Tensor, side: int, reduce: str) -> Tensor:
    (n, m), pool = p.shape[2:], {"sum": lambda c: c.sum((2, 3)), "max": lambda c: c.amax((2, 3))}[reduce]
    rows = [[pool(p[:, :, i : i + side, j : j + side]) for j in range(0, m, side)] for i in range(0, n, side)]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


@pytest.mark.parametrize("n", [1, 63, 100, 257])
def test_the_target_is_the_pooled_maximum_over_its_row(n: int) -> None:
    q, k, v = 2 * _rand(0, 2, 4, n, 8), 2 * _rand(1, 2, 2, n, 8), _rand(2, 2, 2, n, 5)
    mask = Mask(causal=True, keys=torch.arange(n) >= torch.tensor([[0], [n // 2]]))
    peak = _blocks(_full(q, k, mask), 32, "max")
    total = peak.sum(-1, keepdim=True)
    expected = torch.where(total > 0, peak / total, 0.0)
    nb = -(-n // 32)
    triple = seer_attention(q, k, v, torch.ones(2, 4, nb, nb), top=1, mask=mask, side=32, target=True)
    assert triple.target is not None
    torch.testing.assert_close(triple.target, expected, rtol=1e-9, atol=1e-12)
    assert (n < 64) or (triple.target.sum(-1) == 0).any()
    shared = seer_attention(q, k, v, torch.ones(2, 2, nb, nb), threshold=0.0, mask=mask, side=32, target=True).target
    peak = torch.maximum(peak[:, ::2], peak[:, 1::2])
    assert shared is not None
    torch.testing.assert_close(shared, peak / peak.sum(-1, keepdim=True).clamp(min=1e-300), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(seer_target(_blocks(_full(q, k, mask), 32, "max"), 2), shared)


def test_blocks_are_selected_by_threshold_or_rank() -> None:
    gate = torch.tensor([[1.0, 0, 0, 0], [0.7, 0.3, 0, 0], [0.1, 0.85, 0.05, 0], [0.2, 0.4, 0.3, 0.1]])[None, None]

    def rows(**how: Any) -> list[str]:
        return ["".join("x" if on else "." for on in row) for row in select_blocks(gate, **how)[0, 0].tolist()]

    assert rows(threshold=0.0) == ["x...", "xx..", "xxx.", "xxxx"]
    assert rows(threshold=0.3) == ["x...", "xx..", ".xx.", ".xxx"]
    assert rows(threshold=0.3, always=()) == ["x...", "xx..", ".x..", ".xx."]
    assert rows(threshold=0.9, always=("first", "diagonal")) == ["x...", "xx..", "x.x.", "x..x"]
    assert rows(top=1) == ["x...", ".x..", "..x.", "...x"]
    assert rows(top=2) == ["x...", "xx..", ".xx.", ".x.x"]
    assert rows(top=2, always=()) == ["x...", "xx..", "xx..", ".xx."]
    assert rows(top=1, always=("first", "diagonal")) == ["x...", "xx..", "x.x.", "x..x"]
    assert rows(top=9) == rows(threshold=0.0)
    # Rows of four tokens from position 6 on: 6..9 stand on blocks 1 and 2, 10..13 on blocks 2 and 3.
    assert rows(threshold=1.1, side=4, offset=6)[:2] == [".xx.", "..xx"]
    assert rows(threshold=0.0, side=4, offset=6)[:2] == ["xxx.", "xxxx"]


FORMS = [("reference", torch.float64), ("cpu", torch.float64), ("triton", torch.float32), ("triton", torch.bfloat16)]


def _triple(n: int, dtype: torch.dtype, impl: str, order: Tensor | None = None, **how: Any) -> tuple[SeerTriple, Mask]:
    offset = 5 if n == 63 else 0
    keys = torch.arange(n + offset) >= torch.tensor([[0], [n // 3]])
    mask = Mask(causal=True, offset=offset, keys=keys)
    q, k, v = _rand(0, 2, 4, n, 24, dtype=dtype), _rand(1, 2, 2, n + offset, 24, dtype=dtype), None
    v = _rand(2, 2, 2, n + offset, 20, dtype=dtype)
    if order is not None:
        q, k = q[..., order], k[..., order]
    side = how.pop("side", 16)
    gate = _rand(3, 2, 2 if how.pop("shared", False) else 4, -(-n // side), -(-(n + offset) // side)).softmax(-1)
    return seer_attention(q, k, v, gate, mask=mask, side=side, impl=impl, **how), mask


def _expected(triple: SeerTriple, n: int, mask: Mask, dtype: torch.dtype, side: int = 16) -> tuple[Tensor, Tensor]:
    """Output and executed map in float64, from the dense weights of the blocks that were kept."""
    q, k = _rand(0, 2, 4, n, 24, dtype=dtype), _rand(1, 2, 2, n + mask.offset, 24, dtype=dtype)
    v = _rand(2, 2, 2, n + mask.offset, 20, dtype=dtype).double()
    p = _full(q, k, mask, triple.kept, side)
    return p @ v.repeat_interleave(2, 1), _blocks(p, side, "sum")


HOW: list[dict[str, Any]] = [{"threshold": 0.0}, {"threshold": 0.3}, {"top": 2}, {"top": 2, "shared": True}]


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("n", [1, 63, 100, 257])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_the_executed_map_and_output_are_dense_attention_on_the_kept_blocks(
    impl: str, n: int, how: dict[str, Any]
) -> None:
    triple, mask = _triple(n, torch.float64, impl, **how)
    output, executed = _expected(triple, n, mask, torch.float64)
    assert triple.impl == impl
    assert triple.target is None
    torch.testing.assert_close(triple.output, output, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(triple.executed, executed, rtol=1e-9, atol=1e-12)
    assert (triple.executed[~triple.kept] == 0).all()
    if how == {"threshold": 0.0}:
        p = _full(_rand(0, 2, 4, n, 24), _rand(1, 2, 2, n + mask.offset, 24), mask)
        torch.testing.assert_close(triple.executed, _blocks(p, 16, "sum"), rtol=1e-9, atol=1e-12)
    chosen = {name: value for name, value in how.items() if name != "shared"}
    selected = select_blocks(triple.gate, **chosen, side=16, offset=mask.offset)
    assert torch.equal(triple.kept, selected.repeat_interleave(4 // selected.shape[1], 1))
    # Every token that is not padding has all of its mass on blocks that ran.
    alive = mask.keys[:, mask.offset :] if mask.keys is not None else None
    assert alive is not None
    tokens = torch.stack([part.sum(1) for part in alive.split(16, 1)], -1)
    torch.testing.assert_close(triple.executed.sum(-1), tokens[:, None].expand(2, 4, -1).double())
    if how.get("shared"):
        assert torch.equal(triple.kept[:, ::2], triple.kept[:, 1::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 63])
def test_the_triton_form_stays_within_the_error_budget(
    n: int, dtype: torch.dtype, assert_within_budget: Callable[[Tensor, Sequence[Tensor], Tensor], None]
) -> None:
    triple, mask = _triple(n, dtype, "triton", top=2, target=True)
    assert triple.impl == "triton"
    assert triple.target is not None
    output, executed = _expected(triple, n, mask, dtype)
    orders = [torch.randperm(24, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    low = [_triple(n, dtype, "reference", order, top=2, target=True)[0] for order in orders]
    peak = _blocks(
        _full(_rand(0, 2, 4, n, 24, dtype=dtype), _rand(1, 2, 2, n + mask.offset, 24, dtype=dtype), mask), 16, "max"
    )
    assert_within_budget(triple.executed, [one.executed for one in low], executed)
    assert_within_budget(triple.target, [one.target for one in low if one.target is not None], seer_target(peak))
    v = _rand(2, 2, 2, n + mask.offset, 20, dtype=dtype).repeat_interleave(2, 1)
    plain = []
    for order in orders:
        q, k = _rand(0, 2, 4, n, 24, dtype=dtype)[..., order], _rand(1, 2, 2, n + mask.offset, 24, dtype=dtype)
        plain.append(_full(q, k[..., order], mask, triple.kept, 16).to(dtype) @ v)
    assert_within_budget(triple.output, plain, output)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_gradients_are_those_of_dense_attention_on_the_kept_blocks(impl: str) -> None:
    dtype = torch.float64 if impl == "cpu" else torch.float32
    q, k, v = (_rand(i, 1, h, 40, 16, dtype=dtype).requires_grad_() for i, h in enumerate((2, 1, 1)))
    gate = _rand(3, 1, 2, 3, 3, dtype=dtype).softmax(-1).requires_grad_()
    triple = seer_attention(q, k, v, gate, top=2, side=16, target=True, impl=impl)
    assert triple.target is not None
    assert not triple.target.requires_grad
    weights = _rand(4, 1, 2, 40, 16), _rand(5, 1, 2, 3, 3)
    loss = (triple.output.double() * weights[0]).sum() + (triple.executed.double() * weights[1]).sum()
    got = torch.autograd.grad(loss, [q, k, v, gate], allow_unused=True)
    assert got[3] is None
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    p = _full(exact[0], exact[1], Mask(causal=True), triple.kept, 16)
    loss = (p @ exact[2] * weights[0]).sum() + (_blocks(p, 16, "sum") * weights[1]).sum()
    close = {"rtol": 1e-9, "atol": 1e-12} if impl == "cpu" else {"rtol": 1e-4, "atol": 1e-5}
    for a, b in zip(got, torch.autograd.grad(loss, exact), strict=False):
        torch.testing.assert_close(a.double(), b, **close)


class _Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = AttnGate(2, 1, 8, gate=8, block=16)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        triple = seer_attention(q, k, v, self.gate(q, k), top=2, side=16, target=True)
        assert triple.target is not None
        return triple.output, triple.executed, distillation_loss(triple.gate, triple.target)


def test_a_gated_layer_compiles_whole_and_exports() -> None:
    layer = _Layer()
    q, k, v = _rand(0, 1, 2, 50, 8).float(), _rand(1, 1, 1, 50, 8).float(), _rand(2, 1, 1, 50, 8).float()
    expected = layer(q, k, v)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    exported = torch.export.export(layer, (q, k, v)).module()
    for got in (compiled(q, k, v), exported(q, k, v)):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    compiled(q, k, v)[2].backward()
    once = [weight.grad.clone() for weight in layer.parameters() if weight.grad is not None]
    layer.zero_grad()
    expected[2].backward()
    assert len(once) == 2
    for a, weight in zip(once, layer.parameters(), strict=True):
        torch.testing.assert_close(a, weight.grad)


def _pooling() -> Any:
    spec = importlib.util.spec_from_file_location("seer_pooling", BENCHMARKS / "seer_pooling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [32, 64])
def test_the_benchmark_baseline_is_attention_and_its_pooled_maximum(block: int, dtype: torch.dtype) -> None:
    q, k, v = (
        _rand(0, 1, 2, 192, 16, dtype=dtype),
        _rand(1, 1, 2, 192, 16, dtype=dtype),
        _rand(2, 1, 2, 192, 32, dtype=dtype),
    )
    output, pooled = _pooling().seer_max_pool(q, k, v, block)
    p = _full(q, k, Mask(causal=True))
    small = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(output.double(), p @ v.double(), rtol=small, atol=small)
    # A base-2 score s is rounded to within |s| / 256, which multiplies its weight by at most 2 to that; then p is rounded too.
    largest = float((q.double() @ k.double().mT).abs().max()) * 16**-0.5 * math.log2(math.e)
    bound = 2 ** (largest / 256) * (1 + 2**-8) - 1
    assert bound < 0.05
    torch.testing.assert_close(pooled.double(), _blocks(p, block, "max"), rtol=bound, atol=0)
    with pytest.raises(ValueError, match="block is one of"):
        _pooling().seer_max_pool(q, k, v, 128)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_benchmark_baseline_compiles_ahead_of_time(
    capability: int, compiled_for: Callable[[int, str], list[str]]
) -> None:
    assert compiled_for(capability, "aot_seer:pooling") == 3 * ["seer_max_pool_kernel"]


MAP = torch.ones(1, 2, 3, 3)
Q, K = torch.zeros(1, 2, 40, 8), torch.zeros(1, 1, 40, 8)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: seer_target(MAP[0]), "block_max is floating point"),
        (lambda: seer_target(MAP, 3), "groups must divide the 2 heads of block_max; got 3"),
        (lambda: select_blocks(MAP), "exactly one of them is given"),
        (lambda: select_blocks(MAP, threshold=0.1, top=2), "exactly one of them is given"),
        (lambda: select_blocks(MAP, threshold=-0.1), "threshold is a gate value"),
        (lambda: select_blocks(MAP, top=0), "top is a positive integer"),
        (lambda: select_blocks(MAP, top=1, always="last"), "always: no 'last'; known: diagonal, first"),
        (lambda: select_blocks(MAP, top=1, offset=-1), "offset is a number of tokens"),
        (lambda: select_blocks(MAP > 0, top=1), "gate is floating point"),
        (lambda: seer_attention(Q, K, K, MAP, top=1, side=0), "side is a positive integer"),
        (lambda: seer_attention(Q, K, K, MAP, top=1), r"gate_map is \[B, H or G, Q/side, K/side\] = \[1, 2, 1, 1\]"),
        (lambda: seer_attention(Q, K, K, MAP, top=1, side=16, mask=Mask()), "mask is causal here"),
        (lambda: seer_attention(Q, K, K, MAP, side=16), "threshold or top"),
        (lambda: seer_attention(Q[0], K, K, MAP, top=1, side=16), "q is a tensor"),
        (lambda: seer_attention(Q, K, K, MAP, top=1, side=16, impl="cuda"), "impl: no form 'cuda'"),
    ],
)
def test_bad_arguments_raise_one_error_naming_them(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
