"""``attention_stats`` as an operator of torch: gradients, compilation, export."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workbench.kernels.attention_stats import attention_stats
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Relative, Scores, score_parts
from workbench.kernels.stats.operator import _op
from workbench.kernels.stats.request import REDUCTIONS, STATS


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "window and offset": {"mask": Mask(causal=True, window=6, offset=3)},
    "rows that see nothing": {"mask": Mask(causal=True, keys=torch.arange(14)[None] > 2)},
    "softcap": {"softcap": 2.0},
    "relative": {"bias": Relative(rand(9, 4, 27), -13), "mask": Mask()},
    "gate": {"gate": rand(4, 2, 4, 11).sigmoid()},
}


def loss(q: Tensor, k: Tensor, sink: Tensor | None, lse: Tensor | None, impl: str, **options: Any) -> Tensor:
    asked: dict[str, Any] = {"block": 4, "reduce": ("sum", "mean", "abs"), "stats": ("received",), **options}
    got = attention_stats(q, k, lse, sink=sink, impl=impl, **asked)
    assert got.received is not None
    w = [rand(i, *value.shape).to(value) for i, value in enumerate((*got.blocks.values(), got.received, got.lse))]
    total = sum((value * w[i]).sum() for i, value in enumerate(got.blocks.values()))
    return total + (got.received * w[3]).sum() + torch.where(got.lse.isinf(), 0.0, got.lse * w[4]).sum()


def leaves(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q, k, sink = rand(0, 2, 4, 11, 16), rand(1, 2, 2, 14, 16), rand(2, 4)
    return tuple(t.to(dtype).requires_grad_() for t in (q, k, sink))


@pytest.mark.parametrize("with_sink", [True, False])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_gradients_are_those_of_the_dense_formulas(impl: str, case: str, with_sink: bool) -> None:
    q, k, sink = leaves()
    exact = torch.autograd.grad(loss(q, k, sink if with_sink else None, None, "reference", **CASES[case]), (q, k, sink),
                                allow_unused=True)  # fmt: skip
    dtype = torch.float64 if impl == "cpu" else torch.float32
    q, k, sink = leaves(dtype)
    got = torch.autograd.grad(loss(q, k, sink if with_sink else None, None, impl, **CASES[case]), (q, k, sink),
                              allow_unused=True)  # fmt: skip
    for value, wanted in zip(got, exact, strict=True):
        assert (value is None) == (wanted is None)
        if value is not None and wanted is not None:
            tolerance = 1e-10 if impl == "cpu" else 2e-5
            torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_a_given_lse_is_a_leaf_of_its_own(impl: str) -> None:
    q, k, sink = leaves()
    lse = attention_stats(q, k, sink=sink, impl="reference").lse.detach().requires_grad_()
    dense = (q @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4).masked_fill(
        ~torch.ones(11, 14).tril().bool(), float("-inf")
    )
    p = (dense - lse[..., None]).exp()
    weights = rand(5, 2, 4, 14)
    exact = torch.autograd.grad((p.sum(2) * weights).sum() + lse.sum(), (q, k, lse))
    dtype = torch.float32 if impl == "triton" else torch.float64
    q, k, lse = (t.detach().to(dtype).requires_grad_() for t in (q, k, lse))
    found = attention_stats(q, k, lse, sink=sink.detach(), stats=("received",), impl=impl)
    assert found.received is not None
    got = torch.autograd.grad((found.received * weights.to(dtype)).sum() + found.lse.sum(), (q, k, lse))
    for value, wanted in zip(got, exact, strict=True):
        tolerance = 2e-5 if impl == "triton" else 1e-10
        torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("asked", "name"), [({"stats": ("entropy",)}, "entropy"), ({"topk": 2}, "topk"),
                                             ({"block": 4, "reduce": ("max",)}, "the block map 'max'")])  # fmt: skip
def test_a_loss_on_what_has_no_gradient_raises(asked: dict[str, Any], name: str) -> None:
    q, k, _ = leaves()
    got = attention_stats(q, k, **asked)
    value = got.entropy if got.entropy is not None else got.topk[0] if got.topk is not None else got.blocks["max"]
    with pytest.raises(RuntimeError, match=f"{name} is not differentiable; detach it"):
        value.sum().backward()
    got = attention_stats(
        q,
        k,
        **asked,
    )
    got.lse.sum().backward()
    assert q.grad is not None


def test_a_function_has_no_gradient_and_says_so() -> None:
    q, k, _ = leaves()
    with pytest.raises(ValueError, match="given as a function has no gradient"):
        attention_stats(q, k, mass={"near": lambda b, h, q, k: q - k < 2})


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_torch_accepts_the_operator(impl: str) -> None:
    q, k = rand(0, 1, 2, 9, 16).float(), rand(1, 1, 1, 9, 16).float()
    mask = Mask(causal=True, keys=torch.arange(9)[None] > 1)
    keys = [torch.ones(1, 9)]
    scores = Scores(q, k, mask, 0.25, None, torch.zeros(2))
    topk = 2 if impl != "triton" else None
    arguments = (*score_parts(scores), None, 4, list(REDUCTIONS), list(STATS), 3, topk, keys, None, impl)
    torch.library.opcheck(_op, arguments)


class Watched(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor | None]:
        got = attention_stats(q, k, mask=Mask(causal=True, window=5), block=4, stats=("received", "top1"))
        return got.blocks["sum"], got.received


def test_compiled_and_exported_models_keep_it() -> None:
    q, k = rand(0, 1, 2, 9, 16).float(), rand(1, 1, 1, 9, 16).float()
    plain = Watched()(q, k)
    compiled = torch.compile(Watched(), backend="aot_eager", fullgraph=True)
    exported = torch.export.export(Watched(), (q, k))
    assert "workbench.attention_stats" in str(exported.graph)
    for other in (compiled(q, k), exported.module()(q, k)):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    q.requires_grad_()
    compiled(q, k)[0].square().sum().backward()
    twin = q.detach().requires_grad_()
    Watched()(twin, k)[0].square().sum().backward()
    assert torch.equal(q.grad, twin.grad)
