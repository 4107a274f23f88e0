"""The Triton form of ``attention_stats``, in Triton's interpreter, against the reference in float64; and compiled for GPUs."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from workbench.kernels.attention_stats import AttentionStats, attention_stats
from workbench.kernels.mask import Mask
from workbench.kernels.scores import Relative
from workbench.kernels.stats import triton as fused
from workbench.kernels.stats.request import REDUCTIONS, STATS

Budget = Callable[[Tensor, Sequence[Tensor], Tensor], None]


def pieces(found: AttentionStats) -> dict[str, Tensor]:
    named = {name: getattr(found, name) for name in ("lse", *STATS) if name != "top1"}
    named |= {f"blocks {name}": value for name, value in found.blocks.items()}
    named |= {f"mass {name}": value for name, value in found.mass.items()}
    for name, pair in (("top1", found.top1), ("topk", found.topk)):
        if pair is not None:
            named[name] = pair[0]
    return {name: value for name, value in named.items() if value is not None}


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


OPTIONS: dict[str, Callable[[int], dict[str, Any]]] = {
    "causal": lambda n: {},
    "full": lambda n: {"mask": Mask()},
    "window": lambda n: {"mask": Mask(causal=True, window=7)},
    "two-sided window and prefix": lambda n: {"mask": Mask(window=5, prefix=3)},
    "prefix": lambda n: {"mask": Mask(causal=True, prefix=9), "block": 5},
    "padding": lambda n: {"mask": Mask(causal=True, keys=rand(1, 2, n) > -0.5, queries=rand(7, 2, n) > -0.5)},
    "documents": lambda n: {"mask": Mask(causal=True, documents=(torch.arange(n) // 40)[None]), "block": 16},
    "dense": lambda n: {"mask": Mask(dense=rand(2, 1, 2, n, n) > 0)},
    "block mask": lambda n: {"mask": Mask(causal=True, blocks=rand(3, 2, 1, -(-n // 24), -(-n // 24)) > 0, side=24)},
    "softcap and sink": lambda n: {"softcap": 3.0, "sink": rand(2, 2), "block": 100},
    "bias": lambda n: {"bias": rand(3, 1, 2, n, n).where(rand(4, 1, 2, n, n) > -1, -1e30)},
    "bias per key": lambda n: {"bias": rand(3, 2, 2, 1, n), "block": 1},
    "relative": lambda n: {"bias": Relative(rand(3, 2, 2 * n - 1), 1 - n), "mask": Mask(), "block": 7},
    "gate": lambda n: {"gate": rand(4, 2, 2, n).sigmoid() * (rand(5, 2, 2, n) > -1)},
}


def problem(option: str, n: int) -> dict[str, Any]:
    masses = {"first": torch.arange(n) < 4, "weighted": rand(8, 2, n).abs(), "near": lambda b, h, q, k: q - k < h + 2}
    return {"block": 64, "window": 9, "reduce": REDUCTIONS, "stats": STATS, "mass": masses, **OPTIONS[option](n)}


def check(q: Tensor, k: Tensor, options: dict[str, Any], within_budget: Budget) -> None:
    high = attention_stats(q.double(), k.double(), **options, impl="reference")
    orders = [torch.randperm(q.shape[3], generator=torch.Generator().manual_seed(i)) for i in range(3)]
    low = [pieces(attention_stats(q[..., o], k[..., o], **options, impl="reference")) for o in orders]
    got = attention_stats(q, k, **options, impl="triton")
    assert got.impl == "triton"
    assert set(pieces(got)) == set(pieces(high))
    # The kernel's weights of the second pass are 2 ** (score - lse), from an lse in base two that was rounded to float32.
    in_two = high.lse * 1.4426950408889634
    rounded = torch.exp2(in_two - in_two.float())
    for name, value in pieces(got).items():
        assert value.dtype == torch.float32
        plain = [one[name] for one in low]
        if name.startswith("mass "):
            plain += [one.double() * torch.where(one == 0, 1.0, rounded) for one in plain]
        within_budget(value, plain, pieces(high)[name])
    if got.top1 is not None and high.top1 is not None:
        assert torch.equal(got.top1[1], high.top1[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_within_the_error_budget(option: str, dtype: torch.dtype, assert_within_budget: Budget) -> None:
    q, k = (2 * rand(5, 2, 2, 63, 20)).to(dtype), (2 * rand(6, 2, 1, 63, 20)).to(dtype)
    check(q, k, problem(option, 63), assert_within_budget)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1, 16), {"mask": Mask(causal=True)}),
        ((100, 100, 48), {"mask": Mask(causal=True), "block": 33}),
        ((257, 257, 16), {"mask": Mask(causal=True), "block": 96}),
        ((1, 130, 16), {"mask": Mask(causal=True, offset=129), "block": 64}),
        ((5, 100, 16), {"mask": Mask(causal=True, offset=95, window=40), "block": 64}),
        ((40, 17, 16), {"mask": Mask(), "block": 8}),
    ],
    ids=["one", "hundred", "long", "decode", "decode in a window", "more queries than keys"],
)
def test_lengths_offsets_and_a_given_lse(
    shape: tuple[int, int, int], options: dict[str, Any], assert_within_budget: Budget
) -> None:
    n, m, e = shape
    q, k = rand(0, 1, 2, n, e), rand(1, 1, 1, m, e)
    stats = ("received", "entropy", "distance", "top1")
    options = {"block": 64, "reduce": ("sum", "max"), "stats": stats, **options}
    check(q, k, options, assert_within_budget)
    lse = attention_stats(q, k, mask=options["mask"], impl="reference").lse
    check(q, k, {**options, "lse": lse}, assert_within_budget)


def test_top_keys_in_order_and_ties_to_the_first() -> None:
    q, k = rand(0, 1, 1, 40, 16).round(decimals=1), rand(1, 1, 1, 70, 16)
    k[:, :, 50:60] = k[:, :, 10:20]
    options: dict[str, Any] = {"mask": Mask(causal=True, offset=30), "topk": 5, "stats": ("top1",)}
    got = attention_stats(q, k, **options, impl="triton")
    exact = attention_stats(q.double(), k.double(), **options, impl="reference")
    assert got.topk is not None
    assert exact.topk is not None
    assert torch.equal(got.topk[1], exact.topk[1])
    torch.testing.assert_close(got.topk[0].double(), exact.topk[0], rtol=1e-5, atol=1e-9)
    few = attention_stats(q[:, :, :2], k, mask=Mask(causal=True), topk=4, impl="triton").topk
    assert few is not None
    assert few[1][0, 0, 0].tolist() == [0, -1, -1, -1]
    assert (few[0][0, 0, 0, 1:] == 0).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_hidden_positions_hold_does_not_matter(poison: float) -> None:
    q, k = rand(0, 2, 2, 9, 16), rand(1, 2, 1, 9, 16)
    real = torch.arange(9) >= torch.tensor([[0], [4]])
    asked: dict[str, Any] = {"mask": Mask(causal=True, keys=real, queries=real), "block": 4, "reduce": REDUCTIONS}
    asked |= {"stats": STATS, "window": 2, "impl": "triton"}
    hidden = ~real[:, None, :, None]
    got = attention_stats(q.masked_fill(hidden, poison), k.masked_fill(hidden, poison), **asked)
    expected = pieces(attention_stats(q, k, **asked))
    for name, value in pieces(got).items():
        assert torch.equal(value, expected[name]), name
    assert torch.isneginf(got.lse[1, :, :4]).all()
    assert got.entropy is not None
    assert (got.entropy[1, :, :4] == 0).all()


def test_strided_inputs_and_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q = rand(0, 1, 70, 2, 16).transpose(1, 2)
    k = rand(1, 1, 70, 2, 32).transpose(1, 2)[..., ::2]
    asked: dict[str, Any] = {"block": 16, "reduce": REDUCTIONS, "stats": STATS, "window": 5, "impl": "triton"}
    first, again = (
        pieces(attention_stats(q, k, **asked)),
        pieces(attention_stats(q.contiguous(), k.contiguous(), **asked)),
    )
    monkeypatch.setattr(fused, "_lanes", lambda tiles, *rest: tiles)
    spread = pieces(attention_stats(q, k, **asked))
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        if name != "received":
            assert torch.equal(value, spread[name]), name
    torch.testing.assert_close(first["received"], spread["received"])


def test_masses_of_functions_in_several_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = rand(0, 1, 2, 100, 16), rand(1, 1, 2, 100, 16)
    mass = {"far": lambda b, h, q, k: (q - k).clamp(min=0) * 0.5, "set": torch.arange(100) % 3 == 0}
    monkeypatch.setattr(fused, "BAND", 2 * 100 * 32)
    got = attention_stats(q, k, mass=mass, impl="triton").mass
    exact = attention_stats(q.double(), k.double(), mass=mass, impl="reference").mass
    assert list(got) == ["far", "set"]
    for name, value in got.items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bias": lambda lo, hi: torch.zeros(hi - lo, 4)}, "bias is a function of rows"),
        ({"q": torch.zeros(1, 1, 4, 272), "k": torch.zeros(1, 1, 4, 272)}, "heads of width 272"),
        ({"q": torch.zeros(1, 1, 4, 8).double(), "k": torch.zeros(1, 1, 4, 8).double()}, "float64"),
        ({"k": torch.zeros(1, 1, 99, 8), "topk": 65}, "topk=65"),
    ],
)
def test_what_it_does_not_do_is_refused_and_left_to_others(options: dict[str, Any], said: str) -> None:
    given = {"q": torch.zeros(1, 1, 4, 8), "k": torch.zeros(1, 1, 4, 8), "mask": Mask(), **options}
    with pytest.raises(RuntimeError, match=rf"impl='triton' cannot run here: .*{said}.*use impl='cpu'"):
        attention_stats(**given, impl="triton")
    assert attention_stats(**given).impl == "cpu"


def test_without_a_gpu_or_the_interpreter_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="the tensors are on cpu, and the kernels run on CUDA"):
        attention_stats(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), impl="triton")


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability: int, compiled_for: Callable[[int, str], list[str]]) -> None:
    assert compiled_for(capability, "aot_attention_stats:calls").count("stats_kernel") >= 8
