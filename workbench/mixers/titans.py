"""Titans: a memory that is trained at test time with momentum and forgetting, alone and beside attention.

    G_t = gradient of |M_{t-1}(k_t) - v_t|^2 / 2 by the weights            the momentary surprise
    S_t = eta_t S_{t-1} - theta_t G_t,   M_t = (1 - alpha_t) M_{t-1} + S_t,   o_t = M_t(q_t)

(theta holds the factor 2 of the paper's |.|^2.) With a matrix for a memory, M(x) = M^T x, the pair (M, S) is a linear state:

    G_t = k_t (M_{t-1}^T k_t - v_t)^T,  so a row r = (r_M, r_S) is carried back over token t by z = r_M + r_S as
    m_t = theta_t z . k_t,   r_M <- (1 - alpha_t) r_M - theta_t (z . k_t) k_t,   r_S <- eta_t z

and the map is exact. With a network for a memory the map is a derivative. ``titans_layouts.py`` combines it with attention.

Behrouz, Zhong and Mirrokni, Titans (arXiv 2501.00663), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from workbench.catalogue import Learned, Parameter, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.mixers import memory
from workbench.mixers.delta import unit
from workbench.mixers.image import spread
from workbench.mixers.memory import MemoryMap, memory_attention
from workbench.mixers.scored import check_tensor
from workbench.patterns.recurrence import Recurrence
from workbench.patterns.state import StateMap


class MomentumStep:
    """The transition of the pair (M, S) at each token, on rows ``[B, H, M, R, 2 E]``; k ``[B, H, N, E]``, rates ``[B, H, N]``."""

    def __init__(self, k: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor) -> None:
        self.k, self.theta, self.eta, self.alpha = k, theta, eta, alpha

    def __call__(self, rows: Tensor, t: Tensor) -> Tensor:
        k = self.k[:, :, t, None].to(rows.dtype)
        theta, eta, alpha = (rate[:, :, t, None, None].to(rows.dtype) for rate in (self.theta, self.eta, self.alpha))
        memory, momentum = rows.chunk(2, -1)
        both = memory + momentum
        held = both @ k.transpose(-1, -2)
        return torch.cat([(1 - alpha) * memory - theta * held * k, eta * both], -1)

    def detach(self) -> MomentumStep:
        return MomentumStep(*(part.detach() for part in (self.k, self.theta, self.eta, self.alpha)))

    def heads(self, chosen: list[int]) -> MomentumStep:
        return MomentumStep(*(part[:, chosen] for part in (self.k, self.theta, self.eta, self.alpha)))


def linear_memory(
    q: Tensor, k: Tensor, v: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor
) -> tuple[Tensor, StateMap]:
    """The Titans memory with a matrix: exact, in linear time and memory.

    q, k ``[B, H, N, E]`` as they come (the models give them length 1), v ``[B, G, N, V]``; ``theta`` (learning rate), ``eta``
    (momentum), ``alpha`` (forgetting, in 0..1) ``[B, H, N]``. Output ``[B, H, N, V]``. Memory and momentum start at zero.
    """
    check_tensor("q", q, ("B", "H", "N", "E"))
    b, h, n, _ = q.shape
    check_tensor("k", k, tuple(q.shape))
    check_tensor("v", v, (b, "G", n, "width"))
    if h % v.shape[1]:
        raise WorkbenchError(f"v has value heads that divide the {h} heads; got {v.shape[1]}")
    for name, rate in (("theta", theta), ("eta", eta), ("alpha", alpha)):
        check_tensor(name, rate, (b, h, n))
    work = torch.promote_types(working_dtype(q.dtype), v.dtype)
    step = MomentumStep(*(part.to(work) for part in (k, theta, eta, alpha)))
    read = torch.cat([q, torch.zeros_like(q)], -1).to(work)
    write = step.theta[..., None] * torch.cat([step.k, step.k], -1)
    out = Recurrence(read, write, step).output(spread(v, h).to(work))
    return out.to(v.dtype), StateMap(read, write, step, kv_heads=v.shape[1])


def deep_memory(
    q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor, theta: Tensor, eta: Tensor, alpha: Tensor
) -> tuple[Tensor, MemoryMap]:
    """The Titans memory with a network, M(x) = W1 gelu(W2 x), starting from ``w1`` ``[H, E, F]`` and ``w2`` ``[H, F, E]``.

    Other arguments as in ``linear_memory``, with values as wide as keys. Not linear in v: the map is the derivative, and
    holds the surprise of each token. A loop over tokens, as the recurrence is nonlinear.
    """
    work = memory.check_memory(q, k, v, w1, w2)
    rates = {"theta": theta, "eta": eta, "alpha": alpha}
    for name, rate in rates.items():
        check_tensor(name, rate, tuple(q.shape[:3]))
    tensors = {"q": q, "k": k, "w1": w1, "w2": w2, **rates}

    def run(given: dict[str, Tensor], values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = {name: tensor.to(work) for name, tensor in given.items()}
        weights = memory.starting(given["w1"], given["w2"], q.shape[0], work)

        def update(now: memory.Weights, momentum: memory.Weights, slopes: memory.Weights, t: int) -> memory.After:
            theta, eta, alpha = (memory.at(given[name], t) for name in ("theta", "eta", "alpha"))
            momentum = tuple(eta * s - theta * g for s, g in zip(momentum, slopes, strict=True))
            after = tuple((1 - alpha) * w + s for w, s in zip(now, momentum, strict=True))
            return memory.After(after, momentum, memory.square_distance(after, now))

        still = tuple(torch.zeros_like(w) for w in weights)
        spreaded = spread(values, q.shape[1]).to(work)
        network = memory.Network(residual=False)
        return memory.remember(given["q"], given["k"], spreaded, weights, network, half_square, update, still)

    return memory_attention(v, tensors, run)


def half_square(error: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """|e|^2 / 2 and its gradient."""
    return error.square().sum(-1) / 2, error


# ------------------------------------------------------------------------ records

RATES = {
    "theta": Learned("H", torch.sigmoid, bias=-1.0),
    "eta": Learned("H", torch.sigmoid),
    "alpha": Learned("H", torch.sigmoid, bias=-4.0),
}
"""Learning rate, momentum and forgetting of a native model's memory, each in 0..1."""


