import importlib.util
import json
import math
import os
import subprocess
import sys
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


def _rope(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary positions as products of complex numbers."""
    half = x.shape[-1] // 2
    angle = positions[:, None].double() * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1).to(x)


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


def _gate_by_hand(gate: AttnGate, q: Tensor, k: Tensor, real_q: Tensor, real_k: Tensor, offset: int) -> Tensor:
    """One block, head and example at a time."""
    size, group = gate.block, gate.heads // gate.kv_heads
    pool = {"max": lambda x: x.amax(0), "min": lambda x: x.amin(0), "avg": lambda x: x.mean(0)}

    def pooled(x: Tensor, real: Tensor, names: Sequence[str]) -> Tensor:
        x = x[real]
        return torch.cat([pool[name](x) if len(x) else torch.zeros(x.shape[1]).to(x) for name in names])

    (b, _, n, _), m = q.shape, k.shape[2]
    maps = gate.kv_heads if gate.shared else gate.heads
    out = torch.zeros(b, maps, -(-n // size), -(-m // size), dtype=q.dtype)
    for e in range(b):
        for h in range(maps):
            heads = list(range(h * group, (h + 1) * group)) if gate.shared else [h]
            kv = h if gate.shared else h // group
            for i in range(out.shape[2]):
                rows = slice(i * size, min(n, (i + 1) * size))
                at = torch.arange(rows.start, rows.stop)[real_q[e, rows]] + offset
                if not len(at):
                    continue
                wide = torch.cat([pooled(q[e, x, rows], real_q[e, rows], gate.q_pool) for x in heads]) @ gate.query[h]
                wide = _rope(wide[None], torch.tensor([rows.start + offset]))[0]
                logits = {}
                for j in range(out.shape[3]):
                    columns = slice(j * size, min(m, (j + 1) * size))
                    there = torch.arange(columns.start, columns.stop)[real_k[e, columns]]
                    if len(there) and there[0] <= at[-1]:
                        key = pooled(k[e, kv, columns], real_k[e, columns], gate.k_pool) @ gate.key[kv]
                        key = _rope(key[None], torch.tensor([columns.start]))[0]
                        logits[j] = wide @ key / math.sqrt(len(wide))
                for j, p in zip(logits, torch.tensor(list(logits.values())).softmax(0), strict=True):
                    out[e, h, i, j] = p
    return out


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("n", "offset", "padded"),
    [(1, 0, False), (63, 0, True), (100, 0, False), (257, 0, True), (40, 23, True), (7, 30, False)],
)
def test_the_gate_is_its_formula_block_by_block(n: int, offset: int, padded: bool, shared: bool) -> None:
    m = n + offset
    gate = AttnGate(4, 2, 6, gate=8, block=16, q_pool=("avg", "max"), shared=shared, seed=3).double()
    q, k = 2 * _rand(0, 2, 4, n, 6), 2 * _rand(1, 2, 2, m, 6)
    keys = torch.arange(m) >= torch.tensor([[0], [m // 2 + 1]]) if padded else torch.ones(2, m, dtype=torch.bool)
    keys = keys & (torch.arange(m) % 5 != 3) if padded else keys
    real = keys[:, offset:]
    nan = float("nan")
    dirty = q.masked_fill(~real[:, None, :, None], nan), k.masked_fill(~keys[:, None, :, None], nan)
    got = gate(*dirty, mask=Mask(causal=True, offset=offset, keys=keys if padded else None))
    with torch.no_grad():
        expected = _gate_by_hand(gate, q, k, real, keys, offset)
    torch.testing.assert_close(got.detach(), expected, rtol=1e-9, atol=1e-12)
    total = got.detach().sum(-1)
    assert ((total - 1).abs() < 1e-12).logical_or(total == 0).all()
    assert (total == 0).any() == (padded and n > 40)
    got.square().sum().backward()
    for weight in gate.parameters():
        assert weight.grad is not None
        assert torch.isfinite(weight.grad).all()
        assert weight.grad.any() or got.shape[3] == 1  # a single block has gate 1 whatever the weights


def test_the_gate_takes_queries_of_its_own_padding_and_narrow_floats() -> None:
    gate = AttnGate(2, 1, 8, gate=8, block=4)
    q, k = _rand(0, 1, 2, 12, 8, dtype=torch.bfloat16), _rand(1, 1, 1, 12, 8, dtype=torch.bfloat16)
    got = gate(q, k, mask=Mask(causal=True, queries=(torch.arange(12) < 8)[None]))
    assert got.dtype == torch.float32
    assert (got[:, :, 2] == 0).all()
    torch.testing.assert_close(
        got.detach()[:, :, :2], gate(q.float(), k.float()).detach()[:, :, :2], rtol=1e-4, atol=1e-5
    )


def test_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(5)
    a, state = AttnGate(2, 1, 8, seed=1), torch.get_rng_state()
    b, c = AttnGate(2, 1, 8, seed=1), AttnGate(2, 1, 8, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.query, b.query)
    assert torch.equal(a.key, b.key)
    assert not torch.equal(a.query, c.query)
    assert {name: tuple(p.shape) for name, p in a.named_parameters()} == {"query": (2, 8, 128), "key": (1, 24, 128)}


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


def test_the_loss_is_the_mean_divergence_of_the_later_rows() -> None:
    gate, target = (_rand(seed, 2, 3, 9, 9).tril().exp().tril() for seed in (0, 1))
    gate, target = gate / gate.sum(-1, keepdim=True), target / target.sum(-1, keepdim=True)
    target[0, 1, 5] = 0.0
    gate[1, 2, 8, 3], target[1, 2, 8, 4] = 0.0, 0.0
    gate.requires_grad_()
    target.requires_grad_()
    for skip, first in ((0.25, 2), (0.0, 0), (0.5, 4)):
        terms = []
        for row_t, row_g in zip(
            target.detach()[:, :, first:].flatten(0, 2), gate.detach()[:, :, first:].flatten(0, 2), strict=True
        ):
            pairs = [(float(t), max(float(g), 2.2250738585072014e-308)) for t, g in zip(row_t, row_g, strict=True)]
            if any(t for t, _ in pairs):
                terms.append(sum(t * math.log(t / g) for t, g in pairs if t))
        loss = distillation_loss(gate, target, skip=skip)
        torch.testing.assert_close(float(loss.detach()), sum(terms) / len(terms), rtol=1e-12, atol=0)
    got = torch.autograd.grad(distillation_loss(gate, target), [gate, target], allow_unused=True)
    assert torch.isfinite(got[0]).all()
    assert (got[0][:, :, :2] == 0).all()
    assert (got[0][:, :, 2:].tril(2) != 0).any()
    assert got[1] is None
    assert float(distillation_loss(target.detach(), target)) == pytest.approx(0.0, abs=1e-12)
    nothing = distillation_loss(gate, torch.zeros_like(gate))
    assert float(nothing) == 0.0


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


def _planted(count: int, seed: int, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys before rotary positions, and the target: blocks hold topics, queries look for their topic's partner."""
    n, side, width, heads = 512, 16, 32, 2
    fixed = torch.Generator().manual_seed(99)
    slow = torch.arange(width) % (width // 2) >= width // 4  # channels that turn little over the sequence
    topics = torch.randn(12, width, generator=fixed) * slow
    partner = torch.stack([torch.randperm(12, generator=fixed) for _ in range(heads)])
    g = torch.Generator().manual_seed(seed)
    topic = torch.randint(12, (count, n // side), generator=g).repeat_interleave(side, 1)
    k = topics[topic][:, None] + 0.5 * torch.randn(count, 1, n, width, generator=g)
    q = 1.2 * topics[partner[:, topic]].transpose(0, 1) + 0.5 * torch.randn(count, heads, n, width, generator=g)
    at = torch.arange(n)
    p = _full(_rope(q, at), _rope(k, at), Mask(causal=True)).float()
    return q, k, seer_target(_blocks(p, side, "max"), 1 if shared else None)


def _recall(gate: Tensor, target: Tensor) -> float:
    """How many of the four largest target blocks of a row are among the gate's four, over rows that have a choice."""
    found, wanted = (select_blocks(x, top=4, always=())[:, :, 8:] for x in (gate, target))
    return float((found & wanted).sum() / wanted.sum())


@pytest.mark.parametrize(("shared", "left"), [(False, 0.2), (True, 0.5)])
def test_a_few_dozen_steps_teach_the_gate_where_attention_looks(shared: bool, left: float) -> None:
    q, k, target = _planted(6, 0, shared)
    new_q, new_k, new_target = _planted(4, 1, shared)
    gate = AttnGate(2, 1, 32, gate=32, block=16, shared=shared)
    with torch.no_grad():
        untrained = gate(new_q, new_k)
    adam = torch.optim.Adam(gate.parameters(), lr=1e-2)
    for _ in range(60):
        adam.zero_grad()
        distillation_loss(gate(q, k), target).backward()
        adam.step()
    with torch.no_grad():
        trained = gate(new_q, new_k)
    assert distillation_loss(trained, new_target) < left * distillation_loss(untrained, new_target)
    assert _recall(untrained, new_target) < 0.4
    assert _recall(trained, new_target) > 0.6


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
def test_the_benchmark_baseline_compiles_ahead_of_time(capability: int) -> None:
    paths = os.pathsep.join([str(HERE), str(BENCHMARKS)])
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_ahead.py"), str(capability), "aot_seer:pooling"],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["kernel"] for line in done.stdout.splitlines()] == 3 * ["seer_max_pool_kernel"]


MAP = torch.ones(1, 2, 3, 3)
Q, K = torch.zeros(1, 2, 40, 8), torch.zeros(1, 1, 40, 8)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: AttnGate(0, 1, 8), "heads is a positive integer; got 0"),
        (lambda: AttnGate(4, 3, 8), "kv_heads must divide the 4 heads; got 3"),
        (lambda: AttnGate(2, 1, 8, gate=7), "gate is an even width"),
        (lambda: AttnGate(2, 1, 8, block=1.5), "block is a positive integer; got 1.5"),  # type: ignore[arg-type]
        (lambda: AttnGate(2, 1, 8, k_pool=("median",)), "k_pool holds some of max, min, avg"),
        (lambda: AttnGate(2, 1, 8, q_pool=()), "q_pool holds some of"),
        (lambda: AttnGate(2, 1, 8, theta=0.0), "theta is a positive base"),
        (lambda: AttnGate(2, 1, 8)(K, K), r"q is \[B, 2, tokens, 8\] for this gate; got \[1, 1, 40, 8\]"),
        (lambda: AttnGate(2, 1, 8)(Q, Q), r"k is \[B, 1, tokens, 8\] for this gate"),
        (lambda: AttnGate(2, 1, 8)(Q, K.long()), "k is floating point"),
        (lambda: AttnGate(2, 1, 8)(Q, K.expand(2, 1, 40, 8)), "k must share B=1 with q"),
        (lambda: AttnGate(2, 1, 8)(Q, K, mask=Mask()), "mask: a gate is causal"),
        (lambda: AttnGate(2, 1, 8)(Q, K, mask=Mask(causal=True, window=4)), "mask: a gate is causal"),
        (lambda: seer_target(MAP[0]), "block_max is floating point"),
        (lambda: seer_target(MAP, 3), "groups must divide the 2 heads of block_max; got 3"),
        (lambda: distillation_loss(MAP, MAP[:, :1]), "target has the gate's shape"),
        (lambda: distillation_loss(MAP, MAP, skip=1.0), "skip is a part of the rows"),
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
