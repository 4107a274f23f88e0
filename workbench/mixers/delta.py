"""Delta rules: the state is corrected towards each new value, so that what a key held before is erased.

    DeltaNet          S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T                             o_t = s q_t^T S_t
    Gated DeltaNet    S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T                     alpha_t one number
    KDA               S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T               alpha_t ``[E]``
    RWKV-7            S_t = (diag(w_t) - (a_t * kappa_t) kappa_t^T) S_{t-1} + k_t v_t^T                   o_t = r_t^T S_t

q, k and kappa have length 1 (L2 norm inside of the operators), s = E^-1/2. In all of them o_i = sum_j M_ij v_j with
M_ij = c_i^T A_i .. A_{j+1} b_j: signed, lower triangular, and never a product of q_i and k_j alone.

Yang et al., Parallelizing Linear Transformers with the Delta Rule (arXiv 2406.06484) and Gated Delta Networks (arXiv
2412.06464); Kimi Linear (arXiv 2510.26692); Peng et al., RWKV-7 Goose (arXiv 2503.14456).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from workbench.catalogue import Learned, Parameter, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.gated_delta_rule import gated_delta_rule
from workbench.kernels.scores import working_dtype
from workbench.mixers.image import spread
from workbench.mixers.scored import check_tensor
from workbench.patterns.delta import DeltaMap
from workbench.patterns.recurrence import Recurrence
from workbench.patterns.state import StateMap, dplr

EPS = 1e-6
"""Under the root of the L2 norm, as in the models."""


def unit(x: Tensor) -> Tensor:
    """x over its length along the last axis, x / sqrt(|x|^2 + 1e-6), in the working type."""
    x = x.to(working_dtype(x.dtype))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)


def delta_net(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *, scale: float | None = None) -> tuple[Tensor, DeltaMap]:
    """DeltaNet over q, k ``[B, heads, N, E]`` and v ``[B, G, N, V]``, output ``[B, H, N, V]``.

    ``beta`` ``[B, H, N]`` is the writing strength, in 0..1 (0..2 allows negative eigenvalues), and sets the number of heads H,
    which those of q, k and v divide. ``scale=None`` is ``E ** -0.5``.
    """
    return _rule(q, k, v, beta, None, scale)


def gated_delta_net(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, *, scale: float | None = None
) -> tuple[Tensor, DeltaMap]:
    """Gated DeltaNet (Qwen3-Next, Qwen3.5): DeltaNet whose state decays by exp(``log_decay``) ``[B, H, N]`` (not positive) at
    each token. Other arguments as in ``delta_net``."""
    return _rule(q, k, v, beta, log_decay, scale)


def kimi_delta_attention(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, *, scale: float | None = None
) -> tuple[Tensor, StateMap]:
    """Kimi Delta Attention (Kimi Linear): the gated delta rule with a decay per channel, ``log_decay`` ``[B, H, N, E]``.

    q, k ``[B, H, N, E]``, v ``[B, G, N, V]``, ``beta`` ``[B, H, N]``. The decay comes before the erasure.
    """
    _check_values(q, k, v)
    b, h, n, e = q.shape
    check_tensor("beta", beta, (b, h, n))
    check_tensor("log_decay", log_decay, (b, h, n, e))
    q, k = unit(q) * (e**-0.5 if scale is None else scale), unit(k)
    decay, write = log_decay.to(q.dtype).exp(), beta.to(q.dtype)[..., None] * k
    return _recurrent(q, write, decay, -write, k * decay, v)


def rwkv7(r: Tensor, k: Tensor, v: Tensor, kappa: Tensor, rate: Tensor, log_decay: Tensor) -> tuple[Tensor, StateMap]:
    """RWKV-7's time mixing: erase along ``kappa``, write along ``k``, decay per channel.

    r, k, kappa, ``rate`` (a, in 0..1) and ``log_decay`` (log w) are ``[B, H, N, E]``, v ``[B, G, N, V]``; kappa is normalised
    here, r is not scaled. The bonus (r . (rho * k)) v is added after the layer's group norm and not part of this.
    """
    _check_values(r, k, v, "r")
    for name, part in (("kappa", kappa), ("rate", rate), ("log_decay", log_decay)):
        check_tensor(name, part, tuple(r.shape))
    work = working_dtype(r.dtype)
    kappa = unit(kappa).to(work)
    decay = log_decay.to(work).exp()
    return _recurrent(r.to(work), k.to(work), decay, -rate.to(work) * kappa, kappa, v)


def _rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float | None
) -> tuple[Tensor, DeltaMap]:
    for name, part in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, part, ("B", "heads", "N", "width"))
    check_tensor("beta", beta, ("B", "H", "N"))
    if log_decay is not None:
        check_tensor("log_decay", log_decay, tuple(beta.shape))
    work = torch.promote_types(working_dtype(q.dtype), v.dtype)
    q, k = unit(q).to(work), unit(k).to(work)
    try:
        out = gated_delta_rule(q, k, v.to(work), beta, log_decay, scale=scale).output
    except ValueError as error:
        raise WorkbenchError(str(error)) from None
    return out.to(v.dtype), DeltaMap(q, k, beta, log_decay, scale=scale, kv_heads=v.shape[1])


def _recurrent(read: Tensor, write: Tensor, decay: Tensor, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, StateMap]:
    """A_t = diag(decay_t) + x_t y_t^T."""
    step = dplr(decay, x, y)
    values = spread(v, read.shape[1]).to(torch.promote_types(read.dtype, v.dtype))
    out = Recurrence(read, write, step).output(values)
    return out.to(v.dtype), StateMap(read, write, step, kv_heads=v.shape[1])


def _check_values(q: Tensor, k: Tensor, v: Tensor, name: str = "q") -> None:
    """q and k alike; value heads that divide the heads."""
    check_tensor(name, q, ("B", "H", "N", "E"))
    check_tensor("k", k, tuple(q.shape))
    check_tensor("v", v, (q.shape[0], "G", q.shape[2], "width"))
    if q.shape[1] % v.shape[1]:
        raise WorkbenchError(f"v has value heads that divide the {q.shape[1]} heads; got {v.shape[1]}")


# ------------------------------------------------------------------------ records


def _log_decay(x: Tensor) -> Tensor:
    return -softplus(x)


def _rwkv_log_decay(x: Tensor) -> Tensor:
    """-exp(-1/2) sigmoid: RWKV-7's decay stays above exp(-0.61) = 0.545."""
    return -math.exp(-0.5) * x.sigmoid()


