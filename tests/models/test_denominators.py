"""The log-sum-exp of the model's own kernel, taken along for the map."""

import pytest
import torch
from builders import NETS
from torch.nn.functional import scaled_dot_product_attention

import workbench as wb
from workbench.kernels.attention_stats import attention_stats
from workbench.kernels.mask import Mask
from workbench.models.denominators import Denominators


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 70, 16, generator=g) for heads in (4, 2, 2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_the_output_is_the_same_to_the_bit_and_the_lse_is_right(causal: bool) -> None:
    q, k, v = tensors()
    options = {"is_causal": causal, "scale": 0.3, "enable_gqa": True}
    plain = scaled_dot_product_attention(q, k, v, **options)
    with Denominators() as seen:
        watched = scaled_dot_product_attention(q, k, v, **options)
    assert torch.equal(plain, watched)
    exact = attention_stats(q.double(), k.double(), mask=Mask(causal=causal), scale=0.3, impl="reference").lse
    assert seen.lse is not None
    torch.testing.assert_close(seen.lse.double(), exact, rtol=1e-6, atol=1e-5)


@torch.no_grad()
def test_where_it_is_not_to_be_had_or_not_exact_there_is_none() -> None:
    q, k, v = (t.repeat_interleave(4 // t.shape[1], 1) for t in tensors())
    mask = torch.ones(70, 70, dtype=torch.bool).tril()
    with Denominators() as masked:
        assert torch.equal(scaled_dot_product_attention(q, k, v, mask), scaled_dot_product_attention(q, k, v, mask))
    assert masked.lse is None
    with Denominators() as rounded:
        scaled_dot_product_attention(*(t.bfloat16() for t in (q, k, v)), is_causal=True)
    assert rounded.lse is None
    with Denominators() as twice:
        scaled_dot_product_attention(q, k, v)
        scaled_dot_product_attention(q, k, v)
    assert twice.lse is None
    with torch.enable_grad(), Denominators() as differentiated:
        scaled_dot_product_attention(q.requires_grad_(), k, v).sum().backward()
    assert differentiated.lse is None
    assert q.grad is not None


def test_flash_on_cuda_returns_what_is_taken_of_it() -> None:
    q, k, v = (t.to("meta", torch.bfloat16) for t in tensors())
    found = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=0.3)
    assert (found[0].shape, found[1].shape, found[1].dtype) == (q.shape, q.shape[:3], torch.float32)


def test_a_captured_model_computes_no_denominator_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench.patterns import softmax

    given = []

    def spy(q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor | None, **options: object) -> object:
        given.append(lse)
        return attention_stats(q, k, lse, **options)

    monkeypatch.setattr(softmax, "attention_stats", spy)
    model = wb.load(NETS["llama"](implementation="sdpa"))
    with torch.no_grad():
        run = model.run(torch.arange(9)[None], maps=wb.capture(blocks=4, stats=("entropy",)))
        padded = model.run(
            {"input_ids": torch.arange(18).view(2, 9), "attention_mask": (torch.arange(18) != 9).view(2, 9).long()},
            maps=wb.capture(blocks=4),
        )
    layers = len(run.maps)
    assert all(lse is not None for lse in given[:layers])
    assert all(lse is None for lse in given[layers : 2 * layers])
    torch.testing.assert_close(
        run.maps[0].rows(0, 9).sum(-1), torch.ones(1, run.maps[0].shape[1], 9, dtype=torch.float64)
    )
    assert len(padded.maps) == layers
