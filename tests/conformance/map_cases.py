"""The maps of the conformance suite, each with its weights as literal float64 numbers. A new representation adds one
line to ``MAPS``.

Every oracle here is literal: the mask is a Python condition per pair, the weights are a float64 softmax over that
table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap, GatedMap
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
