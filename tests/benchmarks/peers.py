"""The same numbers by other means, which the kernels are measured against: dense, in row chunks, by FlexAttention, by package.

Everything is causal and takes q ``[B, H, N, E]``, k and v ``[B, G, N, ...]`` as a model gives them; a means that needs as many
key as query heads repeats them itself, inside what is timed. Packages beside torch are imported where they are called.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256
"""Query rows in a chunk of the recomputing baselines."""


@dataclass(frozen=True)
class Backend:
    """A fused attention of torch that also returns the natural log of the denominators: ``run(q, k, v) -> (output, lse)``."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def backends(device: str) -> list[Backend]:
    """Those there are; whether one runs shows when it is called."""
    aten = torch.ops.aten
    if device == "cpu":
        flash = aten._scaled_dot_product_flash_attention_for_cpu
        return [Backend("flash (cpu)", lambda q, k, v: flash(q, k, v, 0.0, True)[:2])]

    def flash_cuda(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[:2]

    def cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        output, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True)[:2]
        return output, lse.reshape(q.shape[:3]).float()

    def efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
        output, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True)[:2]
        return output, lse[:, :, : q.shape[2]].contiguous()  # rows are padded to a multiple of 32

    return [Backend("flash", flash_cuda), Backend("cudnn", cudnn), Backend("efficient", efficient)]


