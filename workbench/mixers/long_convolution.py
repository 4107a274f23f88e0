"""Long convolutions of sequences with gates: BaseConv, H3, Hyena and Orchid.

    y_c(i) = left_c(i) sum_j h_c(i - j) right_c(j) v_c(j)

Every channel has a Toeplitz map with a gate on either side; products go by FFT. The four differ in where the kernel
comes from (a table, a diagonal state space, a network over positions, the input itself) and in their gates. Values are
``[B, H, N, E]`` with channel c = h*E + e of C = H*E.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import Learned, Parameter, Recipe, Variant, example_tensors
from workbench.errors import UnknownName, WorkbenchError
from workbench.kernels.scores import working_dtype
from workbench.mixers.channels import (
    causal_convolution,
    channel_map,
    check_odd,
    check_values,
    check_whole,
    planes,
    tokens,
)
from workbench.mixers.gating import SOURCE, UNUSED, head_values, small
from workbench.mixers.scored import check_tensor
from workbench.patterns.toeplitz import ToeplitzMap

CONDITIONS = ("magnitude", "correlation")


def base_convolution(x: Tensor, v: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor) -> tuple[Tensor, AttentionMap]:
    """y = (W x + b) * (h conv v): the simplest gated convolution (Arora et al., arXiv:2312.04927).

    x, v ``[B, H, N, E]``, in a network the same features; ``weight`` ``[C, C]``, ``bias`` ``[C]``; ``kernel`` h
    ``[C, L]`` of any length, causal, read as far as the sequence goes. The bias of the convolution and the residual are
    not part of it.
    """
    _, h, n, e = check_values(v, x=x)
    c = h * e
    check_tensor("weight", weight, (c, c))
    check_tensor("bias", bias, (c,))
    check_tensor("kernel", kernel, (c, "L"))
    gate = weight.to(x.dtype) @ planes(x) + bias.to(x.dtype)[:, None]
    out = (gate * causal_convolution(planes(v), kernel)).to(v.dtype)
    return tokens(out, h), _causal(kernel[None], n, e, gate, None)


def state_kernel(decay: Tensor, frequency: Tensor, cosine: Tensor, sine: Tensor, length: int) -> Tensor:
    """Kernel of a diagonal state space, ``[C, length]``: sum_s exp(-exp(d_s) t) (a_s cos(f_s t) + b_s sin(f_s t)).

    ``decay`` d, ``frequency`` f, ``cosine`` a and ``sine`` b are ``[C, S]``: the real and imaginary parts of S complex
    states.
    """
    t = torch.arange(length, device=decay.device, dtype=decay.dtype)
    turn = frequency[..., None] * t
    waves = cosine[..., None] * turn.cos() + sine[..., None] * turn.sin()
    return ((-decay.exp()[..., None] * t).exp() * waves).sum(1)


def h3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shift: Tensor,
    shift_skip: Tensor,
    decay: Tensor,
    frequency: Tensor,
    cosine: Tensor,
    sine: Tensor,
    skip: Tensor,
) -> tuple[Tensor, AttentionMap]:
    """y = q * (S + D)(u), u = (shift conv k + D_k k) * v, with a diagonal state space S (Fu et al., arXiv:2212.14052).

    q, k, v ``[B, H, N, E]``, one-dimensional heads as in the released models; ``shift`` ``[C, taps]`` a short causal
    kernel over keys and ``shift_skip`` ``[C]``; ``decay``, ``frequency``, ``cosine``, ``sine`` ``[C, S]`` as in
    ``state_kernel``; ``skip`` ``[C]``.
    """
    _, h, n, e = check_values(v, q=q, k=k)
    c = h * e
    check_tensor("shift", shift, (c, "taps"))
    check_tensor("shift_skip", shift_skip, (c,))
    check_tensor("decay", decay, (c, "S"))
    for name, tensor in (("frequency", frequency), ("cosine", cosine), ("sine", sine)):
        check_tensor(name, tensor, tuple(decay.shape))
    check_tensor("skip", skip, (c,))
    keys = planes(k)
    shifted = causal_convolution(keys, shift) + shift_skip.to(k.dtype)[:, None] * keys
    work = working_dtype(v.dtype)
    decay, frequency, cosine, sine = (
        part.to(torch.promote_types(work, part.dtype)) for part in (decay, frequency, cosine, sine)
    )
    kernel = _with_skip(state_kernel(decay, frequency, cosine, sine, n), skip)
    out = planes(q) * causal_convolution((shifted * planes(v)).to(work), kernel)
    return tokens(out.to(v.dtype), h), _causal(kernel[None], n, e, planes(q), shifted)


def hyena_kernel(
    enter: Tensor, hidden: Tensor, leave: Tensor, decay: Tensor, length: int, *, longest: int, shift: float = 0.0
) -> Tensor:
    """Kernel of a network over positions, ``[C, length]``: (exp(-|decay| t) + shift) leave sin(hidden sin(enter z(t))).

    z(t) is t, and cosines and sines of ``bands`` frequencies, with t = i / (longest - 1); ``enter``
    ``[order, 2 bands + 1]``, ``hidden`` ``[order, order]``, ``leave`` ``[C, order]``, ``decay`` ``[C]``.
    """
    bands = (enter.shape[1] - 1) // 2
    place = torch.arange(length, device=enter.device, dtype=enter.dtype)
    t = place / max(longest - 1, 1)
    speeds = torch.linspace(1e-4, max(bands - 1, 0), bands, device=enter.device, dtype=enter.dtype)
    turn = speeds[:, None] * (2 * math.pi * place / longest)
    z = torch.cat([t[None], turn.cos(), -turn.sin()])
    raw = leave @ torch.sin(hidden @ torch.sin(enter @ z))
    return raw * ((-decay.abs()[:, None] * t).exp() + shift)


def hyena(
    enter_gate: Tensor,
    leave_gate: Tensor,
    v: Tensor,
    enter: Tensor,
    hidden: Tensor,
    leave: Tensor,
    decay: Tensor,
    skip: Tensor,
    *,
    longest: int = 1024,
) -> tuple[Tensor, AttentionMap]:
    """y = x_2 * ((h + D) conv (x_1 * v)): the Hyena operator of order 2 with an implicit kernel (Poli et al.,
    arXiv:2302.10866).

    x_1 = ``enter_gate``, x_2 = ``leave_gate`` and v ``[B, H, N, E]`` are projections after their short convolutions;
    the other tensors make the kernel as in ``hyena_kernel``; ``skip`` D ``[C]``; ``longest`` is the length that
    positions are counted in.
    """
    _, h, n, e = check_values(v, enter_gate=enter_gate, leave_gate=leave_gate)
    c = h * e
    check_tensor("enter", enter, ("order", "2 bands + 1"))
    order = enter.shape[0]
    if enter.shape[1] % 2 == 0 or enter.shape[1] < 3:
        raise WorkbenchError(f"enter reads t and pairs of waves, an odd number of at least 3; got {list(enter.shape)}")
    check_tensor("hidden", hidden, (order, order))
    check_tensor("leave", leave, (c, order))
    check_tensor("decay", decay, (c,))
    check_tensor("skip", skip, (c,))
    if n > check_whole("longest", longest):
        raise WorkbenchError(f"{n} tokens are more than longest={longest}")
    work = working_dtype(v.dtype)
    enter, hidden, leave, decay = (part.to(work) for part in (enter, hidden, leave, decay))
    kernel = _with_skip(hyena_kernel(enter, hidden, leave, decay, n, longest=longest), skip.to(work))
    out = planes(leave_gate) * causal_convolution(planes(enter_gate * v).to(work), kernel)
    return tokens(out.to(v.dtype), h), _causal(kernel[None], n, e, planes(leave_gate), planes(enter_gate))


def orchid(
    x: Tensor,
    enter_gate: Tensor,
    leave_gate: Tensor,
    v: Tensor,
    first: Tensor,
    second: Tensor,
    spectral: Tensor,
    *,
    conditioning: str = "magnitude",
) -> tuple[Tensor, AttentionMap]:
    """y = g_2 * (h(x) conv (g_1 * v)), a circular convolution whose kernel the input makes (Karami and Ghodsi,
    arXiv:2402.18508).

    The kernel does not move when x does, so that the operator shifts as x does. ``"magnitude"``: its spectrum is a
    convolution over frequencies of |F(conv_1 x)|; ``"correlation"``: that of conj(F(conv_1 x)) F(conv_2 x), the
    cross-correlation of two short convolutions. x, gates and v ``[B, H, N, E]``; ``first`` and ``second`` ``[C, taps]``
    odd circular kernels over tokens; ``spectral`` ``[C, taps]`` an odd kernel over frequencies, which the spectrum's
    symmetry makes even.
    """
    if conditioning not in CONDITIONS:
        raise UnknownName("conditioning", conditioning, CONDITIONS)
    _, h, n, e = check_values(v, x=x, enter_gate=enter_gate, leave_gate=leave_gate)
    c = h * e
    for name, tensor in (("first", first), ("second", second), ("spectral", spectral)):
        check_odd(name, tensor, c, 1)
    work = working_dtype(v.dtype)
    image = planes(x).to(work)
    one = torch.fft.fft(_circular(image, first))
    two = torch.fft.fft(_circular(image, second))
    spectrum = one.abs() if conditioning == "magnitude" else one.conj() * two
    spectrum = _circular(spectrum, (spectral + spectral.flip(1)) / 2)
    kernel = torch.fft.ifft(spectrum).real / math.sqrt(n)
    left, right = planes(leave_gate), planes(enter_gate)
    seen = torch.fft.rfft((right * planes(v)).to(work)) * torch.fft.rfft(kernel)
    out = (left * torch.fft.irfft(seen, n=n)).to(v.dtype)
    inner = ToeplitzMap(kernel, queries=n, keys=n, circular=True, left=left, right=right)
    return tokens(out, h), channel_map(inner, e)


def _circular(x: Tensor, kernel: Tensor) -> Tensor:
    """Centred circular correlation of ``[B, C, N]`` with odd ``[C, taps]``."""
    out = torch.zeros_like(x)
    for tap in range(kernel.shape[1]):
        out = out + kernel[:, tap, None].to(x.dtype) * x.roll(kernel.shape[1] // 2 - tap, 2)
    return out


def _with_skip(kernel: Tensor, skip: Tensor) -> Tensor:
    """A kernel ``[C, L]`` with ``skip`` ``[C]`` added to its first tap."""
    return torch.cat([kernel[:, :1] + skip[:, None], kernel[:, 1:]], 1)


def _causal(kernel: Tensor, n: int, width: int, left: Tensor, right: Tensor | None) -> AttentionMap:
    inner = ToeplitzMap(kernel[..., :n], queries=n, keys=n, left=left, right=right)
    return channel_map(inner, width)


def _base_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    shapes = {"x": (2, 3, count, 1), "v": (2, 3, count, 1), "weight": (3, 3), "bias": (3,), "kernel": (3, 9)}
    return example_tensors(seed, dtype, **shapes)


def _h3_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    features = dict.fromkeys(("q", "k", "v"), (2, 3, count, 1))
    states = dict.fromkeys(("decay", "frequency", "cosine", "sine"), (3, 4))
    return example_tensors(seed, dtype, **features, **states, shift=(3, 4), shift_skip=(3,), skip=(3,))


def _hyena_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    features = dict.fromkeys(("enter_gate", "leave_gate", "v"), (2, 3, count, 1))
    network = {"enter": (6, 5), "hidden": (6, 6), "leave": (3, 6), "decay": (3,), "skip": (3,)}
    return {**example_tensors(seed, dtype, **features, **network), "longest": max(16, count)}


def _orchid_example(conditioning: str) -> Any:
    def example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
        features = dict.fromkeys(("x", "enter_gate", "leave_gate", "v"), (2, 3, count, 1))
        kernels = {"first": (3, 3), "second": (3, 3), "spectral": (3, 3)}
        return {**example_tensors(seed, dtype, **features, **kernels), "conditioning": conditioning}

    return example


def _flattened(parts: dict[str, Any], *names: str) -> dict[str, Tensor]:
    """Parameters ``HE`` or ``HEm`` as ``[C]`` and ``[C, m]``."""
    return {name: parts[name].flatten(0, 1) for name in names}


def _base_parts(parts: dict[str, Any]) -> dict[str, Any]:
    weight = parts["weight"].flatten(2).flatten(0, 1)
    return {"x": parts["source"], "v": head_values(parts), "weight": weight, **_flattened(parts, "bias", "kernel")}


def _h3_parts(parts: dict[str, Any]) -> dict[str, Any]:
    k = parts["k"].repeat_interleave(parts["q"].shape[1] // parts["k"].shape[1], 1)
    made = _flattened(parts, "shift", "shift_skip", "decay", "frequency", "cosine", "sine", "skip")
    return {"q": parts["q"], "k": k, "v": head_values(parts), **made}


def _hyena_parts(parts: dict[str, Any]) -> dict[str, Any]:
    gates = {name: parts[name] for name in ("enter_gate", "leave_gate")}
    network = {"enter": parts["enter"].unflatten(0, (16, 5)), "hidden": parts["hidden"].unflatten(0, (16, 16))}
    longest = max(1024, parts["v"].shape[2])
    return {
        **gates,
        "v": head_values(parts),
        **network,
        **_flattened(parts, "leave", "decay", "skip"),
        "longest": longest,
    }


def _orchid_parts(conditioning: str) -> Any:
    def prepare(parts: dict[str, Any]) -> dict[str, Any]:
        features = {name: parts[name] for name in ("enter_gate", "leave_gate")}
        made = _flattened(parts, "first", "second", "spectral")
        return {"x": parts["source"], **features, "v": head_values(parts), **made, "conditioning": conditioning}

    return prepare


def _ramp(shape: tuple[int, ...]) -> Tensor:
    """Decays from slow to fast over channels."""
    return torch.linspace(1.0, 8.0, math.prod(shape)).view(shape)


_GATES = {"enter_gate": Learned("HE"), "leave_gate": Learned("HE")}
_ORCHID = {name: Parameter("HE3", small) for name in ("first", "second", "spectral")}
_STATES = {name: Parameter("HE8", small) for name in ("decay", "frequency", "cosine", "sine")}
_ORCHID_PAPER = "#65 Orchid: Flexible and Data-Dependent Convolution for Sequence Modeling (2024)"

VARIANTS = (
    Variant(
        name="base-conv",
        paper="#19 Zoology: Measuring and Improving Recall in Efficient Language Models (2023)",
        family="convolution",
        priority="B",
        operator=base_convolution,
        example=_base_example,
        causal=True,
        reference="HazyResearch/zoology zoology/mixers/base_conv.py",
        recipe=Recipe(
            learned=SOURCE,
            parameters={"weight": Parameter("HEHE", small), "bias": Parameter("HE"), "kernel": Parameter("HE64", small)},
            prepare=_base_parts,
            ignores=UNUSED,
        ),
    ),
    Variant(
        name="h3",
        paper="Hungry Hungry Hippos: Towards Language Modeling with State Space Models (2022)",
        family="convolution",
        priority="B",
        operator=h3,
        example=_h3_example,
        causal=True,
        reference="HazyResearch/zoology zoology/mixers/h3/h3.py",
        note="The shift state space is given by its kernel.",
        recipe=Recipe(
            parameters={
                "shift": Parameter("HE4", small), "shift_skip": Parameter("HE", torch.ones), **_STATES,
                "skip": Parameter("HE", small),
            },
            prepare=_h3_parts,
        ),
    ),
    Variant(
        name="hyena",
        paper="Hyena Hierarchy: Towards Larger Convolutional Language Models (2023)",
        family="convolution",
        priority="B",
        operator=hyena,
        example=_hyena_example,
        causal=True,
        reference="HazyResearch/zoology zoology/mixers/hyena.py",
        note="Order 2; one hidden layer in the filter network, fixed frequency of its sines. The short convolutions before it "
        "are not part of the operator.",
        recipe=Recipe(
            learned=_GATES,
            parameters={
                "enter": Parameter("80", small), "hidden": Parameter("256", small), "leave": Parameter("HE16", small),
                "decay": Parameter("HE", _ramp), "skip": Parameter("HE", small),
            },
            prepare=_hyena_parts,
            ignores=UNUSED,
        ),
    ),
    Variant(
        name="orchid",
        paper=_ORCHID_PAPER,
        family="convolution",
        priority="B",
        operator=orchid,
        example=_orchid_example("magnitude"),
        note="From the paper's text; the scale 1/sqrt(N) of the kernel and the even kernel over frequencies are assumed.",
        recipe=Recipe(
            learned={**_GATES, **SOURCE}, parameters=_ORCHID, prepare=_orchid_parts("magnitude"), ignores=UNUSED
        ),
    ),
    Variant(
        name="orchid-correlation",
        paper=_ORCHID_PAPER,
        family="convolution",
        priority="B",
        operator=orchid,
        example=_orchid_example("correlation"),
        note="The second conditioning network of the paper; scale and kernel over frequencies as for the first.",
        recipe=Recipe(
            learned={**_GATES, **SOURCE}, parameters=_ORCHID, prepare=_orchid_parts("correlation"), ignores=UNUSED
        ),
    ),
)  # fmt: skip
