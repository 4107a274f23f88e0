"""Cascade pruning, held keys and borrowed maps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import example_tensors
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.pruning import delta_attention, echo_attention, held_keys, spatten_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]
N = 9
CAUSAL = torch.ones(N, N, dtype=torch.bool).tril()


def drawn(heads: int = 4, groups: int = 2, **more: tuple[int, ...]) -> dict[str, Tensor]:
    shapes = {"q": (2, heads, N, 6), "k": (2, groups, N, 6), "v": (2, groups, N, 5), **more}
    return example_tensors(4, torch.float64, **shapes)


def scores(given: dict[str, Tensor]) -> Tensor:
    keys = given["k"].repeat_interleave(given["q"].shape[1] // given["k"].shape[1], 1)
    return given["q"] @ keys.transpose(-1, -2) / math.sqrt(6)


def softmax(s: Tensor, allowed: Tensor) -> Tensor:
    return s.masked_fill(~allowed, -math.inf).softmax(-1).nan_to_num(0.0)


def agrees(out: Tensor, found: AttentionMap, wanted: Tensor, v: Tensor) -> None:
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ v.repeat_interleave(wanted.shape[1] // v.shape[1], 1))


def survivors_attend_to_survivors(op: Operator) -> None:
    """Keeping all is causal attention, whose column sums are the importance; the most important tokens and heads go on."""
    given = drawn()
    plain = softmax(scores(given), CAUSAL)
    out, found = op(**given, mask=Mask(causal=True))
    agrees(out, found, plain, given["v"])
    importance, heads = found.native(), found.head_importance
    torch.testing.assert_close(importance, plain.sum((1, 2)))
    torch.testing.assert_close(heads, (plain @ given["v"].repeat_interleave(2, 1)).abs().sum((2, 3)))
    wanted = torch.zeros_like(plain)
    for b in range(2):
        alive = torch.zeros(N, dtype=torch.bool)
        alive[importance[b].topk(6).indices] = True
        rows = softmax(scores(given)[b], CAUSAL & alive & alive[:, None])
        chosen = heads[b].topk(3).indices
        wanted[b, chosen] = rows[chosen]
    call = {"importance": importance, "head_importance": heads, "keep": 6, "keep_heads": 3}
    agrees(*op(**given, **call, mask=Mask(causal=True)), wanted, given["v"])
    # Column sums of causal rows favour the first tokens; other importances choose others.
    alive = torch.tensor([0, 1, 0, 0, 1, 1, 0, 0, 1]).bool()
    late = torch.where(alive, 2.0, 1.0).double().expand(2, -1) + torch.arange(N) / N
    rows = softmax(scores(given), CAUSAL & alive & alive[:, None])
    out, found = op(**given, importance=late, keep=4, mask=Mask(causal=True))
    agrees(out, found, rows, given["v"])
    torch.testing.assert_close(found.native(), late + rows.sum((1, 2)))


def held_outside_of_the_window(op: Operator) -> None:
    """A loop over keys that carries channels on; threshold 0 or a window over everything is causal attention."""
    given = drawn()
    k = given["k"]
    held = k.clone()
    for j in range(1, N):
        small = (k[:, :, j] - k[:, :, j - 1]).abs() < 1.2
        held[:, :, j] = torch.where(small, held[:, :, j - 1], k[:, :, j])
    assert bool((held != k).any())
    near = torch.arange(N)[:, None] - torch.arange(N) < 3
    s = torch.where(near, scores(given), scores({**given, "k": held}))
    plain = softmax(scores(given), CAUSAL)
    for options, wanted in (
        ({"threshold": 1.2, "window": 3}, softmax(s, CAUSAL)),
        ({"threshold": 0.0, "window": 3}, plain),
        ({"threshold": 1.2, "window": N}, plain),
    ):
        out, found = op(**given, mask=Mask(causal=True), **options)
        agrees(out, found, wanted, given["v"])


def layers_borrow_maps(op: Operator) -> None:
    """Each layer weighs its own values by its owner's map; owners of their own are attention layer by layer."""
    given = drawn(heads=6, groups=3)
    maps = softmax(scores(given), CAUSAL).unflatten(1, (3, 2))
    for owners in ((0, 0, 2), (0, 1, 2), (0, 0, 0)):
        wanted = maps[:, list(owners)].flatten(1, 2)
        agrees(*op(**given, owners=owners, mask=Mask(causal=True)), wanted, given["v"])


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "cascade-token-and-head-pruning": survivors_attend_to_survivors,
    "deltallm-attention": held_outside_of_the_window,
    "echo-attention": layers_borrow_maps,
}


