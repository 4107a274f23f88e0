"""The formula of ``flash_attention`` written out densely: the oracle of every faster form. Q x K memory; float64-able."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.scores import Scores
from workbench.kernels.stats.reference import dense_attention, pool


def reference_flash(
    scores: Scores, v: Tensor, block: int | None, reduce: tuple[str, ...]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Output, lse and block maps. Plain torch: autograd goes through it, to the bias too."""
    p, lse = dense_attention(scores)
    values = v.to(p).repeat_interleave(p.shape[1] // v.shape[1], dim=1)
    # What a key holds that no query sees does not matter, not even NaN.
    values = values.masked_fill((p == 0).all(2)[..., None], 0.0)
    output = torch.einsum("bhqk,bhkv->bhqv", p, values).to(v.dtype)
    return output, lse, {name: pool(p, block, name) for name in reduce} if block is not None else {}
