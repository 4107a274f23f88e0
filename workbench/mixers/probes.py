"""Patterns of kernels that do not show them: four probes of any operator that is linear in its values.

    V := identity             output = M                                            (``identity_probe``)
    V := 1 on a block         output = sums of rows over blocks of keys              (``block_probe``)
    dO := W                   gradient of V = M^T W: rows, column sums, query blocks (``transpose_probe``)
    V := K, V := positions    entropy and mean attended position of softmax rows     (``softmax_probe``)

The operator runs as it is, so that fused kernels, compiled modules and kernels of other packages are seen at work. Each probe is
a plain function of a callable ``V -> O``; ``workbench.patterns.probed.ProbedMap`` is the same as a lazy map. Numbers have the
rounding of the operator. The records run the probes on ``torch.nn.functional.scaled_dot_product_attention``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from workbench.attention_map import AttentionMap
from workbench.catalogue import Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import DenseMap
from workbench.mixers.scored import check_tensor, checked
from workbench.patterns.probed import ProbedMap, ProbedSoftmaxMap
from workbench.patterns.softmax import SoftmaxMap

Values = Callable[[Tensor], Tensor]


class SoftmaxProbe(NamedTuple):
    """What ``softmax_probe`` finds out about every row, each ``[B, H, Q]``: entropy in nats, and the mean attended position."""

    entropy: Tensor
    position: Tensor


def identity_probe(operator: Values, values: Tensor, *, offset: int = 0) -> DenseMap:
    """The whole map of an operator, from values that are 1 at one key each, as many keys a run as it takes channels.

    ``values`` ``[B, G, K, E]`` are values as the operator takes them (shape, type and width are read off). Memory B*H*Q*K:
    the test oracle for every value-linear operator, and the way to the map of a short sequence.
    """
    probed = ProbedMap(operator, values)
    return DenseMap(probed.columns(0, values.shape[2]), offset=offset, kv_heads=values.shape[1])


def block_probe(operator: Values, values: Tensor, size: int) -> Tensor:
    """Mass of every row on each block of ``size`` keys, ``[B, H, Q, ceil(K / size)]``, signed where the map is.

    ceil(blocks / E) runs forward: what a long sequence affords on a stock kernel. Average over query blocks for a block map.
    """
    return ProbedMap(operator, values).block_columns(size)


def transpose_probe(operator: Values, values: Tensor, weights: Tensor) -> Tensor:
    """M^T W for ``weights`` ``[B, H, Q, R]``: ``[B, H, K, R]``, every head by itself, by ceil(R H / (G E)) runs backward.

    Ones give the mass that each key receives; the indicator of a query block gives a row of the block map. The operator needs a
    gradient with respect to its values.
    """
    probed = ProbedMap(operator, values)
    if not probed.differentiable:
        raise WorkbenchError("the operator has no gradient with respect to its values: probe columns instead")
    check_tensor("weights", weights, (*probed.shape[:3], "R"))
    return probed.adjoint_by_head(weights)


def softmax_probe(
    operator: Values,
    q: Tensor,
    k: Tensor,
    lse: Tensor | None = None,
    *,
    mask: Mask = Mask(),
    scale: float | None = None,
) -> SoftmaxProbe:
    """Row entropy and mean attended position of plain softmax attention, two values' worth of runs in linear memory.

    H_i = LSE_i - scale q_i . (P K)_i from the values V := K, and sum_j P_ij j from V := (j div 256, j mod 256), which bfloat16
    holds exactly up to 65,536 keys. ``q`` ``[B, H, Q, E]`` and ``k`` ``[B, G, K, E]`` are those that the operator uses,
    ``lse`` ``[B, H, Q]`` natural logarithms of its denominators, as most fused kernels return them; without it they are computed
    from q, k, ``mask`` and ``scale``. Rows of softmax with extra logits, caps or biases are not what this reads.
    """
    probed = ProbedSoftmaxMap(operator, q, k, _lse(q, k, lse, mask, scale), scale=scale, offset=mask.offset)
    return SoftmaxProbe(probed.entropy(), probed.position())


def _check_size(size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise WorkbenchError(f"a block has at least one token; got size={size!r}")


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None = None) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention`` under any mask: output ``[B, H, Q, V]``. All of one type."""
    if v.dtype != q.dtype:
        raise WorkbenchError(f"v has the type of q, {q.dtype}, as fused kernels want it; got {v.dtype}")
    n, m = q.shape[2], k.shape[2]
    allowed = mask.tile(slice(0, n), slice(0, m), q.device)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if allowed is None:
        return functional.scaled_dot_product_attention(q, k, v, scale=scale)
    seen = allowed.any(-1, keepdim=True)
    # A row without keys attends to all of them and is zeroed afterwards: kernels differ in what they do there.
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed | ~seen, scale=scale)
    return out.masked_fill(~seen, 0.0)


def identity_probed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask = Mask(), scale: float | None = None
) -> tuple[Tensor, DenseMap]:
    """Fused attention with its whole map from the identity probe. q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]``."""
    checked(q, k, v, mask)
    held = (q.detach(), k.detach())
    found = identity_probe(lambda x: fused_attention(*held, x, mask, scale), v, offset=mask.offset)
    return fused_attention(q, k, v, mask, scale), found


