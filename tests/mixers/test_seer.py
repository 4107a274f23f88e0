"""SeerAttention: the three maps against their formulas, prefill and decoding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.seer import AttnGate
from workbench.mixers.seer import seer_attention, seer_decode_attention, seer_gate, token_gate

Operator = Callable[..., tuple[Tensor, AttentionMap]]
N, SIDE, BLOCKS = 11, 3, 4


def drawn(gate: tuple[int, ...]) -> dict[str, Tensor]:
    shapes = {"q": (2, 4, N, 6), "k": (2, 2, N, 6), "v": (2, 2, N, 5), "gate": gate}
    given = example_tensors(2, torch.float64, **shapes)
    rows = torch.arange(gate[2])[:, None] * (SIDE if gate[2] == BLOCKS else 1)
    hidden = torch.arange(BLOCKS) * SIDE > rows
    return {**given, "gate": given["gate"].masked_fill(hidden, -math.inf).softmax(-1)}


def dense(given: dict[str, Tensor], allowed: Tensor | None = None) -> Tensor:
    keys = given["k"].repeat_interleave(2, 1)
    s = (given["q"] @ keys.transpose(-1, -2) / math.sqrt(6)).masked_fill(
        torch.ones(N, N, dtype=torch.bool).triu(1), -math.inf
    )
    return (s if allowed is None else s.masked_fill(~allowed, -math.inf)).softmax(-1)


def chosen(gate: Tensor, rule: Callable[[Tensor, int], set[int]], row_side: int) -> Tensor:
    """Token pairs of the blocks that ``rule(gate row, own block)`` names, bool ``[B, H, N, N]``."""
    b, h = gate.shape[:2]
    out = torch.zeros(b, h, N, N, dtype=torch.bool)
    for bi in range(b):
        for hi in range(h):
            for i in range(N):
                for block in rule(gate[bi, hi, i // row_side], i // SIDE):
                    out[bi, hi, i, block * SIDE : (block + 1) * SIDE] = True
    return out


def above(threshold: float) -> Callable[[Tensor, int], set[int]]:
    return lambda row, own: {own, *(j for j in range(own) if float(row[j]) >= threshold)}


def best_of(top: int) -> Callable[[Tensor, int], set[int]]:
    return lambda row, own: {own, *sorted(range(own), key=lambda j: -float(row[j]))[: top - 1]}


def agrees(op: Operator, given: dict[str, Tensor], wanted: Tensor, **options: Any) -> AttentionMap:
    out, found = op(**given, side=SIDE, mask=Mask(causal=True), **options)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ given["v"].repeat_interleave(2, 1))
    return found


def gated_blocks_of_prefill(op: Operator) -> None:
    """Threshold 0 is causal attention, a threshold and a budget read the blocks their rule names, and the target is the block
    maximum of full attention over its row sum."""
    given = drawn((2, 4, BLOCKS, BLOCKS))
    plain = dense(given)
    found = agrees(op, given, plain, threshold=0.0)
    cells = torch.nn.functional.pad(plain, (0, 1, 0, 1)).unflatten(3, (BLOCKS, SIDE)).unflatten(2, (BLOCKS, SIDE))
    peak = cells.amax((3, 5))
    torch.testing.assert_close(found.target.dense(), peak / peak.sum(-1, keepdim=True))
    torch.testing.assert_close(found.native().dense(), given["gate"])
    for options, rule in (({"threshold": 0.3}, above(0.3)), ({"top": 2}, best_of(2))):
        agrees(op, given, dense(given, chosen(given["gate"], rule, SIDE)), **options)


def gated_blocks_of_a_token(op: Operator) -> None:
    """Decoding: threshold 0 is causal attention, every token reads the blocks of its own gate row, shared by a group of heads;
    the target is the group's largest weight of a block over its row sum."""
    given = drawn((2, 2, N, BLOCKS))
    plain = dense(given)
    found = agrees(op, given, plain, threshold=0.0)
    peak = torch.nn.functional.pad(plain, (0, 1)).unflatten(3, (BLOCKS, SIDE)).amax(-1).unflatten(1, (2, 2)).amax(2)
    torch.testing.assert_close(found.target.dense(), peak / peak.sum(-1, keepdim=True))
    torch.testing.assert_close(found.native().dense(), given["gate"])
    for options, rule in (({"threshold": 0.3}, above(0.3)), ({"top": 2}, best_of(2))):
        allowed = chosen(given["gate"], rule, 1).repeat_interleave(2, 1)
        agrees(op, given, dense(given, allowed), **options)


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "seer-attention": gated_blocks_of_prefill,
    "seer-attention-r": gated_blocks_of_a_token,
}


def test_a_shared_gate_selects_for_its_group() -> None:
    given = drawn((2, 2, BLOCKS, BLOCKS))
    _, found = seer_attention(**given, top=2, side=SIDE)
    assert found.gate.shape == (2, 2, BLOCKS, BLOCKS)
    assert torch.equal(found.kept[:, 0], found.kept[:, 1])
    assert found.target.shape == found.gate.shape
    assert torch.equal(found.blocks(SIDE) > 0, found.kept)
    assert found.row_sum == "1"
    assert seer_attention(**given, top=2, side=SIDE, always=())[1].row_sum == "<=1"


