"""Attention over space and time in factors: frames, speakers, sensors, periods.

    STATE                  per pixel over frames, scores from a convolution over the pair of feature maps
    temporal transformer   target frames to context frames, scores from whole convolved feature maps
    LoCoNet                each speaker over all of its time; all speakers within a few frames by a convolution
    STAN                   sensors at each moment, then moments of each sensor: M = P_time P_space
    MPTSNet                windows as long as the main periods, mixed by the spectrum: M = sum_p w_p P_p

Where tokens are pairs, they are numbered sensor by sensor (speaker by speaker): i = sensor * T + moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from workbench.catalogue import Learned, Recipe, Variant, example_tensors, nearest_grid
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.kernels.scores import working_dtype
from workbench.maps import GatedMap
from workbench.mixers.channels import check_sides
from workbench.mixers.gating import head_values
from workbench.mixers.image import Grid, grid_of
from workbench.mixers.scored import check_tensor
from workbench.mixers.softmax import softmax_attention
from workbench.patterns.algebra import KeysMap, ProductMap, SumMap
from workbench.patterns.lazy import LazyMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.sparse import SparseMap


def convolutional_attention(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor, bias: Tensor, *, slope: float = 0.2
) -> tuple[Tensor, LazyMap]:
    """STATE's attention over frames: at every pixel softmax_j leakyrelu(conv3x3([q_i, k_j]) + b) (Wang et al., 2023).

    q, k ``[B, H, L, C, rows, columns]`` feature maps of L frames; v ``[B, H * pixels, L, E]``, a head for every pixel
    of every head, numbered head by head; ``weight`` ``[H, 2 C, 3, 3]`` reads q and k side by side, ``bias`` ``[H]``. A
    convolution of a pair is the sum of two, so that scores need L and not L^2 feature maps.
    """
    check_tensor("q", q, ("B", "H", "L", "C", "rows", "columns"))
    check_tensor("k", k, tuple(q.shape))
    b, h, frames, c, rows, columns = q.shape
    heads = h * rows * columns
    check_tensor("v", v, (b, heads, frames, "E"))
    check_tensor("weight", weight, (h, 2 * c, 3, 3))
    check_tensor("bias", bias, (h,))
    work = working_dtype(q.dtype)

    def scored(maps: Tensor, half: Tensor) -> Tensor:
        stacked = maps.to(work).transpose(1, 2).reshape(b * frames, h * c, rows, columns)
        found = functional.conv2d(stacked, half.to(work), padding=1, groups=h)
        return found.view(b, frames, h * rows * columns).transpose(1, 2)

    left, right = weight.split(c, 1)
    shift = bias.to(work).repeat_interleave(rows * columns)[:, None]
    of_query, of_key = scored(q, left) + shift, scored(k, right)
    weights = functional.leaky_relu(of_query[..., None] + of_key[:, :, None], slope).softmax(-1)
    held = of_query.detach(), of_key.detach()

    def some(lo: int, hi: int) -> Tensor:
        return functional.leaky_relu(held[0][:, :, lo:hi, None] + held[1][:, :, None], slope).softmax(-1)

    found = LazyMap((b, heads, frames, frames), some, sign="nonnegative", row_sum="1")
    return weights.to(v.dtype) @ v, found


def convolutional_temporal_attention(
    target: Tensor, context: Tensor, v: Tensor, query: Tensor, key: Tensor, *, scale: float | None = None
) -> tuple[Tensor, SoftmaxMap]:
    """Attention of target frames to context frames by their convolved feature maps as a whole.

    ``target`` ``[B, Q, C, rows, columns]``, ``context`` ``[B, K, C, rows, columns]``; ``query`` and ``key``
    ``[H, D, C, 3, 3]``; v ``[B, H, K, V]`` feature maps of the context, flat. Scores are dot products over D and all
    pixels; ``scale=None`` is ``(D rows columns) ** -0.5``. Keys may stand before and after the target: the network
    predicts from both directions.
    """
    check_tensor("context", context, ("B", "K", "C", "rows", "columns"))
    b, frames, c, rows, columns = context.shape
    check_tensor("target", target, (b, "Q", c, rows, columns))
    check_tensor("query", query, ("H", "D", c, 3, 3))
    check_tensor("key", key, tuple(query.shape))
    heads = query.shape[0]
    check_tensor("v", v, (b, heads, frames, "V"))

    def convolved(images: Tensor, weight: Tensor) -> Tensor:
        found = functional.conv2d(images.flatten(0, 1), weight.to(images.dtype).flatten(0, 1), padding=1)
        return found.view(b, images.shape[1], heads, -1).transpose(1, 2)

    return softmax_attention(convolved(target, query), convolved(context, key), v, mask=Mask(), scale=scale)


def long_term_attention(
    q: Tensor, k: Tensor, v: Tensor, *, speakers: int, scale: float | None = None
) -> tuple[Tensor, SoftmaxMap]:
    """LoCoNet's long-term context: softmax attention of each speaker's frames to all frames of the same speaker (Wang
    et al., arXiv:2301.08237).

    q ``[B, H, N, E]``, k ``[B, G, N, E]``, v ``[B, G, N, V]`` for N = speakers * T tokens, speaker by speaker.
    """
    check_tensor("q", q, ("B", "H", "N", "E"))
    ids = _labels(q, speakers)[0]
    return softmax_attention(q, k, v, mask=Mask(documents=ids[None]), scale=scale)


def short_term_convolution(v: Tensor, kernel: Tensor) -> tuple[Tensor, KeysMap]:
    """LoCoNet's short-term context: one convolution over all speakers and a few frames, a kernel for each speaker that
    comes out (Wang et al., arXiv:2301.08237).

    ``kernel`` ``[C out, S out, C in, S, taps]`` with odd taps, 7 in the paper. It joins channels: output
    ``[B, C out, N, 1]`` has a head per channel, and keys are the tokens of all input channels, channel after channel: v
    ``[B, 1, C in * N, 1]``, N = S * T tokens, speaker by speaker. The map's parts are the input channels.
    """
    check_tensor("kernel", kernel, ("C out", "S", "C in", "S", "taps"))
    leaving, speakers, entering, seen, size = kernel.shape
    if seen != speakers or size % 2 == 0:
        raise WorkbenchError(
            f"kernel is [C out, S, C in, S, taps] with as many speakers out as in and odd taps; got {list(kernel.shape)}"
        )
    check_tensor("v", v, ("B", 1, "C in * N", 1))
    b, tokens = v.shape[0], v.shape[2] // entering
    if v.shape[2] % entering or tokens % speakers:
        raise WorkbenchError(
            f"v holds {entering} channels of {speakers} speakers over the same frames; got {v.shape[2]} numbers"
        )
    frames = tokens // speakers
    image = v.view(b, entering, speakers, frames)
    weight = kernel.to(v.dtype).transpose(0, 1).flatten(0, 1)
    made = functional.conv2d(image, weight, padding=(0, size // 2))  # [B, S * C out, 1, T]
    out = made.view(b, speakers, leaving, frames).transpose(1, 2).reshape(b, leaving, tokens, 1)
    moment = torch.arange(frames, device=v.device)[:, None] + torch.arange(size, device=v.device) - size // 2
    inside = (moment >= 0) & (moment < frames)
    keys = torch.arange(speakers, device=v.device)[:, None] * frames + moment[:, None]  # [T, S, taps]
    at = keys.masked_fill(~inside[:, None], -1).flatten(1).repeat(speakers, 1)[None, None]
    parts = []
    for channel in range(entering):
        rows = kernel[:, :, channel].detach().flatten(2)  # [C out, S, S * taps]
        shared = rows.repeat_interleave(frames, 1)[None].expand(b, -1, -1, -1)
        parts.append(SparseMap(at, shared, tokens, kv_heads=1))
    return out, KeysMap(*parts)


def space_time_attention(
    q: Tensor, k: Tensor, time_q: Tensor, time_k: Tensor, v: Tensor, *, grid: Grid, scale: float | None = None
) -> tuple[Tensor, ProductMap]:
    """STAN's cascade: attention among sensors at each moment, then among the moments of each sensor, M = P_time
    P_space.

    q, k ``[B, H, N, E]`` of the spatial module, ``time_q`` and ``time_k`` of the temporal one, v ``[B, H, N, V]``;
    ``grid`` (sensors, moments). Projections of values between the two, norms and residuals are not part of it.
    """
    check_tensor("q", q, ("B", "H", "N", "E"))
    for name, tensor in (("k", k), ("time_q", time_q), ("time_k", time_k)):
        check_tensor(name, tensor, tuple(q.shape))
    check_tensor("v", v, (*q.shape[:3], "V"))
    sensors, _ = check_sides(grid, q.shape[2], 2)
    of_sensor, of_moment = _labels(q, sensors)
    between, space = softmax_attention(q, k, v, mask=Mask(documents=of_moment[None]), scale=scale)
    out, time = softmax_attention(time_q, time_k, between, mask=Mask(documents=of_sensor[None]), scale=scale)
    return out, ProductMap(time, space)


def main_periods(x: Tensor, count: int) -> list[int]:
    """Lengths of the strongest waves in a series ``[B, N, C]``, the strongest first, without repetitions; N itself if
    none."""
    check_tensor("x", x, ("B", "N", "C"))
    strength = torch.fft.rfft(x.to(working_dtype(x.dtype)), dim=1).abs().mean((0, 2))[1:]
    order = (strength.argsort(descending=True, stable=True) + 1).tolist()
    found = list(dict.fromkeys(x.shape[1] // frequency for frequency in order))
    return found[:count] or [x.shape[1]]


def periodic_attention(
    q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, periods: Sequence[int], scale: float | None = None
) -> tuple[Tensor, SumMap]:
    """MPTSNet's attention in windows as long as each main period: M = sum_p w_p P_p, w = softmax of the series'
    amplitudes.

    q, k ``[P, B, H, N, E]``, one projection per period, v ``[B, H, N, V]``; ``periods`` P whole numbers, as
    ``main_periods`` finds them; ``x`` ``[B, N, C]`` the series whose spectrum weighs them: the mean amplitude over
    channels at frequency N // p. P_p is softmax attention inside of windows of p tokens; the last may be shorter.
    """
    if not periods or any(not isinstance(p, int) or p < 1 for p in periods):
        raise WorkbenchError(f"periods are positive whole numbers of tokens, at least one; got {list(periods)}")
    check_tensor("q", q, (len(periods), "B", "H", "N", "E"))
    check_tensor("k", k, tuple(q.shape))
    _, b, h, n, _ = q.shape
    check_tensor("v", v, (b, h, n, "V"))
    check_tensor("x", x, (b, n, "C"))
    spectrum = torch.fft.rfft(x.to(working_dtype(x.dtype)), dim=1).abs().mean(2)
    strength = torch.stack([spectrum[:, min(n // p, spectrum.shape[1] - 1)] for p in periods], 1)
    shares = strength.softmax(1).to(v.dtype)
    out, parts = torch.zeros_like(v), []
    for place, period in enumerate(periods):
        ids = torch.arange(n, device=v.device) // period
        part, found = softmax_attention(q[place], k[place], v, mask=Mask(documents=ids[None]), scale=scale)
        share = shares[:, place, None, None]
        out = out + share[..., None] * part
        parts.append(GatedMap(found, share.detach().expand(b, h, n)))
    return out, SumMap(*parts, row_sum="1")


def _labels(q: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Row and column of every token ``[N]`` of a table with ``rows`` rows."""
    n = q.shape[2]
    if rows < 1 or n % rows:
        raise WorkbenchError(f"{n} tokens are the same number for each of the rows; got {rows} rows")
    place = torch.arange(n, device=q.device)
    return place // (n // rows), place % (n // rows)


