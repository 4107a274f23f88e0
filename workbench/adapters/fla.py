"""flash-linear-attention (``fla``): its layers and operations, with the exact map of what they sum.

Maps come from the tensors that an operation was called with, in fla's layout ``[B, T, H, D]``, options of its kernels included
(L2 norms, gates and beta made inside the kernel). Values are those of the operation, after short convolutions; norm, output gate
and projection of the layer come after. Known operations, each in all forms (``chunk_``, ``fused_chunk_``, ``fused_recurrent_``,
``parallel_``):

    linear_attn, retention, lightning_attn, simple_gla   M_ij = s (q_i . k_j) exp(a_{j+1} + .. + a_i) / n_i
    gla, rwkv6                                           M_ij = s sum_r q_ir k_jr exp(a_{j+1,r} + ..)
    delta_rule, gated_delta_rule, kda                    S_t = A_t S_{t-1} + beta_t k_t v_t^T, A_t erases along k_t
    dplr_delta_rule, iplr_delta_rule, rwkv7              A_t = diag(exp a_t) + b_t a_t^T

and the layer Mamba2, which calls none. Checked with fla 0.6.0 on a CPU: the layers with their recurrent
kernels in Triton's interpreter, and the naive forms; the chunked kernels need a GPU and have not been run.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from workbench.adapters import library
from workbench.attention_map import AttentionMap
from workbench.errors import Refused, UnknownName, WorkbenchError
from workbench.mixers.delta import unit
from workbench.mixers.linear import key_mass
from workbench.mixers.mamba2 import state_space_dual
from workbench.patterns.delta import DeltaMap
from workbench.patterns.linear import ChannelDecayMap, LinearMap
from workbench.patterns.state import StateMap, dplr

INSTALL = "pip install attention-workbench[fla]"
FORMS = ("fused_mul_recurrent_", "fused_recurrent_", "fused_chunk_", "parallel_", "chunk_")
STATES = ("initial_state", "cu_seqlens", "cp_context", "gv")
"""Options that make an operation something else than a map of the tokens given."""
Given = Mapping[str, Any]


@dataclass(frozen=True)
class OpCall:
    """One call of an operation: ``layer`` is the name of the module that made it, ``arguments`` what it got, by name."""

    name: str
    arguments: dict[str, Any]
    result: Any
    layer: str = ""

    @property
    def values(self) -> Tensor:
        """What the map multiplies, ``[B, H, T, V]``."""
        return _heads_first(self.arguments["v"])

    @property
    def output(self) -> Tensor:
        """What the operation returned first, ``[B, H, T, V]``."""
        return _heads_first(self.result[0] if isinstance(self.result, tuple) else self.result)

    def map(self) -> AttentionMap:
        return op_map(self.name, self.arguments)


def fla_map(target: nn.Module | Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, AttentionMap]:
    """What ``target(*args, **kwargs)`` returns, unchanged, and its map.

    ``target`` is a layer of ``fla.layers`` that calls one of the known operations once, or such an operation of ``fla.ops``.
    While a layer runs its operations are watched through the names in its module, for all threads of the process.
    """
    library("fla", INSTALL)
    if isinstance(target, nn.Module):
        if type(target).__name__ == "Mamba2" and type(target).__module__.startswith("fla."):
            return _mamba2(target, *args, **kwargs)
        with fla_calls(target) as calls:
            result = target(*args, **kwargs)
        if len(calls) != 1:
            told = ", ".join(call.name for call in calls) or "none"
            raise WorkbenchError(
                f"fla_map takes a layer that calls one known operation; {type(target).__name__} called {told}. Known: "
                f"{', '.join(KINDS)}, and the layer Mamba2. For a model use fla_calls(model)"
            )
        return result, calls[0].map()
    name = getattr(target, "__name__", str(target))
    _kind(name)
    result = target(*args, **kwargs)
    return result, op_map(name, _bound(target, args, kwargs))


def from_fla(name: str, **arguments: Any) -> tuple[Tensor, AttentionMap]:
    """Output ``[B, T, H, V]`` and map of the operation ``name`` of ``fla.ops``, computed here, on any device and without fla.

    Arguments are those of fla, by name. The output has no gradient.
    """
    found = op_map(name, arguments)
    return _heads_first(found.matvec(_heads_first(arguments["v"]))), found


def op_map(name: str, arguments: Given) -> AttentionMap:
    """The map of the operation ``name`` of ``fla.ops`` with these ``arguments``, in fla's layout ``[B, T, H, D]``."""
    build = KINDS[_kind(name)]
    for option in STATES:
        if arguments.get(option) is not None:
            raise Refused(f"{name} was given {option}: its output is no map of the tokens of this call alone")
    if arguments.get("reverse"):
        raise Refused(f"{name} was run in reverse: flip the tokens instead")
    if not isinstance(arguments.get("v"), Tensor) or arguments["v"].ndim != 4:
        raise WorkbenchError(f"{name} takes v as a tensor [B, T, H, D]")
    with torch.no_grad():
        try:
            return build(name, arguments)
        except KeyError as error:
            raise WorkbenchError(f"{name} needs the argument {error}; got {', '.join(sorted(arguments))}") from None