def example_rates(seed: int, dtype: torch.dtype, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """Random rates in 0..1, with little forgetting."""
    made = example_tensors(seed, dtype, theta=shape, eta=shape, alpha=shape)
    return {name: (rate - 2.0 * (name == "alpha")).sigmoid() for name, rate in made.items()}


def _linear_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    head = (2, 4, tokens, 5)
    given = example_tensors(seed, dtype, q=head, k=head, v=(2, 2, tokens, 4))
    return {**given, "q": unit(given["q"]), "k": unit(given["k"]), **example_rates(seed + 1, dtype, head[:3])}


def _deep_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    head = (2, 2, tokens, 4)
    given = example_tensors(seed, dtype, q=head, k=head, v=(2, 1, tokens, 4), w1=(2, 4, 6), w2=(2, 6, 4))
    scaled = {"w1": 0.4 * given["w1"], "w2": 0.4 * given["w2"], "q": unit(given["q"]), "k": unit(given["k"])}
    return {**given, **scaled, **example_rates(seed + 1, dtype, head[:3])}


def prepare_linear(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``linear_memory`` from those of a native model."""
    k = spread(given["k"], given["q"].shape[1])
    return {"q": unit(given["q"]), "k": unit(k), "v": given["v"], **{name: given[name] for name in RATES}}


def _prepare_deep(given: dict[str, Any]) -> dict[str, Any]:
    return {**prepare_linear(given), "w1": given["w1"], "w2": given["w2"]}


def small_normal(shape: tuple[int, ...]) -> Tensor:
    """Normal with the variance 1 / fan-in."""
    return torch.randn(shape) * shape[-1] ** -0.5


PAPER = "#48 Titans: Learning to Memorize at Test Time (2024)"

VARIANTS = (
    Variant(
        name="titans-linear-memory",
        paper=PAPER,
        family="delta",
        priority="B",
        operator=linear_memory,
        example=_linear_example,
        causal=True,
        reference="equations of the paper, with a matrix for a memory",
        note="the factor 2 of the squared error's gradient is in theta",
        recipe=Recipe(learned=RATES, prepare=prepare_linear),
    ),
    Variant(
        name="titans-deep-memory",
        paper=PAPER,
        family="nonlinear",
        priority="B",
        operator=deep_memory,
        example=_deep_example,
        value_input=None,
        causal=True,
        reference="equations of the paper, with two layers",
        note="gelu between the layers, no normalisation; the factor 2 of the squared error's gradient is in theta",
        recipe=Recipe(
            learned=RATES,
            parameters={"w1": Parameter("HE16", small_normal), "w2": Parameter("H16E", small_normal)},
            prepare=_prepare_deep,
        ),
    ),
)
