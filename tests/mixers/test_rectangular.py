"""Queries that are not the keys: each operator against its formula, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench import attention_map, mods
from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.rectangular import (
    attention_rollout,
    downsampled_attention,
    global_local_attention,
    multi_query_attention,
    pair_wise_attention,
    patch_selection,
    pointer_attention,
)

Operator = Callable[..., tuple[Tensor, AttentionMap]]
N = 8


def drawn(**more: tuple[int, ...]) -> dict[str, Tensor]:
    shapes = {"q": (2, 4, N, 6), "k": (2, 2, N, 6), "v": (2, 2, N, 5), **more}
    return example_tensors(9, torch.float64, **shapes)


def agrees(out: Tensor, found: AttentionMap, wanted: Tensor, v: Tensor) -> None:
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ v.repeat_interleave(wanted.shape[1] // v.shape[1], 1))


def plain(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return (q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale).softmax(-1)


def additive_pointers(op: Operator) -> None:
    """Scores w . tanh(k + q) one by one; a weight of zeros points everywhere alike."""
    given = drawn(q=(2, 4, 3, 6), weight=(4, 6))
    scores = torch.zeros(2, 4, 3, N, dtype=torch.float64)
    for b, h, i, j in torch.cartesian_prod(*(torch.arange(n) for n in (2, 4, 3, N))).tolist():
        scores[b, h, i, j] = given["weight"][h] @ torch.tanh(given["k"][b, h // 2, j] + given["q"][b, h, i])
    agrees(*op(**given), scores.softmax(-1), given["v"])
    flat = torch.full_like(scores, 1 / N)
    agrees(*op(**{**given, "weight": torch.zeros_like(given["weight"])}), flat, given["v"])


def a_summary_and_a_place(op: Operator) -> None:
    """(u + p_i) . k_j without a scale, place by place; places of zeros all predict what the summary alone predicts."""
    given = drawn(pooled=(2, 4, 6), places=(2, 4, 3, 6))
    call = {name: given[name] for name in ("pooled", "places", "k", "v")}
    rows = []
    for i in range(3):
        query = given["pooled"] + given["places"][:, :, i]
        rows.append(torch.einsum("bhe,bhje->bhj", query, given["k"].repeat_interleave(2, 1)).softmax(-1))
    agrees(*op(**call), torch.stack(rows, 2), given["v"])
    alone = plain(given["pooled"][:, :, None], given["k"], 1.0).expand(-1, -1, 3, -1)
    agrees(*op(**{**call, "places": torch.zeros_like(given["places"])}), alone, given["v"])


def rows_of_large_response(op: Operator) -> None:
    """The rows of full attention with the largest response, in order; all rows are full attention."""
    given = drawn(response=(2, N))
    whole = plain(given["q"], given["k"])
    agrees(*op(**given, rows=N), whole, given["v"])
    chosen = given["response"].topk(3).indices.sort(-1).values
    wanted = torch.stack([whole[b, :, chosen[b]] for b in range(2)])
    out, found = op(**given, rows=3)
    agrees(out, found, wanted, given["v"])
    assert torch.equal(found.chosen, chosen)


def another_image_distracts(op: Operator) -> None:
    """One softmax over both images; an image that distracts itself halves its weights, and a hidden one takes nothing."""
    given = drawn(v=(2, 2, N + 3, 5), distractor=(2, 2, 3, 6))
    agrees(*op(**given), plain(given["q"], torch.cat([given["k"], given["distractor"]], 2)), given["v"])
    own = plain(given["q"], given["k"])
    twice = {**given, "distractor": given["k"], "v": torch.cat([given["v"][:, :, :N]] * 2, 2)}
    out, found = op(**twice)
    agrees(out, found, torch.cat([own, own], 3) / 2, twice["v"])
    torch.testing.assert_close(out, own @ given["v"][:, :, :N].repeat_interleave(2, 1))


def short_and_long_queries(op: Operator) -> None:
    """Attention by each query and by the mean of the last ones, mixed; a length of 1 is causal attention for any mixture."""
    given = drawn()
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    keys = given["k"].repeat_interleave(2, 1)

    def causal(q: Tensor) -> Tensor:
        return (q @ keys.transpose(-1, -2) / math.sqrt(6)).masked_fill(hidden, -math.inf).softmax(-1)

    means = torch.stack([given["q"][:, :, max(0, i - 2) : i + 1].mean(2) for i in range(N)], 2)
    wanted = 0.3 * causal(given["q"]) + 0.7 * causal(means)
    agrees(*op(**given, length=3, alpha=0.3, mask=Mask(causal=True)), wanted, given["v"])
    agrees(*op(**given, length=1, alpha=0.3, mask=Mask(causal=True)), causal(given["q"]), given["v"])


def tokens_mixed_before(op: Operator) -> None:
    """Attention to mixtures of the tokens, whose map is a product; mixing nothing is full attention."""
    given = drawn(down=(3, N))
    weights = plain(given["q"], torch.einsum("mj,bgje->bgme", given["down"], given["k"]))
    agrees(*op(**given), weights @ given["down"], given["v"])
    mixed = torch.einsum("mj,bgje->bgme", given["down"], given["v"]).repeat_interleave(2, 1)
    torch.testing.assert_close(op(**given)[0], weights @ mixed)
    same = torch.eye(N, dtype=torch.float64)
    agrees(*op(**{**given, "down": same}), plain(given["q"], given["k"]), given["v"])


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "pointer-network": additive_pointers,
    "selfie": a_summary_and_a_place,
    "global-local-cross-attention": rows_of_large_response,
    "pair-wise-cross-attention": another_image_distracts,
    "multi-query-self-attention": short_and_long_queries,
    "global-learning-with-down-sampling": tokens_mixed_before,
}


def test_pointers_at_inputs_that_are_there() -> None:
    given = drawn(q=(2, 4, 3, 6), weight=(4, 6))
    real = torch.arange(N)[None] < torch.tensor([[5], [N]])
    _, found = pointer_attention(**given, mask=Mask(keys=real))
    assert not found.dense()[0, :, :, 5:].any()
    torch.testing.assert_close(found.row_sums(), torch.ones(2, 4, 3, dtype=torch.float64))


def test_rows_of_pointers_come_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    given = drawn(weight=(4, 6))
    _, found = pointer_attention(**given)
    whole = found.dense()
    monkeypatch.setattr(attention_map, "CHUNK", 500)
    torch.testing.assert_close(found.rows(0, N), whole)


def test_rollout_is_the_product_of_layers() -> None:
    layers = [torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(s)).softmax(-1) for s in range(3)]
    first, second, third = ((layer.mean(1) + torch.eye(5)) / 2 for layer in layers)
    torch.testing.assert_close(attention_rollout(layers), third @ second @ first)
    maps = [AttentionMap.from_dense(layer) for layer in layers]
    torch.testing.assert_close(attention_rollout(maps).sum(-1), torch.ones(2, 5))
    with pytest.raises(WorkbenchError, match="one or more layers"):
        attention_rollout([])


def test_what_the_distractor_takes() -> None:
    given = drawn(v=(2, 2, N + 3, 5), distractor=(2, 2, 3, 6))
    _, found = pair_wise_attention(**given)
    torch.testing.assert_close(found.mass(mods.span(N, N + 3)), found.dense()[..., N:].sum(-1))
    mask = Mask(keys=torch.arange(N + 3)[None] < N)
    hidden = pair_wise_attention(**given, mask=mask)[1].dense()
    torch.testing.assert_close(hidden[..., :N], plain(given["q"], given["k"]))


def test_padding_is_left_out_of_long_queries() -> None:
    given = drawn()
    padded = {name: torch.cat([torch.full_like(x[:, :, :3], 9.0), x], 2) for name, x in given.items()}
    mask = Mask(causal=True, keys=torch.arange(N + 3)[None] >= 3)
    out, found = multi_query_attention(**padded, length=3, alpha=0.2, mask=mask)
    torch.testing.assert_close(out[:, :, 3:], multi_query_attention(**given, length=3, alpha=0.2)[0])
    torch.testing.assert_close(found.short.dense() * 0.2 + found.long.dense() * 0.8, found.dense())


@pytest.mark.parametrize(
    ("operator", "change", "words"),
    [
        (pointer_attention, {"weight": torch.zeros(3, 6)}, "weight is floating point"),
        (global_local_attention, {"response": torch.zeros(2, N), "rows": 0}, "rows is a positive"),
        (global_local_attention, {"response": torch.zeros(2, 3), "rows": 1}, "response is floating point"),
        (global_local_attention, {"response": torch.zeros(2, N), "rows": 1, "mask": Mask(causal=True)}, "keys alone"),
        (pair_wise_attention, {"distractor": torch.zeros(2, 2, 3, 5)}, "distractor is floating point"),
        (multi_query_attention, {"length": 0, "alpha": 0.5}, "length is a positive"),
        (multi_query_attention, {"length": 2, "alpha": 1.5}, "alpha is the weight"),
        (multi_query_attention, {"length": 2, "alpha": 0.5, "mask": Mask(causal=True, offset=1)}, "whole sequence"),
        (downsampled_attention, {"down": torch.zeros(3, 7)}, "down is floating point"),
    ],
)
def test_misfits_are_named(operator: Callable[..., Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(WorkbenchError, match=words):
        operator(**{**drawn(), **change})


def test_a_summary_fits_its_places() -> None:
    with pytest.raises(WorkbenchError, match="pooled is floating point"):
        patch_selection(torch.zeros(2, 4, 5), torch.zeros(2, 4, 3, 6), torch.zeros(2, 2, N, 6), torch.zeros(2, 2, N, 5))