@contextmanager
def fla_calls(model: nn.Module) -> Iterator[list[OpCall]]:
    """Record the known operations that the modules of ``model`` call: ``with fla_calls(model) as calls: model(x)``.

    Recording wraps the operations in the modules' own namespaces and puts them back at the end.
    """
    calls: list[OpCall] = []
    running: list[str] = []
    undo: list[Callable[[], object]] = []
    for label, module in model.named_modules():
        if type(module).__module__.startswith("fla."):

            def enter(*_: Any, label: str = label) -> None:
                running.append(label)

            def leave(*_: Any) -> None:
                running.pop()

            undo.append(module.register_forward_pre_hook(enter).remove)
            undo.append(module.register_forward_hook(leave, always_call=True).remove)
    spaces = {type(module).__module__ for module in model.modules() if type(module).__module__.startswith("fla.")}
    for space in spaces:
        names = vars(sys.modules[space])
        for name, value in list(names.items()):
            if callable(value) and _is_known(name):

                def put_back(names: dict[str, Any] = names, name: str = name, value: Any = value) -> None:
                    names[name] = value

                undo.append(put_back)
                names[name] = _watched(name, value, calls, running)
    try:
        yield calls
    finally:
        for step in reversed(undo):
            step()


def _watched(name: str, call: Callable[..., Any], calls: list[OpCall], running: list[str]) -> Callable[..., Any]:
    @wraps(call)
    def watched(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        calls.append(OpCall(name, _bound(call, args, kwargs), result, running[-1] if running else ""))
        return result

    return watched


def _bound(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(call).bind(*args, **kwargs)
    bound.apply_defaults()
    found = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= found.pop(parameter.name, {})
    return found


def _kind(name: str) -> str:
    for form in FORMS:
        if name.startswith(form):
            kind = name[len(form) :]
            if kind in KINDS:
                return kind
    raise UnknownName("operation of fla", name, [f"chunk_{kind}" for kind in KINDS])


def _is_known(name: str) -> bool:
    return any(name.startswith(form) and name[len(form) :] in KINDS for form in FORMS)


def _heads_first(x: Tensor) -> Tensor:
    """``[B, T, H, ...]`` to ``[B, H, T, ...]`` and back."""
    return x.transpose(1, 2)


def _scale(given: Given, width: int) -> float:
    scale = given.get("scale")
    return width**-0.5 if scale is None else float(scale)


# ------------------------------------------------------------------ linear attention and decay


def _linear(name: str, given: Given) -> AttentionMap:
    q, k = _heads_first(given["q"]), _heads_first(given["k"])
    scale = _scale(given, q.shape[3])
    # fla's own defaults differ between the forms
    if not given.get("normalize", not name.startswith("fused_recurrent")):
        return LinearMap(q, k, causal=True, scale=scale)
    work = torch.promote_types(q.dtype, torch.float32)
    mass = key_mass(q.to(work), k.to(work), True) * scale
    positive = scale > 0 and bool((q >= 0).all()) and bool((k >= 0).all())
    full = positive and bool((mass > 1e-4).all())
    row_sum = ("1" if full else "<=1") if positive else "free"
    sign = "nonnegative" if positive else "signed"
    return LinearMap(q, k, causal=True, scale=scale, norm=mass + 1e-10, sign=sign, row_sum=row_sum)


def _retention(name: str, given: Given) -> AttentionMap:
    q, k = _heads_first(given["q"]), _heads_first(given["k"])
    gamma = 1 - 2.0 ** (-5 - torch.arange(q.shape[1], dtype=torch.float64, device=q.device))
    return _decayed(q, k, gamma.log(), given)


def _lightning(name: str, given: Given) -> AttentionMap:
    q, k = _heads_first(given["q"]), _heads_first(given["k"])
    heads = torch.arange(q.shape[1], dtype=torch.float64, device=q.device)
    return _decayed(q, k, -8 / q.shape[1] * (1 - given["layer_idx"] / given["num_layers"]) * heads, given)


def _simple_gla(name: str, given: Given) -> AttentionMap:
    log = given.get("g_gamma") if given.get("g") is None else _heads_first(given["g"])
    return _decayed(_heads_first(given["q"]), _heads_first(given["k"]), log, given)


def _decayed(q: Tensor, k: Tensor, log: Tensor | None, given: Given) -> AttentionMap:
    if log is not None:
        log = log.to(torch.promote_types(q.dtype, torch.float32))
    return LinearMap(q, k, log, causal=True, scale=_scale(given, q.shape[3]))


def _gla(name: str, given: Given) -> AttentionMap:
    work = torch.promote_types(given["q"].dtype, torch.float32)
    q, k = (_heads_first(given[part]).to(work) for part in ("q", "k"))
    log = given.get("g") if given.get("gk") is None else given["gk"]
    log = torch.zeros_like(k) if log is None else _heads_first(log).to(work)
    return ChannelDecayMap(q, k, log, scale=_scale(given, q.shape[3]))


def _rwkv6(name: str, given: Given) -> AttentionMap:
    work = torch.promote_types(given["r"].dtype, torch.float32)
    r, k, log = (_heads_first(given[part]).to(work) for part in ("r", "k", "w"))
    r = r * _scale(given, r.shape[3])
    return ChannelDecayMap(r, k, log, diagonal=(r * given["u"].to(work)[:, None] * k).sum(-1))


# ------------------------------------------------------------------ states with erasure


def _delta(name: str, given: Given) -> AttentionMap:
    q, k = _heads_first(given["q"]), _heads_first(given["k"])
    if given.get("use_qk_l2norm_in_kernel"):
        q, k = unit(q), unit(k)
    log = given.get("g")
    if log is not None:
        log = _heads_first(_gate(log, given))
    if given.get("gk") is not None:
        raise Refused(f"{name} was given a decay per channel (gk): that is chunk_kda")
    beta = given.get("beta")
    beta = given["v"].new_ones(given["v"].shape[:3]) if beta is None else beta
    if beta.ndim != 3:
        raise Refused(
            f"{name} was given beta {list(beta.shape)}, one per channel: a map has one number per head and token"
        )
    scale = _scale(given, q.shape[3])
    return DeltaMap(
        q, k, _heads_first(_beta(beta, given)).to(q.dtype), None if log is None else log.to(q.dtype), scale=scale
    )


def _kda(name: str, given: Given) -> AttentionMap:
    values = given["v"].shape[2]
    work = torch.promote_types(given["q"].dtype, torch.float32)
    q, k = (_heads_first(given[part]).to(work) for part in ("q", "k"))
    if given.get("use_qk_l2norm_in_kernel"):
        q, k = unit(q), unit(k)
    q, k = (x.repeat_interleave(values // x.shape[1], 1) for x in (q, k))
    log = _heads_first(_gate(given["g"], given)).to(work)
    beta = _heads_first(_beta(given["beta"], given)).to(work)[..., None]
    return StateMap(q * _scale(given, q.shape[3]), beta * k, dplr(log.exp(), -beta * k, k * log.exp()))


def _gate(g: Tensor, given: Given) -> Tensor:
    """The log decay, which the kernel may make of logits: -exp(A) softplus(g + b), or bound * sigmoid(exp(A) (g + b))."""
    if not given.get("use_gate_in_kernel"):
        return g
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    axes = (-1,) if g.ndim == 3 else (-1, 1)
    if given.get("dt_bias") is not None:
        g = g + given["dt_bias"].to(g.dtype).view(g.shape[2:])
    rate = given.get("A_log")
    rate = g.new_ones(()) if rate is None else rate.to(g.dtype).exp().view(axes)
    bound = given.get("lower_bound")
    return -rate * softplus(g) if bound is None else bound * torch.sigmoid(rate * g)


def _beta(beta: Tensor, given: Given) -> Tensor:
    if not given.get("use_beta_sigmoid_in_kernel"):
        return beta
    beta = torch.sigmoid(beta.to(torch.promote_types(beta.dtype, torch.float32)))
    return 2 * beta if given.get("allow_neg_eigval") else beta


def _dplr(name: str, given: Given) -> AttentionMap:
    work = torch.promote_types(given["q"].dtype, torch.float32)
    q, k, a, b = (_heads_first(given[part]).to(work) for part in ("q", "k", "a", "b"))
    decay = torch.ones_like(k) if given.get("gk") is None else _heads_first(given["gk"]).to(work).exp()
    return StateMap(q * _scale(given, q.shape[3]), k, dplr(decay, b, a))


def _rwkv7(name: str, given: Given) -> AttentionMap:
    a, b = given["a"], given.get("b")
    if "kk" in given:  # fused_mul_recurrent_rwkv7 makes both of the removal key and its rate
        a, b = -given["kk"], given["kk"] * given["a"]
    scale = 1.0 if given.get("scale") is None else given["scale"]
    return _dplr(name, {"q": given["r"], "k": given["k"], "a": a, "b": b, "gk": given["w"], "scale": scale})


KINDS: dict[str, Callable[[str, Given], AttentionMap]] = {
    "linear_attn": _linear,
    "retention": _retention,
    "lightning_attn": _lightning,
    "simple_gla": _simple_gla,
    "gla": _gla,
    "rwkv6": _rwkv6,
    "delta_rule": _delta,
    "gated_delta_rule": _delta,
    "kda": _kda,
    "dplr_delta_rule": _dplr,
    "iplr_delta_rule": _dplr,
    "rwkv7": _rwkv7,
}
"""How to make the map of each operation."""


# ------------------------------------------------------------------ Mamba2


def _mamba2(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, AttentionMap]:
    if any(value is not None for value in (*args, *kwargs.values())):
        raise WorkbenchError("the map of Mamba2 takes the hidden states alone: no mask, no cache")
    held: list[Tensor] = []
    hook = layer.in_proj.register_forward_hook(lambda _m, _i, out: held.append(out))
    try:
        result = layer(x)
    finally:
        hook.remove()
    return result, mamba2_scan(layer, held[0])[1]


def mamba2_scan(layer: Any, projected: Tensor) -> tuple[Tensor, AttentionMap]:
    """Values ``[B, H, T, E]`` that enter the scan of a Mamba2 layer, after convolution and activation, and the scan's map, skip
    included; from what the layer's ``in_proj`` gave. Norm and gate come after."""
    if layer.n_groups != 1 or layer.D_has_hdim:
        raise Refused(
            f"Mamba2 is mapped with one group and a skip per head; this layer has n_groups={layer.n_groups}, for which fla's two "
            f"forms differ, or D_has_hdim={layer.D_has_hdim}"
        )
    with torch.no_grad():
        batch, length, width = projected.shape
        inner, size, heads = layer.intermediate_size, layer.ssm_state_size, layer.num_heads
        free = (width - 2 * inner - 2 * size - heads) // 2
        _, _, _, mixed, dt = projected.split([free, free, inner, layer.conv_dim, heads], -1)
        mixed = layer.act(layer.conv1d(mixed.transpose(1, 2))[..., :length].transpose(1, 2)).float()
        values, write, read = mixed.split([inner, size, size], -1)
        dt = softplus(dt.float() + layer.dt_bias).clamp(*layer.dt_limit)
        values = values.view(batch, length, heads, -1).transpose(1, 2)
        rate = -layer.A_log.float().exp()
        _, found = state_space_dual(values, dt.transpose(1, 2), rate, write[:, None], read[:, None], layer.D)
        return values, found
