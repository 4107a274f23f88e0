"""Miras: memories by what they are surprised at (attentional bias) and by how they stay what they were (retention).

Memory M(x) = x + LN(W1 gelu(W2 x)), trained by plain gradient descent token by token, e = M_{t-1}(k_t) - v_t, o_t = M_t(q_t):

    Moneta   loss |e|_p^p                      A_t = alpha_t A_{t-1} - eta_t grad,   W_t = A_t / |A_t|_q^{q-2}     p = 3, q = 4
    Yaad     |e|^2 / 2 while |e| <= delta_t,   W_t = alpha_t W_{t-1} - eta_t grad
             delta_t |e|_1 beyond
    Memora   |e|^2 / 2                         W_t = softmax(alpha_t log W_{t-1} - eta_t grad), every row of W apart

With a matrix for a memory, M(x) = W1 x, the square loss and q = 2, this is the delta rule S_t = (alpha I - eta k k^T) S_{t-1} +
eta k v^T (Moneta with p = 2 has 2 eta for eta). Otherwise o is not linear in v: the maps are derivatives, and hold the loss
(surprise) and the retention of each token: |W_t - W_{t-1}|^2 / 2, and for Memora the divergence KL(W_t, W_{t-1}).

Behrouz, Razaviyayn, Zhong and Mirrokni, It's All Connected (arXiv 2504.13173), section 5.3, equations 24 to 27. There the rates
are vectors over channels; here they are numbers per head and token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from workbench.catalogue import Learned, Parameter, Recipe, Variant, example_tensors
from workbench.errors import WorkbenchError
from workbench.mixers import memory
from workbench.mixers.delta import unit
from workbench.mixers.image import spread
from workbench.mixers.memory import After, MemoryMap, Weights
from workbench.mixers.scored import check_tensor
from workbench.mixers.titans import half_square, small_normal

Rates = dict[str, Tensor]


def moneta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w1: Tensor,
    w2: Tensor | None,
    alpha: Tensor,
    eta: Tensor,
    *,
    loss_power: float = 3.0,
    norm_power: float = 4.0,
) -> tuple[Tensor, MemoryMap]:
    """Moneta: p-norm loss (p = ``loss_power`` > 1) and q-norm retention (q = ``norm_power`` >= 2; 2 is none).

    q, k ``[B, H, N, E]`` (the models give them length 1), v ``[B, G, N, E]``; the memory starts from ``w1`` ``[H, E, F]`` and
    ``w2`` ``[H, F, E]``, or from a matrix ``w1`` ``[H, E, E]`` with ``w2=None``. ``alpha`` (what is kept, in 0..1) and ``eta``
    (learning rate) ``[B, H, N]``. Output ``[B, H, N, E]``. A loop over tokens, as the recurrence is nonlinear.
    """
    for name, power, least in (("loss_power", loss_power, 1.0), ("norm_power", norm_power, 2.0)):
        if not power > least and not (name == "norm_power" and power == least):
            raise WorkbenchError(f"{name} is over 1 for the loss and at least 2 for the norm; got {power!r}")

    def loss(error: Tensor, t: int, rates: Rates) -> tuple[Tensor, Tensor]:
        size = error.abs()
        return (size**loss_power).sum(-1), loss_power * error.sign() * size ** (loss_power - 1)

    def normal(sums: Weights) -> Weights:
        return tuple(_normalised(a, norm_power) for a in sums)

    def start(weights: Weights) -> tuple[Weights, Weights]:
        return normal(weights), weights

    def update(now: Weights, sums: Weights, slopes: Weights, t: int, rates: Rates) -> After:
        sums = _descended(sums, slopes, t, rates)
        after = normal(sums)
        return After(after, sums, memory.square_distance(after, now))

    return _learned(q, k, v, w1, w2, {"alpha": alpha, "eta": eta}, loss, update, start)


def yaad(
    q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor | None, alpha: Tensor, eta: Tensor, delta: Tensor
) -> tuple[Tensor, MemoryMap]:
    """Yaad: a square loss for errors up to the length ``delta`` ``[B, H, N]`` (positive), their 1-norm beyond. Other arguments
    as in ``moneta``."""

    def loss(error: Tensor, t: int, rates: Rates) -> tuple[Tensor, Tensor]:
        limit = rates["delta"][:, :, t, None]
        near = error.square().sum(-1, keepdim=True).sqrt() <= limit
        cost, slope = half_square(error, t)
        return torch.where(near[..., 0], cost, limit[..., 0] * error.abs().sum(-1)), torch.where(
            near, slope, limit * error.sign()
        )

    def update(now: Weights, carried: Weights, slopes: Weights, t: int, rates: Rates) -> After:
        after = _descended(now, slopes, t, rates)
        return After(after, (), memory.square_distance(after, now))

    return _learned(q, k, v, w1, w2, {"alpha": alpha, "eta": eta, "delta": delta}, loss, update, lambda w: (w, ()))


def memora(
    q: Tensor, k: Tensor, v: Tensor, w1: Tensor, w2: Tensor | None, alpha: Tensor, eta: Tensor
) -> tuple[Tensor, MemoryMap]:
    """Memora: a square loss, and weights whose rows stay distributions (KL retention). They start from the softmax of ``w1`` and
    ``w2`` along their last axis. Other arguments as in ``moneta``."""

    def loss(error: Tensor, t: int, rates: Rates) -> tuple[Tensor, Tensor]:
        return half_square(error, t)

    def start(weights: Weights) -> tuple[Weights, Weights]:
        logs = tuple(w.log_softmax(-1) for w in weights)
        return tuple(log.exp() for log in logs), logs

    def update(now: Weights, logs: Weights, slopes: Weights, t: int, rates: Rates) -> After:
        after = tuple(log.log_softmax(-1) for log in _descended(logs, slopes, t, rates))
        divergence = [(a.exp() * (a - b)).sum((-2, -1)) for a, b in zip(after, logs, strict=True)]
        return After(tuple(log.exp() for log in after), after, memory.sum_layers(divergence))

    return _learned(q, k, v, w1, w2, {"alpha": alpha, "eta": eta}, loss, update, start)


def _learned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w1: Tensor,
    w2: Tensor | None,
    rates: Rates,
    loss: Callable[[Tensor, int, Rates], tuple[Tensor, Tensor]],
    update: Callable[[Weights, Weights, Weights, int, Rates], After],
    start: Callable[[Weights], tuple[Weights, Weights]],
) -> tuple[Tensor, MemoryMap]:
    work = memory.check_memory(q, k, v, w1, w2)
    for name, rate in rates.items():
        check_tensor(name, rate, tuple(q.shape[:3]))
    tensors = {"q": q, "k": k, "w1": w1, **rates} | ({} if w2 is None else {"w2": w2})

    def run(given: dict[str, Tensor], values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        given = {name: tensor.to(work) for name, tensor in given.items()}
        weights, carried = start(memory.starting(given["w1"], given.get("w2"), q.shape[0], work))
        return memory.remember(
            given["q"],
            given["k"],
            spread(values, q.shape[1]).to(work),
            weights,
            memory.Network(residual=True),
            lambda error, t: loss(error, t, given),
            lambda now, held, slopes, t: update(now, held, slopes, t, given),
            carried,
        )

    return memory.memory_attention(v, tensors, run)


def _descended(weights: Weights, slopes: Weights, t: int, rates: Rates) -> Weights:
    """alpha W - eta grad."""
    alpha, eta = memory.at(rates["alpha"], t), memory.at(rates["eta"], t)
    return tuple(alpha * w - eta * g for w, g in zip(weights, slopes, strict=True))


def _normalised(a: Tensor, power: float) -> Tensor:
    """A / |A|_q^{q-2}, each matrix apart; a zero matrix stays."""
    if power == 2:
        return a
    total = (a.abs() ** power).sum((-2, -1), keepdim=True)
    return a / torch.where(total == 0, 1.0, total) ** ((power - 2) / power)


# ------------------------------------------------------------------------ records


def _example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    head = (2, 2, tokens, 4)
    given = example_tensors(
        seed, dtype, q=head, k=head, v=(2, 1, tokens, 4), w1=(2, 4, 6), w2=(2, 6, 4), alpha=head[:3], eta=head[:3]
    )
    scaled = {"w1": 0.5 * given["w1"], "w2": 0.5 * given["w2"], "q": unit(given["q"]), "k": unit(given["k"])}
    rates = {"alpha": (given["alpha"] + 2.0).sigmoid(), "eta": 0.2 * given["eta"].sigmoid()}
    return {**given, **scaled, **rates}


def _yaad_example(seed: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Errors have a length of about 3: some of them are beyond delta."""
    delta = example_tensors(seed + 1, dtype, x=(2, 2, tokens))["x"]
    return {**_example(seed, tokens, dtype), "delta": 3.0 + delta.tanh()}