def _state_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    maps = dict.fromkeys(("q", "k"), (2, 2, count, 3, 2, 2))
    return example_tensors(seed, dtype, **maps, v=(2, 8, count, 3), weight=(2, 6, 3, 3), bias=(2,))


def _temporal_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    kernels = dict.fromkeys(("query", "key"), (2, 3, 2, 3, 3))
    frames = {"target": (2, 2, 2, 2, 3), "context": (2, count, 2, 2, 3)}
    found = example_tensors(seed, dtype, **frames, v=(2, 2, count, 5), **kernels)
    return {**found, "query": found["query"] / 3, "key": found["key"] / 3}


def _long_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    speakers, frames = nearest_grid(count)
    n = speakers * frames
    shapes = {"q": (2, 4, n, 4), "k": (2, 2, n, 4), "v": (2, 2, n, 5)}
    return {**example_tensors(seed, dtype, **shapes), "speakers": speakers}


def _short_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    speakers, frames = nearest_grid(count)
    shapes = {"v": (2, 1, 2 * speakers * frames, 1), "kernel": (3, speakers, 2, speakers, 7)}
    return example_tensors(seed, dtype, **shapes)


def _stan_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    grid = nearest_grid(count)
    n = grid[0] * grid[1]
    shapes = dict.fromkeys(("q", "k", "time_q", "time_k"), (2, 2, n, 4))
    return {**example_tensors(seed, dtype, **shapes, v=(2, 2, n, 5)), "grid": grid}