def _delta_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    head = (2, 2, tokens, 5)
    given = example_tensors(seed, dtype, q=head, k=head, v=(2, 2, tokens, 4), beta=(2, 4, tokens))
    return {**given, "beta": given["beta"].sigmoid()}


def _gated_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    given = _delta_example(seed, tokens, dtype)
    log_decay = example_tensors(seed + 1, dtype, x=(2, 4, tokens))["x"]
    return {**given, "log_decay": _log_decay(log_decay)}


def _kimi_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    head = (2, 4, tokens, 5)
    given = example_tensors(seed, dtype, q=head, k=head, v=(2, 2, tokens, 4), beta=(2, 4, tokens), log_decay=head)
    return {**given, "beta": given["beta"].sigmoid(), "log_decay": _log_decay(given["log_decay"])}


def _rwkv_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    head = (2, 4, tokens, 5)
    given = example_tensors(seed, dtype, r=head, k=head, v=(2, 4, tokens, 4), kappa=head, rate=head, log_decay=head)
    return {**given, "rate": given["rate"].sigmoid(), "log_decay": _rwkv_log_decay(given["log_decay"])}


def _without_mask(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in ("q", "k", "v", "beta", "log_decay") if name in given}


def _prepare_kimi(given: dict[str, Any]) -> dict[str, Any]:
    return {**_without_mask(given), "k": spread(given["k"], given["q"].shape[1])}


def _prepare_rwkv(given: dict[str, Any]) -> dict[str, Any]:
    """The removal key is k times a learned vector; the written key is k (1 + (a - 1) xi)."""
    k, rate = spread(given["k"], given["q"].shape[1]), given["rate"]
    written = k * (1 + (rate - 1) * given["xi"][:, None])
    kappa = k * given["kappa"][:, None]
    return {
        "r": given["q"], "k": written, "v": given["v"], "kappa": kappa, "rate": rate, "log_decay": given["log_decay"],
    }  # fmt: skip


VARIANTS = (
    Variant(
        name="deltanet",
        paper="Parallelizing Linear Transformers with the Delta Rule over Sequence Length (2024)",
        family="delta",
        priority="A",
        operator=delta_net,
        example=_delta_example,
        causal=True,
        reference="equations of the paper",
        recipe=Recipe(learned={"beta": Learned("H", torch.sigmoid)}, prepare=_without_mask),
    ),
    Variant(
        name="gated-deltanet",
        paper="Gated Delta Networks: Improving Mamba2 with Delta Rule (2024)",
        family="delta",
        priority="A",
        operator=gated_delta_net,
        example=_gated_example,
        causal=True,
        reference="HF torch_recurrent_gated_delta_rule",
        recipe=Recipe(
            learned={"beta": Learned("H", torch.sigmoid), "log_decay": Learned("H", _log_decay, bias=-2.0)},
            prepare=_without_mask,
        ),
    ),
    Variant(
        name="kimi-delta-attention",
        paper="Kimi Linear: An Expressive, Efficient Attention Architecture (2025)",
        family="delta",
        priority="A",
        operator=kimi_delta_attention,
        example=_kimi_example,
        causal=True,
        reference="HF recurrent_kimi_delta_attention",
        recipe=Recipe(
            learned={"beta": Learned("H", torch.sigmoid), "log_decay": Learned("HE", _log_decay, bias=-2.0)},
            prepare=_prepare_kimi,
        ),
    ),
    Variant(
        name="rwkv-7",
        paper="RWKV-7 Goose with Expressive Dynamic State Evolution (2025)",
        family="delta",
        priority="B",
        operator=rwkv7,
        example=_rwkv_example,
        causal=True,
        reference="fla fused_recurrent_rwkv7: a = -kappa, b = kappa * rate",
        note="the bonus term comes after the layer's group norm and is not part of the map",
        recipe=Recipe(
            learned={"rate": Learned("HE", torch.sigmoid), "log_decay": Learned("HE", _rwkv_log_decay)},
            parameters={"kappa": Parameter("HE", torch.ones), "xi": Parameter("HE", torch.ones)},
            prepare=_prepare_rwkv,
        ),
    ),
)