def block_probed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, size: int = 64, mask: Mask = Mask(), scale: float | None = None
) -> tuple[Tensor, DenseMap]:
    """Fused attention over values that are constant on blocks of ``size`` keys, with the block probe as its map.

    v ``[B, G, blocks, V]`` holds one value per block of the keys k ``[B, G, K, E]``, blocks = ceil(K / size). The map is tokens
    by blocks, exact for such values; for others it is the mass that each row puts on each block.
    """
    _check_size(size)
    check_tensor("k", k, ("B", "G", "K", "E"))
    check_tensor("v", v, (k.shape[0], k.shape[1], -(-k.shape[2] // size), "V"))
    keys = k.shape[2]

    def lifted(x: Tensor) -> Tensor:
        return x.repeat_interleave(size, 2)[:, :, :keys]

    checked(q, k, lifted(v), mask)
    held = (q.detach(), k.detach())
    masses = block_probe(lambda x: fused_attention(*held, x, mask, scale), lifted(v), size)
    found = DenseMap(masses, offset=0, kv_heads=v.shape[1], domain="block", value_space="block values")
    return fused_attention(q, k, lifted(v), mask, scale), found


def transpose_probed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, size: int = 64, mask: Mask = Mask(), scale: float | None = None
) -> tuple[Tensor, DenseMap]:
    """Mean output of fused attention over blocks of ``size`` queries, with the transpose probe as its map.

    Output ``[B, H, ceil(Q / size), V]``. The map is query blocks by keys: the mean rows of each block, from one backward run per
    V / (H/G) blocks with the block's indicator as gradient of the output.
    """
    _check_size(size)
    b, h, n, _ = checked(q, k, v, mask)
    which = torch.arange(n, device=q.device) // size
    blocks = torch.arange(-(-n // size), device=q.device)
    mean = (which[:, None] == blocks).to(q.dtype)
    mean = mean / mean.sum(0)
    held = (q.detach(), k.detach())
    rows = transpose_probe(lambda x: fused_attention(*held, x, mask, scale), v, mean.expand(b, h, -1, -1))
    found = DenseMap(rows.transpose(2, 3), offset=0, kv_heads=v.shape[1], domain="block")
    return mean.T.to(v.dtype) @ fused_attention(q, k, v, mask, scale), found


def softmax_probed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask = Mask(), scale: float | None = None
) -> tuple[Tensor, ProbedSoftmaxMap]:
    """Fused attention with a lazy map that probes: rows backward, columns and blocks forward, entropy from V := K, and
    ``position()``. q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]``."""
    checked(q, k, v, mask)
    held = (q.detach(), k.detach())
    lse = _lse(*held, None, mask, scale)
    contract = "1" if mask.covers(q.shape[2], k.shape[2]) else "<=1"
    found = ProbedSoftmaxMap(
        lambda x: fused_attention(*held, x, mask, scale), *held, lse,
        scale=scale, width=v.shape[3], offset=mask.offset, row_sum=contract,
    )  # fmt: skip
    return fused_attention(q, k, v, mask, scale), found


def _lse(q: Tensor, k: Tensor, lse: Tensor | None, mask: Mask, scale: float | None) -> Tensor:
    return SoftmaxMap(q, k, mask=mask, scale=scale).lse if lse is None else lse


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 6), "k": (2, 2, tokens, 6), "v": (2, 2, tokens, 5)}
    return {**example_tensors(seed, dtype, **shapes), "mask": Mask(causal=True)}


def _block_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"q": (2, 4, tokens, 6), "k": (2, 2, tokens, 6), "v": (2, 2, -(-tokens // 4), 5)}
    return {**example_tensors(seed, dtype, **shapes), "size": 4, "mask": Mask()}


def _transpose_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_example(seed, tokens, dtype), "size": 4, "mask": Mask()}


_PAPER = "#88 FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness (2022)"
_REFERENCE = "torch.nn.functional.scaled_dot_product_attention"


def _record(name: str, operator: Callable[..., tuple[Tensor, AttentionMap]], example: Any, **more: Any) -> Variant:
    return Variant(
        name=name, paper=_PAPER, family="probe", priority="A", operator=operator, example=example, reference=_REFERENCE, **more
    )  # fmt: skip


VARIANTS = (
    _record(
        "identity-probe", identity_probed_attention, _example, causal=True, recipe=Recipe(),
        note="The paper is that of the kernel; the probe is linear algebra.",
    ),
    _record(
        "block-probe", block_probed_attention, _block_example,
        note="The paper is that of the kernel; the probe is linear algebra. Values are one per block of keys.",
    ),
    _record(
        "transpose-probe", transpose_probed_attention, _transpose_example,
        note="The paper is that of the kernel; the probe is linear algebra. Outputs are means over blocks of queries.",
    ),
    _record(
        "softmax-probe", softmax_probed_attention, _example, causal=True, recipe=Recipe(),
        note="The paper is that of the kernel; the probe is linear algebra. The kernel returns no denominators here: they are "
        "computed from q and k.",
    ),
)  # fmt: skip
