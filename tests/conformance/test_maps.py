"""The conformance suite of attention maps. A new representation adds one line to ``MAPS``.

Every oracle here is literal: the mask is a Python condition per pair, the weights are a float64 softmax over that table.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench import attention_map, mods
from workbench.captures import capture
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.pairs import chunks as blocked
from workbench.maps import AttentionMap, DenseMap, GatedMap, SummaryMap
from workbench.mixers.softmax import gated_softmax_attention, softmax_attention
from workbench.patterns.algebra import HeadsMap, KeysMap, ProductMap, QueriesMap, SumMap
from workbench.patterns.arranged import BatchMap, LastRowsMap, PermutedMap, SomeHeadsMap
from workbench.patterns.delta import DeltaMap
from workbench.patterns.diagonal import DiagonalMap
from workbench.patterns.fourier import FourierMap
from workbench.patterns.lazy import LazyMap
from workbench.patterns.linear import ChannelDecayMap, LinearMap
from workbench.patterns.prefix import PrefixSoftmaxMap
from workbench.patterns.probed import ProbedMap
from workbench.patterns.selective import SelectiveScanMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.sparse import SparseMap
from workbench.patterns.state import StateMap, dplr
from workbench.patterns.toeplitz import ToeplitzMap
from workbench.patterns.union import UnionMap
from workbench.patterns.windows import WindowsMap

B, H, G, N, E = 2, 4, 2, 13, 6


@dataclass
class Case:
    """A map, the same as float64 numbers ``[B, H, Q, K]``, values and what the operator made of them."""

    map: AttentionMap
    dense: Tensor
    v: Tensor
    out: Tensor
    tolerance: float = 1e-10
    rounding: float = 1e-10
    """Of values and output, which have the operator's own type."""


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(
    mask: Mask,
    allowed: Callable[[int, int, int], bool],
    *,
    queries: int = N,
    keys: int = N,
    kv: int = G,
    dtype: torch.dtype = torch.float64,
    gate: Tensor | None = None,
    direct: bool = False,
    **options: Any,
) -> Case:
    """Softmax attention; ``allowed(b, i, j)`` says with absolute positions who sees whom."""
    q, k, v = rand(0, B, H, queries, E).to(dtype), rand(1, B, kv, keys, E).to(dtype), rand(2, B, kv, keys, 3).to(dtype)
    if gate is not None:
        out, amap = gated_softmax_attention(q, k, v, gate, mask=mask, **options)
    else:
        out, amap = softmax_attention(q, k, v, mask=mask, **options)
    if direct:
        amap = SoftmaxMap(q, k, mask=mask, **options)
    spread = [h * kv // H for h in range(H)]
    scores = options.get("scale", E**-0.5) * q.double() @ k.double()[:, spread].transpose(-1, -2)
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    if "bias" in options:
        bias = options["bias"] if isinstance(options["bias"], Tensor) else options["bias"](0, queries)
        scores = scores + bias
    table = [[[allowed(b, i + mask.offset, j) for j in range(keys)] for i in range(queries)] for b in range(B)]
    scores = scores.masked_fill(~torch.tensor(table)[:, None], float("-inf"))
    if "sink" in options:
        column = options["sink"].double()[None, :, None, None].expand(B, H, queries, 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1).nan_to_num(0.0)
    if gate is not None:
        weights = weights * gate[..., None]
    exact = dtype == torch.float64
    return Case(amap, weights, v, out, 1e-10 if exact else 1e-5, 1e-10 if exact else 4 * torch.finfo(dtype).eps)


def dense(weights: Tensor, **options: Any) -> Case:
    v = rand(2, weights.shape[0], options.get("kv_heads", weights.shape[1]), weights.shape[3], 3)
    spread = v.repeat_interleave(weights.shape[1] // v.shape[1], 1)
    tolerance = 1e-10 if weights.dtype == torch.float64 else 1e-5
    out = weights.double() @ spread
    return Case(AttentionMap.from_dense(weights, **options), weights.double(), v, out, tolerance, tolerance)


def over(case: Case, gate: Tensor) -> Case:
    """A gate put on another map."""
    out = case.out * gate[..., None]
    return Case(GatedMap(case.map, gate), case.dense * gate[..., None], case.v, out, case.tolerance, case.rounding)


def made(amap: AttentionMap, weights: Tensor) -> Case:
    """A map that claims to have these weights; values have a head per value head of the map."""
    v = rand(2, weights.shape[0], amap.kv_heads, weights.shape[3], 3)
    return Case(amap, weights, v, weights @ v.repeat_interleave(weights.shape[1] // amap.kv_heads, 1))


def of(weights: Tensor, **options: Any) -> AttentionMap:
    return AttentionMap.from_dense(weights, **{"offset": 0, **options})


def sparse(signed: bool, twice: bool, **options: Any) -> Case:
    """Five weights per row at random keys, some absent; with ``twice`` a key can come twice in a row."""
    order = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(i)) for i in range(N)])[:, :5]
    at = order.expand(B, H, N, 5).clone()
    at[:, 1, :, 2] = -1
    at[0, 2, 3] = -1
    if twice:
        at[..., 4] = at[..., 0]
    weights = rand(12, B, H, N, 5) if signed else rand(12, B, H, N, 5).softmax(-1)
    dense = torch.zeros(B, H, N, N, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for i in range(N):
                for s in range(5):
                    if at[b, h, i, s] >= 0:
                        dense[b, h, i, at[b, h, i, s]] += weights[b, h, i, s]
    return made(SparseMap(at, weights, N, **options), dense)


def permuted() -> Case:
    weights = rand(3, B, H, N, N).softmax(-1)
    rows = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(h)) for h in range(H)])[None]
    columns = torch.randperm(N, generator=torch.Generator().manual_seed(9))
    wanted = torch.stack([weights[:, h][:, rows[0, h]][:, :, columns] for h in range(H)], 1)
    return made(PermutedMap(of(weights), rows, columns), wanted)


