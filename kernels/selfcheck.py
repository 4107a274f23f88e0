"""Do the attention backends of this machine return LSE in natural-log units? Compared with float64 on one small tile.

Backends have returned LSE in base 2 (off by a factor ln 2), and everything that is computed from a wrong LSE is wrong
silently. Each check runs the backend itself on a 37 x 37 causal tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class LseCheck:
    """Outcome for one backend. ``status``: ``ok``, ``wrong`` (it ran and its LSE is not the natural log), ``absent`` (it cannot
    run here). ``error`` is the largest absolute difference from float64, None if it did not run."""

    name: str
    status: str
    error: float | None
    detail: str = ""

    def __str__(self) -> str:
        error = "" if self.error is None else f", largest error {self.error:.1e} against float64"
        return f"{self.status}{error}{': ' if self.detail else ''}{self.detail}"


def lse_selfcheck() -> dict[str, LseCheck]:
    """LSE of every backend that can be asked for it, by name: torch's flash kernels, FlexAttention, the workbench's forms."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 37, 16, generator=generator) for _ in range(3))
    s = (q.double() @ k.double().transpose(-1, -2)) * 16**-0.5
    hidden = torch.ones(37, 37, dtype=torch.bool).triu(1)
    exact = s.masked_fill(hidden, float("-inf")).logsumexp(-1)
    backends: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
        "flash (cpu)": (_flash_cpu, "cpu"),
        "flash (cuda)": (_flash_cuda, "cuda"),
        "flex (uncompiled)": (_flex, "cpu"),
        "workbench reference": (_ours("reference"), "cpu"),
        "workbench cpu": (_ours("cpu"), "cpu"),
    }
    return {name: _check(name, call, device, (q, k, v), exact) for name, (call, device) in backends.items()}


def compare(name: str, lse: Tensor, exact: Tensor) -> LseCheck:
    """The verdict on an LSE ``[B, H, Q]``; one that is off by a power of two base says so."""
    lse = lse.detach().cpu().double()
    if lse.shape != exact.shape:
        return LseCheck(name, "wrong", None, f"its shape is {list(lse.shape)}, not [B, H, Q] = {list(exact.shape)}")
    error = float((lse - exact).abs().max())
    if error <= _TOLERANCE:
        return LseCheck(name, "ok", error)
    ln2 = float(torch.log(torch.tensor(2.0)))
    if float((lse * ln2 - exact).abs().max()) <= _TOLERANCE:
        return LseCheck(name, "wrong", error, "it is in base 2: multiply by ln 2")
    return LseCheck(name, "wrong", error, "it is not the natural log of the denominator")


def _check(
    name: str,
    call: Callable[[Tensor, Tensor, Tensor], Tensor],
    device: str,
    tensors: tuple[Tensor, Tensor, Tensor],
    exact: Tensor,
) -> LseCheck:
    if device == "cuda" and not torch.cuda.is_available():
        return LseCheck(name, "absent", None, "no GPU that this torch can use")
    dtype = torch.float32 if device == "cpu" else torch.float16
    rounded = exact
    if dtype == torch.float16:
        q, k = (t.to(dtype).double() for t in tensors[:2])
        s = (q @ k.transpose(-1, -2)) * q.shape[3] ** -0.5
        rounded = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), float("-inf")).logsumexp(-1)
    try:
        with torch.no_grad():
            q, k, v = (t.to(device, dtype) for t in tensors)
            lse = call(q, k, v)
    except (AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError) as error:
        return LseCheck(name, "absent", None, str(error).splitlines()[0])
    return compare(name, lse, rounded)


def _flash_cpu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[1]


def _flash_cuda(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[1]


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import warnings

    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def causal(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i >= j, score, float("-inf"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that uncompiled calls hold all scores: 37 x 37 here
        _, aux = flex_attention(q, k, v, score_mod=causal, return_aux=AuxRequest(lse=True))
    if aux.lse is None:
        raise RuntimeError("FlexAttention was asked for its log-sum-exp and returned none")
    return aux.lse


def _ours(impl: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from workbench.kernels.attention_stats import attention_stats

        return attention_stats(q, k, impl=impl).lse

    return call
