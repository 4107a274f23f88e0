"""The formulas of ``gated_delta_rule`` written out: a loop over tokens and a dense map. The oracle of the faster forms, which
work by chunks. Their derivation, for a chunk of C tokens that starts with state S:

**Output.** Let Gamma_ij = prod_{j<t<=i} a_t inside the chunk, rise_i = a_1 .. a_i, fall_j = a_{j+1} .. a_C, and u_i the vector
that token i really writes, S_i = a_i S_{i-1} + k_i u_i^T. Unrolling, S_i = rise_i S + sum_{j<=i} Gamma_ij k_j u_j^T, hence

    u_i = beta_i (v_i - a_i S_{i-1}^T k_i) = beta_i (v_i - rise_i S^T k_i - sum_{j<i} Gamma_ij (k_i.k_j) u_j)
    (I + L) U = diag(beta) (V - diag(rise) K S)                     L = diag(beta) stril(Gamma * K K^T)
    O = scale (diag(rise) Q S + P U)                                P = tril(Gamma * Q K^T)
    S' = rise_C S + (diag(fall) K)^T U

With T = (I + L)^{-1} diag(beta), a triangular solve, U = T (V - diag(rise) K S).

**Map.** A later row of the map is known at the end of the chunk by what it reads of S' there: a vector r, o = r^T S' + (what
it reads of later writes). Substituting S' and U, with p = scale P for rows of the chunk itself and 0 for later ones,

    p <- p + diag(fall) K r         both as rows: p_j = fall_j (r.k_j) + scale P_ij
    m = p T                         the coefficients of the chunk's values: the cells M_ij of its columns
    r <- rise_C r + scale rise_i q_i - K^T diag(rise) m^T           what the row reads of S

The row transporter: two products with K and one with T per chunk, so all rows cost two passes of the size of Q K^T, and a sum
of rows costs one row, because everything is linear in (r, p).

**Gradient.** For given dO and dS' (of the state after the chunk), with the strictly lower part of G = stril(Gamma * K K^T),

    dU = scale P^T dO + diag(fall) K dS'            Z = (I + L)^{-T} dU             dV = diag(beta) Z
    dbeta_i = Z_i . (V - diag(rise) K S - G U)_i    dP = scale tril(dO U^T)         dG = -stril(dV U^T)
    dS = rise_C dS' + scale (diag(rise) Q)^T dO - (diag(rise) K)^T dV
    dQ = scale diag(rise) dO S^T + (Gamma * dP) K
    dK = (Gamma * dP)^T Q + (Gamma * (dG + dG^T)) K - diag(rise) dV S^T + diag(fall) U dS'^T

log a_t enters wherever something is carried over token t: from writes j < t to reads i >= t inside the chunk, from S to reads
i >= t, from writes j < t to S', and from S to S'. Each is a product of what is carried and what its gradient wants, so

    dlog a_t = sum_{i>=t, j<t} (dP * P + dG * G)_ij + sum_{i>=t} rise_i (scale q_i^T S dO_i - k_i^T S dV_i)
               + sum_{j<t} fall_j k_j^T dS' U_j + rise_C <S, dS'>
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.kernels.scores import working_dtype


def heads(x: Tensor, h: int) -> Tensor:
    """``x`` in its working type with as many heads as there are states."""
    return x.to(working_dtype(x.dtype)).repeat_interleave(h // x.shape[1], dim=1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, N, V]`` in v's dtype and the last state, token by token."""
    dtype, h = v.dtype, beta.shape[1]
    q, k, v = (heads(x, h) for x in (q, k, v))
    beta, decay = beta.to(q), torch.ones_like(beta, dtype=q.dtype) if log_decay is None else log_decay.to(q).exp()
    s = q.new_zeros(*beta.shape[:2], q.shape[3], v.shape[3]) if state is None else state.to(q)
    rows = []
    for t in range(q.shape[2]):
        s = s * decay[:, :, t, None, None]
        read = torch.einsum("bhe,bhev->bhv", k[:, :, t], s)
        s = s + torch.einsum("bhe,bhv->bhev", k[:, :, t], beta[:, :, t, None] * (v[:, :, t] - read))
        rows.append(scale * torch.einsum("bhe,bhev->bhv", q[:, :, t], s))
    return torch.stack(rows, dim=2).to(dtype), s


def dense_map(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float) -> Tensor:
    """M ``[B, H, N, N]`` in the working type."""
    h, n = beta.shape[1:]
    q, k, beta = heads(q, h), heads(k, h), beta.to(working_dtype(q.dtype))
    log = torch.zeros_like(beta) if log_decay is None else log_decay.to(beta)
    gamma = pair_decay(log)
    reads = scale * (gamma * (q @ k.transpose(-1, -2)))
    system = torch.eye(n).to(q) + beta[..., None] * (gamma * (k @ k.transpose(-1, -2))).tril(-1)
    writes = torch.linalg.solve_triangular(system, torch.diag_embed(beta), upper=False)
    return reads @ writes


def pair_decay(log: Tensor) -> Tensor:
    """Gamma ``[..., N, N]``, 0 above the diagonal. Logs are summed pair by pair: differences of running sums would lose digits
    next to strong decays, and -inf - -inf is not a number."""
    n = log.shape[-1]
    below = torch.ones(n, n, dtype=torch.bool, device=log.device).tril(-1)
    total = torch.where(below, log[..., :, None], 0.0).cumsum(-2)
    return torch.where(below.T, 0.0, total.exp())


def block_maps(
    q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, block: int, reduce: tuple[str, ...]
) -> dict[str, Tensor]:
    dense = dense_map(q, k, beta, log_decay, scale)
    return {name: pool(dense, block, name) for name in reduce}


def rows(q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None, scale: float, lo: int, hi: int) -> Tensor:
    return dense_map(q, k, beta, log_decay, scale)[:, :, lo:hi].contiguous()


def pool(dense: Tensor, size: int, reduce: str) -> Tensor:
    """Square blocks of a dense map, one by one."""
    cell = {"sum": lambda c: c.sum((-2, -1)), "mean": lambda c: c.mean((-2, -1)), "max": lambda c: c.amax((-2, -1)),
            "abs": lambda c: c.abs().sum((-2, -1))}[reduce]  # fmt: skip
    cut = [[cell(c) for c in row.split(size, dim=3)] for row in dense.split(size, dim=2)]
    return torch.stack([torch.stack(row, -1) for row in cut], -2)