def test_the_gate_is_that_of_the_module() -> None:
    module = AttnGate(4, 2, 6, gate=8, block=SIDE, seed=1).double()
    q, k = torch.randn(2, 4, N, 6, dtype=torch.float64), torch.randn(2, 2, N, 6, dtype=torch.float64)
    query, key = module.query.detach().requires_grad_(), module.key.detach()
    gate = seer_gate(q, k, query, key, side=SIDE, mask=Mask(causal=True))
    torch.testing.assert_close(gate, module(q, k))
    assert bool(torch.autograd.grad(gate.square().sum(), query)[0].any())
    with pytest.raises(WorkbenchError, match="gate is an even width"):
        seer_gate(q, k, torch.zeros(4, 6, 5), torch.zeros(2, 18, 5), side=SIDE, mask=Mask(causal=True))
    with pytest.raises(WorkbenchError, match="key is floating point"):
        seer_gate(q, k, query, key[:1], side=SIDE, mask=Mask(causal=True))


def test_the_gate_of_a_token_is_its_formula_and_knows_nothing_later() -> None:
    given = example_tensors(4, torch.float64, q=(1, 4, N, 6), k=(1, 2, N, 6), query=(2, 12, 8), key=(2, 18, 8))
    gate = token_gate(**given, side=SIDE)
    i, group = 10, 1

    def turned(x: Tensor, position: int) -> Tensor:
        angle = torch.tensor([position * 10000 ** (-2 * c / 8) for c in range(4)], dtype=torch.float64)
        whole = torch.complex(x[:4], x[4:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([whole.real, whole.imag])

    left = turned(given["q"][0, 2:4, i].flatten() @ given["query"][group], i)
    scores = []
    for block in range(3):
        keys = given["k"][0, group, block * SIDE : (block + 1) * SIDE]
        pooled = torch.cat([keys.amax(0), keys.amin(0), keys.mean(0)]) @ given["key"][group]
        scores.append(left @ turned(pooled, block * SIDE) / math.sqrt(8))
    torch.testing.assert_close(gate[0, group, i, :3], torch.stack(scores).softmax(0))
    assert not gate[0, group, i, 3].any()
    assert not gate[:, :, :2].any()
    cut = token_gate(given["q"][:, :, 6:7], given["k"][:, :, :7], given["query"], given["key"], side=SIDE, offset=6)
    torch.testing.assert_close(cut, gate[:, :, 6:7, :3])


def test_decoding_step_by_step_is_the_row() -> None:
    given = drawn((2, 2, N, BLOCKS))
    whole, found = seer_decode_attention(**given, top=2, side=SIDE)
    last = {"q": given["q"][:, :, 10:], "gate": given["gate"][:, :, 10:]}
    step, row = seer_decode_attention(**{**given, **last}, top=2, side=SIDE, mask=Mask(causal=True, offset=10))
    torch.testing.assert_close(step, whole[:, :, 10:])
    torch.testing.assert_close(row.dense(), found.dense()[:, :, 10:])
    torch.testing.assert_close(row.target.dense(), found.target.dense()[:, :, 10:])


def test_long_texts_are_answered_in_blocks() -> None:
    """4,096 tokens in blocks of 256: statistics from the selected blocks."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 4096, 8) for _ in range(3))
    gate = torch.rand(1, 1, 16, 16).tril()
    with torch.no_grad():
        _, found = seer_attention(q, k, v, gate / gate.sum(-1, keepdim=True), top=3, side=256)
    mass = found.blocks(256)
    assert torch.equal(mass > 0, found.kept)
    torch.testing.assert_close(found.received().sum(), torch.tensor(4096.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("operator", "gate", "change", "words"),
    [
        (seer_attention, (2, 4, 4, 4), {}, "exactly one of them"),
        (seer_attention, (2, 4, 4, 4), {"top": 0}, "top"),
        (seer_attention, (2, 4, 4, 4), {"threshold": 0.1, "always": "last"}, "always"),
        (seer_attention, (2, 3, 4, 4), {"top": 1}, "gate is floating point"),
        (seer_attention, (2, 4, 4, 4), {"top": 1, "mask": Mask()}, "mask is causal"),
        (seer_decode_attention, (2, 2, 11, 4), {}, "exactly one of them"),
        (seer_decode_attention, (2, 2, 11, 4), {"top": -1}, "top is a positive"),
        (seer_decode_attention, (2, 4, 11, 4), {"top": 1}, "gate is floating point"),
    ],
)
def test_misfits_are_named(
    operator: Callable[..., Any], gate: tuple[int, ...], change: dict[str, Any], words: str
) -> None:
    with pytest.raises(WorkbenchError, match=words):
        operator(**{**drawn(gate), "side": SIDE, **change})
