"""Attention in factors of space and time against loops over frames, speakers and sensors."""

from __future__ import annotations

import cmath
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.mixers.space_time import main_periods, periodic_attention, space_time_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def given(name: str, tokens: int = 12, **changes: Any) -> dict[str, Any]:
    return {**variants()[name].example(3, tokens, torch.float64), **changes}


def masked(q: Tensor, k: Tensor, label: list[int]) -> Tensor:
    """Softmax rows over the keys with the query's label."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    n = q.shape[2]
    out = torch.zeros(*q.shape[:3], n, dtype=torch.float64)
    for i in range(n):
        seen = [j for j in range(n) if label[j] == label[i]]
        out[:, :, i, seen] = ((q[:, :, i : i + 1] * k[:, :, seen]).sum(-1) / math.sqrt(q.shape[3])).softmax(-1)
    return out


def near(image: Tensor, weight: Tensor, y: int, x: int) -> Tensor:
    """3x3 convolution ``[..., C, R, W]`` with ``[C, 3, 3]`` at one pixel."""
    total = torch.zeros(image.shape[:-3], dtype=torch.float64)
    for a, b in itertools.product(range(3), range(3)):
        if 0 <= y + a - 1 < image.shape[-2] and 0 <= x + b - 1 < image.shape[-1]:
            total = total + (image[..., y + a - 1, x + b - 1] * weight[:, a, b]).sum(-1)
    return total


def a_convolution_scores_pairs_of_frames(op: Operator) -> None:
    p = given("state-convolutional-attention", 5)
    wanted = torch.zeros(2, 8, 5, 5, dtype=torch.float64)
    for h, y, x in itertools.product(range(2), range(2), range(2)):
        for i in range(5):
            scores = []
            for j in range(5):
                pair = torch.cat([p["q"][:, h, i], p["k"][:, h, j]], 1)
                score = near(pair, p["weight"][h], y, x) + p["bias"][h]
                scores.append(torch.where(score > 0, score, 0.2 * score))
            wanted[:, 4 * h + 2 * y + x, i] = torch.stack(scores, -1).softmax(-1)
    out, found = op(**p)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ p["v"])


def frames_score_as_wholes(op: Operator) -> None:
    p = given("convolutional-temporal-attention", 5)
    wanted = torch.zeros(2, 2, 2, 5, dtype=torch.float64)
    for h, i, j in itertools.product(range(2), range(2), range(5)):
        for d, y, x in itertools.product(range(3), range(2), range(3)):
            q = near(p["target"][:, i], p["query"][h, d], y, x)
            wanted[:, h, i, j] += q * near(p["context"][:, j], p["key"][h, d], y, x) / math.sqrt(18)
    wanted = wanted.softmax(-1)
    out, found = op(**p)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ p["v"])


def speakers_keep_to_themselves(op: Operator) -> None:
    p = given("loconet-long-term")
    wanted = masked(p["q"], p["k"], [i // 4 for i in range(12)])
    assert p["speakers"] == 3
    out, found = op(**p)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ p["v"].repeat_interleave(2, 1))
    alone = masked(p["q"], p["k"], [0] * 12)
    torch.testing.assert_close(op(**{**p, "speakers": 1})[1].dense(), alone)


def all_speakers_within_seven_frames(op: Operator) -> None:
    p = given("loconet-short-term", 30)
    speakers, frames = 5, 6
    assert p["kernel"].shape == (3, speakers, 2, speakers, 7)
    wanted = torch.zeros(3, 30, 60, dtype=torch.float64)
    for s, t, c, other, tap in itertools.product(range(speakers), range(frames), range(2), range(speakers), range(7)):
        when = t + tap - 3
        if 0 <= when < frames:
            wanted[:, s * frames + t, c * 30 + other * frames + when] = p["kernel"][:, s, c, other, tap]
    out, found = op(**p)
    torch.testing.assert_close(found.dense(), wanted.expand(2, -1, -1, -1))
    torch.testing.assert_close(out, wanted @ p["v"])


def space_and_then_time(op: Operator) -> None:
    p = given("stan-space-time")
    assert p["grid"] == (3, 4)
    space = masked(p["q"], p["k"], [i % 4 for i in range(12)])
    time = masked(p["time_q"], p["time_k"], [i // 4 for i in range(12)])
    out, found = op(**p)
    torch.testing.assert_close(found.dense(), time @ space)
    torch.testing.assert_close(out, time @ space @ p["v"])
    # A single sensor has time alone, a single moment space alone.
    torch.testing.assert_close(op(**{**p, "grid": (1, 12)})[1].dense(), masked(p["time_q"], p["time_k"], [0] * 12))
    torch.testing.assert_close(op(**{**p, "grid": (12, 1)})[1].dense(), masked(p["q"], p["k"], [0] * 12))


def windows_weighed_by_the_spectrum(op: Operator) -> None:
    p = given("mptsnet-periodic-attention")
    strength = torch.zeros(2, 3, dtype=torch.float64)
    for place, period in enumerate((3, 5, 7)):
        wave = torch.tensor(
            [cmath.exp(-2j * math.pi * (12 // period) * t / 12) for t in range(12)], dtype=torch.complex128
        )
        strength[:, place] = torch.einsum("bnc,n->bc", p["x"].to(torch.complex128), wave).abs().sum(1) / 3
    shares = strength.softmax(1)
    wanted = torch.zeros(2, 2, 12, 12, dtype=torch.float64)
    for place, period in enumerate((3, 5, 7)):
        window = masked(p["q"][place], p["k"][place], [i // period for i in range(12)])
        wanted += shares[:, place, None, None, None] * window
    out, found = op(**p)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ p["v"])
    whole = {"q": p["q"][:1], "k": p["k"][:1], "periods": [12]}
    torch.testing.assert_close(op(**{**p, **whole})[1].dense(), masked(p["q"][0], p["k"][0], [0] * 12))


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "state-convolutional-attention": a_convolution_scores_pairs_of_frames,
    "convolutional-temporal-attention": frames_score_as_wholes,
    "loconet-long-term": speakers_keep_to_themselves,
    "loconet-short-term": all_speakers_within_seven_frames,
    "stan-space-time": space_and_then_time,
    "mptsnet-periodic-attention": windows_weighed_by_the_spectrum,
}


def test_the_main_period_of_a_wave_is_found() -> None:
    t = torch.arange(48, dtype=torch.float64)
    series = (2 * math.pi * t / 12).sin() + 0.3 * (2 * math.pi * t / 6).sin()
    assert main_periods(series[None, :, None], 2) == [12, 6]
    assert main_periods(series[None, :1, None], 2) == [1]


def test_factors_are_kept() -> None:
    p = given("stan-space-time")
    _, found = space_time_attention(**p)
    time, space = found.native()
    assert (time.row_sum, space.row_sum, found.row_sum) == ("1", "1", "1")
    assert not time.dense()[:, :, 0, 4:].any()
    assert not space.dense()[:, :, 0, 1:4].any()


def test_refusals() -> None:
    with pytest.raises(WorkbenchError, match="periods are positive whole numbers"):
        periodic_attention(**given("mptsnet-periodic-attention", periods=[]))
    with pytest.raises(WorkbenchError, match=r"q is floating point \[2, B, H, N, E\]"):
        periodic_attention(**given("mptsnet-periodic-attention", periods=[2, 3]))
    with pytest.raises(WorkbenchError, match="12 tokens are the same number for each of the rows; got 5 rows"):
        variants()["loconet-long-term"](**given("loconet-long-term", speakers=5))
    p = given("loconet-short-term")
    with pytest.raises(WorkbenchError, match="as many speakers out as in and odd taps"):
        variants()["loconet-short-term"](**{**p, "kernel": p["kernel"][..., :4]})
    with pytest.raises(WorkbenchError, match="v holds 2 channels of 3 speakers"):
        variants()["loconet-short-term"](**{**p, "v": p["v"][:, :, 1:]})
    with pytest.raises(WorkbenchError, match="grid is 2 positive sides with 12 cells"):
        space_time_attention(**given("stan-space-time", grid=(5, 2)))