def _prepare(given: dict[str, Any]) -> dict[str, Any]:
    k = spread(given["k"], given["q"].shape[1])
    names = ("v", "w1", "w2", "alpha", "eta", "delta")
    return {"q": unit(given["q"]), "k": unit(k)} | {name: given[name] for name in names if name in given}


RATES = {"alpha": Learned("H", torch.sigmoid, bias=4.0), "eta": Learned("H", torch.sigmoid, bias=-2.0)}
NETWORK = {"w1": Parameter("HE16", small_normal), "w2": Parameter("H16E", small_normal)}
PAPER = (
    "#107 It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, Retention, and Online "
    "Optimization (2025)"
)
NOTE = "rates are one number per head and token, the paper has one per channel"

VARIANTS = (
    Variant(
        name="moneta",
        paper=PAPER,
        family="nonlinear",
        priority="B",
        operator=moneta,
        example=_example,
        value_input=None,
        causal=True,
        reference="equations of the paper, through secondary descriptions",
        note=NOTE,
        recipe=Recipe(learned=RATES, parameters=NETWORK, prepare=_prepare),
    ),
    Variant(
        name="yaad",
        paper=PAPER,
        family="nonlinear",
        priority="B",
        operator=yaad,
        example=_yaad_example,
        value_input=None,
        causal=True,
        reference="equations of the paper, through secondary descriptions",
        note=f"{NOTE}; beyond the threshold the gradient is that of the 1-norm",
        recipe=Recipe(
            learned={**RATES, "delta": Learned("H", softplus, bias=1.0)}, parameters=NETWORK, prepare=_prepare
        ),
    ),
    Variant(
        name="memora",
        paper=PAPER,
        family="nonlinear",
        priority="B",
        operator=memora,
        example=_example,
        value_input=None,
        causal=True,
        reference="equations of the paper, through secondary descriptions",
        note=f"{NOTE}; the softmax runs over rows of the weights",
        recipe=Recipe(learned=RATES, parameters=NETWORK, prepare=_prepare),
    ),
)
