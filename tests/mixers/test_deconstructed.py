"""Attention without one of its principles against dense formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.attention_map import AttentionMap
from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.mixers.deconstructed import fixed_sequence_attention, random_embedding_attention, taylor_attention

Operator = Callable[..., tuple[Tensor, AttentionMap]]


def example(name: str, tokens: int = 9, seed: int = 1) -> dict[str, Any]:
    return variants()[name].example(seed, tokens, torch.float64)


def past(weights: Tensor) -> Tensor:
    """Rows over the past, normalised."""
    kept = weights.tril()
    return kept / kept.sum(-1, keepdim=True)


def pattern_of(x: Tensor, given: dict[str, Any]) -> Tensor:
    """Causal softmax ``[B, 4, N, N]`` with queries and keys of x ``[B, N, 7]``."""
    q = torch.einsum("bnd,hde->bhne", x, given["query_weights"])
    k = torch.einsum("bnd,hde->bhne", x, given["key_weights"]).repeat_interleave(2, 1)
    return past((q @ k.transpose(-1, -2) * 6**-0.5).exp())


def heads_of(v: Tensor) -> Tensor:
    return v.repeat_interleave(2, 1)


def random_vectors_make_the_pattern(op: Operator) -> None:
    given = example("random-embedding-queries-and-keys")
    x = torch.randn(1, 16, 7, generator=torch.Generator().manual_seed(given["seed"]), dtype=torch.float64)[:, :9]
    out, found = op(**given)
    wanted = pattern_of(x, given)
    torch.testing.assert_close(found.dense(), wanted.expand(2, -1, -1, -1))
    torch.testing.assert_close(out, wanted @ heads_of(given["v"]))
    _, other = op(**{**given, "v": given["v"] + 1})
    assert torch.equal(other.dense(), found.dense())
    _, other = op(**{**given, "seed": given["seed"] + 1})
    assert not torch.allclose(other.dense(), found.dense())
    _, other = op(**given, blocks=lambda hidden: hidden * 2)
    torch.testing.assert_close(other.dense()[:1], pattern_of(x * 2, given))


def one_text_makes_the_pattern(op: Operator) -> None:
    given = example("fixed-sequence-queries-and-keys")
    out, found = op(**given)
    wanted = pattern_of(given["embeddings"][given["text"][:9]][None], given)
    torch.testing.assert_close(found.dense(), wanted.expand(2, -1, -1, -1))
    torch.testing.assert_close(out, wanted @ heads_of(given["v"]))
    _, other = op(**{**given, "v": given["v"].flip(0) * 2})
    assert torch.equal(other.dense(), found.dense())


def embeddings_make_the_pattern(op: Operator) -> None:
    given = example("static-embedding-queries-and-keys")
    out, found = op(**given)
    wanted = pattern_of(given["embeddings"], given)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ heads_of(given["v"]))
    _, other = op(**{**given, "embeddings": given["embeddings"].flip(0)})
    torch.testing.assert_close(other.dense(), wanted.flip(0))


def exponentials_up_to_their_square(op: Operator) -> None:
    given = example("second-order-taylor-attention")
    s = given["q"] @ heads_of(given["k"]).transpose(-1, -2) * 6**-0.5
    wanted = past(1 + s + s**2 / 2)
    out, found = op(**given)
    torch.testing.assert_close(found.dense(), wanted)
    torch.testing.assert_close(out, wanted @ heads_of(given["v"]))
    # For small scores it is softmax attention, up to the cube of the scores.
    small = {"q": given["q"] * 1e-3, "k": given["k"], "v": given["v"]}
    _, found = op(**small)
    torch.testing.assert_close(found.dense(), past((s * 1e-3).exp()), atol=1e-8, rtol=0)


def each_row_is_the_same_softmax_cut_off(op: Operator) -> None:
    given = example("non-approximate-attention")
    q, k = given["q"], heads_of(given["k"])
    logits = (q / (1 + (-q).exp()) * k).sum(-1) * 6**-0.5
    out, found = op(**given)
    wanted = past(logits.exp()[:, :, None].expand(-1, -1, 9, -1))
    torch.testing.assert_close(found.dense(), wanted)
    above = torch.zeros(2, 4, 5, dtype=torch.float64)
    below = torch.zeros(2, 4, dtype=torch.float64)
    for i in range(9):  # the recurrent form
        above = above + logits[:, :, i, None].exp() * heads_of(given["v"])[:, :, i]
        below = below + logits[:, :, i].exp()
        torch.testing.assert_close(out[:, :, i], above / below[..., None])


def no_token_sees_another(op: Operator) -> None:
    given = example("gated-mlp-without-mixing")
    out, found = op(**given)
    gate = given["gate"] / (1 + (-given["gate"]).exp())
    torch.testing.assert_close(out, gate * given["v"])
    torch.testing.assert_close(found.dense(), torch.diag_embed(gate.mean(-1)))
    torch.testing.assert_close(found.native().dense(), torch.diag_embed(gate.transpose(2, 3).flatten(1, 2)))


IDENTITIES: dict[str, Callable[[Operator], None]] = {
    "random-embedding-queries-and-keys": random_vectors_make_the_pattern,
    "fixed-sequence-queries-and-keys": one_text_makes_the_pattern,
    "static-embedding-queries-and-keys": embeddings_make_the_pattern,
    "second-order-taylor-attention": exponentials_up_to_their_square,
    "non-approximate-attention": each_row_is_the_same_softmax_cut_off,
    "gated-mlp-without-mixing": no_token_sees_another,
}


def test_one_pattern_is_held_whatever_the_batch() -> None:
    given = example("random-embedding-queries-and-keys")
    _, found = random_embedding_attention(**{**given, "v": given["v"][:1].expand(50, -1, -1, -1)})
    assert found.shape == (50, 4, 9, 9)
    assert found.scores.q.untyped_storage().nbytes() == 4 * 9 * 6 * 8


def test_a_longer_input_begins_with_the_pattern_of_a_shorter_one() -> None:
    given = example("random-embedding-queries-and-keys", 40)
    _, whole = random_embedding_attention(**given)
    for length in (1, 9, 16, 33):
        _, part = random_embedding_attention(**{**given, "v": given["v"][:, :, :length]})
        torch.testing.assert_close(part.dense(), whole.dense()[:, :, :length, :length], rtol=0, atol=1e-14)


def test_both_directions_of_the_taylor_form_are_low_rank() -> None:
    given = example("second-order-taylor-attention")
    s = given["q"] @ heads_of(given["k"]).transpose(-1, -2) * 6**-0.5
    weights = 1 + s + s**2 / 2
    out, found = taylor_attention(**given, causal=False)
    torch.testing.assert_close(found.dense(), weights / weights.sum(-1, keepdim=True))
    torch.testing.assert_close(found.matvec(given["v"]), out)


def test_shapes_that_do_not_fit_are_refused() -> None:
    given = example("fixed-sequence-queries-and-keys")
    for name, value, message in (
        ("text", given["text"][:4], r"text is int64 \[L\] with L >= 9"),
        ("key_weights", given["key_weights"][:1], r"key_weights is floating point \[2, 7, 6\]"),
        ("mask", Mask(keys=torch.ones(1, 4, dtype=torch.bool)), "mask.keys"),
    ):
        with pytest.raises(WorkbenchError, match=message):
            fixed_sequence_attention(**{**given, name: value})