def batch() -> Case:
    places = [torch.tensor([1, 2, 5, 7, 8]), torch.arange(N)]
    parts = [rand(3 + b, 1, H, len(at), len(at)).softmax(-1) for b, at in enumerate(places)]
    wanted = torch.zeros(2, H, N, N, dtype=torch.float64)
    for b, at in enumerate(places):
        wanted[b, :, at[:, None], at] = parts[b][0]
    return made(BatchMap([of(part, kv_heads=G) for part in parts], places, N), wanted)


def windowed() -> Case:
    parts = rand(3, 3 * B, H, 4, 4).softmax(-1)
    places = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    wanted = torch.zeros(B, H, 12, 12, dtype=torch.float64)
    for b in range(B):
        for w, at in enumerate(places.view(3, 4)):
            wanted[b, :, at[:, None], at] = parts[3 * b + w]
    return made(WindowsMap(of(parts, kv_heads=G), places), wanted)


def decayed(causal: bool) -> Case:
    q, k = rand(3, B, H, N, E), rand(4, B, G, N, E)
    steps = -rand(5, B, H, N).abs() if causal else None
    weights = q @ k.repeat_interleave(H // G, 1).transpose(-1, -2)
    for i in range(N if causal else 0):
        for j in range(N):
            weights[:, :, i, j] *= steps[:, :, j + 1 : i + 1].sum(-1).exp() if j <= i else 0.0
    return made(LinearMap(q, k, steps, causal=causal), weights)


def channel_decayed() -> Case:
    q, k, steps = rand(3, B, H, N, E), rand(4, B, H, N, E), -rand(5, B, H, N, E).abs()
    weights = torch.zeros(B, H, N, N, dtype=torch.float64)
    for i in range(N):
        for j in range(i + 1):
            weights[:, :, i, j] = (q[:, :, i] * k[:, :, j] * steps[:, :, j + 1 : i + 1].sum(2).exp()).sum(-1)
    return made(ChannelDecayMap(q, k, steps), weights)


def carried(read: Tensor, write: Tensor, step: Callable[[Tensor, int], Tensor]) -> Tensor:
    """M_ij = read_i^T A_i ... A_{j+1} write_j, one row at a time; ``step(r, t)`` is r A_t."""
    weights = torch.zeros(B, H, N, N, dtype=torch.float64)
    for i in range(N):
        row = read[:, :, i]
        for j in range(i, -1, -1):
            weights[:, :, i, j] = (row * write[:, :, j]).sum(-1)
            row = step(row, j)
    return weights


def delta_rule() -> Case:
    q, k, beta, decay = rand(3, B, H, N, E), rand(4, B, H, N, E), rand(5, B, H, N).sigmoid(), -rand(6, B, H, N).abs()
    k = k / k.norm(dim=-1, keepdim=True)

    def step(row: Tensor, t: int) -> Tensor:
        erased = row - (row * k[:, :, t]).sum(-1, keepdim=True) * beta[:, :, t, None] * k[:, :, t]
        return erased * decay[:, :, t, None].exp()

    return made(DeltaMap(q, k, beta, decay, scale=0.5), carried(0.5 * q, beta[..., None] * k, step))


def state() -> Case:
    read, write, keep, x, y = (rand(seed, B, H, N, E) for seed in (3, 4, 5, 6, 7))
    keep, x, y = keep.sigmoid(), 0.3 * x, 0.3 * y

    def step(row: Tensor, t: int) -> Tensor:
        return row * keep[:, :, t] + (row * x[:, :, t]).sum(-1, keepdim=True) * y[:, :, t]

    return made(StateMap(read, write, dplr(keep, x, y)), carried(read, write, step))


def product() -> Case:
    left, right = rand(3, B, H, N, 4).softmax(-1), rand(4, B, H, 4, N).softmax(-1)
    return made(ProductMap(of(left), of(right, kv_heads=G)), left @ right)


def convolution(circular: bool, gated: bool = True) -> Case:
    """Five taps, the first two places ahead of the query."""
    kernel = rand(3, B, H, 5) if gated else rand(3, 1, H, 5).abs()
    left, right = (rand(4, B, H, N), rand(5, B, H, N)) if gated else (None, None)
    weights = torch.zeros(B if gated else 1, H, N, N, dtype=torch.float64)
    for i in range(N):
        for j in range(N):
            tap = (i - j + 2) % N if circular else i - j + 2
            if 0 <= tap < 5:
                weights[:, :, i, j] = kernel[:, :, tap]
                if left is not None and right is not None:
                    weights[:, :, i, j] *= left[:, :, i] * right[:, :, j]
    options = {"queries": N, "keys": N, "first": -2, "circular": circular, "kv_heads": G}
    return made(ToeplitzMap(kernel, left=left, right=right, **options), weights)


def convolution_on_a_grid() -> Case:
    """3 x 3 taps from a grid of 3 x 4 keys to one of 2 x 5 queries."""
    kernel, weights = rand(3, B, H, 3, 3), torch.zeros(B, H, 10, 12, dtype=torch.float64)
    for i in range(10):
        for j in range(12):
            row, column = i // 5 - j // 4 + 1, i % 5 - j % 4 + 2
            if 0 <= row < 3 and 0 <= column < 3:
                weights[:, :, i, j] = kernel[:, :, row, column]
    return made(ToeplitzMap(kernel, queries=(2, 5), keys=(3, 4), first=(-1, -2)), weights)


def fourier() -> Case:
    weights = torch.zeros(B, H, N, 2 * N, dtype=torch.float64)
    for i in range(N):
        for j in range(N):
            weights[:, :, i, j] = 0.5 * math.cos(2 * math.pi * i * j / N)
            weights[:, :, i, N + j] = 0.5 * math.sin(2 * math.pi * i * j / N)
    return made(FourierMap(B, H, N, scale=0.5, dtype=torch.float64, device=torch.device("cpu")), weights)


def selective_scan(skip: bool, real: bool) -> Case:
    step, a, d = rand(3, B, H, N).exp(), -rand(4, H, 3).exp(), rand(7, H) if skip else None
    write, read = rand(5, B, N, 3), rand(6, B, N, 3)
    weights = torch.zeros(B, H, N, N, dtype=torch.float64)
    for i in range(N):
        for j in range(i + 1):
            fade = (a * step[:, :, j + 1 : i + 1].sum(-1)[..., None]).exp()
            weights[:, :, i, j] = (read[:, None, i] * fade * write[:, None, j]).sum(-1) * step[:, :, j]
        weights[:, :, i, i] += 0.0 if d is None else d
    shown = REAL if real else torch.ones(B, N, dtype=torch.bool)
    weights = weights * (shown[:, None, :, None] & shown[:, None, None])
    return made(SelectiveScanMap(step, a, write, read, d, real=shown if real else None), weights)


def prefix_softmax(fades: bool) -> Case:
    scores, rate, bonus = rand(3, B, H, N), rand(4, H).abs(), rand(5, H)
    weights = torch.zeros(B, H, N, N, dtype=torch.float64)
    for i in range(N):
        for j in range(i + 1):
            extra = (bonus if i == j else -(i - 1 - j) * rate) if fades else torch.zeros(H, dtype=torch.float64)
            weights[:, :, i, j] = (scores[:, :, j] + extra).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return made(PrefixSoftmaxMap(scores, *((rate, bonus) if fades else ()), kv_heads=G), weights)


def union() -> Case:
    """The first two tokens, and a window of three that leaves them out: two tiles under one denominator."""
    q, k = rand(0, B, H, N, E), rand(1, B, G, N, E)
    scores = q @ k.repeat_interleave(H // G, 1).transpose(-1, -2) * E**-0.5
    first = torch.tensor([[j <= i and j < 2 for j in range(N)] for i in range(N)])
    near = torch.tensor([[0 <= i - j < 3 and j >= 2 for j in range(N)] for i in range(N)])
    lse = scores.masked_fill(~(first | near), float("-inf")).logsumexp(-1)
    tiles = (SoftmaxMap(q, k, lse, mask=Mask(dense=seen[None, None])) for seen in (first, near))
    return made(UnionMap(*tiles), (scores - lse[..., None]).exp() * (first | near))


def probed(weights: Tensor, **metadata: str) -> Case:
    """An operator that is only ever run."""
    values = rand(1, B, G, N, 3)
    return made(ProbedMap(lambda v: weights @ v.repeat_interleave(H // G, 1), values, **metadata), weights)


P, S = rand(3, B, H, N, N).softmax(-1), rand(5, B, H, N, N)


def causal(b: int, i: int, j: int) -> bool:
    return j <= i


def full(b: int, i: int, j: int) -> bool:
    return True


REAL = torch.tensor([[False] * 3 + [True] * (N - 3), [True] * N])
RIGHT = REAL.flip(1)
DOCS = torch.tensor([[0] * 4 + [1] * 5 + [2] * 4, [5] * N])
SEEN = torch.rand(B, 1, N, N, generator=torch.Generator().manual_seed(5)) > 0.6
GATE = torch.sigmoid(rand(9, B, H, N))
BIAS = rand(7, 1, H, N, N)

MAPS: dict[str, Callable[[], Case]] = {
    "dense stochastic": lambda: dense(rand(3, B, H, N, N).softmax(-1)),
    "dense float32": lambda: dense(rand(3, B, H, N, N).softmax(-1).float(), kv_heads=2),
    "dense signed": lambda: dense(rand(3, B, H, N, 9), kv_heads=1),
    "softmax causal": lambda: softmax(Mask(causal=True), causal),
    "softmax lse on demand": lambda: softmax(Mask(causal=True), causal, direct=True),
    "softmax full": lambda: softmax(Mask(), full),
    "softmax float32": lambda: softmax(Mask(causal=True), causal, dtype=torch.float32),
    "softmax bfloat16": lambda: softmax(Mask(causal=True), causal, dtype=torch.bfloat16),
    "softmax window": lambda: softmax(Mask(causal=True, window=4), lambda b, i, j: 0 <= i - j < 4),
    "softmax window 1": lambda: softmax(Mask(causal=True, window=1), lambda b, i, j: i == j),
    "softmax window both sides": lambda: softmax(Mask(window=3), lambda b, i, j: abs(i - j) < 3),
    "softmax prefix": lambda: softmax(Mask(causal=True, prefix=5), lambda b, i, j: j <= i or j < 5),
    "softmax prefix and window": lambda: softmax(
        Mask(causal=True, prefix=2, window=3), lambda b, i, j: 0 <= i - j < 3 or j < 2
    ),
    "softmax documents": lambda: softmax(
        Mask(causal=True, documents=DOCS), lambda b, i, j: j <= i and bool(DOCS[b, i] == DOCS[b, j])
    ),
    "softmax padding left": lambda: softmax(Mask(causal=True, keys=REAL), lambda b, i, j: j <= i and bool(REAL[b, j])),
    "softmax padding right": lambda: softmax(
        Mask(keys=RIGHT, queries=RIGHT), lambda b, i, j: bool(RIGHT[b, i] and RIGHT[b, j])
    ),
    "softmax dense mask": lambda: softmax(Mask(dense=SEEN), lambda b, i, j: bool(SEEN[b, 0, i, j])),
    "softmax one key head": lambda: softmax(Mask(causal=True), causal, kv=1),
    "softmax no shared heads": lambda: softmax(Mask(causal=True), causal, kv=4),
    "softmax softcap": lambda: softmax(Mask(causal=True), causal, softcap=0.7),
    "softmax sink": lambda: softmax(Mask(causal=True), causal, sink=rand(4, H)),
    "softmax sink, lse on demand": lambda: softmax(Mask(causal=True), causal, sink=rand(4, H), direct=True),
    "softmax sink and padding": lambda: softmax(
        Mask(causal=True, keys=REAL), lambda b, i, j: j <= i and bool(REAL[b, j]), sink=rand(4, H)
    ),
    "softmax bias": lambda: softmax(Mask(causal=True), causal, bias=BIAS),
    "softmax bias rows": lambda: softmax(Mask(), full, bias=lambda lo, hi: BIAS[:, :, lo:hi]),
    "softmax scale": lambda: softmax(Mask(causal=True), causal, scale=2.0),
    "softmax decode": lambda: softmax(Mask(causal=True, offset=7), causal, queries=3, keys=10),
    "softmax decode window": lambda: softmax(
        Mask(causal=True, window=4, offset=9), lambda b, i, j: 0 <= i - j < 4, queries=1, keys=10
    ),
    "softmax rectangular": lambda: softmax(Mask(), full, queries=5, keys=11),
    "softmax one token": lambda: softmax(Mask(causal=True), causal, queries=1, keys=1),
    "gated": lambda: softmax(Mask(causal=True), causal, gate=GATE),
    "gated with closed gates": lambda: softmax(Mask(causal=True), causal, gate=GATE * (GATE > 0.5)),
    "gated with sink and padding": lambda: softmax(
        Mask(causal=True, keys=REAL), lambda b, i, j: j <= i and bool(REAL[b, j]), sink=rand(4, H), gate=GATE
    ),
    "gated dense": lambda: over(dense(rand(3, B, H, N, N).softmax(-1)), GATE),
    "lazy": lambda: made(
        LazyMap((B, H, N, N), lambda lo, hi: S[:, :, lo:hi], kv_heads=G, sign="signed", row_sum="free"), S
    ),
    "sparse": lambda: sparse(False, False, kv_heads=G),
    "sparse signed": lambda: sparse(True, False),
    "sparse with a key twice": lambda: sparse(False, True, kv_heads=1),
    "sparse signed with a key twice": lambda: sparse(True, True),
    "diagonal": lambda: made(DiagonalMap(GATE, domain="token"), torch.diag_embed(GATE)),
    "sum": lambda: made(SumMap(of(P), of(P.flip(-1))), P + P.flip(-1)),
    "sum signed": lambda: made(SumMap(of(P, kv_heads=G), of(S, kv_heads=G)), P + S),
    "product": product,
    "heads": lambda: made(
        HeadsMap(of(P[:, :2], kv_heads=1), of(P[:, 2:].flip(-1), kv_heads=1)),
        torch.cat([P[:, :2], P[:, 2:].flip(-1)], 1),
    ),
    "keys": lambda: made(KeysMap(of(P[..., :4]), of(P[..., 4:]), row_sum="1"), P),
    "queries": lambda: made(QueriesMap(of(P[:, :, :4], kv_heads=G), of(P[:, :, 4:], kv_heads=G)), P),
    "permuted": permuted,
    "last rows": lambda: made(LastRowsMap(of(P, kv_heads=G), 5), P[:, :, 5:]),
    "batch": batch,
    "windows": windowed,
    "linear causal with decay": lambda: decayed(True),
    "linear both ways": lambda: decayed(False),
    "linear with a decay per channel": channel_decayed,
    "delta rule": delta_rule,
    "state": state,
    "some heads": lambda: made(
        SomeHeadsMap(of(torch.cat([P.flip(-1), P], 1), kv_heads=2), [4, 7, 5, 6]), P[:, [0, 3, 1, 2]]
    ),
    "convolution": lambda: convolution(False),
    "convolution without gates": lambda: convolution(False, gated=False),
    "circular convolution": lambda: convolution(True),
    "convolution on a grid": convolution_on_a_grid,
    "fourier": fourier,
    "selective scan": lambda: selective_scan(False, False),
    "selective scan with a skip": lambda: selective_scan(True, False),
    "selective scan with padding": lambda: selective_scan(True, True),
    "prefix softmax": lambda: prefix_softmax(False),
    "prefix softmax that fades": lambda: prefix_softmax(True),
    "union": union,
    "probed": lambda: probed(P, sign="nonnegative", row_sum="1"),
    "probed signed": lambda: probed(S),
    "channel gates": lambda: made(DiagonalMap(GATE), torch.diag_embed(GATE)),
    "gated signed": lambda: over(dense(rand(3, B, H, N, N).softmax(-1)), GATE - 0.5),
}


@pytest.fixture(params=["whole", "chunked"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with everything in one chunk, once with chunks of a few rows."""
    if request.param == "chunked":
        monkeypatch.setattr(blocked, "CHUNK", 150)
        monkeypatch.setattr(attention_map, "CHUNK", 200)


@pytest.fixture(params=list(MAPS))
def case(request: pytest.FixtureRequest, sizes: None) -> Case:
    return MAPS[request.param]()


def close(got: Tensor, wanted: Tensor, case: Case) -> None:
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.double(), wanted.double(), rtol=case.tolerance, atol=case.tolerance)


def distributes(case: Case) -> bool:
    """Whether rows are (sub-)distributions, which have an entropy."""
    return case.map.sign == "nonnegative" and case.map.row_sum in ("1", "<=1", "gate")


def positions(case: Case) -> tuple[Tensor, Tensor]:
    _, _, q, k = case.map.shape
    return torch.arange(q)[:, None] + case.map.offset, torch.arange(k)[None]


def test_metadata_is_stated(case: Case) -> None:
    assert tuple(case.map.shape) == tuple(case.dense.shape)
    assert case.map.domain in ("token", "block", "agent", "channel", "frequency")
    assert case.map.sign in ("nonnegative", "signed")
    assert case.map.row_sum in ("1", "<=1", "gate", "free", "columns")
    assert case.map.exactness in ("exact", "jacobian", "approximation")
    assert case.map.native() is not None
    assert type(case.map).__name__ in repr(case.map)


def test_rows_tiles_and_dense_agree(case: Case) -> None:
    _, _, q, k = case.map.shape
    close(case.map.tile(slice(0, q // 2), slice(k // 3, k)), case.dense[:, :, : q // 2, k // 3 :], case)
    close(case.map.tile(slice(q - 1, None), slice(-2, None)), case.dense[:, :, q - 1 :, -2:], case)
    close(case.map.rows(q // 2, q), case.dense[:, :, q // 2 :], case)
    assert case.map.rows(q, q).shape[2] == 0
    close(case.map.dense(), case.dense, case)
    close(case.map.tile(slice(0, q // 2), slice(k // 3, k)), case.map.rows(0, q // 2)[..., k // 3 :], case)
    with pytest.raises(Refused, match=r"use blocks\(size\)"):
        case.map.dense(limit=case.dense.numel() - 1)
    with pytest.raises(WorkbenchError, match="outside of this map"):
        case.map.rows(0, q + 1)
    with pytest.raises(WorkbenchError, match="without a step"):
        case.map.tile(slice(0, q, 2), slice(0, k))


def test_the_map_times_the_values_is_the_operators_output(case: Case) -> None:
    out = case.map.matvec(case.v)
    assert out.dtype == case.v.dtype
    torch.testing.assert_close(out.double(), case.out.double(), rtol=case.rounding, atol=case.rounding)
    with pytest.raises(WorkbenchError, match="matvec takes values"):
        case.map.matvec(case.v[:, :, :-1] if case.v.shape[2] > 1 else case.v[0])


def test_rmatvec_is_the_adjoint_of_matvec(case: Case) -> None:
    b, h, q, _ = case.map.shape
    v, y = case.v.double(), rand(8, b, h, q, 3)
    back = case.map.rmatvec(y)
    assert back.shape == v.shape
    left, right = (case.map.matvec(v) * y).sum(), (v * back).sum()
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)
    with pytest.raises(WorkbenchError, match="rmatvec takes"):
        case.map.rmatvec(y[..., 0])


@pytest.mark.parametrize("size", [1, 4, 5, 64])
def test_blocks_are_pooled_cells(case: Case, size: int) -> None:
    _, _, q, k = case.map.shape
    pools: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": lambda c: c.sum((-2, -1)),
        "mean": lambda c: c.mean((-2, -1)),
        "max": lambda c: c.amax((-2, -1)),
        "abs": lambda c: c.abs().sum((-2, -1)),
    }
    for name, pool in pools.items():
        got = case.map.blocks(size, name)
        assert got.shape[2:] == (-(-q // size), -(-k // size))
        for i in range(got.shape[2]):
            for j in range(got.shape[3]):
                cell = case.dense[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size]
                close(got[:, :, i, j], pool(cell), case)
    close(case.map.blocks(size).sum((-2, -1)), case.dense.sum((-2, -1)), case)
    with pytest.raises(UnknownName, match="no block reduction 'median'; known: sum, mean, max, abs"):
        case.map.blocks(size, "median")
    with pytest.raises(WorkbenchError, match="at least one token"):
        case.map.blocks(0)


def test_received_is_the_column_sum(case: Case) -> None:
    close(case.map.received(), case.dense.sum(2), case)


def test_entropy_is_that_of_the_rows_or_refused(case: Case) -> None:
    if not distributes(case):
        with pytest.raises(Refused, match="no distribution"):
            case.map.entropy()
        return
    plain = torch.where(case.dense > 0, -case.dense * case.dense.clamp(min=1e-300).log(), 0.0).sum(-1)
    close(case.map.entropy(), plain, case)


@pytest.mark.parametrize("window", [None, 3])
def test_distance_is_the_weighted_gap(case: Case, window: int | None) -> None:
    q, k = positions(case)
    far = (q - k).abs() if window is None else (q - k).abs().clamp(max=window)
    scaled = Case(case.map, case.dense, case.v, case.out, case.tolerance * case.dense.shape[3])
    close(case.map.distance(window), (case.dense * far).sum(-1), scaled)
    with pytest.raises(WorkbenchError, match="one token or more"):
        case.map.distance(0)
    for bad in (dict(moment=3), dict(moment=2, window=4)):
        with pytest.raises(WorkbenchError, match="moment 1, or 2 without a window"):
            case.map.distance(**bad)


def test_second_moment_of_the_distance(case: Case) -> None:
    q, k = positions(case)
    scaled = Case(case.map, case.dense, case.v, case.out, case.tolerance * case.dense.shape[3] ** 2)
    close(case.map.distance(moment=2), (case.dense * (q - k).square()).sum(-1), scaled)
    assert case.map.distance(moment=2) is case.map.distance(moment=2)


def test_topk_finds_the_largest_weights(case: Case) -> None:
    keys = case.map.shape[3]
    for count in {1, min(3, keys)}:
        got = case.map.topk(count)
        close(got.values, case.dense.topk(count, -1).values, case)
        nothing = (got.values == 0) & (case.map.sign == "nonnegative")
        assert torch.equal(got.indices == -1, nothing)
        at = case.dense.gather(-1, got.indices.clamp(min=0))
        close(torch.where(nothing, 0.0, at), case.dense.topk(count, -1).values, case)
    with pytest.raises(WorkbenchError, match="topk wants"):
        case.map.topk(keys + 1)


def test_mass_is_the_sum_under_a_mod(case: Case) -> None:
    b, _, q, k = case.map.shape
    i, j = positions(case)
    ids = torch.randint(0, 3, (b, int(max(i.max(), j.max())) + 1), generator=torch.Generator().manual_seed(3))
    wanted = {
        mods.sink(2): (j < 2) & (i >= 2),
        mods.previous(): i - j == 1,
        mods.window(3): (i - j >= 0) & (i - j < 3),
        mods.full(): torch.ones(q, k),
        mods.same_token(ids): ((ids[:, i[:, 0], None] == ids[:, None, j[0]]) & (j < i))[:, None],
    }
    for mod, weight in wanted.items():
        close(case.map.mass(mod), (case.dense * weight).sum(-1), case)
    for bad in (lambda b, h, q, k: True, lambda b, h, q, k: torch.ones(7, 1, 1, 1)):
        with pytest.raises(WorkbenchError, match="broadcasts to"):
            case.map.mass(bad)


def test_mass_is_the_sum_over_weighted_keys(case: Case) -> None:
    b, _, _, k = case.map.shape
    own = rand(6, b, k)
    for weights in (own, own[0], own[:1], own[0] > 0, (own > 0).long()):
        table = weights.double() if weights.ndim == 2 else weights.double()[None]
        close(case.map.mass(weights), (case.dense * table[:, None, None]).sum(-1), case)
    for bad in (rand(6, k + 1), rand(6, b + 1, k), rand(6, 1, 1, k)):
        with pytest.raises(WorkbenchError, match=r"weights of keys are \[K\]"):
            case.map.mass(bad)
    with pytest.raises(WorkbenchError, match="got a int"):
        case.map.mass(3)


def test_named_masses_are_remembered_and_others_are_not(case: Case) -> None:
    k = case.map.shape[3]
    weights = rand(6, k)
    request = capture(mass={"sink": mods.sink(2), "set": weights}, window=3, topk=min(2, k), stats=("distance2",))
    with pytest.raises(UnknownName, match="no named mass of this map 'sink'; known: none"):
        case.map.mass("sink")
    kept = case.map.precompute(request)
    small = case.map.precompute(dataclasses.replace(request, keep=False))
    for amap in (kept, small):
        close(amap.mass("sink"), case.map.mass(mods.sink(2)), case)
        close(amap.mass("set"), (case.dense * weights).sum(-1), case)
        assert amap.distance(3) is kept.distance(3)
        assert torch.equal(amap.topk(min(2, k)).indices, case.map.topk(min(2, k)).indices)
        assert amap.distance(moment=2) is kept.distance(moment=2)
    assert case.map.mass(weights) is not case.map.mass(weights)
    with pytest.raises(UnknownName, match="known: sink, set; nearest: sink"):
        small.mass("sinks")
    with pytest.raises(Refused, match=r"distance\(3\).*mass\('sink'\)"):
        small.mass(weights)
    changed = case.map.precompute(capture(mass={"sink": mods.full()}))
    close(changed.mass("sink"), case.dense.sum(-1), case)
    if k < 50:
        with pytest.raises(WorkbenchError, match="topk wants"):
            case.map.precompute(capture(topk=50))


def test_the_declared_row_sums_and_sign_hold(case: Case) -> None:
    sums = case.dense.sum(-1)
    close(case.map.row_sums(), sums, case)
    if case.map.row_sum == "1":
        assert torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
    if case.map.row_sum == "<=1":
        assert (sums <= 1 + 1e-5).all()
    if case.map.sign == "nonnegative":
        assert (case.dense >= 0).all()
    else:
        assert (case.dense < 0).any()


def test_nothing_is_nan_and_empty_rows_are_zero(case: Case) -> None:
    found = [
        case.map.dense(),
        case.map.received(),
        case.map.distance(),
        case.map.blocks(5, "max"),
        case.map.topk().values,
    ]
    if distributes(case):
        found.append(case.map.entropy())
    assert all(torch.isfinite(value).all() for value in found)
    empty = case.dense.abs().sum(-1) == 0
    assert (case.map.dense()[empty] == 0).all()
    assert (case.map.distance()[empty] == 0).all()


def test_heads_are_a_map_of_those_heads(case: Case) -> None:
    some = case.map.heads([3, 0])
    assert some.shape[1] == 2
    chosen = Case(some, case.dense[:, [3, 0]], case.v, case.out, case.tolerance)
    close(some.dense(), chosen.dense, chosen)
    close(some.received(), chosen.dense.sum(2), chosen)
    with pytest.raises(UnknownName, match="no head '4'"):
        case.map.heads([4])


def test_precompute_remembers_and_a_summary_answers_nothing_else(case: Case) -> None:
    stats = ("received", "distance", "top1") + (("entropy",) if distributes(case) else ())
    request = capture(blocks=5, reduce=("sum", "max"), stats=stats)
    kept = case.map.precompute(request)
    assert kept is case.map
    small = case.map.precompute(capture(blocks=5, reduce=("sum", "max"), stats=stats, keep=False))
    assert isinstance(small.raw if isinstance(small, GatedMap) else small, SummaryMap)
    assert (small.sign, small.row_sum, small.offset) == (case.map.sign, case.map.row_sum, case.map.offset)
    close(small.received(), case.dense.sum(2), case)
    close(small.blocks(5, "sum"), kept.blocks(5, "sum"), case)
    close(small.topk(1).values, kept.topk(1).values, case)
    b, h, q, k = case.map.shape
    if q * k > 1:
        assert [t.shape for t in tensors(small) if t.numel() > b * h * max(q, k)] == []
    for refused in (small.dense, lambda: small.blocks(4), lambda: small.mass(mods.sink()), lambda: small.topk(2)):
        if case.map.shape[3] > 1:
            with pytest.raises(Refused, match=r"keep=False and answers only .*blocks\(5, 'sum'\)"):
                refused()


def tensors(amap: AttentionMap) -> list[Tensor]:
    """Every tensor that a map holds, masks apart."""
    found: list[Tensor] = []
    for value in vars(amap).values():
        for part in value.values() if isinstance(value, dict) else [value]:
            for one in part if isinstance(part, tuple) else [part]:
                if isinstance(one, Tensor):
                    found.append(one)
                elif isinstance(one, AttentionMap):
                    found += tensors(one)
                assert not isinstance(one, SoftmaxMap | DenseMap) or not isinstance(amap, SummaryMap)
    return found
