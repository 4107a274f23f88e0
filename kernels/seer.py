"""SeerAttention as three maps: what the gate predicts, what attention does, and the blocks that were executed.

    gate_IJ      softmax_J(rope(W_q pool(q)_I) . rope(W_k pool(k)_J) / sqrt(D))     rows sum to 1
    target_IJ    max of p over the block, over the row sum of these maxima          rows sum to 1; not attention mass
    executed_IJ  sum over the block of the weights renormalised over the kept blocks; zero outside of them

with p the weights of full attention and I, J blocks of queries and keys. Source: Gao et al., SeerAttention: Learning Intrinsic
Sparse Attention in Your LLMs, arXiv:2410.13276. Everything here is causal and block-sized, so it is plain torch on any device;
the passes over tokens are those of ``flash_attention``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from workbench.kernels.flash_attention import flash_attention
from workbench.kernels.mask import Mask
from workbench.kernels.scores import HIDDEN, Scores

POOLS = ("max", "min", "avg")
ALWAYS = ("diagonal", "first")


class AttnGate(nn.Module):
    """Predicts from pooled queries and keys which blocks of an attention map hold its large weights.

    Queries and keys are taken **before** rotary positions and pooled over blocks of ``block`` tokens; several poolings are
    concatenated. One linear map per head takes them to width ``gate``, where rotary positions (half rotation, base ``theta``) are
    applied at the first position of each block. Defaults are the published ones: mean of queries; max, min and mean of keys;
    ``gate`` 128, ``block`` 64.

    There is one map per query head; the query heads of a key head share its key projection. With ``shared`` there is one map
    per key head, from the queries of its whole group (as in SeerAttention-R, whose queries are single tokens, which are not
    offered here). Weights are drawn from ``seed`` alone, uniform within ``1 / sqrt(inputs)``.
    """

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        width: int,
        *,
        gate: int = 128,
        block: int = 64,
        q_pool: Iterable[str] = ("avg",),
        k_pool: Iterable[str] = POOLS,
        shared: bool = False,
        theta: float = 10000.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, size in (
            ("heads", heads),
            ("kv_heads", kv_heads),
            ("width", width),
            ("gate", gate),
            ("block", block),
        ):
            _positive(name, size)
        if heads % kv_heads:
            raise ValueError(f"kv_heads must divide the {heads} heads; got {kv_heads}")
        if gate % 2:
            raise ValueError(f"gate is an even width, for rotary positions; got {gate}")
        if not theta > 0:
            raise ValueError(f"theta is a positive base; got {theta}")
        self.heads, self.kv_heads, self.width, self.block, self.shared = heads, kv_heads, width, block, shared
        self.q_pool, self.k_pool = _pools("q_pool", q_pool), _pools("k_pool", k_pool)
        self.theta = float(theta)
        group = heads // kv_heads if shared else 1
        generator = torch.Generator().manual_seed(seed)

        def drawn(maps: int, inputs: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(maps, inputs, gate, generator=generator) - 1) * inputs**-0.5)

        self.query = drawn(heads // group, group * len(self.q_pool) * width)
        self.key = drawn(kv_heads, len(self.k_pool) * width)

    def forward(self, q: Tensor, k: Tensor, *, mask: Mask = Mask(causal=True)) -> Tensor:
        """The gate map ``[B, H, Q/block, K/block]`` (rounded up; ``[B, G, ...]`` if ``shared``) of q ``[B, H, Q, width]`` and k
        ``[B, G, K, width]``, float32 or the type of float64 weights.

        A block of keys is visible if its first real key is not after the block's last real query; rows sum to 1, and a block of
        padding queries, or one that sees nothing, is a row of zeros. ``mask`` may hold ``causal`` (must), ``offset``, ``keys``
        and ``queries``; a query that stands on a hidden key is padding. Tails and blocks with padding are pooled over what is
        there. Gradients flow to the weights, and to q and k. Raises ``ValueError`` naming the argument at fault.
        """
        self._check(q, k, mask)
        (n, m), offset, size = (q.shape[2], k.shape[2]), mask.offset, self.block
        real_q, real_k = mask.queries, mask.keys
        if real_k is not None and offset + n <= m:
            under = real_k[:, offset : offset + n]
            real_q = under if real_q is None else real_q & under
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        pooled_q, pooled_k = (
            _pool(x, None if real is None else real.to(x.device), size, names, dtype)
            for x, real, names in ((q, real_q, self.q_pool), (k, real_k, self.k_pool))
        )
        if self.shared:
            pooled_q = pooled_q.unflatten(1, (self.kv_heads, -1)).transpose(2, 3).flatten(3)
        starts = [torch.arange(0, length, size, device=q.device) for length in (n, m)]
        wide_q = _rotate(torch.einsum("bhni,hid->bhnd", pooled_q, self.query.to(dtype)), starts[0] + offset, self.theta)
        wide_k = _rotate(torch.einsum("bgni,gid->bgnd", pooled_k, self.key.to(dtype)), starts[1], self.theta)
        wide_q = wide_q * wide_q.shape[-1] ** -0.5
        s = wide_q.unflatten(1, (self.kv_heads, -1)).flatten(2, 3) @ wide_k.transpose(2, 3)
        s = s.view(*wide_q.shape[:3], wide_k.shape[2])
        last = _positions(n, offset, real_q, size, -1, q.device).amax(2)
        first = _positions(m, 0, real_k, size, 2**40, q.device).amin(2)
        seen = (first[:, None, :] <= last[:, :, None])[:, None]
        return torch.where(seen, s, HIDDEN).softmax(-1).masked_fill(~seen, 0.0)

    def _check(self, q: Tensor, k: Tensor, mask: Mask) -> None:
        for name, x, heads in (("q", q, self.heads), ("k", k, self.kv_heads)):
            if x.ndim != 4 or x.shape[1] != heads or x.shape[3] != self.width or not x.shape[2]:
                raise ValueError(f"{name} is [B, {heads}, tokens, {self.width}] for this gate; got {list(x.shape)}")
            if not x.is_floating_point():
                raise ValueError(f"{name} is floating point; got {x.dtype}")
        if len(q) != len(k):
            raise ValueError(f"k must share B={len(q)} with q; got {list(k.shape)}")
        rest = (mask.window, mask.documents, mask.dense, mask.blocks)
        if not mask.causal or mask.prefix or any(part is not None for part in rest):
            raise ValueError("mask: a gate is causal and reads offset, keys and queries beside; another part is set")
        mask.check((q.shape[0], q.shape[1], q.shape[2], k.shape[2]))


def seer_target(block_max: Tensor, groups: int | None = None) -> Tensor:
    """What a gate is trained to predict: the largest weight of each block over the sum of these along its row.

    ``block_max`` ``[B, H, nq, nk]`` is the ``max`` map of full attention. With ``groups``, the largest of each of as many groups
    of heads is taken first, for a ``shared`` gate: ``[B, groups, nq, nk]``. Rows sum to 1, rows of zeros stay zero.
    """
    _map("block_max", block_max)
    if groups is not None:
        _positive("groups", groups)
        if block_max.shape[1] % groups:
            raise ValueError(f"groups must divide the {block_max.shape[1]} heads of block_max; got {groups}")
        block_max = block_max.unflatten(1, (groups, -1)).amax(2)
    total = block_max.sum(-1, keepdim=True)
    return block_max / torch.where(total > 0, total, 1.0)


def distillation_loss(gate: Tensor, target: Tensor, *, skip: float = 0.25) -> Tensor:
    """KL(target || gate) in nats, a scalar: the mean over examples, heads and rows of sum_J target_IJ ln(target_IJ / gate_IJ).

    The first ``floor(skip * nq)`` rows of blocks are left out (published: a quarter; they hold few blocks and nothing to choose),
    and so is every row whose target is zero, from the number of rows too. A zero target adds nothing; a gate that has underflowed
    counts as the smallest normal number and gets no gradient. The gradient flows to ``gate`` alone.
    """
    _map("gate", gate)
    if gate.shape != target.shape:
        raise ValueError(f"target has the gate's shape {list(gate.shape)}; got {list(target.shape)}")
    if not 0 <= skip < 1:
        raise ValueError(f"skip is a part of the rows, at least 0 and below 1; got {skip}")
    dtype = torch.promote_types(gate.dtype, torch.float32)
    start = int(skip * gate.shape[2])
    g, t = gate[:, :, start:].to(dtype), target.detach()[:, :, start:].to(dtype)
    terms = torch.xlogy(t, t) - t * g.clamp(min=torch.finfo(dtype).tiny).log()
    return terms.sum() / (t.sum(-1) > 0).sum().clamp(min=1)


def select_blocks(
    gate: Tensor,
    *,
    threshold: float | None = None,
    top: int | None = None,
    always: Iterable[str] = ("diagonal",),
    side: int = 64,
    offset: int = 0,
) -> Tensor:
    """The blocks to execute, bool like ``gate`` ``[B, H, nq, nk]``: causal ones whose gate is at least ``threshold``, or the
    ``top`` largest of each row. Exactly one of the two is given; threshold 0 keeps every causal block.

    ``always`` keeps blocks whatever their gate, and counts them towards ``top``: ``diagonal``, those that hold the row's own
    positions, without which a token might see nothing (a choice made here, not taken from the paper); ``first``, the first block.
    Query row 0 stands at position ``offset``; ``side`` is the side of a block, which matters only with an offset.
    """
    _map("gate", gate)
    _positive("side", side)
    names = (always,) if isinstance(always, str) else tuple(always)
    for name in names:
        if name not in ALWAYS:
            raise ValueError(f"always: no {name!r}; known: {', '.join(ALWAYS)}")
    if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
        raise ValueError(f"offset is a number of tokens, not negative; got {offset!r}")
    if (threshold is None) == (top is None):
        raise ValueError(f"threshold or top: exactly one of them is given; got threshold={threshold!r}, top={top!r}")
    own = torch.arange(gate.shape[2], device=gate.device)[:, None] * side + offset
    key = torch.arange(gate.shape[3], device=gate.device)[None, :]
    causal = key * side <= own + side - 1
    forced = torch.zeros_like(causal)
    if "diagonal" in names:
        forced = forced | (causal & (key >= own // side))
    if "first" in names:
        forced = forced | (key == 0)
    if threshold is not None:
        if not threshold >= 0:
            raise ValueError(f"threshold is a gate value, not negative; got {threshold!r}")
        return (causal & (gate >= threshold)) | forced
    _positive("top", top)
    ranked = torch.where(causal, gate, float("-inf")).masked_fill(forced, float("inf"))
    best = ranked.topk(min(top or 1, gate.shape[3]), -1).indices
    return (torch.zeros_like(gate, dtype=torch.bool).scatter(-1, best, True) & causal) | forced


@dataclass(frozen=True, eq=False)
class SeerTriple:
    """The three maps and the output ``[B, H, Q, V]`` of the executed one.

    ``gate`` as given; ``target`` like it, None if not asked for; ``executed`` ``[B, H, Q/side, K/side]``, block sums of the
    weights that made the output; ``kept``, bool like ``executed``, the selected blocks; ``impl``, the form that ran.
    """

    gate: Tensor
    target: Tensor | None
    executed: Tensor
    output: Tensor
    kept: Tensor
    impl: str = ""


def seer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_map: Tensor,
    *,
    threshold: float | None = None,
    top: int | None = None,
    always: Iterable[str] = ("diagonal",),
    mask: Mask = Mask(causal=True),
    scale: float | None = None,
    side: int = 64,
    target: bool = False,
    impl: str | None = None,
) -> SeerTriple:
    """Attention of q ``[B, H, Q, E]`` over k ``[B, G, K, E]`` and v ``[B, G, K, V]`` on the blocks that a gate selects.

    q and k are those of the attention, **after** rotary positions. ``gate_map`` is ``[B, H, Q/side, K/side]`` (rounded up), or
    ``[B, G, ...]`` of a shared gate, whose selection holds for the group. ``threshold``, ``top`` and ``always`` are those of
    ``select_blocks``. ``mask`` is causal, without ``prefix`` and ``blocks``; its other parts hide as usual. ``target`` asks for
    the target map too, by a dense pass that costs as much as full attention; for a shared gate it is the group's.

    Gradients flow to q, k and v from output and executed, as in attention under a fixed mask: none to the gate through the
    selection, none from the target. ``impl`` as in ``flash_attention``. Raises ``ValueError`` naming the argument at fault.
    """
    if not mask.causal or mask.prefix or mask.blocks is not None:
        raise ValueError("mask is causal here, without prefix and without blocks, which the gate selects")
    _positive("side", side)
    _map("gate_map", gate_map)
    (b, h, n, m), g = Scores(q, k, mask, scale).shape, k.shape[1]
    want = [b, h, -(-n // side), -(-m // side)]
    if gate_map.shape[1] not in (h, g) or [b, h, *gate_map.shape[2:]] != want or gate_map.shape[0] != b:
        raise ValueError(f"gate_map is [B, H or G, Q/side, K/side] = {want}, H or {g}; got {list(gate_map.shape)}")
    kept = select_blocks(
        gate_map.detach(), threshold=threshold, top=top, always=always, side=side, offset=mask.offset
    ).repeat_interleave(h // gate_map.shape[1], dim=1)
    sparse = replace(mask, blocks=kept, side=side)
    ran = flash_attention(q, k, v, mask=sparse, scale=scale, block=side, reduce=("sum",), impl=impl)
    wanted = None
    if target:
        with torch.no_grad():
            full = flash_attention(q, k, v, mask=mask, scale=scale, block=side, reduce=("max",), impl=impl)
            wanted = seer_target(full.blocks["max"], None if gate_map.shape[1] == h else g)
    return SeerTriple(gate_map, wanted, ran.blocks["sum"], ran.output, kept, ran.impl)


def _pool(x: Tensor, real: Tensor | None, size: int, names: tuple[str, ...], dtype: torch.dtype) -> Tensor:
    """Blocks of tokens of ``[B, H, N, E]`` pooled over the real ones, side by side: ``[B, H, N/size, names * E]``."""
    pad = -x.shape[2] % size
    if real is None and pad:
        real = torch.ones(1, x.shape[2], dtype=torch.bool, device=x.device)
    cells = F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, size))
    counted = torch.full((1, 1, 1, 1), size, device=x.device)
    if real is not None:
        real = F.pad(real, (0, pad)).unflatten(1, (-1, size))[:, None, ..., None]
        counted = real.sum(3)

    def over(value: float) -> Tensor:
        return cells if real is None else torch.where(real, cells, value)

    pooled = {
        "max": lambda: over(float("-inf")).amax(3).to(dtype),
        "min": lambda: over(float("inf")).amin(3).to(dtype),
        "avg": lambda: over(0.0).sum(3, dtype=dtype) / counted.clamp(min=1),
    }
    return torch.where(counted > 0, torch.cat([pooled[name]() for name in names], -1), 0.0)


def _positions(length: int, first: int, real: Tensor | None, size: int, absent: int, device: torch.device) -> Tensor:
    """Positions of tokens in their blocks, ``[B or 1, length/size, size]``; ``absent`` where there is no real token."""
    at = torch.arange(first, first + length, device=device)[None]
    if real is not None:
        at = torch.where(real.to(device), at, absent)
    return F.pad(at, (0, -length % size), value=absent).unflatten(1, (-1, size))


def _rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary positions of x ``[B, H, n, D]``: channel c < D/2 turns with c + D/2 by ``position * theta ** (-2c / D)``."""
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half, device=x.device, dtype=x.dtype) / half)
    angle = positions.to(x.dtype)[:, None] * speed
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is a positive integer; got {value!r}")


def _pools(name: str, given: Iterable[str]) -> tuple[str, ...]:
    names = (given,) if isinstance(given, str) else tuple(given)
    if not names or any(pool not in POOLS for pool in names):
        raise ValueError(f"{name} holds some of {', '.join(POOLS)}; got {names}")
    return names


def _map(name: str, value: Tensor) -> None:
    if value.ndim != 4 or not value.is_floating_point():
        raise ValueError(f"{name} is floating point [B, H, Q/side, K/side]; got {value.dtype} {list(value.shape)}")