def repeated(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def pooled(p: Tensor, block: int) -> dict[str, Tensor]:
    """Block sums and maxima of a dense map ``[B, H, Q, K]``."""
    padded = F.pad(p, (0, -p.shape[3] % block, 0, -p.shape[2] % block))
    cells = padded.unflatten(3, (-1, block)).unflatten(2, (-1, block))
    return {"sum": cells.sum((3, 5)), "max": cells.amax((3, 5))}


def eager(q: Tensor, k: Tensor, v: Tensor, block: int) -> dict[str, Tensor]:
    """Dense attention as ``output_attentions=True`` gives it (softmax in float32, weights in q's type), then pooled."""
    n = q.shape[2]
    s = q @ repeated(k, q.shape[1]).transpose(-1, -2) * q.shape[3] ** -0.5
    hidden = torch.ones(n, n, dtype=torch.bool, device=q.device).triu(1)
    weights = s.masked_fill_(hidden, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype)
    p = weights.float() if weights.dtype != torch.float64 else weights
    return {
        "output": weights @ repeated(v, q.shape[1]),
        **pooled(p, block),
        "received": p.sum(2),
        "entropy": torch.special.entr(p).sum(-1),
    }


def chunked(q: Tensor, k: Tensor, block: int, names: tuple[str, ...], rows: int = ROWS) -> dict[str, Tensor]:
    """The maps again from q and k, some query rows at a time, nothing larger than ``rows`` x K: what one writes by hand.

    ``names`` of ``sum max received entropy``. Like the kernels it stops at the diagonal.
    """
    b, h, n, e = q.shape
    whole = max(block, rows // block * block)
    full = k.repeat_interleave(h // k.shape[1], 1).transpose(-1, -2) if k.shape[1] != h else k.transpose(-1, -2)
    side = -(-n // block)
    working = torch.float64 if q.dtype == torch.float64 else torch.float32
    made: dict[str, Tensor] = {
        name: q.new_zeros(*shape, dtype=working)
        for name, shape in (
            ("sum", (b, h, side, side)),
            ("max", (b, h, side, side)),
            ("received", (b, h, n)),
            ("entropy", (b, h, n)),
        )
        if name in names
    }
    for lo in range(0, n, whole):
        hi = min(lo + whole, n)
        s = (q[:, :, lo:hi] @ full[..., :hi]).to(working) * e**-0.5
        at = torch.arange(hi, device=q.device)
        p = s.masked_fill_(at > at[lo:, None], float("-inf")).softmax(-1)
        if "sum" in names or "max" in names:
            for name, value in pooled(p, block).items():
                if name in names:
                    made[name][:, :, lo // block : -(-hi // block), : value.shape[3]] = value
        if "received" in names:
            made["received"][..., :hi] += p.sum(2)
        if "entropy" in names:
            made["entropy"][..., lo:hi] = torch.special.entr(p).sum(-1)
    return made


def two_flex_calls(compiled: bool, tokens: int, device: str) -> Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """Received mass by two calls of FlexAttention (the baseline of github.com/awslabs/keys_values issue 77).

    ln received_j = ln sum_i exp(s_ij - lse_i) is the log-sum-exp of a second attention whose queries are the keys and whose keys
    are the queries, with lse taken off its scores. Uncompiled calls hold all scores; compiled ones return no log-sum-exp on CPUs.
    """
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def turned(b: Tensor, h: Tensor, j: Tensor, i: Tensor) -> Tensor:
        return j <= i

    def both(q: Tensor, k: Tensor, v: Tensor, forth: Any, back: Any) -> tuple[Tensor, Tensor]:
        grouped = k.shape[1] != q.shape[1]
        output, aux = flex_attention(q, k, v, block_mask=forth, enable_gqa=grouped, return_aux=AuxRequest(lse=True))
        lse: Any = aux.lse

        def less(score: Tensor, b: Tensor, h: Tensor, j: Tensor, i: Tensor) -> Tensor:
            return score - lse[b, h, i]

        keys = repeated(k, q.shape[1])
        _, aux = flex_attention(keys, q, q, score_mod=less, block_mask=back, return_aux=AuxRequest(lse=True))
        logs: Any = aux.lse
        return output, logs.exp()

    attend = torch.compile(both, dynamic=False) if compiled else both
    masks: list[Any] = []

    def run(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        if not masks:
            masks.extend(create_block_mask(m, None, None, tokens, tokens, device=device) for m in (causal, turned))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the row says that an uncompiled call holds all scores
            output, received = attend(q, k, v, *masks)
        return {"output": output, "received": received}

    return run


def colreduce(q: Tensor, k: Tensor) -> Tensor:
    """Received mass by the package flash-colreduce (CUDA): both passes over q k^T in one kernel."""
    from flash_colreduce import flash_colreduce

    return flash_colreduce(q, repeated(k, q.shape[1]), is_causal=True, reduction="sum")


def seer(q: Tensor, k: Tensor, v: Tensor, block: int) -> dict[str, Tensor]:
    """Attention that pools as SeerAttention's published kernel does, see ``seer_pooling.py``."""
    from seer_pooling import seer_max_pool

    output, peak = seer_max_pool(q, repeated(k, q.shape[1]), repeated(v, q.shape[1]), block)
    return {"output": output, "max": peak}


def sigmoid_rows(q: Tensor, k: Tensor, v: Tensor, block: int | None, rows: int = ROWS) -> dict[str, Tensor]:
    """Causal sigmoid attention with shift -ln N, some query rows at a time; its block sums and maxima if ``block`` is given."""
    b, h, n, e = q.shape
    whole = max(block, rows // block * block) if block else rows
    keys, values = repeated(k, h), repeated(v, h)
    output = q.new_empty(b, h, n, v.shape[3])
    side = -(-n // block) if block else 0
    maps = {name: q.new_zeros(b, h, side, side, dtype=torch.float32) for name in ("sum", "max")} if block else {}
    shift = torch.tensor(float(n)).log().item()
    for lo in range(0, n, whole):
        hi = min(lo + whole, n)
        s = (q[:, :, lo:hi] @ keys[:, :, :hi].transpose(-1, -2)).float() * e**-0.5 - shift
        at = torch.arange(hi, device=q.device)
        p = s.masked_fill_(at > at[lo:, None], float("-inf")).sigmoid()
        output[:, :, lo:hi] = p.to(q.dtype) @ values[:, :, :hi]
        if block:
            for name, value in pooled(p, block).items():
                maps[name][:, :, lo // block : -(-hi // block), : value.shape[3]] = value
    return {"output": output, **maps}


def decayed_rows(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, block: int | None) -> dict[str, Tensor]:
    """Linear attention with a decay ``[B, H, N]`` by the rows of its map; block sums and sums of magnitudes if asked for."""
    b, h, n, _ = q.shape
    rows = max(block, ROWS // block * block) if block else ROWS
    keys, values, summed = repeated(k, h), repeated(v, h), log_decay.double().cumsum(-1)
    output = q.new_empty(b, h, n, v.shape[3])
    side = -(-n // block) if block else 0
    maps = {name: q.new_zeros(b, h, side, side, dtype=torch.float32) for name in ("sum", "abs")} if block else {}
    for lo in range(0, n, rows):
        hi = min(lo + rows, n)
        far = (summed[..., lo:hi, None] - summed[..., None, :hi]).float()
        at = torch.arange(hi, device=q.device)
        fade = far.masked_fill_(at > at[lo:, None], float("-inf")).exp_()
        m = (q[:, :, lo:hi] @ keys[:, :, :hi].transpose(-1, -2)).float() * fade
        output[:, :, lo:hi] = m.to(q.dtype) @ values[:, :, :hi]
        if block:
            place = (slice(None), slice(None), slice(lo // block, -(-hi // block)))
            for name, part in (("sum", m), ("abs", m.abs())):
                value = pooled(part, block)["sum"]
                maps[name][place][..., : value.shape[3]] = value
    return {"output": output, **maps}


def torch_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    """The gated delta rule of transformers' Qwen3-Next in plain torch, chunks of 64."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    # The function is wrapped in one that prefers flash-linear-attention, which has a row of its own.
    rule = getattr(torch_chunk_gated_delta_rule, "__wrapped__", torch_chunk_gated_delta_rule)
    return rule(*(x.transpose(1, 2) for x in (q, k, v, log_decay, beta)))[0].transpose(1, 2)


def fla_delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> Tensor:
    """The gated delta rule of flash-linear-attention (CUDA), output only."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v, log_decay, beta = (x.transpose(1, 2).contiguous() for x in (q, k, v, log_decay, beta))
    return chunk_gated_delta_rule(q, k, v, g=log_decay, beta=beta)[0].transpose(1, 2)


def missing(package: str, device: str, cuda_only: bool = True) -> str:
    """Why a package's way cannot run here, empty if it can be tried."""
    if cuda_only and device != "cuda":
        return "needs a CUDA device"
    return "" if importlib.util.find_spec(package) else f"not installed: {package.replace('_', '-')}"
