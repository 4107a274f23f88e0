"""What operators are given besides their example: other kinds, types and devices, and maps of inputs that are long or narrow."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.catalogue import variants
from workbench.errors import WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import GatedMap
from workbench.patterns.algebra import ProductMap
from workbench.patterns.softmax import SoftmaxMap
from workbench.patterns.sparse import SparseMap


def example(name: str, tokens: int = 9, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return variants()[name].example(0, tokens, dtype)


WRONG = [
    ("flash-attention", "q", [1.0]),
    ("multi-head-attention", "v", None),
    ("grouped-query-attention", "v", torch.zeros(2, 2, 9, 6, dtype=torch.int64)),
    ("grouped-query-attention", "mask", "causal"),
    ("mixture-of-block-attention", "mask", None),
    ("seer-attention", "mask", None),
    ("multi-head-latent-attention", "latent", torch.zeros(2, 1, 9, 3)),
    ("multi-head-latent-attention", "up_key", torch.zeros(4, 6, 3, dtype=torch.int64)),
    ("ring-attention", "mask", Mask(causal=True, keys=torch.ones(1, 5, dtype=torch.bool))),
    ("bigbird-attention", "random_blocks", -1),
    ("bigbird-attention", "random_blocks", 1.5),
    ("neighborhood-attention", "grid", 9),
    ("causal-neighborhood-attention", "grid", 9),
    ("neighborhood-attention", "kernel", 3),
    ("generalized-neighborhood-attention", "stride", (1, 1, 0.5)),
    ("swin-attention", "window", 3),
    ("swin-attention", "shift", (1.0, 1.0)),
    ("dit-3d-window-attention", "y_table", torch.zeros(5, 8)),
    ("halonet-attention", "column_table", torch.zeros(5, 8)),
    ("tic-msa-convolution", "shift", 1),
    ("block-transformer", "prefix_k", torch.zeros(2, 2, 3, 8)),
    ("longformer-attention", "q_global", torch.zeros(2, 4, 9, 8)),
    ("gated-positional-attention", "grid", (9,)),
    ("fixed-sequence-queries-and-keys", "text", torch.full((9,), 11)),
    ("random-embedding-queries-and-keys", "seed", 0.5),
    ("titans-memory-as-gate", "window", 1.5),
    ("titans-memory-as-layer", "persistent", 0.5),
    ("bilevel-routing", "grid", 3),
    ("agent-attention", "agents", 2),
    ("bridging-visual-representations", "kinds", 9),
    ("self-calibrated-cross-attention", "grid", (3.0, 3.0)),
    ("echo-attention", "owners", 3),
    ("histogram-self-attention", "q_frequency", torch.zeros(2, 2, 3, 8)),
]


@pytest.mark.parametrize(("name", "argument", "value"), WRONG, ids=[f"{n}-{a}" for n, a, _ in WRONG])
def test_an_argument_of_the_wrong_kind_is_named(name: str, argument: str, value: Any) -> None:
    with pytest.raises(WorkbenchError, match=rf"\b{re.escape(argument)}\b"):
        variants()[name](**{**example(name), argument: value})


@pytest.mark.parametrize("name", ["flash-attention", "sink-logits", "neighborhood-attention", "multi-head-attention"])
def test_values_of_another_device_are_named(name: str) -> None:
    given = example(name)
    with pytest.raises(WorkbenchError, match="one device"):
        variants()[name](**{**given, "v": given["v"].to("meta")})


MIXED = {
    "cascaded-group-attention": ("query_weights", "key_weights", "value_weights", "query_kernel"),
    "static-embedding-queries-and-keys": ("embeddings", "key_weights"),
    "dynamic-local-self-attention": ("reduction", "expansion", "kernel"),
    "low-rank-multi-head-attention": ("context", "left", "right"),
    "bridging-visual-representations": ("inner", "outer"),
    "self-calibrated-cross-attention": ("support",),
    "global-learning-with-down-sampling": ("down",),
}


@pytest.mark.parametrize("name", MIXED)
def test_parameters_may_be_of_another_type(name: str) -> None:
    """As in a model whose parameters stay in float32: the same numbers as with parameters rounded to it."""
    given = example(name)
    for argument in MIXED[name]:
        narrow = given[argument].float()
        out, _ = variants()[name](**{**given, argument: narrow})
        wanted, _ = variants()[name](**{**given, argument: narrow.double()})
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_the_map_of_native_sparse_attention_is_one_of_tokens() -> None:
    _, found = variants()["native-sparse-attention"](**example("native-sparse-attention"))
    assert found.domain == "token"
    assert found.native().domain == "block"


def test_rows_of_pruned_tokens_do_not_sum_to_the_gate() -> None:
    _, found = variants()["cascade-token-and-head-pruning"](**example("cascade-token-and-head-pruning"))
    assert isinstance(found, GatedMap)
    assert not torch.allclose(found.row_sums(), found.gate.to(found.row_sums()))
    assert found.row_sum == "<=1"


@pytest.mark.parametrize(
    "name", ["generalized-neighborhood-attention", "causal-neighborhood-attention", "moat-attention"]
)
def test_examples_of_neighborhoods_are_no_full_attention_or_window(name: str) -> None:
    given = example(name, 13)
    if name == "moat-attention":
        given["window"] = (2, 2)
        given.pop("table")
    dense = variants()[name](**given)[1].dense()
    assert bool((dense == 0).any())
    if name == "causal-neighborhood-attention":
        n = dense.shape[2]
        away = torch.arange(n)[:, None] - torch.arange(n)
        assert bool((dense[..., (away > 0) & (away < 2)] == 0).any())  # the row above is nearer than the token before


def test_answers_of_weights_in_a_narrow_type_are_float32() -> None:
    found = SparseMap(torch.tensor([[[[0, 1], [1, -1]]]]), torch.ones(1, 1, 2, 2, dtype=torch.bfloat16), 3)
    assert found.rows(0, 2).dtype == found.received().dtype == found.blocks(2).dtype == torch.float32


def product(tokens: int, pools: int) -> ProductMap:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 4, n, 4, generator=generator, dtype=torch.float64) for n in (tokens, pools))
    at = torch.arange(tokens).view(pools, -1)[None, None]
    even = torch.full((1, 4, *at.shape[2:]), pools / tokens, dtype=torch.float64)
    return ProductMap(SoftmaxMap(q, k, mask=Mask()), SparseMap(at, even, tokens, kv_heads=2))


def pooled(dense: Tensor, size: int) -> Tensor:
    short = -dense.shape[2] % size
    padded = torch.nn.functional.pad(dense, (0, short, 0, short)).unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return padded.sum((3, 5))


def test_products_pass_blocks_on_without_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and columns come from the factors; the rows of neither product are made."""
    found = product(24, 6)
    dense = found.dense()
    monkeypatch.setattr(ProductMap, "rows", None)
    monkeypatch.setattr("workbench.attention_map.CHUNK", 4 * 24 * 3)
    for size in (1, 5, 24):
        torch.testing.assert_close(found.blocks(size), pooled(dense, size))
        torch.testing.assert_close(
            found.blocks(size, "mean"), pooled(dense, size) / pooled(torch.ones_like(dense), size)
        )
    torch.testing.assert_close(found.received(), dense.sum(2))


@pytest.mark.parametrize("name", ["moat-attention", "cascaded-group-attention"])
def test_maps_with_a_table_of_positions_hold_no_pairs(name: str) -> None:
    _, found = variants()[name](**example(name, 144))
    assert isinstance(found, SoftmaxMap)
    assert not isinstance(found.scores.bias, Tensor)
    assert found.scores.q.numel() + found.scores.k.numel() + found.lse.numel() < 144 * 144