def test_survivors_of_a_cascade_are_nested() -> None:
    importance, heads = None, None
    before = torch.ones(2, N, dtype=torch.bool)
    for keep, seed in ((N, 0), (7, 1), (4, 2), (2, 3)):
        given = example_tensors(seed, torch.float64, q=(2, 4, N, 6), k=(2, 2, N, 6), v=(2, 2, N, 5))
        _, found = spatten_attention(**given, importance=importance, head_importance=heads, keep=keep, keep_heads=3)
        assert not (found.survivors & ~before).any()
        assert found.survivors.sum(1).tolist() == [keep, keep]
        before, importance, heads = found.survivors, found.importance, found.head_importance


def test_pruned_tokens_decode_and_padding() -> None:
    given = drawn(importance=(2, N))
    call = {"keep": 5, "mask": Mask(causal=True)}
    whole, found = spatten_attention(**given, **call)
    late = {**given, "q": given["q"][:, :, 6:]}
    step, rows = spatten_attention(**late, keep=5, mask=Mask(causal=True, offset=6))
    torch.testing.assert_close(step, whole[:, :, 6:])
    torch.testing.assert_close(rows.dense(), found.dense()[:, :, 6:])
    real = torch.ones(2, N, dtype=torch.bool)
    real[:, :2] = False
    _, padded = spatten_attention(**given, keep=5, mask=Mask(causal=True, keys=real))
    assert not padded.survivors[:, :2].any()
    assert padded.survivors.sum(1).tolist() == [5, 5]


def test_what_delta_attention_reuses_and_how_far_off_it_is() -> None:
    given = drawn()
    _, found = delta_attention(**given, threshold=1.2, window=3)
    exact = softmax(scores(given), CAUSAL)
    torch.testing.assert_close(found.error(2, 7), found.dense()[:, :, 2:7] - exact[:, :, 2:7])
    assert not found.reused()[:, :, 0].any()
    assert 0 < float(found.reused().mean()) < 1
    assert torch.equal(held_keys(given["k"], 0.0), given["k"])
    assert bool((held_keys(given["k"], 1e9) == given["k"][:, :, :1]).all())
    late = {**given, "q": given["q"][:, :, 5:]}
    step, rows = delta_attention(**late, threshold=1.2, window=3, mask=Mask(causal=True, offset=5))
    torch.testing.assert_close(rows.dense(), found.dense()[:, :, 5:])
    torch.testing.assert_close(step, found.matvec(given["v"])[:, :, 5:])


def test_held_keys_of_a_long_text() -> None:
    """2,048 tokens: statistics without a matrix of pairs."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 2048, 8) for _ in range(3))
    with torch.no_grad():
        _, found = delta_attention(q, k, v, threshold=0.5, window=64)
    torch.testing.assert_close(found.received().sum(), torch.tensor(2048.0), rtol=1e-4, atol=0)
    assert found.blocks(512).shape == (1, 1, 4, 4)


def test_computed_maps_are_those_of_the_owners() -> None:
    given = drawn(heads=6, groups=3)
    _, found = echo_attention(**given, owners=(0, 0, 2))
    assert found.native().shape == (2, 4, N, N)
    torch.testing.assert_close(found.native().dense(), found.dense()[:, [0, 1, 4, 5]])
    changed = {**given, "q": given["q"].clone()}
    changed["q"][:, 2:4] += 1
    torch.testing.assert_close(echo_attention(**changed, owners=(0, 0, 2))[1].dense(), found.dense())


@pytest.mark.parametrize(
    ("operator", "change", "words"),
    [
        (spatten_attention, {"keep": 0}, "keep is a positive"),
        (spatten_attention, {"keep_heads": 0}, "keep_heads is a positive"),
        (spatten_attention, {"importance": torch.zeros(2, 8)}, "importance is floating point"),
        (delta_attention, {"threshold": -0.1, "window": 2}, "threshold is a distance"),
        (delta_attention, {"threshold": 0.1, "window": 0}, "window is a positive"),
        (echo_attention, {"owners": (0, 1, 2)}, "do not divide"),
        (echo_attention, {"owners": (1, 1)}, "owners are layers"),
    ],
)
def test_misfits_are_named(operator: Callable[..., Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(WorkbenchError, match=words):
        operator(**{**drawn(), **change})
