"""Scores, weights and weighted sums of operators that build them as numbers, differentiable, with grouped heads.

    s_ij = scale q_i . k_j,   P_ij = exp(s_ij) / sum_j' exp(s_ij') over the keys that row i sees, 0 elsewhere

An operator made of these holds all Q x K weights while it runs and for its gradient; its map does not. Rows that see no key are
zero. Everything is computed in the working type (float64 stays, narrower types become float32).
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype


def checked(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> tuple[int, int, int, int]:
    """``(B, H, Q, K)`` of q ``[B, H, Q, E]``, k ``[B, G, K, E]``, v ``[B, G, K, V]`` and a mask that fits them; raises
    ``WorkbenchError`` naming the one at fault."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor, ("B", "heads", "tokens", "width"))
    (b, h, n, e), (_, g, m, _) = q.shape, k.shape
    if (k.shape[0], k.shape[3]) != (b, e) or h % g:
        raise WorkbenchError(f"k is [B, G, K, E] with B={b}, E={e} and G dividing H={h}; got {list(k.shape)}")
    check_tensor("v", v, (b, g, m, "width"))
    if k.dtype != q.dtype:
        raise WorkbenchError(f"k must have q's dtype {q.dtype}; got {k.dtype}")
    if not q.device == k.device == v.device:
        raise WorkbenchError(f"q, k and v are on one device; got {q.device}, {k.device} and {v.device}")
    if not isinstance(mask, Mask):
        raise WorkbenchError(f"mask is a Mask; got a {type(mask).__name__}")
    try:
        mask.check((b, h, n, m))
    except ValueError as error:
        raise WorkbenchError(str(error)) from None
    return b, h, n, m


def check_tensor(name: str, tensor: Tensor, *shapes: tuple[int | str, ...]) -> None:
    """Raise unless ``tensor`` is floating point of one of these shapes; a letter stands for any length of at least 1."""
    for shape in shapes:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim == len(shape):
            pairs = zip(tensor.shape, shape, strict=True)
            if all(got >= 1 if isinstance(want, str) else got == want for got, want in pairs):
                return
    wanted = " or ".join(str(list(shape)).replace("'", "") for shape in shapes)
    got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
    raise WorkbenchError(f"{name} is floating point {wanted}; got {got}")


def plain_scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    """``scale q_i . k_j`` ``[B, H, Q, K]``; ``scale`` defaults to ``E ** -0.5``."""
    work = working_dtype(q.dtype)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    keys = k.to(work).repeat_interleave(q.shape[1] // k.shape[1], 1)
    return (q.to(work) * factor) @ keys.transpose(-1, -2)


def visible(mask: Mask, queries: int, keys: int, device: torch.device, lo: int = 0) -> Tensor:
    """Pairs that the mask allows, bool, broadcastable to ``[B, H, queries, keys]``; ``lo`` is the first query row."""
    allowed = mask.tile(slice(lo, lo + queries), slice(0, keys), device)
    return torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device) if allowed is None else allowed


def masked_softmax(scores: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Row softmax over the allowed keys and its log denominators ``[..., Q]``; rows without a key are zero, with -inf."""
    hidden = scores if allowed is None else scores.masked_fill(~allowed, float("-inf"))
    top = hidden.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top.isneginf(), 0.0)
    weights = (hidden - top).exp()
    total = weights.sum(-1, keepdim=True)
    lse = (total.detach().log() + top).squeeze(-1)
    return weights / total.masked_fill(total == 0, 1.0), lse


def weighted(weights: Tensor, v: Tensor) -> Tensor:
    """Weighted sums of the values: weights ``[B, H, Q, K]``, v ``[B, G, K, V]`` to ``[B, H, Q, V]`` of v's dtype."""
    b, h, n, m = weights.shape
    g = v.shape[1]
    work = torch.promote_types(weights.dtype, v.dtype)
    out = weights.to(work).reshape(b, g, h // g * n, m) @ v.to(work)
    return out.view(b, h, n, v.shape[3]).to(v.dtype)
