import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from workbench.kernels.mask import Mask
from workbench.kernels.seer import AttnGate, distillation_loss, seer_target, select_blocks


def _rand(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _rope(x: Tensor, positions: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary positions as products of complex numbers."""
    half = x.shape[-1] // 2
    angle = positions[:, None].double() * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1).to(x)


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
    assert float(nothing.detach()) == 0.0


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
    s = _rope(q, at) @ _rope(k, at).mT * width**-0.5
    p = s.masked_fill(at > at[:, None], -math.inf).softmax(-1)
    peak = p.unflatten(3, (-1, side)).unflatten(2, (-1, side)).amax((3, 5))
    return q, k, seer_target(peak, 1 if shared else None)


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


MAP = torch.ones(1, 2, 3, 3)
Q, K = torch.zeros(1, 2, 40, 8), torch.zeros(1, 1, 40, 8)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: AttnGate(0, 1, 8), "heads is a positive integer; got 0"),
        (lambda: AttnGate(4, 3, 8), "kv_heads must divide the 4 heads; got 3"),
        (lambda: AttnGate(2, 1, 8, gate=7), "gate is an even width"),
        (lambda: AttnGate(2, 1, 8, block=1.5), "block is a positive integer; got 1.5"),
        (lambda: AttnGate(2, 1, 8, k_pool=("median",)), "k_pool holds some of max, min, avg"),
        (lambda: AttnGate(2, 1, 8, q_pool=()), "q_pool holds some of"),
        (lambda: AttnGate(2, 1, 8, theta=0.0), "theta is a positive base"),
        (lambda: AttnGate(2, 1, 8)(K, K), r"q is \[B, 2, tokens, 8\] for this gate; got \[1, 1, 40, 8\]"),
        (lambda: AttnGate(2, 1, 8)(Q, Q), r"k is \[B, 1, tokens, 8\] for this gate"),
        (lambda: AttnGate(2, 1, 8)(Q, K.long()), "k is floating point"),
        (lambda: AttnGate(2, 1, 8)(Q, K.expand(2, 1, 40, 8)), "k must share B=1 with q"),
        (lambda: AttnGate(2, 1, 8)(Q, K, mask=Mask()), "mask: a gate is causal"),
        (lambda: AttnGate(2, 1, 8)(Q, K, mask=Mask(causal=True, window=4)), "mask: a gate is causal"),
        (lambda: distillation_loss(MAP, MAP[:, :1]), "target has the gate's shape"),
        (lambda: distillation_loss(MAP, MAP, skip=1.0), "skip is a part of the rows"),
    ],
)
def test_bad_arguments_raise_one_error_naming_them(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()