def _periodic_example(seed: int, count: int, dtype: torch.dtype) -> dict[str, Any]:
    found = example_tensors(
        seed, dtype, q=(3, 2, 2, count, 4), k=(3, 2, 2, count, 4), v=(2, 2, count, 5), x=(2, count, 3)
    )
    periods = [min(period, count) for period in (3, 5, 7)]
    return {**found, "x": found["x"] / 4, "periods": periods}


def _stan_parts(parts: dict[str, Any]) -> dict[str, Any]:
    heads = parts["q"].shape[1]
    k, v = parts["k"].repeat_interleave(heads // parts["k"].shape[1], 1), head_values(parts)
    times = {name: parts[name] for name in ("time_q", "time_k")}
    return {"q": parts["q"], "k": k, "v": v, **times, "grid": grid_of(parts)}


def _periodic_parts(parts: dict[str, Any]) -> dict[str, Any]:
    heads = parts["q"].shape[1]
    k, v = parts["k"].repeat_interleave(heads // parts["k"].shape[1], 1), head_values(parts)
    periods = main_periods(parts["x"].detach(), 3)
    q, k = (x[None].expand(len(periods), *x.shape) for x in (parts["q"], k))
    return {"q": q, "k": k, "v": v, "x": parts["x"], "periods": periods}


def _long_parts(parts: dict[str, Any]) -> dict[str, Any]:
    return {**{name: parts[name] for name in ("q", "k", "v")}, "speakers": grid_of(parts)[0]}


_LOCONET = "#133 LoCoNet: Long-Short Context Network for Active Speaker Detection (2023)"

VARIANTS = (
    Variant(
        name="state-convolutional-attention",
        paper="#0 Making Reconstruction-based Method Great Again for Video Anomaly Detection (2023)",
        family="weighted softmax",
        priority="C",
        operator=convolutional_attention,
        example=_state_example,
        reference="wyzjack/MRMGA4VAD module.py",
    ),
    Variant(
        name="convolutional-temporal-attention",
        paper="#47 Advancing Video Anomaly Detection: A Bi-Directional Hybrid Framework for Enhanced Single- and Multi-Task "
        "Approaches (2025)",
        family="softmax",
        priority="C",
        operator=convolutional_temporal_attention,
        example=_temporal_example,
        note="Known from the abstract: 3x3 projections and one score per pair of frames are assumed.",
    ),
    Variant(
        name="loconet-long-term",
        paper=_LOCONET,
        family="softmax",
        priority="C",
        operator=long_term_attention,
        example=_long_example,
        reference="SJTUwxz/LoCoNet_ASD model/attentionLayer.py",
        recipe=Recipe(prepare=_long_parts),
    ),
    Variant(
        name="loconet-short-term",
        paper=_LOCONET,
        family="convolution",
        priority="C",
        operator=short_term_convolution,
        example=_short_example,
        reference="SJTUwxz/LoCoNet_ASD model/convLayer.py",
        note="Keys are the tokens of each input channel, as the convolution joins channels. The network after it is left out.",
    ),
    Variant(
        name="stan-space-time",
        paper="#89 Adversarial Spatio-Temporal Attention Networks for Epileptic Seizure Forecasting (2025)",
        family="two-stage",
        priority="C",
        operator=space_time_attention,
        example=_stan_example,
        note="Known from the abstract: space first, then time.",
        recipe=Recipe(learned={"time_q": Learned("HE"), "time_k": Learned("HE")}, prepare=_stan_parts),
    ),
    Variant(
        name="mptsnet-periodic-attention",
        paper="#71 MPTSNet: Integrating Multiscale Periodic Local Patterns and Global Dependencies for Multivariate Time Series "
        "Classification (2025)",
        family="weighted softmax",
        priority="C",
        operator=periodic_attention,
        example=_periodic_example,
        reference="MUYang99/MPTSNet",
        note="Windows and weights after the released description; convolutions and the global transformer around them are left "
        "out.",
        recipe=Recipe(prepare=_periodic_parts),
    ),
)
