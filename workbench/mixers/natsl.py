"""Neural Attention Search Linear: chunks of tokens go to softmax attention or to a gated delta rule, inside of one layer.

    o_i = sum_{j <= i, j soft} P_ij v_j + sum_{j <= i, j linear} M_ij v_j

P is the softmax of s q_i . k_j over the soft tokens alone, whose keys and values are kept; M the gated delta rule that only
linear tokens write to and let decay (beta_t = 0 and alpha_t = 1 at soft tokens). Queries, keys and values are shared; a chunk
goes where its score is larger.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from workbench.catalogue import Learned, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import AttentionMap
from workbench.mixers.delta import gated_delta_net
from workbench.mixers.scored import check_tensor
from workbench.mixers.softmax import softmax_attention
from workbench.patterns.algebra import SumMap


class HybridMap(SumMap):
    """Softmax columns and delta-rule columns. ``soft`` ``[B, N]`` bool: which tokens are kept for softmax;
    ``assignment`` ``[B, chunks]`` the same by chunk. ``native()`` is the two maps, ``(softmax, delta rule)``."""

    def __init__(self, softmax: AttentionMap, linear: AttentionMap, assignment: Tensor, soft: Tensor) -> None:
        super().__init__(softmax, linear)
        self.assignment, self.soft = assignment, soft


def searched_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    scores: Tensor,
    *,
    chunk: int,
    scale: float | None = None,
) -> tuple[Tensor, HybridMap]:
    """NAtS-L of q ``[B, H, N, E]`` over k ``[B, G, N, E]`` and v ``[B, G, N, V]``, output ``[B, H, N, V]``.

    ``beta`` and ``log_decay`` ``[B, H, N]`` as in ``gated_delta_net``; ``scores`` ``[B, chunks, 2]``, (linear, softmax), of
    chunks of ``chunk`` tokens, the last one as long as it is: the larger one decides, linear on a tie. Softmax takes q and k as
    they come, the delta rule takes them at length 1; both have the same ``scale``, ``E ** -0.5`` if None.
    """
    check_tensor("q", q, ("B", "H", "N", "E"))
    b, h, n, _ = q.shape
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise WorkbenchError(f"chunk is a positive number of tokens; got {chunk!r}")
    check_tensor("beta", beta, (b, h, n))
    check_tensor("log_decay", log_decay, (b, h, n))
    check_tensor("scores", scores, (b, -(-n // chunk), 2))
    assignment = scores.detach()[..., 1] > scores.detach()[..., 0]
    soft = assignment.repeat_interleave(chunk, 1)[:, :n]
    kept, softmax = softmax_attention(q, k, v, mask=Mask(causal=True, keys=soft), scale=scale)
    writing = ~soft[:, None]
    held, linear = gated_delta_net(q, k, v, beta * writing, torch.where(writing, log_decay, 0.0), scale=scale)
    return kept + held, HybridMap(softmax, linear, assignment, soft)


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    chunks, chunk = -(-tokens // 3), 3
    head = (2, 2, tokens, 5)
    given = example_tensors(
        seed, dtype, q=(2, 4, tokens, 5), k=head, v=(2, 2, tokens, 4), beta=(2, 4, tokens), log_decay=(2, 4, tokens),
        scores=(2, chunks, 2),
    )  # fmt: skip
    gates = {"beta": given["beta"].sigmoid(), "log_decay": -softplus(given["log_decay"])}
    return {**given, **gates, "chunk": chunk}


def _log_decay(x: Tensor) -> Tensor:
    return -softplus(x)


def _prepare(given: dict[str, Any]) -> dict[str, Any]:
    """The first token of a chunk of 4 scores it, for all heads: a mean over the chunk would look ahead."""
    taken = {name: given[name] for name in ("q", "k", "v", "beta", "log_decay")}
    return {**taken, "scores": given["scores"].mean(1)[:, ::4], "chunk": 4}


VARIANTS = (
    Variant(
        name="nats-l",
        paper="#114 Neural Attention Search Linear: Towards Adaptive Token-Level Hybrid Attention Models (2026)",
        family="routing",
        priority="B",
        operator=searched_attention,
        example=_example,
        causal=True,
        reference="abstract of the paper",
        note="that the outputs are added as they are, and that soft tokens leave the state alone, is from general knowledge; the "
        "paper scores the mean of a chunk",
        recipe=Recipe(
            learned={
                "beta": Learned("H", torch.sigmoid),
                "log_decay": Learned("H", _log_decay, bias=-2.0),
                "scores": Learned("H2"),
            },
            prepare=_prepare,
        ),
    ),
)
