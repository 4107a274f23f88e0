import gc
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from workbench import mods
from workbench.captures import capture
from workbench.errors import Refused, WorkbenchError
from workbench.kernels.mask import Mask
from workbench.maps import GatedMap
from workbench.mixers.softmax import gated_softmax_attention, softmax_attention
from workbench.patterns import softmax as module
from workbench.patterns.softmax import SoftmaxMap


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@contextmanager
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The calls of the statistics kernel, with what each was asked for."""
    calls: list[dict[str, Any]] = []
    plain = module.attention_stats

    def watch(*args: Any, **options: Any) -> Any:
        calls.append({"lse": args[2], **options})
        return plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "attention_stats", watch)
        yield calls


REQUEST = capture(blocks=4, reduce=("sum", "mean"), stats=("received", "entropy", "distance", "top1"))


@pytest.mark.parametrize("gated", [False, True])
def test_one_pass_answers_a_whole_capture(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    amap: Any = SoftmaxMap(rand(1, 4, 9, 3), rand(1, 2, 9, 3, seed=1), mask=Mask(causal=True))
    if gated:
        amap = GatedMap(amap, rand(1, 4, 9, seed=2).sigmoid())
    with passes(monkeypatch) as calls:
        amap = amap.precompute(REQUEST)
        for answer in (amap.received, amap.entropy, amap.distance, amap.topk, lambda: amap.blocks(4, "mean")):
            answer()
        amap.precompute(REQUEST)
    assert len(calls) == 1
    assert calls[0]["lse"] is None
    assert amap.impl == "cpu"


@pytest.mark.parametrize("keep", [True, False])
def test_one_pass_finds_everything_that_can_be_named(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    amap: Any = SoftmaxMap(rand(1, 4, 9, 3), rand(1, 2, 9, 3, seed=1), mask=Mask(causal=True))
    mass = {"sink": mods.sink(), "keys": torch.arange(9) < 3}
    request = capture(blocks=4, stats=("distance2", "received"), window=3, topk=4, mass=mass, keep=keep)
    with passes(monkeypatch) as calls:
        amap = amap.precompute(request)
        for answer in (lambda: amap.distance(3), lambda: amap.distance(moment=2), lambda: amap.topk(4), amap.received):
            answer()
        assert amap.mass("sink").shape == amap.mass("keys").shape == (1, 4, 9)
    assert len(calls) == 1
    if keep:
        with passes(monkeypatch) as calls:
            (
                amap.topk(2),
                amap.topk(2),
                amap.distance(4),
                amap.distance(4),
                amap.mass(mods.full()),
                amap.mass(mods.full()),
            )
        assert len(calls) == 4, "masses of functions without a name are not kept"
        amap.precompute(capture(topk=1))
        assert amap.topk(1) is amap.topk(1)


def test_lse_is_computed_once_and_used_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    amap = SoftmaxMap(rand(1, 2, 9, 3), rand(1, 2, 9, 3, seed=1), mask=Mask(causal=True))
    with passes(monkeypatch) as calls:
        first = amap.lse
        amap.received()
        assert amap.lse is first or torch.equal(amap.lse, first)
    assert [call["lse"] is None for call in calls] == [True, False]


def test_a_given_lse_is_what_the_weights_are_divided_by() -> None:
    q, k = rand(1, 2, 9, 3), rand(1, 2, 9, 3, seed=1)
    own = SoftmaxMap(q, k, mask=Mask(causal=True))
    shifted = SoftmaxMap(q, k, own.lse + math.log(2), mask=Mask(causal=True))
    torch.testing.assert_close(shifted.dense(), own.dense() / 2)
    torch.testing.assert_close(shifted.received(), own.received() / 2)
    torch.testing.assert_close(shifted.tile(slice(2, 5), slice(1, 3)), own.tile(slice(2, 5), slice(1, 3)) / 2)


def test_nothing_of_q_and_k_is_held_by_a_summary() -> None:
    q, k = rand(1, 2, 9, 3), rand(1, 2, 9, 3, seed=1)
    held = [weakref.ref(q.untyped_storage()), weakref.ref(k.untyped_storage())]
    plain = SoftmaxMap(q, k, mask=Mask(causal=True)).precompute(capture(stats=("received",), keep=False))
    gated = GatedMap(SoftmaxMap(q, k, mask=Mask(causal=True)), rand(1, 2, 9).sigmoid())
    gated_summary = gated.precompute(capture(stats=("received",), keep=False))
    del q, k, gated
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    assert plain.received().shape == (1, 2, 9)
    assert isinstance(gated_summary, GatedMap)
    assert gated_summary.received().sum() < gated_summary.raw.received().sum()
    with pytest.raises(Refused, match=r"keep=False and answers only received\(\)"):
        plain.rows(0, 1)
    with pytest.raises(Refused, match=r"keep=False and answers only received\(\)"):
        gated_summary.entropy()


class Largest(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor) and 0 not in value.stride():
                self.numel = max(self.numel, value.numel())
        return out


def test_no_answer_holds_more_than_a_chunk() -> None:
    n = 2048
    amap = SoftmaxMap(torch.randn(1, 2, n, 8), torch.randn(1, 1, n, 8), mask=Mask(causal=True))
    with Largest() as seen:
        amap.tile(slice(1000, 1010), slice(5, 25))
        assert seen.numel <= 20 * n
        amap.precompute(REQUEST)
        amap.mass(mods.induction(torch.randint(0, 9, (1, n))))
        amap.matvec(torch.randn(1, 1, n, 8))
        amap.rmatvec(torch.randn(1, 2, n, 8))
        amap.topk(3)
    assert seen.numel <= 2**21 < n * n
    with pytest.raises(Refused):
        amap.dense(limit=n * n)


def test_a_tile_needs_no_pass_over_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    amap = SoftmaxMap(rand(1, 2, 9, 3), rand(1, 2, 9, 3, seed=1), mask=Mask(causal=True))
    with passes(monkeypatch) as calls:
        tile = amap.tile(slice(5, 7), slice(0, 4))
    assert calls == []
    torch.testing.assert_close(tile, amap.dense()[:, :, 5:7, :4])


def test_the_output_is_torchs_and_differentiable() -> None:
    q, k, v = (rand(2, h, 7, 4, seed=h).requires_grad_() for h in (4, 2, 2))
    out, amap = softmax_attention(q, k, v, mask=Mask(causal=True))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad(out.square().sum(), (q, k, v))
    theirs = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert not amap.dense().requires_grad


def test_gradients_of_rows_that_see_nothing_are_finite() -> None:
    q = rand(1, 2, 5, 4).requires_grad_()
    mask = Mask(causal=True, keys=torch.tensor([[False, False, True, True, True]]))
    out, _ = gated_softmax_attention(q, q, q, torch.full((1, 2, 5), 0.5), mask=mask, sink=torch.zeros(2))
    (grad,) = torch.autograd.grad(out.sum(), q)
    assert torch.isfinite(grad).all()
    assert (out[:, :, :2] == 0).all()


def test_row_sum_contract_is_one_only_where_every_row_is_sure_to_see_a_key() -> None:
    q = rand(1, 2, 5, 4)
    left = torch.tensor([[False, True, True, True, True]])

    def contract(mask: Mask, **options: Any) -> str:
        return SoftmaxMap(q, q, mask=mask, **options).row_sum

    assert contract(Mask(causal=True)) == "1"
    assert contract(Mask(causal=True, window=2)) == "1"
    assert contract(Mask(causal=True, keys=left.flip(1))) == "1"
    assert contract(Mask(causal=True, keys=left)) == "<=1"
    assert contract(Mask(causal=True), sink=torch.zeros(2)) == "<=1"
    assert contract(Mask(), bias=torch.full((5, 5), float("-inf"))) == "<=1"


def test_a_bias_of_minus_infinity_hides_keys_like_a_mask() -> None:
    q = rand(1, 2, 5, 4)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    for low in (float("-inf"), torch.finfo(torch.float32).min):
        bias = torch.zeros(5, 5).masked_fill(hidden, low)
        amap = SoftmaxMap(q, q, mask=Mask(), bias=bias)
        causal = SoftmaxMap(q, q, mask=Mask(causal=True))
        torch.testing.assert_close(amap.dense(), causal.dense())
        torch.testing.assert_close(amap.entropy(), causal.entropy())
        torch.testing.assert_close(softmax_attention(q, q, q, mask=Mask(), bias=bias)[1].lse, causal.lse)


def test_heads_keep_their_mask_sink_and_bias() -> None:
    q, k = rand(2, 4, 6, 3), rand(2, 2, 6, 3, seed=1)
    seen = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(3)) > 0.3
    for bias in (rand(4, 6, 6, seed=4), rand(1, 4, 6, 6, seed=4), lambda lo, hi: rand(4, 6, 6, seed=4)[:, lo:hi]):
        amap = SoftmaxMap(q, k, mask=Mask(dense=seen), sink=rand(4, seed=5), bias=bias)
        torch.testing.assert_close(amap.heads([2, 1]).dense(), amap.dense()[:, [2, 1]])
        torch.testing.assert_close(amap.heads([3]).entropy(), amap.entropy()[:, [3]])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"q": torch.zeros(2, 5, 4)}, r"q is a tensor \[B, heads, tokens, E\]"),
        ({"lse": torch.zeros(1, 2, 4)}, r"lse is floating point \[B, H, Q\] = \[1, 2, 5\]"),
        ({"mask": Mask(keys=torch.ones(1, 4, dtype=torch.bool))}, "mask.keys"),
        ({"sink": torch.zeros(3)}, "sink is one logit per query head"),
    ],
)
def test_bad_arguments_raise_the_users_error(options: dict[str, Any], said: str) -> None:
    arguments = {"q": torch.zeros(1, 2, 5, 4), "k": torch.zeros(1, 2, 5, 4), "mask": Mask(), **options}
    with pytest.raises(WorkbenchError, match=said):
        SoftmaxMap(**arguments)


def test_values_that_do_not_fit_are_refused() -> None:
    q = torch.zeros(1, 2, 5, 4)
    with pytest.raises(WorkbenchError, match=r"v is floating point \[1, 2, 5, width\]"):
        softmax_attention(q, q, q[:, :, :4], mask=Mask())
